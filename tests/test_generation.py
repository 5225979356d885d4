"The decode loop where a lesson does not look: odd prompts and dials, stopping, the library."
import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sftlab.generation
from sftlab.figures.generation import answers_html
from sftlab.generation import (complete, evaluate, few_shot_prompt, generate_ids, greedy, sampler,
                               stop_token_ids, stream, stream_ids, truncate_at_stop, warp_logits,
                               wilson_interval)
from sftlab.models import load
from sftlab.tiny.world import examples
from sftlab.tiny.world import test_set as items_of_test


@pytest.fixture(scope="module")
def tiny(): return load("tiny")


tenths = st.lists(st.integers(-200, 200), min_size=2, max_size=40, unique=True)
logits_of = tenths.map(lambda values: torch.tensor(values) / 10)


@given(logits_of, st.floats(0.1, 3), st.integers(0, 50), st.floats(0.01, 1))
def test_the_likeliest_can_always_be_chosen(logits, temperature, top_k, top_p):
    warped = warp_logits(logits, temperature, top_k, top_p)
    kept = ~warped.isinf()
    assert kept[logits.argmax()]
    assert torch.equal(warped[kept], (logits / temperature)[kept])
    if top_k:
        assert kept.sum() <= top_k


@given(logits_of, st.floats(0.2, 3), st.integers(1, 50), st.floats(0.05, 0.99))
def test_warped_logits_are_the_librarys(logits, temperature, top_k, top_p):
    from transformers import (LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper,
                              TopPLogitsWarper)
    warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)]
    warpers = LogitsProcessorList([*warpers, TopPLogitsWarper(top_p)])
    theirs = warpers(None, logits[None])[0]
    ours = warp_logits(logits, temperature, top_k, top_p)
    differ = ours.isinf() != theirs.isinf()
    # They sum probabilities upwards, we downwards: a token whose sum meets top_p to within
    # float32's rounding may fall on either side.
    p, order = warp_logits(logits, temperature, top_k).softmax(-1).sort(descending=True)
    edge = torch.zeros_like(p).scatter(0, order, (p.cumsum(-1) - p - top_p).abs())
    assert (edge[differ] < 1e-6).all()
    assert torch.equal(ours[~differ], theirs[~differ])


def test_top_p_keeps_the_token_that_crosses_the_line():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    assert (~warp_logits(probabilities.log(), top_p=0.6).isinf()).tolist() == [True, True, False]
    assert (~warp_logits(probabilities.log(), top_p=0.4).isinf()).tolist() == [True, False, False]


def test_temperature_zero_is_greedy_and_seeds_decide_the_rest():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert sampler(temperature=0)(logits) == greedy(logits)
    def draw(seed):
        sample = sampler(seed=seed)
        return [sample(logits) for _ in range(20)]
    assert draw(1) == draw(1) != draw(2)


def test_tokens_are_drawn_as_often_as_the_probabilities_say():
    logits = torch.tensor([3.0, 2.6, 2.0, 1.5, 1.0, 0.8, 0.5, -1.0])
    sample, n = sampler(temperature=0.8, top_k=6, seed=0), 4000
    expected = warp_logits(logits, 0.8, 6).softmax(-1)
    drawn = torch.bincount(torch.tensor([sample(logits) for _ in range(n)]), minlength=8)
    kept = expected > 0
    chi2 = ((drawn[kept] - n * expected[kept]) ** 2 / (n * expected[kept])).sum().item()
    # 5 degrees of freedom: a right sampler exceeds 20.5 once in 1,000 seeds
    assert kept.sum() == 6 and drawn[~kept].sum() == 0 and chi2 < 20.5


def test_a_cache_changes_nothing(tiny):
    model, tokenizer = tiny
    for prompt in ("<|endoftext|>It was a cold day.", "<|endoftext|>秘鲁的首都是"):
        ids = tokenizer(prompt)["input_ids"]
        slow, why = generate_ids(model, ids, 40)
        assert why == "length" and list(stream_ids(model, ids, 40)) == slow
        stops = {slow[9]}
        slow, why = generate_ids(model, ids, 40, stops)
        assert why == "stop" and list(stream_ids(model, ids, 40, stops)) == slow[:-1]


def test_a_batch_is_the_librarys_batch(tiny):
    model, tokenizer = tiny
    prompts = ["<|endoftext|>" + few_shot_prompt([], item["question"])
               for item in items_of_test()[:20]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    theirs = model.generate(**inputs, max_new_tokens=16, do_sample=False,
                            pad_token_id=tokenizer.pad_token_id)
    theirs = theirs[:, inputs["input_ids"].shape[1]:].tolist()
    ours = [done.ids for done in complete(model, tokenizer, prompts, 16, batch_size=20)]
    assert ours == [row[:len(ids)] for row, ids in zip(theirs, ours)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(examples("train", 160)), min_size=1, max_size=6))
def test_batched_greedy_equals_one_by_one(tiny, rows):
    model, tokenizer = tiny
    prompts = [few_shot_prompt(rows[:i], row["question"])  # of very different lengths
               for i, row in enumerate(rows)]
    stops = stop_token_ids(model, tokenizer)
    for done, prompt in zip(complete(model, tokenizer, prompts, max_new_tokens=12), prompts):
        ids, why = generate_ids(model, tokenizer(prompt)["input_ids"], 12, stops)
        assert (done.ids, done.reason) == (ids, why)


def test_every_reason_to_end_is_reported(tiny):
    model, tokenizer = tiny
    ids = tokenizer("The capital of Peru is")["input_ids"]
    new, why = generate_ids(model, ids, 3)
    assert (len(new), why) == (3, "length")
    assert generate_ids(model, ids, 30, {new[1]}) == (new[:2], "stop")
    limit = model.config.max_position_embeddings
    new, why = generate_ids(model, ids * (limit // len(ids)) + ids[:limit % len(ids) - 2], 30)
    assert (len(new), why) == (2, "context")


def test_stream_shows_only_whole_characters_and_all_of_them(tiny, monkeypatch):
    model, tokenizer = tiny
    ids = tokenizer("😀")["input_ids"]
    assert len(ids) > 1  # several byte tokens, as the test needs
    ids += tokenizer(" 秘鲁")["input_ids"]
    script = iter(ids)
    monkeypatch.setattr(sftlab.generation, "sampler", lambda *_: lambda logits: next(script))
    pieces = list(stream(model, tokenizer, [5], max_new_tokens=len(ids), stop_ids=()))
    assert "".join(pieces) == "😀 秘鲁"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_several_stop_tokens_are_found(tiny):
    model, tokenizer = tiny
    other = deepcopy(model)
    other.generation_config.eos_token_id = [1, 2]
    assert stop_token_ids(other, tokenizer) == {1, 2, tokenizer.eos_token_id}
    other.generation_config.eos_token_id = None
    assert stop_token_ids(other, tokenizer) == {tokenizer.eos_token_id}


def test_evaluation_tells_right_from_nearly_right(tiny):
    "Exact, begins and stopped are three different things."
    model, tokenizer = tiny
    item = items_of_test()[0]
    output = evaluate(model, tokenizer, [item], lambda i: i["question"])[0]["output"]
    def judged(answer):
        asked = [{**item, "answer": answer}]
        row = evaluate(model, tokenizer, asked, lambda i: i["question"])[0]
        return row["exact"], row["begins"]
    assert len(output) > 1
    assert judged(output) == (True, True)
    assert judged(output[:-1]) == (False, True)
    assert judged(output + "!") == judged(item["answer"]) == (False, False)


def test_the_output_is_cut_before_it_is_compared(tiny):
    model, tokenizer = tiny
    item = items_of_test()[0]
    def answered(**options):
        return evaluate(model, tokenizer, [item], lambda i: i["question"], **options)[0]["output"]
    whole = answered()
    middle = whole[len(whole) // 2:]
    assert answered(stop_strings=(middle,)) == whole[:len(whole) // 2].strip()


def test_a_text_is_cut_where_the_first_stop_string_begins():
    assert truncate_at_stop("Lima.\nQ: more\n\nstill", ("\n\n", "\nQ:")) == "Lima."
    assert truncate_at_stop("Lima.", ("\n\n",)) == truncate_at_stop("Lima.", ()) == "Lima."


def test_answers_are_shown_as_text(tiny):
    model, tokenizer = tiny
    html = answers_html(model, model, tokenizer, [], "<script>alert('x')</script>")
    assert "<script" not in html and html.count("prompt tokens; ") == 3
    for title in ("base", "base, few-shot", "instruct"):
        assert f">{title}</div>" in html


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(case):
    from scipy.stats import binomtest
    successes, n = case
    theirs = binomtest(successes, n).proportion_ci(method="wilson")
    low, high = wilson_interval(successes, n)  # with 1.96 for 1.959964
    assert math.isclose(low, theirs.low, abs_tol=1e-4)
    assert math.isclose(high, theirs.high, abs_tol=1e-4)
