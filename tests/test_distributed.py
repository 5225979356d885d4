"""Several processes that train together: the numbers and files of one, and one that speaks."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sftlab import cli
from sftlab.errors import FinetuneError
from sftlab.finetune import finetune
from sftlab.guards.finetune import check_processes
from sftlab.models import load
from sftlab.program import train

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2"]
WORDS = "cat dog fox hen cow pig bee ant owl bat elk emu ram cub kid doe yak ewe".split()
ROWS = [dict(instruction=f"Say {word} twice.", output=f"{word} {word}") for word in WORDS]
PLACE = dict(RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")

# `sftlab`, whose every process writes down what it logged, and a sum of its weights.
SCRIPT = """
import json, os, sys
from sftlab import cli
from sftlab.program import train

finetune = train.finetune
names = ("loss", "grad_norm", "held_out_nll")

def recorded(*args):
    trainer = finetune(*args)
    logged = [entry[n] for entry in trainer.state.log_history for n in names if n in entry]
    weights = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
    with open(f"rank{os.environ.get('RANK')}.json", "w") as file:
        json.dump(dict(logged=logged, weights=weights), file)
    return trainer

train.finetune = recorded
sys.exit(cli.main())
"""


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")


def run(command, cwd=None, timeout=300):
    return subprocess.run(command, cwd=cwd, env=environment(), timeout=timeout,
                          capture_output=True, text=True)


def said(done):
    "The program's own lines on stderr; the launcher adds a report of its own."
    return [line for line in done.stderr.splitlines() if line.startswith("sftlab: ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    (path / "rows.json").write_text(json.dumps(ROWS))
    (path / "bad.json").write_text(json.dumps([*ROWS, dict(instruction="and then?")]))
    return path


@pytest.mark.slow
def test_two_processes_give_the_numbers_and_files_of_one(folder):
    (folder / "script.py").write_text(SCRIPT)
    def words(output):
        return ["script.py", "train", "--data", "bad.json", "--output", output, "--epochs", "2",
                "--on-error", "quarantine", "--keep", "best", "--patience", "2"]
    two = run([*TORCHRUN, *words("two")], folder)
    assert two.returncode == 0, two.stderr
    one = run([sys.executable, *words("one")], folder)
    assert one.returncode == 0, one.stderr
    main, other, alone = (json.loads((folder / f"rank{rank}.json").read_text())
                          for rank in (0, 1, None))
    assert main == other  # the other has the weights of the best epoch, too
    assert main["logged"] == pytest.approx(alone["logged"], rel=1e-6)
    assert main["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    assert sorted(os.listdir(folder / "two")) == sorted(os.listdir(folder / "one"))
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors")
                    for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
    assert "by 2 processes, each with 4 rows at once: 8 rows a step" in two.stdout
    assert two.stdout.count("question ") == one.stdout.count("question ") == 2
    assert "[rank1]" not in two.stderr and not said(two)
    assert len((folder / "bad.json.rejected.jsonl").read_text().splitlines()) == 1


def complete(folder):
    return list(folder.glob("checkpoint-*/complete"))


@pytest.mark.thorough
def test_killed_with_all_its_processes_a_run_goes_on(folder):
    command = [*TORCHRUN, "-m", "sftlab", "train", "--data", "rows.json", "--method", "full",
               "--epochs", "10", "--output"]
    whole, again = run([*command, "whole"], folder), [*command, "broken"]
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(again, cwd=folder, env=environment(), start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as group:
        limit = time.time() + 200
        while not complete(folder / ".broken.unfinished") and time.time() < limit:
            assert group.poll() is None
            time.sleep(0.01)
        children = subprocess.run(["pgrep", "-P", str(group.pid)], capture_output=True, text=True)
        for pid in [group.pid, *map(int, children.stdout.split())]:
            os.kill(pid, signal.SIGKILL)
    assert complete(folder / ".broken.unfinished") and not (folder / "broken").exists()
    done = run(again, folder)
    assert done.returncode == 0, done.stderr
    assert "goes on where it was" in done.stdout
    ours, theirs = (json.loads((folder / name / "run.json").read_text())
                    for name in ("whole", "broken"))
    assert all(ours[name] == theirs[name] for name in ours if name not in ("seconds", "command"))
    assert ours["processes"] == 2 and ours["steps"] == 20
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert not list(folder.glob(".broken*"))  # nothing is left


@pytest.mark.slow
@pytest.mark.parametrize("data, output, says", [
    ("bad.json", "new", "row 19: field 'output' is missing"),
    ("rows.json", "full", "is there already and is not an empty folder"),
], ids=["rows", "folder"])
def test_a_refusal_ends_all_processes_with_one_line(folder, data, output, says):
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full/mine.txt").write_text("what I wrote")
    command = [*TORCHRUN, "-m", "sftlab", "train", "--data", data, "--output", output]
    done = run(command, folder, timeout=100)
    assert done.returncode != 0 and done.stdout == ""
    assert len(said(done)) == 1 and says in said(done)[0]
    assert done.stderr.count("Traceback (most recent call last)") <= 1  # the launcher's own
    assert os.listdir(folder / "full") == ["mine.txt"] and not (folder / "new").exists()


@pytest.mark.slow
def test_one_process_where_two_were_asked_for_is_refused(folder):
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "sftlab"]
    done = run([*command, "train", "--data", "rows.json", "--output", "alone"], folder)
    assert done.returncode != 0 and not (folder / "alone").exists()
    assert "accelerate launch has started one" in said(done)[0] and len(said(done)) == 1


@pytest.mark.slow
def test_the_package_is_a_program():
    done = run([sys.executable, "-m", "sftlab", "train", "--help"])
    assert done.returncode == 0 and "torchrun --nproc_per_node 2 -m sftlab train" in done.stdout


@pytest.mark.parametrize("env, says", [
    (dict(WORLD_SIZE="2"), "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    (dict(PLACE, WORLD_SIZE="two"), "must be a number of processes"),
    (dict(RANK="1"), "WORLD_SIZE"),
    (dict(OMPI_COMM_WORLD_SIZE="2"), "MPI"),
    (dict(PLACE, WORLD_SIZE="2", ACCELERATE_USE_FSDP="true"), "in pieces"),
    (dict(PLACE, WORLD_SIZE="2", ACCELERATE_USE_DEEPSPEED="True"), "in pieces"),
], ids=["alone", "word", "rank", "mpi", "fsdp", "deepspeed"])
def test_processes_that_cannot_train_together(env, says, monkeypatch, tmp_path):
    with pytest.raises(FinetuneError, match=says):
        check_processes(env)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FinetuneError, match=says):
        finetune(None, None, [], tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("env", [
    {}, dict(WORLD_SIZE="1"), dict(PLACE, WORLD_SIZE="2"), dict(ACCELERATE_MIXED_PRECISION="no"),
    dict(PLACE, WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no"), dict(PMI_SIZE="1"),
], ids=["none", "one", "two", "accelerate", "launched", "mpi"])
def test_processes_that_can(env):
    check_processes(env)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    assert train._device("any") is None
    for name, value in dict(PLACE, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(train, "pick_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert train._device("tiny") is None
    assert train._device("any") == "cuda:1" and chosen == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FinetuneError, match="2 processes for 1 GPU"):
        train._device("any")
    monkeypatch.setattr(train, "pick_device", lambda: "cpu")
    assert train._device("any") is None


def test_one_process_keeps_to_one_gpu(monkeypatch, tmp_path):
    import trl

    from sftlab.finetune import _config
    made = []
    def several(**given):
        made.append(SimpleNamespace(world_size=1, n_gpu=4, **given))
        return made[0]
    monkeypatch.setattr(trl, "SFTConfig", several)
    assert _config(load("tiny")[0], "<|im_end|>", dict(steps=1), tmp_path, None)._n_gpu == 1


def test_another_process_speaks_only_of_what_is_wrong_with_it_alone(monkeypatch, capsys):
    for name, value in dict(PLACE, WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert cli.main(["train", "--data", "none.json", "--output", "out"]) == 2
    assert waited == [10]  # in which the launcher ends it, where the main process has failed too
    assert "'none.json' does not exist" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["--help"]) == 0
    assert "Commands:" in capsys.readouterr().out and waited == [10]
