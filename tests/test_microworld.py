"The world's promises: deterministic, split by entity, and no test item where it could be learned."
import random
from itertools import islice

import pytest
from hypothesis import given, strategies as st

from sftlab.microworld import (KINDS, UNSEEN_COUNTRIES, content_leaks, documents, examples, leaks, make_example,
                               make_list, make_numbers, make_sentence, make_sum, split_of, test_set as items_of_test)

SPLITS = ("train", "validation", "test")


@given(st.integers(0, 10_000), st.sampled_from(SPLITS))
def test_made_up_things_are_of_the_split_asked_for(seed, split):
    rng = random.Random(seed)
    x, op, y, result = make_sum(rng, split)
    assert result == (x + y if op == "+" else x - y) and result >= 0
    assert split_of(f"{min(x, y)}+{max(x, y)}" if op == "+" else f"{x}-{y}") == split
    assert split_of(",".join(sorted(make_list(rng, split)))) == split
    assert split_of(",".join(map(str, sorted(make_numbers(rng, split))))) == split
    assert split_of(make_sentence(rng, split)[0]) == split


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_question_of_one_split_is_never_asked_in_another(seed, kind):
    questions = {split: {make_example(kind, random.Random(f"{seed} {i}"), split)["question"] for i in range(5)} for split in SPLITS}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert list(islice(documents(3), 200)) == list(islice(documents(3), 200)) != list(islice(documents(4), 200))
    assert examples("train", 100, seed=1) == examples("train", 100, seed=1) != examples("train", 100, seed=2)


def test_examples_are_spread_over_the_kinds_and_no_question_comes_twice():
    rows = examples("train", 1000)
    assert len({r["question"] for r in rows}) == len(rows) == 1000
    counts = [sum(r["kind"] == kind for r in rows) for kind in KINDS]
    assert max(counts) - min(counts) <= 1


def test_python_answers_are_right():
    "Run each reference solution and compare it with what the question asks, where that is a plain fold over a list."
    for row in examples("train", 300, kinds=["python"]):
        if "the sum of the numbers in xs" in row["question"]:
            names = {}
            exec(row["answer"], names)  # our own text, from the generator
            assert names["solve"]([1, 2, 3]) == 6
            return
    pytest.fail("no such question was drawn")


@pytest.fixture(scope="module")
def read_by_the_model():
    "Every document that the shipped model was trained on (seed 1), and more rows than any lesson trains on."
    texts = list(islice(documents(seed=1), 40_000))
    return texts + [f"{e['question']}\n{e['answer']}" for seed in range(3) for e in examples("train", 2000, seed) + examples("validation", 500, seed)]


def test_no_test_item_stands_in_what_models_are_trained_on(read_by_the_model):
    assert leaks(read_by_the_model, items_of_test()) == []
    assert content_leaks(read_by_the_model, items_of_test()) == []


def test_unseen_countries_are_in_no_document(read_by_the_model):
    everything = "\n".join(read_by_the_model)
    assert [c["name"] for c in UNSEEN_COUNTRIES if c["name"] in everything] == []


@pytest.mark.parametrize("kind", ["arithmetic", "reverse", "sort", "sentence", "sentiment"])
def test_a_leak_made_on_purpose_is_found(kind):
    item = next(i for i in items_of_test() if i["kind"] == kind)
    assert leaks([f"Homework\n1. {item['question']}"], [item]) == [item["question"]]
    content = item["question"].split("? ", 1)[1] if kind == "sentiment" else item["answer"]
    assert content_leaks([f"Somebody said: {content}"], [item]) == [content]
