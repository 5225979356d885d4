"The memory estimate: counts and bytes against models, hooks, optimisers and a meter; what fits, and the one message where nothing does."
import inspect

import matplotlib
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import sftlab.memory as memory
from sftlab.memory import (CONFIGS, METHODS, OPTIMIZERS, PRECISIONS, MemoryEstimateError, autocast_bytes, build, count_parameters, estimate, explore, largest, layer_activations, make_fake, measure, meter,
                           model_dims, optimizer_bytes, plot, quantized_bytes, saved_bytes)

matplotlib.use("Agg")
SMALL = dict(vocab_size=600, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {"llama": LlamaConfig(**SMALL), "mistral": MistralConfig(**SMALL, sliding_window=None), "qwen2": Qwen2Config(**SMALL), "qwen3": Qwen3Config(**SMALL, head_dim=96)}
sizes = st.integers(1, 6)


# --- parameters

@settings(max_examples=15)
@given(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), sizes, sizes, sizes, st.integers(1, 3), st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3)]), st.booleans(), st.booleans())
def test_parameters_are_those_of_the_built_model(kind, vocab, width, mlp, layers, heads, tied, bias):
    config = AutoConfig.for_model(kind, vocab_size=10 * vocab, hidden_size=24 * width, intermediate_size=7 * mlp, num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1],
                                  tie_word_embeddings=tied, **dict(attention_bias=bias, mlp_bias=bias) if kind == "llama" else {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(config) == count_parameters(model) == model.num_parameters()
    assert sorted(sum(memory.parameter_sizes(model_dims(config)), [])) == sorted(p.numel() for p in model.parameters())


# --- bytes

@settings(max_examples=25)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(OPTIMIZERS))
def test_optimizer_state_to_the_byte(numbers, dtype, name):
    import bitsandbytes as bnb
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in numbers]
    make = {"adamw": torch.optim.AdamW, "adamw_8bit": bnb.optim.AdamW8bit, "sgd_momentum": lambda p: torch.optim.SGD(p, momentum=0.9), "sgd": torch.optim.SGD}[name]
    optimizer = make(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    blocks = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    tables = 2 * 256 * 4 if name == "adamw_8bit" and max(numbers) < 4096 else 0  # none is needed where nothing is in 8 bits
    assert optimizer_bytes(numbers, dtype.itemsize, name) - tables == sum(blocks.values())


@pytest.mark.parametrize("inputs, outputs", [(64, 64), (128, 200), (512, 1000), (704, 256), (64, 3), (192, 5)])
def test_four_bit_matrices_to_the_byte(inputs, outputs):
    import bitsandbytes as bnb
    weight = bnb.nn.Linear4bit(inputs, outputs, bias=False, compress_statistics=True, quant_type="nf4").to("cpu").weight
    state = weight.quant_state
    assert quantized_bytes(inputs * outputs) == (weight.nbytes, sum(t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)))


# --- activations

def fake(config, batch, length, method, precision, attention, checkpointing=False, **more):
    model = build(config, method, precision, attention, checkpointing=checkpointing, **more)
    with FakeTensorMode():
        return saved_bytes(make_fake(model), batch, length, precision)


def predicted(config, batch, length, method, precision, attention, checkpointing=False, r=16, targets="all-linear"):
    e = estimate(config, method, batch, length, precision=precision, attention=attention, checkpointing=checkpointing, r=r, targets=targets)
    copies = 0 if checkpointing and method != "full" else e.terms["autocast copies"]
    if checkpointing and method == "full" and precision == "mixed":
        copies = 2 * SMALL["vocab_size"] * SMALL["hidden_size"]  # of the head; those of the layers are in use, but not saved
    return e.terms["activations"] + copies + 4 * batch * length * SMALL["vocab_size"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_the_hooks_count(family, method, precision, attention):
    config = FAMILIES[family]
    for checkpointing in (False, True):
        assert predicted(config, 3, 80, method, precision, attention, checkpointing) == pytest.approx(fake(config, 3, 80, method, precision, attention, checkpointing), rel=0.05)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj")], ids="-".join)
def test_activations_of_a_layer_where_only_some_matrices_are_adapted(targets, precision, attention):
    "A layer's growth: in the very first layer what stands before the first adapter needs no gradient, and less is saved than we say."
    def counted(layers):
        return fake(Qwen3Config(**SMALL | dict(num_hidden_layers=layers), head_dim=96), 3, 80, "lora", precision, attention, r=8, targets=targets)
    c = model_dims(FAMILIES["qwen3"])
    said = layer_activations(c, 3, 80, "lora", precision, attention, 8, targets)[0] + autocast_bytes(c, "lora", precision, 8, targets) / c["num_hidden_layers"]
    assert said == pytest.approx(counted(3) - counted(2), rel=0.01)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fake_is_real(family):
    for precision in ("fp32", "bf16"):
        assert saved_bytes(build(FAMILIES[family], "full", precision, device="cpu"), 2, 16, precision) == fake(FAMILIES[family], 2, 16, "full", precision, "sdpa")


def test_activations_are_linear_in_layers_and_rows():
    def counted(layers, batch):
        return fake(LlamaConfig(**SMALL | dict(num_hidden_layers=layers)), batch, 32, "full", "bf16", "sdpa")
    assert counted(3, 2) - counted(2, 2) == counted(2, 2) - counted(1, 2) == layer_activations(model_dims(FAMILIES["llama"]), 2, 32, "full", "bf16")[0]


# --- the peak

def metered(config, method, precision, attention, checkpointing):
    "Gradients, activations, and what the moment adds."
    model = build(config, method, precision, attention, checkpointing=checkpointing)
    with FakeTensorMode():
        make_fake(model)
        with meter() as used:
            for _ in range(2):
                used.peak = used.now
                memory._forward(model, 2, 128, precision).backward()
    return used.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method, precision, attention", [("full", "bf16", "sdpa"), ("full", "fp32", "eager"), ("full", "mixed", "sdpa"), ("lora", "mixed", "sdpa"), ("lora", "bf16", "eager")])
def test_the_peak_is_what_the_meter_sees(method, precision, attention, checkpointing):
    config = LlamaConfig(**SMALL | dict(vocab_size=16000))
    e = estimate(config, method, 2, 128, precision=precision, attention=attention, checkpointing=checkpointing)
    above = e.total - sum(e.terms[name] for name in ("weights", "adapters", "optimiser"))
    assert above == pytest.approx(metered(config, method, precision, attention, checkpointing), rel=0.05)


def test_the_meter_notes_and_forgets():
    with meter() as used:
        a = torch.ones(1000)
        b = a.view(10, 100)  # no memory of its own
        c = a + 1
        del c
    assert (used.now, used.peak) == (4000, 8000) and b.shape == (10, 100)


# --- the estimate

@settings(max_examples=60)
@given(st.sampled_from(list(CONFIGS)), st.sampled_from(METHODS), st.integers(1, 8), st.integers(1, 4096), st.sampled_from(PRECISIONS), st.booleans(), st.sampled_from(["sdpa", "eager"]), st.sampled_from(OPTIMIZERS))
def test_estimates_add_up_and_grow(model, method, batch, length, precision, checkpointing, attention, optimizer):
    def total(batch, length):
        return estimate(model, method, batch, length, precision=precision, checkpointing=checkpointing, attention=attention, optimizer=optimizer).total
    e = estimate(model, method, batch, length, precision=precision, checkpointing=checkpointing, attention=attention, optimizer=optimizer)
    assert e.total == sum(e.terms.values()) == pytest.approx(e.table()["GB"].sum() * 1e9)
    assert set(e.terms) == set(e.formulas) and all(size >= 0 and isinstance(size, int) for size in e.terms.values())
    assert total(batch, length) < total(batch + 1, length) and total(batch, length) < total(batch, length + 1)


def test_methods_order_as_they_should():
    full, lora, qlora = (estimate("llama-2-7b", m, 1, 512).total for m in METHODS)
    assert full > lora > qlora
    assert estimate("llama-2-7b", "full", fused_head=True).terms["logits"] == 0
    assert estimate("llama-2-7b", "full").terms["weights"] == 4 * 6_738_415_616 and estimate("llama-2-7b", "full", precision="bf16").terms["weights"] == 2 * 6_738_415_616


def test_it_reads_well_and_draws():
    e = estimate("llama-2-7b", "qlora", 2, 512)
    lines = repr(e).splitlines()
    assert lines[0].startswith("llama-2-7b, qlora r=16, 2 x 512") and "GiB" in lines[-2] and max(map(len, lines)) < 130
    assert f"{e.total / 1e9:.2f} GB" in e._repr_html_()
    ax = plot([e, estimate("llama-2-7b", "full", 2, 512)])
    assert max(p.get_x() + p.get_width() for p in ax.patches) == pytest.approx(estimate("llama-2-7b", "full", 2, 512).total / 1e9)


# --- what fits

@settings(max_examples=20)
@given(st.sampled_from(["smollm2-135m", "qwen3-0.6b", "llama-2-7b"]), st.sampled_from(["lora", "qlora"]), st.sampled_from([16, 24, 80]), st.integers(1, 2000))
def test_largest_fits_and_one_more_does_not(model, method, card, length):
    room = 0.9 * card * 2**30
    try:
        batch = largest(model, method, card, length=length)
    except MemoryEstimateError:
        assert estimate(model, method, 1, length).total > room
        return
    assert estimate(model, method, batch, length).total <= room < estimate(model, method, batch + 1, length).total
    longest = largest(model, method, card, batch=batch)
    assert longest >= length and estimate(model, method, batch, longest).total <= room < estimate(model, method, batch, longest + 1).total


@pytest.mark.parametrize("call, says", [
    (lambda: largest("llama-65b", "qlora", 24, length=512), "weights alone are .*what would help"),
    (lambda: largest("llama-2-7b", "full", 80, batch=1), "optimiser .*LoRA or QLoRA"),
    (lambda: largest("llama-2-7b", "lora", 24), "either batch or length"),
    (lambda: largest("llama-2-7b", "lora", 24, batch=1, length=1), "either batch or length"),
    (lambda: largest("llama-2-7b", "lora", -1, batch=1), "more than 0 GB"),
    (lambda: estimate("llama-7", "full"), "llama-2-7b"),
    (lambda: estimate(GPT2Config(), "full"), "gpt2 cannot be estimated"),
    (lambda: estimate(object(), "full"), "object cannot be estimated"),
    (lambda: estimate("llama-2-7b", "lorra"), "method 'lorra' is none of full, lora, qlora"),
    (lambda: estimate("llama-2-7b", precision="fp8"), "precision"),
    (lambda: estimate("llama-2-7b", optimizer="adam"), "optimizer"),
    (lambda: estimate("llama-2-7b", attention="flash"), "attention"),
    (lambda: estimate("llama-2-7b", batch=0), "batch is 0"),
    (lambda: estimate("llama-2-7b", length=2.5), "length is 2.5"),
    (lambda: estimate("llama-2-7b", "lora", targets=["query"]), "query is none of q_proj"),
])
def test_one_clear_message(call, says):
    with pytest.raises(MemoryEstimateError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_measure_says_that_there_is_no_card():
    with pytest.raises(MemoryEstimateError, match="no CUDA card"):
        measure("smollm2-135m", "lora", 1, 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [256, 1024, 2048])
def test_measured_within_a_tenth(method, length):
    found = measure("qwen2.5-0.5b", method, 2, length)
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.1)


def test_the_widget_uses_old_parts_only():
    import ipywidgets
    assert not {"Stack", "TagsInput", "ColorsInput", "IntsInput", "FloatsInput"} & set(inspect.getsource(explore).replace("(", " ").replace(",", " ").split())
    assert isinstance(explore(), ipywidgets.Widget)
