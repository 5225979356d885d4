"The training loop: the Trainer's weights to the bit, every row once an epoch, and a run that is killed goes on as if nothing had been."
import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import matplotlib
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, get_scheduler

import sftlab.training as training
from sftlab.training import (PADDING_FREE, SCHEDULES, LossPlot, TrainingConfig, TrainingError, check_rows, count_steps, count_targets, decay_groups, effective_batches, flatten_rows, epoch_order,
                             evaluate_nll, next_labels, nll_sum, padded, lr_multiplier, target_nll_sum, train, warmup_steps)

matplotlib.use("Agg")


def small(seed=0, **more):
    "A Llama of a few thousand weights."
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
                                              tie_word_embeddings=True) | more)).eval()


def make_rows(n, seed=0):
    "Rows of 4 to 40 tokens; 1 to nearly all of them are learned."
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(64) for _ in range(rng.randint(4, 40))]
        start = rng.randint(1, len(ids) - 1)
        rows.append(dict(input_ids=ids, labels=[-100] * start + ids[start:]))
    return rows


ROWS = make_rows(30)
row = st.lists(st.integers(0, 63), min_size=2, max_size=12).flatmap(
    lambda ids: st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).filter(any).map(lambda learned: dict(input_ids=ids, labels=[i if l else -100 for i, l in zip(ids, [True, *learned])])))
batches_of_rows = st.lists(row, min_size=1, max_size=5)


def weights(model): return [p.detach() for p in model.parameters()]
def same(these, those):
    return len(these) == len(those) > 0 and all(a.equal(b) for a, b in zip(these, those))
def quiet_train(model, rows, s, **more): return train(model, rows, s, disable_tqdm=True, **more)


# --- equal to the Trainer

def recorded(run):
    "What `run` returns, and the clipped gradients before each optimiser step."
    gradients = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: gradients.append([p.grad.clone() for g in opt.param_groups for p in g["params"]]))
    try:
        return run(), gradients
    finally:
        hook.remove()


def trainers_run(model, rows, s, folder):
    args = TrainingArguments(str(folder), num_train_epochs=s.epochs, per_device_train_batch_size=s.batch_size, gradient_accumulation_steps=s.gradient_accumulation_steps, learning_rate=s.learning_rate,
                             lr_scheduler_type=s.lr_scheduler_type, warmup_steps=s.warmup_steps, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, bf16=s.bf16, train_sampling_strategy="sequential",
                             use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=padded)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[:-1]


@pytest.mark.parametrize("size", [8, 4, 2, 1])
@pytest.mark.parametrize("more", [dict(lr_scheduler_type="cosine", warmup_steps=3), dict(lr_scheduler_type="linear", warmup_steps=0.3), dict(lr_scheduler_type="constant", warmup_steps=0),
                                  dict(lr_scheduler_type="constant_with_warmup", warmup_steps=2, bf16=True)], ids=lambda more: more["lr_scheduler_type"])
def test_gradients_weights_and_rates_are_the_trainers(size, more, tmp_path):
    s = TrainingConfig(epochs=2, batch_size=size, gradient_accumulation_steps=8 // size, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, shuffle=False, **more)
    mine, other = small(), small()
    ours, our_gradients = recorded(lambda: quiet_train(mine, ROWS, s))
    theirs, their_gradients = recorded(lambda: trainers_run(other, ROWS, s, tmp_path))
    assert len(our_gradients) == len(their_gradients) == len(ours) == len(theirs) == 8
    assert all(map(same, our_gradients, their_gradients)) and same(weights(mine), weights(other))
    assert list(ours["learning_rate"]) == [entry["learning_rate"] for entry in theirs]
    assert [entry["loss"] for entry in theirs] == pytest.approx(list(ours["loss"]), rel=1e-5)
    assert ours["grad_norm"].max() > 0.5 and not same(weights(mine), weights(small()))


def test_the_tiny_model_too_and_with_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model
    from sftlab.finetune import encode
    from sftlab.tiny.world import examples, to_messages
    from sftlab.models import load
    tokenizer = load("tiny")[1]
    rows = [dict(input_ids=list(ids), labels=list(labels)) for ids, labels in encode(tokenizer, [to_messages(e) for e in examples("train", 20)])]
    def adapted():
        torch.manual_seed(0)
        return get_peft_model(load("tiny")[0], LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    s = TrainingConfig(epochs=1, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-3, weight_decay=0.1, shuffle=False)
    for make in (lambda: load("tiny")[0], adapted):
        mine, other = make(), make()
        quiet_train(mine, rows, s)
        trainers_run(other, rows, s, tmp_path)
        assert same(weights(mine), weights(other)) and not same(weights(mine), weights(make()))


@pytest.mark.parametrize("change", [dict(weight_decay=0.0), dict(max_grad_norm=math.inf), dict(warmup_steps=0), dict(lr_scheduler_type="linear"), dict(shuffle=True), dict(batch_size=1)])
def test_the_comparison_would_notice(change, tmp_path):
    "The control: with one detail changed the weights differ (a step of 8 rows taken as 4 x 1 is another effective batch)."
    base = dict(epochs=2, batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, lr_scheduler_type="cosine", warmup_steps=2, shuffle=False)
    mine, other = small(), small()
    trainers_run(other, ROWS, TrainingConfig(**base), tmp_path)
    quiet_train(mine, ROWS, TrainingConfig(**base | change))
    assert not same(weights(mine), weights(other))


@given(steps=st.integers(1, 60), wanted=st.integers(0, 60) | st.floats(0, 0.99), schedule=st.sampled_from(SCHEDULES))
def test_schedules_are_those_of_transformers(steps, wanted, schedule):
    warmup = TrainingArguments(tempfile.gettempdir(), warmup_steps=wanted, use_cpu=True, report_to=[]).get_warmup_steps(steps)
    assert warmup == warmup_steps(wanted, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert scheduler.get_last_lr()[0] == 3e-4 * lr_multiplier(step, steps, schedule, warmup)
        optimizer.step()
        scheduler.step()


def test_what_decays_is_what_decays_there(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    for model in (small(), GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64))):  # the second has biases
        theirs = set(Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])).get_decay_parameter_names(model))
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, spared = ({names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.1))
        assert decayed == theirs & set(names.values()) and spared == set(names.values()) - theirs and spared


# --- the loss

@given(batches_of_rows)
def test_the_loss_is_the_models_own(rows):
    model, batch = small(), padded(rows)
    with torch.no_grad():
        assert (nll_sum(model, batch) / count_targets(batch)).equal(model(**batch).loss)
        one_by_one = sum(nll_sum(model, padded([r])).item() for r in rows)
        for collate, loss_fn in [(padded, nll_sum), (padded, target_nll_sum), (flatten_rows, nll_sum), (flatten_rows, target_nll_sum)]:
            assert int(count_targets(collate(rows))) == sum(l != -100 for r in rows for l in r["labels"][1:])
            assert loss_fn(model, collate(rows)).item() == pytest.approx(one_by_one, rel=1e-5)  # float32, sums of up to 60 terms


def test_labels_are_moved_once():
    batch = dict(labels=torch.tensor([[-100, 5, 6, -100, 7]]))
    assert next_labels(batch).tolist() == [[5, 6, -100, 7, -100]] and int(count_targets(batch)) == 3
    assert int(count_targets(dict(labels=torch.tensor([[5, -100]])))) == 0  # nothing stands before the first token


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
    for collate, loss_fn in [(padded, nll_sum), (padded, target_nll_sum), (flatten_rows, target_nll_sum)]:
        assert (gradients(model, rows, size, collate, loss_fn) - whole).norm() < 5e-6 * whole.norm()


def test_rows_end_to_end_would_leak_without_their_positions():
    model, rows = small(), ROWS[:4]
    batch = flatten_rows(rows)
    alone = sum(nll_sum(model, padded([r])).item() for r in rows)
    assert nll_sum(model, batch).item() == pytest.approx(alone, rel=1e-6)
    del batch["position_ids"]
    assert nll_sum(model, batch).item() != pytest.approx(alone, rel=1e-5)


def test_the_quick_loss_takes_adapters_and_models_that_change_their_logits():
    "LoRA with learned tokens (which wraps the tied head), and a Gemma 2, which squeezes its logits."
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
                                           final_logit_softcapping=0.5, attn_implementation="eager")).eval()
    adapted = get_peft_model(small(), LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[3, 5], task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    for model in (gemma, adapted):
        with torch.no_grad():
            assert target_nll_sum(model, padded(ROWS[:5])).item() == pytest.approx(nll_sum(model, padded(ROWS[:5])).item(), rel=1e-6)
    history = quiet_train(adapted, ROWS, TrainingConfig(epochs=1), **PADDING_FREE)
    assert len(history) == 4


def test_the_model_is_left_as_it_was_by_the_quick_loss():
    model = small()
    before = model(torch.tensor([ROWS[0]["input_ids"]])).logits
    target_nll_sum(model, padded(ROWS[:2]))
    assert model(torch.tensor([ROWS[0]["input_ids"]])).logits.equal(before) and not model.lm_head._forward_pre_hooks
    with pytest.raises(Exception):
        target_nll_sum(model, dict(padded(ROWS[:2]), input_ids=torch.tensor([[99]])))
    assert not model.lm_head._forward_pre_hooks  # after an error too


@pytest.mark.parametrize("way", [{}, PADDING_FREE], ids=["plain", "fast"])
def test_perplexity_does_not_depend_on_batches_or_order(way):
    model = small().train()
    with torch.no_grad():
        want = sum(nll_sum(model.eval(), padded([r])).item() for r in ROWS) / (tokens := sum(int(count_targets(padded([r]))) for r in ROWS))
    model.train()
    for size in (1, 3, 8, 100):
        for rows in (ROWS, ROWS[::-1]):
            measured = evaluate_nll(model, rows, size, **way)
            assert measured.nll == pytest.approx(want, rel=1e-6) and measured.tokens == tokens and measured.perplexity == math.exp(measured.nll)
    assert model.training and all(p.grad is None for p in model.parameters())
    means = [evaluate_nll(model, [r]).nll for r in ROWS]
    assert sum(means) / len(means) != pytest.approx(want, rel=1e-4)  # the mistake would be seen
    assert repr(training.Nll(math.log(2), 1500)) == "0.6931 nats a token, perplexity 2.000, over 1,500 tokens"


# --- the order of rows

@given(n=st.integers(1, 40), size=st.integers(1, 5), accumulate=st.integers(1, 4), epochs=st.integers(1, 3), seed=st.integers(0, 99), shuffle=st.booleans(), data=st.data())
def test_every_row_once_an_epoch_and_any_start_continues(n, size, accumulate, epochs, seed, shuffle, data):
    s = TrainingConfig(epochs=epochs, batch_size=size, gradient_accumulation_steps=accumulate, seed=seed, shuffle=shuffle)
    steps = list(effective_batches(range(n), s, collate=list))
    assert len(steps) == count_steps(n, s)
    assert all(1 <= len(batches) <= accumulate and all(1 <= len(b) <= size for b in batches) for _, batches in steps)
    flat = [i for _, batches in steps for b in batches for i in b]
    for e in range(epochs):
        assert sorted(flat[e * n:(e + 1) * n]) == list(range(n)) and (shuffle or flat[e * n:(e + 1) * n] == list(range(n)))
    assert [e for e, _ in steps if e.is_integer()] == list(range(1, epochs + 1)) == sorted({math.ceil(e) for e, _ in steps})
    start = data.draw(st.integers(0, len(steps)))
    assert list(effective_batches(range(n), s, collate=list, start=start)) == steps[start:]


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(epoch_order(50, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16 and all(sorted(order) == list(range(50)) for order in orders)


# --- what is refused

@pytest.mark.parametrize("bad, says", [
    (dict(input_ids=[1, 2], labels=[-100, -100]), "row 2 has nothing to learn"),
    (dict(input_ids=[1, 2], labels=[1, -100]), "row 2 has nothing to learn"),  # nothing stands before the first token
    (dict(input_ids=[1], labels=[1]), "row 2 has nothing to learn"),
    (dict(input_ids=[], labels=[]), "row 2 has nothing to learn"),
    (dict(input_ids=[1, 2], labels=[2]), "row 2 has 2 tokens and 1 labels"),
    (dict(input_ids=[1] * 65, labels=[1] * 65), "row 2 has 65 tokens, and the model's context is 64"),
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
    for rows, more, says in [([], {}, "there is no row"), (ROWS, dict(eval_rows=[]), "there is no held-out row")]:
        with pytest.raises(TrainingError, match=says):
            quiet_train(small(), rows, TrainingConfig(), **more)


@pytest.mark.parametrize("wrong, says", [
    (dict(lr_scheduler_type="constant"), "'constant' has no warm-up: choose 'constant_with_warmup'"), (dict(lr_scheduler_type="polynomial"), "choose one of linear, cosine"),
    (dict(epochs=0), "epochs is 0"), (dict(epochs=1.5), "epochs is 1.5"), (dict(batch_size=-1), "batch_size"), (dict(gradient_accumulation_steps="4"), "gradient_accumulation_steps is '4'"),
    (dict(learning_rate=-1e-3), "learning_rate"), (dict(learning_rate=float("nan")), "learning_rate is nan"), (dict(warmup_steps=-1), "warmup_steps"), (dict(max_grad_norm=-1), "max_grad_norm")])
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
    with pytest.raises(TrainingError, match="bf16=False"):
        training._autocast(Old, True)
    training._autocast(Old, False)


# --- what a run tells

def test_the_history_says_what_happened():
    model, seen = small(), []
    history = quiet_train(model, ROWS, TrainingConfig(epochs=2, learning_rate=1e-2), eval_rows=ROWS[:8], watch=lambda history, steps: seen.append((history[-1]["step"], steps)))
    assert list(history["step"]) == list(range(9)) and seen == [(i, 8) for i in range(1, 9)]
    assert list(history[history["eval_nll"].notna()]["epoch"]) == [0, 1, 2] and history["eval_nll"].iloc[-1] == evaluate_nll(model, ROWS[:8]).nll
    assert history["tokens"].sum() == 2 * evaluate_nll(model, ROWS).tokens and not model.training
    assert history["loss"].iloc[1] == pytest.approx(evaluate_nll(small(), [ROWS[i] for i in epoch_order(30, 0)[:8]]).nll, rel=1e-6)
    assert history["loss"].iloc[-1] < history["loss"].iloc[1]


def test_the_seed_decides(tmp_path):
    a, b, c = small(), small(), small()
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        quiet_train(model, ROWS, TrainingConfig(epochs=1, seed=seed, learning_rate=1e-2))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


def test_the_plot_is_drawn_and_updated(monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt
    plt.close("all")
    shown = []
    class Handle:
        def update(self, fig): shown.append(fig)
    monkeypatch.setattr(IPython.display, "display", lambda fig, display_id: shown.append(fig) or Handle())
    quiet_train(small(), ROWS, TrainingConfig(epochs=1), eval_rows=ROWS[:4], watch=LossPlot(every=0))
    assert len(shown) == 4 and len(shown[-1].axes[0].lines) == 2 and shown[-1].axes[0].get_xlabel() and "nats" in shown[-1].axes[0].get_ylabel()
    shown.clear()
    quiet_train(small(), ROWS, TrainingConfig(epochs=1), watch=LossPlot(every=1000))
    assert len(shown) == 2  # the first step and the last
    assert not plt.get_fignums()


def test_importing_brings_no_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, sftlab.training; print(*sys.modules)"], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pandas", "matplotlib"} & set(done.stdout.split())


# --- checkpoints

S = TrainingConfig(epochs=2, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=2)  # 8 steps


def stop_at(step, error=KeyboardInterrupt):
    def watch(history, steps):
        if history[-1]["step"] == step: raise error
    return watch


@pytest.fixture(scope="module")
def straight():
    model = small(attention_dropout=0.2)
    return weights(model), quiet_train(model, ROWS, S, eval_rows=ROWS[:5])


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [5], [6], [7], [8], [3, 4, 7], [3, 3, 3]], ids=str)
def test_stopped_anywhere_it_ends_the_same(stops, straight, tmp_path):
    "With dropout, so that the state of the random numbers counts."
    for stop in stops:
        with pytest.raises(KeyboardInterrupt): quiet_train(small(attention_dropout=0.2), ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path / "run", save_steps=2, watch=stop_at(stop))
        torch.rand(7)  # the process does other things
    model = small(attention_dropout=0.2)
    history = quiet_train(model, ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path / "run", save_steps=2)
    assert same(weights(model), straight[0]) and history.equals(straight[1])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("lost", ["random", "optimizer", "weights", "order"])
def test_each_part_of_a_checkpoint_counts(lost, straight, tmp_path, monkeypatch):
    "The control: without one part of it the weights differ."
    with pytest.raises(KeyboardInterrupt):
        quiet_train(small(attention_dropout=0.2), ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path, save_steps=2, watch=stop_at(5))
    model = small(attention_dropout=0.2)
    if lost == "random":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    if lost == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    if lost == "weights":
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)
    if lost == "order":
        monkeypatch.setattr(training, "effective_batches", lambda rows, s, collate, start: list(effective_batches(rows, s, collate))[:len(list(effective_batches(rows, s, list))) - start])
    quiet_train(model, ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path, save_steps=2)
    assert not same(weights(model), straight[0])


def test_a_finished_run_is_not_run_again(straight, tmp_path):
    quiet_train(small(attention_dropout=0.2), ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path)
    model = small(attention_dropout=0.2)
    def never(*_): raise AssertionError("it computed a step")
    history = quiet_train(model, ROWS, S, eval_rows=ROWS[:5], checkpoints=tmp_path, watch=never)
    assert same(weights(model), straight[0]) and history.equals(straight[1])


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    "Checkpoints after steps 2 and 4 of 8."
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        quiet_train(small(), ROWS, S, checkpoints=folder, save_steps=2, watch=stop_at(5))
    return folder


def go_on(folder, model=None, rows=ROWS, s=S, **more):
    return quiet_train(model or small(), rows, s, checkpoints=folder, **more)


def test_a_checkpoint_is_numbers_and_text(half_way):
    newest = half_way / "step-00000004"
    assert sorted(p.name for p in newest.iterdir()) == ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=newest, check=True, capture_output=True)
    from safetensors.torch import load_file
    for name in ("model", "optimizer"):
        assert load_file(newest / f"{name}.safetensors")
    assert json.loads((newest / "state.json").read_text())["run"]["learning_rate"] == 1e-2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_file_is_named(name, half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / "run")
    path, rng = tmp_path / "run" / "step-00000004" / name, random.Random(name)
    content, before = path.read_bytes(), weights(small())
    def flipped():
        at = rng.randrange(8 * len(content))
        return content[:at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1:]
    for damaged in [content[:length] for length in (0, 1, len(content) // 2, len(content) - 1)] + [content + b"\n", content + content] + [flipped() for _ in range(40)] + [None]:
        path.unlink(missing_ok=True)
        if damaged is not None: path.write_bytes(damaged)
        model = small()
        with pytest.raises(TrainingError, match="step-00000004 is damaged") as caught: go_on(tmp_path / "run", model)
        assert (name in str(caught.value)) and "delete that folder" in str(caught.value) and same(weights(model), before)
    path.write_bytes(content)
    assert len(go_on(tmp_path / "run")) == 8  # whole again


def test_after_the_damaged_one_is_deleted_it_goes_on_from_the_one_before(half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    mine, whole = small(), small()
    go_on(tmp_path / "run", mine)
    quiet_train(whole, ROWS, S)
    assert same(weights(mine), weights(whole))


@pytest.mark.parametrize("change, says", [
    (dict(rows=ROWS[:29]), "rows 30, now 29"), (dict(rows=ROWS[::-1]), "data "), (dict(rows=[*ROWS[:-1], dict(ROWS[-1], labels=ROWS[-1]["input_ids"])]), "data "), (dict(eval_rows=ROWS[:3]), "data "),
    (dict(s=TrainingConfig(**vars(S) | dict(learning_rate=2e-2))), "learning_rate 0.01, now 0.02"), (dict(s=TrainingConfig(**vars(S) | dict(seed=1, epochs=3))), "epochs 2, now 3; seed 0, now 1"),
    (dict(PADDING_FREE), "collate padded, now flatten_rows; loss_fn nll_sum, now target_nll_sum")])
def test_another_run_is_refused_with_what_differs(change, says, half_way):
    with pytest.raises(TrainingError, match="belongs to another run") as caught:
        go_on(half_way, **change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model, says", [(lambda: small(1), "weights"), (lambda: small(num_hidden_layers=3), "parameters"), (lambda: small(hidden_size=64), "parameters"),
                                         (lambda: small().bfloat16(), "weights"), (lambda: small().requires_grad_(False).get_output_embeddings().requires_grad_(True) and small(2), "weights")])
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
        for layer in model.model.layers: layer.mlp.requires_grad_(True)
        with torch.no_grad(): model.model.embed_tokens.weight += shift
        return model
    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path, frozen(), save_steps=2, watch=stop_at(5))
    from safetensors.torch import load_file
    assert all("mlp" in name for name in load_file(tmp_path / "step-00000004" / "model.safetensors"))
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
        with pytest.raises(OSError, match="No space left"): go_on(tmp_path / "run", save_steps=1)
    mine, whole = small(), small()
    go_on(tmp_path / "run", mine)
    quiet_train(whole, ROWS, S)
    assert same(weights(mine), weights(whole)) and not list((tmp_path / "run").glob("*.part"))


PROGRAM = """
    import os, random, signal
    import safetensors.torch, torch, sftlab.training as training
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(1)
    moment = {moment!r}
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    save, replace, rmtree = safetensors.torch.save_file, os.replace, training.shutil.rmtree
    count = {{"save": 0, "replace": 0, "rmtree": 0}}
    def dying(name, function, after):
        def call(*args, **more):
            count[name] += name != "rmtree" or not str(args[0]).endswith(".part")
            hit = moment == name + ("+" if after else "-") and count[name] == 5
            if hit and name == "save" and after: save(*args, **more); os.truncate(args[1], 1000); die()
            if hit and not after: die()
            result = function(*args, **more)
            if hit: die()
            return result
        return call
    after = moment.endswith("+")
    safetensors.torch.save_file, os.replace, training.shutil.rmtree = dying("save", save, after), dying("replace", replace, after), dying("rmtree", rmtree, after)
    model = small()
    training.train(model, make_rows(30), training.TrainingConfig(epochs=8, learning_rate=1e-3), checkpoints={folder!r}, save_steps=3, disable_tqdm=True)
    save({{name: p.detach() for name, p in model.named_parameters()}}, {result!r})
"""


def program(folder, result, moment=""):
    imports, rest = textwrap.dedent(PROGRAM.format(folder=str(folder), result=str(result), moment=moment)).split("torch.set_num_threads", 1)
    source = imports + inspect.getsource(small) + inspect.getsource(make_rows) + "torch.set_num_threads" + rest
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = program(folder / "run", folder / "result.safetensors")
    assert run.wait() == 0, run.stdout.read()
    return (folder / "result.safetensors").read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("moment", ["save-", "save+", "replace-", "replace+", "rmtree-", "rmtree+"])
def test_killed_while_it_writes_it_ends_with_the_same_weights(moment, never_killed, tmp_path):
    "Before, in the middle of and after writing a file, giving a checkpoint its name, removing an old one."
    run = program(tmp_path / "run", tmp_path / "result.safetensors", moment)
    assert run.wait() == -signal.SIGKILL, run.stdout.read()
    assert list((tmp_path / "run").glob("step-*")) and not (tmp_path / "result.safetensors").exists()
    again = program(tmp_path / "run", tmp_path / "result.safetensors")
    assert again.wait() == 0, again.stdout.read()
    assert (tmp_path / "result.safetensors").read_bytes() == never_killed
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_at_any_time_it_ends_with_the_same_weights(never_killed, tmp_path):
    rng, kills = random.Random(0), 0
    for _ in range(3):
        run = program(tmp_path / "run", tmp_path / "result.safetensors")
        newest = lambda: max((p.name for p in (tmp_path / "run").glob("step-" + 8 * "[0-9]")), default="")
        known = newest()
        while newest() == known and run.poll() is None: time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills >= 2
    last = program(tmp_path / "run", tmp_path / "result.safetensors")
    assert last.wait() == 0, last.stdout.read()
    assert (tmp_path / "result.safetensors").read_bytes() == never_killed
