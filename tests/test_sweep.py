"""`sftlab train --sweep`: what is searched, what becomes of runs that fail or are stopped, and what
is said of the end."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from calling import call

from sftlab.errors import FinetuneError
from sftlab.models import load
from sftlab.program import sweep as program
from sftlab.program.sweep import (
    Tried,
    end_text,
    gain_text,
    options_of,
    plan_of,
    table_text,
    tried,
)
from sftlab.tiny.world import as_messages, examples

needs_posix = pytest.mark.skipif(os.name != "posix", reason="has no such signals")
MORE = ("--epochs", 1, "--max-length", 64)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "world.jsonl"
    rows = map(as_messages, examples("train", 24, kinds=["opposite", "plural"]))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def words(file, output, *more, n=5):
    return ["train", "--data", file, "--output", output, "--sweep", n, *MORE, *more]


def read(path): return json.loads(path.read_text())


def losses(folder): return [run["loss"] for run in read(folder / "sweep.json")["runs"]]


# --- with runs that are made up, and quick

HEAD = "read     24 rows\ntrain    1 epochs\nchecks   all\n         epoch 0: held-out loss 3\n"


class MadeUp:
    "In place of training: a loss with its lowest point at 0.002 and 16 rows a step."
    def __init__(self):
        self.seen, self.fails = [], {}

    def __call__(self, folder):
        options, n = read(folder / "settings.json"), len(self.seen) + 1
        self.seen.append(options)
        (folder / "log.txt").write_text(HEAD)
        if n in self.fails:
            raise self.fails.pop(n)
        rows = options["batch_size"] * options["grad_accum"]
        loss = 1 + math.log(options["learning_rate"] / 0.002) ** 2 + abs(math.log2(rows / 16))
        done = options | dict(held_out_nll_after=loss + 0.001 * options["seed"])
        (folder / "made").mkdir()
        (folder / "made" / "run.json").write_text(json.dumps(done))
        (folder / "made" / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def made_up(monkeypatch):
    made_up = MadeUp()
    monkeypatch.setattr(program, "_train", made_up)
    return made_up


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_sweep_tells_its_runs_and_leaves_the_best_settings(file, tmp_path, made_up):
    out = tmp_path / "out"
    status, said, err = call(*words(file, out, n=15))
    assert (status, err) == (0, "")
    told = [line for line in said.splitlines() if line.startswith("run ")]
    assert told[0] == ("run 1 of 15: learning rate 0.005, 8 rows a step (the default): held-out "
                       f"loss {losses(out)[0]:.3f}")
    assert len(told) == 15 and sum(", seed 1: " in line for line in told) == 1
    assert "\nread     24 rows\nchecks   all\nrun 1" in said  # what holds for all runs, once
    table = said.partition("\n\n")[2].splitlines()
    assert table[0].split("  ")[0] == "learning rate" and table[1].endswith("best")
    assert sum(line.endswith("default") for line in table) == 1
    for word in ("best", "gain", "saved", "next"):
        assert f"\n{word} " in said
    assert files_in(out) == ["best.json", "runs", "settings.json", "sweep.json", "sweep.png"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for folder in (out / "runs").iterdir():  # the weights are gone
        assert files_in(folder) == ["log.txt", "run.json", "settings.json"]
    best = read(out / "best.json")
    seeds = [run for run in read(out / "sweep.json")["runs"]
             if run["settings"]["learning_rate"] == best["learning_rate"]]
    assert len(seeds) == 3 and best["seed"] == 0
    assert seeds[0]["settings"]["rows_a_step"] == best["batch_size"] * best["grad_accum"]


def test_all_runs_have_the_same_rows(file, tmp_path, made_up):
    call(*words(file, tmp_path / "out", "--seed", 7))
    assert [run["seed"] for run in made_up.seen] == [7, 7, 7, 8, 9]
    assert {run["rows_seed"] for run in made_up.seen} == {7}
    best = read(tmp_path / "out" / "best.json")
    assert best["seed"] == 7 and "rows_seed" not in best


def test_a_stopped_sweep_goes_on_and_ends_the_same(file, tmp_path, made_up):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call(*words(file, whole, n=10))[0] == 0
    made_up.seen.clear()
    made_up.fails = {4: KeyboardInterrupt()}
    status, _, err = call(*words(file, broken, n=10))
    assert (status, err) == (130, "sftlab: stopped\n") and len(losses(broken)) == 3
    (broken / "runs" / "04" / "made").mkdir()  # a run that was done, but not yet entered
    written = dict(held_out_nll_after=losses(whole)[3])
    (broken / "runs" / "04" / "made" / "run.json").write_text(json.dumps(written))
    status, said, err = call(*words(file, broken, n=10))
    assert (status, err) == (0, "") and "\nrun 4 of 10: " in said and "run 3 of" not in said
    assert said.startswith("resume   an earlier sweep was stopped") or "\nresume " in said
    assert len(made_up.seen) == 10  # four begun, six made after
    for name in ("sweep.json", "best.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_run_that_fails_is_told_and_not_the_end(file, tmp_path, made_up):
    made_up.fails = {1: FinetuneError("not enough memory"), 3: FinetuneError("the loss is nan")}
    out = tmp_path / "out"
    status, said, err = call(*words(file, out, n=10))
    assert (status, err) == (0, "")
    assert "(the default): failed: not enough memory\n" in said
    assert "\nrun 3 of 10: " in said and ": failed: the loss is nan\n" in said
    assert [n for n, loss in enumerate(losses(out), 1) if loss is None] == [1, 3]
    assert "\ngain     the default settings failed (not enough memory)\n" in said
    assert sum("failed" in line for line in said.partition("\n\n")[2].splitlines()) == 3


def test_a_sweep_whose_runs_all_fail(file, tmp_path, made_up):
    made_up.fails = {n: FinetuneError(f"reason {n}") for n in range(1, 6)}
    status, _, err = call(*words(file, tmp_path / "out"))
    assert status == 1 and err.count("\n") == 1 and "none of the 5 runs worked" in err
    assert not (tmp_path / "out" / "best.json").exists()


def test_what_cannot_begin_leaves_nothing(file, tmp_path, made_up):
    made_up.fails = {1: program._NotBegun("row 3 is bad")}
    status, _, err = call(*words(file, tmp_path / "out"))
    assert (status, err) == (1, "sftlab: row 3 is bad\n") and not list(tmp_path.iterdir())


def test_what_cannot_begin_later_ends_a_sweep_that_goes_on(file, tmp_path, made_up):
    made_up.fails = {3: program._NotBegun("the disk is full")}
    status, _, err = call(*words(file, tmp_path / "out"))
    assert (status, err) == (1, "sftlab: the disk is full\n") and len(losses(tmp_path / "out")) == 2
    assert call(*words(file, tmp_path / "out"))[0] == 0 and len(losses(tmp_path / "out")) == 5


def test_a_folder_of_something_else_is_refused(file, tmp_path, made_up):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "settings.json").write_text('{"mine": 1}')
    status, _, err = call(*words(file, mine))
    assert status == 1 and "is not an empty folder" in err and err.count("\n") == 1
    assert files_in(mine) == ["settings.json"]
    status, _, err = call(*words(file, mine / "settings.json"))
    assert status == 1 and "is not an empty folder" in err and err.count("\n") == 1
    made_up.fails = {2: KeyboardInterrupt()}
    call(*words(file, out))
    before = (out / "sweep.json").read_bytes()
    for more, says in (("--seed", 1), "seed 0, not 1"), (("--epochs", 2), "epochs 1.0, not 2.0"):
        status, _, err = call(*words(file, out, *more))
        assert status == 1 and says in err and err.count("\n") == 1, err
    status, _, err = call(*words(file, out, n=6))
    assert status == 1 and "sweep 5, not 6" in err
    assert (out / "sweep.json").read_bytes() == before
    assert call(*words(file, out))[0] == 0
    status, _, err = call(*words(file, out))
    assert status == 1 and "holds a finished sweep" in err and err.count("\n") == 1


def test_other_data_is_another_sweep(file, tmp_path, made_up):
    data = tmp_path / "data.jsonl"
    data.write_text(file.read_text())
    made_up.fails = {2: KeyboardInterrupt()}
    call(*words(data, tmp_path / "out"))
    data.write_text("\n".join(file.read_text().splitlines()[1:]))
    status, _, err = call(*words(data, tmp_path / "out"))
    assert status == 1 and "data_sha256" in err and err.count("\n") == 1


def test_an_empty_folder_will_do(file, tmp_path, made_up):
    (tmp_path / "out").mkdir()
    assert call(*words(file, tmp_path / "out"))[0] == 0


@pytest.mark.parametrize("status, more, says", [
    (2, ("--sweep", 4), "'--sweep'"),
    (1, ("--overwrite",), "takes no --overwrite"),
    (1, ("--seed", 2**32 - 1), "counts up from --seed"),
    (1, ("--model", "nobody/nothing"), "'nobody/nothing' is not on this machine"),
])
def test_what_cannot_be_swept_gets_one_line(file, tmp_path, made_up, status, more, says):
    got, out, err = call(*words(file, tmp_path / "out", *more))
    assert (got, out, err.count("\n")) == (status, "", 1) and says in err, err
    assert not list(tmp_path.iterdir()) and not made_up.seen


def test_several_processes_make_no_sweep(file, tmp_path, monkeypatch):
    place = dict(LOCAL_RANK="0", RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost",
                 MASTER_PORT="1", LOCAL_WORLD_SIZE="2")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    status, _, err = call(*words(file, tmp_path / "out"))
    assert status == 1 and "without torchrun or accelerate" in err and err.count("\n") == 1


def test_without_optuna_there_is_one_line(file, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    status, _, err = call(*words(file, tmp_path / "out"))
    assert status == 1 and err.endswith("pip install 'sftlab[lab]'\n") and err.count("\n") == 1


def test_the_program_starts_without_optuna_and_pandas():
    source = ("import sys, sftlab.cli; "
              "print({'optuna', 'pandas', 'torch', 'psutil'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# --- how a run ends, with a program in its place

BEGUN = "print('         epoch 0: held-out loss 3.5', flush=True)"
SAYS = "print('a remark'); print('sftlab: the loss is nan', file=sys.stderr)"


def run_that(monkeypatch, folder, *lines):
    "Let a few lines of Python be the program, and make a run with it."
    script, run = folder / "program", folder / "01"
    script.write_text("\n".join([f"#!{sys.executable}", "import os, sys, time", *lines]))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (run / ".made.unfinished").mkdir(parents=True)  # a checkpoint
    (run / "settings.json").write_text("{}")
    program._train(run)


def left(folder): return [path.name for path in sorted((folder / "01").iterdir())]


@needs_posix
def test_why_a_run_failed_is_its_last_line(tmp_path, monkeypatch):
    with pytest.raises(FinetuneError, match="^the loss is nan$"):
        run_that(monkeypatch, tmp_path, BEGUN, SAYS, "sys.exit(1)")
    assert left(tmp_path) == ["log.txt", "settings.json"]


@needs_posix
@pytest.mark.parametrize("begun", ["", BEGUN])
def test_a_run_that_is_killed_has_failed(tmp_path, monkeypatch, begun):
    with pytest.raises(FinetuneError, match=r"^killed \(SIGKILL\), as when memory runs out$"):
        run_that(monkeypatch, tmp_path, begun, "os.kill(os.getpid(), 9)")
    assert left(tmp_path) == ["log.txt", "settings.json"]


@needs_posix
def test_a_run_that_did_not_begin_is_another_matter(tmp_path, monkeypatch):
    with pytest.raises(program._NotBegun, match="^the loss is nan$"):
        run_that(monkeypatch, tmp_path, SAYS, "sys.exit(1)")
    assert left(tmp_path) == [".made.unfinished", "log.txt", "settings.json"]


@needs_posix
def test_a_run_that_was_stopped_stops_the_sweep(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run_that(monkeypatch, tmp_path, BEGUN, "sys.exit(130)")
    assert ".made.unfinished" in left(tmp_path)


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_run_is_started_ends_that_run(tmp_path, monkeypatch, number):
    popen, started = subprocess.Popen, []
    def start_and_signal(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        os.kill(os.getpid(), number)
        return started[0]
    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    with pytest.raises(KeyboardInterrupt), program._stopped_by_any_signal():
        run_that(monkeypatch, tmp_path, BEGUN, "time.sleep(600)")
    assert started[0].returncode == -signal.SIGTERM and ".made.unfinished" in left(tmp_path)


# --- what is searched, and what is said

def given(**options):
    known = dict(data=["x.jsonl"], model="tiny", method="lora", learning_rate=None, batch_size=None,
                 grad_accum=None, seed=0, rows_seed=None)
    return known | options


@pytest.mark.parametrize("options, rate, rows", [
    ({}, 0.005, [8, 16, 32]),
    (dict(method="full"), 0.0003, [8, 16, 32]),
    (dict(batch_size=1), 0.005, [4, 8, 16, 32]),
    (dict(batch_size=16), 0.005, [16, 32]),
    (dict(batch_size=3), 0.005, None),
    (dict(batch_size=32), 0.005, None),
    (dict(grad_accum=2), 0.005, None),
    (dict(learning_rate=0.5), 0.5, [8, 16, 32]),
])
def test_what_is_searched(options, rate, rows):
    plan = plan_of(given(**options), program._without_weights("tiny"))
    assert plan.default["learning_rate"] == rate
    assert plan.space["learning_rate"] == (rate / 8, min(8 * rate, 1))
    assert plan.space.get("rows_a_step") == rows
    assert rows is None or plan.default["rows_a_step"] in rows


def test_a_model_without_weights_is_as_large():
    assert program._without_weights("tiny").num_parameters() == load("tiny")[0].num_parameters()


def test_a_run_has_the_settings_that_were_found():
    plan = plan_of(given(batch_size=4), program._without_weights("tiny"))
    options = options_of(plan, dict(learning_rate=0.01, rows_a_step=32), 5)
    assert options == given(batch_size=4, grad_accum=8, learning_rate=0.01, seed=5, rows_seed=0)


def a_table(*runs):
    names = ("learning_rate", "rows_a_step", "seed", "loss", "error")
    return pd.DataFrame([dict(zip(names, run)) for run in runs])


TABLE = a_table(
    (0.005, 8, 0, 0.5, ""), (0.002, 16, 0, 0.4, ""), (0.04, 8, 0, math.inf, "the loss is nan"),
    (0.002, 16, 1, 0.42, ""), (0.002, 16, 2, 0.41, ""))
BEST = dict(learning_rate=0.002, rows_a_step=16)


def test_the_table_has_settings_seeds_mean_and_range():
    plan = plan_of(given(), program._without_weights("tiny"))
    assert table_text(tried(TABLE), plan, BEST).splitlines() == [
        "learning rate  rows a step  seeds  held-out loss  range over seeds",
        "0.002          16           3      0.410          0.400 to 0.420    best",
        "0.005          8            1      0.500                            default",
        "0.04           8            1      failed"]


@pytest.mark.parametrize("default, says", [
    ([0.5], "0.090: held-out loss 0.410 with the best settings, 0.500 with the default ones; seeds "
            "make a difference of 0.020"),
    ([0.425], "not better than the default by more than that"),
    ([0.4], "not better than the default by more than that"),
    ([math.inf], "the default settings failed (why)"),
])
def test_a_gain_counts_where_seeds_do_not_explain_it(default, says):
    best = Tried(BEST, [0.4, 0.42, 0.41], "")
    text = gain_text(best, Tried(dict(learning_rate=0.005, rows_a_step=8), default, "why"))
    assert text.endswith(says) or says in text
    assert ("none to speak of" in text) == ("by more than that" in says)
    assert gain_text(best, best) == "none: the default settings are the best that were tried"


@pytest.mark.parametrize("rate, end", [
    (0.00065, "lower"), (0.001, ""), (0.02, ""), (0.039, "upper")])
def test_a_rate_at_the_end_of_the_range_is_pointed_out(rate, end):
    text = end_text(dict(learning_rate=rate), dict(learning_rate=(0.000625, 0.04)))
    assert (f"at the {end} end" in text) if end else text == ""


@pytest.mark.parametrize("worst", [0.45, 9.0])
def test_the_picture_shows_each_run_that_worked(worst):
    from sftlab.figures.sweeps import plot_sweep
    (ax,) = plot_sweep(pd.concat([TABLE, a_table((0.03, 8, 0, worst, ""))], ignore_index=True),
                       BEST, "rows_a_step", 0.005).axes
    lines = {line.get_label(): line for line in ax.lines}
    eight, sixteen = lines["rows a step 8"], lines["rows a step 16"]
    assert eight.get_marker() != sixteen.get_marker()
    assert (len(eight.get_xdata()), len(sixteen.get_xdata())) == (2, 3)
    ring = lines["chosen (mean)"]
    assert (*ring.get_xdata(), *ring.get_ydata()) == (0.002, pytest.approx(0.41))
    assert ax.get_xscale() == "log" and ax.get_yscale() == ("log" if worst > 1 else "linear")


# --- with real runs

@pytest.mark.slow
def test_a_dry_run_shows_the_space_and_the_time(file, tmp_path):
    status, said, err = call(*words(file, tmp_path / "out", "--dry-run", n=20))
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert ("\nsweep    20 runs: learning rate from 0.000625 to 0.04, on a logarithmic scale; "
            "8, 16 or 32 rows a step\n") in said
    assert "in all, the start of each run not counted\ndry run " in said


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    "A sweep in one go."
    out = tmp_path_factory.mktemp("whole") / "out"
    status, said, err = call(*words(file, out))
    assert (status, err) == (0, ""), err
    return out, said


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "sftlab", *map(str, args)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)


def wait_for(run, there):
    while not there():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_stopped_and_killed_a_sweep_ends_the_same(file, whole, tmp_path):
    out = tmp_path / "out"
    run = start(*words(file, out))
    wait_for(run, (out / "runs" / "01" / "log.txt").exists)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[0].endswith("sftlab: stopped\n") and run.returncode == 130
    assert program._left_running(out) is None  # its run is gone with it
    run = start(*words(file, out))
    wait_for(run, (out / "runs" / "02" / "log.txt").exists)
    run.kill()
    run.communicate()
    status, said, err = call(*words(file, out))
    assert (status, err) == (0, "") and "a run of the sweep that was killed is still going" in said
    assert "run 1 of 5" not in said and "run 5 of 5" in said
    for name in ("sweep.json", "best.json"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


@pytest.mark.slow
def test_the_best_settings_make_the_run_that_was_best(whole, tmp_path):
    out, said = whole
    assert "\nrun 5 of 5: " in said
    status, _, err = call("train", "--config", out / "best.json", "--output", tmp_path / "best")
    assert (status, err) == (0, "")
    run, best = read(tmp_path / "best" / "run.json"), read(out / "best.json")
    assert {name: run[name] for name in best} == best
    mine = [r["loss"] for r in read(out / "sweep.json")["runs"] if r["seed"] == 0
            and r["settings"]["learning_rate"] == best["learning_rate"]]
    assert run["held_out_nll_after"] == mine[0]
