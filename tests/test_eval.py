"`sftlab eval`: the same scores as by hand, two models on the same questions, errors in one line."
import json
import logging
from pathlib import Path

import pytest
import yaml
from calling import call
from small_models import save_small

from sftlab.benchmarks import answers_of, harness, sign_test, task_config
from sftlab.evaluation import Task, evaluate
from sftlab.masking import encode_rows
from sftlab.metrics import compare
from sftlab.models import load
from sftlab.tiny.benchmarks import four_choices
from sftlab.tiny.world import as_messages, examples
from sftlab.tiny.world import test_set as all_items
from sftlab.training import PADDING_FREE, TrainingConfig, train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def libraries_speak_again():
    "The program makes libraries quiet, and other tests look at what they say."
    names = ("transformers", "trl", "peft", "bitsandbytes", "lm_eval")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A folder with a model that answers about capitals and plurals."
    model, tokenizer = load("tiny")
    tokenizer.eos_token = "<|im_end|>"
    rows = [as_messages(e) for e in examples("train", 60, kinds=["capital", "plural"])]
    train(model, encode_rows(tokenizer, rows), TrainingConfig(learning_rate=1e-3, epochs=2),
          disable_tqdm=True, **PADDING_FREE)
    folder = tmp_path_factory.mktemp("runs") / "first"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def eval_(model, tasks, *more):
    return call("eval", model, "--tasks", tasks, *more)


def refused(model, tasks, message, *more, status=1):
    found, out, err = eval_(model, tasks, *more)
    assert (found, err.count("\n")) == (status, 1) and message in err, err
    return out


def questions(kind, n):
    items = [e for e in all_items() if e["kind"] == kind][:n]
    return [dict(messages=as_messages(e)["messages"][:1], answer=e["answer"]) for e in items]


def test_scores_are_those_by_hand_and_two_models_are_compared(tuned, tmp_path):
    out = tmp_path / "results.json"
    status, said, err = eval_(tuned, "capital,plural", "--limit", 8, "--base", "tiny", "--out", out)
    assert (status, err) == (0, "")
    held = json.loads(out.read_text("utf-8"))
    tasks = [Task(kind, questions(kind, 8)) for kind in ("capital", "plural")]
    ours, base = (evaluate(*load(name), tasks, disable_tqdm=True) for name in (tuned, "tiny"))
    assert held["answers"] == json.loads(json.dumps(ours.answers))
    assert held["base_answers"] == json.loads(json.dumps(base.answers))
    for line in held["table"]:
        row = ours.table.loc[line["task"]]
        assert line["score"] == pytest.approx(100 * row["mean"]) and line["n"] == 8
        assert f"{line['task']:<9}{line['score']:>8.1f}" in said
    for line in held["comparison"]:
        a, b = (found.scores(line["task"]) for found in (ours, base))
        won, lost = (sum(x > y for x, y in pairs) for pairs in (zip(a, b), zip(b, a)))
        assert line["difference"] == 100 * compare(a, b).difference
        assert (line["won"], line["lost"], line["p"]) == (won, lost, sign_test(won, lost))
        assert line["low"] is None and won + lost < 10  # eight questions: no interval
    assert "too few changes for an interval" in said
    other = [(a["output"], b["output"]) for a, b in zip(base.answers, ours.answers)
             if a["output"] != b["output"]]
    assert [(c["before"], c["after"]) for c in held["changed"]] == other
    assert f"{len(other)} of 16 answers are other ones, such as" in said
    assert sum(line["score"] for line in held["table"]) > 100  # it learned something


def test_the_same_model_twice_changes_nothing(tuned):
    status, said, _ = eval_(tuned, "plural", "--limit", 3, "--base", tuned)
    assert status == 0 and "0 of 3 answers are other ones\n" in said
    assert "+0.0 points" in said and "p = 1" in said


def test_a_file_of_your_own(tuned, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [as_messages(e) for e in examples("test", 4, kinds=["plural"])]
    rows.append(dict(messages=[
        dict(role="user", content="Hello"), dict(role="assistant", content="Hi."),
        dict(role="user", content="What is the plural of dog?"),
        dict(role="assistant", content="The plural of dog is dogs.")]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "results.json"
    status, said, err = eval_(tuned, path, "--out", out)
    assert (status, err) == (0, "") and "mine.jsonl" in said
    held = json.loads(out.read_text())
    assert [len(a["item"]["messages"]) for a in held["answers"]] == [1] * 4 + [3]
    call_only = dict(role="assistant", tool_calls=[dict(name="f", arguments={})])
    for last in ([], [call_only], [dict(role="assistant", content="Hi."), rows[4]["messages"][2]]):
        row = dict(messages=rows[0]["messages"][:1] + last)
        path.write_text("".join(json.dumps(r) + "\n" for r in (row, rows[1])))
        refused(tuned, path, "mine.jsonl")


def test_a_task_of_lm_eval_in_a_file(tuned, tmp_path):
    config = task_config(
        tmp_path, "choice", four_choices(12), output_type="multiple_choice",
        doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="gold",
        metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    path = tmp_path / "choice.yaml"
    path.write_text(yaml.safe_dump(config))
    for chat in (False, True):
        out = tmp_path / f"{chat}.json"
        more = ["--apply-chat-template"] * chat
        status, said, err = eval_(tuned, path, "--limit", 10, "--out", out, *more)
        assert (status, err) == (0, "") and "choice acc_norm" in said
        found = harness(*load(tuned), [str(path)], disable_tqdm=True, limit=10,
                        apply_chat_template=chat)
        held = json.loads(out.read_text())
        for metric in ("acc", "acc_norm"):
            theirs = answers_of(found, "choice", metric)
            ours = [a for a in held["answers"] if a["task"] == f"choice {metric}"]
            assert [a["score"] for a in ours] == [a["score"] for a in theirs] and len(ours) == 10


def test_the_base_may_be_asked_without_its_template(tuned, tmp_path):
    "Each side at the form that it was trained on; the results file says which."
    config = task_config(
        tmp_path, "plain", four_choices(12), output_type="multiple_choice",
        doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="gold",
        metric_list=[dict(metric="acc")])
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(config))
    sides = {}
    for more in ([], ["--base-plain"]):
        out = tmp_path / f"{len(more)}.json"
        status, said, err = eval_(tuned, path, "--apply-chat-template", "--base", "tiny",
                                  "--out", out, *more)
        assert (status, err) == (0, "") and ("without its chat template" in said) == bool(more)
        held = json.loads(out.read_text())
        assert (held["apply_chat_template"], held["base_plain"]) == (True, bool(more))
        sides[bool(more)] = held
        found = harness(*load("tiny"), [str(path)], disable_tqdm=True,
                        apply_chat_template=not more)
        theirs = answers_of(found, "plain", "acc")
        assert [a["score"] for a in held["base_answers"]] == [a["score"] for a in theirs]
    assert sides[False]["answers"] == sides[True]["answers"]
    assert sides[False]["base_answers"] != sides[True]["base_answers"]
    for more in (["--base", "tiny"], ["--apply-chat-template"]):
        refused("no/such/folder", path, "--base-plain leaves", "--base-plain", *more)
    refused("no/such/folder", "capital", "--base-plain leaves", "--base-plain",
            "--apply-chat-template", "--base", "tiny")


@pytest.mark.parametrize("tasks, message", [
    ("nothing_of_that_name", "there is no task 'nothing_of_that_name'"),
    ("capital,,plural", "an empty name"), ("", "an empty name"),
    ("missing.jsonl", "no file missing.jsonl"), ("missing.yaml", "no file missing.yaml")])
def test_tasks_that_are_not_there(tasks, message):
    refused("tiny", tasks, message)


def test_a_broken_task_of_lm_eval_is_one_line(tmp_path):
    path = tmp_path / "broken.yaml"
    for text in ("task: [", "task: x\ndataset_path: nobody/such-data\noutput_type: generate_until\n"
                 "test_split: test\ndoc_to_text: x\ndoc_to_target: y\n"):
        path.write_text(text)
        refused("tiny", path, "lm-eval cannot run")


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine")
    refused("no/such/folder/at/all", "capital", "is there already", "--out", there)
    assert there.read_text() == "mine"
    refused("tiny", "capital", "--limit", "--limit", 0, status=2)
    refused(str(tmp_path / "none"), "capital", "There is no folder")


def test_a_model_without_a_template_cannot_be_asked(tmp_path):
    folder = Path(save_small("gpt2", tmp_path / "model"))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("chat_template", None)
    config.write_text(json.dumps(settings))
    for file in folder.glob("chat_template*"):
        file.unlink()
    refused(folder, "capital", "has no chat template")
