"""Whole or not at all: a write that is killed, or fails, leaves what was there before."""
import os
import signal
import subprocess
import sys
import time

import pytest

from sftlab.errors import OutputError
from sftlab.files.atomic import atomic_dir, atomic_file

CHILD = """
import sys, time
from pathlib import Path
from sftlab.files.atomic import atomic_dir, atomic_file
if sys.argv[1] == "file":
    with atomic_file(sys.argv[2]) as f:
        f.write("new"); f.flush(); time.sleep(60)
with atomic_dir(sys.argv[2], overwrite=True) as part:
    (part / "a").write_text("new"); time.sleep(60)
"""


def killed_while_writing(kind, path):
    "Start a writer of `path`, and kill it in the middle; the name of what it leaves."
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind, str(path)])
    while not (left := list(path.parent.glob(f".{path.name}.*.partial"))):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return left[0]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    left = killed_while_writing("file", path)
    assert path.read_text() == "old" and left.exists()
    with atomic_file(path) as f:
        f.write("newer")
    assert path.read_text() == "newer" and os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a").write_text("old")
    left = killed_while_writing("dir", path)
    assert (path / "a").read_text() == "old" and left.exists()
    with atomic_dir(path, overwrite=True) as part:
        (part / "a").write_text("newer")
    assert (path / "a").read_text() == "newer" and os.listdir(tmp_path) == ["run"]


def test_a_folder_that_another_process_is_writing_is_left_to_it(tmp_path):
    path = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", CHILD, "dir", str(path)])
    try:
        while not list(tmp_path.glob(".run.*.partial")):
            assert child.poll() is None
            time.sleep(0.01)
        says = rf"another run \(process {child.pid}\).* remove .*partial"
        with pytest.raises(OutputError, match=says):
            with atomic_dir(path):
                pass
    finally:
        child.kill()
        child.wait()


def test_a_killed_writer_that_nobody_has_buried_does_not_block(tmp_path):
    "Its parent has not asked for its status yet: a zombie."
    child = subprocess.Popen([sys.executable, "-c", CHILD, "dir", str(tmp_path / "run")])
    while not list(tmp_path.glob(".run.*.partial")):
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with atomic_dir(tmp_path / "run") as part:
        (part / "a").touch()
    child.wait()
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("number", [os.getppid, os.getpid], ids=["parent", "own"])
def test_a_number_that_another_process_has_now_does_not_block(tmp_path, number):
    "In a container a new process often gets the number of the one that was killed."
    left = tmp_path / f".run.{number()}.1.partial"
    left.mkdir()
    (left / "half").touch()
    os.utime(left, (1, 1))  # long before any process of today began
    with atomic_dir(tmp_path / "run") as part:
        (part / "a").touch()
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_file(tmp_path / "a") as f:
        f.write("half")
        raise error
    with pytest.raises(error), atomic_dir(tmp_path / "b") as part:
        (part / "x").touch()
        raise error
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_through_a_link(tmp_path):
    "Where somebody put a link under the partial name, its target stays as it is."
    import threading
    target = tmp_path / "dear"
    target.write_text("dear")
    name = f".a.{os.getpid()}.{threading.get_ident()}.partial"
    (tmp_path / name).symlink_to(target)
    with pytest.raises(OutputError), atomic_file(tmp_path / "a") as f:
        f.write("new")
    assert target.read_text() == "dear"


def test_a_link_of_that_name_is_replaced_and_not_followed(tmp_path):
    target = tmp_path / "dear"
    target.write_text("dear")
    (tmp_path / "a").symlink_to(target)
    with atomic_file(tmp_path / "a") as f:
        f.write("new")
    assert target.read_text() == "dear" and (tmp_path / "a").read_text() == "new"
    with pytest.raises(OutputError, match="is there already"):
        with atomic_file(tmp_path / "a", exist="refuse") as f:
            f.write("x")


def test_the_same_content_again_is_allowed_where_asked(tmp_path):
    for _ in range(2):
        with atomic_file(tmp_path / "a", exist="same") as f:
            f.write("x")
    with pytest.raises(OutputError), atomic_file(tmp_path / "a", exist="same") as f:
        f.write("y")
    assert (tmp_path / "a").read_text() == "x"


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputError), atomic_file(tmp_path / "a", exist="refuse") as f:
        (tmp_path / "a").write_text("theirs")
        f.write("ours")
    with pytest.raises(OutputError), atomic_dir(tmp_path / "b"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b/theirs").touch()
    assert (tmp_path / "a").read_text() == "theirs" and os.listdir(tmp_path / "b") == ["theirs"]


def test_only_a_marked_folder_is_replaced(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "photo").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        with atomic_dir(path, overwrite=True, mark="run.json"):
            pass
    with pytest.raises(OutputError, match="is the folder you are in"):
        with atomic_dir("."):
            pass
    assert os.listdir(path) == ["photo"]


def test_the_current_folder_is_refused_though_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the folder you are in"), atomic_dir(tmp_path):
        pass
