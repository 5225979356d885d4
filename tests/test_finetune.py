"Training through TRL: what is learned, how it is measured, and what is left on disk."
import copy
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl import chat_template_utils

from sftlab.data import to_messages
from sftlab.errors import FinetuneError, OutputError
from sftlab.files.atomic import atomic_dir
from sftlab.finetune import (
    add_lora,
    encode_for_training,
    finetune,
    held_out_nll,
    rows_that_fit,
    stop_tokens,
    training_template,
)
from sftlab.models import load

pytestmark = pytest.mark.slow  # trains


def counting(n):
    output = " ".join(map(str, range(1, n + 1)))
    return to_messages(dict(instruction=f"Count to {n}.", output=output))


# Answers of very different lengths, so that a mean of means would be seen.
ROWS = [counting(n) for n in (1, 2, 3, 5, 8, 13, 21, 34)]
TALK = dict(messages=[
    dict(role="system", content="Be brief."),
    dict(role="user", content="Hi"), dict(role="assistant", content="Hello"),
    dict(role="user", content="Bye"), dict(role="assistant", content="See you")])


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def learned(row):
    return [label for label in row["labels"] if label != -100]


def measured(trainer):
    return [h["held_out_nll"] for h in trainer.state.log_history if "held_out_nll" in h]


# --- which tokens

def test_answers_and_their_ends_are_learned_and_nothing_else(tiny):
    tokenizer = tiny[1]
    (row,) = encode_for_training(tokenizer, [TALK])
    ids, labels = row["input_ids"], row["labels"]
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    assert tokenizer.decode(ids).startswith(begin)
    assert all(label in (t, -100) for t, label in zip(ids, labels)) and len(ids) == len(labels)
    assert tokenizer.decode(learned(row)) == "Hello<|im_end|>See you<|im_end|>"


def test_a_known_template_without_marks_gets_them():
    tokenizer = load("tiny")[1]
    tokenizer.chat_template = chat_template_utils.qwen3_chat_template
    (row,) = encode_for_training(tokenizer, ROWS[1:2])
    text = tokenizer.decode(learned(row))
    assert "1 2<|im_end|>" in text and "Count" not in text
    assert tokenizer.chat_template == chat_template_utils.qwen3_chat_template  # as it was


def test_an_unknown_template_learns_answers_and_one_that_refuses_says_so():
    tokenizer = load("tiny")[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\n' + m.content + '<|im_end|>' }}{% endfor %}")
    (row,) = encode_for_training(tokenizer, [TALK])
    assert tokenizer.decode(learned(row)) == "Hello<|im_end|>See you<|im_end|>"
    assert stop_tokens(tokenizer, [row]) == ["<|im_end|>"]
    tokenizer.chat_template = "{{ raise_exception('system messages are not for me') }}"
    with pytest.raises(FinetuneError, match="row 1: .*system messages are not for me"):
        encode_for_training(tokenizer, ROWS)
    tokenizer.chat_template = None
    with pytest.raises(FinetuneError, match="has no chat template"):
        encode_for_training(tokenizer, ROWS)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"])
def test_answers_that_never_end_are_not_trained_on(tmp_path, template):
    model, tokenizer = load("tiny")
    tokenizer.chat_template = template
    with pytest.raises(FinetuneError, match="row 1: .*would never learn to stop"):
        finetune(model, tokenizer, ROWS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


PICTURES = ("idefics3", "smolvlm", "llava_next")  # their messages are lists of parts
NAMES = [
    name for name, text in vars(chat_template_utils).items()
    if name.endswith("_chat_template") and isinstance(text, str) and not name.startswith(PICTURES)]


TOKENS = r"<[|｜][^|｜<> ]+[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"


def with_published(tokenizer, name):
    "A tokenizer with a template that TRL keeps, and the special tokens that it writes."
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text = getattr(chat_template_utils, name)
    tokenizer.model_max_length = 4096
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "extra_special_tokens": sorted(set(re.findall(TOKENS, text)))})
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_labels_are_those_that_trl_trains_on(tiny, name):
    "Where a template has no marks and no marked twin, TRL has no labels: answers are learned."
    tokenizer = with_published(tiny[1], name)
    talks = [*ROWS, dict(messages=TALK["messages"][1:])]
    if not name.startswith("gemma_"):  # which takes no system message
        talks.append(TALK)
    template = training_template(tokenizer)
    marked = re.search(r"\{%-?\s*generation\b", template) is not None
    for talk, row in zip(talks, encode_for_training(tokenizer, talks)):
        theirs = tokenizer.apply_chat_template(
            talk["messages"], chat_template=template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=marked)
        assert row["input_ids"] == theirs["input_ids"]
        said = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
        if marked:
            assert [label != -100 for label in row["labels"]] == list(
                map(bool, theirs["assistant_masks"]))
        else:
            ends = tokenizer.decode(learned(row))
            assert re.fullmatch("<[^<>]+>".join(map(re.escape, said)) + "<[^<>]+>", ends)


def test_the_library_has_templates_to_compare_with():
    assert len(NAMES) > 20


def test_rows_fit_as_long_as_a_learned_token_is_left(tiny):
    encoded = encode_for_training(tiny[1], ROWS)
    for limit in (1, 20, 30, 60, 1000):
        fit = [
            talk for talk, row in zip(ROWS, encoded)
            if any(label != -100 for label in row["labels"][1:limit])]
        longer = sum(len(row["input_ids"]) > limit for row in encoded)
        assert rows_that_fit(tiny[1], ROWS, limit) == (fit, longer)
    begins = encoded[0]["labels"].index(learned(encoded[0])[0])
    assert rows_that_fit(tiny[1], ROWS[:1], begins) == ([], 1)
    assert rows_that_fit(tiny[1], ROWS[:1], begins + 1) == (ROWS[:1], 1)


# --- the held-out loss

def by_hand(model, tokenizer, rows):
    "The losses that the library itself computes, a row at a time, weighted by tokens."
    total = count = 0
    for row in encode_for_training(tokenizer, rows):
        n = sum(label != -100 for label in row["labels"][1:])
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            total += n * model(ids, labels=labels).loss.item()
        count += n
    return total / count


def test_held_out_loss_is_weighted_by_tokens(tiny):
    want = by_hand(*tiny, ROWS)
    for size in (1, 2, 3, 8, 100):
        assert math.isclose(held_out_nll(*tiny, ROWS, size), want, rel_tol=1e-6)
    assert math.isclose(held_out_nll(*tiny, ROWS[::-1]), want, rel_tol=1e-6)
    per_row = [by_hand(*tiny, [row]) for row in ROWS]
    assert not math.isclose(sum(per_row) / len(ROWS), want, rel_tol=1e-2)  # would be seen


def test_held_out_loss_is_over_rows_cut_to_the_context(tiny):
    model, tokenizer = tiny
    long = counting(1000)
    (row,) = encode_for_training(tokenizer, [long])
    limit = model.config.max_position_embeddings
    assert len(row["input_ids"]) > limit
    cut = {name: torch.tensor([ids[:limit]]) for name, ids in row.items()}
    with torch.no_grad():
        want = model(**cut).loss.item()
    assert math.isclose(held_out_nll(*tiny, [long]), want, rel_tol=1e-6)


def test_held_out_loss_leaves_the_model_as_it_was(tiny):
    tiny[0].train()
    held_out_nll(*tiny, ROWS[:2])
    assert tiny[0].training
    tiny[0].eval()
    held_out_nll(*tiny, ROWS[:2])
    assert not tiny[0].training


def test_nothing_to_measure_is_an_error(tiny):
    with pytest.raises(FinetuneError, match="nothing to measure"):
        held_out_nll(*tiny, [to_messages(dict(instruction="very " * 2000, output="long"))])


# --- training

def test_lora_trains_an_adapter_that_plain_peft_loads(tmp_path):
    model, tokenizer = load("tiny")
    base = {name: p.clone() for name, p in model.named_parameters()}
    out = tmp_path / "adapter"
    trainer = finetune(model, tokenizer, ROWS, out, "lora", epochs=3, eval_rows=ROWS[:2])
    log = [h for h in trainer.state.log_history if "held_out_nll" in h]
    assert [h["epoch"] for h in log] == [0, 1, 2, 3]
    assert log[-1]["held_out_nll"] < log[0]["held_out_nll"]
    assert {f.name for f in out.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "trainable_tokens" in n for n in trained)
    assert any("trainable_tokens" in n for n in trained)
    fresh = load("tiny")[0]
    assert all(torch.equal(p, base[n]) for n, p in fresh.named_parameters())
    ids = torch.tensor([encode_for_training(tokenizer, ROWS[:1])[0]["input_ids"]])
    with torch.no_grad():
        want, plain = trainer.model(ids).logits, fresh(ids).logits
        got = PeftModel.from_pretrained(fresh, out).eval()(ids).logits
    assert torch.equal(want, got) and not torch.allclose(want, plain, atol=0.1)
    config = PeftModel.from_pretrained(load("tiny")[0], out).peft_config["default"]
    assert Path(config.base_model_name_or_path).is_absolute()
    with pytest.raises(FinetuneError, match="has an adapter already"):
        finetune(*load(str(out)), ROWS, tmp_path / "again", "lora")


def test_qlora_keeps_the_adapter_in_float32_and_the_weights_in_four_bits(tmp_path):
    from bitsandbytes.nn import Linear4bit
    model, tokenizer = load("tiny", four_bit=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    out = tmp_path / "out"
    trainer = finetune(model, tokenizer, ROWS, out, "qlora", epochs=2, eval_rows=ROWS[:2])
    assert measured(trainer)[-1] < measured(trainer)[0]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 28 and all(m.weight.dtype == torch.uint8 for m in layers)
    packed = [p for p in before.values() if p.dtype == torch.uint8]
    assert len(packed) == 28
    assert all(any(torch.equal(p, m.weight) for m in layers) for p in packed)


def test_answering_in_between_leaves_the_gradients_of_qlora_as_they_are():
    """On some processors bitsandbytes repacks the weights for answering, and from then on passes no
    gradient through them."""
    model, tokenizer = load("tiny", four_bit=True)
    model = add_lora(model, tokenizer)
    ids = torch.tensor([encode_for_training(tokenizer, ROWS[:1])[0]["input_ids"]])

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    after = gradients()
    assert all(torch.equal(g, after[n]) for n, g in before.items())
    assert any(g.abs().max() > 0 for g in before.values())


@pytest.mark.parametrize("method, four_bit, message", [
    ("full", True, "use the method qlora"),
    ("qlora", False, r"load\(…, four_bit=True\)")])
def test_methods_and_bits_that_do_not_go_together(tmp_path, method, four_bit, message):
    with pytest.raises(FinetuneError, match=message):
        finetune(*load("tiny", four_bit=four_bit), ROWS, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_full_training_gives_a_model_that_stops_and_the_seed_decides(tmp_path):
    weights = []
    for seed in (0, 0, 1):
        model, tokenizer = load("tiny")
        out = tmp_path / f"run{len(weights)}"
        finetune(model, tokenizer, ROWS * 2, out, epochs=1, seed=seed)
        saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        weights.append(saved.state_dict())
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())
    assert any(not torch.equal(w, weights[2][n]) for n, w in weights[0].items())
    assert not list(out.glob("*.bin")) and not list(out.glob("*.pt"))
    assert list(tmp_path.glob(".*")) == []
    stops = GenerationConfig.from_pretrained(out).eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops


@pytest.mark.parametrize("method, trained", [("full", "embed_tokens"), ("lora", "lora_")])
def test_settings_for_large_models_train_too(tmp_path, monkeypatch, method, trained):
    """Row by row with gradients added up, activations computed anew, smaller learning rates: with
    the tiny model for a stand-in."""
    monkeypatch.setattr("sftlab.finetune.is_tiny", lambda model: False)
    model, tokenizer = load("tiny")
    trainer = finetune(
        model, tokenizer, ROWS * 2, tmp_path / "out", method, epochs=2, learning_rate=1e-3,
        eval_rows=ROWS[:2])
    assert trainer.state.global_step == 4 and model.is_gradient_checkpointing
    names = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    assert not any("trainable_tokens" in n for n in names)
    assert measured(trainer)[-1] < measured(trainer)[0]
    assert any(trained in n for n, learns in names.items() if learns)


def test_broken_training_leaves_nothing(tmp_path):
    class Poison(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **_):
            next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(FinetuneError, match="learning rate below 0.0003"):
        finetune(*load("tiny"), ROWS[:2], tmp_path / "out", epochs=1, callbacks=[Poison()])
    assert list(tmp_path.iterdir()) == []


# --- the folder of the result

def whole(path, overwrite=False):  # as `finetune` and `sftlab train` ask for it
    return atomic_dir(path, overwrite, mark="run.json")


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        finetune(None, load("tiny")[1], ROWS, tmp_path / "out")
    with pytest.raises(OutputError, match="not an empty folder"):
        with whole(tmp_path / "out" / "mine.txt"):
            pass
    with pytest.raises(OutputError, match="cannot be made"):
        with whole(tmp_path / "out" / "mine.txt" / "deeper"):
            pass
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_finished_run_is_not_touched(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(OutputError, match="holds a finished run"):
        finetune(None, load("tiny")[1], ROWS, tmp_path)
    assert (tmp_path / "run.json").read_text() == "{}"


def test_a_folder_appears_whole(tmp_path, monkeypatch):
    for name in ("a", "empty", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(OutputError, match="the folder you are in"):
        with whole("."):
            pass
    paths = (tmp_path / "deep" / "deeper", tmp_path / "empty", tmp_path / "link", Path("new"))
    for out in paths:
        target = out.resolve()
        with whole(out) as partial:
            (partial / "x").write_text("x")
            assert not (target / "x").exists()
        assert [f.name for f in target.iterdir()] == ["x"] and not list(target.parent.glob(".*"))


BEGIN = "import os, sys, time; from sftlab.files.atomic import atomic_dir\n"
KILLED = BEGIN + (
    "with atomic_dir(sys.argv[1]) as outer:\n"
    "    with atomic_dir(outer / 'made') as inner:\n"  # as `sftlab train` calls `finetune`
    "        (inner / 'half').touch(); os.kill(os.getpid(), 9)")
WAITS = BEGIN + "with atomic_dir(sys.argv[1]): print('in', flush=True); time.sleep(60)"


def test_a_killed_process_leaves_no_folder_that_looks_finished(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"])
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert all(f.name.startswith(".") for f in tmp_path.iterdir()) and os.listdir(tmp_path)
    with whole(tmp_path / "out") as partial:
        (partial / "x").touch()  # and the next run is not hindered
    assert os.listdir(tmp_path) == ["out"]  # and nothing is left of the killed one
    assert os.listdir(tmp_path / "out") == ["x"]


def test_two_runs_do_not_write_one_folder(tmp_path):
    with subprocess.Popen(
            [sys.executable, "-c", WAITS, tmp_path / "out"], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"in\n"
        before = os.listdir(tmp_path)
        says = f"another run .process {first.pid}. is writing it"
        with pytest.raises(OutputError, match=says):
            with whole(tmp_path / "out"):
                pass
        assert os.listdir(tmp_path) == before
        first.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_run_goes_on_is_not_removed(tmp_path, overwrite):
    with pytest.raises(OutputError):
        with whole(tmp_path / "out", overwrite):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").touch()
    assert (tmp_path / "out" / "mine.txt").exists()
