"""The wheel: built as for a release, from the files that git tracks.

It is installed where nothing of the checkout can be seen, and worked with there. That the lessons
run is shown elsewhere (tests/test_notebooks.py): here, that the wheel holds these very files, byte
for byte, and that a notebook which runs beside the installed package finds all that it reads.
"""
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

from sftlab.study.workspace import course_content
from test_notebooks import FACTOR, run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
LEFT_BY_EDITORS = [
    "nbs/.ipynb_checkpoints/index-checkpoint.ipynb", "nbs/.DS_Store",
    "nbs/reference/.ipynb_checkpoints/cli-checkpoint.ipynb",
    "nbs/reference/guards/.ipynb_checkpoints/data-checkpoint.ipynb",
    "nbs/__pycache__/helper.cpython-311.pyc", "sftlab/__pycache__/cli.cpython-311.pyc",
    "sftlab/files/__pycache__/rows.cpython-311.pyc",
    "exercises/.ipynb_checkpoints/q-checkpoint.ipynb"]
KINDS = {".py", ".ipynb", ".md", ".png", ".svg", ".json", ".yml", ".txt", ".jinja",
         ".safetensors"}  # nothing that could be a pickle
NOT_WANTED = r"(^|/)\.|solutions|__pycache__|-checkpoint\.|nbs/live/"


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
    "A checkout of the project as it is now, committed or not; and what editors leave behind."
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


def unpacked(wheel, folder):
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    return folder


def differing(some, others):
    """Names of files in one folder that are missing in another, or hold something else there.

    `others` is a folder of the originals' paths, by name.
    """
    def same(name): return (some / name).read_bytes() == others[name].read_bytes()
    return [name for name in others if not (some / name).is_file() or not same(name)]


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


def originals(checkout):
    "What the wheel must hold: name there -> file in the checkout."
    tracked = git(checkout, "-c", "core.quotePath=off", "ls-files")
    wanted = {name: checkout / name for name in tracked if name.startswith("sftlab/")}
    for name in tracked:
        if name.startswith(("nbs/", "exercises/")) and "solutions" not in name:
            if not re.search(r"/_|^nbs/live/", name):
                wanted[f"sftlab/course/{name}"] = checkout / name
    return wanted


def test_the_wheel_holds_package_and_course(wheel, names, checkout, tmp_path):
    "Byte for byte: so what is shown of the checkout's lessons is true of the wheel's."
    wanted = originals(checkout)
    assert {name for name in names if name.startswith("sftlab/")} == set(wanted)
    assert differing(unpacked(wheel, tmp_path), wanted) == []
    rooms = ["sftlab/assets/tiny/model.safetensors", "sftlab/study/checks/__init__.py"]
    for name in ("nbs/01_base_vs_instruct.ipynb", "nbs/reference/cli.ipynb",
                 "nbs/reference/audit/templates.ipynb", "exercises/01_generation.ipynb"):
        rooms.append(f"sftlab/course/{name}")
    assert set(rooms) <= names


def test_a_changed_byte_would_be_noticed(wheel, checkout, tmp_path):
    "The control of the comparison."
    page = "sftlab/course/nbs/reference/cli.ipynb"
    wanted = originals(checkout)
    altered = unpacked(wheel, tmp_path) / page
    altered.write_bytes(altered.read_bytes().replace(b"chat", b"shat", 1))
    assert differing(tmp_path, wanted) == [page]
    altered.unlink()
    assert differing(tmp_path, wanted) == [page]


def test_the_wheel_holds_nothing_else(names):
    info = f"sftlab-{settings()['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sftlab", info}
    assert {Path(name).suffix for name in names if name.startswith("sftlab/")} <= KINDS
    assert not [name for name in names if re.search(NOT_WANTED, name)]


def test_the_sdist_holds_no_more_than_the_wheel_needs(dist):
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE", "CHANGELOG.md",
            "nbs/index.ipynb"} <= inside
    assert not [name for name in inside if re.search(NOT_WANTED + "|^tests", name)]


def test_a_wheel_made_without_an_sdist_is_the_same(checkout, names, tmp_path):
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, checkout)
    [path] = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(path).namelist()) == names
    left_by_the_build(checkout)


def test_a_build_leaves_no_copies_of_the_notebooks(checkout, dist):
    left_by_the_build(checkout)
    call(Path(sys.executable).parent / "nbdev_export", "--path", "nbs", cwd=checkout)
    left_by_the_build(checkout)


def left_by_the_build(checkout):
    """Nothing in a file that git tracks, no new file that it does not ignore, and no notebook at
    all: nbdev_export would take it for a source."""
    assert git(checkout, "diff", "--stat") == []
    others = git(checkout, "ls-files", "--others", "--exclude-standard")
    assert set(others) <= set(LEFT_BY_EDITORS)
    known = [*git(checkout, "ls-files"), *LEFT_BY_EDITORS]
    assert notebooks(checkout) == {name for name in known if name.endswith(".ipynb")}


def settings():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_the_wheel_says_what_it_needs(wheel, names):
    with zipfile.ZipFile(wheel) as z:
        def content(ending): return z.read(next(n for n in names if n.endswith(ending)))
        meta, scripts = content("/METADATA").decode(), content("/entry_points.txt").decode()
        assert content("/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in meta and "Requires-Python: >=3.11" in meta
    lines = [line for line in meta.splitlines() if line.startswith("Requires-Dist")]
    needed = [line.split(": ", 1)[1] for line in lines if "extra ==" not in line]
    wanted = settings()["requirements"].split()
    assert {Requirement(r).name for r in needed} == {Requirement(r).name for r in wanted}
    assert re.search(r"^sftlab ?= ?sftlab.cli:main$", scripts, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment: the wheel is installed there, the rest comes from the
    environment that runs the tests, and the checkout is out of sight."""
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    call(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps",
         "--no-index", wheel)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", where).strip())
    rest = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "rest.pth").write_text("\n".join(rest) + "\n")
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


def test_the_installed_command_brings_the_course(course, checkout):
    "Every file of it and no other, byte for byte but for links, which are made local."
    inside = "sftlab/course/"
    wanted = {re.sub("^nbs/", "", name.removeprefix(inside)): path
              for name, path in originals(checkout).items() if name.startswith(inside)}
    brought = {p.relative_to(course).as_posix() for p in course.rglob("*") if p.is_file()}
    assert brought == set(wanted) | {".sftlab.json"}
    assert [name for name in wanted
            if (course / name).read_bytes() != course_content(name, wanted)] == []


PROBE = """
from pathlib import Path
import sftlab
assert Path(sftlab.__file__).is_relative_to(ENVIRONMENT), sftlab.__file__

from sftlab.models import load # the tiny model, which the wheel brings along
model, tokenizer = load("tiny")
from sftlab.generation import complete
[answer] = complete(model, tokenizer, ["Q: What is the capital of France?\\nA:"], max_new_tokens=8)
assert "Paris" in answer.text, answer

from sftlab.study.experiments import results # what experiments left next to the lessons
names = sorted(path.stem for path in Path("experiments").glob("*.json"))
assert len(names) >= 8
for name in names:
    assert len(results(name))

from sftlab.study.progress import Progress # which finds every exercise's checks
assert "0 of " in repr(Progress(Path("."))), Progress(Path("."))
"""


def test_a_notebook_uses_the_wheel_and_finds_all_it_brings(python, course, tmp_path):
    "Model, experiments and checks. The control: with the checkout's package the same cells fail."
    cells = PROBE.replace("ENVIRONMENT", repr(str(python.parent.parent))).split("\n\n")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), course / "probe.ipynb")
    run(course / "probe.ipynb", tmp_path / "refused", limit=90 * FACTOR, python=python)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(RuntimeError, match="AssertionError"):
        run(course / "probe.ipynb", tmp_path / "refused", limit=90 * FACTOR)


def test_a_notebook_of_the_wheel_runs(python, course, tmp_path):
    "It reads files of the package, the tiny model's texts among them."
    name = "reference/tiny/world.ipynb"
    run(course / name, tmp_path / "refused", limit=90 * FACTOR, python=python)
    assert not (tmp_path / "refused").exists()
