"""Lesson 1 as a learner meets it: in JupyterLab, in a browser.

Notebooks that go wrong on purpose show that the checks can fail.
"""
import json

import psutil
import pytest

from lab import (ask, browser_page, errors, find_browser, jupyterlab, open_notebook, replace_cell,
                 run_all, screenshot, wait_idle, write_notebook)

pytestmark = pytest.mark.slow
LESSON = "01_base_vs_instruct.ipynb"
EXERCISE = "exercises/01_generation.ipynb"
ANSWER = """def probabilities(logits, temperature):
    if temperature == 0:
        return (logits == logits.amax(-1, keepdim=True)).float()
    return (logits / temperature).softmax(-1)"""
LATE = ANSWER.replace("(logits / temperature).softmax(-1)", "logits.softmax(-1) / temperature")
WIDGET = """
from ipywidgets import Button, HTML, Text, VBox
prompt, button = Text(placeholder="Type a prompt"), Button(description="Generate")
answers = HTML("base few-shot instruct")
answers.add_class("sftlab-side-by-side")
display(VBox([prompt, button, answers]))
"""
ANSWERS = """
def answer(_):
    told = [f"<p>{who}: {prompt.value.upper()}</p>" for who in LABELS]
    answers.value = "".join(told)
button.on_click(answer)
"""
REAL = """
from sftlab.figures import generation
def upper(base, instruct, tokenizer, few_shot, prompt):
    return "".join(f"<p>{who}: {prompt.upper()}</p>" for who in ("Base", "Few-shot", "Instruct"))
generation.answers_html = upper
generation.side_by_side(None, None, None, [])
"""


def answering(*labels): return WIDGET + ANSWERS.replace("LABELS", repr(labels))


BUSY = """() => { const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel
    kernel.requestExecute({code: "import time; time.sleep(3)"}) }"""
CONTROLS = {
    "good": ["1 + 1", REAL],
    "fails": ["1 + 1", "1 / 0", "'never reached'"],
    "dies": ["import os; os._exit(1)"],
    "deaf": [WIDGET],
    "partial": [answering("Base", "Error")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The learner's."
    folder = tmp_path_factory.mktemp("learner")/"course"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def address(folder):
    find_browser()
    for name, cells in CONTROLS.items():
        write_notebook(folder/f"{name}.ipynb", *cells)
    with jupyterlab(folder) as address:
        yield address


@pytest.fixture
def page(address):
    with browser_page(address) as page:
        yield page


def test_lesson_1(page, address, tmp_path):
    assert address.endswith(f"/lab/tree/{LESSON}"), f"what is printed opens no lesson: {address}"
    open_notebook(page, LESSON)
    run_all(page)
    assert errors(page) == []
    first = ask(page, "What is the capital of France?")
    assert ask(page, "What is 2 + 3?") != first
    page.locator(".sftlab-side-by-side").scroll_into_view_if_needed()
    screenshot(page, "lesson_01", tmp_path)


def test_an_exercise_knows_the_mistake_and_keeps_what_was_done(page, folder, tmp_path):
    open_notebook(page, EXERCISE)
    run_all(page)
    assert errors(page) == []  # an untouched copy shows no red
    assert page.get_by_text("○ Temperature · not attempted yet").count() == 1
    assert LATE != ANSWER
    replace_cell(page, "def probabilities", LATE)
    page.get_by_text("✗ Temperature · the temperature comes too late").wait_for()
    replace_cell(page, "def probabilities", ANSWER)
    page.get_by_text("✓ Temperature · right").wait_for()
    screenshot(page, "exercise_01", tmp_path)
    kept = json.loads((folder/"sftlab-progress.json").read_text())
    assert kept["generation.temperature"]["state"] == "right"
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    wait_idle(page)
    assert json.loads((folder/"sftlab-progress.json").read_text()) == kept


def test_good_notebook_passes(page, tmp_path):
    open_notebook(page, "good.ipynb")
    run_all(page)
    assert errors(page) == []
    assert "Few-shot: ONE" in ask(page, "one")
    page.evaluate(BUSY)
    assert "Instruct: TWO" in ask(page, "two")  # a click does not overtake what was typed before
    assert screenshot(page, "good", tmp_path).read_bytes().startswith(b"\x89PNG")


def test_failing_notebook_is_reported(page):
    open_notebook(page, "fails.ipynb")
    run_all(page)
    assert errors(page) == ["cell 1: ZeroDivisionError: division by zero", "cell 2 did not run"]


def test_dead_kernel_is_reported(page):
    open_notebook(page, "dies.ipynb")
    run_all(page, timeout=60)
    assert errors(page) == ["cell 0 did not run"]


@pytest.mark.parametrize("name", ["deaf", "partial"])
def test_widget_without_new_answers_is_reported(page, name):
    open_notebook(page, f"{name}.ipynb")
    run_all(page)
    assert errors(page) == []
    with pytest.raises(AssertionError, match="no new answers"):
        ask(page, "one", timeout=10)


def test_server_and_kernels_end_with_a_failing_test(tmp_path):
    write_notebook(tmp_path/"good.ipynb", "1")
    gone = pytest.raises(ZeroDivisionError)
    with gone, jupyterlab(tmp_path) as address, browser_page(address) as page:
        open_notebook(page, "good.ipynb")
        family = psutil.Process().children(recursive=True)
        commands = {process: " ".join(process.cmdline()) for process in family}
        raise ZeroDivisionError
    started = {process: command for process, command in commands.items()
               if str(tmp_path) in command}
    assert any("ipykernel" in command for command in started.values())
    assert not any(process.is_running() for process in started)


OUTCOMES = [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]


@pytest.mark.parametrize("ci, outcome", OUTCOMES)
def test_without_a_browser(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("lab.shutil.which", lambda name: None)
    with pytest.raises(outcome, match="no chromium"):
        find_browser()
