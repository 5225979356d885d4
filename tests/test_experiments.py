"Long experiments: none is stale, a change of the code behind one is seen, and a run that is killed goes on where it was."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftlab.study import experiments
from sftlab.tiny import pretraining, world
from sftlab.study.experiments import EXPERIMENTS, Experiment, code_hash, code_of, run_experiment, stale

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "nbs" / "experiments"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_the_kept_figures_belong_to_this_code(name):
    assert name not in stale(KEPT), f"the code or the model behind {name} has changed: run `make experiments NAME={name}`"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_point_is_there_with_every_seed(name):
    kept = json.loads((KEPT / f"{name}.json").read_text())
    assert [(r["point"], r["seed"]) for r in kept["results"]] == [(p, s) for p in EXPERIMENTS[name].points for s in EXPERIMENTS[name].seeds]
    assert {"processor", "cores"} <= set(kept["machine"]) and {"python", "torch", "trl"} <= set(kept["versions"])


def test_no_file_is_left_of_an_experiment_that_is_gone():
    assert {path.stem for path in KEPT.glob("*.json")} == set(EXPERIMENTS)


def test_a_change_far_down_makes_an_experiment_stale(monkeypatch):
    "What fine-tuning gives depends on how lists are drawn, on how outputs are compared, on the model's files."
    chosen = Experiment(pretraining.tuned_figures, [dict(rows=100)], files=("assets/tiny/config.json",))
    before = code_hash(chosen)
    assert {"sftlab.tiny.world.make_list", "sftlab.generation.evaluate", "sftlab.finetune.finetune"} <= set(code_of(chosen.run))
    monkeypatch.setattr(world, "NAMES", world.NAMES[::-1])
    assert code_hash(chosen) != before
    monkeypatch.undo()
    assert code_hash(chosen) == before
    assert code_hash(Experiment(chosen.run, chosen.points, (0, 1), chosen.files)) != before
    assert code_hash(Experiment(chosen.run, chosen.points, chosen.seeds)) != before


def test_what_is_not_used_does_not_count():
    used = code_of(pretraining.tuned_figures)
    assert not any(name.startswith(("sftlab.tiny.texts", "sftlab.cli", "sftlab.study.experiments.stale", "sftlab.generation.side_by_side")) for name in used)


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


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_figures(tmp_path):
    unfinished, finished = tmp_path / "work" / "00_trial.json", tmp_path / "kept" / "00_trial.json"
    counts = []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "0.1"], stderr=subprocess.DEVNULL)
        known = unfinished.read_text() if unfinished.exists() else ""
        while child.poll() is None and (not unfinished.exists() or unfinished.read_text() == known):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it ended before it could be killed"
        counts.append(len(json.loads(unfinished.read_text())["results"]))
        assert not finished.exists()
    assert 0 < counts[0] < counts[1] < 9
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), "0"], check=True, capture_output=True)
    assert [r["figures"]["y"] for r in json.loads(finished.read_text())["results"]] == [x * 10 + seed for x in (1, 2, 3) for seed in (0, 1, 2)]
    assert not unfinished.exists()


def test_results_of_other_code_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "00_trial", Experiment(lambda x, seed: dict(y=x), [dict(x=1)], (0,)))
    (tmp_path / "00_trial.json").write_text(json.dumps(dict(hash="of other code", results=[dict(point=dict(x=1), seed=0, figures=dict(y=99))])))
    assert run_experiment("00_trial", tmp_path / "kept", tmp_path)["results"][0]["figures"] == dict(y=1)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="there is no experiment 'nonsense': choose one of "):
        experiments.main("nonsense")
