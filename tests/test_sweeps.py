"Searches: what is written by hand is what Optuna does; a sweep that was stopped is the same sweep."
import math
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import TrialState, create_trial

from sftlab.errors import DataError, TrainingError
from sftlab.files.sweeps import read_runs
from sftlab.sweeps import bumps, chosen, density, draw, falls_behind, promise, suggest, sweep

LOW, HIGH = 1e-4, 1e-2
RATE = FloatDistribution(LOW, HIGH, log=True)
SPACE = dict(learning_rate=(LOW, HIGH), rows=[4, 8, 16])


def hill(settings, seed):
    "A loss with one valley, and a little that depends on the seed."
    noise = 0.01 * math.sin(1e6 * settings["learning_rate"] + seed)
    return abs(math.log(settings["learning_rate"] / 1e-3)) + settings["rows"] / 100 + noise


# --- what Optuna does

rates = st.floats(LOW, HIGH)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(rates, st.floats(-5, 5)), min_size=2, max_size=24,
                unique_by=(lambda run: run[0], lambda run: run[1])), st.lists(rates, min_size=1))
def test_promise_is_what_tpe_maximises(runs, at):
    study = optuna.create_study()
    for rate, loss in runs:
        study.add_trial(create_trial(params={"x": rate}, distributions={"x": RATE}, value=loss))
    sampler, trials = optuna.samplers.TPESampler(), study.get_trials()
    sides = [sampler._build_parzen_estimator(study, {"x": RATE}, some, handle_below=good)
             for some, good in zip(_split_trials(study, trials, default_gamma(len(runs))),
                                   (True, False))]
    theirs = sampler._compute_acquisition_func({"x": np.array(at)}, *sides)
    tried, losses = zip(*runs)
    ours = promise(np.log(at), np.log(tried), losses, math.log(LOW), math.log(HIGH))
    assert np.allclose(ours, theirs, rtol=1e-7, atol=1e-7)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_random_search_is_uniform_in_the_logarithm_as_optunas(seed):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    theirs = [study.ask({"x": RATE}).params["x"] for _ in range(5)]
    same = np.random.RandomState(seed) # `draw` asks for nothing but `uniform` and `choice`
    assert theirs == [draw(dict(x=(LOW, HIGH)), same)["x"] for _ in range(5)]


@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=16))
@settings(max_examples=60, deadline=None)
def test_who_falls_behind_is_whom_the_median_pruner_stops(runs):
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=5))
    finished = []
    for losses in runs:
        trial = study.ask()
        for epoch, loss in enumerate(losses, 1):
            trial.report(loss, epoch)
            stops = trial.should_prune()
            assert falls_behind(losses[:epoch], finished) == stops
            if stops:
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, losses[-1])
            finished.append(losses)


@given(st.lists(st.floats(math.log(LOW), math.log(HIGH)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_density_is_one_in_all_and_its_bumps_are_inside(tried):
    low, high = math.log(LOW), math.log(HIGH)
    middles, widths = bumps(tried, low, high)
    assert len(middles) == len(widths) == len(tried) + 1
    assert widths.max() <= high - low and widths.min() >= (high - low) / 100
    at = np.linspace(low, high, 20_001)
    assert np.trapezoid(density(at, tried, low, high), at) == pytest.approx(1, abs=1e-3)


# --- a sweep

def test_a_sweep_finds_the_valley_and_repeats_the_best_with_other_seeds():
    runs = sweep(hill, SPACE, 20)
    assert list(runs) == ["learning_rate", "rows", "seed", "loss", "error"] and len(runs) == 20
    searched, again = runs[:16], runs[16:]
    assert set(searched.seed) == {0} and list(again.seed) == [1] * 2 + [2] * 2
    best = searched.sort_values("loss")[:2]
    for seed in (1, 2):
        assert list(again[again.seed == seed].learning_rate) == list(best.learning_rate)
    found = chosen(runs)
    assert 5e-4 < found["learning_rate"] < 2e-3 and type(found["rows"]) is int
    mean = runs[runs.learning_rate == found["learning_rate"]].loss.mean()
    assert mean == min(runs[runs.learning_rate == rate].loss.mean() for rate in best.learning_rate)


@pytest.mark.parametrize("n", [5, 6, 10, 13, 20])
def test_all_runs_are_spent(n):
    runs = sweep(hill, SPACE, n, seed=3)
    assert len(runs) == n and runs.seed.nunique() == 3
    assert (runs.seed == 3).sum() == n - 2 * max(1, n // 10)


@pytest.mark.parametrize("stop", [0, 1, 7, 15, 16, 19])
def test_a_sweep_that_was_stopped_goes_on_to_the_same_end(stop, tmp_path):
    whole, calls, file = sweep(hill, SPACE, 20), [], tmp_path / "sweep.json"
    def stopped(settings, seed):
        if len(calls) == stop:
            calls.append(None)
            raise KeyboardInterrupt
        calls.append(settings)
        return hill(settings, seed)
    with pytest.raises(KeyboardInterrupt):
        sweep(stopped, SPACE, 20, file)
    assert len(read_runs(file, SPACE, 20, 0)) == stop
    pd.testing.assert_frame_equal(sweep(stopped, SPACE, 20, file), whole)
    assert len(calls) == 21 # the one that was stopped was run again, and no other
    before = Path(file).read_bytes()
    pd.testing.assert_frame_equal(sweep(stopped, SPACE, 20, file), whole)
    assert len(calls) == 21 and Path(file).read_bytes() == before


def test_runs_that_fail_are_rows_with_their_reason(tmp_path):
    def fragile(settings, seed):
        if settings["learning_rate"] > 2e-3:
            raise TrainingError("the loss is not finite")
        return hill(settings, seed)
    runs = sweep(fragile, SPACE, 20, tmp_path / "sweep.json")
    failed = runs[runs.learning_rate > 2e-3]
    assert len(failed) and (failed.loss == math.inf).all()
    assert set(failed.error) == {"the loss is not finite"} and chosen(runs)["learning_rate"] < 2e-3
    again = sweep(fragile, SPACE, 20, tmp_path / "sweep.json")
    pd.testing.assert_frame_equal(again, runs)


def test_a_mistake_in_the_run_itself_is_not_swallowed():
    def broken(settings, seed):
        return settings["no such setting"]
    with pytest.raises(KeyError, match="no such setting"):
        sweep(broken, SPACE, 20)
    with pytest.raises(TrainingError, match="must return a number"):
        sweep(lambda settings, seed: "0.3", SPACE, 20)


def test_where_nothing_works_nothing_is_chosen():
    runs = sweep(lambda settings, seed: math.nan, SPACE, 5)
    assert (runs.loss == math.inf).all()
    with pytest.raises(TrainingError, match="none of the 5 runs worked out"):
        chosen(runs)


def test_few_choices_are_not_run_twice_with_one_seed_in_the_end():
    runs = sweep(hill, dict(learning_rate=[1e-3, 2e-3], rows=[4]), 20)
    last = runs[16:]
    assert not last.duplicated(["learning_rate", "rows", "seed"]).any()
    assert chosen(runs) == dict(learning_rate=1e-3, rows=4)


def test_another_sweep_does_not_touch_the_file(tmp_path):
    file = tmp_path / "sweep.json"
    sweep(hill, SPACE, 5, file)
    before = file.read_bytes()
    for more in (dict(n=6), dict(n=5, seed=1)):
        with pytest.raises(DataError, match="the runs of another sweep"):
            sweep(hill, SPACE, file=file, **more)
    assert file.read_bytes() == before


def test_a_suggestion_depends_on_the_runs_and_the_seed_alone():
    runs = [dict(settings=draw(SPACE, np.random.RandomState(i)), loss=float(i)) for i in range(12)]
    assert suggest(runs, SPACE, 1) == suggest(runs, SPACE, 1) != suggest(runs, SPACE, 2)
    other = [dict(run, loss=-run["loss"]) for run in runs]
    assert suggest(other, SPACE, 1) != suggest(runs, SPACE, 1)
