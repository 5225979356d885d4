"""The package as a library: the snippets of "Using the helpers" and of "Install and first commands"
are run as they are printed. What is given in the wrong form is refused with a line that says what
to do."""
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from datasets import Dataset

from sftlab.audit.data import dataset_stats
from sftlab.audit.labels import audit_labels, label_auditor
from sftlab.cli import app, main
from sftlab.data import split_rows
from sftlab.errors import DataError, FinetuneError, MaskError, TemplateError, TrainingError
from sftlab.files.rows import read_messages, read_rows
from sftlab.files.writers import write_rows
from sftlab.finetune import finetune, held_out_nll, rows_that_fit
from sftlab.masking import collate, encode, encode_rows, truncate
from sftlab.models import load
from sftlab.rendering import prompt_ids, segments_of
from sftlab.tiny.world import as_messages, examples, test_set
from sftlab.training import evaluate_nll, train

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs/reference/using.ipynb"
START = ROOT / "nbs/reference/start.ipynb"


def cells(kind, page=PAGE):
    notebook = json.loads(page.read_text("utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def write_questions(path):
    "A small file in the Alpaca format, of what the tiny model knows."
    asked = [{"instruction": e["question"], "output": e["answer"]}
             for e in examples("train", 60, kinds=["capital", "opposite"])]
    Path(path).write_text(json.dumps(asked), "utf-8")


def first_commands(): return "\n\n".join(cells("markdown", START))


def blocks(language):
    "The fenced blocks of the page of first commands in a language."
    return re.findall(rf"```{language}\n(.*?)```", first_commands(), flags=re.DOTALL)


# --- the page

@pytest.mark.slow
def test_the_snippets_of_the_page_run_and_say_what_they_promise(capsys):
    names, said = {}, {}
    for source in cells("code"):
        exec(compile(source, "using.ipynb", "exec"), names)
        said[source.splitlines()[-1]] = capsys.readouterr().out
    printed = "".join(said.values())
    assert len(names["rows"]) == 100 and set(names["rows"].column_names) == {"messages"}
    assert [len(some) for some in names["parts"].values()] == [80, 20]
    assert names["batch"]["labels"].shape == names["batch"]["input_ids"].shape
    assert "0 faults" in printed and "Label audit: no faults" in printed
    assert names["after"] < names["before"] - 2
    assert float(re.search(r"held-out loss: (\d\.\d{4})", printed)[1]) < 0.1
    assert names["trainable"](names["own"]).trained == 24_576
    assert "total, at the peak" in printed and "7 rows fit on 16 GB" in printed
    assert list(said.values())[-1] == "The capital of Peru is Lima."
    folder = names["folder"]
    assert load(folder / "own")[0].peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert main(["merge", str(folder / "lora"), "--output", str(folder / "whole")]) == 0
    assert not hasattr(load(folder / "whole")[0], "peft_config")


def test_a_snippet_is_short():
    shown = [source for source in cells("code") if not source.startswith("#| hide")]
    lines = [[x for x in s.splitlines() if x and not x.startswith(("from ", "import "))]
             for s in shown]
    assert len(shown) == 10 and max(map(len, lines)) <= 8  # one of them writes the file


def test_what_the_table_names_is_there():
    table = [line for source in cells("markdown") for line in source.splitlines()
             if line.startswith("| ")]
    names = re.findall(r"`(sftlab(?:\.\w+)+)`", "\n".join(table))
    assert len(names) > 20
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), name


# --- the page of first commands

@pytest.mark.slow
def test_the_snippets_of_the_first_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_questions("my_file.json")
    names = {}
    first, second = blocks("python")
    exec(compile(first, "start.ipynb", "exec"), names)
    assert "Label audit: no faults" in capsys.readouterr().out
    exec(compile(second, "start.ipynb", "exec"), names)
    assert capsys.readouterr().out.endswith("The capital of Peru is Lima.\n")


@pytest.mark.slow
def test_the_first_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_questions("my_file.json")
    asked = [as_messages(e) for e in test_set()[:12]]
    Path("my_test.jsonl").write_text("\n".join(map(json.dumps, asked)), "utf-8")
    [block] = [b for b in blocks("sh") if "sftlab data check" in b]
    commands = [line for line in block.splitlines() if line.startswith("sftlab ")]
    assert [c.split()[1] for c in commands] == ["data", "train", "train", "chat", "eval", "merge"]
    for command in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of Peru?\n"))
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
        if "--dry-run" in command:
            assert not Path("runs/first").exists()
        if command.split()[1] == "chat":
            assert "The capital of Peru is Lima." in capsys.readouterr().out
        if command.split()[1] == "eval":
            assert "my_test.jsonl" in capsys.readouterr().out
    assert Path("runs/first-whole/config.json").is_file()


def options(command):
    "Those of a command, and of the commands below it."
    found = {name for p in command.params for name in p.opts + p.secondary_opts}
    return found.union(*(options(c) for c in getattr(command, "commands", {}).values()))


def test_the_options_that_it_names_are_there():
    text = first_commands()
    start = text.index("What else the commands take")
    part = text[start:text.index("## In a script of your own")]
    named, known = set(re.findall(r"--[a-z-]+", part)), options(typer.main.get_command(app))
    assert {"--tools", "--dry-run", "--config"} <= named <= known | {"--help"}
    for target in re.findall(r"^(?:sftlab|make) (\w+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert target in {"data", "train", "chat", "eval", "merge", "lab", "test"}


# --- one form where the other is wanted

@pytest.fixture(scope="module")
def tiny(): return load("tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "asked.json"
    write_questions(path)
    return read_messages(path)


@pytest.fixture(scope="module")
def encoded(tiny, rows): return encode_rows(tiny[1], rows)


TAKE_MESSAGES = {
    "encode_rows": (MaskError, lambda m, t, rows: encode_rows(t, rows)),
    "audit_labels": (MaskError, lambda m, t, rows: audit_labels([], t, rows)),
    "label_auditor": (MaskError, lambda m, t, rows: label_auditor(t, rows)),
    "split_rows": (DataError, lambda m, t, rows: split_rows(rows)),
    "dataset_stats": (DataError, lambda m, t, rows: dataset_stats(rows)),
    "held_out_nll": (FinetuneError, lambda m, t, rows: held_out_nll(m, t, rows)),
    "rows_that_fit": (FinetuneError, lambda m, t, rows: rows_that_fit(t, rows, 100)),
}
TAKE_TOKENS = {
    "collate": (MaskError, lambda m, rows: collate(rows, 0)),
    "truncate": (MaskError, lambda m, rows: truncate(rows, 10, "cut")),
    "train": (TrainingError, lambda m, rows: train(m, rows)),
    "evaluate_nll": (TrainingError, lambda m, rows: evaluate_nll(m, rows)),
}


@pytest.mark.parametrize("name", TAKE_MESSAGES)
def test_rows_of_tokens_are_refused_where_messages_are_wanted(name, tiny, rows, encoded):
    error, call = TAKE_MESSAGES[name]
    for wrong in (encoded, Dataset.from_list(encoded), "asked.json", rows[0], rows["messages"],
                  rows[0]["messages"], [{"instruction": "Hi", "output": "Hi"}]):
        with pytest.raises(error) as refused:
            call(*tiny, wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(error, match="read_messages"):
        call(*tiny, encoded)


@pytest.mark.parametrize("name", TAKE_TOKENS)
def test_rows_of_messages_are_refused_where_tokens_are_wanted(name, tiny, rows):
    error, call = TAKE_TOKENS[name]
    for wrong in (rows, list(rows), "asked.json", rows[0]["messages"], [{"input_ids": [1]}]):
        with pytest.raises(error) as refused:
            call(tiny[0], wrong)
        assert "\n" not in str(refused.value)
    with pytest.raises(error, match="encode_rows"):
        call(tiny[0], rows)


def test_held_out_rows_of_messages_are_refused_too(tiny, rows, encoded):
    with pytest.raises(TrainingError, match="encode_rows"):
        train(tiny[0], encoded, eval_rows=rows)


def test_a_loss_over_nothing_is_refused(tiny):
    for nothing in ([], [{"input_ids": [1, 2], "labels": [-100, -100]}]):
        with pytest.raises(TrainingError, match="no loss to measure"):
            evaluate_nll(tiny[0], nothing)
    assert evaluate_nll(tiny[0], [{"input_ids": [1, 2], "labels": [-100, 2]}]).tokens == 1


@pytest.mark.parametrize("call", [segments_of, prompt_ids, encode], ids=lambda f: f.__name__)
def test_what_is_no_conversation_is_refused(call, tiny, rows):
    for wrong, hint in ((rows[0], r'row\["messages"\]'), (rows, r'rows\[0\]\["messages"\]'),
                        ("Hi", '"role": "user"'), (["Hi"], '"role": "user"')):
        with pytest.raises(TemplateError, match=hint):
            call(tiny[1], wrong)


def test_an_audit_says_what_a_batch_is(tiny, encoded):
    _, tokenizer = tiny
    batch = collate(encoded[:2], tokenizer.pad_token_id)
    with pytest.raises(MaskError, match=r"\[batch\]"):
        audit_labels(batch, tokenizer)
    with pytest.raises(MaskError, match="collate"):
        audit_labels(encoded, tokenizer)
    with pytest.raises(MaskError, match="tokenizer.pad_token_id"):
        collate(encoded, tokenizer)


def test_a_model_must_be_loaded_before_it_is_trained(tiny, rows, tmp_path):
    for name in ("tiny", tiny):
        with pytest.raises(FinetuneError, match=r"sftlab\.models\.load"):
            finetune(name, tiny[1], rows, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what `read_messages` returns goes everywhere, with fields that are None

def test_a_table_serves_as_well_as_a_list(tiny, tmp_path):
    model, tokenizer = tiny
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    lines = [{"messages": turns, "id": 1}, {"messages": [turns[0], turns[1] | {"weight": 1}]},
             {"messages": [{"role": "user", "content": "Ho"}, turns[1]], "topic": "ho"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    table, listed = read_messages(path), read_rows(path)
    assert isinstance(table, Dataset) and table[1]["id"] is None
    assert encode_rows(tokenizer, table) == encode_rows(tokenizer, listed)
    assert dataset_stats(table).equals(dataset_stats(listed))
    parts = split_rows(table, {"a": 0.5, "b": 0.5})
    assert sorted(len(part) for part in parts.values()) == [1, 2]
    assert held_out_nll(model, tokenizer, table) == held_out_nll(model, tokenizer, listed)
    assert rows_that_fit(tokenizer, table, 100)[0] == list(table)
    batch = collate(encode_rows(tokenizer, table), tokenizer.pad_token_id)
    assert audit_labels([batch], tokenizer, table).talks[0].found == {}
    write_rows(table, tmp_path / "again.jsonl")
    again = [{name: value for name, value in row.items() if value is not None}
             for row in read_rows(tmp_path / "again.jsonl")]
    assert again == listed  # a field that is None counts as missing
