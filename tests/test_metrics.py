"Metrics: equal to sacrebleu, rouge-score and scipy on anything; figures that are right by chance."
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings, strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from sftlab.errors import DataError
from sftlab.generation import wilson_interval
from sftlab.masking import encode_rows
from sftlab.metrics import (
    MeasureCallback, bits_per_byte, bleu, bootstrap_interval, compare, each_epoch, exact_match,
    gap_interval, lcs, measured, normalize, pass_at_k, rouge_l, rouge_n, score_interval, words)
from sftlab.models import load
from sftlab.rendering import prompt_ids
from sftlab.tiny.world import as_messages, examples
from sftlab.training import Nll, TrainingConfig, evaluate_nll, padded, train

ENGLISH = "the a cat, dog's sat on mat. red-blue 3.5 it is not".split()
CHINESE = list("我你他是在的不了人有，。")
SETTINGS = settings(max_examples=100, deadline=None)


def texts(pool, glue):
    return st.lists(st.sampled_from(pool), min_size=0, max_size=12).map(glue.join)


english, chinese = texts(ENGLISH, " "), texts(CHINESE, "")


def several(text):
    "Lists of pairs of texts, at times nearly the same."
    pair = st.tuples(text, text) | text.map(lambda t: (t[:-3], t))
    return st.lists(pair, min_size=1, max_size=5)


# --- BLEU

CUT = Tokenizer13a()


@SETTINGS
@given(several(english))
def test_bleu_is_sacrebleus_in_english(pairs):
    outputs, references = map(list, zip(*pairs))
    theirs = BLEU(tokenize="13a").corpus_score(outputs, [references]).score
    ours = bleu(outputs, references, lambda text: CUT(text).split())
    assert ours == pytest.approx(theirs, abs=1e-9)


@SETTINGS
@given(several(chinese))
def test_bleu_is_sacrebleus_in_chinese(pairs):
    outputs, references = map(list, zip(*pairs))
    theirs = BLEU(tokenize="zh").corpus_score(outputs, [references]).score
    assert bleu(outputs, references, list) == pytest.approx(theirs, abs=1e-9)


def test_bleu_of_known_texts():
    same = ["a b c d e"]
    assert bleu(same, same) == pytest.approx(100)
    assert bleu(["a b c d"], same) == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert bleu(["x y"], same) == bleu([""], same) == bleu(["a b"], ["a b"]) == 0
    assert sacrebleu.corpus_bleu(["a b"], [["a b"]]).score == 0


# --- ROUGE

class Characters:
    def tokenize(self, text):
        return list(text)


KINDS = ["rouge1", "rouge2", "rougeL"]
SCORERS = {"en": (RougeScorer(KINDS), words),
           "zh": (RougeScorer(KINDS, tokenizer=Characters()), list)}


@SETTINGS
@given(several(english), several(chinese))
def test_rouge_is_rouge_scores(english, chinese):
    for pairs, (scorer, cut) in zip((english, chinese), SCORERS.values()):
        for output, reference in pairs:
            theirs = [s.fmeasure for s in scorer.score(reference, output).values()]
            ours = [rouge_n(output, reference, 1, cut), rouge_n(output, reference, 2, cut),
                    rouge_l(output, reference, cut)]
            assert ours == pytest.approx(theirs, abs=1e-12)


@given(st.text("ab", max_size=6), st.text("abc", max_size=6))
def test_the_longest_common_subsequence_is_the_longest(a, b):
    def parts(text):
        return {"".join(c for i, c in enumerate(text) if kept >> i & 1)
                for kept in range(2**len(text))}
    assert lcs(list(a), list(b)) == max(map(len, parts(a) & parts(b)))


# --- exact match

@given(st.text())
def test_normalizing_twice_changes_nothing(text):
    once = normalize(text)
    assert exact_match(text, text) == 1
    assert "\n" not in once and "  " not in once and not once.endswith((".", "。", "!"))


@pytest.mark.parametrize("output, answer, right", [
    ("Paris.", "paris", 1), ("Paris .", "Paris", 1), (" a\tb\n", "A b", 1), ("ＡＢ", "ab", 1),
    ("好！", "好", 1), ("-5", "5", 0), ("1.5", "15", 0), ("", "a", 0), ("a b", "ab", 0)])
def test_exact_match(output, answer, right):
    assert exact_match(output, answer) == right


# --- pass@k

@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_quotient_of_binomials(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_is_right_on_average():
    dice = random.Random(0)
    found = [pass_at_k(10, sum(dice.random() < 0.2 for _ in range(10)), 3) for _ in range(20_000)]
    assert np.mean(found) == pytest.approx(1 - 0.8**3, abs=0.01)


def test_pass_at_k_of_many_programs_overflows_nothing():
    assert pass_at_k(100_000, 50_000, 100) == 1 and 0 < pass_at_k(100_000, 1, 50_000) < 1


# --- intervals and tests

numbers = st.lists(st.floats(-5, 5), min_size=2, max_size=30)


@settings(max_examples=10, deadline=None)
@given(numbers)
def test_the_bootstrap_is_scipys(scores):
    if max(scores) - min(scores) > 1e-3: # else scipy returns NaN
        theirs = stats.bootstrap((scores,), np.mean, n_resamples=500, method="percentile",
                                 rng=np.random.default_rng(3)).confidence_interval
        assert bootstrap_interval(scores, 500, seed=3) == pytest.approx(tuple(theirs))


def test_right_and_wrong_get_wilsons_interval_all_else_a_bootstrap():
    assert score_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    assert score_interval([True, False]) == wilson_interval(1, 2)
    assert score_interval([1, 0.5, 0]) == bootstrap_interval([1, 0.5, 0])
    theirs = proportion_confint(3, 4, method="wilson")
    assert score_interval([1, 0, 1, 1]) == pytest.approx(theirs, abs=1e-4) # 1.96 for 1.95996


@pytest.mark.parametrize("only_a, only_b", [(2, 17), (5, 5), (0, 6), (1, 0), (30, 12)])
def test_on_right_and_wrong_the_paired_test_is_mcnemars(only_a, only_b):
    table = [[7, only_a], [only_b, 4]]
    a = [1] * (7 + only_a) + [0] * (only_b + 4)
    b = [1] * 7 + [0] * only_a + [1] * only_b + [0] * 4
    found, theirs = compare(a, b), mcnemar(table, exact=True).pvalue
    assert found.p == pytest.approx(theirs, abs=4 * math.sqrt(theirs / 10_000) + 2e-4)
    assert found.difference == pytest.approx((only_a - only_b) / len(a)) and found.n == len(a)


def test_the_paired_test_is_scipys_on_other_scores():
    dice = np.random.default_rng(1)
    a = dice.random(25)
    b = a + 0.1 * dice.standard_normal(25) - 0.05
    def gap(x, y, axis): return np.mean(x - y, axis=axis)
    theirs = stats.permutation_test((a, b), gap, permutation_type="samples", vectorized=True,
                                    n_resamples=10_000, rng=2).pvalue
    assert compare(a, b).p == pytest.approx(theirs, abs=0.01)


def test_models_that_are_equal_are_called_different_one_time_in_twenty():
    dice = np.random.default_rng(0)
    found = []
    for _ in range(200):
        a, b = dice.random((2, 40)) < 0.5
        found.append(compare(a, b, resamples=200).p < 0.05)
    assert 0.01 < np.mean(found) < 0.08


def test_the_same_answers_are_no_difference_and_no_proof():
    found = compare([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.p) == (0, 1)
    assert found.low == -found.high < -0.5


def gaps_of(only_a, only_b, n):
    return [1] * only_a + [-1] * only_b + [0] * (n - only_a - only_b)


def test_the_interval_of_right_and_wrong_is_that_of_bonett_and_price():
    # by ci.prop.ps(.05, 12, 4, 26, 6), https://rdrr.io/pkg/statpsych/man/ci.prop.ps.html
    assert gap_interval(gaps_of(26, 4, 48)) == pytest.approx((0.2548067, 0.6251933), abs=1e-5)


@pytest.mark.parametrize("only_a, only_b, n", [(0, 0, 1), (1, 0, 1), (0, 2, 2), (40, 0, 40)])
def test_the_interval_of_right_and_wrong_stays_possible(only_a, only_b, n):
    low, high = gap_interval(gaps_of(only_a, only_b, n))
    assert -1 <= low <= (only_a - only_b) / n <= high <= 1


@pytest.mark.parametrize("n", [30, 100, 570])
def test_the_interval_and_mcnemars_test_agree_but_near_five_percent(n):
    for only_a in range(1, 26):
        for only_b in range(min(only_a, n - only_a) + 1):
            p = stats.binomtest(only_a, only_a + only_b).pvalue
            if gap_interval(gaps_of(only_a, only_b, n))[0] > 0:
                assert p < 0.08
            else: # an exact test is the more careful of the two
                assert p >= 0.05


@pytest.mark.parametrize("only_a, only_b", [
    (4, 0), (5, 0), (6, 0), (7, 1), (8, 1), (9, 2), (10, 2), (11, 3), (12, 4), (16, 6), (18, 6)])
@pytest.mark.parametrize("scale", [1, 0.5]) # right and wrong; other scores
def test_zero_is_in_the_interval_of_a_comparison_that_finds_no_difference(only_a, only_b, scale):
    gaps = scale * np.array(gaps_of(only_a, only_b, 40))
    p = stats.binomtest(only_a, only_a + only_b).pvalue
    found, other = compare(gaps, 0 * gaps), compare(0 * gaps, gaps)
    assert (found.low <= 0, other.high >= 0) == (p >= 0.05, p >= 0.05)
    assert found.low <= found.difference <= found.high


@pytest.mark.parametrize("n, p_a, p_b", [
    (30, 0.02, 0.02), (30, 0.1, 0.02), (30, 0.3, 0), (30, 0.5, 0.3), (100, 0.01, 0.01),
    (100, 0.05, 0.01), (100, 0.1, 0.05), (100, 0.3, 0.1)])
def test_the_interval_of_right_and_wrong_covers_the_true_gap(n, p_a, p_b):
    chance = stats.multinomial(n, [p_a, p_b, 1 - p_a - p_b])
    held = total = 0
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            p = chance.pmf([only_a, only_b, n - only_a - only_b])
            if p > 1e-7:
                low, high = gap_interval(gaps_of(only_a, only_b, n))
                total += p
                held += p * (low <= p_a - p_b <= high)
    assert total > 0.999 and held > 0.94


def test_other_scores_keep_the_bootstrap():
    gaps = [0.5, -0.25, 1, 0]
    assert gap_interval(gaps, 500, seed=3) == bootstrap_interval(gaps, 500, seed=3)


@pytest.mark.parametrize("differ, n, said", [
    (0, 300, "none of 300 questions differs: no proof that the two are equal, since up to 1.0%"),
    (0, 2, "up to 100.0%"), (1, 300, "only 1 of 300 questions differ"),
    (4, 40, "may be too narrow, and p cannot be below 0.12"), (9, 40, "below 0.0039")])
def test_few_differing_questions_are_said(differ, n, said):
    found = compare([1] * n, [0] * differ + [1] * (n - differ))
    assert found.differ == differ and said in found.note
    if differ: # each of them has the same sign: p is as small as it can be
        assert found.p >= 0.8 * 2 / 2**differ


def test_ten_differing_questions_need_no_note():
    found = compare([1, 0] * 20, [0, 1] * 5 + [1, 0] * 15)
    assert (found.differ, found.note) == (10, "")


@pytest.mark.parametrize("n", [30, 300, 3000])
def test_equal_answers_leave_room_for_the_rule_of_three(n):
    said = float(compare([1] * n, [1] * n).note.split("up to ")[1].split("%")[0]) / 100
    bound = stats.binomtest(0, n, alternative="less").proportion_ci(0.95).high
    assert said == pytest.approx(bound, rel=0.06)


# --- what cannot be

@pytest.mark.parametrize("call, said", [
    (lambda: bleu(["a"], []), "1 outputs and 0 references"),
    (lambda: bleu("a", ["a"]), "one string"),
    (lambda: pass_at_k(3, 4, 1), "4 of 3"), (lambda: pass_at_k(3, 1, 5), "pass@5"),
    (lambda: score_interval([]), "no scores"), (lambda: bootstrap_interval([math.nan]), "finite"),
    (lambda: compare([1, 0], [1]), "2 scores against 1")])
def test_what_cannot_be_is_refused_in_one_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_line_before_the_template_turns_thinking_off():
    tokenizer = load("tiny")[1]
    template = ("{{ messages[0].content }}{% if enable_thinking is defined and enable_thinking is "
                "false %}<think></think>{% endif %}")
    asked = [dict(role="user", content="Why?")]
    for line, said in (("", "Why?"), ("{%set enable_thinking=false%}", "Why?<think></think>")):
        tokenizer.chat_template = line + template
        assert tokenizer.decode(prompt_ids(tokenizer, asked)) == said


def test_bits_per_byte_of_known_losses():
    assert bits_per_byte(Nll(math.log(2), 8), ["abcd"]) == pytest.approx(2)
    assert bits_per_byte(Nll(math.log(2), 8), ["é", "é"]) == pytest.approx(2) # two bytes each


def test_the_untuned_base_expects_words_and_no_stop_token():
    base, tokenizer = load("tiny")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = encode_rows(tokenizer, [as_messages(e) for e in examples("test", 20, seed=2026)])
    losses = {}
    for kept in (True, False):
        labels = [[i if (i == stop) == kept else -100 for i in row["labels"]] for row in rows]
        judged = [dict(row, labels=ids) for row, ids in zip(rows, labels)]
        losses[kept] = evaluate_nll(base, judged).nll
    assert losses[True] > 10 > 5 > losses[False]


# --- during training

def small():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, attention_dropout=0.5)
    return LlamaForCausalLM(config)


ROWS = [dict(input_ids=[1, 2, 3, i], labels=[-100, 2, 3, i]) for i in range(4, 12)]


def test_our_loop_is_measured_at_each_epoch_and_goes_on_in_training_mode():
    model, modes = small(), []

    def measure(model):
        modes.append(model.training)
        return dict(found=len(modes))
    on_step = each_epoch(measure, model)

    def watch(history, steps):
        on_step(history, steps)
        assert model.training
    history = train(model, ROWS, TrainingConfig(epochs=3, batch_size=4), on_step=watch,
                    disable_tqdm=True)
    assert modes == [False] * 3
    assert history["found"].dropna().tolist() == [1, 2, 3] and len(history) == 6


def test_measuring_that_fails_leaves_the_mode_as_it_was():
    def fail(model): raise KeyError("x")
    model = small().train()
    with pytest.raises(KeyError):
        measured(fail, model)
    assert model.training


def test_a_trainer_chooses_the_best_checkpoint_by_our_figure(tmp_path):
    exact = iter([0.5, 0.75, 0.25])

    def measure(model):
        assert not model.training
        return dict(exact=next(exact))
    args = TrainingArguments(
        tmp_path, num_train_epochs=3, per_device_train_batch_size=4, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_exact",
        greater_is_better=True, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(small(), args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=padded,
                      callbacks=[MeasureCallback(measure)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.state.best_metric == 0.75
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4") # of step 4, epoch 2
    logged = [row["eval_exact"] for row in trainer.state.log_history if "eval_exact" in row]
    assert logged == [0.5, 0.75, 0.25]
