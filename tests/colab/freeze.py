"""What Colab has installed, and what has changed: python tests/colab/freeze.py NEWER

Reads the list that Colab publishes. freeze.txt is the one that the course was last tried with.
"""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Colab's own parts that a notebook meets, on top of what the course asks for.
PARTS = """
    torchvision torchaudio torchao torchcodec ipython ipykernel notebook nbformat jupyter-client
    tornado pyzmq traitlets pillow sentence-transformers pyarrow huggingface-hub setuptools
""".split()


def read(path) -> dict: # name -> version
    "The packages of a list. What is installed from a file counts by the version in its name."
    found = {}
    for line in Path(path).read_text("utf-8").splitlines():
        pinned = re.match(r"([\w.-]+)==(\S+)$", line)
        built = re.match(r"([\w.-]+) @ \S*/[\w.]+-(\d[\w.]*)(?:%2B\w+)?(?:-cp|\.tar)", line)
        if pinned or built:
            name, version = (pinned or built).groups()
            found[canonicalize_name(name)] = version
    return found


def python_version(path) -> str: # such as "3.13"
    "Which Python the list is for: its wheels of torch say so."
    digits = re.search(r"torch-\S+-cp(\d+)-", Path(path).read_text("utf-8"))[1]
    return f"{digits[0]}.{digits[1:]}"


def concerned() -> list: # of names
    "What a notebook of ours meets on Colab: what the course asks for, and Colab's own parts."
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    kept = ini["DEFAULT"]
    asked = (kept["requirements"] + " " + kept["lab_requirements"]).split()
    names = {canonicalize_name(Requirement(r).name) for r in asked} - {"jupyterlab"}
    return sorted(names | set(PARTS))


def changes(old:dict, new:dict, names) -> list: # of lines
    "What differs between two lists, of some packages."
    lines = []
    for name in names:
        before, after = old.get(name), new.get(name)
        if before != after:
            lines.append(f"{name}: {before or 'not there'} -> {after or 'not there'}")
    return lines


def main(newer, older=HERE / "freeze.txt"):
    old, new = read(older), read(newer)
    ours = changes(old, new, concerned())
    pythons = python_version(older), python_version(newer)
    if pythons[0] != pythons[1]:
        ours.insert(0, f"Python: {pythons[0]} -> {pythons[1]}")
    every = len(changes(old, new, {*old, *new}))
    print(f"{every} of {len(new)} packages differ; of those that the course meets, {len(ours)}")
    print(*ours, sep="\n", end="\n" if ours else "")


if __name__ == "__main__":
    main(*sys.argv[1:2])
