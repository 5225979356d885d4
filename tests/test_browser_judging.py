"""The rating form as a rater meets it: in JupyterLab, by mouse and by keys.

Whatever a model wrote is text. A restart of the kernel loses nothing.
"""
import json

import pytest

from lab import (browser_page, errors, find_browser, jupyterlab, open_notebook, run_all, screenshot,
                 wait_idle, write_notebook)
from sftlab.files.judgements import Judgements
from sftlab.judging import make_pairs, queue, sides

pytestmark = pytest.mark.slow
HOSTILE = ("<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> "
           "</pre></div> \x1b[31mred **bold** $x^2$ <b>b</b>")
ANSWERS = {"zebra-one": [f"{n}: {HOSTILE}" for n in range(6)],
           "zebra-two": [f"{n}: " + "very long " * 1000 for n in range(6)]}
PAIRS = make_pairs([f"What? {HOSTILE}"] * 6, ANSWERS)
CELLS = ("import json\n"
         "from sftlab.judging_form import RatingForm\n"
         "pairs = json.load(open('pairs.json'))",
         "form = RatingForm(pairs, 'judgements.db', rater='me', rubric='hhh')\nform")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rater")/"course"
    folder.mkdir()
    (folder/"pairs.json").write_text(json.dumps(PAIRS))  # the names are not in the notebook
    write_notebook(folder/"rating.ipynb", *CELLS)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    find_browser()
    with jupyterlab(folder) as address, browser_page(address) as page:
        open_notebook(page, "rating.ipynb")
        run_all(page)
        yield page


def wait_for_pair(page, n):
    "Until the form shows the n-th pair, and for as long as nobody can have read it."
    page.get_by_text(f"Pair {n} of {len(PAIRS)}.").wait_for()
    page.wait_for_timeout(700)


def texts(page):
    "What the rater reads: the prompt, the left and the right answer."
    return page.locator(".sftlab-rating pre").all_inner_texts()


def answers_of(pair):
    return [pair["answers"][name] for name in sides(pair, "me")]


def kept(folder):
    return [(j["pair"], j["winner"]) for j in Judgements(folder/"judgements.db").all()]


def test_three_pairs_by_mouse_and_keys_and_a_restart(page, folder, tmp_path):
    assert errors(page) == []
    order = queue(PAIRS, "me")
    wait_for_pair(page, 1)
    read = [text.replace("\x1b", "⟨U+001B⟩").strip() for text in answers_of(order[0])]
    assert read == [text.strip() for text in texts(page)[1:]]
    page.get_by_role("button", name="Left is better").dblclick()  # the second click is too quick
    wait_for_pair(page, 2)
    keys = page.get_by_placeholder("keys: l, t, r")
    keys.press("t")
    wait_for_pair(page, 3)
    assert keys.input_value() == "" and keys.evaluate("x => x === document.activeElement")
    honest = page.get_by_label("honest").nth(1)  # of the right answer
    honest.focus()
    honest.press("4")
    page.get_by_placeholder("a note").fill(HOSTILE)
    button = page.get_by_role("button", name="Right is better")
    button.focus()
    button.press("Space")
    wait_for_pair(page, 4)
    sided = [sides(pair, "me") for pair in order]
    winners = [sided[0][0], "tie", sided[2][1]]
    assert kept(folder) == [(p["pair"], w) for p, w in zip(order, winners)]
    third = Judgements(folder/"judgements.db").all()[2]
    assert third["scores"] == {sided[2][1]: {"honest": 4}} and third["note"] == HOSTILE
    before = texts(page)
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    wait_idle(page)
    run_all(page)
    wait_for_pair(page, 4)
    assert texts(page) == before and len(kept(folder)) == 3
    page.get_by_role("button", name="Undo").click()
    wait_for_pair(page, 3)
    assert page.get_by_placeholder("a note").input_value() == HOSTILE
    assert len(kept(folder)) == 2
    screenshot(page, "judging", tmp_path)


def test_what_a_model_wrote_is_text_and_no_name_is_in_the_page(page):
    assert page.evaluate("() => window.hacked") is None
    form = page.locator(".sftlab-rating")
    assert form.locator("img, script, mjx-container, strong").count() == 0
    assert "<img src=x onerror=" in form.inner_text()
    assert "⟨U+001B⟩[31mred **bold** $x^2$" in texts(page)[0]
    page.evaluate("() => { const img = new Image(); img.onerror = () => { window.hacked = 2 }\n"
                  "img.src = 'data:,' }")  # the control: such an image would be noticed
    page.wait_for_function("() => window.hacked === 2")
    assert "zebra" not in page.content()
    assert "What?" in page.content()


def test_on_a_phone_and_in_the_dark(page, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("""async () => {
        await jupyterapp.commands.execute('application:toggle-left-area')
        await jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}) }""")
    page.wait_for_timeout(800)
    form = page.locator(".sftlab-rating")
    form.scroll_into_view_if_needed()
    screenshot(page, "judging_phone_dark", tmp_path)
    left, right = (page.locator(".sftlab-rating pre").nth(n).bounding_box() for n in (1, 2))
    assert right["y"] > left["y"] + 20 and abs(right["x"] - left["x"]) < 4  # one below the other
    room = form.evaluate("x => [x.scrollWidth, x.clientWidth]")
    assert room[0] <= room[1] + 1
    color = form.locator("pre").first.evaluate("x => getComputedStyle(x).color")
    assert min(int(n) for n in color.removeprefix("rgb(").removesuffix(")").split(",")) > 120, color
