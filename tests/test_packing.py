"""Packing: TRL's rows, documents as if alone, nothing lost in silence."""
import random

import datasets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from sftlab.audit.isolation import check_isolation
from sftlab.errors import MaskError
from sftlab.masking import encode_rows
from sftlab.models import load
from sftlab.packing import (PACKED, TOO_LONG, block_mask, collate_packed, documents, pack,
                            pack_rows)
from sftlab.tiny.world import as_messages, examples
from sftlab.training import (TrainingConfig, evaluate_nll, flatten_rows, next_labels, nll_sum,
                             padded, target_nll_sum, train)

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def encoded(tiny):
    return encode_rows(tiny[1], [as_messages(e) for e in examples("train", 60)])


def small(attention, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=128, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def token_rows(draw, least=1, most=6, longest=14):
    "Rows of random tokens, with something learned in each."
    made = []
    for _ in range(draw(st.integers(least, most))):
        ids = draw(st.lists(st.integers(1, 63), min_size=2, max_size=longest))
        begin = draw(st.integers(0, len(ids) - 1))
        labels = [-100] * begin + ids[begin:]
        labels[-1] = ids[-1]
        made.append(dict(input_ids=ids, labels=labels))
    return made


# --- which documents go together

@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
def test_every_document_once_and_no_row_too_long(lengths, limit):
    rows = pack(lengths, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= limit for row in rows)
    spaces = [limit - sum(lengths[i] for i in row) for row in rows]
    for n, row in enumerate(rows): # what opened a row fitted into none before it
        assert all(lengths[row[0]] > space for space in spaces[:n])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=80), st.integers(32, 50))
def test_rows_are_trls_document_by_document(lengths, limit):
    data = datasets.Dataset.from_dict(dict(input_ids=[[i] * n for i, n in enumerate(lengths)]))
    theirs = pack_dataset(data, limit, "bfd", dict(batch_size=len(lengths)))
    found = []
    for row in theirs:
        begins = [sum(row["seq_lengths"][:k]) for k in range(len(row["seq_lengths"]))]
        found.append([row["input_ids"][begin] for begin in begins])
    assert found == pack(lengths, limit)


def test_as_few_rows_as_trls_on_many_lengths():
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5, 1)) + 1) for _ in range(5000)]
    data = datasets.Dataset.from_dict(dict(input_ids=[[0] * n for n in lengths]))
    theirs = pack_dataset(data, 2048, "bfd", dict(batch_size=len(lengths)))
    assert len(theirs) == len(pack(lengths, 2048))


@pytest.mark.parametrize("lengths, limit, said", [
    ([3, 9], 8, "document 1 has 9 tokens"), ([0], 8, "document 0 is 0"), ([3], -1, "max_length"),
    ([3.5], 8, "document 0 is 3.5"), ([True], 8, "document 0 is True")])
def test_lengths_that_cannot_be_packed_are_refused(lengths, limit, said):
    with pytest.raises(MaskError, match=said):
        pack(lengths, limit)


# --- packed rows

@settings(deadline=None)
@given(st.data(), st.integers(14, 40))
def test_packing_loses_nothing(data, limit):
    rows = token_rows(data.draw)
    packed, fate = pack_rows(rows, limit)
    taught = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    found = [d for row in packed for d in documents(row)]
    assert sorted(map(str, found)) == sorted(map(str, taught))
    assert all(len(row["input_ids"]) <= limit for row in packed)
    assert sum(fate.values()) == len(rows) and fate["unlearned"] == len(rows) - len(taught)


def test_rows_that_are_too_long():
    long = dict(input_ids=list(range(1, 21)), labels=[-100] * 10 + list(range(11, 21)))
    short = dict(input_ids=[1, 2, 3], labels=[-100, 2, 3])
    packed, fate = pack_rows([long, short], 8, "drop")
    assert [row["input_ids"] for row in packed] == [[1, 2, 3]] and fate["dropped"] == 1
    packed, fate = pack_rows([long, short], 8, "keep")
    assert sorted(len(row["input_ids"]) for row in packed) == [3, 20] and fate["kept"] == 1
    packed, fate = pack_rows([long, short], 8, "split")
    pieces = [d["input_ids"] for row in packed for d in documents(row)]
    assert sorted(pieces) == [[1, 2, 3], list(range(9, 17)), list(range(17, 21))]
    assert fate == dict(whole=1, kept=0, split=1, dropped=0, unlearned=0)


@pytest.mark.parametrize("too_long", TOO_LONG)
def test_no_batch_has_nothing_to_learn(too_long):
    "The loss of such a batch would be 0 / 0, not a number."
    nothing = dict(input_ids=[5] * 9, labels=[-100] * 9)
    first = dict(input_ids=[5] * 9, labels=[5] + [-100] * 8) # nothing predicts a first token
    late = dict(input_ids=[5] * 9, labels=[-100] * 8 + [5])
    packed, fate = pack_rows([nothing, first, late], 4, too_long)
    assert fate["unlearned"] == 2
    for row in packed:
        labels = collate_packed([row])["labels"]
        assert (labels[:, 1:] != -100).any()


def test_a_row_cut_after_packing_is_refused(encoded):
    [row, *_], _ = pack_rows(encoded, 128)
    cut = dict(row, input_ids=row["input_ids"][:50], labels=row["labels"][:50])
    with pytest.raises(MaskError, match="was it cut after packing"):
        collate_packed([cut])
    with pytest.raises(MaskError, match="packed already"):
        pack_rows([row], 256)


def test_batches_are_trls(encoded):
    packed, _ = pack_rows(encoded, 128)
    theirs = TRLCollator(pad_token_id=0, padding_free=True)(packed[:4])
    ours = collate_packed(packed[:4])
    assert all(theirs[key].equal(ours[key]) for key in ours)
    plain = TRLCollator(pad_token_id=0, padding_free=True)(encoded[:4])
    assert all(plain[key].equal(value) for key, value in collate_packed(encoded[:4]).items())


# --- as if alone

def logits_and_gradients(model, batches, **more):
    model.zero_grad()
    logits = []
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        out = model(**inputs, **more, use_cache=False).logits[0]
        F.cross_entropy(out, next_labels(batch)[0], reduction="sum").backward()
        logits.append(out.detach())
    return torch.cat(logits), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("by", ["position_ids", "mask"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_logits_and_gradients_are_those_of_documents_alone(attention, by, data):
    rows = token_rows(data.draw, least=2)
    model, batch = small(attention), flatten_rows(rows)
    more = dict(attention_mask=block_mask(batch["position_ids"])) if by == "mask" else {}
    together = logits_and_gradients(model, [batch], **more)
    alone = logits_and_gradients(model, [flatten_rows([row]) for row in rows])
    for a, b in zip(together, alone):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_gradient_reaches_another_document(attention):
    model = small(attention)
    rows = [dict(input_ids=[1, 2, 3, 4], labels=[-100, 2, 3, 4]),
            dict(input_ids=[5, 6, 7], labels=[-100, 6, 7])]
    batch = flatten_rows(rows)
    for more in ({}, dict(attention_mask=block_mask(batch["position_ids"]))):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False,
                       **more).logits
        [of_second] = torch.autograd.grad(logits[0, 4:].logsumexp(-1).sum(), embedded)
        assert (of_second[0, :4] == 0).all() and (of_second[0, 4:] != 0).any()


def test_the_mask_is_block_diagonal_and_causal():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    seen = block_mask(positions) == 0
    assert seen.shape == (2, 1, 5, 5)
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                         [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert seen[1, 0, :, 0].tolist() == [True] + 4 * [False]
    half = block_mask(positions, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_training_and_measuring_are_those_of_unpacked_rows(tiny, encoded):
    packed, _ = pack_rows(encoded[:40], 128)
    def unpacked(rows):
        return padded([d for row in rows for d in documents(row)])
    config = TrainingConfig(epochs=1, batch_size=2, learning_rate=1e-3)
    losses = []
    for way in (PACKED, dict(collate=unpacked, loss_fn=nll_sum)):
        history = train(load("tiny")[0], packed, config, disable_tqdm=True, **way)
        losses.append(history.loss.to_numpy())
    assert abs(losses[0] / losses[1] - 1).max() < 1e-4
    model = tiny[0]
    together, alone = evaluate_nll(model, packed, **PACKED), evaluate_nll(model, encoded[:40])
    assert together.tokens == alone.tokens and together.nll == pytest.approx(alone.nll, rel=1e-5)


# --- the check

def running_on(rows):
    batch = collate_packed(rows)
    return dict(batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])


def with_ones(rows):
    batch = collate_packed(rows)
    return dict(batch, attention_mask=torch.ones_like(batch["input_ids"]))


@pytest.mark.parametrize("collator, loss_fn", [
    (running_on, nll_sum), (with_ones, nll_sum), (padded, nll_sum), (collate_packed, None)])
def test_every_leak_is_found(tiny, encoded, collator, loss_fn):
    packed, _ = pack_rows(encoded, 128)
    more = dict(loss_fn=loss_fn) if loss_fn else {} # without: the Trainer's call, with a cache
    report = check_isolation(tiny[0], collator, packed[:1], most=9, **more)
    assert report.leaks == list(range(1, len(report.losses)))
    with pytest.raises(AssertionError, match="see their neighbours"):
        report.assert_ok()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("collator, loss_fn, unpacked", [
    (collate_packed, nll_sum, False), (collate_packed, target_nll_sum, False),
    (flatten_rows, target_nll_sum, True), (padded, nll_sum, True)])
def test_no_false_alarm(encoded, collator, loss_fn, unpacked, dtype):
    model = load("tiny", dtype=dtype)[0]
    rows = encoded[:6] if unpacked else pack_rows(encoded, 128)[0][:2]
    check_isolation(model, collator, rows, loss_fn).assert_ok()


@pytest.mark.parametrize("options, leaks", [
    (dict(packing=True), False), (dict(padding_free=True, max_length=None), False),
    (dict(packing=True, packing_strategy="bfd_split"), False), (dict(), False)])
def test_trls_ways(tiny, encoded, options, leaks, tmp_path):
    config = SFTConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
                       gradient_checkpointing=False, **{"max_length": 128, **options})
    data = datasets.Dataset.from_list(encoded)
    trainer = SFTTrainer(load("tiny")[0], config, train_dataset=data, processing_class=tiny[1])
    rows = trainer.train_dataset.select(range(2))
    report = check_isolation(trainer.model, trainer.data_collator, rows, trainer.compute_loss)
    assert bool(report.leaks) == leaks and not report.changed


def test_wrapped_rows_leak_where_their_documents_are_named(tiny, encoded):
    "TRL forgets where the documents of a wrapped row end; told, the check finds the leak."
    lengths = [len(row["input_ids"]) for row in encoded[:3]]
    whole = {key: sum((row[key] for row in encoded[:3]), []) for key in ("input_ids", "labels")}
    report = check_isolation(tiny[0], TRLCollator(pad_token_id=0),
                             [dict(whole, seq_lengths=lengths)])
    assert report.leaks == [1, 2]


def test_the_check_leaves_no_trace(encoded):
    model = load("tiny")[0]
    model.model.layers[0].train() # a mixed state, to be found again
    modes = [module.training for module in model.modules()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    packed, _ = pack_rows(encoded, 128)
    check_isolation(model, collate_packed, packed[:1], nll_sum)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rows, said", [
    ([], "0 documents"), ([dict(input_ids=[1, 2], labels=[-100, 2])], "1 documents"),
    ([dict(input_ids=[1, 1], labels=[-100, 1])] * 2, "all tokens of the rows are the same"),
    ([dict(input_ids=[1, 2], labels=[1, -100])] * 2, "0 of them with something to learn"),
    ([dict(messages=[])], "encode first")])
def test_what_cannot_be_checked_is_refused(tiny, rows, said):
    with pytest.raises(MaskError, match=said):
        check_isolation(tiny[0], padded, rows)
