"The world's promises: deterministic, split by entity, and no test item where it could be learned."
import random
import re
from functools import partial

import pytest
from hypothesis import given, strategies as st

from sftlab.tiny import world
from sftlab.tiny.world import (
    KINDS, content_leaks, copy_clozes, examples, fact_clozes, leaks, make_example, make_list,
    make_numbers, make_passage, make_problem, make_sentence, make_sum, split_of)

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
def test_the_answer_of_a_passage_is_in_it(seed):
    passage, asked = make_passage(random.Random(seed))
    names = re.findall(r"[A-Z]\w+", passage)
    for _, answer in asked:
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
    def asked(split):
        drawn = [make_example(kind, random.Random(f"{seed} {i}"), split) for i in range(5)]
        return {example["question"] for example in drawn}

    questions = {split: asked(split) for split in SPLITS}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    rows = examples("train", 100, seed=1)
    assert rows == examples("train", 100, seed=1)
    assert rows != examples("train", 100, seed=2)


def test_examples_are_spread_over_the_kinds_and_no_question_comes_twice():
    rows = examples("train", 1000)
    assert len({r["question"] for r in rows}) == len(rows) == 1000
    counts = [sum(r["kind"] == kind for r in rows) for kind in KINDS]
    assert max(counts) - min(counts) <= 1


def test_things_are_read_from_lines_and_from_those_that_go_on():
    read = world.things("fruit/fruits/水果: apple 苹果 red, pear 梨 green,\n    plum 李子\n"
                        "tool/tools/工具: saw 锯子")
    assert [(t["kind"], t["name"], t["color"]) for t in read] == [
        ("fruit", "apple", "red"), ("fruit", "pear", "green"), ("fruit", "plum", ""),
        ("tool", "saw", "")]


# What a question asks for in words -> what is right. Our own reading of it, and another way than
# the generator's wherever there is one.
FOLDS = {"sum": lambda v: int(sum(map(float, v))), "largest": lambda v: sorted(v)[-1],
         "smallest": lambda v: sorted(v)[0], "list": list,
         "sorted list": lambda v: sorted(v, reverse=True)[::-1], "count": len}
MAPS = {"": lambda x, m: x, "squares of the ": lambda x, m: x ** 2,
        "doubles of the ": lambda x, m: x + x, "values plus {m} of the ": lambda x, m: m + x,
        "values times {m} of the ": lambda x, m: m * x}
FILTERS = {"numbers": lambda x, n: True, "even numbers": lambda x, n: x // 2 * 2 == x,
           "odd numbers": lambda x, n: x // 2 * 2 != x, "positive numbers": lambda x, n: 0 < x,
           "negative numbers": lambda x, n: 0 > x, "numbers greater than {n}": lambda x, n: n < x,
           "numbers less than {n}": lambda x, n: n > x,
           "numbers divisible by {n}": lambda x, n: x // n * n == x}
SHORT = {
    "x plus {n}": lambda x, n: n + x, "x minus {n}": lambda x, n: -n + x,
    "x times {n}": lambda x, n: n * x, "the square of x": lambda x, n: x ** 2,
    "the remainder of x divided by {n}": lambda x, n: x - x // n * n,
    "True if x is even": lambda x, n: x // 2 * 2 == x,
    "True if x is odd": lambda x, n: x // 2 * 2 != x,
    "True if x is greater than {n}": lambda x, n: n < x,
    "True if x is less than {n}": lambda x, n: n > x,
    "True if x is divisible by {n}": lambda x, n: x // n * n == x,
    "the sum of x and y": lambda x, y, n: y + x, "the product of x and y": lambda x, y, n: y * x,
    "the larger of x and y": lambda x, y, n: y if y > x else x,
    "the smaller of x and y": lambda x, y, n: y if y < x else x,
    "the difference of x and y": lambda x, y, n: -y + x,
    "the length of s": lambda s, n: sum(1 for _ in s),
    "the string s reversed": lambda s, n: "".join(reversed(s)),
    "the string s in upper case": lambda s, n: "".join(c.upper() for c in s),
    "the string s in lower case": lambda s, n: "".join(c.lower() for c in s),
    "the string s repeated {n} times": lambda s, n: "".join([s] * n),
    "the first {n} characters of s": lambda s, n: "".join(list(s)[:n]),
    "the last {n} characters of s": lambda s, n: "".join(list(reversed(s))[:n][::-1]),
    "the words of s": lambda s, n: re.findall(r"\S+", s),
    "the first item of xs": lambda xs, n: list(reversed(xs)).pop(),
    "the last item of xs": lambda xs, n: list(xs).pop(),
    "the list xs reversed": lambda xs, n: list(reversed(xs)),
    "True if xs is empty": lambda xs, n: xs == [],
    "True if {n} is in xs": lambda xs, n: xs.count(n) > 0,
    "the absolute value of x": lambda x, n: x if x > 0 else -x}
LISTS = ([5, -3, 8, 2, 9, -7, 0, 4, 12, 7, 6, 3, 15, 21, -10, 30], [40, 1, -2], [-1, -4, -9], [])
INPUTS = dict(x=(-7, 0, 1, 3, 8, 9, 12, 20), y=(5, 0, 8, -2, 9, 3, 1, 30), xs=LISTS,
              s=("Apple pie", "two big Red apples", "a", ""))
# All that the answers need; a program of ours that needs more is a surprise.
BUILTINS = dict(sum=sum, max=max, min=min, sorted=sorted, len=len, abs=abs)


def pattern(phrase):
    "A phrase as a regular expression that takes its numbers out."
    return re.escape(phrase).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{m\}", r"(?P<m>\d+)")


def asked_for(what):
    "From the words of a question: the phrases in it, and the right function; None: not understood."
    for phrase, right in SHORT.items():
        if found := re.fullmatch(pattern(phrase), what):
            n = int(found.groupdict().get("n") or 0)
            return [phrase], partial(right, n=n)
    for fold in FOLDS:
        for change in MAPS:
            for which in FILTERS:
                words = f"the {fold} of the {change}{which} in xs"
                if found := re.fullmatch(pattern(words), what):
                    return [fold, change, which], of_a_list(fold, change, which, found.groupdict())
    return None


def of_a_list(fold, change, which, given):
    n, m = (int(given.get(name) or 0) for name in "nm")

    def right(xs):
        return FOLDS[fold]([MAPS[change](x, m) for x in xs if FILTERS[which](x, n)])
    return right


def result_of(function, values):
    try:
        return repr(function(*values))
    except (IndexError, ValueError):
        return "no result" # the largest of nothing


def python_examples(n=300):
    return [row for split in SPLITS for row in examples(split, n, kinds=["python"])]


def judged(row):
    "The phrases that a question is made of, and whether its answer does what it asks for."
    args, what = re.fullmatch(
        r"Write a Python function solve\((.+)\) that returns (.+)\.", row["question"]).groups()
    phrases, right = asked_for(what)
    scope = {"__builtins__": BUILTINS}
    exec(row["answer"], scope)  # our own text, from the generator
    inputs = list(zip(*(INPUTS[arg] for arg in args.split(", "))))
    same = all(result_of(scope["solve"], v) == result_of(right, v) for v in inputs)
    return phrases, same


def test_python_answers_are_right():
    "Every program drawn is run on several inputs, and every phrase of a question is among them."
    met, rows = set(), python_examples()
    for row in rows:
        phrases, same = judged(row)
        assert same, row
        met.update(phrases)
    assert len(rows) > 500
    assert met == {*FOLDS, *MAPS, *FILTERS, *SHORT}
    assert {line[0] for line in world._SHORT} == {*SHORT}


PIECES = [(table, key) for table in ("_FOLDS", "_MAPS", "_FILTERS")
          for key in getattr(world, table)]


@pytest.mark.parametrize("table, key", PIECES)
def test_a_wrong_answer_about_lists_is_caught(table, key, monkeypatch):
    "Each piece of a program in turn is given another's code."
    pieces = getattr(world, table)
    other = next(code for name, code in [*pieces.items()] * 2 if code != pieces[key])
    monkeypatch.setitem(pieces, key, other)
    wrong = [phrases for phrases, same in map(judged, python_examples(150)) if not same]
    assert wrong and all(key in phrases for phrases in wrong)


def test_a_wrong_short_answer_is_caught(monkeypatch):
    "All are given the code of another one with the same arguments, and all are found wrong."
    swapped = []
    for what, args, body in world._SHORT:
        others = [b for _, a, b in world._SHORT if a == args and b != body]
        swapped.append([what, args, others[0]])
    monkeypatch.setattr(world, "_SHORT", swapped)
    wrong = {phrases[0] for phrases, same in map(judged, python_examples()) if not same}
    assert wrong == {*SHORT}


@pytest.mark.parametrize("kind", [
    "arithmetic", "reverse", "sort", "sentence", "sentiment", "reading", "word_problem"])
def test_a_leak_made_on_purpose_is_found(kind):
    item = next(i for i in world.test_set() if i["kind"] == kind)
    question = item["question"]
    assert leaks([f"Homework\n1. {question}"], [item]) == [question]
    content = item["answer"]
    if kind == "sentiment":
        content = question.split("? ", 1)[-1]
    if kind in ("reading", "word_problem"):
        content = question.rsplit(". ", 1)[0] + "."
    assert content_leaks([f"Somebody said: {content}"], [item]) == [content]
