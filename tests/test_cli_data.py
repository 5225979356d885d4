"""`sftlab data`: what is wrong is told, what is right is written, nothing is written over, and the
memory stays flat."""
import json
import subprocess
import sys

import pytest

from sftlab import cli
from sftlab.files.rows import read_rows
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
             "train=0.3,train=0.5,test=0.5"]


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
