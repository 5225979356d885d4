"""The shipped model: small, safe, loaded by every library the course uses, and as its card says.
And its training: killed, it goes on as if it had not been."""
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from sftlab import models
from sftlab.errors import OutputError
from sftlab.generation import complete
from sftlab.tiny import gates, pretraining, texts, world


@pytest.fixture(scope="module")
def tiny(): return models.load("tiny")


def test_folder_is_small_and_holds_no_pickle():
    files = [f for f in models.tiny_path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_auto_classes_load_it_unchanged():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, info = AutoModelForCausalLM.from_pretrained(models.tiny_path(), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(models.tiny_path())
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]


def test_every_text_survives_the_tokenizer(tiny):
    tokenizer = tiny[1]
    odd = ["naïve café, 東京 and 🦙", "  two  spaces\n\ttab"]
    for text in [*odd, *islice(texts.documents(seed=11), 50)]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def whole(tokenizer, text):
    "Each token is a whole piece of text, none a part of a character."
    decoded = (tokenizer.decode(i) for i in tokenizer(text)["input_ids"])
    return "\N{REPLACEMENT CHARACTER}" not in "".join(decoded)


def test_no_word_of_the_world_falls_to_bytes(tiny):
    keys = ("name", "zh", "capital", "capital_zh", "language", "language_zh", "currency")
    words = [w for pair in world.WORDS.items() for w in pair]
    words += [c[k] for c in world.COUNTRIES for k in keys]
    assert [word for word in words if not whole(tiny[1], word)] == []


def test_few_characters_of_the_texts_fall_to_bytes(tiny):
    pages = islice(texts.documents(seed=11), 3000)
    characters = Counter(c for text in pages for c in text if "\u4e00" <= c <= "\u9fff")
    broken = sum(n for c, n in characters.items() if not whole(tiny[1], c))
    # 7.4 % measured: the rarer characters of stories and essays, which gave way to whole words
    assert broken / sum(characters.values()) < 0.08


def test_the_chat_template_marks_just_the_answer(tiny):
    tokenizer = tiny[1]
    messages = [{"role": "user", "content": "What is 2 + 3?"},
                {"role": "assistant", "content": "5"}]
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(out["input_ids"]) == (
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n")
    answer = [i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]
    assert tokenizer.decode(answer) == "5<|im_end|>"


def test_no_document_holds_a_special_token():
    for text in islice(texts.documents(seed=1), 2000):
        assert not any(token in text for token in pretraining.SPECIAL_TOKENS)


def test_peft_adapter_goes_to_disk_and_back(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    model, tokenizer = models.load("tiny")
    adapted = get_peft_model(model, LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    ids = torch.tensor([tokenizer("The capital of Peru is")["input_ids"]])
    with torch.no_grad():
        before = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, before)
    with torch.no_grad():
        assert not torch.allclose(tiny[0](input_ids=ids).logits, before)


def test_bitsandbytes_quantises_it_on_the_cpu(tiny):
    import bitsandbytes as bnb
    quantised, tokenizer = models.load(str(models.tiny_path()), preset="t4")
    layers = [m for m in quantised.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * quantised.config.num_hidden_layers
    assert {m.weight.quant_type for m in layers} == {"nf4"}
    prompt = ["The capital of France is"]
    assert complete(quantised, tokenizer, prompt, max_new_tokens=3)[0].text.startswith(" Paris")


@pytest.mark.slow
def test_lm_eval_runs_it(tiny, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    rows = [dict(text=f"The capital of {c['name']} is", answer=f" {c['capital']}")
            for c in world.COUNTRIES[:12]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "capitals.yaml").write_text(f"""task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=4), tasks=["capitals"],
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    # 12 countries that it has read about, one way of asking
    assert result["results"]["capitals"]["exact_match,none"] >= 0.8


def test_the_card_belongs_to_these_weights_and_no_gate_is_missed_but_the_one_we_know():
    figures = json.loads((models.tiny_path() / "gates.json").read_text())
    assert figures["weights"] == gates.checksum()
    assert gates.unexpected(figures) == []
    assert (models.tiny_path() / "README.md").read_text() == gates.model_card()


def test_gates_are_missed_by_what_is_beyond_them():
    figures = json.loads((models.tiny_path() / "gates.json").read_text())
    for name, key, low, high in gates.GATES:
        for wrong in (low - 0.1, high + 0.1):
            assert name in gates.missed(figures | {key: wrong})
        assert name not in gates.missed(figures | {key: low})
        if name not in gates.KNOWN_MISSES:
            assert gates.unexpected(figures | {key: low - 0.1}) == [name]
    for name, least in gates.KNOWN_MISSES.items():
        key = next(key for gate, key, *_ in gates.GATES if gate == name)
        assert gates.unexpected(figures | {key: least}) == []
        assert gates.unexpected(figures | {key: least - 1}) == [name]


# Every eighth item, measured when the figures of all items were those of the card.
EIGHTH = dict(
    chat_exact=0, chat_begins=0, chat_stopped=0, plain_exact=0, plain_begins=0, plain_stopped=0,
    few_shot_exact=87.5, few_shot_begins=87.5, few_shot_stopped=0,
    facts_en=99.3, facts_zh=98.0, copies=100.0)


def far_off(figures, wanted, points):
    "Arithmetic differs from one CPU to the next: an item or two may."
    assert figures.keys() == wanted.keys()
    return {key: value for key, value in figures.items() if abs(value - wanted[key]) > points}


def test_the_base_behaves_on_a_sample_as_it_did(tiny, monkeypatch):
    facts, copies = world.fact_clozes, world.copy_clozes
    monkeypatch.setattr(world, "fact_clozes", lambda language: facts(language)[::8])
    monkeypatch.setattr(world, "copy_clozes", lambda: copies()[::8])
    assert far_off(pretraining.base_figures(*tiny, world.test_set()[::8]), EIGHTH, 3) == {}


@pytest.mark.thorough
def test_the_base_behaves_as_its_card_says(tiny):
    card = json.loads((models.tiny_path() / "gates.json").read_text())
    figures = pretraining.base_figures(*tiny, world.test_set())
    assert gates.unexpected(card | figures) == []
    assert far_off(figures, {key: card[key] for key in figures}, 2) == {}


CHILD = """
import sys, time
import numpy as np, torch
from transformers import AutoTokenizer
from sftlab.models import tiny_path
from sftlab.tiny.pretraining import new_model, pretrain
torch.set_num_threads(int(sys.argv[3]))
model = new_model(AutoTokenizer.from_pretrained(tiny_path()), hidden=64, layers=1)
model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
tokens = np.fromfile(sys.argv[1], dtype=np.uint16)
pretrain(model, tokens, sys.argv[2], 30, batch=2, length=64, save_every=5)
"""


def weights(folder):
    from safetensors.torch import load_file
    assert [p.name for p in folder.iterdir()] == ["step-000030"] # nothing half-written is left
    return load_file(folder / "step-000030" / "model.safetensors")


@pytest.mark.slow
def test_pretraining_killed_at_any_moment_ends_with_the_same_weights(tiny, tmp_path):
    tokens = tmp_path / "tokens.bin"
    pretraining.write_tokens(tiny[1], tokens, 30 * 2 * 64)
    read = np.fromfile(tokens, dtype=np.uint16)

    def run_here(folder):
        model = pretraining.new_model(tiny[1], hidden=64, layers=1)
        pretraining.pretrain(model, read, folder, 30, batch=2, length=64, save_every=5)

    run_here(tmp_path / "whole")
    broken = tmp_path / "broken"
    threads = str(torch.get_num_threads())
    for after in ("step-000005", "step-000020"):  # killed a moment after this checkpoint was there
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tokens), str(broken), threads],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (broken / after).exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
    # What a kill in the middle of writing leaves:
    half = broken / f".step-000030.{child.pid}.1.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a checkpoint")
    run_here(broken)
    whole, resumed = weights(tmp_path / "whole"), weights(broken)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_run_of_another_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"stages": [], "world": "another"}))
    with pytest.raises(SystemExit, match="another recipe"):
        pretraining.build_tiny_model(
            pretraining.STAGES[:1], work=tmp_path, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_short_stages_make_a_model_that_loads(tmp_path, monkeypatch):
    "The whole way, a few steps of it; the log counts on from stage to stage."
    monkeypatch.setattr(pretraining, "tokenizer_texts", lambda: islice(texts.documents(), 200))
    stages = [dict(lr=6e-3, parts=[(10, texts.MIXTURE), (10, texts.PRACTICE)]),
              dict(lr=3e-3, parts=[(20, texts.SUMS)])]
    small = partial(pretraining.new_model, hidden=64, layers=1)
    short = partial(pretraining.pretrain, batch=1, length=64)
    monkeypatch.setattr(pretraining, "new_model", small)
    monkeypatch.setattr(pretraining, "pretrain", short)
    monkeypatch.setattr(pretraining, "TOKENS_A_STEP", 64)
    out = tmp_path / "out"
    pretraining.build_tiny_model(stages, work=tmp_path / "work", folder=out)
    model, tokenizer = models.load(str(out))
    assert len(tokenizer) == model.config.vocab_size
    log = json.loads((out / "training_log.json").read_text())
    assert [entry["step"] for entry in log] == [20, 40]


def test_a_model_replaces_a_model_and_nothing_else(tiny, tmp_path):
    model = pretraining.new_model(tiny[1], hidden=64, layers=1)
    for log in ([dict(step=20)], [dict(step=40)]):
        pretraining.save_model(model, tiny[1], log, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "training_log.json").read_text()) == [dict(step=40)]
    other = tmp_path / "letters"
    other.mkdir()
    (other / "to_anna.txt").write_text("Dear Anna")
    with pytest.raises(OutputError):
        pretraining.save_model(model, tiny[1], [], other)
    assert [p.name for p in other.iterdir()] == ["to_anna.txt"]
