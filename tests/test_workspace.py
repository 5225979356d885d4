"The learner's copy of the course: brought up to date, never overwritten, whole after every kill."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sftlab
from sftlab import cli
from sftlab.study import workspace
from sftlab.study.workspace import LIST, copy_course

SFTLAB = [sys.executable, "-m", "sftlab.cli"]
LESSON, PICTURE, PAGE = "01_base_vs_instruct.ipynb", "images/a.svg", "reference/cli.ipynb"
EXERCISE = "exercises/q.ipynb"
NEW_LESSON, NEW_PICTURE = "01_base_vs_instruct.new.ipynb", "images/a.new.svg"
COURSE = {LESSON, PICTURE, PAGE, EXERCISE}
NOT_FOR_LEARNERS = ("exercises/solutions/q.ipynb", "nbs/.ipynb_checkpoints/01-checkpoint.ipynb",
                    "nbs/_quarto.yml", "nbs/live/index.html", "sftlab/__init__.py")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A course of a few files, each of which holds its own name; we are in the folder above it."
    root = tmp_path / "repository"
    for name in (f"nbs/{LESSON}", f"nbs/{PAGE}", f"nbs/{PICTURE}", EXERCISE, *NOT_FOR_LEARNERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(sftlab, "__file__", str(root / "sftlab" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def started(monkeypatch):
    "The commands that would have been started."
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    return commands


@pytest.fixture
def lab(capsys, started):
    "`sftlab lab course`, with more words: its exit status, stdout and stderr."
    def run(*words):
        status = cli.main(["lab", *(words or ["course"])])
        return status, *capsys.readouterr()
    return run


def publish(root, version, *names):
    "A new version of some of the course's files."
    for name in names or (LESSON, PICTURE):
        (root / "nbs" / name).write_text(f"{name}, version {version}")


def contents(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def no_list(folder): # the learner's folder without the list of what was copied
    return {name: text for name, text in contents(folder).items() if name != LIST}


def files(folder): return set(contents(folder))


def test_lab_copies_the_course_and_opens_lesson_one(repository, tmp_path, lab, started):
    status, out, err = lab("course", "--no-browser", "--ServerApp.port=8890")
    assert (status, err) == (0, "") and "4 files copied" in out
    assert files(tmp_path / "course") == COURSE | {LIST}
    (command,) = started
    assert command[1:6] == [
        "-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path / 'course'}",
        f"--LabApp.default_url=/lab/tree/{LESSON}", "--ServerApp.ip=127.0.0.1"]
    assert command[6:8] == ["--no-browser", "--ServerApp.port=8890"]
    assert lab("--no-browser")[0] == 0 and "--no-browser" in started[-1]
    assert files(tmp_path / "sftlab-course") == files(tmp_path / "course")


def test_lab_brings_what_is_untouched_up_to_date(repository, tmp_path, lab):
    course = tmp_path / "course"
    lab()
    publish(repository, 2)
    (repository / "nbs" / "new.ipynb").write_text("new")
    status, out, _ = lab()
    assert status == 0 and "3 files copied" in out and "changed" not in out
    assert files(course) == COURSE | {"new.ipynb", LIST}
    assert (course / LESSON).read_text() == f"{LESSON}, version 2"
    def times(): return {f: f.stat().st_mtime_ns for f in course.rglob("*")}
    before = times()
    assert "0 files copied" in lab()[1]
    assert times() == before


def test_lab_never_overwrites_what_was_changed(repository, tmp_path, lab):
    course = tmp_path / "course"
    lab()
    (course / LESSON).write_text("what I wrote")
    assert "changed" not in lab()[1] and set(no_list(course)) == COURSE
    for version in (2, 3): # the second new version takes the place of the first
        publish(repository, version)
        status, out, _ = lab()
        (line,) = [line for line in out.splitlines() if "changed" in line]
        assert status == 0 and "2 files copied" in out and line.endswith(f": {NEW_LESSON}")
        after = no_list(course)
        assert after == {
            LESSON: "what I wrote", NEW_LESSON: f"{LESSON}, version {version}",
            PICTURE: f"{PICTURE}, version {version}", PAGE: f"nbs/{PAGE}", EXERCISE: EXERCISE}
        assert "0 files copied" in lab()[1] and no_list(course) == after


def test_lab_keeps_a_new_version_that_was_changed_too(repository, tmp_path, lab):
    course = tmp_path / "course"
    for version, name in ((1, "a.ipynb"), (2, "a.new.ipynb"), (3, "a.new.new.ipynb")):
        publish(repository, version, "a.ipynb")
        lab()
        assert (course / name).read_text() == f"a.ipynb, version {version}"
        if version < 3:
            (course / name).write_text(f"my notes on version {version}")
    assert (course / "a.ipynb").read_text() == "my notes on version 1"
    assert (course / "a.new.ipynb").read_text() == "my notes on version 2"


def test_lab_puts_a_deleted_file_back(repository, tmp_path, lab):
    course = tmp_path / "course"
    lab()
    (course / LESSON).write_text("what I wrote")
    publish(repository, 2)
    lab()
    (course / LESSON).unlink()
    (course / PAGE).unlink()
    assert "2 files copied" in lab()[1]
    assert (course / LESSON).read_text() == f"{LESSON}, version 2" and (course / PAGE).exists()
    assert not list(course.glob("*.new.*")) # it is no newer than the file next to it now
    publish(repository, 3)
    lab()
    assert (course / LESSON).read_text() == f"{LESSON}, version 3"
    assert not list(course.glob("*.new.*"))


def test_lab_leaves_what_nobody_else_made(repository, tmp_path, lab):
    course = tmp_path / "course"
    course.mkdir()
    mine = (LESSON, NEW_LESSON, "diary.txt")
    for name in mine:
        (course / name).write_text("mine")
    lab()
    assert {text for text in no_list(course).values() if text != "mine"} == {
        f"nbs/{LESSON}", f"nbs/{PICTURE}", f"nbs/{PAGE}", EXERCISE}
    assert (course / "01_base_vs_instruct.new.new.ipynb").read_text() == f"nbs/{LESSON}"
    assert all((course / name).read_text() == "mine" for name in mine)


OTHER_TYPES = '{"01_base_vs_instruct.ipynb": 1, "images/a.svg": ["x"]}'
BROKEN = [None, "", "{", "[]", "1", OTHER_TYPES, "\xff", "[" * 100_000]


@pytest.mark.parametrize("broken", BROKEN, ids=range(8))
def test_without_its_list_lab_takes_every_difference_for_the_learners(
        repository, tmp_path, lab, broken):
    course = tmp_path / "course"
    lab()
    if broken is None:
        (course / LIST).unlink()
    else:
        (course / LIST).write_text(broken, "latin-1")
    publish(repository, 2)
    status, out, err = lab()
    assert (status, err) == (0, "") and "2 files copied" in out and NEW_PICTURE in out
    assert (course / LESSON).read_text() == f"nbs/{LESSON}"
    assert (course / NEW_LESSON).read_text() == f"{LESSON}, version 2"
    assert "0 files copied" in lab()[1] # the list is whole again
    listed = json.loads((course / LIST).read_text())
    assert listed.keys() == COURSE | {NEW_LESSON, NEW_PICTURE}


def copy(root, folder):
    copy_course({path.name: path for path in sorted(root.iterdir())}, folder)


def kill_in_a_step(
    when, # "in" (a file is half written) or "after"
    count, # in which step: a step puts a file in its place or takes one away
):
    "Let this process be killed while it copies."
    def killing(step):
        def wrapped(path, *args):
            nonlocal count
            count -= 1
            if count == 0 and when == "in":
                path.write_bytes(path.read_bytes()[:3])
            else:
                step(path, *args)
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return wrapped
    os.replace, unlink = killing(os.replace), killing(Path.unlink)
    Path.unlink = lambda path, missing_ok=False: path.exists() and unlink(path)


def copy_and_be_killed(root, folder, when, count) -> int: # exit status
    if (child := os.fork()) == 0:
        try:
            kill_in_a_step(when, count)
            copy(root, folder)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def much_to_do(root, folder):
    """A learner's folder in which the next run has everything to do: replace, put next to another,
    put back, add and take away."""
    root.mkdir(parents=True)
    def publish(version, *names):
        for name in names:
            (root / name).write_text(version)
    publish("version 1", "back", "changed", "deleted", "untouched")
    copy(root, folder)
    for name in ("changed", "deleted"):
        (folder / name).write_text("my notes")
    publish("version 2", "deleted") # goes next to it
    copy(root, folder)
    for name in ("back", "deleted"):
        (folder / name).unlink()
    publish("version 3", "added", "changed", "untouched")


WHOLE = {"added": "version 3", "back": "version 1", "changed": "my notes",
         "changed.new": "version 3", "deleted": "version 2", "untouched": "version 3"}


def test_a_killed_lab_is_completed_by_the_next(tmp_path):
    known = {"my notes", "version 1", "version 2", "version 3"}
    def run(when, count):
        root, folder = (tmp_path / f"{when}-{count}" / name for name in ("root", "folder"))
        much_to_do(root, folder)
        status = copy_and_be_killed(root, folder, when, count)
        assert (folder / "changed").read_text() == "my notes"
        left = no_list(folder).items()
        assert {text for name, text in left if not name.endswith(".partial")} <= known
        if status:
            copy(root, folder)
        return status, contents(folder)
    status, whole = run("after", 0) # never
    assert status == 0 and {k: v for k, v in whole.items() if k != LIST} == WHOLE
    # Five files written and one taken away, and the list after each of the four that are new to it.
    for step in range(1, 11):
        assert run("after", step) == (-signal.SIGKILL, whole), step
    assert run("after", 11) == (0, whole)
    for step in (1, 2, 4): # a file, the list, a file next to another
        assert run("in", step) == (-signal.SIGKILL, whole), step


def test_lab_writes_nothing_through_links(repository, tmp_path, lab):
    course, outside = tmp_path / "course", tmp_path / "outside"
    outside.mkdir()
    course.mkdir()
    (outside / "a.ipynb").write_text("outside")
    for link in (LESSON, f".{LESSON}.partial", LIST, f".{LIST}.partial"):
        (course / link).symlink_to(outside / "a.ipynb")
    (course / "exercises").mkdir()
    (course / EXERCISE).symlink_to(outside / "nowhere")
    status, out, err = lab()
    assert (status, err) == (0, "") and contents(outside) == {"a.ipynb": "outside"}
    assert (course / LESSON).is_symlink()
    assert (course / NEW_LESSON).read_text() == f"nbs/{LESSON}"
    assert (course / "exercises/q.new.ipynb").exists() and not (course / LIST).is_symlink()


@pytest.mark.parametrize("inside", [PAGE, PICTURE])
def test_lab_writes_nothing_into_a_folder_that_is_a_link(repository, tmp_path, lab, inside):
    course, shelf = tmp_path / "course", tmp_path / "shelf"
    lab()
    shelf.mkdir()
    (course / inside).unlink()
    folder = (course / inside).parent
    folder.rmdir()
    folder.symlink_to(shelf)
    status, _, err = lab()
    assert status == 1 and err.count("\n") == 1 and not list(shelf.iterdir())
    assert f"course/{folder.name} is outside of course" in err


def test_the_whole_folder_may_be_a_link(repository, tmp_path, lab):
    "That is where the learner wants it."
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert lab("link")[0] == 0 and (tmp_path / "elsewhere" / LESSON).exists()


def a_file(course): course.write_text("a file")
def a_dead_link(course): course.symlink_to("nowhere")
def a_loop(course): course.symlink_to("course")


def a_file_inside(course):
    course.mkdir()
    (course / "reference").write_text("a file")


def a_dead_link_inside(course):
    course.mkdir()
    (course / "reference").symlink_to("nowhere")


IN_THE_WAY = [a_file, a_dead_link, a_loop, a_file_inside, a_dead_link_inside]


@pytest.mark.parametrize("make", IN_THE_WAY)
def test_lab_says_what_is_in_the_way_of_a_folder(repository, tmp_path, lab, make):
    make(tmp_path / "course")
    status, _, err = lab()
    assert status == 1 and err.count("\n") == 1 and "course" in err
    assert "is not a folder, and the course needs one of that name" in err
    assert not (tmp_path / "nowhere").exists()


def test_lab_leaves_a_link_that_took_a_files_place(repository, tmp_path, lab):
    lab()
    course = tmp_path / "course"
    mine = (course / LESSON).rename(tmp_path / "kept elsewhere.ipynb")
    (course / LESSON).symlink_to(mine)
    publish(repository, 2)
    lab()
    assert (course / LESSON).is_symlink() and mine.read_text() == f"nbs/{LESSON}"
    assert (course / NEW_LESSON).read_text() == f"{LESSON}, version 2"


def test_lab_leaves_a_folder_where_a_file_should_be(repository, tmp_path, lab):
    (tmp_path / "course" / LESSON).mkdir(parents=True)
    status, out, _ = lab()
    assert status == 0 and (tmp_path / "course" / NEW_LESSON).read_text() == f"nbs/{LESSON}"


def test_lab_finds_the_course_inside_an_installed_package(repository, tmp_path, lab):
    (repository / "sftlab" / "course").mkdir()
    for name in ("nbs", "exercises"):
        (repository / name).rename(repository / "sftlab" / "course" / name)
    lab()
    assert files(tmp_path / "course") == COURSE | {LIST}


def test_lab_without_what_it_needs(repository, tmp_path, lab, started, monkeypatch):
    (repository / "nbs" / LESSON).unlink()
    status, _, err = lab()
    assert status == 1 and "pip install '.[lab]'" in err and err.count("\n") == 1
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None)
    status, _, err = lab()
    assert status == 1 and "pip install 'sftlab[lab]'" in err and err.count("\n") == 1
    assert started == [] and not (tmp_path / "course").exists()


def test_a_learner_gets_every_lesson_and_exercise_and_no_solution():
    names = set(workspace.course_files())
    root = Path(sftlab.__file__).parent.parent
    for folder, inside in (("nbs", "."), ("exercises", "exercises")):
        notebooks = [p.relative_to(root / folder) for p in (root / folder).rglob("*.ipynb")]
        seen = [p for p in notebooks if not p.parts[0].startswith((".", "_"))]
        wanted = {(inside / p).as_posix() for p in seen if ".ipynb_checkpoints" not in p.parts
                  and "solutions" not in p.parts}
        assert len(wanted) > 5 and wanted <= names
    assert not [name for name in names if "solutions" in name or "/." in name]
    assert (root / "nbs/live").is_dir() and not [n for n in names if n.startswith("live/")]


@pytest.mark.slow
def test_lab_starts_the_real_thing(tmp_path):
    pytest.importorskip("jupyterlab")
    done = subprocess.run([*SFTLAB, "lab", tmp_path / "course", "--version"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1][0].isdigit(), done.stderr
    assert set(workspace.course_files()) | {LIST} == {
        p.relative_to(tmp_path / "course").as_posix()
        for p in (tmp_path / "course").rglob("*") if p.is_file()}
