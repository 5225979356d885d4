"""The exercises.

Every checker against wrong answers, the notebooks that learners get, their progress, and nbgrader.
What there is to test is found by looking: a new master in `exercises/solutions` needs no edit here.
"""
import contextlib
import copy
import functools
import inspect
import io
import json
import linecache
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_notebooks import FACTOR, run, run_quickly

from sftlab import errors
from sftlab.study import exercises as ex
from sftlab.study import masters as ma
from sftlab.study import progress as pr
from sftlab.study.workspace import copy_course

ROOT = Path(__file__).resolve().parent.parent
MASTERS = {path.name: path for path in sorted(ROOT.glob("exercises/solutions/*.ipynb"))}
NAMES = list(MASTERS)
LEARNERS = {name: ROOT / "exercises" / name for name in NAMES}
each_notebook = pytest.mark.parametrize("name", NAMES)


def sources(path, kind="code"):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def module_of(name):
    "What a master exports."
    exports = re.search(r"#\| default_exp (\S+)", "\n".join(sources(MASTERS[name])))[1]
    return import_module(f"sftlab.{exports}")


QUESTIONS = {name: pr.questions_of(module_of(name)) for name in NAMES}  # of each: "q1" -> question
ASKED = {q.key: (name, number) for name, asked in QUESTIONS.items() for number, q in asked.items()
         if isinstance(q, ex.Question)}


def functions(name):
    "The questions of a notebook that ask for a function."
    return [q for q in QUESTIONS[name].values() if isinstance(q, ex.Question)]


@functools.cache
def with_wrong_answers(name):
    """The questions of a master with all their wrong answers.

    These are entered, and not tried at once, as in the notebook: that is done where it is run.
    """
    scope = {"__name__": name}

    def enter(question, mistake):
        def wrong(function):
            question.answers.append((mistake, function))
            return question.solve
        return wrong

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(ex.Question, "wrong", enter)  # and so `right`, which is made of it
        for i, source in enumerate(sources(MASTERS[name])):
            if source.startswith("#| default_exp") or "load(" in source or "%pip" in source:
                continue  # nothing to ask there; the model; what Colab needs
            cell = f"<{name} cell {i}>"
            linecache.cache[cell] = (len(source), None, source.splitlines(True), cell)
            exec(compile(source, cell, "exec"), scope)
    return pr.questions_of(type("", (), scope))


@pytest.fixture(params=ASKED, ids=str)
def q(request, monkeypatch):
    "Each question that asks for a function, with its wrong answers; patient, on a busy machine."
    name, number = ASKED[request.param]
    question = with_wrong_answers(name)[number]
    monkeypatch.setattr(question, "seconds", FACTOR * question.seconds)
    return question


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A learner's folder, in which we are."
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- every checker

def wrong_answers(q): return [name for name, _ in q.answers if name != "right"]


# Of what is new each time; what is always asked has the seed 0.
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3, 4))]


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_answers_are_rejected_by_name(q, seed, record_property):
    rows = ex.kills(q, seed)
    named = [row for row in rows if row[1] not in (None, "right", "not attempted")]
    rejected = sum(row not in ex.survivors(rows) for row in named)
    record_property("kills", f"{q.key:28} {rejected:3} / {len(named)}")
    assert ex.survivors(rows) == []
    assert len(wrong_answers(q)) >= 3


def test_every_mistake_that_a_check_names_is_tried(q):
    tried = [name for name, _ in q.answers]
    assert [name for name in q.mistakes if name not in tried] == [] and len(q.hints) >= 2


@each_notebook
def test_a_lesson_has_enough_wrong_answers(name):
    asked = with_wrong_answers(name).values()
    assert sum(len(wrong_answers(q)) for q in asked if isinstance(q, ex.Question)) >= 16


def test_a_check_that_looks_at_the_example_alone_is_found_out(q, monkeypatch):
    "The control: with fewer inputs, answers come through that know nothing."
    monkeypatch.setattr(q, "make", lambda rng: [])
    assert ("the example alone", None, "right") in ex.survivors(ex.kills(q))


def with_inputs(q, monkeypatch, fixed, fresh=()):
    "Ask a question with these inputs, once."
    drawn = [fixed, fresh]
    monkeypatch.setattr(q, "make", lambda rng: drawn.pop(0))


def test_without_its_mistakes_a_check_names_none(q, monkeypatch):
    "The control: names come from the mistakes, so without them the wrong answers are survivors."
    known = set(q.mistakes)
    monkeypatch.setattr(q, "mistakes", {})
    with_inputs(q, monkeypatch, q.make(random.Random(0)))
    nameless = {name for name, want, _ in ex.survivors(ex.kills(q)) if want}
    assert nameless == {name for name, _ in q.answers if name in known}


def test_the_solution_is_right_on_many_inputs(q, monkeypatch):
    "Those of ten seeds. (Mistakes are looked at where an answer is wrong.)"
    with_inputs(q, monkeypatch, *[[args for seed in some for args in q.make(random.Random(seed))]
                                  for some in (range(5), range(5, 10))])
    monkeypatch.setattr(q, "mistakes", {})
    assert ex.judge(q, q.solve).name == "right"


def test_inputs_are_fixed_by_the_seed_and_new_without(q):
    def text(seed): return repr(q.make(random.Random(seed)))
    assert text(0) == text(0) and len({text(seed) for seed in range(5)}) == 5


def test_the_solution_is_shown_without_marks(q, folder, capsys):
    q.solution()
    shown = capsys.readouterr().out
    scope = dict(torch=torch, math=math, json=json, zlib=zlib)
    exec(shown, scope)  # needs nothing but the imports that the learner's notebook has
    assert ex.judge(q, scope[q.name], 0).name == "right" and "SOLUTION" not in shown
    assert pr.read_progress() == {q.key: dict(state="shown", tries=1)}


KEYS = {
    "generation": "temperature pass_at_k stop_strings reply best_temperature is_it_better",
    "data": "seen_before split_by_key from_log jsonl pick too_good",
    "templates": "chat_prompt answer_rows cut_special repaired layout_costs fine_in_training",
    "masking": "learned empty_thoughts fit repair gain better_loss",
    "training": "rows_seen perplexity adamw repair by_heart which_batch",
    "memory": "rows_that_fit first_too_large chunked_loss repair settings sixteen_of_24",
    "lora": "trainable directions as_one prepare best_rate learned_nothing",
    "quantization": "smaller apart compensate merged keep worse_after_merge",
    "packing": "lengths rows_a_step readers repair longest faster_and_worse",
    "neftune": "alpha repair alpha_at six_points",
    "prompt_tuning": "numbers loss repair as_prefix customers",
    "sweeps": "next_rate batches race compare six_runs twenty_runs",
    "quality": "luhn depth cover clean hardest afternoon",
    "forgetting": "old_rows damage repair farthest hospital",
    "metrics": "same_tokens gap several repair best_limit best_of_twelve",
    "benchmarks": "copied repair best_forms from_41_to_74",
    "judging": "leaning plan repair prefer_it",
    "serving": "penalty parted repair as_good",
}


def test_keys_are_unique_and_stay():
    "A key that changes loses what learners have done: one may be retired, none gets a new task."
    keys = [task.key for tasks in pr.all_questions().values() for task in tasks]
    assert len(set(keys)) == len(keys)
    assert {f"{module}.{name}" for module in KEYS for name in KEYS[module].split()} <= set(keys)


# --- the notebooks

@each_notebook
def test_learners_notebooks_are_in_step_with_their_masters(name):
    made = ma.notebook_text(ma.notebook_from(MASTERS[name]))
    assert LEARNERS[name].read_text("utf-8") == made, "run make exercises"
    nbformat.validate(nbformat.reads(made, 4))
    cells = json.loads(made)["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)


@each_notebook
def test_a_changed_master_would_be_noticed(name, tmp_path):
    "The control: one more letter in a task makes another notebook."
    notebook = json.loads(MASTERS[name].read_text("utf-8"))
    task = next(c for c in notebook["cells"] if "".join(c["source"]).startswith("## q1"))
    task["source"][-1] += "s"
    (tmp_path / name).write_text(json.dumps(notebook), "utf-8")
    made = ma.notebook_text(ma.notebook_from(tmp_path / name))
    assert made != ma.notebook_text(ma.notebook_from(MASTERS[name]))


def test_every_learners_notebook_has_a_master():
    assert sorted(path.name for path in ROOT.glob("exercises/*.ipynb")) == NAMES


def telling(line):
    "Whether nobody would write the line without having seen it."
    usual = ("import", "#", "return messages", "with torch.no_grad()")
    return len(re.findall(r"\w", line)) > 12 and not line.strip().startswith(usual)


def lines_of(texts):
    return {line.strip() for text in texts for line in text.splitlines() if telling(line)}


@functools.cache
def solutions():
    "The lines of all solutions."
    texts = ["\n".join(sources(path)) for path in MASTERS.values()]
    found = [re.findall(r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", t, re.DOTALL) for t in texts]
    assert [len(some) for some in found] == [len(functions(name)) for name in NAMES]
    return lines_of(text for some in found for text in some)


@each_notebook
def test_learners_notebooks_hold_no_solution(name):
    "No line of a solution, a mistake or a wrong answer, and no rubric."
    text = LEARNERS[name].read_text("utf-8")
    marked = [s for s in sources(MASTERS[name]) if re.search(r"\.(wrong|right|mistake)\b", s)]
    hidden = lines_of(re.sub(r"^def .*", "", s, flags=re.MULTILINE) for s in marked)
    secret = hidden | solutions()
    learner = lines_of(sources(LEARNERS[name], "code") + sources(LEARNERS[name], "markdown"))
    assert len(hidden) > 50 and not secret & learner
    asked = [q for questions in QUESTIONS.values() for q in questions.values()]
    opened = [q for q in asked if isinstance(q, ex.OpenQuestion)]
    assert not any(point in text for q in opened for point in [*q.rubric, q.model])
    assert "SOLUTION" not in text and not any(c.get("outputs") for c in json.loads(text)["cells"])


@each_notebook
def test_headings_name_the_questions(name):
    texts = sources(MASTERS[name], "markdown")
    headings = [text.splitlines()[0] for text in texts if text.startswith("## q")]
    asked = QUESTIONS[name].items()
    assert headings == [f"## {number}: {task.title}" for number, task in asked]


@each_notebook
def test_stubs_are_not_attempted(name, folder, capsys, monkeypatch):
    "Only the example is asked: whether there is an answer shows at the first question."
    stubs = [s for s in sources(LEARNERS[name]) if re.search("raise NotImplementedError$", s)]
    for source, q in zip(stubs, functions(name), strict=True):
        monkeypatch.setattr(q, "make", lambda rng: [])
        scope = {}
        exec(source, scope)
        q.check(scope[q.name])
        assert capsys.readouterr().out.startswith(f"○ {q.title} · not attempted yet")
        with pytest.raises(ex.NotYet, match="not attempted"):
            q.grade(scope[q.name])
    assert not (folder / pr.PROGRESS).exists()


def solved(notebook, name):
    "A learner's notebook with all the answers in it."
    answers = {f"def {q.name}(": inspect.getsource(q.solve) for q in functions(name)}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for begins, answer in answers.items():
            if source.startswith(begins):
                cell["source"] = ex.without_marks(answer)
        if source.endswith(".mark()"):
            cell["source"] = source.replace("()", "(3)")
    return notebook


def one_after_another(*parts):
    """One notebook of several: a name, a notebook, and perhaps a last cell, for each.

    Each begins without any name of those before, and its cells' ids say where they are from.
    """
    cells = []
    for part, notebook, *last in parts:
        if cells:
            cells.append(nbformat.v4.new_code_cell("%reset -f", id=f"{part}-begins"))
        for cell in notebook["cells"]:
            cells.append(nbformat.from_dict(cell | dict(id=f"{part}-{cell['id']}")))
        for source in last:
            cells.append(nbformat.v4.new_code_cell(source, id=f"{part}-last"))
    return nbformat.v4.new_notebook(cells=cells)


NOTHING_KEPT = f"import os\nassert not os.path.exists({pr.PROGRESS!r})"


@pytest.mark.slow
@each_notebook
def test_notebook_runs_untouched_and_solved(name, tmp_path):
    """Both in one kernel. Untouched it shows no error and keeps nothing; solved, all is right."""
    untouched = json.loads(LEARNERS[name].read_text("utf-8"))
    full = solved(copy.deepcopy(untouched), name)
    path, log = tmp_path / name, tmp_path / "refused"
    parts = ("untouched", untouched, NOTHING_KEPT), ("solved", full)
    nbformat.write(one_after_another(*parts), path)
    run(path, log, 300, run_quickly)
    assert not log.exists()
    kept = json.loads((tmp_path / pr.PROGRESS).read_text())
    assert {entry["state"] for entry in kept.values()} == {"right", "3 of 5 points"}
    assert set(kept) == {task.key for task in QUESTIONS[name].values()}


@pytest.mark.thorough
@each_notebook
def test_a_master_runs(name, tmp_path):
    """Each wrong answer is tried as the author sees it: a cell fails unless it is rejected by name.

    That is once more what `test_wrong_answers_are_rejected_by_name` does without a kernel.
    """
    log = tmp_path / "refused"
    run(shutil.copy(MASTERS[name], tmp_path / name), log, 300, run_quickly)
    assert not log.exists()


@pytest.mark.slow
def test_one_part_leaves_no_name_to_the_next(tmp_path):
    "The control: what runs only because of a part before it fails."
    one, two = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
                for source in ("x = 1", "print(x)"))
    path = tmp_path / "x.ipynb"
    nbformat.write(one_after_another(("one", one), ("two", two)), path)
    with pytest.raises(RuntimeError, match="name 'x' is not defined"):
        run(path, tmp_path / "refused", 60, run_quickly)


# --- what a learner sees

def ask(q, function):
    "What the check says."
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            q.check(function)
    except ex.NotYet as e:
        return str(e)
    return out.getvalue().strip()


def double():
    "A question of our own."
    def twice(values):
        "Each value twice."
        return [2 * v for v in values]
    q = ex.Question("trial.twice", "Twice", twice, example=lambda: ([1, 2],), hints=["one", "two"])

    @q.inputs
    def _(rng):
        several = [rng.randrange(99) for _ in range(5)]
        return [([],), ([rng.randrange(9)],), (several,), ([7.5],)]

    @q.mistake("squares", "that is the square.")
    def _(values): return [v * v for v in values]

    return q


def right(values): return [2 * v for v in values]


def test_one_line_for_what_is_known(folder):
    q = double()
    def stub(values): raise NotImplementedError
    nothing = "○ Twice · not attempted yet: write twice(values)."
    for answer, said in [
            (lambda values: [v + v for v in values],
             "✓ Twice · right, on 9 inputs, 8 of which you had not seen."),
            (stub, nothing), (None, nothing),
            (lambda values: [v ** 2 for v in values], "✗ Twice · that is the square.")]:
        assert ask(q, answer) == said


def test_grading_raises_what_is_wrong(folder):
    assert double().grade(right) is None
    with pytest.raises(ex.NotYet, match="that is the square"):
        double().grade(lambda values: [v ** 2 for v in values])


def test_the_smallest_difference_is_shown(folder):
    text = ask(double(), lambda values: [3 * v for v in values])
    shown = (r"for      twice\(values=\[\d(\.5)?\]\)\n"
             r"  expected \[[\d.]+\]\n  yours    \[[\d.]+\]$")
    assert "smallest input" in text and re.search(shown, text)


def test_two_mistakes_at_once_are_both_named():
    q = double()

    @q.mistake("empty", "an empty list is a list, too.")
    def _(values): return right(values) if values else None

    verdict = ex.judge(q, lambda values: [v * v for v in values] if values else None)
    assert verdict.name == "squares"
    assert verdict.text == "that is the square. And: an empty list is a list, too."


def test_printing_is_left_out_and_said(folder):
    def chatty(values):
        print("hello\nworld")
        return right(values)
    said = ask(double(), chatty)
    assert said.endswith("(What it prints is left out here: 22 lines.)") and "hello" not in said


def test_changing_the_input_is_told(folder):
    def grow(values):
        result = right(values)
        values.clear()
        return result
    says = "the results are right, but your function changes what it is given"
    assert says in ask(double(), grow)


def test_memory_of_earlier_calls_is_told(folder):
    seen = []
    def once(values):
        seen.append(values)
        return right(values) if seen.count(values) == 1 else values
    q = double()
    q.make = lambda rng: [([rng.random()],)]
    fresh = ex.Trial(q, 1)
    assert len({repr(args) for args in fresh.inputs}) == 3
    assert "with the same input it returns something else" in ex.judge(q, once, 1).text


def test_a_trial_is_shared_without_harm(folder):
    "The same verdicts, for the same inputs, whether each answer has a trial of its own or not."
    q = double()
    def spoils(values):
        values.append(1)
        return right(values)
    for seed in range(3):
        trial = ex.Trial(q, seed)
        for answer in (right, spoils, lambda values: [v * v for v in values], lambda values: 3,
                       lambda values: values.clear(), q.solve):
            assert ex.judge(q, answer, trial=trial) == ex.judge(q, answer, seed)


def test_each_master_is_tried_on_new_inputs(capsys):
    "All wrong answers of a question on the same ones, which no earlier run has seen."
    drawn = []
    for _ in range(3):
        q = double()
        q.wrong("squares")(lambda values: [v ** 2 for v in values])
        first = q.trial
        q.wrong("differs")(lambda values: [3 * v for v in values])
        assert q.trial is first
        drawn.append(repr(first.inputs))
    assert len(set(drawn)) == 3
    with pytest.raises(AssertionError, match="'differs' was found instead of 'squares'"):
        q.wrong("squares")(lambda values: [3 * v for v in values])


ENDLESS = {
    "loop": "while True: pass",
    "swallows": "while True:\n            try: values.index(-1)\n"
                "            except Exception: pass",
    "sleeps": "import time; time.sleep(600)",
    "iterates": "for _ in iter(int, 1): pass",
}


@pytest.mark.parametrize("endless", ENDLESS.values(), ids=ENDLESS)
def test_endless_loops_end(endless, folder):
    scope = {}
    exec(f"def forever(values):\n    if len(values) > 4:\n        {endless}\n"
         "    return [2 * v for v in values]", scope)
    q, began = double(), time.monotonic()
    q.seconds = 0.3
    says = "does not come to an end (stopped after 0.3 seconds) for twice(values=["
    assert says in ask(q, scope["forever"])
    assert time.monotonic() - began < 10
    assert ask(q, right).startswith("✓")  # nothing is left that disturbs


INTERRUPTED = """
import os, signal, threading
from sftlab.study import exercises as ex
def slow(values):
    while True: pass
q = ex.Question("trial.slow", "Slow", slow, example=lambda: ([1],), seconds=60)
q.inputs(lambda rng: [])
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try: q.grade(slow)
except KeyboardInterrupt: print("interrupted, threads left:", threading.active_count() - 1)
"""


def python(program, **kwargs):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=50, **kwargs)


@pytest.mark.slow
def test_an_interrupt_reaches_the_learner(folder):
    "Ctrl-C during a check ends the learner's code, too."
    done = python(INTERRUPTED)
    assert done.stdout == "interrupted, threads left: 0\n", done.stderr


@pytest.mark.parametrize("body, said", [
    ("return values[99]",
     "IndexError: list index out of range, in line 3 of your cell: return values[99]"),
    ("return helper(values)",
     "ZeroDivisionError: division by zero, in line 1 of your cell: def helper(v): return 1 / 0"),
    ("raise SystemExit('bye')", "SystemExit: bye"),
    ("return twice(values)", "RecursionError: maximum recursion depth exceeded"),
    ("return json.loads('{')",
     "JSONDecodeError: Expecting property name enclosed in double quotes")])
def test_a_learners_error_is_theirs(body, said, folder):
    source = f"def helper(v): return 1 / 0\ndef twice(values):\n    {body}"
    cell = "<ipython-input-7-abc>"
    linecache.cache[cell] = (len(source), None, source.splitlines(True), cell)
    scope = {"json": json}
    exec(compile(source, cell, "exec"), scope)
    text = ask(double(), scope["twice"])
    assert f"your code stopped with {said}" in text
    assert "sftlab" not in text and ".py" not in text
    if "line" in said:
        assert body.strip() in text or "helper" in text


@pytest.mark.parametrize("answer, said", [
    (3, "the check wants your function, and found an integer: write check(twice)"),
    ("twice", "found a string"),
    (lambda: 1, "must take (values), and cannot be called so"),
    (lambda a, b: a, "missing a required argument"),
    (lambda values: None, "your function returns nothing (None). Is a `return` missing?"),
    (lambda values: torch.tensor(right(values)),
     "the values are right, but the result is a tensor; a list is wanted"),
    (lambda values: 2, "the result is an integer; a list is wanted")])
def test_kind_words_for_other_slips(answer, said, folder):
    assert said in ask(double(), answer)


@pytest.mark.parametrize("form, said", [
    (lambda t: t.numpy(), "the result is a NumPy array; a tensor is wanted"),
    (lambda t: t.double(), "the result holds float64; float32 is wanted"),
    (lambda t: t[None], "the result has the shape (1, 2); (2,) is wanted"),
    (lambda t: t.tolist(), "the result is a list; a tensor is wanted")])
def test_right_values_in_another_form(form, said, folder):
    q = ex.Question("trial.half", "Half", lambda x: x / 2,
                    example=lambda: (torch.tensor([1.0, 2.0]),))
    q.inputs(lambda rng: [(torch.tensor([rng.uniform(0, 1), 3.0]),)])
    q.name = "half"
    says = "✗ Half · the values are right, but "
    assert ask(q, lambda x: form(x / 2)).startswith(says + said)
    assert not ask(q, lambda x: form(x / 3)).startswith(says)


def test_hints_come_one_by_one(capsys):
    q = double()
    for _ in range(3):
        q.hint()
    said = ["Hint 1 of 2: one", "Hint 2 of 2: two", "Hint 2 of 2: two"]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.slow
def test_in_a_notebook_nothing_of_ours_is_shown(tmp_path):
    "A wrong answer's error as Jupyter keeps it: one text, no frames; a stub gives no error."
    from nbclient import NotebookClient
    cells = ["from sftlab.study.checks.generation import q1",
             "def probabilities(logits, temperature): return logits.softmax(-1) / 0.5",
             "q1.check()", "q1.check(probabilities)"]
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120, allow_errors=True,
                            resources={"metadata": {"path": tmp_path}})
    done = client.execute()
    [stub], [error] = done.cells[2].outputs, done.cells[3].outputs
    assert stub.output_type == "stream" and stub.text.startswith("○")
    assert error.output_type == "error" and error.ename == "NotYet"
    assert error.traceback == [error.evalue] and error.evalue.startswith("✗ Temperature · ")


# --- comparing

def nested(inner):
    names = st.text(max_size=3)
    return st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(PLAIN, nested, max_leaves=12)


@given(VALUES)
def test_a_value_equals_its_copy(value):
    assert ex.difference(value, copy.deepcopy(value)) is None


@given(VALUES, VALUES)
def test_differences_are_seen_from_both_sides(a, b):
    assert bool(ex.difference(a, b)) == bool(ex.difference(b, a))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), st.integers(0, 5),
       st.floats(0.1, 1e3))
def test_one_changed_element_is_seen(values, place, by):
    other = values[:]
    other[place % len(values)] += by
    assert ex.difference(values, other)
    assert ex.difference(torch.tensor(values), torch.tensor(other))


# --- progress

def test_what_was_right_stays_right(folder):
    for state in ("tried", "right", "tried", "shown"):
        pr.record("a.b", state)
    for state in ("shown", "tried"):
        pr.record("a.c", state)
    for points in ("4 of 5 points", "3 of 5 points"):
        pr.record("a.d", points)
    assert pr.read_progress() == {"a.b": dict(state="right", tries=4),
                                  "a.c": dict(state="shown", tries=2),
                                  "a.d": dict(state="3 of 5 points", tries=2)}


def test_progress_is_kept_in_the_learners_folder(folder, monkeypatch):
    (folder / ".sftlab.json").write_text("{}")
    (folder / "exercises/deep").mkdir(parents=True)
    monkeypatch.chdir(folder / "exercises/deep")
    pr.record("a.b", "right")
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
    assert kept == {".sftlab.json", pr.PROGRESS}


def test_progress_survives_an_update_of_the_course(folder, tmp_path_factory):
    original, course = tmp_path_factory.mktemp("original") / "q.ipynb", folder / "course"
    original.write_text("1")
    copy_course({"exercises/q.ipynb": original}, course)
    pr.record("a.b", "right", course / "exercises")
    original.write_text("2")
    copy_course({"exercises/q.ipynb": original}, course)
    assert (course / "exercises/q.ipynb").read_text() == "2"
    assert pr.read_progress(course / "exercises") == {"a.b": dict(state="right", tries=1)}


BROKEN = ["", "{", "[]", '{"a": 1}', '{"a": {}}', "\0", '{"a": {"state": "right", "tries": "x"}}']


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_put_aside(content, folder, capsys):
    (folder / pr.PROGRESS).write_text(content)
    pr.record("a.b", "right")
    assert pr.read_progress() == {"a.b": dict(state="right", tries=1)}
    assert (folder / pr.PROGRESS).with_suffix(".broken").read_text() == content
    assert "could not be read" in capsys.readouterr().out


def no_space(*_): raise OSError(28, "No space left on device")


@pytest.mark.parametrize("content", ['{"a.b": {"state": "right", "tries": 1}}', "{"])
def test_a_write_that_fails_leaves_what_was_there(content, folder, monkeypatch, capsys):
    "Whole, or broken: the check goes on, and says so."
    (folder / pr.PROGRESS).write_text(content)
    monkeypatch.setattr(os, "replace", no_space)
    assert ask(double(), right).startswith("(Your progress could not be kept: ")
    pr.record("a.c", "right")
    assert "No space left on device" in capsys.readouterr().out
    assert (folder / pr.PROGRESS).read_text() == content
    assert [path.name for path in folder.iterdir()] == [pr.PROGRESS]


def test_a_folder_that_is_gone_is_told(folder, capsys):
    (folder / "file").write_text("not a folder")
    pr.record("a.b", "right", folder / "file")
    assert "could not be kept" in capsys.readouterr().out


MANY = """
from sftlab.study import progress
for n in range(100): progress.record(f"a.{n}", "right")
"""


@pytest.mark.slow
def test_threads_and_processes_may_write_at_the_same_time(folder, capsys):
    "Nobody ever finds half a file, and nothing is left over."
    def work(who):
        for n in range(50):
            pr.record(f"{who}.{n}", "right")
    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(3)]
    others = [subprocess.Popen([sys.executable, "-c", MANY], cwd=folder, stdout=subprocess.PIPE)
              for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or any(p.poll() is None for p in others):
        pr.read_progress()
    assert [p.communicate()[0] for p in others] == [b"", b""]
    assert capsys.readouterr().out == ""
    assert [path.name for path in folder.iterdir()] == [pr.PROGRESS]
    kept = pr.read_progress()
    assert kept and {entry["state"] for entry in kept.values()} == {"right"}


def test_progress_is_shown(folder):
    pr.record("generation.temperature", "right")
    pr.record("generation.pass_at_k", "tried")
    pr.record("data.jsonl", "shown")
    pr.record("data.too_good", "3 of 5 points")
    tasks = {task.key: task for tasks in pr.all_questions().values() for task in tasks}
    text = repr(pr.Progress())
    assert text.splitlines()[0] == f"2 of {len(tasks)} questions done"
    for key, before, after in [
            ("generation.temperature", "✓", ""), ("generation.pass_at_k", "…", ": not right yet"),
            ("data.jsonl", "…", ": solution looked at"),
            ("data.too_good", "✓", ": 3 of 5 points"), ("data.from_log", "○", "")]:
        assert f"\n  {before} {tasks[key].title} ({ex.effort(tasks[key])}){after}\n" in text
    assert "color:inherit" in pr.Progress()._repr_html_()


LIGHT = """
import sys
from sftlab.study.progress import Progress
print("sftlab.study.exercises" in sys.modules)
repr(Progress())
print("torch" in sys.modules, "nbformat" in sys.modules)
"""


@pytest.mark.slow
def test_importing_the_checks_loads_nothing_heavy():
    done = python(LIGHT)
    assert done.stdout == "False\nFalse False\n", done.stderr


# --- nbgrader

@pytest.fixture(scope="module")
def course(tmp_path_factory):
    "A course for nbgrader, and a function that has it generate an assignment."
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import PyFileConfigLoader
    folder = tmp_path_factory.mktemp("nbgrader")
    ma.make_nbgrader(ROOT / "exercises/solutions", folder)
    config = PyFileConfigLoader("nbgrader_config.py", str(folder)).load_config()
    config.CourseDirectory.root = str(folder)
    with pytest.MonkeyPatch.context() as patch:
        programs = Path(sys.executable).parent  # nbgrader calls a program of its own, alembic
        patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        yield folder, NbGraderAPI(config=config).generate_assignment


def graded_cells(path):
    "What nbgrader knows of each cell, and its source."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    found = [(c["metadata"].get("nbgrader"), "".join(c["source"])) for c in cells]
    return {about["grade_id"]: (about, source) for about, source in found if about}


def thorough_but(every):
    "Notebooks: one of so many in each run, all of them with `--all`."
    return [pytest.param(name, marks=[pytest.mark.thorough] if i % every else [])
            for i, name in enumerate(NAMES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(5))
def test_nbgrader_makes_an_assignment(name, course):
    "Points are right, checks are locked, and answers may be edited and hold no solution."
    (folder, generate), stem = course, Path(name).stem
    done = generate(stem)
    assert done["success"], done
    source, released = folder / "source" / stem / name, folder / "release" / stem / name
    assert "BEGIN SOLUTION" in source.read_text() and "SOLUTION" not in released.read_text()
    cells, written = graded_cells(released), graded_cells(source)
    assert set(cells) == set(written)
    expected = {}
    for q in QUESTIONS[name].values():
        key = q.key.replace(".", "-")
        about, answer = cells[key]
        assert about["solution"] and not about["locked"]
        if isinstance(q, ex.OpenQuestion):
            assert about["grade"] and q.model not in answer
            expected[key] = len(q.rubric)
        else:
            check, code = cells[f"{key}-test"]
            assert check["locked"] and check["grade"] and not check["solution"]
            assert code.endswith(f".grade({q.name})") and not about["grade"]
            assert answer == ma.stub(written[key][1]) != written[key][1]
            expected[f"{key}-test"] = q.stars
    points = {grade_id: about["points"] for grade_id, (about, _) in cells.items() if about["grade"]}
    assert points == expected


def thorough_but_one():
    "Every notebook; only the quickest to run, one without PyTorch if there is any, in each run."
    names = sorted(NAMES, key=lambda name: "torch" in LEARNERS[name].read_text("utf-8"))
    return [names[0], *(pytest.param(n, marks=pytest.mark.thorough) for n in names[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but_one())
def test_nbgrader_grades_a_blank_copy_0_and_the_solution_full(name, tmp_path, monkeypatch):
    "As a teacher does it: with nbgrader's program, from the source to the grades."
    from nbgrader.api import Gradebook
    stem, programs = Path(name).stem, Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    ma.make_nbgrader(ROOT / "exercises/solutions", tmp_path)

    def nbgrader(*words):
        done = subprocess.run([sys.executable, "-m", "nbgrader", *words], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    nbgrader("generate_assignment", stem)
    answers = graded_cells(tmp_path / "source" / stem / name)
    blank = json.loads((tmp_path / "release" / stem / name).read_text())
    perfect = copy.deepcopy(blank)
    for cell in perfect["cells"]:
        about = cell["metadata"].get("nbgrader", {})
        if about.get("solution"):
            cell["source"] = answers[about["grade_id"]][1]
    for who, notebook in dict(blank=blank, perfect=perfect).items():
        path = tmp_path / "submitted" / who / stem / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(notebook))
    nbgrader("autograde", stem)
    grades = {}
    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as book:
        for who in ("blank", "perfect"):
            found = book.find_submission_notebook(stem, stem, who).grades
            grades[who] = {g.name: (g.auto_score, g.max_score, g.needs_manual_grade)
                           for g in found}
    coded = {f"{q.key.replace('.', '-')}-test": q.stars for q in functions(name)}
    for check, stars in coded.items():
        assert grades["blank"][check][:2] == (0, stars) and stars > 0
        assert grades["perfect"][check][:2] == (stars, stars)
    [by_hand] = set(grades["perfect"]) - set(coded)
    assert grades["perfect"][by_hand][1:] == (5, True)  # read by a person


@pytest.mark.parametrize("want, got, found", [
    ([20.0, 0.0146], [20.0, 0.014602], None),  # what is left of large terms is off as they are
    ([1.0, 0.0146], [1.0, 0.014602], "differs"),
    ([20.0, 0.0146], [20.0, 0.0147], "differs"),
    ([0.0, float("inf")], [1e-5, float("inf")], "differs"),
])
def test_tensors_may_be_off_by_rounding_and_no_more(want, got, found):
    answer = ex.difference(torch.tensor(want), torch.tensor(got))
    assert answer == found or answer[0] == found


# --- what must be accepted, and what must not

def asked(solve, *inputs, **more):
    "A question of our own about a function, tried on these arguments."
    q = ex.Question(f"trial.{solve.__name__}", "Trial", solve, example=lambda: inputs[0], **more)
    q.inputs(lambda rng: list(inputs))
    return q


def found(q, answer):
    return ex.judge(q, answer).name


def positive(x):
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x


class Strange(ValueError):
    "An error of somebody's own."


@pytest.mark.parametrize("error, name", [
    (ValueError, "right"), (Strange, "right"), (errors.DataError, "right"),
    (TypeError, "differs"), (NotImplementedError, "differs")])
def test_an_error_of_a_subclass_is_the_same_error(error, name):
    def answer(x):
        if x < 0:
            raise error("no")
        return x
    assert found(asked(positive, (1,), (-1,)), answer) == name


@pytest.mark.parametrize("says, name", [
    ("-1 is less than 0", "right"), ("a bad number", "names no culprit")])
def test_a_message_must_name_the_culprit_where_a_question_says_so(says, name):
    def answer(x):
        if x < 0:
            raise ValueError(says)
        return x
    q = asked(positive, (1,), (-1,))
    q.named(lambda x: x)
    assert found(q, answer) == name


FORMS = {
    "counter": (lambda: {"a": 2, "b": 1}, lambda: Counter("aab")),
    "defaultdict": (lambda: {"a": 2}, lambda: defaultdict(int, a=2)),
    "numpy integer": (lambda: 3, lambda: np.int64(3)),
    "numpy float": (lambda: 0.5, lambda: np.float32(0.5)),
    "numpy truth": (lambda: True, lambda: np.bool_(True)),
    "float64 of one element": (lambda: 0.5, lambda: torch.tensor([0.5], dtype=torch.float64)),
    "numpy in a list": (lambda: [1, 2], lambda: [np.int32(1), np.int32(2)]),
    "a tuple": (lambda: [1, 2], lambda: (1, 2)),
    "a string's subclass": (lambda: "a", lambda: type("S", (str,), {})("a"))}


@pytest.mark.parametrize("want, got", FORMS.values(), ids=FORMS)
def test_forms_that_only_a_tester_would_notice_are_accepted(want, got):
    assert found(asked(want, ()), got) == "right"


OTHERS = {
    "a truth for a number": (lambda: 1, lambda: True),
    "a number for a truth": (lambda: True, lambda: 1),
    "two elements": (lambda: 0.5, lambda: torch.tensor([0.5, 0.5])),
    "a list for a dict": (lambda: {"a": 1}, lambda: ["a"]),
    "a tensor for a dict": (lambda: {"a": 1}, lambda: torch.tensor([1])),
    "a text for a dict": (lambda: {0: "a"}, lambda: ""),
    "an integer off by one": (lambda: 10**9, lambda: 10**9 + 1),
    "tiny, and double": (lambda: 1e-8, lambda: 2e-8),
    "tiny floats in a list": (lambda: [1e-8, 3e-8], lambda: [1e-8, 2e-8]),
    "tiny floats in a tensor": (lambda: torch.tensor([1e-8]), lambda: torch.tensor([2e-8])),
    "small in a tuple": (lambda: (1e6, 0.5), lambda: (1e6, 0.6))}


@pytest.mark.parametrize("want, got", OTHERS.values(), ids=OTHERS)
def test_values_that_differ_are_not(want, got):
    assert found(asked(want, ()), got) != "right"


def test_a_leftover_raise_is_told():
    def finished(values):
        "Each value twice."
        result = [2 * v for v in values]
        raise NotImplementedError
        return result
    def begun(values):
        "Each value twice."
        raise NotImplementedError("write it")
    q = double()
    assert (found(q, finished), found(q, begun)) == ("leftover raise", "not attempted")


def test_input_is_told_and_exits_are_survived(folder):
    ends, asks = os._exit, input
    def by_hand(values): return input("what is twice " + str(values))
    def away(values): os._exit(3)
    assert found(double(), by_hand) == "asks with input()"
    assert "your code stopped with SystemExit: 3" in ask(double(), away)
    assert (os._exit, input) == (ends, asks)


def test_a_warning_is_shown_once(capsys):
    def warns(values):
        print("/tmp/ipykernel_12/345.py:2: careful", file=sys.stderr)
        return right(values)
    assert found(double(), warns) == "right"
    assert capsys.readouterr().err == "your cell:2: careful\n"


def test_what_is_right_is_worked_out_before_the_answer_runs(monkeypatch):
    monkeypatch.setattr(math, "factor", 2, raising=False)
    def scaled(x): return x * math.factor
    def tampers(x):
        math.factor = 3
        return x * 3
    q = asked(scaled, (1.0,), (5.0,))
    assert found(q, tampers) == "differs"


def test_a_mistake_is_not_named_where_the_answer_gets_its_inputs_right():
    q = double()
    q.mistakes["squares"] = (lambda values: [v * v for v in values], "that is the square.")
    def one_by_one(values): return right(values) if len(values) < 5 else [v * v for v in values]
    assert found(q, one_by_one) == "differs"


def squared(w): return (w ** 2).sum()


@pytest.mark.parametrize("answer, name", [
    (lambda w: w @ w, "right"),
    (lambda w: (w ** 2).sum().item(), "stopped with an error"),
    (lambda w: (w.detach() ** 2).sum(), "stopped with an error"),
    (lambda w: (w.detach() * w).sum(), "differs")])
def test_a_question_may_look_at_the_gradient(answer, name):
    q = asked(squared, (torch.tensor([1.0, 2.0]),), (torch.tensor([3.0, 0.5]),))

    @q.called
    def _(function, w):
        w = w.clone().requires_grad_()
        loss = function(w)
        loss.backward()
        return dict(loss=loss.item(), gradient=w.grad)

    assert found(q, answer) == name


@pytest.mark.parametrize("n, said", [(1, "1 element;"), (2, "2 elements;")])
def test_one_element_is_one(n, said):
    assert said in ex.difference([1, 2, 3], [1] * n)[1]


def test_an_index_error_is_an_index_error():
    assert "an IndexError" in ex._returned(ex.Outcome(error=IndexError()))
    assert "a ValueError" in ex._returned(ex.Outcome(error=ValueError()))
