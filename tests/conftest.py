"What all tests share: no network, the learner's real files where there are some, and a table of how long notebooks took."
import os
import signal
from pathlib import Path

import hypothesis
import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(OFFLINE)  # before any test imports a library that reads them

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a process ignores Ctrl-C, and so would the programs that it starts
hypothesis.settings.register_profile("sftlab", deadline=None)  # a first call that loads a library is slow, not wrong
hypothesis.settings.load_profile("sftlab")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    "The top of the project."
    return ROOT


@pytest.fixture
def real_data() -> Path:
    "The folder of real instruction files; it is not part of the project, so most machines have none."
    folder = os.environ.get("SFTLAB_REAL_DATA")
    if not folder:
        pytest.skip("SFTLAB_REAL_DATA names no folder of real instruction files")
    assert Path(folder).is_dir(), f"SFTLAB_REAL_DATA={folder} is not a folder"
    return Path(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Two processes share the tests (`-n 2 --dist loadgroup`): a file stays together, so that what it sets up is set up once; only notebooks, which share nothing, go anywhere."
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.name if item.name.startswith("test_notebook_runs") else item.path.stem))
    items.sort(key=lambda item: not item.name.startswith("test_notebook_runs"))  # the longest first


def pytest_terminal_summary(terminalreporter):
    "Show each notebook's wall time beside its budget."
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", None) == "call"]
    rows = [dict(r.user_properties) for r in reports if "notebook" in dict(r.user_properties)]
    if rows:
        terminalreporter.section("notebooks, wall time")
    for row in rows:
        terminalreporter.write_line(f"{row['notebook']:45} {row['seconds']:6.1f} s of {row['budget']:.0f} s")
    kills = [dict(r.user_properties)["kills"] for r in reports if "kills" in dict(r.user_properties)]
    if kills:
        terminalreporter.section("exercises: wrong answers rejected by their name / all")
    for row in kills:
        terminalreporter.write_line(row)
