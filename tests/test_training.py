"""The training loop: the Trainer's weights to the bit, every row once an epoch, and a run that is
killed goes on as if nothing had been."""
import ast
import inspect
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

import sftlab.training as training
from sftlab.errors import TrainingError
from sftlab.guards.training import check_bf16, check_rows
from sftlab.masking import encode_rows
from sftlab.models import load
from sftlab.plots import LossPlot
from sftlab.precision import half_precision, scaled_step
from sftlab.tiny.world import as_messages, examples
from sftlab.training import (
    PADDING_FREE,
    SCHEDULES,
    TrainingConfig,
    count_steps,
    count_targets,
    decay_groups,
    effective_batches,
    epoch_order,
    evaluate_nll,
    flatten_rows,
    lr_multiplier,
    new_optimizer,
    next_labels,
    nll_sum,
    optimizer_step,
    padded,
    target_nll_sum,
    train,
    warmup_steps,
)

matplotlib.use("Agg")
SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)


def small(seed=0, **more):
    "A Llama of a few thousand weights."
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZE | dict(tie_word_embeddings=True) | more)).eval()


def make_rows(n, seed=0):
    "Rows of 4 to 40 tokens; 1 to nearly all of them are learned."
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(64) for _ in range(rng.randint(4, 40))]
        start = rng.randint(1, len(ids) - 1)
        rows.append(dict(input_ids=ids, labels=[-100] * start + ids[start:]))
    return rows


ROWS = make_rows(30)


@st.composite
def any_row(draw):
    "2 to 12 tokens, of which one or more are learned."
    ids = draw(st.lists(st.integers(0, 63), min_size=2, max_size=12))
    n = len(ids) - 1
    learned = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    labels = [i if learns else -100 for i, learns in zip(ids, [True, *learned])]
    return dict(input_ids=ids, labels=labels)


batches_of_rows = st.lists(any_row(), min_size=1, max_size=5)


def weights(model): return [p.detach() for p in model.parameters()]


def same(these, those):
    return len(these) == len(those) > 0 and all(a.equal(b) for a, b in zip(these, those))


def quiet_train(model, rows, s, **more): return train(model, rows, s, disable_tqdm=True, **more)


# --- equal to the Trainer

def recorded(run):
    "What `run` returns, and the clipped gradients before each optimizer step."
    gradients = []
    def take_down(opt, *_):
        gradients.append([p.grad.clone() for g in opt.param_groups for p in g["params"]])
    hook = register_optimizer_step_pre_hook(take_down)
    try:
        return run(), gradients
    finally:
        hook.remove()


def trainers_run(model, rows, s, folder):
    args = TrainingArguments(
        str(folder), num_train_epochs=s.epochs, per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.gradient_accumulation_steps, learning_rate=s.learning_rate,
        lr_scheduler_type=s.lr_scheduler_type, warmup_steps=s.warmup_steps,
        weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, bf16=s.bf16,
        train_sampling_strategy="sequential", use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=1, save_strategy="no", dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=padded)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[:-1]


@pytest.mark.parametrize("size", [8, 4, 2, 1])
@pytest.mark.parametrize("more", [
    dict(lr_scheduler_type="cosine", warmup_steps=3),
    dict(lr_scheduler_type="linear", warmup_steps=0.3),
    dict(lr_scheduler_type="constant", warmup_steps=0),
    dict(lr_scheduler_type="constant_with_warmup", warmup_steps=2, bf16=True),
], ids=lambda more: more["lr_scheduler_type"])
def test_gradients_weights_and_rates_are_the_trainers(size, more, tmp_path):
    s = TrainingConfig(
        epochs=2, batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=1e-2,
        weight_decay=0.1, max_grad_norm=0.5, shuffle=False, **more)
    mine, other = small(), small()
    ours, our_gradients = recorded(lambda: quiet_train(mine, ROWS, s))
    theirs, their_gradients = recorded(lambda: trainers_run(other, ROWS, s, tmp_path))
    assert len(our_gradients) == len(their_gradients) == len(ours) == len(theirs) == 8
    assert all(map(same, our_gradients, their_gradients))
    assert same(weights(mine), weights(other))
    assert list(ours["learning_rate"]) == [entry["learning_rate"] for entry in theirs]
    assert [entry["loss"] for entry in theirs] == pytest.approx(list(ours["loss"]), rel=1e-5)
    assert ours["grad_norm"].max() > 0.5 and not same(weights(mine), weights(small()))


def test_the_tiny_model_too_and_with_an_adapter(tmp_path):
    talks = [as_messages(e) for e in examples("train", 20)]
    rows = encode_rows(load("tiny")[1], talks)
    def adapted():
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(load("tiny")[0], lora)

    s = TrainingConfig(
        epochs=1, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-3,
        weight_decay=0.1, shuffle=False)
    for make in (lambda: load("tiny")[0], adapted):
        mine, other = make(), make()
        quiet_train(mine, rows, s)
        trainers_run(other, rows, s, tmp_path)
        assert same(weights(mine), weights(other)) and not same(weights(mine), weights(make()))


@pytest.mark.parametrize("change", [
    dict(weight_decay=0.0), dict(max_grad_norm=math.inf), dict(warmup_steps=0),
    dict(lr_scheduler_type="linear"), dict(shuffle=True), dict(batch_size=1)], ids=str)
def test_the_comparison_would_notice(change, tmp_path):
    """The control: with one detail changed the weights differ (a step of 8 rows taken as 4 x 1 is
    another effective batch)."""
    base = dict(
        epochs=2, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-2,
        weight_decay=0.1, max_grad_norm=0.5, lr_scheduler_type="cosine", warmup_steps=2,
        shuffle=False)
    mine, other = small(), small()
    trainers_run(other, ROWS, TrainingConfig(**base), tmp_path)
    quiet_train(mine, ROWS, TrainingConfig(**base | change))
    assert not same(weights(mine), weights(other))


def test_the_comparison_would_notice_means_instead_of_sums(tmp_path):
    s = TrainingConfig(
        epochs=1, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-2, shuffle=False)
    def means(model, batch): return nll_sum(model, batch) / count_targets(batch)
    mine, other = small(), small()
    trainers_run(other, ROWS, s, tmp_path)
    quiet_train(mine, ROWS, s, loss_fn=means)
    assert not same(weights(mine), weights(other))


def test_the_trainer_ignores_the_warm_up_of_constant(tmp_path):
    def first_rates(schedule):
        args = TrainingArguments(
            str(tmp_path), lr_scheduler_type=schedule, warmup_steps=0.3, learning_rate=1.0,
            max_steps=10, use_cpu=True, report_to=[])
        trainer = Trainer(torch.nn.Linear(1, 1), args)
        scheduler = trainer.create_scheduler(10, trainer.create_optimizer())
        rates = []
        for _ in range(5):
            rates.append(round(scheduler.get_last_lr()[0], 2))
            trainer.optimizer.step()
            scheduler.step()
        return rates

    assert first_rates("constant") == [1.0] * 5
    assert first_rates("constant_with_warmup") == [0.0, 0.33, 0.67, 1.0, 1.0]


@given(steps=st.integers(1, 60), wanted=st.integers(0, 60) | st.floats(0, 0.99),
       schedule=st.sampled_from(SCHEDULES))
def test_schedules_are_those_of_transformers(steps, wanted, schedule):
    args = TrainingArguments(
        tempfile.gettempdir(), warmup_steps=wanted, use_cpu=True, report_to=[])
    warmup = args.get_warmup_steps(steps)
    assert warmup == warmup_steps(wanted, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert scheduler.get_last_lr()[0] == 3e-4 * lr_multiplier(step, steps, schedule, warmup)
        optimizer.step()
        scheduler.step()


def test_what_decays_is_what_decays_there(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2LMHeadModel(  # has biases
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for model in (small(), gpt2):
        theirs = set(Trainer(model, args).get_decay_parameter_names(model))
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, spared = (
            {names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.1))
        everything = set(names.values())
        assert decayed == theirs & everything and spared == everything - theirs and spared


# --- the loss

@given(batches_of_rows)
def test_the_loss_is_the_models_own(rows):
    model, batch = small(), padded(rows)
    with torch.no_grad():
        assert (nll_sum(model, batch) / count_targets(batch)).equal(model(**batch).loss)
        one_by_one = sum(nll_sum(model, padded([r])).item() for r in rows)
        learned = sum(label != -100 for r in rows for label in r["labels"][1:])
        for collate in (padded, flatten_rows):
            for loss_fn in (nll_sum, target_nll_sum):
                assert int(count_targets(collate(rows))) == learned
                loss = loss_fn(model, collate(rows)).item()
                assert loss == pytest.approx(one_by_one, rel=1e-5)  # float32, up to 60 terms


def test_labels_are_moved_once():
    batch = dict(labels=torch.tensor([[-100, 5, 6, -100, 7]]))
    assert next_labels(batch).tolist() == [[5, 6, -100, 7, -100]] and int(count_targets(batch)) == 3
    first_only = dict(labels=torch.tensor([[5, -100]]))
    assert int(count_targets(first_only)) == 0  # nothing comes before the first token


def gradients(model, rows, size, collate, loss_fn):
    model.zero_grad()
    batches = [collate(rows[i:i + size]) for i in range(0, len(rows), size)]
    for batch in batches:
        (loss_fn(model, batch) / sum(map(count_targets, batches))).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@settings(max_examples=25)
@given(batches_of_rows, st.integers(1, 5))
def test_gradients_do_not_depend_on_how_rows_are_laid_out(rows, size):
    "Up to float32's rounding: 2**-24 = 6e-8 an operation, a few dozen of them."
    model = small()
    whole = gradients(model, rows, len(rows), padded, nll_sum)
    ways = [(padded, nll_sum), (padded, target_nll_sum), (flatten_rows, target_nll_sum)]
    for way in ways:
        assert (gradients(model, rows, size, *way) - whole).norm() < 5e-6 * whole.norm()


def test_rows_end_to_end_would_leak_without_their_positions():
    model, rows = small(), ROWS[:4]
    batch = flatten_rows(rows)
    alone = sum(nll_sum(model, padded([r])).item() for r in rows)
    assert nll_sum(model, batch).item() == pytest.approx(alone, rel=1e-6)
    del batch["position_ids"]
    assert nll_sum(model, batch).item() != pytest.approx(alone, rel=1e-5)


def test_the_quick_loss_takes_adapters_and_models_that_change_their_logits():
    "LoRA with learned tokens (which wraps the tied head), and a Gemma 2 (squeezes its logits)."
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(
        **SIZE, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager")).eval()
    lora = LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices=[3, 5], task_type="CAUSAL_LM",
        init_lora_weights=False)
    adapted = get_peft_model(small(), lora).eval()
    batch = padded(ROWS[:5])
    for model in (gemma, adapted):
        with torch.no_grad():
            want = nll_sum(model, batch).item()
            assert target_nll_sum(model, batch).item() == pytest.approx(want, rel=1e-6)
    history = quiet_train(adapted, ROWS, TrainingConfig(epochs=1), **PADDING_FREE)
    assert len(history) == 4


def test_the_model_is_left_as_it_was_by_the_quick_loss():
    model = small()
    ids = torch.tensor([ROWS[0]["input_ids"]])
    before = model(ids).logits
    target_nll_sum(model, padded(ROWS[:2]))
    assert model(ids).logits.equal(before) and not model.lm_head._forward_pre_hooks
    with pytest.raises(IndexError):
        target_nll_sum(model, dict(padded(ROWS[:2]), input_ids=torch.tensor([[99]])))
    assert not model.lm_head._forward_pre_hooks  # after an error too


@pytest.mark.parametrize("way", [{}, PADDING_FREE], ids=["plain", "fast"])
def test_perplexity_does_not_depend_on_batches_or_order(way):
    model = small()
    tokens = sum(int(count_targets(padded([r]))) for r in ROWS)
    with torch.no_grad():
        want = sum(nll_sum(model, padded([r])).item() for r in ROWS) / tokens
    model.train()
    for size in (1, 3, 8, 100):
        for rows in (ROWS, ROWS[::-1]):
            measured = evaluate_nll(model, rows, size, **way)
            assert measured.nll == pytest.approx(want, rel=1e-6) and measured.tokens == tokens
            assert measured.perplexity == math.exp(measured.nll)
    assert model.training and all(p.grad is None for p in model.parameters())
    means = [evaluate_nll(model, [r]).nll for r in ROWS]
    assert sum(means) / len(means) != pytest.approx(want, rel=1e-4)  # the mistake would be seen
    says = "0.6931 nats a token, perplexity 2.000, over 1,500 tokens"
    assert repr(training.Nll(math.log(2), 1500)) == says


# --- float16

def test_float16_is_near_float32_and_scales_the_gradients_only():
    s = dict(epochs=1, learning_rate=1e-2, warmup_steps=2)
    plain, half = small(), small()
    history = quiet_train(plain, ROWS, TrainingConfig(**s))
    of_half = quiet_train(half, ROWS, TrainingConfig(**s, fp16=True))
    assert list(of_half) == list(history)
    assert list(of_half["loss"]) == pytest.approx(list(history["loss"]), rel=0.02)
    assert list(of_half["grad_norm"]) == pytest.approx(list(history["grad_norm"]), rel=0.1)
    assert not same(weights(plain), weights(half))


def test_a_factor_alone_changes_no_bit():
    "In float32 a power of two moves the exponent only: the step is the plain one."
    mine, other = small(), small()
    batches = [padded(ROWS[:4]), padded(ROWS[4:8])]
    for model, step in ((mine, optimizer_step),
                        (other, partial(scaled_step, torch.amp.GradScaler("cpu")))):
        optimizer = new_optimizer(model, TrainingConfig())
        for _ in range(3):
            figures = step(model, optimizer, batches, 1e-2, 0.5, nll_sum)
            assert figures["grad_norm"] > 0.5
    assert same(weights(mine), weights(other)) and not same(weights(mine), weights(small()))


def test_an_overflow_skips_the_step_and_halves_the_factor():
    model = small()
    optimizer = new_optimizer(model, TrainingConfig())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 100)
    in_half = torch.autocast("cpu", dtype=torch.float16)(nll_sum)
    figures = scaled_step(scaler, model, optimizer, [padded(ROWS[:4])], 1e-2, 1.0, in_half)
    assert not math.isfinite(figures["grad_norm"]) and math.isfinite(figures["loss"])
    assert same(weights(model), weights(small())) and scaler.get_scale() == 2.0 ** 99


def test_a_run_in_float16_that_was_stopped_ends_the_same(tmp_path):
    s = TrainingConfig(epochs=2, batch_size=4, learning_rate=1e-2, fp16=True)
    whole, again = small(), small()
    straight = quiet_train(whole, ROWS, s)
    with pytest.raises(KeyboardInterrupt):
        quiet_train(small(), ROWS, s, checkpoints=tmp_path, save_steps=2, on_step=stop_at(5))
    state = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    assert state["scaler"]["scale"] > 0 and state["scaler"]["_growth_tracker"] > 0
    history = quiet_train(again, ROWS, s, checkpoints=tmp_path, save_steps=2)
    assert same(weights(whole), weights(again)) and straight.equals(history)


# --- the order of rows

@given(n=st.integers(1, 40), size=st.integers(1, 5), accumulate=st.integers(1, 4),
       epochs=st.integers(1, 3), seed=st.integers(0, 99), shuffle=st.booleans(), data=st.data())
def test_every_row_once_an_epoch_and_any_start_continues(
        n, size, accumulate, epochs, seed, shuffle, data):
    s = TrainingConfig(epochs=epochs, batch_size=size, gradient_accumulation_steps=accumulate,
                       seed=seed, shuffle=shuffle)
    steps = list(effective_batches(range(n), s, collate=list))
    assert len(steps) == count_steps(n, s)
    for _, batches in steps:
        assert 1 <= len(batches) <= accumulate and all(1 <= len(b) <= size for b in batches)
    flat = [i for _, batches in steps for b in batches for i in b]
    for e in range(epochs):
        order = flat[e * n:(e + 1) * n]
        assert sorted(order) == list(range(n)) and (shuffle or order == list(range(n)))
    ends = [e for e, _ in steps if e.is_integer()]
    assert ends == list(range(1, epochs + 1)) == sorted({math.ceil(e) for e, _ in steps})
    start = data.draw(st.integers(0, len(steps)))
    assert list(effective_batches(range(n), s, collate=list, start=start)) == steps[start:]


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(epoch_order(50, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16 and all(sorted(order) == list(range(50)) for order in orders)


# --- what is refused

@pytest.mark.parametrize("bad, says", [
    (dict(input_ids=[1, 2], labels=[-100, -100]), "row 2 has nothing to learn"),
    (dict(input_ids=[1, 2], labels=[1, -100]), "row 2 has nothing to learn"),  # none predicts it
    (dict(input_ids=[1], labels=[1]), "row 2 has nothing to learn"),
    (dict(input_ids=[], labels=[]), "row 2 has nothing to learn"),
    (dict(input_ids=[1, 2], labels=[2]), "row 2 has 2 tokens and 1 labels"),
    (dict(input_ids=[1] * 65, labels=[1] * 65),
     "row 2 has 65 tokens, and the model's context is 64"),
    (dict(input_ids=[1, 64], labels=[1, 64]), "row 2 has the token 64, and the model knows 64"),
])
def test_rows_that_cannot_be_learned_are_named(bad, says):
    model = small()
    with pytest.raises(TrainingError, match=says):
        quiet_train(model, [*ROWS[:2], bad, *ROWS[2:]], TrainingConfig())
    with pytest.raises(TrainingError, match="held-out " + says):
        quiet_train(model, ROWS, TrainingConfig(), eval_rows=[*ROWS[:2], bad])
    assert same(weights(model), weights(small()))
    check_rows(ROWS, model)


def test_no_rows_are_refused():
    with pytest.raises(TrainingError, match="there is no row"):
        quiet_train(small(), [], TrainingConfig())
    with pytest.raises(TrainingError, match="there is no held-out row"):
        quiet_train(small(), ROWS, TrainingConfig(), eval_rows=[])


@pytest.mark.parametrize("wrong, says", [
    (dict(lr_scheduler_type="constant"),
     "'constant' has no warm-up: choose 'constant_with_warmup'"),
    (dict(lr_scheduler_type="polynomial"),
     "no lr_scheduler_type 'polynomial': choose one of linear, cosine"),
    (dict(epochs=0), "epochs is 0: it must be an integer of at least 1"),
    (dict(epochs=1.5), "epochs is 1.5"), (dict(epochs=True), "epochs is True"),
    (dict(batch_size=-1), "batch_size"),
    (dict(gradient_accumulation_steps="4"), "gradient_accumulation_steps is '4'"),
    (dict(learning_rate=-1e-3), "learning_rate is -0.001: it must be a number, and not negative"),
    (dict(learning_rate=float("nan")), "learning_rate is nan"),
    (dict(learning_rate="1e-3"), "learning_rate is '1e-3'"),
    (dict(warmup_steps=-1), "warmup_steps"), (dict(weight_decay=-1), "weight_decay"),
    (dict(max_grad_norm=-1), "max_grad_norm"), (dict(bf16=True, fp16=True), "choose one")])
def test_settings_that_cannot_be_right(wrong, says):
    with pytest.raises(TrainingError, match=says):
        TrainingConfig(**wrong)


def test_a_loss_that_is_no_number_stops_the_run():
    model = small()
    with torch.no_grad():
        model.model.embed_tokens.weight[ROWS[0]["input_ids"][0]] = math.nan
    with pytest.raises(TrainingError, match="the loss is nan"):
        quiet_train(model, ROWS[:4], TrainingConfig())


def test_a_card_without_bfloat16_is_refused(monkeypatch):
    class Old:
        device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(TrainingError, match="bf16=False, or fp16=True"):
        half_precision(Old, TrainingConfig(bf16=True), nll_sum)
    half_precision(Old, TrainingConfig(), nll_sum)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    check_bf16(Old.device)
    check_bf16(torch.device("cpu"))


# --- what a run tells

def test_the_history_says_what_happened():
    model, seen = small(), []
    def on_step(history, steps): seen.append((history[-1]["step"], steps))
    s = TrainingConfig(epochs=2, learning_rate=1e-2)
    history = quiet_train(model, ROWS, s, eval_rows=ROWS[:8], on_step=on_step)
    assert list(history["step"]) == list(range(9)) and seen == [(i, 8) for i in range(1, 9)]
    assert list(history[history["eval_nll"].notna()]["epoch"]) == [0, 1, 2]
    assert history["eval_nll"].iloc[-1] == evaluate_nll(model, ROWS[:8]).nll
    assert history["tokens"].sum() == 2 * evaluate_nll(model, ROWS).tokens and not model.training
    first = [ROWS[i] for i in epoch_order(30, 0)[:8]]
    want = evaluate_nll(small(), first).nll
    assert history["loss"].iloc[1] == pytest.approx(want, rel=1e-6)
    assert history["loss"].iloc[-1] < history["loss"].iloc[1]


def test_the_seed_decides(tmp_path):
    a, b, c = small(), small(), small()
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        quiet_train(model, ROWS, TrainingConfig(epochs=1, seed=seed, learning_rate=1e-2))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


def test_a_plot_may_watch(monkeypatch):
    import IPython.display
    shown = []
    class Handle:
        def update(self, *what, **_): shown.append(what)
    def display(*what, **_):
        shown.append(what)
        return Handle()
    monkeypatch.setattr(IPython.display, "display", display)
    s = TrainingConfig(epochs=1)
    quiet_train(small(), ROWS, s, eval_rows=ROWS[:4], on_step=LossPlot(every=0))
    assert len(shown) == 4  # one a step
    shown.clear()
    quiet_train(small(), ROWS, s, on_step=LossPlot(every=1000))
    assert len(shown) == 2  # the first step and the last


def test_what_the_program_imports_brings_no_torch():
    source = "import sys, sftlab.finetune, sftlab.models, sftlab.files.checkpoints"
    done = subprocess.run([sys.executable, "-c", f"{source}; print(*sys.modules)"],
                          capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pandas", "matplotlib", "datasets", "trl", "peft"}
    assert not heavy & set(done.stdout.split())


# --- what the lesson says one types for a real model

def test_the_libraries_take_what_the_lesson_types():
    from trl import SFTConfig, SFTTrainer
    lesson = Path(__file__).parent.parent / "nbs" / "05_full_finetuning.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(lesson.read_text("utf-8"))["cells"]]
    [text] = [source for source in cells if "## On a real model" in source]
    tree = ast.parse(re.search(r"(?s)```python\n(.*?)```", text.split("## On a real model")[1])[1])
    calls = {getattr(c.func, "id", ""): c for c in ast.walk(tree) if isinstance(c, ast.Call)}
    typed = {k.arg: ast.literal_eval(k.value) for k in calls["SFTConfig"].keywords}
    made = SFTConfig(**typed, use_cpu=True)
    assert made.warmup_steps == 0.03 and made.assistant_only_loss
    assert {k.arg for k in calls["SFTTrainer"].keywords} <= set(
        inspect.signature(SFTTrainer).parameters)
    plain = SFTConfig("x", use_cpu=True)  # "TRL's defaults"
    assert (plain.learning_rate, plain.num_train_epochs, plain.warmup_steps) == (2e-5, 3, 0)
    assert (plain.per_device_train_batch_size, plain.max_length, plain.bf16) == (8, 1024, True)
    assert plain.lr_scheduler_type == "linear"


# --- checkpoints

S = TrainingConfig(  # 8 steps
    epochs=2, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=2)


def stop_at(step, error=KeyboardInterrupt):
    def stop(history, steps):
        if history[-1]["step"] == step:
            raise error
    return stop


def with_dropout(folder=None, model=None, **more):
    "A run with dropout, so that the state of the random numbers counts: model and history."
    model = model or small(attention_dropout=0.2)
    return model, quiet_train(model, ROWS, S, eval_rows=ROWS[:5], checkpoints=folder, **more)


@pytest.fixture(scope="module")
def straight():
    model, history = with_dropout()
    return weights(model), history


STOPS = [[1], [2], [3], [4], [5], [6], [7], [8], [3, 4, 7], [3, 3, 3]]


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stopped_anywhere_it_ends_the_same(stops, straight, tmp_path):
    folder = tmp_path / "run"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            with_dropout(folder, save_steps=2, on_step=stop_at(stop))
        torch.rand(7)  # the process does other things
    model, history = with_dropout(folder, save_steps=2)
    assert same(weights(model), straight[0]) and history.equals(straight[1])
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("lost", ["random", "optimizer", "weights", "order"])
def test_each_part_of_a_checkpoint_counts(lost, straight, tmp_path, monkeypatch):
    "The control: without one part of it the weights differ."
    with pytest.raises(KeyboardInterrupt):
        with_dropout(tmp_path, save_steps=2, on_step=stop_at(5))
    model = small(attention_dropout=0.2)
    def from_the_first_row(rows, s, collate, start):
        return list(effective_batches(rows, s, collate))[:8 - start]
    if lost == "random":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    if lost == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    if lost == "weights":
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)
    if lost == "order":
        monkeypatch.setattr(training, "effective_batches", from_the_first_row)
    with_dropout(tmp_path, model, save_steps=2)
    assert not same(weights(model), straight[0])


def test_a_finished_run_is_not_run_again(straight, tmp_path):
    with_dropout(tmp_path)
    def never(*_): raise AssertionError("it computed a step")
    model, history = with_dropout(tmp_path, on_step=never)
    assert same(weights(model), straight[0]) and history.equals(straight[1])


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    "Checkpoints after steps 2 and 4 of 8."
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        quiet_train(small(), ROWS, S, checkpoints=folder, save_steps=2, on_step=stop_at(5))
    return folder


def go_on(folder, model=None, rows=ROWS, s=S, **more):
    return quiet_train(model or small(), rows, s, checkpoints=folder, **more)


def test_a_checkpoint_is_numbers_and_text(half_way):
    newest = half_way / "step-00000004"
    assert sorted(p.name for p in newest.iterdir()) == [
        "SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=newest, check=True,
                       capture_output=True)
    for name in ("model", "optimizer"):
        assert load_file(newest / f"{name}.safetensors")
    assert json.loads((newest / "state.json").read_text())["run"]["learning_rate"] == 1e-2


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]


def damages(content, rng):
    "Cut off, longer, one bit changed."
    for length in (0, 1, len(content) // 2, len(content) - 1):
        yield content[:length]
    yield content + b"\n"
    yield content + content
    for _ in range(40):
        at, data = rng.randrange(8 * len(content)), bytearray(content)
        data[at // 8] ^= 1 << at % 8
        yield bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name, half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / "run")
    path = tmp_path / "run" / "step-00000004" / name
    content, before = path.read_bytes(), weights(small())

    def refused():
        model = small()
        with pytest.raises(TrainingError, match="step-00000004 is damaged") as caught:
            go_on(tmp_path / "run", model)
        assert name in str(caught.value) and "delete that folder" in str(caught.value)
        assert same(weights(model), before)

    for damaged in damages(content, random.Random(name)):
        path.write_bytes(damaged)
        refused()
    path.unlink()
    refused()
    path.write_bytes(content)
    assert len(go_on(tmp_path / "run")) == 8  # whole again


def test_after_the_damaged_one_is_deleted_it_goes_on_from_the_one_before(half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    mine, whole = small(), small()
    go_on(tmp_path / "run", mine)
    quiet_train(whole, ROWS, S)
    assert same(weights(mine), weights(whole))


ALL_LEARNED = dict(ROWS[-1], labels=ROWS[-1]["input_ids"])


def changed(**more): return dict(s=TrainingConfig(**vars(S) | more))


@pytest.mark.parametrize("change, says", [
    (dict(rows=ROWS[:29]), "rows 30, now 29"),
    (dict(rows=ROWS[::-1]), "data "),
    (dict(rows=[*ROWS[:-1], ALL_LEARNED]), "data "),
    (dict(eval_rows=ROWS[:3]), "data "),
    (changed(learning_rate=2e-2), "learning_rate 0.01, now 0.02"),
    (changed(seed=1, epochs=3), "epochs 2, now 3; seed 0, now 1"),
    (PADDING_FREE, "collate padded, now flatten_rows; loss_fn nll_sum, now target_nll_sum")])
def test_another_run_is_refused_with_what_differs(change, says, half_way):
    with pytest.raises(TrainingError, match="belongs to another run") as caught:
        go_on(half_way, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def head_only():
    model = small().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    return model


@pytest.mark.parametrize("model, says", [
    (lambda: small(1), "weights"),
    (lambda: small(num_hidden_layers=3), "parameters"),
    (lambda: small(hidden_size=64), "parameters"),
    (lambda: small().bfloat16(), "weights"),
    (head_only, "weights")])
def test_another_model_is_refused(model, says, half_way):
    with pytest.raises(TrainingError, match=f"belongs to another run .*{says}"):
        go_on(half_way, model())


def test_a_model_that_was_trained_meanwhile_is_refused(half_way):
    model = small()
    quiet_train(model, ROWS[:8], TrainingConfig(epochs=1, warmup_steps=0))
    with pytest.raises(TrainingError, match="load the same model anew"):
        go_on(half_way, model)


def test_only_what_is_trained_is_kept_and_the_rest_is_checked(tmp_path):
    def frozen(seed=0, shift=0.0):
        model = small(seed).requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.requires_grad_(True)
        with torch.no_grad():
            model.model.embed_tokens.weight += shift
        return model

    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path, frozen(), save_steps=2, on_step=stop_at(5))
    kept = load_file(tmp_path / "step-00000004" / "model.safetensors")
    assert kept and all("mlp" in name for name in kept)
    with pytest.raises(TrainingError, match="weights"):
        go_on(tmp_path, frozen(shift=1.0))
    mine, whole = frozen(), frozen()
    go_on(tmp_path, mine)
    quiet_train(whole, ROWS, S)
    assert same(weights(mine), weights(whole))


def test_a_disk_that_is_full_leaves_the_checkpoint_before(half_way, tmp_path, monkeypatch):
    import safetensors.torch
    shutil.copytree(half_way, tmp_path / "run")
    with monkeypatch.context() as m:
        def full(tensors, path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        m.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            go_on(tmp_path / "run", save_steps=1)
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
            "step-00000002", "step-00000004"]
    mine, whole = small(), small()
    go_on(tmp_path / "run", mine)
    quiet_train(whole, ROWS, S)
    assert same(weights(mine), weights(whole))


PROGRAM = """
import os, random, shutil, signal
import safetensors.torch, torch
from transformers import LlamaConfig, LlamaForCausalLM
from sftlab.training import TrainingConfig, train
torch.set_num_threads(1)
SIZE = {size!r}
{small}
{make_rows}
moment = {moment!r}
save_file = safetensors.torch.save_file
count = dict(save=0, replace=0, rmtree=0)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(name, function): # dies before or after the fifth call
    def call(*args, **more):
        count[name] += name != "rmtree" or not str(args[0]).endswith(".partial")
        now = count[name] == 5
        if now and moment == name + "-":
            die()
        result = function(*args, **more)
        if now and moment == name + "+":
            if name == "save":
                os.truncate(args[1], 1000)
            die()
        return result
    return call

safetensors.torch.save_file = dying("save", save_file)
os.replace, shutil.rmtree = dying("replace", os.replace), dying("rmtree", shutil.rmtree)
model = small()
train(model, make_rows(30), TrainingConfig(epochs=8, learning_rate=1e-3),
      checkpoints={folder!r}, save_steps=3, disable_tqdm=True)
save_file({{name: p.detach() for name, p in model.named_parameters()}}, {result!r})
"""


def program(folder, result, moment=""):
    source = PROGRAM.format(
        folder=str(folder), result=str(result), moment=moment, size=SIZE,
        small=inspect.getsource(small), make_rows=inspect.getsource(make_rows))
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


can_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = program(folder / "run", folder / "result.safetensors")
    assert run.wait() == 0, run.stdout.read()
    return (folder / "result.safetensors").read_bytes()


@pytest.mark.slow
@can_kill
@pytest.mark.parametrize("moment", [
    "save-", "save+", "replace-", "replace+", "rmtree-", "rmtree+"])
def test_killed_while_it_writes_it_ends_with_the_same_weights(moment, never_killed, tmp_path):
    "Before, in and after writing a file, giving a checkpoint its name, removing an old one."
    run = program(tmp_path / "run", tmp_path / "result.safetensors", moment)
    assert run.wait() == -signal.SIGKILL, run.stdout.read()
    assert list((tmp_path / "run").glob("step-*"))
    assert not (tmp_path / "result.safetensors").exists()
    again = program(tmp_path / "run", tmp_path / "result.safetensors")
    assert again.wait() == 0, again.stdout.read()
    assert (tmp_path / "result.safetensors").read_bytes() == never_killed
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.slow
@can_kill
def test_killed_at_any_time_it_ends_with_the_same_weights(never_killed, tmp_path):
    rng, kills = random.Random(0), 0
    def newest():
        found = (tmp_path / "run").glob("step-" + 8 * "[0-9]")
        return max((p.name for p in found), default="")
    for _ in range(3):
        run = program(tmp_path / "run", tmp_path / "result.safetensors")
        known = newest()
        while newest() == known and run.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills >= 2
    last = program(tmp_path / "run", tmp_path / "result.safetensors")
    assert last.wait() == 0, last.stdout.read()
    assert (tmp_path / "result.safetensors").read_bytes() == never_killed
