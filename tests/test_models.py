"Loading: what a name means, and one clear line where it means nothing."
import json
import shutil
import time
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import ARCHITECTURES, SIZES, VOCABULARY, config, save, save_small

from sftlab.errors import ModelError
from sftlab.guards.models import check_causal, check_tokenizer
from sftlab.models import find, load, max_positions, pick_dtype, tiny_path


def test_the_environment_chooses_the_preset(monkeypatch):
    monkeypatch.setenv("SFTLAB_PRESET", "no-such")
    with pytest.raises(ModelError, match="no preset 'no-such'.*tiny, small, t4, gpu"):
        load()
    assert load("tiny")[0].config.model_type == "llama"  # an argument counts for more


@pytest.mark.parametrize("capability, dtype", [
    ((7, 0), torch.float16), ((7, 5), torch.float16),
    ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)])
def test_bfloat16_only_where_the_card_has_it(capability, dtype):
    with (patch("torch.cuda.get_device_capability", return_value=capability),
          patch("torch.cuda.is_bf16_supported", return_value=True)):
        assert pick_dtype("cuda") == dtype


def test_the_tiny_model_stays_on_the_cpu_where_there_is_a_gpu():
    with patch("torch.cuda.is_available", return_value=True):
        model, _ = load("tiny")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("name, message", [
    ("someone/no-such-model", "not on this machine.*cannot be reached.*tiny, small, t4, gpu"),
    ("/no/such/folder", "no folder /no/such/folder"),
    ("./nothing", "no folder nothing"),
    ("two words", "neither a folder here nor a possible hub id"),
    ("", "name is empty: give a folder"), ("  ", "name is empty"),
])
def test_a_wrong_name_fails_at_once_in_one_line(name, message):
    import_module("huggingface_hub.hf_api")  # which is not what is timed
    start = time.time()
    with pytest.raises(ModelError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value) and time.time() - start < 5


def test_a_folder_without_a_model_and_one_with_a_broken_one(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        load(str(tmp_path))
    shutil.copytree(tiny_path(), tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").unlink()
    with pytest.raises(ModelError, match="broken cannot be loaded"):
        load(str(tmp_path / "broken"))


def test_an_adapter_made_where_the_course_was_elsewhere_finds_the_tiny_model(tmp_path):
    from peft import LoraConfig, get_peft_model
    model, tokenizer = load("tiny")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | dict(base_model_name_or_path="/x/sftlab/assets/tiny")))
    base = load(str(tmp_path))[0].get_base_model()
    assert base.config.hidden_size == model.config.hidden_size
    file.write_text(json.dumps(config | dict(base_model_name_or_path="/x/another-model")))
    with pytest.raises(ModelError, match="no folder /x/another-model"):
        load(str(tmp_path))


def test_four_bits_without_bitsandbytes_get_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    says = "need bitsandbytes, which is not installed: pip install bitsandbytes"
    with pytest.raises(ModelError, match=says):
        load("tiny", four_bit=True)


def test_find_leaves_a_folder_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find(str(tmp_path)) == str(tmp_path)


# --- what cannot work is refused, in one line

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders of small models, each made once: `made('llama')`. They are not to be changed."
    top, there = tmp_path_factory.mktemp("made"), {}
    def folder(name):
        if name not in there:
            there[name] = save_small(name, top / name)
        return there[name]
    return folder


@pytest.fixture
def copy(made, tmp_path):
    "The folder of a small Llama, to be damaged."
    return shutil.copytree(made("llama"), tmp_path / "model")


def refusal(folder, **options):
    "What is said of a model that cannot be loaded: one line, not long."
    with pytest.raises(ModelError) as failure:
        load(str(folder), **options)
    said = str(failure.value)
    assert "\n" not in said and len(said) < 600
    return said


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


def test_weights_that_would_be_random_numbers_are_refused(copy):
    file = copy / "model.safetensors"
    change_tensors(file, lambda tensors: tensors.pop(UP))
    assert f"lacks tensors of its model: 1 ({UP}). They would be random" in refusal(copy)
    change_tensors(file, lambda tensors: tensors.update({UP: torch.zeros(8, 32)}))
    assert f"{UP} is [8, 32], not [64, 32]" in refusal(copy)


def test_a_model_without_its_head_is_refused_and_a_shared_head_is_none(tmp_path):
    save(transformers.LlamaModel(config("llama")), tmp_path / "headless")
    assert "lacks tensors of its model: 1 (lm_head.weight)" in refusal(tmp_path / "headless")
    save(transformers.LlamaModel(config("llama", tie_word_embeddings=True)), tmp_path / "tied")
    assert load(str(tmp_path / "tied"))[0].lm_head.weight.shape == (VOCABULARY, 32)


def test_tensors_that_nobody_needs_do_no_harm(copy):
    before = load(str(copy))[0].state_dict()
    change_tensors(copy / "model.safetensors", lambda t: t.update({"old.bias": torch.zeros(3)}))
    after = load(str(copy))[0].state_dict()
    assert before.keys() == after.keys() and all(after[k].equal(before[k]) for k in before)


@pytest.mark.parametrize("name, message", [
    ("Bert", "an encoder .of type bert., which reads a text from both sides"),
    ("Roberta", "an encoder .of type roberta."), ("Electra", "an encoder .of type electra."),
    ("XLNet", "an encoder .of type xlnet."),
    ("T5", "an encoder-decoder .of type t5."), ("Bart", "an encoder-decoder .of type bart."),
    ("Whisper", "an encoder-decoder .of type whisper."),
    ("ViT", "of type vit, which does not write text"),
    ("DistilBert", "of type distilbert, which does not write text")])
def test_models_that_do_not_continue_a_text_are_refused(name, message, tmp_path):
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)  # enough to know it
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path))


def test_an_encoder_saved_with_its_weights_is_refused_and_as_a_decoder_accepted(tmp_path):
    sizes = SIZES | dict(intermediate_size=64, max_position_embeddings=64)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    assert "is an encoder" in refusal(save(bert, tmp_path / "encoder"))
    decoder = transformers.BertConfig(**sizes, is_decoder=True)
    save(transformers.BertLMHeadModel(decoder), tmp_path / "decoder")
    model, _ = load(str(tmp_path / "decoder"))
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    first, second = model(input_ids=ids).logits[:, :2]
    assert first.equal(second)  # it does not look ahead


def test_every_causal_type_of_transformers_is_accepted_unless_it_is_an_encoder_too():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    refused = set()
    for kind in CAUSAL:
        try:
            settings = transformers.CONFIG_MAPPING[kind]()
        except Exception:
            continue  # a type that cannot be made without being told its sizes
        try:
            check_causal(settings, kind)
        except ModelError:
            refused.add(kind)
    encoders = {"bert", "roberta", "electra", "xlm", "camembert", "rembert", "roformer", "ernie"}
    assert encoders <= refused
    writers = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text",
               "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mixtral", "mamba", "mamba2",
               "phi", "phi3", "olmo", "olmo2", "stablelm", "starcoder2", "smollm3", "mpt"}
    assert writers <= set(CAUSAL) - refused and len(set(CAUSAL) - refused) > 100


def cut(path): path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "config cut": (lambda d: cut(d / "config.json"), "config.json is damaged, it is no JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "must hold a JSON object"),
    "no type": (lambda d: (d / "config.json").write_text("{}"), "model_type"),
    "wrong field": (lambda d: change_json(d / "config.json", hidden_size="x"), "hidden_size"),
    "no heads": (lambda d: change_json(d / "config.json", num_attention_heads=0), "cannot be"),
    "unknown type": (lambda d: change_json(d / "config.json", model_type="new"), "`new`"),
    "own code": (lambda d: change_json(d / "config.json", model_type="new",
                                       auto_map=dict(AutoConfig="new.Config")),
                 "needs code that it brings along, which is not run"),
    "tensors cut": (lambda d: cut(d / "model.safetensors"),
                    "model.safetensors is damaged or cut short"),
    "tensors empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or cut short"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "tokenizer cut": (lambda d: cut(d / "tokenizer.json"), "tokenizer.json is damaged"),
    "tokenizer of nothing": (lambda d: (d / "tokenizer.json").write_text("{}"),
                             "the tokenizer of .*cannot be loaded"),
    "tokenizer's settings": (lambda d: cut(d / "tokenizer_config.json"),
                             "tokenizer_config.json is damaged"),
    "no tokenizer.json": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "generation": (lambda d: cut(d / "generation_config.json"),
                   "generation_config.json is damaged"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_named(how, copy):
    damage, message = DAMAGE[how]
    damage(copy)
    with pytest.raises(ModelError, match=message):
        load(str(copy))
    refusal(copy)


def test_code_that_a_model_brings_along_is_not_asked_for(copy, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    DAMAGE["own code"][0](copy)
    refusal(copy)


@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_no_files_of_a_tokenizer(name, made, tmp_path):
    model = shutil.copytree(made(name), tmp_path / "model")
    for path in [*model.glob("tokenizer*"), *model.glob("*.jinja")]:
        path.unlink()
    assert "tokenizer.json is missing" in refusal(model)  # GPT-2 would get one without words


def test_running_out_of_memory_is_no_damage(monkeypatch):
    def no_room(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        load("tiny")


# --- the tokenizer and the embedding

def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    small = save_small("llama", tmp_path / "small", vocab_size=4000)
    assert "ids up to 4095" in refusal(small) and "4000 rows" in refusal(small)
    roomy = save_small("llama", tmp_path / "roomy", vocab_size=4160)  # a multiple of 64
    assert load(roomy)[0].config.vocab_size == 4160


def test_special_tokens_beyond_the_embedding_pass_where_no_text_becomes_them():
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<image_soft_token>"]))
    check_tokenizer(tokenizer, VOCABULARY, "here")  # like Gemma 3 of a billion parameters
    for name in ("pad_token", "eos_token"):
        other = transformers.AutoTokenizer.from_pretrained(tiny_path())
        other.add_special_tokens({name: "[NEW]"})
        with pytest.raises(ModelError, match=r"'\[NEW\]'"):
            check_tokenizer(other, VOCABULARY, "here")
    tokenizer.chat_template = "{{ '<image_soft_token>' }}"
    with pytest.raises(ModelError, match="<image_soft_token>"):
        check_tokenizer(tokenizer, VOCABULARY, "here")
    other = transformers.AutoTokenizer.from_pretrained(tiny_path())
    other.add_tokens(["ordinary"])
    with pytest.raises(ModelError, match="'ordinary'"):
        check_tokenizer(other, VOCABULARY, "here")


# --- adapters

def adapter(base, folder, tokenizer=False, **options):
    "Save an adapter as PEFT does by itself."
    from peft import LoraConfig, get_peft_model
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = dict(r=2, target_modules="all-linear", task_type="CAUSAL_LM") | options
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**settings, init_lora_weights=False))
    model.save_pretrained(folder)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [
    {}, dict(use_dora=True), dict(trainable_token_indices=[1, 2]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])],
    ids=["plain", "dora", "tokens", "whole embedding"])
def test_an_adapter_of_pefts_own_making_is_loaded_with_its_bases_tokenizer(options, made, tmp_path):
    from peft import PeftModel
    folder = adapter(made("llama"), tmp_path / "adapter", **options)
    assert not (folder / "tokenizer.json").exists()
    model, tokenizer = load(str(folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(made("llama"))
    theirs = PeftModel.from_pretrained(base, folder)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.equal(theirs(input_ids=ids).logits)
    assert len(tokenizer) == VOCABULARY and not model.training


ADAPTER_DAMAGE = {
    "cut": (lambda d: cut(d / "adapter_model.safetensors"), "is damaged or cut short"),
    "lacking": (lambda d: change_tensors(d / "adapter_model.safetensors", lambda t: t.popitem()),
                "the adapter .* lacks tensors: 1"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(),
                   "has no adapter_model.safetensors"),
    "config cut": (lambda d: cut(d / "adapter_config.json"), "adapter_config.json is damaged"),
    "base null": (lambda d: change_json(d / "adapter_config.json", base_model_name_or_path=None),
                  "does not name the adapter's base: write its folder or hub id"),
    "base empty": (lambda d: change_json(d / "adapter_config.json", base_model_name_or_path=""),
                   "does not name the adapter's base"),
    "base not there": (lambda d: change_json(d / "adapter_config.json",
                                             base_model_name_or_path="../nothing"),
                       "is an adapter whose base cannot be found: There is no folder"),
    "kind": (lambda d: change_json(d / "adapter_config.json", peft_type="NEW"), "is 'NEW'"),
    "no kind": (lambda d: change_json(d / "adapter_config.json", peft_type=None), "is None"),
    "rank": (lambda d: change_json(d / "adapter_config.json", r="x"), "cannot be loaded"),
}


@pytest.mark.parametrize("how", ADAPTER_DAMAGE)
def test_a_damaged_adapter_gets_one_line(how, made, tmp_path):
    damage, message = ADAPTER_DAMAGE[how]
    folder = adapter(made("llama"), tmp_path / "adapter")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder))
    refusal(folder)


@pytest.mark.parametrize("other", [dict(intermediate_size=48), dict(num_hidden_layers=1), "gpt2"],
                         ids=str)
def test_an_adapter_for_another_base_is_refused(other, made, tmp_path):
    folder = adapter(made("llama"), tmp_path / "adapter")
    if isinstance(other, dict):
        base = save_small("llama", tmp_path / "base", **other)
    else:
        base = made(other)
    change_json(folder / "adapter_config.json", base_model_name_or_path=base)
    assert "was made for another base" in refusal(folder)


def test_the_base_is_found_from_the_adapters_folder_and_from_the_working_folder(
        made, tmp_path, monkeypatch):
    shutil.copytree(made("llama"), tmp_path / "base")
    folder = adapter(made("llama"), tmp_path / "adapter")
    for relative in ("../base", "base"):  # from the adapter's folder, from the working folder
        change_json(folder / "adapter_config.json", base_model_name_or_path=relative)
        if relative == "base":
            monkeypatch.chdir(tmp_path)
        assert load(str(folder))[0].config.model_type == "llama"
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    assert "is itself an adapter: merge that first" in refusal(folder)


def test_an_adapters_own_tokenizer_counts_for_more(made, tmp_path):
    folder = adapter(made("llama"), tmp_path / "adapter", tokenizer=True)
    change_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    assert load(str(folder))[1].eos_token == "<|im_end|>"


def test_a_model_and_an_adapter_in_the_hubs_cache_need_no_network(made, tmp_path, monkeypatch):
    def put(name, folder):
        place = tmp_path / f"hub/models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("a" * 40)
        return shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    put("me/model", made("llama"))
    held = put("me/adapter", adapter(made("llama"), tmp_path / "adapter"))
    change_json(held / "adapter_config.json", base_model_name_or_path="me/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("me/model")[0].config.model_type == "llama"
    model, tokenizer = load("me/adapter")
    assert model.peft_config["default"].r == 2 and len(tokenizer) == VOCABULARY


# --- where generation stops

def test_an_adapters_own_stop_tokens_count_for_more_than_its_bases(made, tmp_path):
    folder = adapter(made("llama"), tmp_path / "adapter", tokenizer=True)
    assert load(str(folder))[0].generation_config.eos_token_id == 0
    transformers.GenerationConfig(eos_token_id=[0, 2, 9]).save_pretrained(folder)
    model, _ = load(str(folder))
    assert model.generation_config.eos_token_id == [0, 2, 9]
    assert model.get_base_model().generation_config.eos_token_id == [0, 2, 9]
    cut(folder / "generation_config.json")
    assert "generation_config.json is damaged" in refusal(folder)


@pytest.mark.parametrize("said, stops", [(None, [0]), (0, 0), ([0], [0]), (7, [0, 7]),
                                         ([9, 7], [0, 7, 9])], ids=str)
def test_the_tokenizers_end_token_stops_generate_too(said, stops, copy):
    change_json(copy / "generation_config.json", eos_token_id=said)
    assert load(str(copy))[0].generation_config.eos_token_id == stops


# --- how many tokens a model can take

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_models_limit_is_known(name, made):
    model, _ = load(made(name))
    assert max_positions(model) == (None if name in ("bloom", "mamba") else 512)


def test_the_limit_has_other_names_too():
    def limit(kind, **fields):
        settings = getattr(transformers, kind)(**fields)
        return max_positions(type("Model", (), dict(config=settings)))
    assert limit("MptConfig", max_seq_len=77) == 77
    assert limit("GPTJConfig", n_positions=66) == limit("CodeGenConfig", n_positions=66) == 66
    assert limit("LlamaConfig", max_position_embeddings=55) == 55


# --- four bits

@pytest.mark.parametrize("name", ("llama", "gpt2", "bloom"))
def test_four_bits_hold_linear_layers_and_gpt2s_convolutions(name, made):
    model, _ = load(made(name), four_bit=True)
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert model.is_loaded_in_4bit and kinds.count("Linear4bit") >= 8 and "Conv1D" not in kinds


def test_four_bits_are_refused_where_a_model_cannot_compute_with_them(made):
    said = refusal(made("mamba"), four_bit=True)
    assert "(of type mamba) cannot compute with weights in four bits: load it without" in said
    said = refusal(made("mixtral"), four_bit=True)
    assert "of its layers, the experts, out of four bits: load it without four bits" in said


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_number_format_can_be_chosen(dtype, made):
    model, _ = load(made("llama"), device="cpu", dtype=dtype)
    assert (model.dtype, model.device.type) == (dtype, "cpu")
