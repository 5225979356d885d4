"""Long experiments.

None is stale, a change of the code that gave one is seen, on every Python alike, and a run that is
killed continues where it was.
"""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftlab.study import experiments
from sftlab.study.experiments import (EXPERIMENTS, Experiment, code_hash, code_of,
                                      confirm_experiment, enter_all, fingerprint, run_experiment,
                                      stale)
from sftlab.tiny import pretraining, world

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "nbs" / "experiments"
enter_all()


@pytest.fixture(scope="module")
def stale_now():
    return stale(KEPT)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_the_kept_figures_belong_to_this_code(name, stale_now):
    hint = f"run `make experiments NAME={name}` (HOW=confirm if it was only rewritten)"
    assert name not in stale_now, f"the code or the model that gave {name} has changed: {hint}"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_point_is_there_with_every_seed(name):
    kept = json.loads((KEPT / f"{name}.json").read_text())
    chosen = EXPERIMENTS[name]
    wanted = [(point, seed) for point in chosen.points for seed in chosen.seeds]
    assert [(r["point"], r["seed"]) for r in kept["results"]] == wanted
    assert {"processor", "cores"} <= set(kept["machine"])
    assert {"python", "torch", "trl"} <= set(kept["versions"])


def test_no_file_is_left_of_an_experiment_that_is_gone():
    assert {path.stem for path in KEPT.glob("*.json")} == set(EXPERIMENTS)


def test_a_change_far_down_makes_an_experiment_stale(monkeypatch):
    "How lists are drawn and outputs compared decides what fine-tuning gives."
    chosen = Experiment(pretraining.tuned_figures, [dict(rows=100)])
    before = code_hash(chosen)
    used = {"sftlab.tiny.world.make_list", "sftlab.generation.evaluate", "sftlab.finetune.finetune"}
    assert used <= set(code_of(chosen.run))
    monkeypatch.setattr(world, "NAMES", world.NAMES[::-1])
    assert code_hash(chosen) != before
    monkeypatch.undo()
    assert code_hash(chosen) == before
    assert code_hash(Experiment(chosen.run, chosen.points, (0, 1))) != before
    assert code_hash(Experiment(chosen.run, [dict(rows=99)])) != before


def test_other_data_make_an_experiment_stale(tmp_path, monkeypatch):
    import sftlab
    chosen = Experiment(lambda seed: {}, [{}], files=("assets/tiny/config.json",))
    before = experiments.data_hash(chosen)
    copy = tmp_path / "sftlab"
    (copy / "assets/tiny").mkdir(parents=True)
    shutil.copy(ROOT / "sftlab/assets/tiny/config.json", copy / "assets/tiny")
    monkeypatch.setattr(sftlab, "__file__", str(copy / "__init__.py"))
    assert experiments.data_hash(chosen) == before
    (copy / "assets/tiny/config.json").write_text("{}")
    assert experiments.data_hash(chosen) != before


def test_what_is_not_used_does_not_count():
    used = code_of(pretraining.tuned_figures)
    others = ("sftlab.tiny.texts", "sftlab.cli", "sftlab.study", "sftlab.figures",
              "sftlab.guards", "sftlab.errors", "sftlab.files.atomic")
    assert not any(name.startswith(others) for name in used)


OTHER_PYTHON = """
import sys
sys.path.insert(0, sys.argv[1])
from sftlab.study.experiments import code_of, fingerprint
from sftlab.tiny import texts, world
print(*(fingerprint(code_of(f)) for f in (world.examples, texts.documents)))
"""


def works(python):
    "Whether it is an interpreter, and no stand-in for one that is not installed."
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def other_pythons():
    "Interpreters of the other versions that we promise, where this machine has them."
    found = [shutil.which(f"python3.{minor}") for minor in (11, 12, 13)]
    found += sorted(Path.home().glob(".pyenv/versions/3.1[123].*/bin/python"))
    ours = sys.version_info[1]
    return [str(p) for p in found if p and f"3.{ours}" not in str(p) and works(p)]


def test_every_python_gives_the_same_fingerprint():
    "`ast.dump` differs from version to version: what is kept would be stale on two of three."
    from sftlab.tiny import texts
    here = [fingerprint(code_of(f)) for f in (world.examples, texts.documents)]
    pythons = other_pythons()
    if not pythons:
        pytest.skip("this machine has no other Python of 3.11 to 3.13")
    for python in pythons:
        command = [python, "-c", OTHER_PYTHON, str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.split() == here, f"{python}: {done.stderr[-500:]}"


TRIAL = """
import math
from functools import partial
from dataclasses import dataclass
@dataclass
class Preset:
    size: int
PRESETS = {"small": Preset(3)}
RATE = {"a": lambda x: x * 2, "b": lambda x: x * 3}
def loop(n): return loop(n - 1) + RATE["a"](n) if n else 0
def run(seed): return loop(seed) + math.floor(seed) + PRESETS["small"].size
"""


@pytest.mark.parametrize("old, new, counts", [
    ("x * 3", "x * 4", True),  # a lambda of a table, the second in its line
    ("loop(n - 1)", "loop(n - 2)", True),  # a function that calls itself
    ("math.floor", "math.ceil", True),  # another library's function
    ('"a"', '"c"', True),  # a key
    ("Preset(3)", "Preset(4)", True),  # a field of an object in a table
    ("loop", "again", False),  # only a name
    ("from functools import partial\n", "", False),  # not used
])
def test_what_counts(old, new, counts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for i, source in enumerate((TRIAL, TRIAL.replace(old, new))):
        name = f"trial_{abs(hash((old, new)))}_{i}"
        (tmp_path / f"{name}.py").write_text(source)
        run = __import__(name).run
        found.append(fingerprint(code_of(run, package=name)))
    assert (found[0] != found[1]) == counts


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_an_experiment_does_not_depend_on_the_others(name):
    "Else every new one would make all of them stale."
    assert not any("EXPERIMENTS" in used for used in code_of(EXPERIMENTS[name].run))


CHILD = """
import sys, time
from pathlib import Path
from sftlab.study import experiments

@experiments.experiment("00_trial", [dict(x=1), dict(x=2), dict(x=3)])
def trial(x, seed):
    time.sleep(float(sys.argv[2]))
    return dict(y=x * 10 + seed)

experiments.run_experiment("00_trial", Path(sys.argv[1]) / "kept", Path(sys.argv[1]) / "work")
"""


def kill_a_child_after_a_result(tmp_path):
    "Start the trial, kill it when one more result is written; how many there are then."
    unfinished = tmp_path / "work" / "00_trial.json"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "0.1"],
                             stderr=subprocess.DEVNULL)
    known = unfinished.read_text() if unfinished.exists() else ""
    while child.poll() is None:
        if unfinished.exists() and unfinished.read_text() != known:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
    return len(json.loads(unfinished.read_text())["results"])


def test_killed_at_any_moment_it_ends_with_the_same_figures(tmp_path):
    finished = tmp_path / "kept" / "00_trial.json"
    counts = [kill_a_child_after_a_result(tmp_path) for _ in range(2)]
    assert not finished.exists()
    assert 0 < counts[0] < counts[1] < 9
    command = [sys.executable, "-c", CHILD, str(tmp_path), "0"]
    subprocess.run(command, check=True, capture_output=True)
    figures = [r["figures"]["y"] for r in json.loads(finished.read_text())["results"]]
    assert figures == [x * 10 + seed for x in (1, 2, 3) for seed in (0, 1, 2)]
    assert not (tmp_path / "work" / "00_trial.json").exists()


def enter(monkeypatch, run, points=(dict(x=1), dict(x=2)), seeds=(0, 1)):
    monkeypatch.setitem(EXPERIMENTS, "00_trial", Experiment(run, list(points), seeds))


def test_results_of_other_code_are_not_continued(tmp_path, monkeypatch):
    enter(monkeypatch, lambda x, seed: dict(y=x), [dict(x=1)], (0,))
    old = dict(hash="of other code", results=[dict(point=dict(x=1), seed=0, figures=dict(y=99))])
    (tmp_path / "00_trial.json").write_text(json.dumps(old))
    made = run_experiment("00_trial", tmp_path / "kept", tmp_path)
    assert made["results"][0]["figures"] == dict(y=1)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    "A finished experiment whose fingerprint is of other code."
    enter(monkeypatch, lambda x, seed: dict(y=x + seed, seconds=time.time()))
    run_experiment("00_trial", tmp_path, tmp_path / "work")
    path = tmp_path / "00_trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(hash="of other code")))
    return path


def test_rewritten_code_that_gives_the_same_is_confirmed(kept, monkeypatch):
    before = json.loads(kept.read_text())
    assert confirm_experiment("00_trial", kept.parent) == []
    after = json.loads(kept.read_text())
    assert after["hash"] == code_hash(EXPERIMENTS["00_trial"]) != before["hash"]
    assert after["results"] == before["results"] and after["confirmed"]["seed"] == 0


@pytest.mark.parametrize("run", [lambda x, seed: dict(y=x + seed + 1e-9 * (x == 2)),
                                 lambda x, seed: dict(y=x + seed, z=0)])
def test_code_that_gives_another_figure_at_one_point_is_not_confirmed(kept, run, monkeypatch):
    before = kept.read_text()
    enter(monkeypatch, run)
    assert confirm_experiment("00_trial", kept.parent) != []
    assert kept.read_text() == before


@pytest.mark.parametrize("points, seeds", [([dict(x=1)], (0, 1)), ([dict(x=1), dict(x=2)], (0,))])
def test_other_points_or_seeds_cannot_be_confirmed(kept, points, seeds, monkeypatch):
    enter(monkeypatch, EXPERIMENTS["00_trial"].run, points, seeds)
    with pytest.raises(SystemExit, match="have changed: run make experiments"):
        confirm_experiment("00_trial", kept.parent)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="there is no experiment 'nonsense': choose one of "):
        experiments.main("nonsense")
