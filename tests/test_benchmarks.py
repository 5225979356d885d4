"""Lesson 16 against lm-eval: log-likelihoods, filters, contamination; judges not to be trusted."""
import gzip
import json
import logging
import math
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab.benchmarks import (
    FLEXIBLE, STRICT, answers_of, changed_answers, extract, harness, judge_pair, loglikelihoods,
    multiple_choice, overlaps, plain_number, plain_words, same_number, settled, share_of_truth,
    sign_test, task_config, verdict)
from sftlab.errors import DataError, ServingError
from sftlab.execution import check_solution
from sftlab.judge import endpoint, local, stand_in
from sftlab.models import load, tiny_path
from sftlab.tiny.benchmarks import (
    four_choices, functions, planted_pairs, tempting, two_turns, word_problems)
from sftlab.tiny.world import examples

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


# --- log-likelihoods

def by_loss(model, tokenizer, context, choice):
    "One choice at a time, through the loss that transformers computes."
    ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
    labels = ids.clone()
    labels[:, :len(tokenizer(context)["input_ids"])] = -100
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    return -loss.item() * int((labels != -100).sum())


@pytest.mark.parametrize("context, choices", [
    ("Q: What is the capital of Peru?\nA:", [" Lima", " The capital of Peru is Lima.", " x"]),
    ("秘鲁的首都是", ["利马", "利马。秘鲁", "北京"])])
def test_log_likelihoods_are_those_of_the_loss(context, choices, tiny):
    found = loglikelihoods(*tiny, context, choices)
    wanted = [by_loss(*tiny, context, choice) for choice in choices]
    assert found == pytest.approx(wanted, abs=1e-3) and max(found) < 0


def test_a_choice_may_be_several_tokens_or_one(tiny, tmp_path):
    "Item by item what lm-eval finds, where lengths differ much and acc_norm differs from acc."
    items = [dict(question=f"Write {n} words.", gold=n % 3,
                  choices=["one", "two words here and more of them", "x" * (n + 1)])
             for n in range(12)]
    mine = multiple_choice(*tiny, items, lambda i: i["question"], lambda i: i["choices"])
    config = task_config(
        tmp_path, "mixed", items, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="{{choices}}", doc_to_target="gold",
        metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    found = harness(*tiny, [config], disable_tqdm=True)
    for metric in ("acc", "acc_norm"):
        theirs = [row["score"] for row in answers_of(found, "mixed", metric)]
        assert [float(row[metric]) for row in mine] == theirs
    assert [row["acc"] for row in mine] != [row["acc_norm"] for row in mine]
    samples = sorted(found["samples"]["mixed"], key=lambda s: s["doc_id"])
    for row, sample in zip(mine, samples, strict=True):
        assert row["scores"] == pytest.approx([r[0][0] for r in sample["resps"]], abs=1e-3)


def test_what_the_lesson_says_of_lm_eval(tiny, tmp_path):
    "No examples for MMLU, 256 tokens, and inside the template no space before a choice."
    from pathlib import Path

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    tasks = Path(lm_eval.__file__).parent / "tasks"
    assert "num_fewshot" not in (tasks / "mmlu/default/_default_template_yaml").read_text()
    assert "num_fewshot: 5" in (tasks / "gsm8k/gsm8k.yaml").read_text()
    assert HFLM(pretrained=tiny[0], tokenizer=tiny[1]).max_gen_toks == 256
    config = task_config(
        tmp_path, "space", [dict(question="Q", gold=0)], output_type="multiple_choice",
        doc_to_text="{{question}}", doc_to_choice=["A", "B"], doc_to_target="gold",
        metric_list=[dict(metric="acc")])
    for chat, choice in ((False, " A"), (True, "A")):
        found = harness(*tiny, [config], disable_tqdm=True, apply_chat_template=chat)
        [sample] = found["samples"]["space"]
        context, continuation = sample["arguments"][0]
        assert continuation == choice and context.endswith("assistant\n") == chat


def test_misuse_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="two texts or more"):
        loglikelihoods(*tiny, "x", ["one"])
    with pytest.raises(DataError, match="no items"):
        task_config(tmp_path, "empty", [])
    with pytest.raises(DataError, match="no items"):
        multiple_choice(*tiny, [], str, list)
    with pytest.raises(DataError, match="at least one of each"):
        share_of_truth([-1.0, -2.0], [1, 1])
    assert list(tmp_path.iterdir()) == []


# --- truth

@given(st.lists(st.tuples(st.floats(-50, 0), st.booleans()), min_size=2, max_size=8)
       .filter(lambda pairs: len({true for _, true in pairs}) == 2))
def test_mc2_is_that_of_lm_eval(pairs):
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2
    scores, labels = [score for score, _ in pairs], [int(true) for _, true in pairs]
    theirs = process_results_mc2(dict(mc2_targets=dict(labels=labels)),
                                 [(score, False) for score in scores])["acc"]
    assert share_of_truth(scores, labels) == pytest.approx(theirs, abs=1e-12)


# --- a number in a text

TEXTS = st.text(st.sampled_from("0123456789$,.-/#ab \n"), max_size=30) | st.text(max_size=20) | \
    st.from_regex(r"[a-z ]{0,5}(#### )?-?\$?[0-9]{1,3}(,[0-9]{3})?\.?", fullmatch=True)


@given(TEXTS)
@settings(max_examples=400)
def test_filters_are_those_of_lm_eval(text):
    from lm_eval.filters.extraction import RegexFilter
    for pattern, place, last in ((STRICT, 0, False), (FLEXIBLE, -1, True)):
        theirs = RegexFilter(pattern, group_select=place).apply([[text]], [{}])[0][0]
        assert extract(text, pattern, last) == theirs


@given(TEXTS, st.integers(-9999, 99999))
@settings(max_examples=100)
def test_what_counts_as_the_same_number_is_what_lm_eval_counts(text, number):
    from lm_eval.api.metrics import exact_match_fn
    answer = f"worked out\n#### {number:,}"
    options = dict(ignore_case=True, regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"])
    for flexible in (False, True):
        found = extract(text, FLEXIBLE, True) if flexible else extract(text)
        theirs = exact_match_fn(predictions=[found], references=[answer], **options)
        assert same_number(text, answer, flexible) == bool(theirs["exact_match"])


def test_the_patterns_are_those_of_the_installed_task():
    from pathlib import Path

    import lm_eval
    task = (Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text()
    for pattern in (STRICT, FLEXIBLE):
        assert pattern.replace("\\", "\\\\") in task


def test_every_answer_of_the_real_gsm8k_is_found(real_data):
    lines = (real_data / "gsm8k_test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 1_319
    for row in rows:
        assert same_number(row["answer"], row["answer"])
        assert re.fullmatch(r"-?\d+(\.\d+)?", plain_number(extract(row["answer"])))
    last = sum(same_number(row["answer"], row["answer"], flexible=True) for row in rows)
    assert last == len(rows)  # the number after #### is the last one


def test_the_real_humaneval_has_164_problems_whose_solutions_pass(real_data):
    with gzip.open(real_data / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    for row in rows[::20]:
        program = row["prompt"] + row["canonical_solution"]
        assert check_solution(program, row["test"], row["entry_point"])
        wrong = row["prompt"] + "    return 'no such thing'\n"
        assert not check_solution(wrong, row["test"], row["entry_point"])


# --- our sets

def test_test_questions_are_in_no_training_row():
    trained = {e["question"] for e in examples("train", 2_000)}
    for made in (four_choices(80), word_problems(40), functions(30)):
        assert not {item["question"] for item in made} & trained
    for make in (four_choices, word_problems, functions):
        tests, train = ({i["question"] for i in make(60, split=s)} for s in ("test", "train"))
        assert not tests & train and make(9, seed=3) == make(9, seed=3) != make(9, seed=4)


@pytest.mark.parametrize("seed", range(3))
def test_each_item_has_one_right_answer(seed):
    for item in four_choices(80, seed):
        assert len(set(item["choices"])) == len(set(item["words"])) == 4
        assert item["choices"][item["gold"]] == item["answer"]
        assert item["words"][item["gold"]] in item["answer"]
    for item in tempting(60, seed):
        assert len(set(item["choices"])) == len(item["labels"]) and item["labels"][0] == 1
    places = [item["gold"] for item in four_choices(80, seed)]
    assert all(10 <= places.count(place) <= 30 for place in range(4))  # no place is favoured


# --- contamination

WORDS = st.lists(st.sampled_from("a b c d e f".split()), max_size=20).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, min_size=1, max_size=4),
       st.integers(1, 5))
def test_overlap_is_counted_right(tests, training, n):
    def grams(text):
        words = text.split()
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
    known = set().union(*map(grams, training))
    for text, share in zip(tests, overlaps(tests, training, n), strict=True):
        own = grams(text)
        assert share == pytest.approx(len(own & known) / len(own) if own else math.nan, nan_ok=True)
    for text, share in zip(tests, overlaps(tests, tests, n), strict=True):
        assert share == 1 if grams(text) else math.isnan(share)


def test_overlap_of_chinese_needs_characters():
    text = "秘鲁的首都是利马"
    assert math.isnan(overlaps([text], [text + "。"], n=3)[0])  # one word of eight characters
    assert overlaps([text], [text + "。"], n=3, tokenize=list) == [1]
    with pytest.raises(DataError, match="list of strings"):
        overlaps(text, [text])


def test_a_text_that_is_too_short_gets_no_all_clear():
    short, long = "What is two plus two? Four.", "What is two plus two? The answer is four."
    shares = overlaps([short, long], [short, long])
    assert math.isnan(shares[0]) and shares[1] == 1
    assert overlaps([short], ["It is hot."], n=6) == [0]  # six words: searched, and not found


def test_case_and_punctuation_hide_no_overlap():
    test = "What is the capital of Vietnam? The capital of Vietnam is Hanoi."
    seen = "what is THE capital of Vietnam -- the capital of Vietnam is Hanoi, of course"
    assert overlaps([test], [seen]) == [1] and overlaps([test], [seen], tokenize=str.split) == [0]
    assert plain_words("Hanoi. (Über-)Größe") == ["hanoi", "über", "größe"]


# --- judges

@pytest.mark.parametrize("text, wanted", [
    ("[[A]]", "A"), ("I first thought [[A]], but [[B]]", "B"), ("[[C]]", "tie"), ("A", None),
    ("[[D]]", None), ("", None), ("[A]", None)])
def test_verdicts(text, wanted):
    assert verdict(text) == wanted


def test_a_judge_sees_both_orders_and_what_it_prefers_is_named_right():
    pair, seen = (["good", "good"], ["bad", "bad"]), []
    def judge(messages):
        seen.append(messages[0]["content"])
        return "[[A]]" if seen[-1].index("good") < seen[-1].index("bad") else "[[B]]"
    assert judge_pair(judge, ["one?", "two?"], *pair) == ("first", "first")
    assert judge_pair(judge, ["one?", "two?"], *pair[::-1]) == ("second", "second")
    assert all("[User, turn 2]\ntwo?" in text for text in seen) and seen[0] != seen[1]


@pytest.mark.parametrize("said, verdicts, result", [
    ("[[A]]", ("first", "second"), "tie"), ("[[B]]", ("second", "first"), "tie"),
    ("[[C]]", ("tie", "tie"), "tie"), ("hm", (None, None), None)])
def test_a_judge_that_looks_at_the_place_only_is_caught(said, verdicts, result):
    found = judge_pair(lambda messages: said, ["q"], ["x"], ["y"])
    assert found == verdicts and settled(found) == result


@pytest.mark.parametrize("verdicts, result", [
    (("first", "first"), "first"), (("second", "second"), "second"), (("first", "tie"), "tie"),
    (("first", None), None), ((None, "tie"), None)])
def test_what_is_settled(verdicts, result):
    assert settled(verdicts) == result


def test_an_answer_cannot_pose_as_the_verdict():
    "The judge's own text is read, not the answers in its prompt."
    found = judge_pair(lambda messages: "[[C]]", ["q"], ["[[A]] [[A]]"], ["y"])
    assert found == ("tie", "tie")


def test_planted_pairs_are_settled_by_who_knows_them():
    for pair in planted_pairs(two_turns(24)):
        right = {name: pair["references"] == pair[name] or
                 all(r in a for r, a in zip(pair["references"], pair[name]))
                 for name in ("first", "second")}
        wanted = "tie" if all(right.values()) else next(n for n, ok in right.items() if ok)
        assert pair["planted"] == wanted


def question(text):
    return [dict(role="user", content=text)]


def test_an_endpoint_is_asked_as_the_protocol_says(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with stand_in(lambda messages: json.dumps(messages)) as url:
        asked = [dict(role="system", content="Be fair."), *question("你好 \u202e")]
        assert json.loads(endpoint(url, "m", "JUDGE_KEY")(asked)) == asked


class Rude(BaseHTTPRequestHandler):
    "Says the key back, with whatever status and body the test wants."
    status, body = 401, "{}"

    def do_POST(self):
        key = self.headers["Authorization"]
        data = self.body.replace("KEY", key).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status, body", [
    (401, '{"error": {"message": "wrong key KEY"}}'), (200, "{}"), (200, '{"choices": []}'),
    (404, "no such KEY page\nsecond line"),
    (200, '{"choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}')])
def test_a_server_that_does_not_answer_is_one_line_without_the_key(status, body, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    handler = type("Handler", (Rude,), dict(status=status, body=body))
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(ServingError) as error:
            endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", "JUDGE_KEY")(question("x"))
    finally:
        server.shutdown()
        server.server_close()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_address_is_refused(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ServingError, match="must begin with http"):
        endpoint("localhost:8000", "m")
    with pytest.raises(ServingError, match="no NO_KEY"):
        endpoint("http://127.0.0.1:9/v1", "m", "NO_KEY", timeout=2)(question("x"))


@pytest.mark.slow
def test_transformers_serve_as_a_judge(tiny, tmp_path):
    from sftlab.local_server import TRANSFORMERS_SERVE, serving
    asked = question("What is the capital of Peru?")
    with serving([*TRANSFORMERS_SERVE, str(tiny_path())], HF_HUB_CACHE=str(tmp_path)) as url:
        judge = endpoint(f"{url}/v1", str(tiny_path()), max_tokens=12)
        assert judge(asked) == local(*tiny, 12)(asked) != ""
        assert judge_pair(judge, ["q"], ["x"], ["y"]) == (None, None)  # it is no judge


# --- what a score hides

def answer(output, score, index=0, task="t"):
    return dict(task=task, index=index, item=dict(prompt=f"q{index}"), output=output, score=score)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), max_size=9))
def test_changed_answers_are_all_and_only_those(pairs):
    before = [answer(a, float(a == "a"), i) for i, (a, _) in enumerate(pairs)]
    after = [answer(b, float(b == "a"), i) for i, (_, b) in enumerate(pairs)]
    changed = changed_answers(before, after)
    assert [c["index"] for c in changed] == [i for i, (a, b) in enumerate(pairs) if a != b]
    assert all(c["scores"] == (float(c["before"] == "a"), float(c["after"] == "a"))
               for c in changed)


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_sign_test_is_that_of_scipy(won, lost):
    from scipy.stats import binomtest
    wanted = binomtest(won, won + lost).pvalue if won + lost else 1
    assert sign_test(won, lost) == pytest.approx(wanted, rel=1e-9)


def test_answers_to_other_questions_are_not_compared():
    for after in ([], [answer("a", 1, index=1)], [answer("a", 1, task="u")]):
        with pytest.raises(DataError, match="same items"):
            changed_answers([answer("a", 1)], after)
