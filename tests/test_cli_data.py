"`sftlab data`: what is wrong is told, what is right is written, nothing is written over, and the memory stays flat."
import json
import subprocess
import sys

import pytest

from sftlab import cli
from sftlab.tiny import world
from sftlab.data import read_rows

GOOD = [dict(instruction=f"Say {word} twice.", input="", output=f"{word} {word}") for word in world.NAMES]


@pytest.fixture
def call(capsys):
    def run(*words):
        status = cli.main([str(word) for word in words])
        return (status, *capsys.readouterr())
    return run


@pytest.fixture
def files(tmp_path):
    "A good file, and one with three bad rows."
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    bad = [GOOD[0], {"instruction": "Hi"}, GOOD[1] | {"output": "", "input": 5}, GOOD[2], GOOD[0]]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    return tmp_path


def test_check(call, files):
    assert call("data", "check", files / "good.json") == (0, "rows     24 read, 24 can be used, 0 cannot\n", "")
    status, out, err = call("data", "check", files / "bad.jsonl")
    assert (status, err) == (1, "") and [line.removeprefix(f"{files / 'bad.jsonl'}: ").split(":")[0] for line in out.splitlines()[:-1]] == ["line 2", "line 3", "line 3", "line 5"]
    assert out.endswith("rows     5 read, 2 can be used, 3 cannot\n")
    assert "field 'input' is a number" in out and "is the same as line 1" in out


def test_convert_there_and_back(call, files):
    steps = [("sharegpt", "a.jsonl.gz"), ("prompt", "b.csv"), ("messages", "c.parquet"), ("alpaca", "d.json")]
    last = files / "good.json"
    for format, name in steps:
        status, out, err = call("data", "convert", last, "--to", format, "--output", files / name)
        assert (status, err) == (0, "") and out == f"written  {files / name}: 24 rows\n"
        last = files / name
    assert json.loads(last.read_text()) == GOOD


def test_convert_refuses_or_puts_aside(call, files):
    status, out, err = call("data", "convert", files / "bad.jsonl", "--output", files / "new.jsonl")
    assert (status, out) == (1, "") and "3 of 5 rows cannot be used" in err and not (files / "new.jsonl").exists()
    status, out, err = call("data", "convert", files / "bad.jsonl", "--output", files / "new.jsonl", "--on-error", "quarantine")
    assert (status, err) == (0, "") and "2 rows" in out and "bad.jsonl.rejected.jsonl" in out
    assert len(read_rows(files / "new.jsonl")) == 2 and len((files / "bad.jsonl.rejected.jsonl").read_text().splitlines()) == 3
    before = (files / "new.jsonl").read_bytes()
    status, _, err = call("data", "convert", files / "good.json", "--output", files / "new.jsonl")
    assert status == 1 and "is there already" in err and (files / "new.jsonl").read_bytes() == before
    assert not list(files.glob(".*"))


def test_split(call, files):
    status, out, err = call("data", "split", files / "good.json", "--output", files / "parts", "--shares", "train=0.75,test=0.25")
    assert (status, err) == (0, "") and sorted(p.name for p in (files / "parts").iterdir()) == ["test.jsonl", "train.jsonl"]
    train, test = (read_rows(files / "parts" / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (18, 6)
    assert call("data", "split", files / "good.json", "--output", files / "parts")[0] == 1
    assert call("data", "split", files / "good.json", "--output", files / "again", "--shares", "train=0.75,test=0.25")[0] == 0
    assert read_rows(files / "again" / "test.jsonl") == test


@pytest.mark.parametrize("shares", ["train", "train=1", "train=0.5,test=0.6", "train=0,test=1", "train=x,test=1", "../train=0.5,test=0.5"])
def test_shares_that_make_no_sense(call, files, shares):
    status, out, err = call("data", "split", files / "good.json", "--output", files / "parts", "--shares", shares)
    assert (status, out) == (2, "") and "add up to 1" in err and not (files / "parts").exists()


def test_stats(call, files):
    status, out, err = call("data", "stats", files / "good.json", "--model", "tiny", "--plot", files / "plot.png")
    assert (status, err) == (0, "") and (files / "plot.png").read_bytes().startswith(b"\x89PNG")
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["rows"] == "24" and said["turns"] == "2: 24 rows" and "tokens a row" in said["length"] and said["scripts"] == "Latin: 24 rows"


def test_check_and_convert_load_nothing_heavy(files):
    code = "import sys; from sftlab.cli import main; main(['data', 'check', sys.argv[1]]); main(['data', 'convert', sys.argv[1], '--output', sys.argv[1] + '.csv']); print(sorted({'torch', 'trl', 'transformers', 'datasets', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, files / "good.json"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
