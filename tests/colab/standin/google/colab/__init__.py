"""A stand-in for Colab's own package: what notebooks of the course may call, and no more.

Colab loads it as an extension of IPython when a kernel starts; so does the environment that
tests/colab/run.py makes.
"""


def load_ipython_extension(ipython):
    "Colab's own sets up its pip, its forms and its tables here."
