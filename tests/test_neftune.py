"NEFTune: the library's noise, but each document's own length; never in evaluation; never left on."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import (
    activate_neftune, deactivate_neftune, neftune_post_forward_hook)

from sftlab.errors import TrainingError
from sftlab.lora import inject, train_tokens
from sftlab.neftune import add_noise, document_lengths, neftune
from sftlab.packing import collate_packed
from sftlab.training import padded

ALPHAS = (0.1, 5, 15, 45)
SHAPES = ((1, 1, 8), (3, 7, 192), (2, 64, 193), (1, 512, 32))


def small(dtype=torch.float32):
    "A model of a few thousand weights, in training."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(dtype).train()


BASE = small()
IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def theirs(embedded, alpha):
    "What transformers' hook returns."
    module = nn.Module()
    module.neftune_noise_alpha = alpha
    torch.manual_seed(5)
    return neftune_post_forward_hook(module, None, embedded)


def ours(embedded, alpha):
    torch.manual_seed(5)
    return add_noise(embedded, alpha, document_lengths(embedded.shape[:2]))


def all_hooks(model):
    "Every forward hook on any module of a model."
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the noise

@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_noise_is_that_of_transformers_to_the_last_bit(shape, alpha):
    torch.manual_seed(0)
    embedded = torch.randn(shape)
    noisy = ours(embedded, alpha)
    assert noisy.equal(theirs(embedded, alpha)) and not noisy.equal(embedded)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_it_is_that_to_rounding(dtype, shape):
    """Ours rounds the number and then the product, theirs the product.

    Where a draw is rounded up to the upper bound, torch takes the lower one: so at the very edge
    the sign may differ, but never the size.
    """
    for alpha in ALPHAS:
        blank = torch.zeros(shape, dtype=dtype)
        a, b = ours(blank, alpha), theirs(blank, alpha)
        assert a.dtype == b.dtype == dtype
        a, b = a.double(), b.double()
        bound = alpha / math.sqrt(shape[1] * shape[2])
        step = torch.finfo(dtype).eps
        same_size = (a.abs() - b.abs()).abs() <= 2 * step * b.abs() + step * bound
        edge = b.abs() >= (1 - 2 * step) * bound
        assert same_size.all() and ((a.sign() == b.sign()) | edge | (b.abs() <= step)).all()


def test_where_the_bound_has_few_bits_sixteen_bits_are_equal_too():
    blank = torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    a, b = ours(blank, 4.0), theirs(blank, 4.0) # bound 1 / 8
    assert a.equal(b)


@pytest.mark.parametrize("L, d", [(28, 192), (512, 64), (64, 1024)])
def test_a_sequence_gets_the_same_noise_whatever_its_length(L, d):
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(8, L, d), 5, torch.tensor(L))
    assert noise.flatten(1).norm(dim=1).mean().item() == pytest.approx(5 / 3**0.5, rel=0.01)
    assert noise.abs().max() <= 5 / math.sqrt(L * d) * (1 + 1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_model_sees_the_same_noise_as_with_transformers(alpha):
    model, found = small(), []
    torch.manual_seed(7)
    with neftune(model, alpha):
        found.append(model(IDS).logits)
    handle = activate_neftune(model, alpha)
    torch.manual_seed(7)
    found.append(model(IDS).logits)
    deactivate_neftune(model, handle)
    assert found[0].equal(found[1]) and not found[0].equal(model(IDS).logits)


def test_a_model_in_bfloat16_sees_noise_in_bfloat16():
    model = small(torch.bfloat16)
    noise = noise_in(model, dict(input_ids=IDS))
    assert noise.dtype == torch.bfloat16
    size = noise.float().flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.full((3,), 5 / 3**0.5), rtol=0.1, atol=0)


def test_gradients_too_are_those_with_transformers():
    found = []
    for library in (False, True):
        model = copy.deepcopy(BASE)
        torch.manual_seed(7)
        if library:
            activate_neftune(model, 5)
            model(IDS, labels=IDS).loss.backward()
        else:
            with neftune(model, 5):
                model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*found))


# --- each document's own length

documents = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def row_of(length):
    return dict(input_ids=[i % 60 for i in range(length)], labels=[1] * length)


def noise_in(model, batch, alpha=5):
    "What neftune adds in a call, (batch, length, width)."
    seen, inputs = [], {name: t for name, t in batch.items() if name != "labels"}
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.0"))
    spy = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), neftune(model, alpha):
        model(**inputs, use_cache=False)
    spy.remove()
    return seen[0] - model.get_input_embeddings()(batch["input_ids"]).detach()


def holds(noise, lengths, alpha=5, width=32):
    "Within each token's bound, and near it somewhere: (documents, their places) in `lengths`."
    for part, length in lengths:
        bound = alpha / math.sqrt(length * width)
        largest = noise[part].abs().max().item()
        assert 0.8 * bound < largest <= bound * (1 + 1e-5)


@settings(max_examples=25)
@given(documents, st.booleans())
def test_padding_does_not_count(lengths, left):
    batch = padded([row_of(n) for n in lengths])
    if left:
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    noise = noise_in(BASE, batch)
    mask = batch["attention_mask"].bool()
    holds(noise, [((i, mask[i]), n) for i, n in enumerate(lengths)])


@settings(max_examples=25)
@given(documents)
def test_neighbours_in_a_packed_row_do_not_count(lengths):
    batch = collate_packed([row_of(n) for n in lengths])
    begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
    noise = noise_in(BASE, batch)
    holds(noise, [((0, slice(begin, begin + n)), n) for begin, n in zip(begins, lengths)])


@settings(max_examples=50)
@given(documents)
def test_lengths_under_padding_packing_and_neither(lengths):
    rows = [row_of(n) for n in lengths]
    batch, packed = padded(rows), collate_packed(rows)
    shape = batch["input_ids"].shape
    found = document_lengths(shape, attention_mask=batch["attention_mask"])
    assert found.tolist() == [[n] * shape[1] for n in lengths]
    found = document_lengths(packed["input_ids"].shape, position_ids=packed["position_ids"])
    assert found.tolist() == [sum(([n] * n for n in lengths), [])]
    assert document_lengths(shape).tolist() == [[shape[1]] * shape[1]] * shape[0]


def test_a_mask_for_attention_itself_is_no_mask_of_padding():
    "The four-dimensional mask of lesson 09 says nothing about padding; the positions do."
    batch = collate_packed([row_of(4), row_of(6)])
    found = document_lengths((1, 10), torch.zeros(1, 1, 10, 10), batch["position_ids"])
    assert found.tolist() == [[4] * 4 + [6] * 6]


def test_positions_of_one_row_hold_for_the_whole_batch():
    "A model may be called with positions of shape (1, length) for several rows."
    assert document_lengths((3, 5), position_ids=torch.arange(5)[None]).tolist() == [[5] * 5] * 3


def test_a_call_does_not_remember_the_one_before():
    with neftune(BASE, 5), torch.no_grad():
        BASE(IDS, attention_mask=torch.ones_like(IDS))
        torch.manual_seed(7)
        alone = BASE(IDS).logits
        BASE(**{k: t for k, t in padded([row_of(2), row_of(12)]).items() if k != "labels"})
        torch.manual_seed(7)
        assert BASE(IDS).logits.equal(alone)


# --- on in training only, and gone afterwards

def with_peft(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def with_peft_tokens(model):
    options = dict(r=4, target_modules="all-linear", trainable_token_indices=[3, 5])
    return get_peft_model(model, LoraConfig(**options))


def with_lora(model):
    return inject(model, r=4, lora_alpha=8)


def with_lora_tokens(model):
    return train_tokens(inject(model, r=4, lora_alpha=8), [3, 5])


KINDS = (lambda model: model, with_peft, with_peft_tokens, with_lora, with_lora_tokens)
NAMES = ("plain", "peft", "peft_tokens", "lora", "lora_tokens")


@pytest.fixture(params=KINDS, ids=NAMES)
def model(request):
    torch.manual_seed(2)
    return request.param(copy.deepcopy(BASE)).train()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_off_in_evaluation_and_on_in_training(model):
    clean = logits(model)
    with neftune(model, 5) as same:
        assert same is model
        assert not logits(model).equal(clean)
        assert not logits(model).equal(logits(model))  # drawn anew in each call
        model.eval()
        assert logits(model).equal(clean)
        model.train()
        assert not logits(model).equal(clean)


def test_hooks_are_gone_after_a_normal_end(model):
    before, clean = all_hooks(model), logits(model)
    with neftune(model, 5):
        assert all_hooks(model) == before + 2
    assert all_hooks(model) == before and logits(model).equal(clean)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_hooks_are_gone_after_an_error(model, error):
    before, clean = all_hooks(model), logits(model)
    with pytest.raises(error), neftune(model, 5):
        model(input_ids=IDS)
        raise error
    assert all_hooks(model) == before and logits(model).equal(clean)


def test_hooks_of_others_stay(model):
    mine = model.get_input_embeddings().register_forward_hook(lambda *_: None)
    with neftune(model, 5):
        pass
    assert mine.id in model.get_input_embeddings()._forward_hooks


def test_an_adapter_sees_the_noise_that_transformers_would_add():
    model = with_peft(copy.deepcopy(BASE)).train()
    torch.manual_seed(7)
    with neftune(model, 5):
        found = logits(model)
    handle = activate_neftune(model, 5)
    torch.manual_seed(7)
    assert found.equal(logits(model))
    deactivate_neftune(model, handle)


def test_a_wrapped_model_passes_on_its_padding():
    model, lengths = with_peft(copy.deepcopy(BASE)).train(), (3, 12)
    noise = noise_in(model, padded([row_of(n) for n in lengths]))
    holds(noise, [((0, slice(3)), 3), ((1, slice(12)), 12)])


# --- alpha

def test_alpha_zero_changes_nothing(model):
    clean = logits(model)
    with neftune(model, 0):
        assert logits(model).equal(clean)


@pytest.mark.parametrize("alpha", [-1, -0.1, math.nan, "5", None, True, [5], 5j])
def test_a_bad_alpha_is_refused_and_leaves_nothing(alpha):
    said = "alpha is .*: it must be a number, and not negative"
    with pytest.raises(TrainingError, match=said), neftune(BASE, alpha):
        BASE(IDS)
    assert all_hooks(BASE) == 0
    with pytest.raises(TrainingError, match=said):
        add_noise(torch.zeros(1, 2, 3), alpha, torch.tensor(2))
