"""Package metadata is read from settings.ini, where nbdev reads it too.

The wheel also holds the course: what `sftlab lab` copies.
"""
import shutil
import tempfile
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent


class BuildPackageAndCourse(build_py):
    "Put lessons and exercises into the built package: an installed one has no repository near it."

    def run(self):
        super().run()
        if self.editable_mode:  # an editable install finds them in the repository
            return
        for name in ("nbs", "exercises"):
            leave_out = shutil.ignore_patterns(".*", "_*", "solutions", "live")  # as `sftlab lab`
            to = Path(self.build_lib, "sftlab/course", name)
            shutil.copytree(here / name, to, ignore=leave_out)


# The package is put together outside of the project. In its usual place, build/, copies of the
# notebooks would be left, which nbdev_export takes for sources: an old one writes over a module.
staging = tempfile.TemporaryDirectory(prefix="sftlab-build-")  # removed when the build ends

ini = ConfigParser()
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["sftlab", "sftlab.*"]),
    package_data={"sftlab": ["assets/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={
        "lab": cfg["lab_requirements"].split(),
        "dev": cfg["dev_requirements"].split(),
    },
    cmdclass={"build_py": BuildPackageAndCourse},
    options={"build": {"build_base": staging.name}},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["sftlab=sftlab._modidx:d"],  # where nbdev's show_doc finds sources
    },
)
