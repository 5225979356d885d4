"The world's promises: deterministic, split by entity, and no test item where it could be learned."
import random
import re

import pytest
from hypothesis import given, strategies as st

from sftlab.tiny.world import (KINDS, content_leaks, copy_clozes, examples, fact_clozes, leaks, make_example, make_list,
                               make_numbers, make_passage, make_problem, make_sentence, make_sum, split_of, test_set as items_of_test)

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
    assert split_of(make_passage(rng, split)[0]) == split


@given(st.integers(0, 10_000), st.sampled_from(SPLITS))
def test_problems_add_up_and_their_sum_is_of_the_split(seed, split):
    story, _, answer = make_problem(random.Random(seed), split)
    x, y = map(int, re.findall(r"\d+", story))
    result = int(re.search(r"\d+", answer)[0])
    assert result in (x + y, x - y)
    assert split_of(f"{min(x, y)}+{max(x, y)}" if result == x + y else f"{x}-{y}") == split


@given(st.integers(0, 10_000))
def test_the_answer_of_a_passage_stands_in_it(seed):
    passage, asked = make_passage(random.Random(seed))
    names = re.findall(r"[A-Z]\w+", passage)
    for question, answer in asked:
        assert set(re.findall(r"[A-Z]\w+", answer)) <= {*names, "The"}
        assert set(answer.rstrip(".").split()[-1:]) <= set(re.findall(r"\w+", passage))


def test_clozes_ask_every_fact_once_and_hide_its_answer():
    for language in ("en", "zh"):
        items = fact_clozes(language)
        assert len({i["question"] for i in items}) == len(items) > 500
        assert all(not i["question"].endswith(i["answer"]) for i in items)
    assert all(i["answer"].strip("\".。”") in i["question"] for i in copy_clozes())


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_question_of_one_split_is_never_asked_in_another(seed, kind):
    questions = {split: {make_example(kind, random.Random(f"{seed} {i}"), split)["question"] for i in range(5)} for split in SPLITS}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
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


@pytest.mark.parametrize("kind", ["arithmetic", "reverse", "sort", "sentence", "sentiment", "reading", "word_problem"])
def test_a_leak_made_on_purpose_is_found(kind):
    item = next(i for i in items_of_test() if i["kind"] == kind)
    assert leaks([f"Homework\n1. {item['question']}"], [item]) == [item["question"]]
    content = {"sentiment": item["question"].split("? ", 1)[-1], "reading": item["question"].rsplit(". ", 1)[0] + ".", "word_problem": item["question"].rsplit(". ", 1)[0] + "."}.get(kind, item["answer"])
    assert content_leaks([f"Somebody said: {content}"], [item]) == [content]
