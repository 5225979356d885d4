"The shipped model: small, safe, loaded by every library the course uses, and as its card says. And its training: killed, it goes on as if it had not been."
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from sftlab import models
from sftlab.tiny import pretraining, texts, world
from sftlab.generation import complete


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
    for text in ["naïve café, 東京 and 🦙", "  two  spaces\n\ttab", *islice(texts.documents(seed=11), 50)]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def whole(tokenizer, text):
    "Each token is a whole piece of text, none a part of a character."
    return "\N{REPLACEMENT CHARACTER}" not in "".join(tokenizer.decode(i) for i in tokenizer(text)["input_ids"])


def test_no_word_of_the_world_falls_to_bytes(tiny):
    world = [w for pair in world.WORDS.items() for w in pair] + [c[k] for c in world.COUNTRIES for k in ("name", "zh", "capital", "capital_zh", "language", "language_zh", "currency")]
    assert [word for word in world if not whole(tiny[1], word)] == []


def test_few_characters_of_the_texts_fall_to_bytes(tiny):
    characters = Counter(c for text in islice(texts.documents(seed=11), 3000) for c in text if "\u4e00" <= c <= "\u9fff")
    broken = sum(n for c, n in characters.items() if not whole(tiny[1], c))
    assert broken / sum(characters.values()) < 0.08  # 7.4 % measured: the rarer characters of stories and essays, which gave way to whole words


def test_the_chat_template_marks_just_the_answer(tiny):
    tokenizer = tiny[1]
    out = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(out["input_ids"]) == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
    assert tokenizer.decode([i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]) == "5<|im_end|>"


def test_no_document_holds_a_special_token():
    for text in islice(texts.documents(seed=1), 2000):
        assert not any(token in text for token in pretraining.SPECIAL_TOKENS)


def test_peft_adapter_goes_to_disk_and_back(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    model, tokenizer = models.load("tiny")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    ids = torch.tensor([tokenizer("The capital of Peru is")["input_ids"]])
    with torch.no_grad():
        before = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    again, _ = models.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, before)
    with torch.no_grad():
        assert not torch.allclose(tiny[0](input_ids=ids).logits, before)


def test_bitsandbytes_quantises_it_on_the_cpu(tiny):
    import bitsandbytes as bnb
    quantised, tokenizer = models.load(str(models.tiny_path()), preset="t4")
    layers = [m for m in quantised.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * quantised.config.num_hidden_layers and {m.weight.quant_type for m in layers} == {"nf4"}
    assert complete(quantised, tokenizer, ["The capital of France is"], max_new_tokens=3)[0].text.startswith(" Paris")


def test_lm_eval_runs_it(tiny, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    rows = [dict(text=f"The capital of {c['name']} is", answer=f" {c['capital']}") for c in world.COUNTRIES[:12]]
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
    result = lm_eval.simple_evaluate(model=HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=4), tasks=["capitals"], bootstrap_iters=0,
                                     task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert result["results"]["capitals"]["exact_match,none"] >= 0.8  # 12 countries that it has read about, one way of asking


def test_the_card_belongs_to_these_weights_and_no_gate_is_missed_but_the_one_we_know():
    figures = json.loads((models.tiny_path() / "gates.json").read_text())
    assert figures["weights"] == pretraining.checksum()
    assert pretraining.unexpected(figures) == []
    assert (models.tiny_path() / "README.md").read_text() == pretraining.model_card()


def test_the_base_behaves_as_its_card_says(tiny):
    "Measured again: what `make gates` wrote is what this machine sees, give or take a few of 570 items (arithmetic differs from one CPU to the next)."
    card = json.loads((models.tiny_path() / "gates.json").read_text())
    figures = pretraining.base_figures(*tiny, world.test_set())
    assert pretraining.unexpected(card | figures) == []
    assert all(abs(figures[key] - card[key]) <= 2 for key in figures)


CHILD = """
import sys, time
import numpy as np
from transformers import AutoTokenizer
from sftlab.tiny.pretraining import new_model, pretrain, TINY
model = new_model(AutoTokenizer.from_pretrained(TINY), hidden=64, layers=1)
if "slow" in sys.argv: model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
pretrain(model, np.fromfile(sys.argv[1], dtype=np.uint16), sys.argv[2], 30, batch=2, length=64, save_every=5)
"""


def weights(folder):
    from safetensors.torch import load_file
    assert [p.name for p in folder.glob("step-*")] == ["step-000030"]
    return load_file(folder / "step-000030" / "model.safetensors")


def test_pretraining_killed_at_any_moment_ends_with_the_same_weights(tiny, tmp_path):
    tokens = tmp_path / "tokens.bin"
    pretraining.write_tokens(tiny[1], tokens, 30 * 2 * 64)
    run = lambda folder, *more: [sys.executable, "-c", CHILD, str(tokens), str(folder), *more]
    subprocess.run(run(tmp_path / "whole"), check=True, capture_output=True)
    broken = tmp_path / "broken"
    for after in ("step-000005", "step-000020"):  # killed a moment after this checkpoint was there
        child = subprocess.Popen(run(broken, "slow"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (broken / after).exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
    (broken / "part").mkdir(exist_ok=True)
    (broken / "part" / "model.safetensors").write_bytes(b"half a checkpoint")  # what a kill in the middle of writing leaves
    subprocess.run(run(broken), check=True, capture_output=True)
    whole, resumed = weights(tmp_path / "whole"), weights(broken)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_run_of_another_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"stages": [], "world": "another"}))
    with pytest.raises(SystemExit, match="another recipe"):
        pretraining.build(pretraining.STAGES[:1], work=tmp_path, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
