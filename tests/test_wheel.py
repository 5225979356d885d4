"The wheel: built as for a release, from the files that git tracks; installed where nothing of the checkout can be seen; and worked with."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from test_notebooks import BUDGET, FACTOR, run

ROOT = Path(__file__).resolve().parent.parent
LEFT_BY_EDITORS = ["nbs/.ipynb_checkpoints/index-checkpoint.ipynb", "nbs/reference/.ipynb_checkpoints/cli-checkpoint.ipynb", "nbs/.DS_Store",
                   "nbs/__pycache__/helper.cpython-311.pyc", "sftlab/__pycache__/cli.cpython-311.pyc", "exercises/.ipynb_checkpoints/q-checkpoint.ipynb"]
KINDS = {".py", ".ipynb", ".md", ".png", ".svg", ".json", ".txt", ".jinja", ".safetensors"}  # nothing that could be a pickle


def call(*words, **kwargs):
    "Run a command that must go well."
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(checkout, *words):
    return call("git", "-c", "core.excludesFile=", *words, cwd=checkout).splitlines()


def notebooks(checkout):
    return {p.relative_to(checkout).as_posix() for p in checkout.rglob("*.ipynb")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A checkout of the project as it is now, changes that are not committed included; and what editors leave behind."
    copy = tmp_path_factory.mktemp("checkout")
    for name in git(ROOT, "-c", "core.quotePath=off", "ls-files"):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / "exercises/solutions/q.ipynb").write_text("{}")
    git(copy, "init", "-q")
    git(copy, "add", "-A")
    for name in LEFT_BY_EDITORS:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    return copy


@pytest.fixture(scope="module")
def dist(checkout, tmp_path_factory):
    "A folder with the sdist and the wheel that was made from it."
    to = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", to, checkout)
    return to


@pytest.fixture(scope="module")
def wheel(dist):
    [path] = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= 20e6


def test_the_wheel_holds_package_and_course(names, checkout):
    tracked = set(git(checkout, "ls-files"))
    package = {name for name in tracked if name.startswith("sftlab/")}
    course = {f"sftlab/course/{name}" for name in tracked if name.startswith(("nbs/", "exercises/")) and "solutions" not in name}
    assert {name for name in names if name.startswith("sftlab/")} == package | course
    assert {"sftlab/assets/tiny/model.safetensors", "sftlab/course/nbs/01_base_vs_instruct.ipynb", "sftlab/course/nbs/reference/cli.ipynb"} <= names


def test_the_wheel_holds_nothing_else(names):
    assert {name.split("/")[0] for name in names} == {"sftlab", f"sftlab-{settings()['version']}.dist-info"}
    assert {Path(name).suffix for name in names if name.startswith("sftlab/")} <= KINDS
    assert not [name for name in names if re.search(r"(^|/)\.|solutions|__pycache__|checkpoint", name)]


def test_the_sdist_holds_no_more_than_the_wheel_needs(dist):
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "CHANGELOG.md", "nbs/index.ipynb"} <= inside
    assert not [name for name in inside if re.search(r"(^|/)\.|solutions|__pycache__|checkpoint|^tests", name)]


def test_a_wheel_made_without_an_sdist_is_the_same(checkout, names, tmp_path):
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout)
    [path] = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(path).namelist()) == names
    left_by_the_build(checkout)


def test_a_build_leaves_no_copies_of_the_notebooks(checkout, dist):
    left_by_the_build(checkout)
    call(Path(sys.executable).parent / "nbdev_export", "--path", "nbs", cwd=checkout)
    left_by_the_build(checkout)


def left_by_the_build(checkout):
    "Nothing in a file that git tracks, no new file that it does not ignore, and no notebook at all: nbdev_export would take it for a source."
    assert git(checkout, "diff", "--stat") == [] and set(git(checkout, "ls-files", "--others", "--exclude-standard")) <= set(LEFT_BY_EDITORS)
    assert notebooks(checkout) == {name for name in [*git(checkout, "ls-files"), *LEFT_BY_EDITORS] if name.endswith(".ipynb")}


def settings():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_the_wheel_says_what_it_needs(wheel, names):
    with zipfile.ZipFile(wheel) as z:
        meta = z.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        scripts = z.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
        assert z.read(next(n for n in names if n.endswith("/LICENSE"))) == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in meta and "Requires-Python: >=3.11" in meta
    needed = {Requirement(line.split(": ", 1)[1]).name for line in meta.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert needed == {Requirement(r).name for r in settings()["requirements"].split()}
    assert re.search(r"^sftlab ?= ?sftlab.cli:main$", scripts, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "The interpreter of a fresh environment: the wheel is installed there, the rest comes from the environment that runs the tests, and the checkout is out of sight."
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    call(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "rest.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return python


def outside():
    "The environment's variables without those that would show the checkout."
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def course(python, tmp_path_factory):
    "What the installed command copies into an empty folder."
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("learner")
    said = call(python.parent / "sftlab", "lab", "course", "--version", cwd=folder, env=outside())
    assert said.strip().splitlines()[-1][0].isdigit(), said
    return folder / "course"


def test_the_installed_command_brings_the_course(course, names):
    wanted = {re.sub("^sftlab/course/(nbs/)?", "", name) for name in names if name.startswith("sftlab/course/")}
    assert {p.relative_to(course).as_posix() for p in course.rglob("*") if p.is_file()} == wanted | {".sftlab.json"}


def test_notebooks_use_the_wheel(python, course, tmp_path):
    "The control: what a notebook imports is the wheel's, and not the checkout's."
    source = f"import sftlab\nfrom pathlib import Path\nassert Path(sftlab.__file__).is_relative_to({str(python.parent.parent)!r}), sftlab.__file__"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), course / "probe.ipynb")
    run(course / "probe.ipynb", tmp_path / "refused", limit=60 * FACTOR, python=python)
    with pytest.raises(RuntimeError, match="AssertionError"):
        run(course / "probe.ipynb", tmp_path / "refused", limit=60 * FACTOR)


@pytest.mark.parametrize("name", ["reference/tiny/world.ipynb", "07_lora.ipynb"])
def test_a_notebook_of_the_wheel_runs(python, course, tmp_path, name):
    "Lesson 7 trains, and reads what long experiments left beside the lessons."
    run(course / name, tmp_path / "refused", limit=3 * FACTOR * BUDGET.get(f"nbs/{name}", 60), python=python)
    assert not (tmp_path / "refused").exists()
