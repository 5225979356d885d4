"Training through TRL: what is learned, how it is measured, and what is left on disk."
import math, os, signal, subprocess, sys
from pathlib import Path
import pytest
from sftlab.data import to_messages
from sftlab.finetune import FinetuneError, add_lora, encode, finetune, held_out_nll, training_template, whole_folder
from sftlab.models import load

# Answers of very different lengths, so that a mean of means would be seen.
ROWS = [to_messages(dict(instruction=f"Count to {n}.", output=" ".join(map(str, range(1, n + 1))))) for n in (1, 2, 3, 5, 8, 13, 21, 34)]

@pytest.fixture(scope="module")
def tiny():
    return load("tiny")

def test_answers_and_their_ends_are_learned_and_nothing_else(tiny):
    tokenizer = tiny[1]
    row = dict(messages=[dict(role="system", content="Be brief."), dict(role="user", content="Hi"), dict(role="assistant", content="Hello"),
                         dict(role="user", content="Bye"), dict(role="assistant", content="See you")])
    (ids, labels), = encode(tokenizer, [row])
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert all(l in (t, -100) for t, l in zip(ids, labels)) and len(ids) == len(labels)
    assert tokenizer.decode([l for l in labels if l != -100]) == "Hello<|im_end|>See you<|im_end|>"

def test_a_known_template_without_marks_gets_them(tiny):
    from trl.chat_template_utils import qwen3_chat_template
    tokenizer = load("tiny")[1]
    tokenizer.chat_template = qwen3_chat_template
    (_, labels), = encode(tokenizer, ROWS[1:2])
    learned = tokenizer.decode([l for l in labels if l != -100])
    assert "1 2<|im_end|>" in learned and "Count" not in learned

def test_an_unknown_template_learns_all_and_none_is_refused():
    tokenizer = load("tiny")[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    (ids, labels), = encode(tokenizer, ROWS[:1])
    assert ids == labels and not training_template(tokenizer)[1]
    tokenizer.chat_template = "{{ raise_exception('system messages are not for me') }}"
    with pytest.raises(FinetuneError, match="row 1: .*system messages are not for me"):
        encode(tokenizer, ROWS)
    tokenizer.chat_template = None
    with pytest.raises(FinetuneError, match="has no chat template"):
        encode(tokenizer, ROWS)

def by_hand(model, tokenizer, rows):
    "Sum of the losses that the library itself computes, a row at a time, and the tokens they are over."
    import torch
    total = count = 0
    for ids, labels in encode(tokenizer, rows):
        n = sum(l != -100 for l in labels[1:])
        with torch.no_grad():
            total += n * model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        count += n
    return total / count

def test_held_out_loss_is_weighted_by_tokens(tiny):
    want = by_hand(*tiny, ROWS)
    for size in (1, 2, 3, 8, 100):
        assert math.isclose(held_out_nll(*tiny, ROWS, size), want, rel_tol=1e-5)
    assert math.isclose(held_out_nll(*tiny, ROWS[::-1]), want, rel_tol=1e-5)
    per_row = [by_hand(*tiny, [row]) for row in ROWS]
    assert not math.isclose(sum(per_row) / len(ROWS), want, rel_tol=1e-2) # the mistake would be seen

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

def test_lora_trains_an_adapter_that_plain_peft_loads(tmp_path):
    import torch
    from peft import PeftModel
    model, tokenizer = load("tiny")
    base = {name: p.clone() for name, p in model.named_parameters()}
    out = tmp_path / "adapter"
    trainer = finetune(model, tokenizer, ROWS, out, "lora", epochs=3, eval_rows=ROWS[:2])
    log = trainer.state.log_history
    measured = [(h["epoch"], h["held_out_nll"]) for h in log if "held_out_nll" in h]
    assert [epoch for epoch, _ in measured] == [0, 1, 2, 3] and measured[-1][1] < measured[0][1]
    assert {f.name for f in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n or "trainable_tokens" in n for n in trained) and any("trainable_tokens" in n for n in trained)
    fresh = load("tiny")[0]
    assert all(torch.equal(p, base[n]) for n, p in fresh.named_parameters())
    ids = torch.tensor([encode(tokenizer, ROWS[:1])[0][0]])
    with torch.no_grad():
        want, plain = trainer.model(ids).logits, fresh(ids).logits
        got = PeftModel.from_pretrained(fresh, out).eval()(ids).logits
    assert torch.equal(want, got) and not torch.allclose(want, plain, atol=0.1)
    assert Path(PeftModel.from_pretrained(load("tiny")[0], out).peft_config["default"].base_model_name_or_path).is_absolute()
    with pytest.raises(FinetuneError, match="has an adapter already"):
        finetune(*load(str(out)), ROWS, tmp_path / "again", "lora")

def test_qlora_keeps_the_adapter_in_float32_and_the_weights_in_four_bits(tmp_path):
    import torch
    from bitsandbytes.nn import Linear4bit
    model, tokenizer = load("tiny", four_bit=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = finetune(model, tokenizer, ROWS, tmp_path / "out", "qlora", epochs=2, eval_rows=ROWS[:2])
    measured = [h["held_out_nll"] for h in trainer.state.log_history if "held_out_nll" in h]
    assert measured[-1] < measured[0]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 28 and all(m.weight.dtype == torch.uint8 for m in layers)
    assert all(any(torch.equal(p, m.weight) for m in layers) for p in before.values() if p.dtype == torch.uint8)

def test_answering_in_between_leaves_the_gradients_of_qlora_as_they_are():
    "On some processors bitsandbytes repacks the weights for answering, and from then on passes no gradient through them."
    import torch
    model, tokenizer = load("tiny", four_bit=True)
    model, ids = add_lora(model, tokenizer), torch.tensor([encode(tokenizer, ROWS[:1])[0][0]])
    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    before = gradients()
    with torch.no_grad():
        model.eval()(ids)
    after = gradients()
    assert all(torch.equal(g, after[n]) for n, g in before.items()) and any(g.abs().max() > 0 for g in before.values())

def test_methods_and_bits_that_do_not_go_together(tmp_path):
    for method, four_bit, message in (("full", True, "use the method qlora"), ("qlora", False, r"load\(…, four_bit=True\)")):
        with pytest.raises(FinetuneError, match=message):
            finetune(*load("tiny", four_bit=four_bit), ROWS, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()

def test_full_training_gives_a_model_that_stops_and_the_seed_decides(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    weights = []
    for seed in (0, 0, 1):
        model, tokenizer = load("tiny")
        out = tmp_path / f"run{len(weights)}"
        finetune(model, tokenizer, ROWS * 2, out, epochs=1, seed=seed)
        weights.append(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict())
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())
    assert any(not torch.equal(w, weights[2][n]) for n, w in weights[0].items())
    assert not list(out.glob("*.bin")) and not list(out.glob("*.pt")) and list(tmp_path.glob(".*")) == []
    stops = GenerationConfig.from_pretrained(out).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])

@pytest.mark.parametrize("method, trained", [("full", "embed_tokens"), ("lora", "lora_")])
def test_settings_for_large_models_train_too(tmp_path, monkeypatch, method, trained):
    "Row by row with gradients added up, activations computed anew, smaller learning rates: with the tiny model for a stand-in."
    monkeypatch.setattr("sftlab.finetune.is_tiny", lambda model: False)
    model, tokenizer = load("tiny")
    trainer = finetune(model, tokenizer, ROWS * 2, tmp_path / "out", method, epochs=2, learning_rate=1e-3, eval_rows=ROWS[:2])
    assert trainer.state.global_step == 4 and model.is_gradient_checkpointing
    assert not any("trainable_tokens" in n for n, _ in trainer.model.named_parameters())
    measured = [h["held_out_nll"] for h in trainer.state.log_history if "held_out_nll" in h]
    assert measured[-1] < measured[0] and any(trained in n for n, p in trainer.model.named_parameters() if p.requires_grad)

def test_broken_training_leaves_nothing(tmp_path):
    from transformers import TrainerCallback
    class Poison(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **_):
            next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(FinetuneError, match="learning rate below 0.0003"):
        finetune(*load("tiny"), ROWS[:2], tmp_path / "out", epochs=1, callbacks=[Poison()])
    assert list(tmp_path.iterdir()) == []

def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FinetuneError, match="not an empty folder"):
        finetune(None, load("tiny")[1], ROWS, tmp_path / "out")
    with pytest.raises(FinetuneError, match="not an empty folder"), whole_folder(tmp_path / "out" / "mine.txt"):
        pass
    with pytest.raises(FinetuneError, match="cannot be made"), whole_folder(tmp_path / "out" / "mine.txt" / "deeper"):
        pass
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "mine.txt"] and (tmp_path / "out" / "mine.txt").read_text() == "mine"

def test_a_folder_appears_whole(tmp_path, monkeypatch):
    for name in ("a", "empty", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(FinetuneError, match="the folder you are in"), whole_folder("."):
        pass
    for out in (tmp_path / "deep" / "deeper", tmp_path / "empty", tmp_path / "link", Path("new")):
        target = out.resolve()
        with whole_folder(out) as partial:
            (partial / "x").write_text("x")
            assert not (target / "x").exists()
        assert [f.name for f in target.iterdir()] == ["x"] and not list(target.parent.glob(".*"))

def test_a_killed_process_leaves_no_folder_that_looks_finished(tmp_path):
    code = "import os, sys; from sftlab.finetune import whole_folder\nwith whole_folder(sys.argv[1]) as f: (f / 'half').touch(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"])
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert all(f.name.startswith(".") for f in tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as partial:
        (partial / "x").touch() # and the next run is not hindered
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["x"] # and nothing is left of the killed one

def test_two_runs_do_not_write_one_folder(tmp_path):
    code = "import sys, time; from sftlab.finetune import whole_folder\nwith whole_folder(sys.argv[1]) as f: print('in', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    before = os.listdir(tmp_path)
    with pytest.raises(FinetuneError, match=f"another run .process {first.pid}. is writing it"), whole_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == before
    first.kill(), first.wait()

@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_run_goes_on_is_not_removed(tmp_path, overwrite):
    with pytest.raises(OSError), whole_folder(tmp_path / "out", overwrite):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
    assert (tmp_path / "out" / "mine.txt").exists()
