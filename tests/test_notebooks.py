"Every notebook: exported code in step, nothing but work in the file, and run from top to bottom where no network can be reached."
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if not p.parent.name.startswith(".")]
BUDGET = {"nbs/01_base_vs_instruct.ipynb": 180, "nbs/03_chat_templates.ipynb": 120, "nbs/04_loss_masking.ipynb": 120, "nbs/05_full_finetuning.ipynb": 120, "nbs/07_lora.ipynb": 120, "nbs/08_qlora.ipynb": 120}  # seconds, on two quiet cores
FACTOR = float(os.environ.get("SFTLAB_TIME_FACTOR", 1)) * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # 2 on a machine shared with others; two notebooks at a time have a core each


def copy_course(to):
    "The notebooks and what they read, so that nothing they write lands in the project."
    for name in ("nbs", "exercises"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(ROOT / "settings.ini", to)
    return to


def tool(name, *args, cwd):
    "Run one of nbdev's commands from this environment."
    done = subprocess.run([Path(sys.executable).parent / name, *args], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def modules(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*.py"))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A package exported afresh from the notebooks."
    copy = copy_course(tmp_path_factory.mktemp("export"))
    for path in ("nbs", "exercises/solutions"):
        if list((copy / path).glob("**/*.ipynb")):
            tool("nbdev_export", "--path", path, cwd=copy)
    return modules(copy / "sftlab")


def test_the_package_is_what_the_notebooks_export(exported):
    committed = modules(ROOT / "sftlab")
    assert set(committed) == set(exported), "a module without its notebook, or the other way round: run nbdev_export --path nbs"
    stale = [name for name in exported if committed[name] != exported[name]]
    assert not stale, f"sftlab/{', '.join(stale)}: not what the notebooks say. Run nbdev_export --path nbs"


def test_an_edit_of_a_module_would_be_noticed(exported):
    "The control: one changed letter in one module makes the comparison above fail."
    committed = modules(ROOT / "sftlab")
    name = next(n for n, text in committed.items() if "def " in text)
    assert committed[name].replace("def ", "def x", 1) != exported[name]


def test_notebooks_are_clean(tmp_path):
    "No execution counts, no metadata: those make differences where nothing has changed."
    copy = copy_course(tmp_path)
    tool("nbdev_clean", "--fname", "nbs", cwd=copy)
    dirty = [name for name in NOTEBOOKS if (copy / name).read_text() != (ROOT / name).read_text()]
    assert not dirty, f"run nbdev_clean --fname nbs, which changes {', '.join(dirty)}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_hold_no_error(name):
    cells = [c for c in json.loads((ROOT / name).read_text())["cells"] if c["cell_type"] == "code"]
    expected = {c["id"] for c in cells if "raises-exception" in c["metadata"].get("tags", [])}
    errors = [c["id"] for c in cells for o in c["outputs"] if o["output_type"] == "error" and c["id"] not in expected]
    assert not errors


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_hold_no_widget(name):
    "Without its kernel a saved widget is shown as an error: clear such an output before the notebook is committed."
    cells = [c for c in json.loads((ROOT / name).read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["id"] for c in cells for o in c["outputs"] if "application/vnd.jupyter.widget-view+json" in o.get("data", {})] == []


def run(path, log, limit, python=sys.executable):
    """Run the notebook at `path`, in its own folder and a process of `python` that can reach nothing but this machine; return the seconds it took.

    A notebook that fails, or takes more than `limit` seconds, raises a RuntimeError with the cell and its error.
    """
    guard = {"PYTHONPATH": str(ROOT / "tests/offline"), "SFTLAB_OFFLINE_LOG": str(log)}
    command = [python, "-c", "from nbclient.cli import main; main()", f"--timeout={limit:.0f}", "--kernel_name=python3", path]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, env=os.environ | guard, capture_output=True, text=True, timeout=limit + 30)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit + 30:.0f} s") from None
    if done.returncode:
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
        raise RuntimeError(text[max(text.rfind("nbclient.exceptions."), 0):])
    return time.perf_counter() - started


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, record_property):
    budget = BUDGET.get(name, 60)
    log = tmp_path / "refused"
    failure = None
    try:
        seconds = run(copy_course(tmp_path) / name, log, limit=3 * budget * FACTOR)
    except RuntimeError as error:
        failure = f"{name}: {error}"
    if failure:
        pytest.fail(failure, pytrace=False)
    for key, value in {"notebook": name, "seconds": seconds, "budget": budget}.items():
        record_property(key, value)
    assert not log.exists(), f"{name} wanted to reach {sorted(set(log.read_text().split()))}"
    assert seconds <= budget * FACTOR, f"{name} took {seconds:.0f} s of {budget} s (times {FACTOR:g})"


def one_cell(folder, source):
    path = folder / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return path


@pytest.mark.parametrize("source, error", [("1 / 0", "ZeroDivisionError"), ("import os; os._exit(1)", "DeadKernelError")])
def test_a_failing_cell_fails(source, error, tmp_path):
    with pytest.raises(RuntimeError, match=error):
        run(one_cell(tmp_path, source), tmp_path / "log", limit=60)


def test_a_cell_that_hangs_fails(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)CellTimeoutError.*time.sleep"):
        run(one_cell(tmp_path, "import time; time.sleep(600)"), tmp_path / "log", limit=3)


@pytest.mark.parametrize("source", [
    "import urllib.request; urllib.request.urlopen('http://example.com', timeout=5)",
    "import socket; socket.create_connection(('93.184.215.14', 80), timeout=5)",
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; socket.getaddrinfo(\"example.com\", 80)'], check=True)",
], ids=["library", "address", "process"])
def test_a_download_fails_and_shows(source, tmp_path):
    with pytest.raises(RuntimeError, match="may not use the network|CalledProcessError"):
        run(one_cell(tmp_path, source), tmp_path / "log", limit=60)
    assert (tmp_path / "log").read_text().split()[0] in ("example.com", "93.184.215.14")


def test_this_machine_itself_stays_within_reach(tmp_path):
    source = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(('localhost', s.getsockname()[1]))"
    run(one_cell(tmp_path, source), tmp_path / "log", limit=60)
    assert not (tmp_path / "log").exists()
