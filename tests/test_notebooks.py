"""Every notebook.

Exported code is in step, nothing but work is in the file, and it runs from top to bottom where no
network can be reached.
"""
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
import yaml
from forked import CAN_COPY, run_copy

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("nbs/**/*.ipynb"))
             if not p.parent.name.startswith(".")]
LESSONS = yaml.safe_load((ROOT / "tools/lessons.yml").read_text("utf-8"))
BUDGET = {f"nbs/{row['notebook']}.ipynb": row["seconds"] for row in LESSONS if "notebook" in row}
LONGER = ("audit/memory", "tiny/pretraining", "cli", "using")
BUDGET |= {f"nbs/reference/{name}.ipynb": 40 for name in LONGER}
LABS = ("qlora_t4", "your_data", "bigger_card")
BUDGET |= {f"nbs/labs/{name}.ipynb": 80 for name in LABS} | {"nbs/reference/labs/runs.ipynb": 60}
FACTOR = float(os.environ.get("SFTLAB_TIME_FACTOR", 1))  # 2 on a machine shared with others
FACTOR *= int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # two at a time have a core each


def copy_course(to):
    "The notebooks and what they read, so that nothing they write lands in the project."
    for name in ("nbs", "exercises"):
        if (ROOT / name).exists():
            hidden = shutil.ignore_patterns(".*", "__pycache__")
            shutil.copytree(ROOT / name, to / name, ignore=hidden)
    shutil.copy(ROOT / "settings.ini", to)
    return to


def tool(name, *args, cwd):
    "Run one of nbdev's commands from this environment."
    command = [Path(sys.executable).parent / name, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
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
    assert set(committed) == set(exported), "a module without its notebook, or a notebook without"
    stale = differing(committed, exported)
    assert not stale, f"{', '.join(stale)}: not what the notebooks say: run nbdev_export --path nbs"


def differing(some, others):
    "Names of modules whose text is not the same."
    return [name for name in others if some.get(name) != others[name]]


def test_an_edit_of_a_notebook_would_be_noticed(exported, tmp_path):
    "One changed line in one notebook, exported, is another package than the one committed."
    copy = copy_course(tmp_path)
    path = copy / "nbs/reference/errors.ipynb"
    path.write_text(path.read_text().replace("cannot be quantised", "can not be quantised"))
    tool("nbdev_export", "--path", "nbs/reference/errors.ipynb", cwd=copy)
    changed = differing(exported, modules(copy / "sftlab"))
    assert [name for name in changed if name != "_modidx.py"] == ["errors.py"]


def test_notebooks_are_clean(tmp_path):
    "No execution counts, no metadata: those make differences where nothing has changed."
    copy = copy_course(tmp_path)
    tool("nbdev_clean", "--fname", "nbs", cwd=copy)
    dirty = [n for n in NOTEBOOKS if (copy / n).read_text() != (ROOT / n).read_text()]
    assert not dirty, f"run nbdev_clean --fname nbs, which changes {', '.join(dirty)}"


WIDGET = "application/vnd.jupyter.widget-view+json"


def outputs(name):
    "Each output of a notebook, with its cell."
    cells = json.loads((ROOT / name).read_text())["cells"]
    return [(c, o) for c in cells if c["cell_type"] == "code" for o in c["outputs"]]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_hold_no_error(name):
    failed = [c for c, o in outputs(name) if o["output_type"] == "error"]
    unexpected = [c for c in failed if "raises-exception" not in c["metadata"].get("tags", [])]
    assert [c["id"] for c in unexpected] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_hold_no_widget(name):
    "Without its kernel a saved widget is shown as an error: clear it before it is committed."
    assert [c["id"] for c, o in outputs(name) if WIDGET in o.get("data", {})] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pictures_have_an_alternative_text(name):
    "A figure is shown with `plots.show`, which asks for one; a bare image tells the blind nothing."
    assert [c["id"] for c, o in outputs(name) if "image/png" in o.get("data", {})] == []
    html = ["".join(o.get("data", {}).get("text/html", "")) for _, o in outputs(name)]
    images = [tag for text in html for tag in re.findall(r"<img\b[^>]*>", text)]
    assert [tag[:60] for tag in images if not re.search(r'alt="[^"]{15,}"', tag)] == []


def run_anew(path, limit, variables, python=sys.executable):
    "Run a notebook as a reader does, in a new process; a RuntimeError says what went wrong."
    command = [python, "-c", "from nbclient.cli import main; main()",
               f"--timeout={limit:.0f}", "--kernel_name=python3", path]
    try:
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True,
                              timeout=limit + 30)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit + 30:.0f} s") from None
    if done.returncode:
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
        raise RuntimeError(text[max(text.rfind("nbclient.exceptions."), 0):])


run_quickly = run_copy if CAN_COPY else run_anew  # for what readers do not open
each_way = pytest.mark.parametrize("how", [run_anew, run_quickly], ids=["anew", "quickly"])


def run(path, log, limit, how=run_anew, **options):
    """Run a notebook in its own folder, in a process that can reach nothing but this machine.

    Return the seconds it took. A notebook that fails, or takes more than `limit` seconds, raises a
    RuntimeError with the cell and its error.
    """
    guard = {"PYTHONPATH": str(ROOT / "tests/offline"), "SFTLAB_OFFLINE_LOG": str(log)}
    started = time.perf_counter()
    how(path, limit, guard, **options)
    return time.perf_counter() - started


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, record_property):
    budget, log, failure = BUDGET.get(name, 30), tmp_path / "refused", None
    try:
        how = run_quickly if name.startswith("nbs/reference/") else run_anew
        seconds = run(copy_course(tmp_path) / name, log, limit=3 * budget * FACTOR, how=how)
    except RuntimeError as error:
        failure = f"{name}: {error}"
    if failure:
        pytest.fail(failure, pytrace=False)
    for key, value in {"notebook": name, "seconds": seconds, "budget": budget}.items():
        record_property(key, value)
    assert not log.exists(), f"{name} wanted to reach {sorted(set(log.read_text().split()))}"
    took = f"{name} took {seconds:.0f} s of {budget} s (times {FACTOR:g})"
    assert seconds <= budget * FACTOR, took


def one_cell(folder, source):
    path = folder / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    return path


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("source, error", [
    ("1 / 0", "ZeroDivisionError"), ("import os; os._exit(1)", "DeadKernelError")])
def test_a_failing_cell_fails(source, error, how, tmp_path):
    with pytest.raises(RuntimeError, match=error):
        run(one_cell(tmp_path, source), tmp_path / "log", 60, how)


@pytest.mark.slow
@each_way
def test_a_cell_that_hangs_fails(how, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)CellTimeoutError.*time.sleep"):
        run(one_cell(tmp_path, "import time; time.sleep(600)"), tmp_path / "log", 3, how)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COPY, reason="copies of a process are made on Linux alone")
def test_a_copy_is_as_good_as_new(tmp_path):
    "No module of the course or of another notebook; names, folder, seed of a new process."
    source = """
import os, random, sys
assert not [name for name in sys.modules if name.startswith(("sftlab", "test_", "conftest"))]
assert "torch" in sys.modules and not [p for p in sys.path if p.endswith("tests")], sys.path
assert os.getcwd() == FOLDER and not os.path.exists("drawn")
open("drawn", "w").write(str(random.random()))
sys.modules["sftlab"] = x = 1
""".replace("FOLDER", repr(str(tmp_path)))
    drawn = set()
    for _ in range(2):
        run(one_cell(tmp_path, source), tmp_path / "log", 60, run_copy)
        drawn.add((tmp_path / "drawn").read_text())
        (tmp_path / "drawn").unlink()
    assert len(drawn) == 2


LIBRARY = "import urllib.request; urllib.request.urlopen('http://example.com', timeout=5)"
ADDRESS = "import socket; socket.create_connection(('93.184.215.14', 80), timeout=5)"
PROCESS = """
import subprocess, sys
code = 'import socket; socket.getaddrinfo("example.com", 80)'
subprocess.run([sys.executable, '-c', code], check=True)
"""


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("source", [LIBRARY, ADDRESS, PROCESS], ids=["lib", "address", "process"])
def test_a_download_fails_and_shows(source, how, tmp_path):
    with pytest.raises(RuntimeError, match="may not use the network|CalledProcessError"):
        run(one_cell(tmp_path, source), tmp_path / "log", 60, how)
    assert (tmp_path / "log").read_text().split()[0] in ("example.com", "93.184.215.14")


@pytest.mark.slow
def test_this_machine_itself_stays_within_reach(tmp_path):
    source = """
import socket
server = socket.create_server(('127.0.0.1', 0))
socket.create_connection(('localhost', server.getsockname()[1]))
"""
    run(one_cell(tmp_path, source), tmp_path / "log", limit=60)
    assert not (tmp_path / "log").exists()
