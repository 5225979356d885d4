"""The texts: every template can be read, the same seed gives the same pages, and no test item is in
what the shipped model was trained on."""
import hashlib
import json
import random
import re
from itertools import islice

import pytest
from hypothesis import given, strategies as st

from sftlab.models import tiny_path
from sftlab.study.experiments import code_of, fingerprint
from sftlab.tiny import texts, world
from sftlab.tiny.pretraining import STAGES
from sftlab.tiny.texts import PRACTICE, TEXTS, documents, expand, templates
from sftlab.tiny.world import UNSEEN_COUNTRIES, content_leaks, examples, leaks

FILES = sorted(path.stem for path in TEXTS.glob("*.txt"))


def test_choices_are_made_from_the_inside_out():
    seen = {expand("[a|[b|c] d|] {x}", random.Random(seed), x=1) for seed in range(60)}
    assert seen == {"a 1", "b d 1", "c d 1", " 1"}


@pytest.mark.parametrize("name", FILES)
def test_every_template_is_well_formed(name):
    """Brackets balance, no slot is unknown, and no choice leaves a bracket, a double space or a
    space before a mark."""
    slots = {"en": texts._english_slots, "zh": texts._chinese_slots}[name[-2:]]
    for piece in templates(name):
        for line in piece:
            depth = 0
            for mark in re.findall(r"[\[\]]", line):
                depth += 1 if mark == "[" else -1
                assert depth >= 0, line
            assert depth == 0, line
        for seed in range(30):
            rng = random.Random(seed)
            text = texts.compose(piece, rng, " " if name.endswith("en") else "", **slots(rng))
            assert not re.search(r"[\[\]{}|]|  | [.,;!?]", text), text
            if name.endswith("en"):
                assert text.isascii(), text
                known = re.sub(r"\b[Aa] (one|once)\b", "", text)
                wrong = re.search(r"\b[Aa] [aeio]\w|\b[Aa]n [bcdfgjklmnpqrstvwz]\w", known)
                assert not wrong, text


@given(st.integers(0, 100_000), st.sampled_from(list(PRACTICE)))
def test_every_maker_writes_something_and_the_same_for_the_same_seed(seed, make):
    text = make(random.Random(seed))
    assert text.strip() and text == make(random.Random(seed))


def test_the_same_seed_gives_the_same_pages_and_another_seed_others():
    pages = list(islice(documents(3), 200))
    assert pages == list(islice(documents(3), 200))
    assert pages != list(islice(documents(4), 200))


def test_results_of_example_calls_are_right():
    "Run the assertions in the functions that are written for the model."
    rng, checked = random.Random(0), []
    for _ in range(800):
        text = texts._function(rng)
        if "\nassert " in text and text.startswith(("def", "#")):
            exec(text, {})  # our own text, from the generator
            checked.append(text)
    assert len(checked) > 20
    for text in checked: # and an assertion that is wrong does fail
        with pytest.raises(AssertionError):
            exec(wrong_result(text), {})


def wrong_result(text):
    "The same function with an assertion that denies its result."
    head, _, result = text.rpartition(" == ")
    return f"{head} != {result}"


PARTS = [part for stage in STAGES for part in stage["parts"]]


def first_pages():
    "A thousand of each part of the shipped model's training."
    for seed, (_, mixture) in enumerate(PARTS, 1):
        yield from islice(documents(seed, mixture), 1000)


def all_pages():
    "All that the shipped model was trained on, and some more."
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    for seed, (steps, mixture) in enumerate(PARTS, 1):
        pages, tokens = documents(seed, mixture), 0
        while tokens < 1.02 * steps * 8 * 512:  # the last batch of pages is not used up
            batch = list(islice(pages, 1000))
            yield from batch
            tokens += sum(map(len, tokenizer(batch, verbose=False)["input_ids"])) + len(batch)


@pytest.fixture(scope="module", params=[
    first_pages, pytest.param(all_pages, marks=pytest.mark.thorough)])
def read_by_models(request):
    "What the shipped model was trained on, and more rows than any lesson trains on."
    rows = []
    for seed in range(3):
        rows += examples("train", 3000, seed) + examples("validation", 500, seed)
    return [*request.param(), *(f"{e['question']}\n{e['answer']}" for e in rows)]


def test_no_test_item_is_in_what_models_are_trained_on(read_by_models):
    assert leaks(read_by_models, world.test_set()) == []
    assert content_leaks(read_by_models, world.test_set()) == []


def test_unseen_countries_are_in_no_document(read_by_models):
    everything = "\n".join(read_by_models)
    found = [c["name"] for c in UNSEEN_COUNTRIES
             if c["name"] in everything or c["capital"] in everything]
    assert found == []


def generator():
    "One string for all that decides what pages the model was trained on, and the test items."
    makers = list(texts.MIXTURE)  # of pieces; the fingerprint of `documents` tells what they do
    about = [fingerprint(code_of(f)) for f in (documents, world.test_set)]
    about += [[steps, [(makers.index(make), n) for make, n in mixture.items()]]
              for steps, mixture in PARTS]
    about += [hashlib.sha256((TEXTS / f"{name}.txt").read_bytes()).hexdigest() for name in FILES]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


SEARCHED = "6f9b622680dc7218"  # the generator whose pages were searched, all of them


def test_all_pages_of_this_generator_were_searched():
    """Most runs search the first pages alone. That is enough as long as the generator is the one
    whose pages were all searched; names and the form of its code do not count."""
    assert generator() == SEARCHED, (
        "The world, its texts or the mixtures have changed: run "
        f"`pytest --all tests/test_texts.py`, and when it passes put {generator()!r} here.")


def test_another_generator_is_noticed(monkeypatch):
    monkeypatch.setitem(world.STATEMENTS["plural"], "plural", ["One {name}, two {plural}."])
    assert generator() != SEARCHED
    monkeypatch.undo()
    monkeypatch.setitem(STAGES[0]["parts"][0][1], texts._prose, 9)
    assert generator() != SEARCHED
