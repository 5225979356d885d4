"""`sftlab train`, killed: the same command goes on, and ends with the weights of a run that was
never stopped. And what it refuses to go on with."""
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sftlab import cli
from sftlab.tiny import world
from sftlab.finetune import last_checkpoint

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "world.jsonl"
    rows = map(world.as_messages, world.examples("train", 40, kinds=["opposite", "plural"]))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def words(file, output, *more):
    return ["train", "--data", str(file), "--output", str(output), "--method", "full",
            "--epochs", "24", *more]


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "sftlab.cli", *words(*args)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)


def newest(folder, mark=""):
    found = [p for p in folder.glob("checkpoint-*") if (p / mark).exists()]
    return max([int(p.name.split("-")[1]) for p in found], default=0)


def killed(file, output, after, delay, mark=""):
    """Start a run and kill it, `delay` seconds after a checkpoint later than step `after` has
    appeared (or its `mark` has)."""
    run = start(file, output)
    unfinished = output.parent / f".{output.name}.unfinished"
    while newest(unfinished, mark) <= after and run.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    said = run.communicate()[0]
    assert run.returncode == -signal.SIGKILL, said
    assert not output.exists()
    return newest(unfinished), said


@pytest.mark.parametrize("times", [3, pytest.param(9, marks=pytest.mark.thorough)])
def test_killed_again_and_again_it_ends_with_the_same_weights(file, times, tmp_path):
    whole = start(file, tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read()
    rng, step, broken = random.Random(0), 0, tmp_path / "broken"
    for n in range(times):
        if n % 2:  # anywhere: while it starts, or later
            step, said = killed(file, broken, 0, rng.uniform(0, 6))
        else:  # a moment after the next checkpoint
            step, said = killed(file, broken, step, rng.uniform(0, 0.3))
            assert ("goes on where it was" in said) == (n > 0)
    # What a kill in the middle of writing leaves: no mark that it is complete.
    junk = tmp_path / ".broken.unfinished" / "checkpoint-99999"
    junk.mkdir()
    (junk / "model.safetensors").write_bytes(b"half a checkpoint")
    done = start(file, broken, "--overwrite")  # which is for finished runs, and for other ones
    said = done.communicate()[0]
    assert "goes on where it was" in said and done.returncode == 0
    epochs = [float(n) for n in re.findall(r"epoch (\S+): held-out loss", said)]
    assert epochs == list(range(int(epochs[0]), 25))  # each loss is told with its own epoch
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "broken")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    one, other = (json.loads((file.parent / "run.json").read_text()) for file in files)
    assert all(one[key] == other[key] for key in one if key not in ("seconds", "command"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "whole"]  # nothing is left


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    "A run that nobody stopped: its weights' bytes, and how long it took."
    begin, out = time.time(), tmp_path_factory.mktemp("whole") / "out"
    run = start(file, out, "--keep", "best")
    assert run.wait() == 0, run.stdout.read()
    return (out / "model.safetensors").read_bytes(), time.time() - begin


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(20))
def test_killed_at_any_moment_the_bytes_are_the_same(file, whole, tmp_path, number):
    run = start(file, tmp_path / "out", "--keep", "best")
    time.sleep(random.Random(number).uniform(0, whole[1]))
    run.kill()
    run.communicate()
    if not (tmp_path / "out").exists():
        again = start(file, tmp_path / "out", "--keep", "best")
        assert again.wait() == 0, again.stdout.read()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_the_same_run_is_gone_on_with(file, tmp_path, capsys):
    out = tmp_path / "out"
    killed(file, out, 0, 0, "complete")
    assert cli.main(words(file, out, "--seed", "7", "--learning-rate", "1e-5")) == 1
    said = capsys.readouterr().err
    assert "other settings (learning_rate None, not 1e-05; seed 0, not 7)" in said
    assert "--overwrite" in said and said.count("\n") == 1
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text() + "\n")
    assert cli.main(words(other, out)) == 1 and "data_sha256" in capsys.readouterr().err
    anew = ["train", "--data", str(file), "--output", str(out), "--epochs", "1", "--overwrite"]
    assert cli.main(anew) == 0
    assert "goes on" not in capsys.readouterr().out.split("\ntrain")[0]
    assert json.loads((out / "run.json").read_text())["epochs"] == 1
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_replaced_only_when_told_and_only_by_a_finished_one(
        file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    short = ["train", "--data", str(file), "--output", str(out), "--epochs", "1",
             "--max-rows", "16"]
    def files(): return {p.name: p.read_bytes() for p in out.iterdir()}
    assert cli.main(short) == 0
    before = files()
    assert cli.main([*short, "--seed", "1"]) == 1
    assert "holds a finished run" in capsys.readouterr().err
    def fails(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr("sftlab.program.train.finetune", fails)
        assert cli.main([*short, "--seed", "1", "--overwrite"]) == 130
    assert before == files()
    assert cli.main([*short, "--seed", "1", "--overwrite"]) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["seed"] == 1 and [len(one) for one in run["data_sha256"]] == [64]
    assert run["command"] == ["sftlab", *short, "--seed", "1", "--overwrite"]
    assert {"sftlab", "torch", "trl"} <= set(run["versions"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("what I wrote")
    assert cli.main([*short[:4], str(mine), "--overwrite"]) == 1
    assert [p.name for p in mine.iterdir()] == ["notes.txt"]


def test_checkpoints_without_the_mark_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((5, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-5"]


@pytest.mark.parametrize("content, says", [
    ("epoch: 2", "there is no setting 'epoch'; did you mean 'epochs'?"),
    ("learning-rat: 1", "did you mean 'learning_rate'?"),
    ("epochs: many", "'--epochs'"),
    ("method: lora4", "'full', 'lora', 'qlora'"),
    ("- epochs", "must hold names and values"),
    ("epochs: [", "while parsing"),
    ("", "must hold names and values"),
    ("seed: -1", "'--seed'"),
    ("seed: true", "'--seed'"),
    ("overwrite: perhaps", "'--overwrite'"),
    ("model: [tiny]", "'model' must be one "),
    ("epochs:", "'epochs' must be one "),
])
def test_a_config_that_cannot_be_right(file, tmp_path, capsys, content, says):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(content)
    command = ["train", "--data", str(file), "--output", str(out), "--config", str(config)]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("sftlab: ") and not out.exists()


def as_yaml(settings): return "\n".join(f"{key}: {value}" for key, value in settings.items())


@pytest.mark.parametrize("name, dump", [("run.yaml", as_yaml), ("run.json", json.dumps)])
def test_a_config_gives_what_the_command_line_does_not(file, tmp_path, name, dump):
    settings = {"data": str(file), "epochs": 1, "max-rows": 16, "learning_rate": 0.002, "seed": 3}
    (tmp_path / name).write_text(dump(settings))
    command = ["train", "--config", str(tmp_path / name), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--seed", "4"]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    used = [run[key] for key in ("epochs", "learning_rate", "seed", "rows")]
    assert used == [1, 0.002, 4, 16]
