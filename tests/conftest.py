"""What all tests share.

No network, the learner's real files where there are some, which tests run when, and tables of how
long they took.
"""
import os
import signal
from pathlib import Path

import hypothesis
import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(OFFLINE)  # before any test imports a library that reads them

# Started in the background, a process ignores Ctrl-C, and so would the programs that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A first call that loads a library is slow, not wrong: no deadline.
hypothesis.settings.register_profile("sftlab", deadline=None)
hypothesis.settings.load_profile("sftlab")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    "The top of the project."
    return ROOT


@pytest.fixture
def real_data() -> Path:
    "The folder of real instruction files: no part of the project, so most machines have none."
    folder = os.environ.get("SFTLAB_REAL_DATA")
    if not folder:
        pytest.skip("SFTLAB_REAL_DATA names no folder of real instruction files")
    assert Path(folder).is_dir(), f"SFTLAB_REAL_DATA={folder} is not a folder"
    return Path(folder)


def pytest_addoption(parser):
    group = parser.getgroup("sftlab")
    group.addoption("--quick", action="store_true", help="leave out what trains or starts programs")
    group.addoption("--all", action="store_true", help="whole matrices too: hours, not minutes")


def left_out(item, quick, everything):
    "Whether this run does without a test."
    if item.get_closest_marker("thorough") and not everything:
        return True
    return quick and item.get_closest_marker("slow") is not None


def runs_a_notebook(
    test:str, # its id
) -> bool:
    return "::test_notebook_runs" in test


def kept_together(
    test:str, # its id
) -> str: # the same for all tests that one process is to run
    """A file, so that what it sets up is set up once; only notebooks, which share nothing, go
    anywhere."""
    return test if runs_a_notebook(test) else test.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share the tests out between two processes (`-n 2`).

    Not by `xdist_group`: a mark that pytest's ids no longer show is ignored without a word.
    """
    from xdist.scheduler import LoadScopeScheduling
    config.option.loadscopereorder = False  # not the files with most tests first: our order

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return kept_together(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    "Choose tests. Notebooks come last: being many, they fill both processes to the end."
    quick, everything = config.getoption("--quick"), config.getoption("--all")
    out = [item for item in items if left_out(item, quick, everything)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
    items.sort(key=lambda item: runs_a_notebook(item.nodeid))


def properties(reports, name):
    "Of the tests that recorded it, all that they recorded."
    found = [dict(r.user_properties) for r in reports]
    return [row for row in found if name in row]


def pytest_terminal_summary(terminalreporter):
    "Show each notebook's wall time next to its budget, and how many wrong answers were rejected."
    stats = terminalreporter.stats.values()
    reports = [r for rs in stats for r in rs if getattr(r, "when", None) == "call"]
    if rows := properties(reports, "notebook"):
        terminalreporter.section("notebooks, wall time")
        for row in rows:
            times = f"{row['seconds']:6.1f} s of {row['budget']:.0f} s"
            terminalreporter.write_line(f"{row['notebook']:45} {times}")
    if rows := properties(reports, "kills"):
        terminalreporter.section("exercises: wrong answers rejected by their name / all")
        for row in rows:
            terminalreporter.write_line(row["kills"])
