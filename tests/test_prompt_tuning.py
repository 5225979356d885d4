"Small adapters: PEFT's logits, gradients and answers; a bottleneck written out; what is refused."
import copy

import pytest
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sftlab.errors import LoRAError
from sftlab.lora import train_tokens, trainable
from sftlab.prompt_tuning import (
    Bottleneck, Prefix, ProjectedPrefix, PTuning, SoftPrompt, add_adapters, moves, put_before,
    shifted, some_embeddings)
from sftlab.training import count_targets, flatten_rows, nll_sum, padded, target_nll_sum

WIDTH, N, HIDDEN = 32, 5, 24


def small(kv_heads=1, dtype=torch.float32):
    "A model of a few thousand weights, whose every part matters."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=2)
    model = LlamaForCausalLM(config).to(dtype).eval()
    for p in model.parameters():
        p.data *= 4
    return model


BASE = small()
CAUSAL = dict(task_type="CAUSAL_LM", num_virtual_tokens=N)
NETWORK = CAUSAL | dict(encoder_hidden_size=HIDDEN)
KINDS = {
    "prompt": (PromptTuningConfig(**CAUSAL), SoftPrompt, torch.zeros(N, WIDTH)),
    "p-tuning": (PromptEncoderConfig(**NETWORK), PTuning, torch.zeros(N, WIDTH), HIDDEN),
    "prefix": (PrefixTuningConfig(**CAUSAL), Prefix, N),
    "projected": (PrefixTuningConfig(**NETWORK, prefix_projection=True), ProjectedPrefix, N,
                  HIDDEN)}


def rows(*lengths):
    dice = torch.Generator().manual_seed(1)
    made = [torch.randint(3, 64, (n,), generator=dice).tolist() for n in lengths]
    return [dict(input_ids=ids, labels=[-100, *ids[1:]]) for ids in made]


BATCH = padded(rows(9, 4, 7))
INPUTS = {name: t for name, t in BATCH.items() if name != "labels"}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def base_of(kind, dtype=torch.float32):
    """A model for a method: with fewer heads for keys and values than for queries, but for one.

    There PEFT makes the vectors before a prefix's network narrower, Li and Liang do not.
    """
    return small(1 + (kind == "projected"), dtype)


def pair(kind, base=None):
    "Ours and PEFT's, with the same random weights."
    base = base or base_of(kind)
    config, layer, *options = KINDS[kind]
    torch.manual_seed(3)
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    options = [o.clone() if torch.is_tensor(o) else o for o in options]
    ours = put_before(copy.deepcopy(base), layer, *options).eval()
    with torch.no_grad():
        for a, b in zip(trained(ours), trained(theirs), strict=True):
            a.copy_(b)
    return ours, theirs


def ours(kind):
    return pair(kind)[0]


# --- the same as PEFT's

@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind, kv_heads):
    if kind == "projected" and kv_heads == 1:
        return # see `base_of`
    found = []
    for model in pair(kind, small(kv_heads)):
        logits = model(**INPUTS, use_cache=False).logits[:, -9:]
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), BATCH["labels"][:, 1:])
        found.append((logits, torch.autograd.grad(loss, trained(model))))
    (a, grads), (b, theirs) = found
    assert a.equal(b)
    for x, y in zip(grads, theirs):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
        assert kind == "projected" or x.equal(y)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_peft(kind):
    mine, theirs = pair(kind)
    ids = torch.tensor([rows(6)[0]["input_ids"]])
    more = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = theirs.generate(input_ids=ids, **more)
    assert mine.generate(input_ids=ids, **more).equal(answer)
    assert not base_of(kind).generate(input_ids=ids, **more).equal(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_bfloat16_and_near_peft(kind):
    mine, theirs = pair(kind, base_of(kind, torch.bfloat16))
    a, b = (m(**INPUTS, use_cache=False).logits[:, -9:] for m in (mine, theirs))
    assert a.dtype == torch.bfloat16 and trained(mine)[0].dtype == torch.float32
    assert (a - b).float().abs().mean() < 0.02 * b.float().std()


# --- rows and steps

@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model = ours(kind)
    with torch.no_grad():
        batch = model(**INPUTS, use_cache=False).logits
        for i, row in enumerate(rows(9, 4, 7)):
            alone = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            torch.testing.assert_close(batch[i, :len(alone)], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_at_a_time_is_all_at_once(kind):
    model, ids = ours(kind), torch.tensor([rows(8)[0]["input_ids"]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, found = None, []
        for i in range(8):
            out = model(ids[:, i:i + 1], attention_mask=torch.ones(1, i + 1), use_cache=True,
                        position_ids=torch.tensor([[i]]), past_key_values=cache)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_with_positions_is_no_padding(kind):
    model, ids = ours(kind), rows(6)[0]["input_ids"]
    mask = torch.tensor([[0, 0, 0] + [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        left = model(torch.tensor([[0, 0, 0] + ids]), attention_mask=mask,
                     position_ids=positions).logits[:, 3:]
        alone = model(torch.tensor([ids])).logits
    torch.testing.assert_close(left, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_with_fewer_logits_is_the_same(kind):
    model = ours(kind)
    torch.testing.assert_close(nll_sum(model, BATCH), target_nll_sum(model, BATCH))


def test_a_prompt_is_the_prefix_that_it_leaves_in_the_cache():
    model = ours("prompt")
    with torch.no_grad():
        read = model.model.decoder(inputs_embeds=model.model.vectors()[None], use_cache=True)
        layers = read.past_key_values.layers
        kv = torch.stack([torch.stack([c.keys[0], c.values[0]]) for c in layers])
        prefixed = put_before(copy.deepcopy(BASE), Prefix, N)
        prefixed.model.prefix.copy_(kv.permute(3, 0, 1, 2, 4).flatten(1))
        a, b = model(**INPUTS).logits, prefixed(**INPUTS).logits
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_prompt_of_real_tokens_is_the_text_before():
    ids = rows(9)[0]["input_ids"]
    vectors = BASE.get_input_embeddings().weight.detach()[ids[:N]].clone()
    model = put_before(copy.deepcopy(BASE), SoftPrompt, vectors)
    with torch.no_grad():
        whole = BASE(torch.tensor([ids])).logits[:, N:]
        torch.testing.assert_close(model(torch.tensor([ids[N:]])).logits, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_refused(kind):
    with pytest.raises(LoRAError, match="packed.*padded batches"):
        nll_sum(ours(kind), flatten_rows(rows(4, 5)))


def test_shifted_leaves_what_is_missing():
    assert shifted(3, None, None) == dict(attention_mask=None, position_ids=None)
    found = shifted(2, torch.ones(1, 3), torch.arange(3)[None], new=True)
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert found["attention_mask"].tolist() == [[1] * 5]


# --- what is trained

@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_new_is_trained_and_learns(kind):
    model = train_tokens(ours(kind), [1, 2])
    before = [p.clone() for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = nll_sum(model, BATCH) / count_targets(BATCH)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(a.equal(b) for a, b in zip(before, frozen))


def test_numbers_trained():
    kv = 2 * 1 * 16 # keys and values of a layer
    expected = {"prompt": N * WIDTH, "prefix": N * 2 * kv}
    for kind, number in expected.items():
        assert trainable(ours(kind)).trained == number
    adapters = trainable(add_adapters(copy.deepcopy(BASE), 4)).trained
    assert adapters == 2 * 2 * (WIDTH * 4 + 4 + 4 * WIDTH + WIDTH)


def test_some_embeddings_are_rows_of_the_model():
    found = some_embeddings(BASE, 7)
    weight = BASE.get_input_embeddings().weight
    assert found.shape == (7, WIDTH) and all((weight == row).all(1).any() for row in found)
    with torch.no_grad():
        found.zero_()
    assert weight.abs().sum() > 0


# --- the bottleneck, written out

def written_out(base, adapters, ids):
    "Houlsby et al.: attention, adapter, add; MLP, adapter, add."
    def bottleneck(x, a):
        middle = F.gelu(x @ a.down.weight.T + a.down.bias)
        return x + middle @ a.up.weight.T + a.up.bias
    decoder, x = base.model, base.model.embed_tokens(ids)
    where = decoder.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for layer, (first, second) in zip(decoder.layers, adapters):
        seen = layer.self_attn(layer.input_layernorm(x), position_embeddings=where,
                               attention_mask=None)[0]
        x = x + bottleneck(seen, first)
        x = x + bottleneck(layer.mlp(layer.post_attention_layernorm(x)), second)
    return base.lm_head(decoder.norm(x))


def test_the_adapter_is_that_of_houlsby():
    model, ids = add_adapters(copy.deepcopy(BASE), 6), torch.arange(3, 15).view(2, 6)
    assert model(ids).logits.equal(BASE(ids).logits) # it begins as the base
    with torch.no_grad():
        for p in trained(model):
            p.normal_(0, 0.3)
    adapters = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    found, expected = model(ids).logits, written_out(BASE, adapters, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - BASE(ids).logits).abs().max() > 0.1
    a, b = (torch.autograd.grad(out.square().sum(), trained(model)) for out in (found, expected))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_the_adapter_on_sixteen_bits_computes_in_float32():
    layer = Bottleneck(nn.Linear(8, 8).bfloat16(), 4)
    nn.init.normal_(layer.up.weight)
    out = layer(torch.randn(2, 8).bfloat16())
    assert out.dtype == torch.bfloat16 and layer.up.weight.dtype == torch.float32


# --- what is refused

@pytest.mark.parametrize("layer, options, says", [
    (SoftPrompt, [torch.zeros(N)], r"shape \(5,\): it must be \(n, 32\)"),
    (SoftPrompt, [torch.zeros(N, 8)], r"\(5, 8\)"),
    (SoftPrompt, [torch.zeros(0, WIDTH)], r"\(0, 32\)"),
    (PTuning, [torch.zeros(N, WIDTH), 0], "hidden is 0"),
    (Prefix, [0], "n is 0"), (Prefix, [2.5], "n is 2.5"),
    (ProjectedPrefix, [N, -1], "hidden is -1")])
def test_options_that_cannot_be(layer, options, says):
    model = copy.deepcopy(BASE)
    with pytest.raises(LoRAError, match=says):
        put_before(model, layer, *options)


def test_no_number_of_embeddings_and_no_size():
    with pytest.raises(LoRAError, match="n is 0"):
        some_embeddings(BASE, 0)
    with pytest.raises(LoRAError, match="size is 0"):
        add_adapters(copy.deepcopy(BASE), 0)


def test_a_second_prompt_and_another_architecture():
    with pytest.raises(LoRAError, match="already"):
        put_before(ours("prompt"), Prefix, N)
    config = GPT2Config(vocab_size=8, n_embd=8, n_head=2, n_layer=1)
    with pytest.raises(LoRAError, match="GPT2LMHeadModel has no decoder"):
        put_before(GPT2LMHeadModel(config), Prefix, N)


# --- what moves

PARTS = ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"]
IDS = torch.arange(3, 15).view(2, 6)


def test_what_moves():
    frozen = copy.deepcopy(BASE).requires_grad_(False)
    assert list(moves(frozen, PARTS, IDS).values()) == [False] * 3
    assert list(moves(copy.deepcopy(BASE), PARTS, IDS).values()) == [True] * 3
    one = copy.deepcopy(BASE).requires_grad_(False)
    one.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert moves(one, PARTS, IDS) == dict(zip(PARTS, [False, False, True]))


def test_what_moves_under_lora():
    config = LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[0])
    model = get_peft_model(copy.deepcopy(BASE), config)
    found = moves(model, [f"base_model.model.{part}" for part in PARTS], IDS)
    assert list(found.values()) == [True, True, False]
