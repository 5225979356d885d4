"`sftlab merge`: for every kind of adapter and model, what was merged; and refused where it is not."
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from calling import call
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import ARCHITECTURES, save_small
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftlab.models import load, tiny_path
from sftlab.program import merge as program
from sftlab.quantization import dequantize, quantize

warnings.filterwarnings("ignore")
IDS = torch.tensor([[1, 2, 3, 400, 17, 99, 2048, 5]])


@pytest.fixture(autouse=True)
def libraries_speak_again():
    "The program makes libraries quiet, and other tests look at what they say."
    levels = {name: logging.getLogger(name).level
              for name in ("transformers", "trl", "peft", "bitsandbytes")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def merge(adapter, output, *more):
    "Exit status, stdout and stderr of `sftlab merge`."
    return call("merge", adapter, "--output", output, *more)


def adapter(base, folder, scale=1, **more):
    "Save an adapter with random numbers, as PEFT does, and give it with its base."
    torch.manual_seed(1)
    options = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                   init_lora_weights=False)
    config = LoraConfig(**options | more)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                p += 0.1 * torch.randn_like(p)
            elif "magnitude" in name:
                p *= 1.3
            elif "lora_B" in name:
                p *= scale
    model.save_pretrained(folder)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def whole(folder):
    "A merged folder, as a program loads it that knows nothing of us, or of adapters."
    assert not (folder / "adapter_config.json").exists()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def refused(adapter, folder, message, *more):
    status, _, err = merge(adapter, folder, *more)
    assert (status, err.count("\n")) == (1, 1) and message in err, err
    assert not folder.exists() and not list(folder.parent.glob(".*.partial"))


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"mamba"}))  # PEFT refuses Mamba
def test_every_architecture(name, tmp_path):
    model = adapter(save_small(name, tmp_path / "base"), tmp_path / "adapter")
    status, out, err = merge(tmp_path / "adapter", tmp_path / "whole")
    assert (status, err) == (0, "") and "into the original weights in float32" in out
    assert (logits(whole(tmp_path / "whole")) - logits(model)).abs().max() < 1e-4
    with model.disable_adapter():
        assert (logits(whole(tmp_path / "whole")) - logits(model)).abs().max() > 0.02


KINDS = dict(
    plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True), ranks=dict(
        rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    biases=dict(bias="lora_only"), few=dict(target_modules=["q_proj"]),
    tokens=dict(trainable_token_indices=[1, 2]), head=dict(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("kind, tied", [
    *((kind, False) for kind in sorted(KINDS)), ("tokens", True), ("head", True)])
def test_every_kind_of_adapter(kind, tied, tmp_path):
    "Trained rows of the embedding and a trained head too, where both are one matrix and not."
    base = save_small("llama", tmp_path / "base", tie_word_embeddings=tied)
    model = adapter(base, tmp_path / "adapter", **KINDS[kind])
    assert merge(tmp_path / "adapter", tmp_path / "whole")[0] == 0
    assert (logits(whole(tmp_path / "whole")) - logits(model)).abs().max() < 1e-4
    still_tied = json.loads((tmp_path / "whole/config.json").read_text())["tie_word_embeddings"]
    assert still_tied is (tied and kind != "head")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("dora", "few", "tokens"))
def test_next_to_four_bits(kind, tmp_path):
    "Into the dequantised weights nothing moves; PEFT's own merge, into four bits, moves a lot."
    base = save_small("llama", tmp_path / "base", tie_word_embeddings=True)
    adapter(base, tmp_path / "adapter", scale=0.1, **KINDS[kind])
    (tmp_path / "adapter/run.json").write_text('{"method": "qlora"}')
    trained = logits(load(str(tmp_path / "adapter"))[0])
    assert merge(tmp_path / "adapter", tmp_path / "default")[0] == 0
    moved = (logits(whole(tmp_path / "default")) - trained).abs().mean()
    assert moved < 1e-5
    for into in ("original", "four-bit"):
        status, out, _ = merge(tmp_path / "adapter", tmp_path / into, "--into", into)
        assert status == 0 and "note " in out
        again = load(str(tmp_path / into))[0]
        assert (logits(again) - trained).abs().mean() > 100 * moved
        assert getattr(again, "is_loaded_in_4bit", False) is (into == "four-bit")
    assert "quantization_config" not in json.loads((tmp_path / "default/config.json").read_text())


@pytest.mark.slow
def test_gpt2_next_to_four_bits(tmp_path):
    "Its matrices are turned over when they are quantised, those without an adapter too."
    adapter(save_small("gpt2", tmp_path / "base"), tmp_path / "adapter", target_modules=["c_fc"])
    trained = logits(load(str(tmp_path / "adapter"), four_bit=True)[0])
    assert merge(tmp_path / "adapter", tmp_path / "whole", "--into", "dequantized")[0] == 0
    assert (logits(whole(tmp_path / "whole")) - trained).abs().max() < 1e-4


@pytest.mark.slow
def test_a_base_that_is_stored_in_four_bits(tmp_path):
    "As many on the hub are: it has no original weights, and transformers cannot save it as it is."
    adapter(save_small("llama", tmp_path / "base"), tmp_path / "first")
    assert merge(tmp_path / "first", tmp_path / "stored", "--into", "four-bit")[0] == 0
    stored = load(str(tmp_path / "stored"))[0]
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                        init_lora_weights=False)
    model = get_peft_model(stored, config)
    model.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", tmp_path / "whole", "choose --into dequantized")
    assert merge(tmp_path / "adapter", tmp_path / "whole", "--into", "dequantized")[0] == 0
    assert (logits(whole(tmp_path / "whole")) - logits(model)).abs().max() < 1e-4
    assert merge(tmp_path / "adapter", tmp_path / "small", "--into", "four-bit")[0] == 0


def weight_of(folder, name="model.layers.0.self_attn.q_proj.weight"):
    return load_file(folder / "model.safetensors")[name]


def test_each_weight_is_rounded_once(tmp_path):
    "The sum in float32, then the base's number format: what PEFT alone rounds twice in 16 bits."
    base = tmp_path / "base"
    shutil.copytree(save_small("llama", tmp_path / "exact"), base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = adapter(str(base), tmp_path / "adapter")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight + layer.get_delta_weight("default")
    for dtype in ("bfloat16", "float32", "float16"):
        more = () if dtype == "bfloat16" else ("--dtype", dtype)
        status, out, _ = merge(tmp_path / "adapter", tmp_path / dtype, *more)
        assert status == 0 and f"into the original weights in {dtype}\n" in out
        assert weight_of(tmp_path / dtype).equal(exact.to(getattr(torch, dtype)))
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype


def test_the_dequantised_weights_are_those_of_the_lesson(tmp_path):
    model = adapter(str(tiny_path()), tmp_path / "adapter", target_modules=["q_proj"])
    assert merge(tmp_path / "adapter", tmp_path / "whole", "--into", "dequantized",
                 "--dtype", "float32")[0] == 0
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    read_back = dequantize(quantize(layer.base_layer.weight, double_quant=True))
    expected = read_back + layer.get_delta_weight("default")
    moved = (weight_of(tmp_path / "whole") - expected).abs()
    assert moved.mean() < 1e-4 # bitsandbytes and the lesson may differ in a constant's last digit
    assert (layer.base_layer.weight - read_back).abs().mean() > 100 * moved.mean()


def test_it_stops_where_the_adapter_stops_in_chat(tmp_path):
    "At the tokenizer's end token, which comes first, and where the base stopped; sampling stays."
    base, folder = save_small("llama", tmp_path / "base"), tmp_path / "adapter"
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=0).save_pretrained(base)
    adapter(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    status, out, _ = merge(folder, tmp_path / "whole")
    assert status == 0 and "stops at <|im_end|> and <|endoftext|>" in out
    made = GenerationConfig.from_pretrained(tmp_path / "whole")
    assert (made.eos_token_id, made.temperature) == ([2, 0], 0.6)
    again = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert again.chat_template == tokenizer.chat_template
    bad = dict(temperature=0.6, top_p=0.9, eos_token_id=0)  # as some bases have it; v5 refuses it
    Path(base, "generation_config.json").write_text(json.dumps(bad))
    assert merge(folder, tmp_path / "greedy")[0] == 0
    assert GenerationConfig.from_pretrained(tmp_path / "greedy").eos_token_id == [2, 0]


def test_what_cannot_be_merged(tmp_path):
    base, folder, output = save_small("llama", tmp_path / "base"), tmp_path / "a", tmp_path / "out"
    adapter(base, folder)
    refused(tmp_path / "nowhere", output, "there is no folder")
    refused(base, output, "is a whole model already")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", output, "no adapter_config.json")
    config = json.loads((folder / "adapter_config.json").read_text())
    def with_config(**changes):
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with_config(base_model_name_or_path=str(tmp_path / "moved"))
    refused(folder, output, f"There is no folder {tmp_path / 'moved'}")
    with_config(peft_type="IA3")
    refused(folder, output, "only LORA")
    with_config(r=5)
    refused(folder, output, str(folder))
    with_config()
    shared = tmp_path / "shared"
    adapter(save_small("llama", tmp_path / "tied", tie_word_embeddings=True), shared,
            target_modules=["embed_tokens"])
    refused(shared, output, "a merge would change both")
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(4100)
    get_peft_model(resized, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "more")
    refused(tmp_path / "more", output, str(tmp_path / "more"))


def test_what_is_there_stays(tmp_path):
    adapter(save_small("llama", tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").write_text("mine")
    status, _, err = merge(tmp_path / "adapter", tmp_path / "there")
    assert status == 1 and "is there already" in err
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["mine.txt"]


MISTAKES = dict(
    not_merged=lambda model, *_: model.unload(),
    merged_twice=lambda model, *_: PeftModel.from_pretrained(
        model.merge_and_unload(), model.folder).merge_and_unload(),
    a_layer_forgotten=lambda model, *_: unmerged(model, "model.layers.0.mlp.down_proj"),
    head_forgotten=lambda model, *_: forgotten_head(model))


def unmerged(model, name):
    layer = model.get_base_model().get_submodule(name)
    layer.merge()
    layer.unmerge()
    layer.merged_adapters.append("default")  # merge_and_unload takes it for merged
    return model.merge_and_unload()


def forgotten_head(model):
    head = model.get_base_model().lm_head.weight.detach().clone()
    model = model.merge_and_unload()
    model.lm_head.weight = torch.nn.Parameter(head * 0.9)
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_the_check_finds_a_wrong_merge(mistake, tmp_path, monkeypatch):
    base = save_small("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter(base, tmp_path / "adapter")
    def wrong(folder, into, dtype):
        model, tokenizer = load(str(folder))
        model.folder = str(folder)
        return MISTAKES[mistake](model), tokenizer, "float32"
    monkeypatch.setattr(program, "_merged", wrong)
    refused(tmp_path / "adapter", tmp_path / "whole", "the merged model is not what was merged")


def test_a_small_update_lost_in_rounding_is_told(tmp_path):
    "In 16 bits an update that is smaller than a rounding step is gone."
    base = save_small("llama", tmp_path / "base")
    model = adapter(base, tmp_path / "adapter")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p *= 1e-4
    model.save_pretrained(tmp_path / "adapter")
    status, out, _ = merge(tmp_path / "adapter", tmp_path / "whole", "--dtype", "bfloat16")
    assert status == 0 and "more than a quarter as far as training did, --dtype float32" in out
    status, out, _ = merge(tmp_path / "adapter", tmp_path / "exact")
    assert status == 0 and "note " not in out
