"""The front page (nbs/index.ipynb, and README made of it): what it shows is real, what it claims is
linked to its proof, and it looks as it was meant to, wide and narrow, light and dark."""
import importlib.util
import json
import re
import struct
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "nbs/_site"
sys.path.insert(0, str(ROOT / "tools"))  # tools import one another


def tool(name):
    "A module of tools/."
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def front_page():
    return MarkdownExporter().from_filename(ROOT / "nbs/index.ipynb")[0]


def part(heading, text):
    "What is below a heading."
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


# --- in this order, and nothing heavy

ORDER = ["# sftlab\n", "\n> Supervised", 'class="front-live"', 'class="front-buttons"',
         "## Before and after", "## What makes it different", "## Lessons",
         "## Labs, exercises, paths", "## Install", "## More"]


@pytest.mark.parametrize("text", [front_page(), (ROOT / "README.md").read_text("utf-8")],
                         ids=["page", "README"])
def test_the_order_is_that_of_a_visitors_twenty_seconds(text):
    places = [text.index(name) for name in ORDER]
    assert places == sorted(places)


def test_the_first_sentence_is_that_of_the_package():
    assert f"> {settings()['description']}: " in front_page()


def test_nothing_loads_before_it_is_asked_for():
    text = front_page()
    assert not re.search(r"<(script|iframe|video|link|object)\b", text)
    shown = set(re.findall(r'(?:src|srcset)="([^"]+)"', text))
    assert shown == {f"images/live-{size}-{scheme}.png"
                     for size in ("desk", "phone") for scheme in ("light", "dark")}
    sizes = [(ROOT / "nbs" / path).stat().st_size for path in shown]
    assert max(sizes) < 120_000  # a browser takes one of them


def test_the_still_picture_is_described_and_leads_to_the_live_page():
    text, live = front_page(), f"{settings()['doc_host']}{settings()['doc_baseurl']}/nbs/live/"
    assert re.search(rf'<a href="{live}index.html"><picture>.*?</picture></a>', text)
    alt = re.search(r'<img [^>]*alt="([^"]+)"', text)[1]
    assert len(alt.split()) > 15 and alt.endswith(".")
    size = re.search(r"the models: ([\d.]+ MB)", (ROOT / "nbs/live/index.html").read_text())[1]
    assert f"({size})" in text  # tests/test_live.py weighs them


def test_room_is_kept_for_the_still_picture():
    style = (SITE / "front.css").read_text()
    room = [(int(w), int(h)) for w, h in re.findall(r"aspect-ratio: auto (\d+) / (\d+)", style)]
    for scheme in ("light", "dark"):
        files = [ROOT / f"nbs/images/live-{size}-{scheme}.png" for size in ("desk", "phone")]
        assert [struct.unpack(">II", file.read_bytes()[16:24]) for file in files] == room


def test_the_buttons():
    text, ini = front_page(), settings()
    buttons = re.search(r'<div class="front-buttons">(.*?)</div>', text, re.DOTALL)[1]
    lesson = "01_base_vs_instruct.ipynb"
    assert re.findall(r"\*\*\[(.*?)\]\((.*?)\)\*\*", buttons) == [
        ("Try it here (5.6 MB)", f"{ini['doc_host']}{ini['doc_baseurl']}/nbs/live/index.html"),
        ("Start lesson 1", lesson),
        ("Open in Colab", "https://colab.research.google.com/github/"
         f"{ini['user']}/{ini['repo']}/blob/{ini['branch']}/nbs/{lesson}"),
        ("GitHub", ini["git_url"])]
    assert (ROOT / "nbs" / lesson).exists()


# --- what it shows is real

@pytest.fixture(scope="module")
def front(): return tool("front")


@pytest.fixture(scope="module")
def asked(front): return front.answered()


def test_the_answers_are_what_the_models_say(front, asked):
    assert front.answer_table(asked) in front_page(), "run python tools/front.py answers"
    lesson = (ROOT / "nbs/01_base_vs_instruct.ipynb").read_text("utf-8")
    assert len(asked) == 4 and all(question in lesson for question, _, _ in asked)
    assert all(before.endswith("…") and not after.endswith("…") for _, before, after in asked)


def test_none_of_the_four_was_among_the_conversations():
    from sftlab.tiny.world import examples
    live = tool("live")
    assert not {e["question"] for e in examples("train", 1000)} & set(live.ASKED)


def test_another_answer_would_be_noticed(front, asked):
    question, before, after = asked[0]
    assert front.answer_table([(question, before, after + "!")]) not in front_page()
    assert front.as_text("a | b_c *d*\n<e>") == r"a \| b\_c \*d\* \<e\>"


def test_the_weights_are_counted():
    from sftlab.models import load
    assert "2.6 million weights" in front_page()
    assert round(load("tiny")[0].num_parameters() / 1e5) == 26


def test_the_parts_of_the_course_hold_every_lesson_in_order():
    lessons = tool("lessons")
    parts = lessons.parts(lessons.table())
    assert list(parts) == ["First steps", "Training and memory", "Better runs",
                           "Data and evaluation", "Richer answers", "In the world"]
    assert sum(parts.values(), []) == lessons.table()
    assert all(f"### {name}\n" in front_page() for name in parts)


# --- what it claims is linked to its proof

def links(text): return re.findall(r"\]\(([^)\s]+)\)|href=\"([^\"]+)\"", text)


def test_each_difference_is_linked_to_its_proof():
    items = re.findall(r"^- .*", part("What makes it different", front_page()), re.MULTILINE)
    assert len(items) == 5
    assert all(links(item) for item in items)


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_into_the_project_and_its_sections_lead_somewhere():
    code = f"{settings()['git_url']}/blob/{settings()['branch']}/"
    found = [a or b for a, b in links(front_page())]
    assert sum(target.startswith(code) for target in found) >= 5
    for target in found:
        path, _, anchor = target.partition("#")
        if target.startswith(code):
            assert (ROOT / path.removeprefix(code)).exists(), target
        elif not target.startswith("http"):
            assert (ROOT / "nbs" / path).exists(), target
        if anchor:
            cells = json.loads((ROOT / "nbs" / path).read_text("utf-8"))["cells"]
            text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", text, re.MULTILINE)), target


def test_the_labs_are_those_that_are_there():
    lessons = tool("lessons")
    shown = re.search(r"<!-- labs -->(.*?)<!-- /labs -->", front_page(), re.DOTALL)[1]
    assert shown.strip() == lessons.lab_list(ROOT).strip(), "run make lessons"


# --- mark, icons, card, and the page for what is not found

def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_icons_and_card_have_their_sizes():
    assert png_size(SITE / "apple-touch-icon.png") == (180, 180)
    assert png_size(SITE / "social-card.png") == (1200, 630)
    assert (SITE / "social-card.png").stat().st_size < 300_000


def test_the_live_page_carries_the_same_mark(front):
    text = (ROOT / "nbs/live/index.html").read_text("utf-8")
    assert f'<link rel="icon" href="{front.data_uri()}">' in text, "run tools/front.py icons"
    ini = settings()
    assert f'content="{ini["doc_host"]}{ini["doc_baseurl"]}/social-card.png"' in text


def test_the_page_for_what_is_not_found_finds_its_way_from_everywhere():
    text = (SITE / "404.html").read_text("utf-8")
    assert f'<base href="{settings()["doc_baseurl"].rstrip("/")}/">' in text
    inside = [t for t in re.findall(r'(?:href|src)="([^"]+)"', text) if not t.startswith("http")]
    for target in set(inside) - {f"{settings()['doc_baseurl']}/"}:
        page = ROOT / target.replace(".html", ".ipynb")
        assert page.exists() or (ROOT / target).exists() or (SITE / target).exists(), target


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme, place", [("light", 0), ("dark", 1)])
def test_its_colours_stand_out(scheme, place):
    "A contrast of 4.5 or more: https://www.w3.org/TR/WCAG22/#contrast-minimum"
    theme = (ROOT / f"tools/site/{scheme}.scss").read_text()
    colours = dict(re.findall(r"^\$([\w-]+): (#\w{6});", theme, re.MULTILINE))
    own = re.findall(r"--front-(\w+): (#\w{6})", (SITE / "front.css").read_text())
    assert len(own) == 6  # three, light and dark
    colours |= dict(own[3 * place:3 * place + 3])
    over = [("base", "body-bg"), ("instruct", "body-bg"), ("text-muted", "card"),
            ("link-color", "card"), ("body-bg", "link-color")]
    for text, ground in over:
        low, high = sorted(luminance(colours[name]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
