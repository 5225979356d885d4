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
CODE = [p.relative_to(ROOT).with_suffix("") for p in sorted(ROOT.glob("sftlab/**/[!_]*.py"))]
MODULES = [".".join(path.parts) for path in CODE]
BLOCK = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is for development, the package must do without")
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
    kinds = ("requirements", "lab_requirements", "dev_requirements")
    return [Requirement(r) for kind in kinds for r in settings()[kind].split()]


def pins():
    "Name to pinned requirement, from constraints.txt."
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def test_importing_the_package_is_quick():
    "0.2 s: the best of three, since the machine may be busy."
    def seconds():
        done = python("-X", "importtime", "-c", "import sftlab", cwd=ROOT, check=True)
        lines = done.stderr.splitlines()
        return int(next(line for line in lines if line.endswith(" sftlab")).split("|")[1]) / 1e6
    assert min(seconds() for _ in range(3)) < 0.2


def test_importing_the_package_brings_nothing_heavy():
    done = python("-c", "import sys, sftlab; print(*sys.modules)", cwd=ROOT, check=True)
    assert not {"torch", "transformers", "nbdev", "IPython", "numpy"} & set(done.stdout.split())


def test_modules_do_without_development_tools():
    blocked = {"nbdev", "execnb", "fastcore", "ghapi", "jupyterlab", "notebook", "nbconvert",
               "nbclient", "pytest"}
    assert {"sftlab.lora", "sftlab.tiny.world", "sftlab.study.checks.data"} <= set(MODULES)
    done = python("-c", BLOCK.format(blocked=blocked, modules=MODULES), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    control = python("-c", BLOCK.format(blocked=blocked, modules=["nbdev"]), cwd=ROOT)
    assert "must do without" in control.stderr


def test_the_version_is_the_same_everywhere():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "sftlab/__init__.py").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", changes, flags=re.MULTILINE)


def test_every_requirement_is_pinned_within_its_range():
    for r in requirements():
        [pin] = pins()[canonicalize_name(r.name)].specifier
        assert pin.operator == "==" and r.specifier.contains(pin.version), f"{r}, but {pin}"


def asked_for(requirement):
    "Whether a requirement counts here, with its extras."
    extras = {"", *requirement.extras}
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def brought_by(*kinds):
    "The distributions that come with these requirements, and with what they ask for."
    found, todo = set(), [r for kind in kinds for r in settings()[kind].split()]
    while todo:
        r = Requirement(todo.pop())
        name = canonicalize_name(r.name)
        if name not in found and asked_for(r):
            found.add(name)
            todo += metadata.requires(name) or []
    return found


def imported_by(notebook):
    "The top-level names of what a notebook imports."
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    names = []
    for source in ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]:
        plain = re.sub(r"^\s*[%!](?!=).*", "", source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_lessons_need_nothing_but_the_package_and_its_lab():
    "A learner without make installs sftlab[lab], and no development tools."
    there = brought_by("requirements", "lab_requirements")
    owners = metadata.packages_distributions()
    notebooks = [*ROOT.glob("nbs/[0-9]*.ipynb"), *ROOT.glob("exercises/*.ipynb")]
    needed = {name for path in notebooks for name in imported_by(path)}
    needed -= {*sys.stdlib_module_names, "sftlab"}
    missing = {n for n in needed if not {canonicalize_name(d) for d in owners[n]} & there}
    assert "torch" in needed and missing == set()
    assert "bitsandbytes" in needed and "bitsandbytes" not in brought_by("requirements")  # control
    assert not {"nbdev", "nbgrader"} & there


def test_no_cuda_on_a_machine_without_a_card():
    "A plain `torch` brings gigabytes of it along."
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        pytest.skip("not a Linux machine without an NVIDIA card")
    names = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    assert "torch" in names
    assert [name for name in names if name.startswith(("nvidia-", "triton", "cuda-"))] == []


def test_pins_are_exact_and_serve_every_build():
    for name, r in pins().items():
        [pin] = r.specifier
        exact = pin.operator == "==" and "+" not in pin.version
        assert exact, f"{name}: a pin to one build of one system"


def targets():
    text = (ROOT / "Makefile").read_text()
    return re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split()


def make(*args, cwd, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(["make", *args], cwd=cwd, env=kept | env,
                          capture_output=True, text=True, timeout=60)


def test_make_help_explains_every_target():
    lines = make("help", cwd=ROOT).stdout.splitlines()
    explained = {line.split()[1]: line.split(maxsplit=2)[2] for line in lines}
    assert set(explained) == set(targets())
    assert make(cwd=ROOT).stdout.splitlines() == lines


SETUP_STAND_IN = """
mkdir -p .venv/bin && echo $1 >> count
for tool in sftlab python ruff; do
    printf '#!/bin/sh\\necho %s "$@"\\n' $tool > .venv/bin/$tool
    chmod +x .venv/bin/$tool
done
touch .venv/.installed
[ $1 = lab ] || touch .venv/.installed-dev
"""


@pytest.fixture
def copy(tmp_path):
    "The Makefile, with a set-up script that counts its calls, and commands that show arguments."
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/setup.sh").write_text(SETUP_STAND_IN)
    (tmp_path / "tools/uv_settings.py").touch()
    return tmp_path


def test_make_lab_installs_once_and_passes_its_arguments_on(copy):
    for _ in range(2):
        done = make("lab", "LAB_ARGS=--no-browser --port=9999", cwd=copy)
        assert done.stdout.splitlines()[-1] == "sftlab lab workspace --no-browser --port=9999"
    assert (copy / "count").read_text() == "lab\n"
    later = (copy / ".venv/.installed").stat().st_mtime + 5
    os.utime(copy / "constraints.txt", (later, later))
    make("lab", cwd=copy)
    assert (copy / "count").read_text() == "lab\nlab\n"


def test_make_test_installs_what_tests_need_and_checks_the_form_first(copy):
    make("lab", cwd=copy)
    for _ in range(2):
        lines = make("test", "TEST_ARGS=-k models", cwd=copy).stdout.splitlines()
        assert lines[-2].startswith("ruff check")
        assert lines[-1].endswith("--dist loadgroup -k models")
    assert (copy / "count").read_text() == "lab\ndev\n"


MESS = (".venv/lib/__pycache__", "workspace/__pycache__", "runs/first", "_proc", "build",
        "sftlab/__pycache__", "sftlab.egg-info")


def test_make_clean_keeps_what_is_dear(copy):
    for name in MESS:
        (copy / name).mkdir(parents=True)
    assert make("clean", cwd=copy).returncode == 0
    left = {name for name in MESS if (copy / name).exists()}
    assert left == {".venv/lib/__pycache__", "workspace/__pycache__", "runs/first"}


@pytest.mark.parametrize("script", ["tools/setup.sh", ".ci/run"])
def test_scripts_parse(script):
    shell = "bash" if script == ".ci/run" else "sh"
    assert subprocess.run([shell, "-n", ROOT / script]).returncode == 0


def test_workflows_test_every_supported_python_and_publish_with_quarto():
    test, docs = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]
                  for name in ("test", "docs"))
    tested = {str(entry["python"]) for entry in test["test"]["strategy"]["matrix"]["include"]}
    declared = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text()))
    assert tested == declared and settings()["min_python"] in declared
    assert any(step.get("run") == "bash .ci/run" for step in test["test"]["steps"])
    uses = [step.get("uses", "") for step in docs["build"]["steps"]]
    assert any(u.startswith("quarto-dev/quarto-actions/setup@") for u in uses)
