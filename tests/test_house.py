"The house around the lessons: quick imports, pins, make, continuous integration."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MODULES = [f"sftlab.{p.stem}" for p in sorted(ROOT.glob("sftlab/[!_]*.py"))]
BLOCK = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}: raise ImportError(f"{{name}} is for development, the package must do without")
sys.meta_path.insert(0, Block())
for name in {modules}: importlib.import_module(name)
"""


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


def settings():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def requirements():
    return [Requirement(r) for kind in ("requirements", "lab_requirements", "dev_requirements") for r in settings()[kind].split()]


def pins():
    "Name to pinned requirement, from constraints.txt."
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def test_importing_the_package_is_quick():
    "0.2 s: the best of three, since the machine may be busy."
    def seconds():
        lines = python("-X", "importtime", "-c", "import sftlab", cwd=ROOT, check=True).stderr.splitlines()
        return int(next(line for line in lines if line.endswith(" sftlab")).split("|")[1]) / 1e6
    assert min(seconds() for _ in range(3)) < 0.2


def test_importing_the_package_brings_nothing_heavy():
    done = python("-c", "import sys, sftlab; print(*sys.modules)", cwd=ROOT, check=True)
    assert not {"torch", "transformers", "nbdev", "IPython", "numpy"} & set(done.stdout.split())


def test_modules_do_without_development_tools():
    blocked = {"nbdev", "execnb", "fastcore", "ghapi", "jupyterlab", "notebook", "nbconvert", "nbclient", "pytest"}
    done = python("-c", BLOCK.format(blocked=blocked, modules=MODULES), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    control = python("-c", BLOCK.format(blocked=blocked, modules=["nbdev"]), cwd=ROOT)
    assert "must do without" in control.stderr


def test_the_version_is_the_same_everywhere():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "sftlab/__init__.py").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def test_every_requirement_is_pinned_within_its_range():
    for r in requirements():
        [pin] = pins()[canonicalize_name(r.name)].specifier
        assert pin.operator == "==" and r.specifier.contains(pin.version), f"{r}, but {pin}"


def brought_by(*kinds):
    "The distributions that an installation with these requirements has, and those they ask for in turn."
    found, todo = set(), [r for kind in kinds for r in settings()[kind].split()]
    while todo:
        r = Requirement(todo.pop())
        if (name := canonicalize_name(r.name)) in found or (r.marker and not any(r.marker.evaluate({"extra": extra}) for extra in {"", *r.extras})):
            continue
        found.add(name)
        todo += metadata.requires(name) or []
    return found


def imported_by(notebook):
    code = ["".join(c["source"]) for c in json.loads(notebook.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    nodes = [node for source in code for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE)))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    return {name.split(".")[0] for name in names}


def test_lessons_need_nothing_but_the_package_and_its_lab():
    "A learner without make installs sftlab[lab], and no development tools."
    there, owners = brought_by("requirements", "lab_requirements"), metadata.packages_distributions()
    needed = {name for path in [*ROOT.glob("nbs/[0-9]*.ipynb"), *ROOT.glob("exercises/*.ipynb")] for name in imported_by(path)} - set(sys.stdlib_module_names) - {"sftlab"}
    missing = {name for name in needed if not {canonicalize_name(d) for d in owners[name]} & there}
    assert "torch" in needed and missing == set()
    assert "bitsandbytes" in needed and "bitsandbytes" not in brought_by("requirements") and "nbdev" not in there # the control


def test_pins_are_exact_and_serve_every_build():
    for name, r in pins().items():
        [pin] = r.specifier
        assert pin.operator == "==" and "+" not in pin.version, f"{name}: a pin to one build of one system"


def targets():
    return re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()


def make(*args, cwd, **env):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"} | env
    return subprocess.run(["make", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_make_help_explains_every_target():
    lines = make("help", cwd=ROOT).stdout.splitlines()
    explained = {line.split()[1]: line.split(maxsplit=2)[2] for line in lines}
    assert set(explained) == set(targets())
    assert make(cwd=ROOT).stdout.splitlines() == lines


@pytest.fixture
def copy(tmp_path):
    "The Makefile, with a set-up script that only counts how often it was called and a command that shows its arguments."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/setup.sh").write_text(
        "mkdir -p .venv/bin && echo once >> count && printf '#!/bin/sh\\necho sftlab \"$@\"\\n' > .venv/bin/sftlab && chmod +x .venv/bin/sftlab && touch .venv/.installed\n")
    return tmp_path


def test_make_lab_installs_once_and_passes_its_arguments_on(copy):
    for _ in range(2):
        done = make("lab", "LAB_ARGS=--no-browser --port=9999", cwd=copy)
        assert done.stdout.splitlines()[-1] == "sftlab lab workspace --no-browser --port=9999"
    assert (copy / "count").read_text() == "once\n"
    later = (copy / ".venv/.installed").stat().st_mtime + 5
    os.utime(copy / "constraints.txt", (later, later))
    make("lab", cwd=copy)
    assert (copy / "count").read_text() == "once\nonce\n"


def test_make_clean_keeps_what_is_dear(copy):
    for name in (".venv/lib/__pycache__", "workspace/__pycache__", "runs/first", "_proc", "build", "sftlab/__pycache__", "sftlab.egg-info"):
        (copy / name).mkdir(parents=True)
    assert make("clean", cwd=copy).returncode == 0
    left = {name for name in (".venv/lib/__pycache__", "workspace/__pycache__", "runs/first", "_proc", "build", "sftlab/__pycache__", "sftlab.egg-info")
            if (copy / name).exists()}
    assert left == {".venv/lib/__pycache__", "workspace/__pycache__", "runs/first"}


@pytest.mark.parametrize("script", ["tools/setup.sh", ".ci/run"])
def test_scripts_parse(script):
    shell = "bash" if script == ".ci/run" else "sh"
    assert subprocess.run([shell, "-n", ROOT / script]).returncode == 0


def test_workflows_test_every_supported_python_and_publish_with_quarto():
    test, docs = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"] for name in ("test", "docs"))
    tested = {str(entry["python"]) for entry in test["test"]["strategy"]["matrix"]["include"]}
    declared = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text()))
    assert tested == declared and settings()["min_python"] in declared
    assert any(step.get("run") == "bash .ci/run" for step in test["test"]["steps"])
    uses = [step.get("uses", "") for step in docs["build"]["steps"]]
    assert any(u.startswith("quarto-dev/quarto-actions/setup@") for u in uses)
