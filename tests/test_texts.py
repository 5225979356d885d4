"The texts: every template can be read, the same seed gives the same pages, and no test item is in what the shipped model was trained on."
import random
import re
from itertools import islice

import pytest
from hypothesis import given, strategies as st

from sftlab.tiny import texts
from sftlab.tiny.texts import PRACTICE, TEXTS, documents, expand, pieces, templates
from sftlab.tiny.world import UNSEEN_COUNTRIES, content_leaks, examples, leaks, test_set as items_of_test
from sftlab.models import tiny_path
from sftlab.tiny.pretraining import STAGES

FILES = sorted(path.stem for path in TEXTS.glob("*.txt"))


def test_choices_are_made_from_the_inside_out():
    seen = {expand("[a|[b|c] d|] {x}", random.Random(seed), x=1) for seed in range(60)}
    assert seen == {"a 1", "b d 1", "c d 1", " 1"}


@pytest.mark.parametrize("name", FILES)
def test_every_template_is_well_formed(name):
    "Brackets balance, no slot is unknown, and no choice leaves a bracket, a double space or a space before a mark."
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
                assert text.isascii() and not re.search(r"\b[Aa] [aeio]\w|\b[Aa]n [bcdfgjklmnpqrstvwz]\w", re.sub(r"\b[Aa] (one|once)\b", "", text)), text


@given(st.integers(0, 100_000), st.sampled_from(list(PRACTICE)))
def test_every_maker_writes_something_and_the_same_for_the_same_seed(seed, make):
    text = make(random.Random(seed))
    assert text.strip() and text == make(random.Random(seed))


def test_the_same_seed_gives_the_same_pages_and_another_seed_others():
    assert list(islice(documents(3), 200)) == list(islice(documents(3), 200)) != list(islice(documents(4), 200))


def test_results_of_example_calls_are_right():
    "Run the assertions that stand in the functions written for the model."
    rng, checked = random.Random(0), 0
    for _ in range(800):
        text = texts._function(rng)
        if "\nassert " in text and text.startswith(("def", "#")):
            exec(text, {})  # our own text, from the generator
            checked += 1
    assert checked > 20


@pytest.fixture(scope="module")
def read_by_the_model():
    "Every document that the shipped model was trained on, and some more, and more rows than any lesson trains on."
    from transformers import AutoTokenizer
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny_path()), []
    for seed, (steps, mixture) in enumerate([part for stage in STAGES for part in stage["parts"]], 1):
        pages, tokens = documents(seed, mixture), 0
        while tokens < 1.02 * steps * 8 * 512:  # pages are written in batches, and the last of each is not used
            batch = list(islice(pages, 1000))
            texts += batch
            tokens += sum(map(len, tokenizer(batch, verbose=False)["input_ids"])) + len(batch)
    return texts + [f"{e['question']}\n{e['answer']}" for seed in range(3) for e in examples("train", 3000, seed) + examples("validation", 500, seed)]


def test_no_test_item_stands_in_what_models_are_trained_on(read_by_the_model):
    assert leaks(read_by_the_model, items_of_test()) == []
    assert content_leaks(read_by_the_model, items_of_test()) == []


def test_unseen_countries_are_in_no_document(read_by_the_model):
    everything = "\n".join(read_by_the_model)
    assert [c["name"] for c in UNSEEN_COUNTRIES if c["name"] in everything or c["capital"] in everything] == []
