"Data quality: scores against the libraries, scans against odd texts, and rows that nobody obeys."
import json
import random
import re
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import precision_score, recall_score

from sftlab import cli
from sftlab.audit.quality import audit_page, origins, row_signals, seen_text
from sftlab.data import flawed, from_prompt
from sftlab.errors import DataError
from sftlab.masking import encode_rows
from sftlab.models import load
from sftlab.quality import (
    contradiction, han_share, luhn, odd_lengths, out_of_fold, personal_data, precision_recall,
    surprise, unwrap, without_personal_data, worklist)
from sftlab.tiny.faults import FAULTS, plant
from sftlab.tiny.habits import apart, together, varied, words_of
from sftlab.tiny.world import as_messages, examples


def test_every_frame_comes_off_and_nothing_else():
    drawn = examples("train", 300)
    framed = [row["messages"][1]["content"] for row in flawed(drawn, "form")]
    right = [e["answer"] for e in drawn]
    assert framed != right and list(map(unwrap, framed)) == right
    assert list(map(unwrap, right)) == right


# --- scores

def test_surprise_is_the_loss_of_transformers():
    model, tokenizer = load("tiny")
    tokenizer.eos_token = "<|im_end|>"
    rows = encode_rows(tokenizer, [as_messages(e) for e in examples("test", 19)])
    with torch.no_grad():
        theirs = [model(input_ids=torch.tensor([r["input_ids"]]),
                        labels=torch.tensor([r["labels"]])).loss.item() for r in rows]
    assert surprise(model, rows, batch_size=4) == pytest.approx(theirs, rel=1e-4)


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=40))
def test_precision_and_recall_are_those_of_scikit_learn(rows):
    scores, bad = map(list, zip(*rows))
    for level in {*scores} if any(bad) else ():
        flagged = [score >= level for score in scores]
        ours = precision_recall(scores, bad, sum(flagged))
        assert ours == pytest.approx((precision_score(bad, flagged), recall_score(bad, flagged)))


def test_precision_and_recall_refuse_what_cannot_be():
    for scores, bad, k in (([1.0], [True, False], 1), ([1.0], [False], 1), ([1.0], [True], 2)):
        with pytest.raises(DataError):
            precision_recall(scores, bad, k)


@given(st.integers(2, 41), st.integers(0, 5))
def test_nobody_judges_a_row_that_it_has_seen(n, seed):
    rows, judged = list(range(n)), []
    def judge(seen, mine):
        assert not set(seen) & set(mine) and set(seen) | set(mine) == set(rows)
        judged.extend(mine)
        return [10 * i for i in mine]
    assert out_of_fold(rows, list, judge, seed) == [10 * i for i in rows]
    assert sorted(judged) == rows


def test_contradiction():
    for answer, votes, value in (("a", "aa", -1), ("a", "bb", 1), ("a", "bc", 0.5), ("a", "ab", 0)):
        assert contradiction(answer, list(votes)) == value


def test_lengths_and_scripts():
    assert odd_lengths(["four"] * 9 + ["x" * 400])[-1] > 3 > max(odd_lengths(["four"] * 9))
    assert han_share("首都 ab") == 0.5 and han_share("") == han_share("12!") == 0


# --- the list of work

def test_the_rarest_comes_first_and_equals_wait():
    common = [1.0] * 50 + [0.0] * 50
    rare = [0.0] * 99 + [1.0]
    found = worklist(dict(common=common, rare=rare), n=10)
    assert found[0] == (99, ["rare"]) and len(found) == 10
    assert worklist(dict(a=[1.0] * 5 + [0.0], b=[0.0] * 4 + [1.0, 1.0]), n=5, alike=1)[:3] == [
        (4, ["a", "b"]), (5, ["b"]), (0, ["a"])]
    assert worklist(dict(a=[0.0, 0.0])) == [] == worklist({})
    for broken in (dict(a=[1.0], b=[1.0, 2.0]), dict(a=[float("nan")])):
        with pytest.raises(DataError):
            worklist(broken)


def test_faults_are_planted_where_it_is_said():
    good = examples("train", 200, 3)
    planted = plant(good, 7, 3)
    assert [sum(e["fault"] == fault for e in planted) for fault in FAULTS] == [7] * 5
    for before, now in zip(good, planted):
        same = (before["question"], before["answer"]) == (now["question"], now["answer"])
        assert same == (now["fault"] is None)


# --- personal data

@pytest.mark.parametrize("text, kinds", [
    ("Write to anna.b@mail.example.org.", ["e-mail"]), ("邮箱li@mail.cn。", ["e-mail"]),
    ("+49 30 1234567", ["telephone"]), ("电话１３８１２３４５６７８", ["telephone"]),
    ("138 1234 5678, (555) 123-4567", ["telephone", "telephone"]),
    ("4111-1111-1111-1111", ["card"]), ("4111 1111 1111 1112", []), ("6222021234567890", []),
    ("12, 53, 54, 79, 98", []), ("2024-01-02 12:30", []), ("3.14159265358979", []),
    ("a@b", []), ("", []), ("+8613812345678", ["telephone"])])
def test_what_looks_personal(text, kinds):
    assert [kind for kind, *_ in personal_data(text)] == kinds
    assert not personal_data(without_personal_data(text))


@given(st.text(alphabet="0123456789+-() @.ab一", max_size=60))
def test_what_is_found_is_in_its_place_and_goes(text):
    found = personal_data(text)
    ends = [0, *(end for _, _, end in found)]
    assert all(end <= start for end, (_, start, _) in zip(ends, found))
    hidden = without_personal_data(text)
    assert all(hidden.count(f"[{kind}]") for kind, *_ in found)


@pytest.mark.parametrize("text", [
    "a" * 50_000, "1 " * 50_000, "a@" * 50_000, "+1 " * 50_000, "a.b@c." * 20_000, "(" * 50_000],
    ids=lambda text: text[:6])
def test_a_scan_of_anything_comes_to_an_end(text):
    start = time.process_time()
    personal_data(text)
    assert time.process_time() - start < 5


@given(st.text(alphabet="0123456789", min_size=1, max_size=19), st.integers(1, 9))
def test_luhn_notices_every_single_slip(number, by):
    last = next(d for d in "0123456789" if luhn(number + d))
    place = random.Random(number).randrange(len(number))
    slip = number[:place] + str((int(number[place]) + by) % 10) + number[place + 1:]
    assert not luhn(slip + last)


# --- Chinese

@given(st.text(alphabet="我们昨天在公园里看见了蝴蝶是的ab 。", max_size=40))
def test_cutting_loses_nothing(text):
    joined = together(text)
    for cut in (words_of, list):
        assert together(apart(joined, cut)) == joined
    assert "".join(words_of("我们昨天在公园里")) == "我们昨天在公园里"


@given(st.sampled_from(["swap", "insert", "drop"]), st.integers(0, 9), st.text(max_size=20))
def test_variations_of_anything(trick, seed, text):
    assert isinstance(varied(text, trick, random.Random(seed)), str)


# --- sftlab data audit: a row's text is text

NASTY = ["</pre><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "{title} {0} %s",
         "&lt;b&gt;", "\u202egnirts", "\u200b\ufeff", "]]>--><!--", "'\"`", "javascript:alert(1)"]


def rows_of(*pairs):
    return [dict(messages=from_prompt(dict(prompt=q, completion=a))) for q, a in pairs]


@pytest.mark.parametrize("text", [*NASTY, "\x1b[2J\x1b]0;title\x07", "\x9b31m", "\ud800"])
def test_a_page_obeys_no_row(text):
    rows = rows_of(*[("Where?", "Here.")] * 6, (text, f"answer {text} li@mail.cn"))
    signals = row_signals(rows)
    page = audit_page(text, rows, signals, worklist(signals))
    page.encode()
    assert "<script" not in page and page.count("<img") == 1 and "onerror=alert(1)>" not in page
    assert "li@mail.cn" not in page and "[e-mail]" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\ufeff\ud800]", page)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_seen_text_holds_nothing_unseen(text):
    shown = seen_text(text, 50)
    assert shown.isprintable() or not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def audit(capsys, file, *options):
    status = cli.main(["data", "audit", str(file), *map(str, options)])
    return status, *capsys.readouterr()


def test_audit(capsys, tmp_path):
    pairs = [(f"Where is number {i * i}?", f"It is over there, near {i}.") for i in range(30)]
    pairs += [("Where is number 4?!", "It is over there, near 2."), ("你好吗？", "I am fine."),
              ("Call?", "Call 138 1234 5678 or li@mail.cn"), *[(text, "ok") for text in NASTY[:5]]]
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    lines = [dict(prompt=q, completion=a, licence="CC0\x1b") for q, a in pairs]
    file.write_text("\n".join(json.dumps(line | dict(licence="CC0")) for line in lines))
    status, out, err = audit(capsys, file, "--output", page)
    assert (status, err) == (0, "") and out.startswith(f"rows     {len(pairs)}\n")
    assert "personal data: 1 rows" in out and "licence: CC0" in out and "saved" in out
    assert "mail.cn" not in out and "[telephone]" in out and "row 33: personal data" in out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    html = page.read_text("utf-8")
    assert "data:image/png" in html and "<script" not in html and "mail.cn" not in html
    before = page.read_bytes()
    status, out, err = audit(capsys, file, "--output", page)
    assert status == 1 and err.startswith("sftlab: ") and page.read_bytes() == before


def test_origins():
    rows = [dict(messages=[], licence="MIT"), dict(messages=[], licence="MIT"),
            dict(messages=[], source="web")]
    assert origins(rows) == {"licence: MIT": 2, "source: web": 1}
