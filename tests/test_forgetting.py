"Forgetting: exact shares, penalties that are 0 at the start, averages that end where they should."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sftlab.errors import TrainingError
from sftlab.forgetting import (
    average, ewc, fisher, kl_to, mix, text_rows, weights, with_penalty)
from sftlab.lora import inject, merge
from sftlab.training import (
    TrainingConfig, add_gradients, effective_batches, nll_sum, padded, train)


def small(seed=0):
    "A model of a few thousand weights."
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def row(*ids, learned=None):
    learned = len(ids) if learned is None else learned
    return dict(input_ids=list(ids), labels=[-100] * (len(ids) - learned) + list(ids)[-learned:])


BASE, OTHER = small(), small(1)
ROWS = [row(1, 2, 3, 4), row(5, 6, 7, 8, 9, learned=2), row(4, 4, 2)]
ALIKE = [row(*(i * k % 60 + 1 for i in range(8))) for k in range(1, 9)]


def same(a, b):
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for name, p in model.named_parameters()}
    model.zero_grad()
    return found


# --- mixtures

@given(st.integers(0, 300), st.floats(0, 0.95), st.integers(0, 5))
def test_a_mixture_has_the_share_to_the_nearest_row(n, share, seed):
    new, old = [("new", i) for i in range(n)], [("old", i) for i in range(10_000)]
    mixture = mix(new, old, share, seed)
    added = mixture[n:]
    assert mixture[:n] == new and {sort for sort, _ in added} <= {"old"}
    assert len(set(added)) == len(added)  # none twice
    assert abs(len(added) - share * len(mixture)) <= 0.5 + 1e-9
    assert mixture == mix(new, old, share, seed)


@given(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.5]), st.integers(1, 9))
def test_an_epoch_has_each_row_of_a_mixture_once(n, share, batch):
    mixture = mix([row(i % 60, 1) for i in range(n)], [row(i % 60, 2) for i in range(99)], share)
    done = TrainingConfig(epochs=1, batch_size=batch)
    seen = [r for _, batches in effective_batches(mixture, done, collate=list)
            for some in batches for r in some]
    assert sorted(map(id, seen)) == sorted(map(id, mixture))


def test_another_seed_draws_other_rows_and_inputs_stay():
    new, old = list(range(50)), list(range(100, 1000))
    drawn = {tuple(mix(new, old, 0.2, seed)[50:]) for seed in range(5)}
    assert len(drawn) == 5 and new == list(range(50)) and old == list(range(100, 1000))


@pytest.mark.parametrize("share", [1, 1.5, -0.1, math.nan, "0.1", None, True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(TrainingError, match="share is .*: it must be a number from 0"):
        mix([1], [2], share)


def test_too_few_old_rows_are_named():
    with pytest.raises(TrainingError, match="a share of 0.5 takes 4 old rows, and there are 3"):
        mix([1, 2, 3, 4], [5, 6, 7], 0.5)


def test_text_rows_have_one_length_and_learn_all():
    from sftlab.models import load
    tokenizer = load("tiny")[1]
    texts = ["too short", "A long story. " * 30, "Another long story. " * 30, "And more. " * 40]
    rows = text_rows(tokenizer, iter(texts), n=2, length=32)
    assert [len(r["input_ids"]) for r in rows] == [32, 32]
    assert all(r["labels"] == r["input_ids"] for r in rows)
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<|endoftext|>A long story. A long")
    assert len(text_rows(tokenizer, texts, n=9, length=32)) == 3


# --- penalties

def test_importance_is_the_mean_squared_gradient_scaled():
    model = copy.deepcopy(BASE)
    found = fisher(model, ROWS)
    plain = {name: 0 for name in found}
    for r in ROWS:
        for name, grad in gradients(model, nll_sum(model, padded([r]))).items():
            plain[name] = plain[name] + grad**2
    n = sum(f.numel() for f in found.values())
    scale = n / sum(f.sum() for f in plain.values())
    for name in found:
        torch.testing.assert_close(found[name], plain[name] * scale, rtol=1e-4, atol=1e-7)
    assert sum(f.sum() for f in found.values()).item() / n == pytest.approx(1, rel=1e-4)
    assert all(p.grad is None for p in model.parameters()) and same(model, BASE)


def test_the_order_of_rows_and_gradients_left_over_do_not_count():
    model = copy.deepcopy(BASE)
    nll_sum(model, padded(ROWS)).backward()
    once, again = fisher(model, ROWS), fisher(copy.deepcopy(BASE), ROWS[::-1])
    for name in once:
        torch.testing.assert_close(once[name], again[name], rtol=1e-4, atol=1e-7)


def test_the_gradient_of_ewc_is_the_formula_to_the_last_bit():
    model, importance = copy.deepcopy(OTHER), fisher(copy.deepcopy(BASE), ROWS)
    start = weights(BASE)
    penalty = ewc(start, importance)
    found = gradients(model, penalty(model))
    for name, p in model.named_parameters():
        assert found[name].equal(importance[name] * (p.detach() - start[name]))


def test_ewc_is_zero_at_the_start_and_pulls_nowhere():
    model = copy.deepcopy(BASE)
    penalty = ewc(weights(model), fisher(model, ROWS))
    assert penalty(model).item() == 0
    assert not any(grad.any() for grad in gradients(model, penalty(model)).values())


def test_with_ones_it_is_l2():
    start = weights(BASE)
    penalty = ewc(start, {name: torch.ones_like(w) for name, w in start.items()})
    wanted = sum(((p - start[name])**2).sum() for name, p in OTHER.named_parameters()) / 2
    torch.testing.assert_close(penalty(OTHER), wanted)


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_a_penalty_counts_once_a_step_however_the_step_is_cut(sizes):
    "add_gradients divides by the targets of all batches; strength is in nats a token."
    start, model = weights(BASE), copy.deepcopy(OTHER)
    penalty = ewc(start, fisher(copy.deepcopy(BASE), ROWS))
    batches, at = [], 0
    for size in sizes:
        batches.append(padded(ROWS[at:at + size]))
        at += size
    model.zero_grad()
    alone, _ = add_gradients(model, batches, nll_sum)
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, _ = add_gradients(model, batches, with_penalty(penalty, 0.25, nll_sum))
    assert total == pytest.approx(alone + 0.25 * penalty(model).item(), rel=1e-5)
    pull = {name: p.grad - plain[name] for name, p in model.named_parameters()}
    for name, grad in gradients(model, penalty(model)).items():
        torch.testing.assert_close(pull[name], 0.25 * grad, rtol=1e-3, atol=1e-5)


def test_the_trainer_counts_a_penalty_once_for_each_batch_that_is_accumulated(tmp_path):
    "So it is divided by gradient_accumulation_steps, as the lesson says."
    def step(accumulate, divide):
        class Kept(Trainer):
            def compute_loss(self, model, inputs, **more):
                loss = super().compute_loss(model, inputs, **more)
                pull = sum(p.sum() for p in model.parameters())
                return loss + pull / (self.args.gradient_accumulation_steps if divide else 1)

        model = copy.deepcopy(BASE)
        args = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=4 // accumulate, use_cpu=True,
            gradient_accumulation_steps=accumulate, save_strategy="no", report_to=[], optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no")
        Kept(model, args, train_dataset=ALIKE[:4], data_collator=padded).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = step(1, True)
    torch.testing.assert_close(step(2, True), whole, rtol=1e-4, atol=1e-4)
    assert (step(2, False) - whole).abs().max() > 0.9  # an extra 1 from the second batch


@pytest.mark.parametrize("strength", [-1, math.nan, "1", None, True])
def test_a_bad_strength_is_refused(strength):
    with pytest.raises(TrainingError, match="strength is .*: it must be a number, and not neg"):
        with_penalty(lambda model: 0, strength)


def test_strength_zero_changes_nothing():
    start = weights(OTHER)
    loss = with_penalty(ewc(start, fisher(copy.deepcopy(BASE), ROWS)), 0, nll_sum)
    assert loss(BASE, padded(ROWS)).equal(nll_sum(BASE, padded(ROWS)))


def test_rows_that_say_nothing_are_refused():
    with pytest.raises(TrainingError, match="no rows"):
        fisher(copy.deepcopy(BASE), [])
    with pytest.raises(TrainingError, match="no learned token"):
        fisher(copy.deepcopy(BASE), [dict(input_ids=[1, 2], labels=[-100, -100])])


def test_weights_of_two_architectures_are_refused():
    start = weights(BASE)
    with pytest.raises(TrainingError, match="is in one model and not in the other"):
        ewc(start, weights(inject(copy.deepcopy(BASE), r=2, lora_alpha=4)))
    wide = {name: w[..., :1] for name, w in start.items()}
    with pytest.raises(TrainingError, match="has shape .* copies of one start"):
        ewc(start, wide)
    with pytest.raises(TrainingError, match="is in one model and not in the other"):
        average(BASE, inject(copy.deepcopy(BASE), r=2, lora_alpha=4), 0.5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8), st.integers(0, 3))
def test_kl_is_zero_at_the_start_and_torchs_elsewhere(n, seed):
    assert kl_to(copy.deepcopy(BASE), ALIKE, n, seed)(BASE).item() == 0
    found = kl_to(BASE, ALIKE[:n], n, seed)(OTHER)
    ids = torch.tensor([r["input_ids"] for r in ALIKE[:n]])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(ids).logits) for m in (BASE, OTHER))
    wanted = torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert found > 0


def test_kl_pulls_the_model_and_not_its_start():
    start, model = copy.deepcopy(BASE), copy.deepcopy(OTHER)
    kl_to(start, ALIKE, 2)(model).backward()
    assert all(p.grad is None for p in start.parameters())
    assert any(p.grad.any() for p in model.parameters())


def test_kl_pulls_nowhere_at_the_start():
    model = copy.deepcopy(BASE)
    pull = gradients(model, kl_to(copy.deepcopy(BASE), ALIKE, 4)(model))
    assert max(grad.abs().max() for grad in pull.values()) < 1e-6


@pytest.mark.parametrize("n", [0, -1, 2.5, "2"])
def test_kl_on_no_rows_is_refused(n):
    with pytest.raises(TrainingError, match="n is .* integer of at least 1"):
        kl_to(BASE, ALIKE, n)


@pytest.mark.parametrize("strong", [0.3, 3.0])
def test_penalties_keep_a_model_nearer_to_its_start(strong):
    start = weights(BASE)
    penalty = ewc(start, fisher(copy.deepcopy(BASE), ALIKE))
    moved = {}
    for strength in (0, strong):
        model = copy.deepcopy(BASE)
        train(model, ROWS, TrainingConfig(learning_rate=1e-3, epochs=10), disable_tqdm=True,
              loss_fn=with_penalty(penalty, strength, nll_sum))
        moved[strength] = penalty(model).item()
    assert moved[strong] < 0.9 * moved[0]


# --- averages

def test_an_average_ends_at_both_models_to_the_last_bit():
    assert same(average(BASE, OTHER, 0), BASE) and same(average(BASE, OTHER, 1), OTHER)
    assert same(average(BASE, OTHER, 0.0), BASE) and same(average(BASE, OTHER, 1.0), OTHER)


@given(st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_between_it_is_the_weighted_mean(share):
    first, second = copy.deepcopy(BASE), copy.deepcopy(OTHER)
    between = average(first, second, share)
    assert same(first, BASE) and same(second, OTHER)  # both stay
    for m, p, q in zip(between.parameters(), BASE.parameters(), OTHER.parameters()):
        torch.testing.assert_close(m, (1 - share) * p + share * q)


def test_torchs_averaged_model_is_the_average_of_half():
    theirs = AveragedModel(BASE)
    theirs.update_parameters(BASE)
    theirs.update_parameters(OTHER)
    for m, p in zip(average(BASE, OTHER, 0.5).parameters(), theirs.module.parameters()):
        torch.testing.assert_close(m, p)


@pytest.mark.parametrize("share", [1.01, -0.1, math.nan, "1", None, True])
def test_an_average_beyond_the_ends_is_refused(share):
    with pytest.raises(TrainingError, match="share is .*: it must be a number from 0 to 1"):
        average(BASE, OTHER, share)


def test_half_of_an_adapter_is_the_average_of_base_and_merged():
    adapted = inject(copy.deepcopy(BASE), r=4, lora_alpha=8)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    half = copy.deepcopy(adapted)
    for module in half.modules():
        if hasattr(module, "lora_B"):
            module.lora_B.data /= 2
    whole, between = {}, {}
    for store, model in ((whole, merge(adapted)), (between, merge(half))):
        store.update((name.replace(".base.", "."), p.detach())
                     for name, p in model.named_parameters() if "lora_" not in name)
    for name, p in BASE.named_parameters():
        torch.testing.assert_close(between[name], (p.detach() + whole[name]) / 2)


def test_peft_saves_half_of_an_adapter_in_a_folder_of_its_name(tmp_path):
    "As the lesson types it, and it is the average again when loaded."
    from peft import LoraConfig, PeftModel, get_peft_model
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(BASE), config)
    peft.add_weighted_adapter(["default"], [0.5], "halfway", combination_type="linear")
    peft.save_pretrained(tmp_path, selected_adapters=["halfway"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["halfway"]
    half = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "halfway").eval()
    whole = copy.deepcopy(peft).merge_and_unload()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        found, wanted = half(ids).logits, average(BASE, whole, 0.5)(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert (found - whole(ids).logits).abs().max() > 0.01
