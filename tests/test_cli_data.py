"""`sftlab data`: what is wrong is told, what is right is written, nothing is written over, and the
memory stays flat."""
import json
import subprocess
import sys

import pytest

from sftlab import cli
from sftlab.files.rows import read_rows
from sftlab.masking import encode
from sftlab.models import load
from sftlab.tiny import world

GOOD = [dict(instruction=f"Say {word} twice.", input="", output=f"{word} {word}")
        for word in world.NAMES]


@pytest.fixture
def data(capsys):
    "`sftlab data …`: its exit status, stdout and stderr."
    def run(*words):
        status = cli.main(["data", *map(str, words)])
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def files(tmp_path):
    "A good file, and one with three bad rows."
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    bad = [GOOD[0], {"instruction": "Hi"}, GOOD[1] | {"output": "", "input": 5}, GOOD[2], GOOD[0]]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    return tmp_path


def test_check(data, files):
    good, bad = files / "good.json", files / "bad.jsonl"
    assert data("check", good) == (0, "rows     24 read, 24 can be used, 0 cannot\n", "")
    status, out, err = data("check", bad)
    *told, last = out.splitlines()
    places = [line.removeprefix(f"{bad}: ").split(":")[0] for line in told]
    assert (status, err) == (1, "") and places == ["line 2", "line 3", "line 3", "line 5"]
    assert last == "rows     5 read, 2 can be used, 3 cannot"
    assert "field 'input' is a number" in out and "is the same as line 1" in out


def test_convert_there_and_back(data, files):
    steps = [("sharegpt", "a.jsonl.gz"), ("prompt", "b.csv"), ("messages", "c.parquet"),
             ("alpaca", "d.json")]
    last = files / "good.json"
    for format, name in steps:
        done = data("convert", last, "--to", format, "--output", files / name)
        assert done == (0, f"written  {files / name}: 24 rows\n", "")
        last = files / name
    assert json.loads(last.read_text()) == GOOD


def test_convert_refuses_or_puts_aside(data, files):
    bad, new, rejected = (files / n for n in ("bad.jsonl", "new.jsonl", "bad.jsonl.rejected.jsonl"))
    status, out, err = data("convert", bad, "--output", new)
    assert (status, out) == (1, "") and "3 of 5 rows cannot be used" in err and not new.exists()
    status, out, err = data("convert", bad, "--output", new, "--on-error", "quarantine")
    assert (status, err) == (0, "") and "2 rows" in out and rejected.name in out
    assert len(read_rows(new)) == 2 and len(rejected.read_text().splitlines()) == 3
    before = new.read_bytes()
    status, _, err = data("convert", files / "good.json", "--output", new)
    assert status == 1 and "is there already" in err and new.read_bytes() == before
    assert not list(files.glob(".*"))


def test_split(data, files):
    good, shares = files / "good.json", ("--shares", "train=0.75,test=0.25")
    status, out, err = data("split", good, "--output", files / "parts", *shares)
    assert (status, err) == (0, "")
    assert sorted(p.name for p in (files / "parts").iterdir()) == ["test.jsonl", "train.jsonl"]
    train, test = (read_rows(files / "parts" / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (18, 6)
    status, _, err = data("split", good, "--output", files / "parts")
    assert status == 1 and "is there already" in err and "--overwrite" not in err # it has no such
    assert data("split", good, "--output", files / "again", *shares)[0] == 0
    assert read_rows(files / "again" / "test.jsonl") == test


def test_what_cannot_be_split_is_told_with_its_file(data, files):
    (files / "one.jsonl").write_text(json.dumps(GOOD[0]))
    status, out, err = data("split", files / "one.jsonl", "--output", files / "parts")
    assert (status, out, err.count("\n")) == (1, "", 1) and not (files / "parts").exists()
    assert err.startswith(f"sftlab: {files / 'one.jsonl'}: only 1 rows or groups of rows")


NO_SHARES = ["train", "train=1", "train=0.5,test=0.6", "train=0,test=1", "train=x,test=1",
             "../train=0.5,test=0.5", "train=0.5=0.5,test=0.5", "=0.5,test=0.5",
             "train=0.3,train=0.5,test=0.5", "train=nan", "train=nan,test=nan", "train=nan,test=1",
             "train=inf,test=1"]


@pytest.mark.parametrize("shares", NO_SHARES)
def test_shares_that_make_no_sense(data, files, shares):
    status, out, err = data("split", files / "good.json", "--output", files / "parts",
                            "--shares", shares)
    assert (status, out) == (2, "") and "add up to 1" in err and not (files / "parts").exists()


def test_stats(data, files):
    status, out, err = data("stats", files / "good.json", "--model", "tiny",
                            "--plot", files / "plot.png")
    assert (status, err) == (0, "")
    assert (files / "plot.png").read_bytes().startswith(b"\x89PNG")
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["rows"] == "24" and said["turns"] == "2: 24 rows"
    assert "tokens a row" in said["length"] and said["scripts"] == "Latin: 24 rows"


def test_a_figure_is_not_written_over(data, files):
    plot = files / "plot.png"
    plot.write_text("mine")
    status, out, err = data("stats", files / "good.json", "--plot", plot)
    assert (status, out) == (1, "") and "plot.png is there already" in err
    assert plot.read_text() == "mine"
    status, out, err = data("stats", files / "good.json", "--plot", files / "plot.doc")
    assert (status, err.count("\n")) == (1, 1) and "names no kind of picture: choose .png" in err
    assert not (files / "plot.doc").exists()


def test_hints_name_the_options_of_the_program(data, files):
    for command in (["convert", "--output", files / "new.jsonl"], ["stats"],
                    ["split", "--output", files / "parts"]):
        status, _, err = data(*command[:1], files / "bad.jsonl", *command[1:])
        assert status == 1 and "(--on-error quarantine puts such rows aside)" in err
        assert "on_error" not in err


def rows_file(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


MARKS = ["<|im_end|>", "<|endoftext|>"]


def test_control_tokens_are_warned_of(data, tmp_path):
    rows = [dict(instruction=f"What is {MARKS[i % 2]}? {i}", output="A mark.", id="<|im_end|>")
            for i in range(9)]
    html = dict(instruction="a <s>b</s> <eos>", output="c")
    file = rows_file(tmp_path / "f.jsonl", [html, *rows])
    done = (0, "rows     10 read, 10 can be used, 0 cannot\n", "")
    assert data("check", file) == done  # without a model nothing is said
    status, out, err = data("check", file, "--model", "tiny")
    *told, more, last = out.splitlines()
    assert (status, err, len(told)) == (0, "", 3) and last == done[1].strip()
    assert told[0] == (
        f"warning: {file}: line 2: field 'instruction' has '<|im_end|>', which is one of this "
        "model's control tokens; sftlab trains on it as plain text, TRL as the token")
    assert more == f"warning: {file}: and 6 more places with control tokens"
    status, _, err = data("check", file, "--model", tmp_path / "nothing")
    assert status == 1 and err.count("\n") == 1


def test_a_tag_of_html_is_warned_of_with_its_place_and_read(data, tmp_path):
    model, tokenizer = load("tiny")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    for part in (model.config, tokenizer):
        part.save_pretrained(tmp_path / "model")
    html = dict(instruction="Strike it out.", output="<b>No</b> <s>never</s>")
    file = rows_file(tmp_path / "f.jsonl", [html, dict(instruction="Hi", output="Ho")])
    told = (f"warning: {file}: line 1: field 'output' has '<s>', which is one of this model's "
            "control tokens; sftlab trains on it as plain text, TRL as the token\n"
            "rows     2 read, 2 can be used, 0 cannot\n")
    assert data("check", file, "--model", tmp_path / "model") == (0, told, "")
    row = read_rows(file)[0]
    assert row["messages"][1]["content"] == html["output"]
    ids = encode(tokenizer, row["messages"])["input_ids"]
    assert tokenizer.bos_token_id not in ids and html["output"] in tokenizer.decode(ids)


def test_where_a_control_token_is(data, tmp_path):
    turns = [dict(role="user", content="Hi"), dict(role="assistant", tool_calls=[
        dict(name="f", arguments=dict(text="<|im_end|>"))]), dict(role="tool", content="x"),
        dict(role="assistant", content="Done <|im_start|>")]
    tools = [dict(name="f", description="<|im_end|>")]
    file = rows_file(tmp_path / "f.jsonl", [dict(messages=turns, tools=tools)])
    status, out, _ = data("check", file, "--model", "tiny")
    places = {"tools[0].description", "messages[3].content",
              "messages[1].tool_calls[0].arguments.text"}
    assert status == 0 and all(f"field '{place}' has" in out for place in places)


def test_placeholders_are_warned_of(data, tmp_path):
    rows = [dict(instruction=f"Greet {i}.", output="Hello {{name}}!") for i in range(5)]
    rows += [dict(instruction="Write a set.", output="{1, 2}, {name}, }} and {{")]
    file = rows_file(tmp_path / "f.jsonl", rows)
    status, out, err = data("check", file)
    *told, more, last = out.splitlines()
    assert (status, err, len(told)) == (0, "", 3) and last.startswith("rows     6 read, 6 can be")
    assert told[0].startswith(f"warning: {file}: line 1: field 'output' has '{{{{name}}}}', which")
    assert more.endswith("and 2 more places with placeholders")


def test_nothing_of_a_file_reaches_the_terminal_raw(data, tmp_path):
    escape = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"
    files = {
        "a.jsonl": [{escape: "Hi", "instruction": "a"}] * 5,
        "b.jsonl": [{escape: "Hi"}],
        "c.jsonl": [dict(instruction="a", output=escape)],
        "d.jsonl": [dict(messages=[dict(role=escape, content=escape)])],
        "e.jsonl": [dict(instruction="a", output="b", tools=escape)],
        f"{escape.replace('/', '')}.jsonl": [dict(instruction="a", output="b {{\u202e}}")],
    }
    for name, rows in files.items():
        file = rows_file(tmp_path / name, rows)
        status, out, err = data("check", file)
        assert out + err and not set(out + err) & set("\x1b\x07\u202e\x9b"), name
    file = rows_file(tmp_path / "f.csv", [])
    file.write_text(f"a{escape}b,c\n1,2\n")
    status, out, err = data("check", file)
    assert status == 1 and not set(out + err) & set("\x1b\x07\u202e\x9b")


def test_what_is_wrong_everywhere_is_told_once(data, tmp_path):
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="Ho " * 99)]
    rows = [dict(conversations=turns * (1 + i % 3), id=i) for i in range(175)]
    file = rows_file(tmp_path / "f.jsonl", rows)
    status, out, err = data("check", file)
    one, two, last = out.splitlines()
    assert (status, err) == (1, "")
    assert one.startswith(f"{file}: line 1: field 'conversations[0].from' is missing (found: role")
    assert "the same in 175 rows, of which this is one: {" in two and "accepted are" in two
    assert len(two) < 700 and last == "rows     175 read, 0 can be used, 175 cannot"


def test_what_is_wrong_in_many_rows_is_told_of_each(data, tmp_path):
    bad = [dict(instruction=f"Hi {i}") for i in range(150)]
    file = rows_file(tmp_path / "f.jsonl", [*bad, GOOD[0], *bad, dict(output="Ho")])
    status, out, _ = data("check", file)
    lines = out.splitlines()
    assert status == 1 and "the same in 150 rows" in lines[1]
    assert [line.split(": ")[1] for line in lines[2:-1]] == [f"line {n}" for n in range(152, 303)]
    assert lines[-1] == "rows     302 read, 1 can be used, 301 cannot"
    few = rows_file(tmp_path / "few.jsonl", bad[:2] + GOOD[:1])
    assert data("check", few)[1].count("field 'output' is missing") == 2


COLUMNS = ("--prompt-column", "question", "--completion-column", "answer")


def test_columns_of_other_names(data, tmp_path):
    rows = [dict(question=f"{word}?", answer=word) for word in world.NAMES]
    file = rows_file(tmp_path / "f.jsonl", rows)
    count = len(rows)
    assert data("check", file)[0] == 1
    done = f"rows     {count} read, {count} can be used, 0 cannot\n"
    assert data("check", file, *COLUMNS) == (0, done, "")
    assert data("convert", file, "--output", tmp_path / "new.jsonl", *COLUMNS)[0] == 0
    assert len(read_rows(tmp_path / "new.jsonl")) == count
    assert data("stats", file, *COLUMNS)[0] == 0
    assert data("split", file, "--output", tmp_path / "parts", *COLUMNS)[0] == 0
    status, out, err = data("check", file, "--prompt-column", "query")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "line 1: has no column 'query' (found: question, answer)" in err


def test_a_real_file_with_columns_of_its_own(data, real_data):
    file = real_data / "gsm8k_test.jsonl"
    status, out, err = data("check", file, *COLUMNS)
    assert (status, err) == (0, "") and "1,319 can be used, 0 cannot" in out
    assert data("check", file)[0] == 1


LIGHT = """
import sys
from sftlab.cli import main
main(["data", "check", sys.argv[1]])
main(["data", "convert", sys.argv[1], "--output", sys.argv[1] + ".csv"])
heavy = {"torch", "trl", "transformers", "datasets", "numpy", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""


def test_check_and_convert_load_nothing_heavy(files):
    done = subprocess.run([sys.executable, "-c", LIGHT, files / "good.json"],
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
