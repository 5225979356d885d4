"""`preflight` and `preflight_trainer`: every fault by its name, no false alarm, and no trace of the
look in what is trained afterwards."""
import copy
import random

import numpy as np
import pytest
import torch
from calling import call
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from sftlab import preflight as module
from sftlab.errors import TrainingError
from sftlab.finetune import add_lora
from sftlab.lora import DoRALinear, inject, train_tokens
from sftlab.masking import encode_rows
from sftlab.models import load
from sftlab.packing import PACKED, collate_packed, pack_rows
from sftlab.preflight import preflight, preflight_trainer
from sftlab.quantization import quantize_model
from sftlab.tiny.world import as_messages, examples
from sftlab.training import PADDING_FREE, TrainingConfig, padded, train

pytestmark = pytest.mark.slow  # trains, and makes trainers

TALKS = [as_messages(e) for e in examples("train", 20)]
SETTINGS = TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tiny(): return load("tiny")


@pytest.fixture
def model(tiny): return copy.deepcopy(tiny[0])


@pytest.fixture(scope="module")
def tokenizer(tiny): return tiny[1]


@pytest.fixture(scope="module")
def rows(tokenizer): return encode_rows(tokenizer, TALKS)


@pytest.fixture(scope="module")
def packed(rows): return pack_rows(rows, 128)[0]


def by_trl(model, tokenizer, folder, data=TALKS, **settings):
    args = SFTConfig(str(folder), **dict(
        assistant_only_loss=True, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=2, max_length=128, num_train_epochs=1) | settings)
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(data),
                      processing_class=tokenizer)


def by_trainer(model, tokenizer, folder, rows, collator, **settings):
    args = TrainingArguments(str(folder), **dict(
        use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        num_train_epochs=1) | settings)
    return Trainer(model, args, data_collator=collator, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer)


def verdicts(report): return {check.name: check.verdict for check in report.checks}


def problems(report, name):
    "What is wrong, in a line; nothing else is wrong."
    [check] = [check for check in report.checks if check.problems]
    assert check.name == name, report
    return "; ".join(check.texts())


# --- what is right passes

ALL = dict(template="ok", labels="ok", isolation="not checked", memory="ok", gradient="ok")
APART = ALL | dict(isolation="ok")
PEFT = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
MODELS = dict(
    full=lambda model, tokenizer: model,
    lora=lambda model, tokenizer: inject(model),
    lora_and_tokens=lambda model, tokenizer: train_tokens(inject(model), [1, 2]),
    dora=lambda model, tokenizer: inject(model, layer=DoRALinear),
    qlora=lambda model, tokenizer: inject(quantize_model(model)),
    peft=lambda model, tokenizer: get_peft_model(model, PEFT),
    peft_and_tokens=lambda model, tokenizer: add_lora(model, tokenizer))


@pytest.mark.parametrize("name", MODELS)
def test_a_clean_model_passes(name, model, tokenizer, rows):
    report = preflight(MODELS[name](model, tokenizer), tokenizer, rows, SETTINGS)
    assert verdicts(report) == ALL, report
    assert report.ok and report.assert_ok() is None
    method = "qlora" if name == "qlora" else "full" if name == "full" else "lora"
    assert report.checks[3].said.endswith(method)


def test_lora_is_right_before_its_first_step_and_after(model, tokenizer, rows):
    inject(model)
    train(model, rows, SETTINGS, disable_tqdm=True)
    assert preflight(model, tokenizer, rows, SETTINGS).ok


def test_padding_of_a_single_place_is_no_fault(model, tokenizer, rows):
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    pairs = [(a, b) for a, b in zip(ordered, ordered[1:])
             if len(b["input_ids"]) == len(a["input_ids"]) + 1]
    report = preflight(model, tokenizer, [*pairs[0]], SETTINGS)  # filled up with another pad token
    assert verdicts(report) == ALL, report


def test_all_ways_to_make_a_batch_pass(model, tokenizer, rows, packed):
    assert verdicts(preflight(model, tokenizer, rows, SETTINGS, **PADDING_FREE)) == APART
    assert verdicts(preflight(model, tokenizer, packed, SETTINGS, **PACKED)) == APART


def test_bfloat16_passes(model, tokenizer, packed):
    s = TrainingConfig(batch_size=2, bf16=True)
    assert verdicts(preflight(model, tokenizer, packed, s, **PACKED)) == APART
    half = copy.deepcopy(model).bfloat16()
    assert preflight(half, tokenizer, packed, SETTINGS, **PACKED).ok


@pytest.mark.parametrize("settings, expected", [
    ({}, ALL), (dict(packing=True), APART), (dict(padding_free=True, max_length=None), APART),
    (dict(gradient_checkpointing=False), ALL)], ids=str)
def test_a_clean_trl_trainer_passes(settings, expected, model, tokenizer, tmp_path):
    trainer = by_trl(model, tokenizer, tmp_path, **settings)
    assert verdicts(preflight_trainer(trainer)) == expected
    assert verdicts(preflight_trainer(trainer, TALKS)) == expected


def test_trl_with_an_adapter_passes(model, tokenizer, tmp_path):
    trainer = by_trl(get_peft_model(model, PEFT), tokenizer, tmp_path, packing=True)
    assert verdicts(preflight_trainer(trainer)) == APART


def test_a_clean_plain_trainer_passes(model, tokenizer, rows, tmp_path):
    trainer = by_trainer(model, tokenizer, tmp_path, rows, DataCollatorForSeq2Seq(tokenizer))
    assert verdicts(preflight_trainer(trainer)) == ALL
    trainer.processing_class = None
    found = verdicts(preflight_trainer(trainer))
    assert found == ALL | dict.fromkeys(("template", "labels"), "not checked")


# --- each fault is named

def test_a_template_without_generation_markers(model, tokenizer, rows):
    bare = copy.copy(tokenizer)
    bare.chat_template = tokenizer.chat_template.replace(
        "{% generation %}", "").replace("{% endgeneration %}", "")
    assert bare.chat_template != tokenizer.chat_template
    assert "no generation markers" in problems(preflight(model, bare, rows), "template")


def shifted(row): return dict(row, labels=row["labels"][1:] + [-100])
def without_stop(row): return dict(row, labels=row["labels"][:-2] + [-100, -100])


@pytest.mark.parametrize("change, cause, stops", [
    (shifted, "shifted labels", True), (without_stop, "stop token not learned", False)])
def test_faults_of_labels(change, cause, stops, model, tokenizer, rows):
    report = preflight(model, tokenizer, [change(row) for row in rows])
    assert problems(report, "labels").startswith(cause)
    assert [p.stops for p in report.checks[1].problems] == [stops]


def test_faults_of_labels_in_a_trainer(model, tokenizer, rows, tmp_path):
    wrong = [shifted(row) for row in rows]
    trainer = by_trainer(model, tokenizer, tmp_path, wrong, DataCollatorForSeq2Seq(tokenizer))
    assert "shifted labels" in problems(preflight_trainer(trainer), "labels")
    trainer = by_trl(model, tokenizer, tmp_path, assistant_only_loss=False)
    assert "everything learned" in problems(preflight_trainer(trainer), "labels")


def test_packed_rows_with_the_cache_on(model, tokenizer, packed, tmp_path):
    keep = dict(remove_unused_columns=False)
    trainer = by_trainer(model, tokenizer, tmp_path, packed, collate_packed, use_cache=True, **keep)
    assert "see their neighbours" in problems(preflight_trainer(trainer), "isolation")
    trainer = by_trainer(model, tokenizer, tmp_path, packed, collate_packed, use_cache=False,
                         **keep)
    assert verdicts(preflight_trainer(trainer)) == APART


def test_a_trainer_that_drops_what_says_where_documents_begin(model, tokenizer, packed, tmp_path):
    trainer = by_trainer(model, tokenizer, tmp_path, packed, collate_packed)
    assert verdicts(preflight_trainer(trainer))["isolation"] == "fault"


def test_packed_rows_with_an_ordinary_collator(model, tokenizer, packed):
    found = verdicts(preflight(model, tokenizer, packed, SETTINGS, collate=padded))
    assert found["isolation"] == "fault"


def test_a_batch_too_large_for_the_card(model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(module, "_card_gb", lambda device: 0.08)
    report = preflight(model, tokenizer, rows, TrainingConfig(batch_size=20))
    assert "a batch size of" in problems(report, "memory")
    monkeypatch.setattr(module, "_card_gb", lambda device: 80.0)
    assert preflight(model, tokenizer, rows, TrainingConfig(batch_size=20)).ok


def test_a_frozen_layer(model, tokenizer, rows):
    model.model.layers[1].requires_grad_(False)
    said = problems(preflight(model, tokenizer, rows), "gradient")
    assert said.startswith("frozen, and should train: 9 of") and "model.layers.1." in said
    model.requires_grad_(False)
    report = preflight(model, tokenizer, rows)
    assert "nothing is trained" in problems(report, "gradient")
    assert [p.stops for p in report.checks[4].problems] == [True]


@pytest.mark.parametrize("name", ["lora", "peft"])
def test_a_layer_next_to_the_adapter_that_trains(name, model, tokenizer, rows):
    adapted = MODELS[name](model, tokenizer)
    next(m for m in adapted.modules() if "RMSNorm" in type(m).__name__).requires_grad_(True)
    said = problems(preflight(adapted, tokenizer, rows), "gradient")
    assert "trained next to the adapter: 1 of" in said and "layernorm" in said


def test_half_of_an_adapter_is_frozen(model, tokenizer, rows):
    inject(model)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.requires_grad_(False)
    said = problems(preflight(model, tokenizer, rows), "gradient")
    assert "frozen, and should train: 28 of" in said
    assert "without a gradient: 28 of 28" in said  # A learns nothing while B is zero


def test_a_layer_that_no_gradient_reaches(model, tokenizer, rows):
    layer = inject(model).model.layers[2].mlp.up_proj
    layer.forward = lambda x: layer.base(x)  # past its adapter
    said = problems(preflight(model, tokenizer, rows), "gradient")
    assert said.startswith("without a gradient: 2 of 56 trained parameters: model.layers.2.mlp.up")


def test_a_weight_that_is_no_number(model, tokenizer, rows):
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[1, 1] = float("nan")
    report = preflight(model, tokenizer, rows)
    said = problems(report, "gradient")
    assert "1 of the weights: model.layers.3.mlp.down_proj.weight" in said and "loss is nan" in said
    assert all(p.stops for p in report.checks[4].problems)


def test_a_forward_pass_that_changes_weights(model, tokenizer, rows):
    def change(module, args): module.weight.data.mul_(1.01)
    model.model.norm.register_forward_pre_hook(change)
    assert "change weights" in problems(preflight(model, tokenizer, rows), "gradient")


# --- what cannot be checked

def test_a_check_that_fails_is_told_in_one_line(model, tokenizer, rows, monkeypatch):
    def broken(some): raise KeyError("what\never")
    report = preflight(model, tokenizer, rows, collate=broken)
    assert not report.ok and verdicts(report)["template"] == "ok"
    for check in report.checks[1:]:
        assert check.texts()[0].startswith("this check failed: KeyError: 'what\\never'")
    with pytest.raises(TrainingError, match="labels: this check failed") as error:
        report.assert_ok()
    assert "\n" not in str(error.value)


def test_a_model_without_an_estimate_is_not_checked_for_memory(model, tokenizer, rows):
    model.config.model_type = "no_such_kind"
    report = preflight(model, tokenizer, rows)
    assert verdicts(report) == ALL | dict(memory="not checked") and report.ok


def test_rows_that_train_would_refuse_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(TrainingError, match="encode_rows"):
        preflight(model, tokenizer, TALKS)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TrainingError, match="no train_dataset"):
        preflight_trainer(Trainer(model, args))


# --- the report

def test_the_report_in_text_and_in_html(model, tokenizer, rows):
    def broken(some): raise ValueError("<b>&")
    report = preflight(model, tokenizer, rows, collate=broken)
    assert "<b>&" in repr(report) and "<b>&" not in report._repr_html_()
    assert "&lt;b&gt;&amp;" in report._repr_html_()
    lines = repr(preflight(model, tokenizer, rows)).splitlines()
    assert lines[0] == "Preflight: no faults" and [line[0] for line in lines[1:]] == list("✓✓–✓✓")


# --- no trace is left

def state_of(model):
    grads = [p.grad for p in model.parameters()]
    return ([p.detach().clone() for p in model.parameters()], [m.training for m in model.modules()],
            grads, random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist())


def same(one, other):
    weights = all(torch.equal(a, b) for a, b in zip(one[0], other[0]))
    return weights and one[1:] == other[1:]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training, model, tokenizer, rows, tmp_path):
    adapted = inject(model, lora_dropout=0.5).train(training)
    adapted.model.layers[0].train(not training)
    before = state_of(adapted)
    preflight(adapted, tokenizer, rows, SETTINGS)
    assert same(before, state_of(adapted))
    trainer = by_trl(load("tiny")[0], tokenizer, tmp_path, packing=True)
    before = state_of(trainer.model)
    preflight_trainer(trainer)
    assert same(before, state_of(trainer.model)) and before[2] == [None] * len(before[2])
    assert not trainer._metrics["train"] and not trainer._total_train_tokens


def test_nothing_is_changed_where_a_check_fails(model, tokenizer, rows):
    def half(model, batch): raise ValueError("no")
    before = state_of(model)
    assert not preflight(model, tokenizer, rows, SETTINGS, **PADDING_FREE | dict(loss_fn=half)).ok
    assert same(before, state_of(model))


def test_our_loop_trains_the_same_afterwards(model, tokenizer, rows):
    inject(model, lora_dropout=0.1)
    models = [model, copy.deepcopy(model)]
    preflight(models[0], tokenizer, rows, SETTINGS)
    logs = [train(m, rows, SETTINGS, disable_tqdm=True) for m in models]
    assert logs[0].equals(logs[1])
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))


@pytest.mark.parametrize("settings", [{}, dict(packing=True), dict(gradient_checkpointing=False)],
                         ids=str)
def test_a_trainer_trains_the_same_afterwards_and_gets_the_rows_that_were_looked_at(
        settings, tiny, tokenizer, tmp_path, monkeypatch):
    seen, got, weights, logs = [], [], [], []
    pad_id = module._pad_id
    monkeypatch.setattr(module, "_pad_id", lambda b, *more: seen.extend(b) or pad_id(b, *more))
    for look in (True, False):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
        set_seed(3)
        adapted = get_peft_model(copy.deepcopy(tiny[0]), config)
        trainer = by_trl(adapted, tokenizer, tmp_path, logging_steps=1, **settings)
        if look:
            assert preflight_trainer(trainer).ok
        loss = trainer.compute_loss
        def spied(model, inputs, *more, _loss=loss, **options):
            got.append(inputs["input_ids"].clone())
            return _loss(model, inputs, *more, **options)
        trainer.compute_loss = spied
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters()])
        logs.append([entry.get("loss") for entry in trainer.state.log_history])
    assert all(torch.equal(a, b) for a, b in zip(*weights)) and logs[0] == logs[1]
    assert len(seen) >= 3
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(seen, got))


# --- in the program

@pytest.fixture
def chats(tmp_path):
    import json
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    return "train", "--data", tmp_path / "chats.jsonl", "--epochs", 0.5, "--output", tmp_path / "x"


def test_a_run_says_what_was_checked(chats):
    status, said, err = call(*chats)
    assert (status, err) == (0, "")
    assert "checks   ✓ template  ✓ labels  – isolation  ✓ memory  ✓ gradient\nmemory   0." in said
    assert "warning  " not in said.split("checks ")[1].split("loss ")[0]


def broken_report(stops):
    problem = module.Problem("labels are odd", "look", stops)
    return module.PreflightReport((module.Check("labels", "", (problem,)),))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=str)
def test_what_nobody_means_stops_a_run_and_a_warning_does_not(dry, chats, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "preflight_trainer", lambda trainer: broken_report(True))
    status, said, err = call(*chats, *dry)
    assert status == 1 and err == "sftlab: labels: labels are odd. To fix: look\n"
    assert "checks   ✗ labels" in said and not (tmp_path / "x").exists()
    monkeypatch.setattr(module, "preflight_trainer", lambda trainer: broken_report(False))
    status, said, err = call(*chats, *dry)
    assert (status, err) == (0, "") and "warning  labels: labels are odd. To fix: look" in said
