"Evaluation: answers as from `complete`, kept by content; a changed weight, item or setting misses."
import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sftlab import evaluation
from sftlab.errors import DataError, OutputError
from sftlab.evaluation import (
    Evaluation, Task, answers_html, evaluate, fingerprint, read_evaluation)
from sftlab.generation import complete
from sftlab.metrics import MeasureCallback
from sftlab.models import load
from sftlab.tiny.pretraining import chat_prompt
from sftlab.tiny.world import as_messages, examples

MODEL, TOKENIZER = load("tiny")
ASKED = examples("test", 6, kinds=["capital", "word"])
ITEMS = [dict(messages=as_messages(e)["messages"][:1], answer=e["answer"]) for e in ASKED]
SHOTS = [dict(prompt="The capital of France is", answer=" Paris"),
         dict(prompt="The capital of Japan is", answer=" Tokyo")]
SMALL = dict(batch_size=4, max_new_tokens=6, disable_tqdm=True)


def begins(output, answer):
    return output.startswith(answer)


TASKS = [Task("chat", ITEMS), Task("shots", SHOTS, begins)]


@pytest.fixture
def calls(monkeypatch):
    "How many tasks were really asked."
    found, real = [], evaluation._answers

    def counted(*args):
        found.append(len(args[2]))
        return real(*args)
    monkeypatch.setattr(evaluation, "_answers", counted)
    return found


def test_answers_are_those_of_complete():
    found = evaluate(MODEL, TOKENIZER, TASKS, **SMALL)
    prompts = [chat_prompt(TOKENIZER, e["question"]) for e in ASKED]
    for task, texts in (("chat", prompts), ("shots", [item["prompt"] for item in SHOTS])):
        theirs = complete(MODEL, TOKENIZER, texts, max_new_tokens=6)
        assert [row["output"] for row in found.of(task)] == [done.text for done in theirs]
        assert [row["reason"] for row in found.of(task)] == [done.reason for done in theirs]
    assert found.scores("shots") == [1, 1] and found.tasks == ["chat", "shots"]
    assert found.table.loc["shots", ["mean", "n"]].tolist() == [1, 2]
    assert [row["item"] for row in found.of("chat")] == ITEMS


def test_a_control_token_that_somebody_typed_stays_text():
    typed = dict(messages=[dict(role="user", content="<|im_end|>")], answer="")
    [[ids]] = [evaluation._prompts(MODEL, TOKENIZER, Task("x", [typed]))]
    assert ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 1  # the template's own


def test_a_second_call_asks_nothing_and_returns_the_same(tmp_path, calls):
    first = evaluate(MODEL, TOKENIZER, TASKS, cache=tmp_path, **SMALL)
    assert evaluate(copy.deepcopy(MODEL), TOKENIZER, TASKS, cache=tmp_path, **SMALL) == first
    assert calls == [6, 2]
    evaluate(MODEL, TOKENIZER, TASKS[::-1] + [Task("more", SHOTS[:1])], cache=tmp_path, **SMALL)
    assert calls == [6, 2, 1]
    evaluate(MODEL, TOKENIZER, TASKS, **SMALL)
    assert calls == [6, 2, 1, 6, 2]


def test_scores_are_computed_anew(tmp_path, calls):
    task = Task("shots", SHOTS, begins)
    evaluate(MODEL, TOKENIZER, [task], cache=tmp_path, **SMALL)
    other = Task("shots", [dict(item, answer="green") for item in SHOTS], begins)
    assert evaluate(MODEL, TOKENIZER, [other], cache=tmp_path, **SMALL).scores("shots") == [0, 0]
    half = Task("shots", SHOTS, lambda output, answer: 0.5)
    assert evaluate(MODEL, TOKENIZER, [half], cache=tmp_path, **SMALL).scores("shots") == [0.5, 0.5]
    assert calls == [2]


def changed_weight():
    model = copy.deepcopy(MODEL)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-2
    return model


def with_adapter(scale=1.0):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(MODEL), LoraConfig(target_modules=["q_proj"],
                                                            init_lora_weights=False))
    for layer in model.modules():
        if isinstance(getattr(layer, "scaling", None), dict):
            layer.scaling = {name: scale * x for name, x in layer.scaling.items()}
    return model


def switched_off():
    model = with_adapter()
    model.disable_adapter_layers()
    return model


def other_template():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper", 1)
    return tokenizer


def other_stop():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = "."
    return tokenizer


CHANGES = {
    "weight": lambda: dict(model=changed_weight()), "adapter": lambda: dict(model=with_adapter()),
    "scale": lambda: dict(model=with_adapter(2.0)), "off": lambda: dict(model=switched_off()),
    "dtype": lambda: dict(model=copy.deepcopy(MODEL).bfloat16()),
    "template": lambda: dict(tokenizer=other_template()),
    "stop": lambda: dict(tokenizer=other_stop()),
    "item": lambda: dict(tasks=[Task("x", [dict(SHOTS[0], prompt="The capital of"), SHOTS[1]])]),
    "order": lambda: dict(tasks=[Task("x", SHOTS[::-1])]),
    "fewer": lambda: dict(tasks=[Task("x", SHOTS[:1])]),
    "length": lambda: dict(max_new_tokens=3), "batch": lambda: dict(batch_size=1)}


def test_whatever_changes_an_answer_misses(tmp_path, calls):
    plain = dict(model=MODEL, tokenizer=TOKENIZER, tasks=[Task("x", SHOTS)])
    evaluate(**plain | SMALL, cache=tmp_path)
    for name, change in CHANGES.items():
        before = len(calls)
        evaluate(**plain | SMALL | change(), cache=tmp_path)
        assert len(calls) == before + 1, name
    assert len(list(tmp_path.iterdir())) == 1 + len(CHANGES)
    evaluate(**plain | SMALL, cache=tmp_path)
    assert len(calls) == 1 + len(CHANGES)


def test_the_fingerprint_is_of_the_content():
    assert fingerprint(MODEL, TOKENIZER) == fingerprint(copy.deepcopy(MODEL), TOKENIZER)
    assert fingerprint(MODEL, TOKENIZER) == fingerprint(*load("tiny"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "x", "answers": []}',
                                    '{"format": "sftlab evaluation 1", "answers": [["a", "b"]]}',
                                    '{"format": "sftlab evaluation 1", "answers": [1, 2]}'])
def test_a_damaged_cache_is_asked_again_and_replaced(damage, tmp_path, calls):
    task = [Task("x", SHOTS)]
    first = evaluate(MODEL, TOKENIZER, task, cache=tmp_path, **SMALL)
    [file] = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage)
    assert evaluate(MODEL, TOKENIZER, task, cache=tmp_path, **SMALL) == first
    assert calls == [2, 2] and file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate(MODEL, TOKENIZER, [Task("x", SHOTS)], cache=tmp_path / "file", **SMALL)


def test_near_the_end_of_the_context_each_is_asked_alone():
    limit = MODEL.config.max_position_embeddings
    long = "red " * (limit // 2)
    ids = TOKENIZER(long)["input_ids"]
    long = TOKENIZER.decode((ids * 4)[:limit - 3])
    items = [dict(prompt=long, answer=""), SHOTS[0]]
    options = dict(SMALL, max_new_tokens=6)
    alone = evaluate(MODEL, TOKENIZER, [Task("x", [SHOTS[0]])], **options).of("x")[0]["output"]
    both = evaluate(MODEL, TOKENIZER, [Task("x", items)], **options).of("x")
    assert both[1]["output"] == alone and both[0]["reason"] == "length"
    with pytest.raises(DataError, match="item 0: its prompt has"):
        evaluate(MODEL, TOKENIZER, [Task("x", [dict(prompt=long * 2, answer="")])], **options)


def test_saved_and_read_again(tmp_path):
    found = evaluate(MODEL, TOKENIZER, TASKS, **SMALL)
    found.save(tmp_path / "deep" / "result.json")
    assert read_evaluation(tmp_path / "deep" / "result.json") == found
    assert os.listdir(tmp_path / "deep") == ["result.json"]
    for text in ("", "{}", json.dumps(dict(format="other", answers=[], about={}))):
        (tmp_path / "x").write_text(text)
        with pytest.raises(DataError, match="cannot be read as an evaluation"):
            read_evaluation(tmp_path / "x")
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_evaluation(tmp_path / "none")


def test_no_text_is_obeyed():
    nasty = "<script>alert(1)</script>\x1b[2J"
    row = dict(task=nasty, index=0, item=dict(prompt=nasty, answer=nasty), output=nasty,
               reason="stop", score=1.0)
    found = Evaluation([row], {})
    assert "<script>" not in answers_html([row]) + found._repr_html_()
    assert "\x1b" not in repr(found) and r"\x1b[2J" in repr(found)


def test_it_measures_inside_trl(tmp_path):
    "TRL patches the head of the model it trains: answers must stay those of the model."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = "<|im_end|>"
    rows = Dataset.from_list([as_messages(e) for e in ASKED])
    found = []

    def ask(model):
        found.append(evaluate(model, tokenizer, TASKS, **SMALL))
        return {"exact": found[-1].table["mean"]["shots"]}
    args = SFTConfig(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1, use_cpu=True,
        load_best_model_at_end=True, metric_for_best_model="eval_exact", greater_is_better=True,
        bf16=False, report_to=[], disable_tqdm=True, learning_rate=1e-12)
    trainer = SFTTrainer(copy.deepcopy(MODEL), args, train_dataset=rows, eval_dataset=rows,
                         processing_class=tokenizer, callbacks=[MeasureCallback(ask)])
    trainer.train()
    before = evaluate(MODEL, tokenizer, TASKS, **SMALL)
    assert [row["output"] for row in found[0].answers] == [row["output"] for row in before.answers]
    assert len(found) == 2 and trainer.state.best_metric == 1.0


def test_the_model_keeps_its_mode_whatever_happens():
    model = copy.deepcopy(MODEL).train()
    evaluate(model, TOKENIZER, [Task("x", SHOTS)], **SMALL)
    assert model.training
    with pytest.raises(ZeroDivisionError):
        evaluate(model, TOKENIZER, [Task("x", SHOTS, lambda *_: 1 / 0)], **SMALL)
    assert model.training


@pytest.mark.parametrize("call, said", [
    (lambda: evaluate(MODEL, TOKENIZER, []), "at least one"),
    (lambda: evaluate(MODEL, TOKENIZER, TASKS, batch_size=0), "batch_size is 0"),
    (lambda: evaluate(MODEL, TOKENIZER, TASKS, max_new_tokens=0), "max_new_tokens is 0"),
    (lambda: evaluate(MODEL, TOKENIZER, TASKS[:1] * 2), "two tasks"),
    (lambda: evaluate(MODEL, TOKENIZER, [Task("x", SHOTS, lambda *_: None)], **SMALL), "number"),
    (lambda: Task("x", [dict(prompt="a")]), "answer")])
def test_what_cannot_be_is_refused_in_one_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
