"""A stand-in for Colab's own package: what notebooks of the course may call, and no more.

Colab loads it as an extension of IPython when a kernel starts; so does the environment that
tests/colab/run.py makes. With it come these libraries. Where the installation of the course
replaced one of them, a learner would have to restart.
"""
import numpy  # noqa: F401
import PIL  # noqa: F401
import psutil  # noqa: F401


def load_ipython_extension(ipython):
    "Colab's own sets up its pip, its forms and its tables here."
