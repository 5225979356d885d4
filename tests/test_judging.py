"Judgements: equal to the libraries, kept whatever happens, and shown as text."
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import assume, given, settings, strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from sftlab.errors import DataError, OutputError
from sftlab.files.judgements import Judgements, read_judgements
from sftlab.generation import wilson_interval
from sftlab.guards.judging import check_rankable
from sftlab.judging import (
    SimulatedRater, bradley_terry, causes, cohen_kappa, doublings, equal, fleiss_kappa,
    judgements_needed, make_pairs, mean_score, queue, resampled, sides, win_rate, wins_table)
from sftlab.judging_form import RatingForm, answer_html, shown


def judgement(item, winner, rater="me", left="a", right="b"):
    names = ", ".join(sorted((left, right)))
    return dict(pair=f"{item}: {names}", item=item, left=left, right=right, winner=winner,
                rater=rater)


def judgements_of(rows):
    "Rows of (item, winner, rater, is a on the left?)."
    found = {}
    for item, winner, rater, first in rows:
        left, right = ("a", "b") if first else ("b", "a")
        found[item, rater] = judgement(item, winner, rater, left, right)
    return list(found.values())


winners = st.sampled_from(["a", "b", "tie"])
several = st.lists(st.tuples(st.integers(0, 9), winners, st.sampled_from("xyz"), st.booleans()),
                   min_size=1).map(judgements_of)


# --- pairs and sides

def test_every_two_models_on_every_prompt():
    pairs = make_pairs(["p", "q"], {"c": ["1", "2"], "a": ["3", "4"], "b": ["5", "6"]})
    names = [pair["pair"].split(" #")[0] for pair in pairs]
    assert names == ["0: a, b", "0: a, c", "0: b, c", "1: a, b", "1: a, c", "1: b, c"]
    assert (pairs[4]["item"], pairs[4]["prompt"]) == (1, "q")
    assert pairs[4]["answers"] == {"a": "4", "c": "2"}


def test_other_answers_of_the_same_models_are_other_pairs():
    made = [make_pairs(["p"], {"a": ["1"], "b": [text]})[0] for text in ("2", "3", "2")]
    assert made[0] == made[2] and made[0]["pair"] != made[1]["pair"]
    assert sides(made[0], "Ada") == sides(made[1], "Ada")


def test_a_coin_that_is_the_same_on_every_machine():
    pairs = make_pairs(["?"] * 8, {"a": ["1"] * 8, "b": ["2"] * 8})
    found = {key: "".join(sides(pair, *key)[0] for pair in pairs)
             for key in (("Ada", 0), ("Ada", 1), ("Ben", 0))}
    assert found == {("Ada", 0): "abbaaabb", ("Ada", 1): "bbaabaaa", ("Ben", 0): "babbbbab"}
    assert all(sorted(sides(pair, "Ada")) == ["a", "b"] for pair in pairs)


def test_each_rater_has_an_order_of_all_pairs():
    pairs = make_pairs(["?"] * 30, {"a": ["1"] * 30, "b": ["2"] * 30})
    one, two = queue(pairs, "Ada"), queue(pairs, "Ben")
    assert one == queue(pairs[::-1], "Ada") and one != two and one != pairs
    assert [pair for pair in one if pair["item"] < 20] == queue(pairs[:20], "Ada")
    first = [sides(pair, "Ada")[0] for pair in one] # the order says nothing about the sides
    assert 3 < first[:15].count("a") < 12
    assert sorted(p["item"] for p in one) == sorted(p["item"] for p in two) == list(range(30))


def test_what_a_simulated_rater_likes():
    pairs = make_pairs(["?"] * 600, {"a": ["x" * 30] * 600, "b": ["y"] * 600})
    equal, better = {"a": False, "b": False}, {"a": False, "b": True}

    def share(right, order=None, **likes):
        rater = SimulatedRater("Ada", **likes)
        return win_rate([rater.judge(pair, right, order) for pair in pairs], "a", "b")
    assert share(equal).low < 0.5 < share(equal).high
    assert share(better).high < 0.3 and share(equal, length=1).low > 0.8
    assert share(equal, ("a", "b"), left=2).low > 0.7 > 0.3 > share(equal, ("b", "a"), left=2).high
    same = make_pairs(["?"], {"a": ["x"], "b": ["x"]})
    assert SimulatedRater("Ada", left=9).judge(same[0], equal)["winner"] == "tie"


# --- win rate

@given(several)
def test_what_one_wins_the_other_loses(judgements):
    one, two = win_rate(judgements, "a", "b"), win_rate(judgements, "b", "a")
    assert one.share == pytest.approx(1 - two.share)
    assert (one.low, one.high) == pytest.approx((1 - two.high, 1 - two.low))
    assert -1e-9 <= one.low <= one.share + 1e-9 and one.share <= one.high + 1e-9 <= 1 + 2e-9
    assert one.items == len({j["item"] for j in judgements}) and one.judgements == len(judgements)


@given(st.integers(0, 40), st.integers(0, 40))
def test_without_ties_it_is_wilsons_interval(wins, losses):
    "Of one coin less, where both came up: the variance divides by n - 1."
    assume(wins + losses)
    winners = ["a"] * wins + ["b"] * losses
    found = win_rate([judgement(i, w) for i, w in enumerate(winners)], "a", "b")
    n, share = len(winners), wins / len(winners)
    coins = n - 1 if wins and losses else n
    expected = (share, *wilson_interval(share * coins, coins))
    assert (found.share, found.low, found.high) == pytest.approx(expected)


def test_few_prompts_are_said():
    twenty = [judgement(i, "a" if i % 2 else "b") for i in range(20)]
    assert "few" not in str(win_rate(twenty, "a", "b"))
    many_raters = [dict(j, rater=f"r{n}") for j in twenty[1:] for n in range(5)]
    assert "19 prompts: too few for an interval, 95 judgements" in str(
        win_rate(many_raters, "a", "b"))


@given(several, st.sets(st.integers(0, 30)))
def test_what_was_skipped_counts_nowhere(judgements, skipped):
    some = [j | dict(winner="skip") if i in skipped else j for i, j in enumerate(judgements)]
    rest = [j for j in some if j["winner"] != "skip"]
    if rest:
        assert win_rate(some, "a", "b") == win_rate(rest, "a", "b")
        assert wins_table(some)[1].tolist() == wins_table(rest)[1].tolist()
    else:
        with pytest.raises(DataError, match="none at all"):
            win_rate(some, "a", "b")


def test_bootstrap_of_a_mean():
    scores = np.random.default_rng(0).random(200).tolist()
    found = resampled(scores, fmean, draws=2000)
    assert found.shape == (2000,) and (found == resampled(scores, fmean, draws=2000)).all()
    assert found.mean() == pytest.approx(fmean(scores), abs=0.003)
    assert found.std() == pytest.approx(np.std(scores) / 200**0.5, rel=0.06)


def test_ten_raters_of_one_opinion_are_one():
    once = [judgement(i, "a" if i % 3 else "b") for i in range(30)]
    often = [dict(j, rater=f"r{n}") for j in once for n in range(10)]
    one, ten = win_rate(once, "a", "b"), win_rate(often, "a", "b")
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high))


def test_other_pairs_do_not_count_and_ties_narrow():
    some = [judgement(0, "a"), judgement(1, "c", left="c"), judgement(1, "tie")]
    assert win_rate(some, "a", "b").share == 0.75
    assert mean_score([0.5] * 5) == pytest.approx((0.5, *wilson_interval(2.5, 5)))
    tied, coins = mean_score([0, 1] + [0.5] * 8), mean_score([0, 1] * 5)
    assert tied[2] - tied[1] < (coins[2] - coins[1]) / 1.5
    with pytest.raises(DataError, match="no judgement compares"):
        win_rate(some, "a", "d")


# --- causes

def study(n=150, raters=2, seed=0, **likes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, (2, n))
    answers = {m: ["x" * k for k in row] for m, row in zip("ab", lengths.tolist())}
    pairs = make_pairs(["?"] * n, answers)
    right = {m: rng.random(n) < 0.5 for m in "ab"}
    likes = dict(left=0.5, length=0.7, tie=0.6) | likes
    group = [SimulatedRater(f"r{i}", **likes) for i in range(raters)]
    return answers, [r.judge(p, {m: right[m][p["item"]] for m in "ab"})
                     for p in pairs for r in group]


def test_causes_equal_a_logistic_regression_with_errors_by_prompt():
    answers, judgements = study()
    rows = [[1 if j["left"] == "a" else -1, 1,
             doublings(answers[j["left"]][j["item"]], answers[j["right"]][j["item"]])]
            for j in judgements]
    won = [{j["left"]: 1, j["right"]: 0}.get(j["winner"], 0.5) for j in judgements]
    groups = [j["item"] for j in judgements]
    fit = sm.GLM(won, np.array(rows), family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds=dict(groups=groups, use_correction=False))
    found = causes(judgements, "a", answers)
    assert [e[0] for e in found.values()] == pytest.approx(fit.params.tolist(), abs=1e-6)
    errors = [(high - low) / 2 / 1.96 for _, low, high in found.values()] # from 400 draws
    assert errors == pytest.approx(fit.bse.tolist(), rel=0.15)
    echoed = causes([dict(j, rater=f"{j['rater']} {n}") for j in judgements for n in range(3)],
                    "a", answers)
    for cause, effect in found.items(): # raters who repeat others tell nothing new
        assert echoed[cause] == pytest.approx(effect)
    skipped = dict(judgements[0], winner="skip", left="c", right="d")
    assert causes([*judgements, skipped], "a", answers) == found
    other = causes(judgements, "b", answers)
    assert other["model"][0] == pytest.approx(-found["model"][0])
    assert other["left side"] == pytest.approx(found["left side"])


def test_what_was_built_in_is_found_where_nothing_hides_it():
    answers, judgements = study(1500, care=0, tie=0)
    effects = causes(judgements, "a", answers)
    for cause, built_in in {"left side": 0.5, "twice as long": 0.7, "model": 0}.items():
        effect, low, high = effects[cause]
        assert low < built_in < high and high - low < 0.25, cause


def test_a_model_that_is_always_longer_cannot_be_told_from_its_length():
    answers = {"a": ["x" * 3] * 40, "b": ["x"] * 40} # (3 + 1) / (1 + 1) everywhere
    judgements = [judgement(i, "ab"[i % 3 == 0], left="ab"[i % 2], right="ba"[i % 2])
                  for i in range(40)]
    with pytest.raises(DataError, match="cannot be told apart"):
        causes(judgements, "a", answers)
    answers, judgements = study(n=30)
    with pytest.raises(DataError, match="decides every judgement"):
        causes([j | dict(winner="a") for j in judgements], "a", answers)


# --- agreement

labels = st.sampled_from(["a", "b", "tie"])


@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=30))
def test_cohens_kappa_is_scikit_learns(rows):
    first, second = map(list, zip(*rows))
    if len({*first, *second}) == 1:
        with pytest.raises(DataError, match="every label is"):
            cohen_kappa(first, second)
    else:
        assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(labels, min_size=n, max_size=n),
                                                    min_size=1, max_size=20)))
def test_fleiss_kappa_is_statsmodels(rows):
    if len({label for row in rows for label in row}) == 1:
        with pytest.raises(DataError, match="every label is"):
            fleiss_kappa(rows)
    else:
        table, _ = inter_rater.aggregate_raters(np.array(rows))
        assert fleiss_kappa(rows) == pytest.approx(inter_rater.fleiss_kappa(table))


# --- how many

@pytest.mark.parametrize("share", [0.53, 0.55, 0.6, 0.65, 0.7])
@pytest.mark.parametrize("power", [0.7, 0.8, 0.9])
def test_as_many_judgements_as_show_it(share, power):
    "The exact chance that Wilson's interval lies above one half; 10 % fewer judgements show less."
    def seen(n):
        least = next(w for w in range(n // 2, n + 1) if wilson_interval(w, n)[0] > 0.5)
        return binom.sf(least - 1, n, share)
    n = judgements_needed(share, power)
    around = [seen(m) for m in range(n - 4, n + 5)] # it goes up and down with n
    assert fmean(around) == pytest.approx(power, abs=0.025)
    assert fmean(seen(m) for m in range(int(0.8 * n) - 4, int(0.8 * n) + 5)) < power - 0.03


def test_ties_come_on_top():
    assert judgements_needed(0.6) == 194 and judgements_needed(0.6, ties=0.5) in (387, 388)
    assert judgements_needed(0.7, ties=0.5) == 94
    for ties in (1, -0.1, "half", None, True):
        with pytest.raises(DataError, match="ties is"):
            judgements_needed(0.6, ties=ties)
    with pytest.raises(DataError, match="won is 0.5"):
        judgements_needed(0.5)


# --- ranking

def played(wins):
    "Judgements in which the row's model beat the column's so often."
    games, k = [], len(wins)
    for i in range(k):
        for j in range(k):
            for _ in range(int(wins[i][j])):
                games.append(judgement(len(games), f"m{i}", left=f"m{i}", right=f"m{j}"))
    return games


def strengths_by_sklearn(wins):
    k = len(wins)
    games = [(i, j) for i in range(k) for j in range(k) if i != j and wins[i][j]]
    x = np.array([np.eye(k)[i] - np.eye(k)[j] for i, j in games])
    weights = [float(wins[i][j]) for i, j in games]
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(np.concatenate([x, -x]), [1] * len(x) + [0] * len(x), weights * 2)
    return fit.coef_[0] - fit.coef_[0].mean()


tables = st.integers(2, 5).flatmap(lambda k: st.lists(
    st.lists(st.integers(0, 6), min_size=k, max_size=k), min_size=k, max_size=k))


@settings(max_examples=60)
@given(tables)
def test_bradley_terry_is_logistic_regression_or_refused(wins):
    wins = np.array(wins) * (1 - np.eye(len(wins), dtype=int))
    assume((wins + wins.T).sum(1).all())
    strong = connected_components(wins, connection="strong")[0] == 1
    if strong:
        found = bradley_terry(played(wins))
        assert list(found.values()) == pytest.approx(strengths_by_sklearn(wins), abs=1e-3)
        assert sum(found.values()) == pytest.approx(0, abs=1e-9)
    else:
        met = connected_components(wins + wins.T, connection="weak")[0] == 1
        said = "never lost to" if met else "never compared"
        with pytest.raises(DataError, match=said):
            bradley_terry(played(wins))
        if met:
            assert all(math.isfinite(s) for s in bradley_terry(played(wins), prior=1).values())
        else:
            with pytest.raises(DataError, match="never compared"):
                bradley_terry(played(wins), prior=1)


def test_who_never_lost_is_named():
    with pytest.raises(DataError, match="^x, y never lost to z"):
        check_rankable(["x", "y", "z"], [[0, 1, 1], [1, 0, 1], [0, 0, 0]])


def test_known_strengths_are_found():
    truth = np.array([-0.8, 0.0, 0.8])
    chance = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    wins = np.round(2000 * chance).astype(int) * (1 - np.eye(3, dtype=int))
    found = bradley_terry(played(wins))
    assert list(found.values()) == pytest.approx(truth.tolist(), abs=0.01)


def test_a_tie_is_half_a_win_for_each():
    models, wins = wins_table([judgement(0, "tie"), judgement(1, "b", left="b", right="a")])
    assert models == ["a", "b"] and wins.tolist() == [[0, 0.5], [1.5, 0]]


# --- on disk

WRITER = """
import sys
from sftlab.files.judgements import Judgements
store, rater = Judgements(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    store.add(dict(pair=f"{i}: a, b", item=i, left="a", right="b", winner="tie", rater=rater))
    print(i, flush=True)
"""


def writer(path, rater, n):
    return subprocess.Popen([sys.executable, "-c", WRITER, path, rater, str(n)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_raters_at_the_same_time_in_two_processes(tmp_path):
    path = tmp_path / "j.db"
    both = [writer(path, name, 60) for name in ("Ada", "Ben")]
    for process in both:
        assert process.communicate(timeout=120)[1] == ""
    for name in ("Ada", "Ben"):
        assert [j["item"] for j in Judgements(path).all(name)] == list(range(60))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_killed_program_loses_nothing_that_it_said_was_saved(tmp_path):
    path = tmp_path / "j.db"
    process = writer(path, "Ada", 100_000)
    said = [int(process.stdout.readline()) for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.communicate()[0].split()]
    kept = [j["item"] for j in Judgements(path).all("Ada")]
    assert kept[:len(said)] == said and len(kept) - len(said) in (0, 1)
    Judgements(path).add(judgement(-1, "a")) # and it can be written again


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=30)
@given(st.lists(st.tuples(text, text, st.dictionaries(text, st.integers(1, 5)), text), max_size=4))
def test_out_as_jsonl_and_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("out")
    store = Judgements(folder / "j.db")
    store.add(*(dict(judgement(i, "tie", rater), note=note, scores={"a": scores}, pair=f"{i}{pair}")
                for i, (rater, note, scores, pair) in enumerate(rows)))
    store.export(folder / "j.jsonl")
    assert read_judgements(folder / "j.jsonl") == store.all() and len(store.all()) == len(rows)
    other = Judgements(folder / "other.db")
    other.load(folder / "j.jsonl")
    assert other.all() == store.all()


def test_files_that_are_none_of_ours_stay_as_they_are(tmp_path):
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = foreign.read_bytes()
    with pytest.raises(DataError, match="foreign.db: is a database of another program"):
        Judgements(foreign).add(judgement(0, "a"))
    assert foreign.read_bytes() == before
    cut = tmp_path / "cut.db"
    Judgements(cut).add(judgement(0, "a"))
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(DataError, match="cut.db: cannot be read"):
        Judgements(cut).all()
    with pytest.raises(OutputError, match="cannot be made"):
        Judgements(cut / "below" / "j.db").add(judgement(0, "a"))
    with pytest.raises(DataError, match="cannot be read"):
        read_judgements(tmp_path / "nowhere.jsonl")


def test_a_folder_where_a_file_should_be_is_said(tmp_path):
    with pytest.raises(OutputError, match="nothing was saved"):
        Judgements(tmp_path).add(judgement(0, "a"))


# --- the form

class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[2J\x1b]0;title\x07",
           "**bold** [link](javascript:alert(1))", "</pre></div><b>", "&lt;b&gt;", "x" * 10_000,
           '" onclick="alert(1)', "\u202etxet", "$$\\href{javascript:alert(1)}{x}$$", "\r\0"]


@given(st.one_of(st.sampled_from(HOSTILE), st.text()), st.text())
def test_an_answer_is_text_whatever_it_says(answer, title):
    page = Tags(answer_html(title, answer))
    assert page.tags <= {"b", "div", "pre", "i"}
    if answer.strip():
        assert page.text == title + shown(answer) and "i" not in page.tags
    hidden = [c for c in shown(answer) if ord(c) < 32 and c not in "\t\n"]
    assert hidden == [] and "\u202e" not in shown(answer)


def test_what_is_shown_of_hidden_characters():
    assert shown("a\x1b[31m\u202eb\tc\n") == "a⟨U+001B⟩[31m⟨U+202E⟩b\tc\n"


@pytest.fixture
def form(tmp_path):
    pairs = make_pairs(["p", "q", "r"], {"a": ["1", "2", "3"], "b": ["4", "5", "6"]})
    form = RatingForm(pairs, tmp_path / "j.db", "me", "quality")
    form.since -= 1
    return form


@pytest.mark.parametrize("typed, saved", [("l", 1), ("R", 1), (" t", 1), ("s", 1), ("x", 0),
                                          ("lr", 0), ("left", 0), ("", 0)])
def test_one_key_is_one_judgement(form, typed, saved):
    form.key.value = typed
    assert len(form.store.all()) == saved and form.key.value == ""


def test_what_cannot_be_saved_is_said_and_the_pair_stays(form, monkeypatch):
    def full(*_):
        raise OutputError("<disk> is full")
    pair = form.pair
    form.note.value = "dear"
    with monkeypatch.context() as patch:
        patch.setattr(form.store, "add", full)
        form.choose("left")
    assert form.pair == pair and form.note.value == "dear"
    assert "Not saved" in form.message.value and "&lt;disk&gt; is full" in form.message.value
    form.choose("left")
    assert [j["note"] for j in form.store.all()] == ["dear"]


def test_two_windows_of_one_rater(form):
    other = RatingForm(form.pairs, form.store, "me", "quality")
    other.since -= 1
    assert other.pair == form.pair # the same order from other lists of the same pairs
    form.choose("left")
    other.choose("right")
    assert len(form.store.all()) == 1 and "judged already" in other.message.value
    assert other.pair == form.pair


def test_undo_leaves_the_judgements_of_another_study(form):
    form.store.add(judgement(7, "a"))
    form.undo()
    assert len(form.store.all()) == 1 and "nothing to undo" in form.message.value


@pytest.fixture
def mixed(tmp_path):
    "Half of forty pairs are equal answers."
    pairs = make_pairs(["p"] * 40, {"a": ["1"] * 40, "b": ["1", "2"] * 20})
    return RatingForm(pairs, tmp_path / "j.db", "me")


def choose(form, name="left"):
    form.since -= 1
    form.choose(name)


def test_equal_answers_are_ties_in_the_order_of_all(mixed):
    assert len(mixed.pairs) == 20 and all(not equal(pair) for pair in mixed.pairs)
    place = {pair["pair"]: i for i, pair in enumerate(mixed.queue)}
    for n in range(1, 21):
        choose(mixed)
        kept = mixed.store.all()
        assert sum(j["winner"] != "tie" for j in kept) == n and kept[-1]["winner"] != "tie"
        until = place[mixed.pair["pair"]] if mixed.pair else 40
        assert {j["pair"] for j in kept} == {p["pair"] for p in mixed.queue[:until]}
    assert len(kept) == 40 and all((j["winner"] == "tie") == (j["item"] % 2 == 0) for j in kept)
    assert win_rate(kept, "a", "b").items == 40


def test_undo_passes_over_equal_answers(mixed):
    seen = []
    for _ in range(5):
        seen.append(mixed.pair["pair"])
        choose(mixed, "right")
    for pair in reversed(seen):
        mixed.undo()
        assert mixed.pair["pair"] == pair
    mixed.undo()
    assert mixed.store.all() == [] and "nothing to undo" in mixed.message.value
    for _ in range(20):
        choose(mixed, "skip")
    assert len(mixed.store.all()) == 40 and mixed.pair is None
    assert sum(j["winner"] == "skip" for j in mixed.store.all()) == 20


def test_skipped_is_kept_in_the_file(mixed, tmp_path):
    choose(mixed, "skip")
    mixed.store.export(tmp_path / "j.jsonl")
    assert read_judgements(tmp_path / "j.jsonl")[-1]["winner"] == "skip"


def test_half_a_character_in_a_note_is_no_reason_to_lose_it(form):
    form.note.value = "odd \ud83d"
    form.choose("tie")
    assert [j["note"] for j in form.store.all()] == ["odd ?"]


def test_only_what_ipywidgets_7_has(form):
    names, todo = set(), [form.widget]
    while todo:
        widget = todo.pop()
        names.add(type(widget).__name__)
        todo += getattr(widget, "children", ())
    assert names == {"VBox", "HBox", "HTML", "IntProgress", "Dropdown", "Button", "Text"}


def test_seconds_are_kept(form):
    form.since = time.monotonic() - 12
    form.choose("tie")
    assert 12 <= form.store.all()[0]["seconds"] < 14
    json.dumps(form.store.all())


# --- the lesson's section `On a real model`, from the answers on

LESSON = Path(__file__).resolve().parent.parent/"nbs"/"17_human_evaluation.ipynb"


def real_parts():
    cells = ["".join(cell["source"]) for cell in json.loads(LESSON.read_text("utf-8"))["cells"]]
    [text] = [source for source in cells if "## On a real model" in source]
    code = re.search(r"(?s)```python\n(.*?)```", text.split("## On a real model")[1])[1]
    return re.split(r"(?m)^(?=# each rater|# when all are done)", code)


def test_a_real_study_from_the_form_to_the_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    texts = {model: ["x" * int(n) for n in rng.integers(9, 99, 200)]
             for model in ("before", "after")}
    texts["after"][:9] = texts["before"][:9]
    Path("study.json").write_text(json.dumps([[f"user: {i}" for i in range(200)], texts]))
    _, rate, analyse = real_parts()
    checks = make_pairs(["?"], {"good": ["yes"], "bad": ["no"]})
    store, expected = Judgements("judgements.db"), []
    for k in range(4):
        known = {}
        assert rate.count("k = 0 #") == 1
        mine = rate.replace("k = 0 #", f"k = {k} #")
        exec(mine.replace("RatingForm(pairs", "form = RatingForm(pairs"), known)
        form = known["form"]
        assert len(form.queue) == 65 and form.rater == f"rater {k}" and not form.criteria
        better = {"before": False, "after": True}
        done = [SimulatedRater(form.rater).judge(pair, better)
                | dict(note="equal answers" if equal(pair) else "") for pair in form.queue]
        store.add(*done, SimulatedRater(form.rater).judge(checks[0], {"good": True, "bad": False}))
        expected += done
    exec(analyse, {})
    rate_line, found, kappa = capsys.readouterr().out.strip().splitlines()
    assert rate_line == str(win_rate(expected, "after", "before"))
    assert "200 prompts, 260 judgements" in rate_line and "'model': (" in found
    rows = {}
    for j in expected:
        if j["item"] >= 9:
            rows.setdefault(j["item"], []).append(j["winner"])
    twice = [row for row in rows.values() if len(row) == 2]
    assert len(twice) == 51 and float(kappa) == pytest.approx(fleiss_kappa(twice))
