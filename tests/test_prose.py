"""Every figure in a lesson's prose was printed by a cell of its own section, or has a link.

A figure is a number of three or more digits, one with decimals, or one with a unit. What is quoted
from elsewhere carries a link in the same sentence. A section without code, such as "What to
remember", may repeat figures of the whole lesson, and so may the lines before the first heading.
"""
import json
import re
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from functools import cache
from html import unescape
from pathlib import Path

import pytest

from sftlab.study.links import local_links

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(ROOT.glob("nbs/[0-9][0-9]_*.ipynb"))

UNIT = r"%|points?\b|[kKMGT]i?B\b|nats?\b|ms\b|seconds?\b|times\b"
NUMBER = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e-?\d+)?"
FIGURE = re.compile(rf"(?<![\w.,/^-])({NUMBER})(?![\w]|[.,]\d|-\w)(?=(\s?(?:{UNIT}))?)")
TOGETHER = re.compile(rf"({NUMBER})(?= ?(?:to|and|or|–) ?({NUMBER})\s?(?:{UNIT}))")
ROUGH = re.compile(r"(?i)\b(?:about|nearly|almost|some|roughly|around|over|under|than|least) $")
NAMED = re.compile(r"(?:Python|torch|transformers|TRL|PEFT|PyTorch|bitsandbytes|version|section|"
                   r"lesson|chapter|arXiv:?|Apache|[Ss]tep) $")
TASKS = re.compile(r"## (?:Exercises?|To read)\b")  # what they ask for is not a claim
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


# --- reading a lesson

def prose_of(source):
    "A Markdown cell without code; links keep their target, everything else its words."
    source = re.sub(r"(?ms)^(```|~~~).*?^\1", "", source)
    source = re.sub(r"(?m)^ {4}.*$|<!--.*?-->", "", source)
    return re.sub(r"`[^`\n]*`|\$\$?[^$]+\$\$?", "`", source)


def text_of(output):
    "What an output says, tags and attributes left out."
    data = output.get("data", {})
    html = "".join(data.get("text/html", ""))
    words = re.sub(r"(?s)<style.*?</style>|<script.*?</script>|<[^>]*>", " ", html)
    said = ["".join(output.get("text", "")), words]
    said += ["".join(data.get(kind, "")) for kind in ("text/plain", "text/markdown")]
    return unescape(" ".join(said))


def sections(notebook):
    "Each part of a notebook from one `##` heading to the next: its prose, and what its cells gave."
    parts = [dict(prose="", found="", code="")]
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            first, *others = re.split(r"(?m)^(?=## )", prose_of(source))
            parts[-1]["prose"] += first + "\n\n"
            parts += [dict(prose=text + "\n\n", found="", code="") for text in others]
        elif cell["cell_type"] == "code":
            parts[-1]["code"] += source + "\n"
            parts[-1]["found"] += " ".join(map(text_of, cell["outputs"])) + "\n"
    return parts


def sentences(prose):
    "Sentences, and the rows of tables."
    for block in re.split(r"\n\s*\n|\n(?=\s*[|*>-])", prose):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z\[*(])", " ".join(block.split()))


# --- figures

def figures(sentence):
    "The figures of a sentence: (as written, is it in %, may it be rounded to its zeros?)."
    bare = LINK.sub(lambda m: m[0].split("](")[0].strip("["), sentence)
    together = {m.start(1) for m in TOGETHER.finditer(bare)}
    found = []
    for m in FIGURE.finditer(bare):
        number, unit = m[1], m[2]
        digits = len(re.sub(r"e.*|\D", "", number))
        year = re.fullmatch(r"(19|20)\d\d", number) and not unit
        if year or NAMED.search(bare[:m.start()]):
            continue
        if unit or m.start() in together or digits >= 3 or "." in number or "e" in number:
            percent = "%" in bare[m.end():m.end() + 14]
            found.append((number, percent, bool(ROUGH.search(bare[:m.start()]))))
    return found


def numbers(text):
    "All numbers of a text."
    return {Decimal(m.replace(",", "").replace("_", ""))
            for m in re.findall(r"\d+(?:[,_]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)}


def place(number, rough):
    "The place of a number's last digit that counts: 0.01 for 3.14, or 100 for a rough 1,200."
    value = Decimal(number.replace(",", ""))
    digits = value.as_tuple()
    step = Decimal(1).scaleb(digits.exponent)
    if rough and digits.exponent >= 0 and value:
        zeros = len(str(int(value))) - len(str(int(value)).rstrip("0"))
        step = step.scaleb(zeros)
    return value, step


def rounds_to(exact, value, step):
    ways = (ROUND_HALF_UP, ROUND_HALF_DOWN)
    return value / step in {(exact / step).quantize(Decimal(1), rounding=way) for way in ways}


def is_among(figure, known):
    "Whether a figure of the prose is one of the known numbers, to its rounding."
    number, percent, rough = figure
    value, step = place(number, rough)
    shares = [n * 100 for n in known if percent and n <= 1]
    return any(rounds_to(n, value, step) for n in [*known, *shares] if n < Decimal(10)**15)


@cache
def pages_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.ipynb")}


def linked(sentence, notebook):
    "What a sentence's links stand for: None for another site, or the numbers of the notebooks."
    known = set()
    here = local_links(sentence, notebook.name, pages_below(notebook.parent))
    for target in LINK.findall(here):
        file = (notebook.parent / target.partition("#")[0]).resolve()
        if target.startswith("http"):
            return None
        if file.suffix == ".ipynb" and file.is_file() and file != notebook:
            known |= numbers(" ".join(part["found"] for part in sections(file)))
    return known


def checked(notebook):
    "Each figure of a lesson's prose that needs a cell: (sentence, figure, numbers it may be)."
    parts = [part for part in sections(notebook) if not TASKS.match(part["prose"])]
    whole = numbers(" ".join(part["found"] + part["code"] for part in parts))
    for i, part in enumerate(parts):
        own = numbers(part["found"] + part["code"])
        known = whole if i == 0 or not part["code"].strip() else own
        for sentence in sentences(part["prose"]):
            quoted = linked(sentence, notebook)
            if quoted is not None:
                yield from ((sentence, figure, known | quoted) for figure in figures(sentence))


def unproved(notebook):
    return [(figure[0], sentence[:160]) for sentence, figure, known in checked(notebook)
            if not is_among(figure, known)]


# --- the lessons

@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_figure_in_the_prose_comes_from_a_cell(lesson):
    missing = unproved(lesson)
    said = "\n".join(f"{figure}: {sentence}" for figure, sentence in missing)
    assert not missing, f"{lesson.stem}: no cell of the section printed\n{said}"


# --- the test's own tests

def notebook_of(folder, *cells):
    made = []
    for kind, source, *printed in cells:
        outputs = [dict(output_type="stream", name="stdout", text=text) for text in printed]
        made.append(dict(cell_type=kind, source=source, outputs=outputs))
    path = folder / "01_x.ipynb"
    path.write_text(json.dumps(dict(cells=made)))
    return path


PRINTED = "rows 1,234\nloss 0.8312 nats\nshare 0.853\n2.1e-06"
TRUE = ("It has 1,234 rows.", "The loss is 0.83 nats.", "So 85.3 % are right.",
        "About 1,200 rows.", "Most, 80 to 85 %, agree: 80 is the setting.",
        "Off by 2.1e-06.", "The loss is .83 of it.")
FALSE = ("It has 1,235 rows.", "The loss is 0.84 nats.", "So 85.4 % are right.",
         "About 1,300 rows.", "Most, 81 to 85 %, agree.",
         "Off by 2.2e-06.", "It took 7 seconds.", "It has 1,200 rows.")


@pytest.mark.parametrize("sentence", TRUE)
def test_a_figure_that_was_printed_passes(sentence, tmp_path):
    path = notebook_of(tmp_path, ("markdown", "## A\n" + sentence), ("code", "least = 80", PRINTED))
    assert unproved(path) == []


@pytest.mark.parametrize("sentence", FALSE)
def test_a_figure_that_was_not_is_found(sentence, tmp_path):
    path = notebook_of(tmp_path, ("markdown", "## A\n" + sentence), ("code", "least = 80", PRINTED))
    assert len(unproved(path)) == 1


@pytest.mark.parametrize("quiet", [
    "In 2023 it was three times `1234567`.", "Llama-2-7B has 7B, Qwen3-0.6B less.", "$x^{1000}$",
    "The paper says [33.3 GB](https://arxiv.org/abs/2305.14314).", "Python 3.11 and TRL 1.2.",
    "```\n123456\n```", "Two of 19 kinds."])
def test_what_is_no_figure_of_ours_passes(quiet, tmp_path):
    assert unproved(notebook_of(tmp_path, ("markdown", f"## A\n{quiet}"), ("code", "1", ""))) == []


def test_another_section_proves_nothing_and_a_summary_repeats(tmp_path):
    cells = [("markdown", "## A"), ("code", "x", "0.8312"), ("markdown", "## B\nIt is 0.83."),
             ("code", "y", "7"), ("markdown", "## What to remember\nIt is 0.83.")]
    assert [figure for figure, _ in unproved(notebook_of(tmp_path, *cells))] == ["0.83"]


def altered(figure):
    "The same figure, one more in its last digit."
    number, percent, rough = figure
    value, step = place(number, rough)
    return f"{value + step}", percent, rough


def two_digits(number):
    "Whether it has two digits or more that count: 0.6 plus 0.1 is often another figure's value."
    return "e" not in number and len(re.sub(r"\D", "", number).lstrip("0")) > 1


def test_a_wrong_last_digit_in_a_lesson_is_noticed():
    "Altered by one in its last digit, nearly every figure of every lesson would be found."
    noticed = [not is_among(altered(figure), known) for lesson in LESSONS
               for _, figure, known in checked(lesson) if two_digits(figure[0])]
    assert len(noticed) > 50 and sum(noticed) / len(noticed) > 0.85
