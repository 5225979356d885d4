"LoRA: equal to PEFT for any options; nothing loaded, merged or believed that is not so."
import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM)

from sftlab import lora
from sftlab.audit.adapters import check_applied, without_adapter
from sftlab.errors import LoRAError, OutputError
from sftlab.files import adapters as files
from sftlab.files.adapters import adapter_config, adapter_tensors, load_adapter, save_adapter
from sftlab.lora import (
    DoRALinear, LoRALinear, adapters, inject, merge, remove, replace_module, targets_of,
    token_rows, train_tokens, trainable, unmerge)
from sftlab.training import TrainingConfig, train

warnings.filterwarnings("ignore")
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)


def small(kind=LlamaForCausalLM, dtype=torch.float32, **more):
    "A model of a few thousand weights; the Qwen2 one has biases."
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[kind]
    return kind(config(**SIZES | dict(tie_word_embeddings=True) | more)).to(dtype).eval()


IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))
ENDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, use_dora=False, use_rslora=False, **options):
    "Inject, with PEFT's names for the variants."
    inject(model, layer=DoRALinear if use_dora else LoRALinear, **options)
    return lora.use_rslora(model) if use_rslora else model


def pair(base, tokens=None, r=8, lora_alpha=16, target_modules="all-linear", **more):
    "Ours and PEFT's, made under one seed."
    options = dict(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **more)
    torch.manual_seed(3)
    ours = adapted(copy.deepcopy(base), **options)
    if tokens:
        train_tokens(ours, tokens)
    torch.manual_seed(3)
    config = LoraConfig(trainable_token_indices=tokens, task_type="CAUSAL_LM", **options)
    return ours, get_peft_model(copy.deepcopy(base), config)


def trained(model, of="data"):
    if not isinstance(model, PeftModel):
        found = adapter_tensors(model)
    else:
        found = {name.replace(".default", "").replace("vector.weight", "vector"): p
                 for name, p in model.named_parameters() if p.requires_grad}
    return {name: getattr(p, of).clone() for name, p in found.items()}


def same(a, b): return set(a) == set(b) and len(a) > 0 and all(a[name].equal(b[name]) for name in a)
def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def step(model, optimizer, seed):
    "One step of AdamW; -> loss and gradients."
    torch.manual_seed(seed)
    model.train()
    optimizer.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = trained(model, "grad")
    optimizer.step()
    model.eval()
    return loss.item(), gradients


def learn(model, steps=2, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return [step(model, optimizer, seed) for seed in range(steps)]


def learned(base=None, tokens=None, **options):
    "A model with an adapter that holds something."
    torch.manual_seed(4)
    model = adapted(base or small(), **options)
    if tokens:
        train_tokens(model, tokens)
    learn(model)
    return model


# --- equal to PEFT

options = st.fixed_dictionaries(dict(
    r=st.integers(1, 40),
    lora_alpha=st.sampled_from([1, 8, 16, 0.5]),
    lora_dropout=st.sampled_from([0.0, 0.1, 0.5]),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    target_modules=st.one_of(
        st.just("all-linear"),
        st.lists(st.sampled_from(ENDS), min_size=1, unique=True),
        st.just(["layers.1.mlp.up_proj", "q_proj"]),
        st.just(r".*layers\.0\..*(q|v)_proj")),
    tokens=st.one_of(
        st.none(), st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True))))


def same_merged_and_back(ours, theirs):
    for change, their_change in ((merge, theirs.merge_adapter), (unmerge, theirs.unmerge_adapter)):
        change(ours)
        their_change()
        assert logits(ours).equal(logits(theirs))


@settings(max_examples=25)
@given(options, st.sampled_from([LlamaForCausalLM, Qwen2ForCausalLM]), st.booleans())
def test_equal_to_peft_with_any_options(chosen, kind, tied):
    ours, theirs = pair(small(kind, tie_word_embeddings=tied), **chosen)
    assert same(trained(ours), trained(theirs))
    assert (trainable(ours).trained, trainable(ours).all) == theirs.get_nb_trainable_parameters()
    for (loss, gradients), (their_loss, their_gradients) in zip(learn(ours), learn(theirs)):
        assert loss == their_loss and same(gradients, their_gradients)
    assert same(trained(ours), trained(theirs)) and logits(ours).equal(logits(theirs))
    same_merged_and_back(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [dict(), dict(use_dora=True), dict(lora_dropout=0.2)], ids=str)
def test_equal_to_peft_on_a_base_of_16_bits(dtype, more):
    ours, theirs = pair(small(dtype=dtype), **more)
    assert all(p.dtype == torch.float32 for p in trained(ours).values())
    assert same(trained(ours), trained(theirs))
    assert [loss for loss, _ in learn(ours)] == [loss for loss, _ in learn(theirs)]
    assert same(trained(ours), trained(theirs))
    assert logits(ours).dtype == dtype and logits(ours).equal(logits(theirs))
    same_merged_and_back(ours, theirs)


def test_the_comparison_notices_another_seed_and_a_small_change():
    ours, theirs = pair(small())
    next(iter(adapters(ours).values())).lora_A.data[0, 0] += 1e-6
    assert not same(trained(ours), trained(theirs))
    ours, theirs = pair(small())
    next(iter(adapters(ours).values())).scaling *= 1.001
    assert not same(learn(ours, 1)[0][1], learn(theirs, 1)[0][1])


def test_doras_lengths_get_no_gradient():
    "With the norm in the graph the gradient of B would be another."
    layer = DoRALinear(torch.nn.Linear(6, 4), r=2)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 6)
    layer(x).square().sum().backward()
    weight = layer.base.weight + lora.delta_weight(layer)
    def by_hand(norm):
        out = x @ (layer.magnitude / norm)[:, None].mul(weight).T + layer.base.bias
        return torch.autograd.grad(out.square().sum(), layer.lora_B, retain_graph=True)[0]
    norm = weight.norm(dim=1)
    assert torch.allclose(layer.lora_B.grad, by_hand(norm.detach()), rtol=1e-4)
    assert not torch.allclose(layer.lora_B.grad, by_hand(norm), rtol=1e-2)


# --- the layer and where it goes

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 8, 0.5]),
       st.booleans(), st.booleans())
def test_a_layer_is_its_formula(n_in, n_out, r, alpha, bias, use_rslora):
    base = torch.nn.Linear(n_in, n_out, bias=bias).double()
    layer = LoRALinear(base, r, alpha)
    if use_rslora:
        lora.use_rslora(torch.nn.Sequential(layer))
    x = torch.randn(3, n_in).double()
    layer.lora_A.data = layer.lora_A.data.double()
    layer.lora_B.data = torch.randn(n_out, r).double()
    scale = alpha / (math.sqrt(r) if use_rslora else r)
    weight = base.weight + scale * layer.lora_B @ layer.lora_A
    expected = torch.nn.functional.linear(x, weight, base.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_only_the_adapter_is_trainable_and_the_base_stays_as_it_is():
    base = small()
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = learned(base)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in names} == {"lora_A", "lora_B"}
    kept = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(p.equal(before[name.replace(".base.", ".")]) for name, p in kept.items())
    sizes = [8 * (m.in_features + m.out_features) for m in adapters(model).values()]
    count = trainable(model)
    assert count.trained == sum(sizes)
    assert repr(count).startswith(f"trainable params: {count.trained:,} || all params: ")


def test_lesson_05s_loop_trains_it():
    model = inject(small())
    rows = [dict(input_ids=ids, labels=ids) for ids in IDS.tolist()]
    config = TrainingConfig(epochs=20, learning_rate=1e-2, batch_size=3)
    losses = train(model, rows, config, disable_tqdm=True).loss
    assert losses.iloc[-1] < losses.iloc[0] - 0.3


def test_any_module_with_the_right_shape_will_do():
    class Twice(torch.nn.Module):
        in_features, out_features = 4, 6
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.ones(6, 4, dtype=torch.uint8))
        def forward(self, x): return x @ self.codes.to(x.dtype).T
    layer, x = LoRALinear(Twice(), r=2), torch.randn(3, 4)
    assert layer(x).equal(layer.base(x)) and layer.lora_A.dtype == torch.float32
    with pytest.raises(LoRAError, match="Twice holds no matrix of ordinary numbers"):
        DoRALinear(Twice())
    model = torch.nn.Sequential(layer)
    with pytest.raises(LoRAError, match="dequantise the base before merging"):
        merge(model)
    assert not layer.merged


def test_replace_module_changes_the_one_that_is_named():
    model, new = small(), torch.nn.Identity()
    replace_module(model, "model.layers.1.mlp.up_proj", new)
    assert model.model.layers[1].mlp.up_proj is new
    assert [name for name, m in model.named_modules() if m is new] == ["model.layers.1.mlp.up_proj"]
    replace_module(model, "lm_head", new) # one without a dot in its name
    assert model.lm_head is new


def test_layers_of_a_class_that_was_defined_again_count_too(tmp_path):
    "In a notebook the lesson's cells define the class a second time."
    spec = importlib.util.spec_from_file_location("sftlab.lora_again", lora.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.LoRALinear is not LoRALinear
    model = again.train_tokens(again.inject(small()), [5])
    learn(model)
    before = logits(model)
    assert len(adapters(model)) == 14 and token_rows(model) is not None
    assert check_applied(model, IDS) > 0
    save_adapter(model, tmp_path / "a", "x")
    assert logits(load_adapter(small(), tmp_path / "a").eval()).equal(before)
    assert logits(unmerge(merge(model))).allclose(before, atol=1e-5)
    assert logits(remove(model)).allclose(logits(small()), atol=1e-5)


def test_all_linear_leaves_the_head_out():
    for tied in (True, False):
        names = targets_of(small(tie_word_embeddings=tied))
        assert {name.split(".")[-1] for name in names} == set(ENDS)
    assert targets_of(torch.nn.Sequential(torch.nn.Linear(2, 2))) == ["0"] # knows of no head


@pytest.mark.parametrize("wrong, message", [
    (dict(r=0), "r is 0: it must be an integer"),
    (dict(r=-1), "r is -1"),
    (dict(r=2.5), "r is 2.5"),
    (dict(r="8"), "r is '8'"),
    (dict(r=None), "r is None"),
    (dict(lora_alpha=0), "lora_alpha is 0"),
    (dict(lora_alpha=-1), "lora_alpha is -1"),
    (dict(lora_alpha=float("inf")), "lora_alpha is inf"),
    (dict(lora_alpha=float("nan")), "lora_alpha is nan"),
    (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
    (dict(lora_dropout=-0.1), "lora_dropout is -0.1"),
    (dict(target_modules=None), "target_modules is None"),
    (dict(target_modules=5), "target_modules is 5"),
    (dict(target_modules=[]), "no layer is called"),
    (dict(target_modules=["q_porj"]), "no layer is called 'q_porj': choose among .*q_proj"),
    (dict(target_modules=["q_proj", "v_porj"]), "no layer is called 'v_porj'"),
    (dict(target_modules="q_proj"), "no layer is called 'q_proj'"),
    (dict(target_modules="*"), "no regular expression"),
    (dict(target_modules=["embed_tokens"]), "no linear layer"),
    (dict(target_modules=["norm"]), "no linear layer"),
    (dict(target_modules=["lm_head"]), "lm_head shares its weight"),
    (dict(target_modules=["proj"]), "no layer is called 'proj'"),
], ids=str)
def test_a_wrong_option_gets_one_message_and_the_model_is_as_it_was(wrong, message):
    model = small()
    with pytest.raises(LoRAError, match=message) as failure:
        inject(model, **wrong)
    assert "\n" not in str(failure.value)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused():
    with pytest.raises(LoRAError, match="has an adapter already"):
        inject(inject(small()))


@pytest.mark.parametrize("targets", ("all-linear", ["c_attn"], ["c_fc", "lm_head"], ["q_proj"]))
def test_gpt2_is_refused_and_not_left_without_an_adapter(targets):
    config = GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    model = GPT2LMHeadModel(config)
    with pytest.raises(LoRAError, match=r"Conv1D.*LoraConfig\(fan_in_fan_out=True\)"):
        inject(model, target_modules=targets)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_without_linear_layers_is_told_what_it_has():
    with pytest.raises(LoRAError, match="no linear layer .* types Embedding, ModuleList"):
        inject(torch.nn.ModuleList([torch.nn.Embedding(4, 2)]))


# --- tokens

def test_only_the_named_rows_move():
    base = small()
    before = base.get_input_embeddings().weight.detach().clone()
    model = learned(base, tokens=[5, 9])
    now = model.get_input_embeddings().weight.detach()
    moved = (now != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [5, 9] and model.get_output_embeddings().weight.equal(now)
    with without_adapter(model):
        assert model.get_input_embeddings().weight.equal(before)
    remove(model)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert base.get_input_embeddings().weight.equal(before)


def test_a_copy_does_not_hang_on_the_model_it_was_made_from():
    model = learned(tokens=[5, 9])
    before, other = logits(model), copy.deepcopy(model)
    assert logits(remove(other)).equal(logits(small())) and logits(model).equal(before)
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight


@pytest.mark.parametrize("ids, message", [
    ([], "at least one token"), ([3, 3], "each once"),
    ([64], "token 64 is not in the vocabulary of 64"), ([-1], "token -1")])
def test_wrong_tokens(ids, message):
    with pytest.raises(LoRAError, match=message):
        train_tokens(inject(small()), ids)


def test_tokens_are_named_once():
    with pytest.raises(LoRAError, match="all of them at once"):
        train_tokens(train_tokens(inject(small()), [1]), [2])


# --- merge

@pytest.mark.parametrize(
    "more", [dict(), dict(use_dora=True), dict(use_rslora=True), dict(tokens=[1, 2])], ids=str)
def test_merge_and_back(more):
    model = learned(**more)
    before, base = logits(model), small()
    merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5) # roundings of float32
    plain = remove(copy.deepcopy(model))
    assert not adapters(plain) and token_rows(plain) is None
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert logits(plain).equal(logits(model))
    unmerge(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.allclose(logits(remove(model)), logits(base), atol=1e-5)


def test_what_cannot_be_merged():
    with pytest.raises(LoRAError, match="no adapter to merge"):
        merge(small())
    with pytest.raises(LoRAError, match="no adapter is merged"):
        unmerge(learned())
    model = merge(learned())
    for action, message in ((lambda: merge(model), "merged already"),
                            (lambda: check_applied(model, IDS), "unmerge it first")):
        before = logits(model)
        with pytest.raises(LoRAError, match=message):
            action()
        assert logits(model).equal(before)


# --- files

@pytest.mark.parametrize("more", [
    dict(), dict(use_dora=True, r=3), dict(use_rslora=True, lora_alpha=8),
    dict(target_modules=["q_proj", "down_proj"]), dict(tokens=[7, 2]), dict(lora_dropout=0.2),
], ids=str)
def test_files_go_both_ways(more, tmp_path):
    model = learned(**more)
    save_adapter(model, tmp_path / "ours", "somewhere")
    written = sorted(path.name for path in tmp_path.rglob("*"))
    assert written == ["adapter_config.json", "adapter_model.safetensors", "ours"]
    theirs = PeftModel.from_pretrained(small(), tmp_path / "ours", is_trainable=True).eval()
    assert logits(theirs).equal(logits(model)) and same(trained(theirs), trained(model))
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(small(), tmp_path / "theirs").eval()
    assert logits(back).equal(logits(model)) and same(trained(back), trained(model))
    assert trainable(back) == trainable(model)
    ours, peft = (json.loads((tmp_path / name / "adapter_config.json").read_text())
                  for name in ("ours", "theirs"))
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "peft_type",
                "task_type", "trainable_token_indices"):
        assert ours[key] == peft[key]


def test_a_training_that_goes_on_from_a_file_is_the_same(tmp_path):
    model = learned()
    save_adapter(model, tmp_path / "a", "x")
    other = load_adapter(small(), tmp_path / "a")
    assert [loss for loss, _ in learn(model)] == [loss for loss, _ in learn(other)]


def test_adapters_are_switched_and_nothing_is_left_behind(tmp_path):
    one = learned(r=2)
    two = learned(r=5, tokens=[3], use_dora=True, target_modules=["v_proj"])
    for name, model in (("one", one), ("two", two)):
        save_adapter(model, tmp_path / name, "x")
    base = small()
    for name, model in (("one", one), ("two", two), ("one", one)):
        assert logits(load_adapter(base, tmp_path / name).eval()).equal(logits(model))
    assert logits(remove(base)).equal(logits(small()))


def test_saving_writes_over_nothing(tmp_path):
    model = learned()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(OutputError, match="nothing is written over"):
            save_adapter(model, tmp_path / name, "x")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_adapter(model, tmp_path / "empty", "x")
    with pytest.raises(LoRAError, match="no adapter"):
        save_adapter(small(), tmp_path / "none", "x")
    with pytest.raises(LoRAError, match="cannot be saved: unmerge it first"):
        save_adapter(merge(model), tmp_path / "merged", "x")
    assert not (tmp_path / "none").exists() and not (tmp_path / "merged").exists()


def kill(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def end_of_a_child_that_saves(model, folder, module, name):
    "The exit code of a process that saves, with a function replaced by one that kills it."
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        signal.alarm(60) # a child that hangs is ended, by another signal
        setattr(module, name, kill)
        save_adapter(model, folder, "x")
    finally:
        os._exit(1)


@pytest.mark.parametrize("module, name", [
    (files, "save_file"), (Path, "write_text"), (os, "replace")],
    ids=["before the weights", "before the config", "before the name"])
def test_a_kill_leaves_no_half_adapter(module, name, tmp_path):
    model, folder = learned(), tmp_path / "adapter"
    assert end_of_a_child_that_saves(model, folder, module, name) == -signal.SIGKILL
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1 # what it had begun
    save_adapter(model, folder, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] # that is gone
    load_adapter(small(), folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(learned(tokens=[4, 6], use_dora=True), folder, "x")
    return folder


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes):
    def spoil(folder):
        old = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(old | changes))
    return spoil


def tensors(change):
    return lambda folder: save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def cut(name, share):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def without(part):
    return tensors(lambda old: {name: t for name, t in old.items() if part not in name})


def no_config(folder): (folder / CONFIG).unlink()
def no_tensors(folder): (folder / TENSORS).unlink()
def list_for_a_config(folder): (folder / CONFIG).write_text("[]")


def renamed(old):
    return {name.replace("base_model.", ""): t for name, t in old.items()}


def one_more(old):
    return old | {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 32)}


def turned(old):
    end = "q_proj.lora_A.weight"
    return {name: t.T.contiguous() if name.endswith(end) else t for name, t in old.items()}


@pytest.mark.parametrize("spoil, message", [
    (no_config, "has no adapter_config.json"),
    (no_tensors, "has no adapter_model.safetensors"),
    (shutil.rmtree, "has no adapter_config.json"),
    (cut(CONFIG, 0.5), "is not JSON"),
    (cut(CONFIG, 0), "is not JSON"),
    (list_for_a_config, "peft_type is None"),
    (cut(TENSORS, 0.999), "cannot be read"),
    (cut(TENSORS, 0.1), "cannot be read"),
    (cut(TENSORS, 0), "cannot be read"),
    (config(peft_type="IA3"), "peft_type is 'IA3'"),
    (config(r=None), "does not say r"),
    (config(target_modules=[]), "does not say target_modules"),
    (config(bias="all"), "bias = 'all' is not known"),
    (config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (config(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    (config(modules_to_save=["lm_head"]), "modules_to_save"),
    (config(layers_to_transform=[0]), "layers_to_transform"),
    (config(use_qalora=True), "use_qalora"),
    (config(r=4), "must be \\(4, 32\\) for this base and r = 4"),
    (config(use_dora=False), "lora_magnitude_vector has no place"),
    (config(trainable_token_indices=None), "trainable_tokens_delta has no place"),
    (config(trainable_token_indices=[4]), "must be \\(1, 32\\)"),
    (config(trainable_token_indices=[4, 99]), "token 99 is not in the vocabulary of 64"),
    (config(trainable_token_indices=[4, 4]), "name at least one token, and each once"),
    (config(trainable_token_indices={"embed_tokens": [4, 6]}), "must be a list of integers"),
    (config(trainable_token_indices=[[4], 6]), "must be a list of integers"),
    (config(target_modules=["q_proj"]), "has no place"),
    (config(target_modules=["c_attn"]), "no layer is called 'c_attn'"),
    (config(target_modules=5), "target_modules is 5"),
    (config(target_modules=[["q_proj"]]), "target_modules is \\[\\['q_proj'\\]\\]"),
    (config(target_modules="*"), "no regular expression"),
    (config(lora_alpha=-1), "alpha is -1"),
    (config(lora_dropout=2), "dropout is 2"),
    (config(r="8"), "r is '8'"),
    (without("layers.1.mlp"), "there is no .*layers.1.mlp"),
    (without("lora_B"), "there is no .*lora_B"),
    (without("magnitude"), "there is no .*magnitude"),
    (without("token_adapter"), "there is no .*trainable_tokens_delta"),
    (tensors(renamed), "there is no base_model"),
    (tensors(one_more), "lm_head.lora_A.weight has no place"),
    (tensors(turned), "q_proj.lora_A.weight is \\(32, 8\\), and must be \\(8, 32\\)"),
])
@pytest.mark.parametrize("with_one", [False, True], ids=["bare", "with an adapter"])
def test_what_does_not_fit_is_not_loaded_and_the_model_stays(
        spoil, message, with_one, saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    spoil(folder)
    model = learned(r=2) if with_one else small()
    before, layers = logits(model), len(adapters(model))
    with pytest.raises(LoRAError, match=message) as failure:
        load_adapter(model, folder)
    assert "\n" not in str(failure.value) and str(folder) in str(failure.value)
    assert logits(model.eval()).equal(before) and len(adapters(model)) == layers


@pytest.mark.parametrize("other", [
    dict(hidden_size=48), dict(intermediate_size=64),
    dict(num_hidden_layers=3), dict(num_hidden_layers=1)], ids=str)
def test_another_base_is_refused(other, saved):
    with pytest.raises(LoRAError, match="another base"):
        load_adapter(small(**other), saved)


def test_a_merged_adapter_is_not_switched(saved):
    with pytest.raises(LoRAError, match="unmerge it first"):
        load_adapter(merge(learned()), saved)


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_changed_byte_never_gives_a_traceback(saved, tmp_path_factory, place, change):
    "It may still be an adapter (with another weight); but nothing except a LoRAError comes out."
    folder = tmp_path_factory.mktemp("byte") / "adapter"
    shutil.copytree(saved, folder)
    path = sorted(folder.iterdir())[place % 2]
    data = bytearray(path.read_bytes())
    limit = len(data)
    if path.name == TENSORS: # only the header, which says what the weights are
        limit = 8 + int.from_bytes(data[:8], "little")
    data[place // 2 % limit] ^= change
    path.write_bytes(data)
    try:
        load_adapter(small(), folder)
    except LoRAError as e:
        assert "\n" not in str(e)


# --- is it applied?

def test_a_working_adapter_is_told_from_one_that_does_nothing():
    model = learned(lora_dropout=0.5)
    model.train()
    change = check_applied(model, IDS)
    assert model.training and change > 0
    model.eval()
    with torch.no_grad(), without_adapter(model):
        assert model(IDS).logits.equal(small()(IDS).logits)
    assert (logits(model) - logits(small())).abs().max().item() == change


def bypassed():
    model = learned()
    for layer in adapters(model).values():
        layer.forward = layer.base.forward
    return model


def switched_off():
    model = learned()
    next(iter(adapters(model).values())).active = False
    return model


def one_empty():
    model = learned()
    next(iter(adapters(model).values())).lora_B.data.zero_()
    return model


@pytest.mark.parametrize("make, message", [
    (small, "has no adapter"),
    (lambda: inject(small()), "lora_B is zero in 14 of 14"),
    (one_empty, "lora_B is zero in 1 of 14"),
    (switched_off, "switched off in 1 of 14"),
    (bypassed, "not in the forward pass")])
def test_an_adapter_that_is_not_applied_is_noticed(make, message):
    with pytest.raises(LoRAError, match=message):
        check_applied(make(), IDS)


def test_the_config_names_ends_where_they_say_the_same():
    assert adapter_config(inject(small()), "x")["target_modules"] == sorted(ENDS)
    one = inject(small(), target_modules=["layers.1.mlp.up_proj"])
    assert adapter_config(one, "x")["target_modules"] == ["model.layers.1.mlp.up_proj"]


def test_switched_off_and_on_even_after_an_error():
    model = learned()
    before = logits(model)
    with pytest.raises(ZeroDivisionError):
        with without_adapter(model):
            raise ZeroDivisionError
    assert logits(model).equal(before)
