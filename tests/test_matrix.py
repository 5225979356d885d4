"""Any model, any method, any file: what is learned, measured and answered is what was meant.

Every pair of a model, a method, a file and a size is in one of the runs that each change makes; all
of them together are the thorough ones.
"""
import gc
import json
import math
import re
from itertools import combinations, product

import pytest
import torch
import transformers
import trl
import zoo

from sftlab.errors import SftlabError
from sftlab.files.rows import read_rows
from sftlab.finetune import finetune, held_out_losses, training_template
from sftlab.generation import stream
from sftlab.models import load
from sftlab.rendering import prompt_ids

METHODS = ("full", "lora", "qlora")
SIZES = ("small", "large")  # with the settings for small models, or with those for large ones
NEVER = {("mamba", "qlora"), ("mixtral", "qlora")}
REFUSED = {  # model and method -> what `load` or `finetune` says
    ("mamba", "lora"): "computes past adapters on some of its layers",
    ("mamba", "qlora"): "cannot compute with weights in four bits: load it without",
    ("mixtral", "qlora"): "the experts, out of four bits: load it without",
}
TARGETS = dict(mamba=["in_proj"])  # layers that an adapter is put on; elsewhere all
ROUTED = 5e-4  # relative; the loss that is trained on also has a term that keeps experts balanced
RUNS = [run for run in product(zoo.MODELS, METHODS, zoo.SHAPES, SIZES) if run[:2] not in NEVER]


def pairs(run):
    "Each two of the things that a run is made of, with their places."
    return set(combinations(enumerate(run), 2))


def pairwise(runs):
    "Few of the runs, with every pair that any of them has: the one with most new pairs, again."
    left, chosen = set().union(*map(pairs, runs)), []
    while left:
        best = max(runs, key=lambda run: len(pairs(run) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


CHOSEN = pairwise(RUNS)
OTHERS = [run for run in RUNS if run not in CHOSEN]


def test_every_pair_is_covered():
    covered = set().union(*map(pairs, CHOSEN))
    assert covered == set().union(*map(pairs, RUNS))
    met = {run[:2] for run in CHOSEN} | NEVER
    assert met == set(product(zoo.MODELS, METHODS))
    assert len(CHOSEN) <= 80


# --- what is there to be trained

@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "A function that gives the folder of a model with a template."
    there, top = {}, tmp_path_factory.mktemp("models")

    def base(model, template):
        name = f"{model}-{template}"
        if name not in there:
            there[name] = zoo.save_model(model, template, top / name)
        return there[name]
    return base


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "For each shape the rows of a file, as they are read, and what they mean."
    top, made = tmp_path_factory.mktemp("files"), {}
    for name, make in zoo.SHAPES.items():
        shape = make()
        path = zoo.write(shape.rows, top / f"{name}.jsonl")
        made[name] = read_rows(path, columns=shape.columns), shape.talks
    return made


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    "The trainer collects garbage after each run: not among all that libraries have made, too."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# --- what is to be expected

def expected(tokenizer, talk):
    """A conversation as the library lays it out with the template for training, and the answers in
    it, as its marks say."""
    made = tokenizer.apply_chat_template(
        talk["messages"], tools=talk["tools"], chat_template=training_template(tokenizer),
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    answers = [m for m in talk["messages"] if m["role"] == "assistant"]
    labels, turn, before = [], -1, 0
    for token, mask in zip(made["input_ids"], made["assistant_masks"]):
        turn += mask > before
        before = mask
        labels.append(token if mask and answers[turn].get("weight", 1) else -100)
    assert turn == len(answers) - 1
    return dict(input_ids=made["input_ids"], labels=labels)


def check_by_hand(tokenizer, row, talk, template):
    "What is learned of a row, as text: the answers, in order, each with its end, and little more."
    text = tokenizer.decode([label for label in row["labels"] if label != -100])
    answers = [m for m in talk["messages"] if m["role"] == "assistant" and m.get("weight", 1)]
    parts = text.split(zoo.END[template])
    assert parts.pop().strip() == "" and len(parts) == len(answers)
    for part, answer in zip(parts, answers):
        thought = answer.get("reasoning_content", "")
        content = answer["content"].split("</think>")[-1].strip()
        assert thought in part and content in part
        for call in answer.get("tool_calls", []):
            assert json.dumps(call["function"]["arguments"], ensure_ascii=False) in part
        if template != "qwen3":
            assert part.strip() == content


def plain_loss(model, rows):
    "The mean over the learned tokens, a row at a time, each as the library computes it."
    total = count = 0
    for row in rows:
        n = sum(label != -100 for label in row["labels"][1:])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]),
                         labels=torch.tensor([row["labels"]])).loss
        total, count = total + n * loss.item(), count + n
    return total / count


def question(talk):
    "What comes before the last answer."
    assert talk["messages"][-1]["role"] == "assistant"
    return talk["messages"][:-1]


def our_answers(model, tokenizer, talks):
    "As `sftlab chat` makes them, but for control tokens, which a pipeline does not show."
    control, answers = "|".join(map(re.escape, tokenizer.all_special_tokens)), []
    for talk in talks:
        ids = prompt_ids(tokenizer, question(talk), talk["tools"])
        text = "".join(stream(model, tokenizer, ids, max_new_tokens=12))
        answers.append(re.sub(control, "", text))
    return answers


def answers_of_a_pipeline(talks, **what):
    pipe = transformers.pipeline("text-generation", device="cpu", **what)
    return [pipe(question(t), tools=t["tools"], max_new_tokens=12, do_sample=False,
                 return_full_text=False)[0]["generated_text"] for t in talks]


def seen_in_training(monkeypatch):
    "A list of the batches that the trainer gives its model."
    batches, compute = [], trl.SFTTrainer.compute_loss

    def spy(self, model, inputs, *args, **more):
        batches.append({name: value.clone() for name, value in inputs.items()
                        if isinstance(value, torch.Tensor)})
        assert set(inputs) <= {"input_ids", "labels", "attention_mask"}
        return compute(self, model, inputs, *args, **more)
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", spy)
    return batches


def unpadded(batches):
    "The rows of batches, without what they are filled up with."
    rows = []
    for batch in batches:
        for ids, labels, mask in zip(*(batch[n].tolist() for n in (
                "input_ids", "labels", "attention_mask"))):
            assert all(label == -100 for label, used in zip(labels, mask) if not used)
            rows.append((tuple(i for i, used in zip(ids, mask) if used),
                         tuple(label for label, used in zip(labels, mask) if used)))
    return sorted(rows)


def as_pairs(rows):
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]


def check(run, bases, files, folder, monkeypatch):
    "Train, and compare all that can be compared."
    name, method, shape, size = run
    if size == "large":
        monkeypatch.setattr("sftlab.finetune.is_tiny", lambda model: False)
    four_bit, template = method == "qlora", zoo.template_of(name, shape)
    model, tokenizer = load(bases(name, template), four_bit=four_bit)
    rows, talks = files[shape]
    want = [expected(tokenizer, talk) for talk in talks]
    for row, talk in zip(want, talks):
        check_by_hand(tokenizer, row, talk, template)
        assert len(row["input_ids"]) < zoo.LENGTH
    held_out, first = plain_loss(model, want[8:]), plain_loss(model, want[:8])
    batches = seen_in_training(monkeypatch)
    adapter = None
    if name in TARGETS and method != "full":
        adapter = dict(target_modules=TARGETS[name])

    trainer = finetune(model, tokenizer, rows[:8], folder, method, epochs=2, learning_rate=1e-2,
                       eval_rows=rows[8:], lora=adapter)
    saved, its_tokenizer = load(str(folder), four_bit=four_bit)

    # The text that is learned is the text that the template gives, and nothing else.
    learned = trainer.train_dataset
    assert sorted(learned.column_names) == ["input_ids", "labels"]
    assert as_pairs(learned) == as_pairs(want[:8])
    assert unpadded(batches) == sorted(2 * as_pairs(want[:8]))

    # The losses are those of just this text, and what was saved has learned it.
    history = trainer.state.log_history
    before, *_, after = held_out_losses(history)
    assert math.isclose(before, held_out, rel_tol=1e-5)
    assert math.isclose(after, plain_loss(saved, want[8:]), rel_tol=1e-5)
    logged = next(entry["loss"] for entry in history if "loss" in entry)
    assert math.isclose(logged, first, rel_tol=ROUTED if name == "mixtral" else 1e-5)
    assert plain_loss(saved, want[:8]) < first - 0.05

    # Whoever asks gets the same answers, which end where an answer ends.
    end = its_tokenizer.convert_tokens_to_ids(zoo.END[template])
    stops = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert end == stops or end in stops
    ours = our_answers(saved, its_tokenizer, talks[8:])
    assert ours == answers_of_a_pipeline(talks[8:], model=saved, tokenizer=its_tokenizer)
    if method == "full":
        assert ours == answers_of_a_pipeline(talks[8:], model=str(folder))


def names(run): return "-".join(run)


@pytest.mark.slow
@pytest.mark.parametrize("run", CHOSEN, ids=names)
def test_what_is_learned_measured_and_answered(run, bases, files, tmp_path, monkeypatch):
    check(run, bases, files, tmp_path / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("run", OTHERS, ids=names)
def test_the_whole_matrix(run, bases, files, tmp_path, monkeypatch):
    check(run, bases, files, tmp_path / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("run", REFUSED, ids=names)
def test_what_cannot_be_is_refused_in_one_line(run, bases, files, tmp_path):
    name, method = run
    with pytest.raises(SftlabError) as refused:
        model, tokenizer = load(bases(name, "chatml"), four_bit=method == "qlora")
        finetune(model, tokenizer, files["alpaca"][0], tmp_path / "out", method)
    said = str(refused.value)
    assert REFUSED[run] in said and "\n" not in said
    assert not (tmp_path / "out").exists()
