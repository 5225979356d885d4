"The exercises: every checker against wrong answers, the notebooks that learners get, their progress, and nbgrader."
import contextlib, copy, inspect, io, itertools, json, linecache, math, os, random, re, subprocess, sys, time, zlib
from importlib import import_module
from pathlib import Path
import nbformat, pytest, torch
from hypothesis import given
from hypothesis import strategies as st
from sftlab import cli
from sftlab.study import exercises as ex
from test_notebooks import run

ROOT = Path(__file__).resolve().parent.parent
MASTERS = sorted(ROOT.glob("exercises/solutions/*.ipynb"))
NAMES = [path.name for path in MASTERS]
LEARNERS = [ROOT / "exercises" / name for name in NAMES]

def sources(path, kind="code"):
    return ["".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]

def questions_with_wrong_answers(master):
    "The questions of a master with all their wrong answers, which are entered, and not tried at once as in the notebook."
    scope, kept = {"__name__": master.stem}, ex.Question.wrong
    def enter(question, name):
        def wrong(function):
            question.answers.append((name, function))
            return question.solve
        return wrong
    ex.Question.wrong = enter
    try:
        for i, source in enumerate(sources(master)):
            if source.startswith("#| default_exp") or "load(" in source:
                continue # nothing to ask there; the model
            name = f"<{master.stem} cell {i}>"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            exec(compile(source, name, "exec"), scope)
    finally:
        ex.Question.wrong = kept
    return {name: q for name, q in scope.items() if isinstance(q, ex.Question)}

ASKED = {(master.stem, name): q for master in MASTERS for name, q in questions_with_wrong_answers(master).items()}
IDS = [q.key for q in ASKED.values()]
each_question = pytest.mark.parametrize("q", ASKED.values(), ids=IDS)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A learner's folder, in which we are."
    monkeypatch.chdir(tmp_path)
    return tmp_path

# every checker

@each_question
def test_wrong_answers_are_rejected_by_name(q, record_property):
    rows = [row for seed in (0, 1, 2) for row in ex.kills(q, seed)]
    named = [row for row in rows if row[1] not in (None, "right", "not attempted")]
    record_property("kills", f"{q.key:28} {sum(row not in ex.survivors(rows) for row in named) // 3:3} / {len(named) // 3}")
    assert ex.survivors(rows) == []
    assert len(q.answers) >= 3

@each_question
def test_every_mistake_that_a_check_names_is_tried(q):
    tried = [name for name, _ in q.answers]
    assert [name for name in q.mistakes if name not in tried] == [] and len(q.hints) >= 2

def test_a_lesson_has_enough_wrong_answers():
    for master, asked in itertools.groupby(ASKED.items(), key=lambda pair: pair[0][0]):
        assert sum(len(q.answers) for _, q in asked) >= 16, master

@each_question
def test_a_check_that_looks_at_the_example_alone_is_found_out(q, monkeypatch):
    "The control: with fewer inputs, answers come through that know nothing."
    monkeypatch.setattr(q, "make", lambda rng: [])
    assert ("the example alone", None, "right") in ex.survivors(ex.kills(q))

@each_question
def test_without_its_mistakes_a_check_names_none(q, monkeypatch):
    "The control: names come from the mistakes, so without them the wrong answers are survivors."
    known = set(q.mistakes)
    monkeypatch.setattr(q, "mistakes", {})
    assert {name for name, want, _ in ex.survivors(ex.kills(q, 0)) if want} == {name for name, _ in q.answers if name in known}

@each_question
def test_the_solution_is_right_on_many_inputs(q):
    for seed in range(20):
        assert ex.judge(q, q.solve, seed).name == "right"

@each_question
def test_inputs_are_fixed_by_the_seed_and_new_without(q):
    text = lambda seed: repr(q.make(random.Random(seed)))
    assert text(0) == text(0) and len({text(seed) for seed in range(5)}) == 5

@each_question
def test_the_solution_is_shown_without_marks(q, folder, capsys):
    q.solution()
    shown = capsys.readouterr().out
    scope = dict(torch=torch, math=math, json=json, zlib=zlib)
    exec(shown, scope) # it stands alone, but for the imports that the learner's notebook has
    assert ex.judge(q, scope[q.name], 0).name == "right" and "SOLUTION" not in shown
    assert ex.read_progress() == {q.key: dict(state="shown", tries=1)}

def test_keys_are_unique_and_stay():
    "A key that changes loses what learners have done: this list only grows."
    keys = [task.key for tasks in ex.all_questions().values() for task in tasks]
    assert len(set(keys)) == len(keys)
    assert {"generation.temperature", "generation.top_p", "generation.stop_sequences", "generation.pad_left", "generation.answer_loss", "generation.is_it_better",
            "data.sharegpt", "data.jsonl", "data.jaccard", "data.split_by_key", "data.to_alpaca", "data.too_good",
            "templates.chat_prompt", "templates.join_parts", "templates.fold_system", "templates.cut_special", "templates.read_chatml", "templates.fine_in_training",
            "masking.row_labels", "masking.batch_labels", "masking.fit", "masking.masked_loss", "masking.shares", "masking.better_loss",
            "training.rows_seen", "training.perplexity", "training.clip", "training.schedule", "training.adamw", "training.which_batch",
            "memory.held", "memory.parameters", "memory.first_too_large", "memory.checkpointing", "memory.chunked_loss", "memory.sixteen_of_24",
            "lora.trainable", "lora.fresh", "lora.merged", "lora.step", "lora.as_one", "lora.learned_nothing",
            "quantization.pack", "quantization.weighed", "quantization.blocks", "quantization.restored", "quantization.normal_float", "quantization.worse_after_merge"} <= set(keys)

# the notebooks

@pytest.mark.parametrize("name", NAMES)
def test_learners_notebooks_are_in_step_with_their_masters(name):
    made = ex.notebook_text(ex.notebook_from(ROOT / "exercises/solutions" / name))
    assert (ROOT / "exercises" / name).read_text("utf-8") == made, "run make exercises"
    nbformat.validate(nbformat.reads(made, 4))
    assert len({cell["id"] for cell in json.loads(made)["cells"]}) == len(json.loads(made)["cells"])

def test_a_changed_master_would_be_noticed(tmp_path):
    "The control: one changed letter of a task makes another notebook."
    text = MASTERS[0].read_text("utf-8")
    (tmp_path / NAMES[0]).write_text(text.replace("Logits become", "Logits  become", 1), "utf-8")
    assert ex.notebook_text(ex.notebook_from(tmp_path / NAMES[0])) != LEARNERS[0].read_text("utf-8")

def test_every_learners_notebook_has_a_master():
    assert sorted(path.name for path in ROOT.glob("exercises/*.ipynb")) == NAMES

def telling(line):
    return len(re.findall(r"\w", line)) > 12 and not line.strip().startswith(("import", "#", "return messages"))

@pytest.mark.parametrize("name", NAMES)
def test_learners_notebooks_hold_no_solution(name):
    "No line of a solution, a mistake or a wrong answer, and no rubric."
    text = (ROOT / "exercises" / name).read_text("utf-8")
    learner = {line.strip() for kind in ("code", "markdown") for source in sources(ROOT / "exercises" / name, kind) for line in source.splitlines()}
    secret = {line.strip() for q in ASKED.values() for line in ex.without_marks(inspect.getsource(q.solve)).splitlines()[2:] if telling(line)}
    secret |= {line.strip() for source in sources(ROOT / "exercises/solutions" / name) if ".wrong(" in source or ".mistake(" in source for line in source.splitlines() if telling(line) and not line.startswith("def ")}
    assert len(secret) > 50 and not secret & learner
    assert not any(point in text for tasks in ex.all_questions().values() for task in tasks if isinstance(task, ex.OpenQuestion) for point in [*task.rubric, task.model])
    assert "SOLUTION" not in text and not any(cell.get("outputs") for cell in json.loads(text)["cells"])

@pytest.mark.parametrize("name", NAMES)
def test_headings_name_the_questions(name):
    questions = ex.questions_of(import_module("sftlab.study.checks." + name.split("_", 1)[1].removesuffix(".ipynb")))
    headings = [source.splitlines()[0] for source in sources(ROOT / "exercises/solutions" / name, "markdown") if source.startswith("## q")]
    assert headings == [f"## {q}: {task.title}" for q, task in questions.items()]

@pytest.mark.parametrize("name", NAMES)
def test_stubs_are_not_attempted(name, folder, capsys):
    for source in sources(ROOT / "exercises" / name):
        if "NotImplementedError\n" not in source + "\n" or not source.startswith("def "):
            continue
        scope = {}
        exec(source, scope)
        q = next(q for q in ASKED.values() if q.name in scope)
        q.check(scope[q.name])
        assert capsys.readouterr().out.startswith(f"○ {q.title} · not attempted yet")
        with pytest.raises(ex.NotYet, match="not attempted"):
            q.grade(scope[q.name])
    assert not (folder / ex.PROGRESS).exists()

def solved(path):
    "A learner's notebook with all the answers in it."
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        q = next((q for q in ASKED.values() if source.startswith(f"def {q.name}(")), None)
        if q:
            cell["source"] = ex.without_marks(inspect.getsource(q.solve))
        if source.endswith(".mark()"):
            cell["source"] = source.replace("()", "(3)")
    return notebook

@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_untouched_and_solved(name, tmp_path):
    for state, notebook in [("untouched", json.loads((ROOT / "exercises" / name).read_text("utf-8"))), ("solved", solved(ROOT / "exercises" / name))]:
        path = tmp_path / state / name
        path.parent.mkdir()
        path.write_text(json.dumps(notebook), "utf-8")
        run(path, tmp_path / "refused", limit=180)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "untouched" / ex.PROGRESS).exists()
    kept = json.loads((tmp_path / "solved" / ex.PROGRESS).read_text())
    assert {entry["state"] for entry in kept.values()} == {"right", "3 of 5 points"}
    assert set(kept) == {task.key for tasks in ex.all_questions().values() for task in tasks if task.key.startswith(name.split("_", 1)[1].removesuffix(".ipynb") + ".")}

@pytest.mark.parametrize("name", NAMES)
def test_masters_run(name, tmp_path):
    "Each wrong answer is tried there as the author sees it."
    path = tmp_path / name
    path.write_bytes((ROOT / "exercises/solutions" / name).read_bytes())
    run(path, tmp_path / "refused", limit=180)
    assert not (tmp_path / "refused").exists()

# what a learner sees

def ask(q, function, folder):
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
    q.inputs(lambda rng: [([],), ([rng.randrange(9)],), ([rng.randrange(99) for _ in range(5)],), ([7.5],)])
    q.mistake("squares", "that is the square.")(lambda values: [v * v for v in values])
    return q

def test_one_line_for_what_is_known(folder):
    q = double()
    def stub(values): raise NotImplementedError
    said = {"right": ask(q, lambda values: [v + v for v in values], folder), "stub": ask(q, stub, folder), "nothing": ask(q, None, folder), "squares": ask(q, lambda values: [v ** 2 for v in values], folder)}
    assert all(len(text.splitlines()) == 1 for text in said.values())
    assert said["right"] == "✓ Twice · right, on 9 inputs, 8 of which you had not seen."
    assert said["stub"] == said["nothing"] == "○ Twice · not attempted yet: write twice(values)."
    assert said["squares"] == "✗ Twice · that is the square."

def test_the_smallest_difference_is_shown(folder):
    text = ask(double(), lambda values: [3 * v for v in values], folder)
    assert "smallest input" in text and re.search(r"for      twice\(values=\[\d(\.5)?\]\)\n  expected \[[\d.]+\]\n  yours    \[[\d.]+\]$", text)

def test_two_mistakes_at_once_are_both_named():
    q = double()
    q.mistake("empty", "an empty list is a list, too.")(lambda values: [2 * v for v in values] if values else None)
    verdict = ex.judge(q, lambda values: [v * v for v in values] if values else None)
    assert (verdict.name, verdict.text) == ("squares", "that is the square. And: an empty list is a list, too.")

def test_printing_is_left_out_and_said(folder):
    def chatty(values):
        print("hello\nworld")
        return [2 * v for v in values]
    assert ask(double(), chatty, folder).endswith("(What it prints is left out here: 22 lines.)") and "hello" not in ask(double(), chatty, folder)

def test_changing_the_input_is_told(folder):
    def grow(values):
        result = [2 * v for v in values]
        values.clear()
        return result
    assert "the results are right, but your function changes what it is given" in ask(double(), grow, folder)

@pytest.mark.parametrize("endless", ["while True: pass", "while True:\n            try: values.index(-1)\n            except Exception: pass", "import time; time.sleep(600)", "for _ in iter(int, 1): pass"])
def test_endless_loops_end(endless, folder):
    scope = {}
    exec(f"def forever(values):\n    if len(values) > 4:\n        {endless}\n    return [2 * v for v in values]", scope)
    q, began = double(), time.monotonic()
    q.seconds = 0.3
    assert "does not come to an end (stopped after 0.3 seconds) for twice(values=[" in ask(q, scope["forever"], folder)
    assert time.monotonic() - began < 10
    assert ask(q, lambda values: [2 * v for v in values], folder).startswith("✓") # nothing is left that disturbs

def test_an_interrupt_reaches_the_learner(folder):
    "Ctrl-C during a check ends the learner's code, too."
    program = """
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout == "interrupted, threads left: 0\n", done.stderr

@pytest.mark.parametrize("body, said", [("return values[99]", "IndexError: list index out of range, in line 3 of your cell: return values[99]"), ("return helper(values)", "ZeroDivisionError: division by zero, in line 1 of your cell: def helper(v): return 1 / 0"),
                                        ("raise SystemExit('bye')", "SystemExit: bye"), ("return twice(values)", "RecursionError: maximum recursion depth exceeded"), ("return json.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes")])
def test_a_learners_error_is_theirs(body, said, folder):
    source = f"def helper(v): return 1 / 0\ndef twice(values):\n    {body}"
    linecache.cache["<ipython-input-7-abc>"] = (len(source), None, source.splitlines(True), "<ipython-input-7-abc>")
    scope = {"json": json}
    exec(compile(source, "<ipython-input-7-abc>", "exec"), scope)
    text = ask(double(), scope["twice"], folder)
    assert f"your code stopped with {said}" in text and "sftlab" not in text and ".py" not in text
    if "line" in said:
        assert body.strip() in text or "helper" in text

@pytest.mark.parametrize("answer, said", [(3, "the check wants your function, and found a whole number: write check(twice)"), ("twice", "found a text"), (lambda: 1, "must take (values), and cannot be called so"), (lambda a, b: a, "missing a required argument"),
                                          (lambda values: None, "your function returns nothing (None). Is a `return` missing?"), (lambda values: torch.tensor([2 * v for v in values]), "the values are right, but the result is a tensor where a list is wanted"),
                                          (lambda values: 2, "the result is a whole number where a list is wanted")])
def test_kind_words_for_other_slips(answer, said, folder):
    assert said in ask(double(), answer, folder)

@pytest.mark.parametrize("form, said", [(lambda t: t.numpy(), "the values are right, but the result is a NumPy array where a tensor is wanted"), (lambda t: t.double(), "the values are right, but the result holds float64 where float32 is wanted"),
                                        (lambda t: t[None], "the values are right, but the result has the shape (1, 2) where (2,) is wanted"), (lambda t: t.tolist(), "the values are right, but the result is a list where a tensor is wanted")])
def test_right_values_in_another_form(form, said, folder):
    q = ex.Question("trial.half", "Half", lambda x: x / 2, example=lambda: (torch.tensor([1.0, 2.0]),))
    q.inputs(lambda rng: [(torch.tensor([rng.uniform(0, 1), 3.0]),)])
    q.name = "half"
    assert ask(q, lambda x: form(x / 2), folder).startswith(f"✗ Half · {said}")
    assert not ask(q, lambda x: form(x / 3), folder).startswith("✗ Half · the values are right")

def test_hints_come_one_by_one(capsys):
    q = double()
    for _ in range(3):
        q.hint()
    assert capsys.readouterr().out.splitlines() == ["Hint 1 of 2: one", "Hint 2 of 2: two", "Hint 2 of 2: two"]

def test_in_a_notebook_nothing_of_ours_is_shown(tmp_path):
    "The error output of a wrong answer, as Jupyter keeps it: one piece of text, no frames; a stub gives no error."
    path = tmp_path / "x.ipynb"
    cells = ["from sftlab.study.checks.generation import q1", "def probabilities(logits, temperature): return logits.softmax(-1) / 0.5", "q1.check()", "q1.check(probabilities)"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells]), path)
    from nbclient import NotebookClient
    done = NotebookClient(nbformat.read(path, 4), timeout=120, allow_errors=True, resources={"metadata": {"path": tmp_path}}).execute()
    [stub], [error] = done.cells[2].outputs, done.cells[3].outputs
    assert stub.output_type == "stream" and stub.text.startswith("○")
    assert error.output_type == "error" and error.ename == "NotYet" and error.traceback == [error.evalue] and error.evalue.startswith("✗ Temperature · ")

# comparing

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4), max_leaves=12)

@given(VALUES)
def test_a_value_equals_its_copy(value): assert ex.difference(value, copy.deepcopy(value)) is None

@given(VALUES, VALUES)
def test_differences_are_seen_from_both_sides(a, b):
    assert bool(ex.difference(a, b)) == bool(ex.difference(b, a))

@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6), st.integers(0, 5), st.floats(0.1, 1e3))
def test_one_changed_element_is_seen(values, place, by):
    other = values[:]
    other[place % len(values)] += by
    assert ex.difference(values, other) and ex.difference(torch.tensor(values), torch.tensor(other))

# progress

def test_what_was_right_stays_right(folder):
    for state in ("tried", "right", "tried", "shown"):
        ex.record("a.b", state)
    ex.record("a.c", "shown")
    ex.record("a.c", "tried")
    assert ex.read_progress() == {"a.b": dict(state="right", tries=4), "a.c": dict(state="shown", tries=2)}

def test_progress_is_kept_in_the_learners_folder(folder, monkeypatch):
    (folder / ".sftlab.json").write_text("{}")
    (folder / "exercises/deep").mkdir(parents=True)
    monkeypatch.chdir(folder / "exercises/deep")
    ex.record("a.b", "right")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")} == {".sftlab.json", ex.PROGRESS}

def test_progress_survives_an_update_of_the_course(folder, tmp_path_factory):
    original, course = tmp_path_factory.mktemp("original") / "q.ipynb", folder / "course"
    original.write_text("1")
    cli._copy({"exercises/q.ipynb": original}, course)
    ex.record("a.b", "right", course / "exercises")
    original.write_text("2")
    cli._copy({"exercises/q.ipynb": original}, course)
    assert (course / "exercises/q.ipynb").read_text() == "2" and ex.read_progress(course / "exercises") == {"a.b": dict(state="right", tries=1)}

@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {}}', "\0", '{"a": {"state": "right", "tries": "x"}}'])
def test_a_broken_file_is_put_aside(content, folder, capsys):
    (folder / ex.PROGRESS).write_text(content)
    ex.record("a.b", "right")
    assert ex.read_progress() == {"a.b": dict(state="right", tries=1)} and (folder / ex.PROGRESS).with_suffix(".broken").read_text() == content
    assert "could not be read" in capsys.readouterr().out

def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch, capsys):
    ex.record("a.b", "right")
    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(ex.os, "replace", fail)
    ex.record("a.c", "right")
    assert "could not be kept" in capsys.readouterr().out
    assert json.loads((folder / ex.PROGRESS).read_text()) == {"a.b": dict(state="right", tries=1)}

def test_progress_is_shown(folder):
    first = next(iter(ASKED.values()))
    ex.record(first.key, "right")
    ex.record("generation.top_p", "tried")
    ex.record("data.jsonl", "shown")
    ex.record("data.too_good", "3 of 5 points")
    text, total = repr(ex.Progress()), sum(map(len, ex.all_questions().values()))
    assert text.splitlines()[0] == f"2 of {total} questions done"
    for line in ("✓ Temperature", "… Top-p for a batch (★★☆, about 15 minutes): not right yet", "… Every line accounted for (★★☆, about 12 minutes): solution looked at", "✓ Too good (★★☆, about 10 minutes): 3 of 5 points", "○ Nearly the same"):
        assert line in text
    assert "color:inherit" in ex.Progress()._repr_html_()

def test_importing_the_checks_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", "import sys; from sftlab.study.exercises import Progress; repr(Progress()); print('torch' in sys.modules, 'nbformat' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr

# nbgrader

@pytest.mark.parametrize("name", NAMES)
def test_nbgrader_grades_a_blank_copy_0_and_the_solution_full(name, tmp_path, monkeypatch):
    stem = name.removesuffix(".ipynb")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") # nbgrader calls a program of its own, alembic
    [source] = [path for path in ex.make_nbgrader(ROOT / "exercises/solutions", tmp_path) if path.name == name]
    nbgrader = lambda *words: subprocess.run([sys.executable, "-m", "nbgrader", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    done = nbgrader("generate_assignment", stem)
    released = tmp_path / "release" / stem / name
    assert done.returncode == 0 and released.exists(), done.stderr
    assert "BEGIN SOLUTION" in source.read_text() and "SOLUTION" not in released.read_text()
    answers = {cell["metadata"]["nbgrader"]["grade_id"]: cell["source"] for cell in json.loads(source.read_text())["cells"] if cell["metadata"].get("nbgrader", {}).get("solution")}
    notebook = json.loads(released.read_text())
    for who in ("blank", "perfect"):
        if who == "perfect":
            for cell in notebook["cells"]:
                cell["source"] = answers.get(cell["metadata"].get("nbgrader", {}).get("grade_id"), cell["source"])
        path = tmp_path / "submitted" / who / stem / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(notebook))
    done = nbgrader("autograde", stem)
    assert done.returncode == 0, done.stderr
    from nbgrader.api import Gradebook
    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as book:
        grades = {who: {grade.name: (grade.auto_score, grade.max_score, grade.needs_manual_grade) for grade in book.find_submission_notebook(stem, stem, who).grades} for who in ("blank", "perfect")}
    checks = [grade for grade in grades["perfect"] if grade.endswith("-test")]
    coded = [q for (master, _), q in ASKED.items() if master == stem]
    assert len(checks) == len(coded) and sum(grades["perfect"][g][1] for g in checks) == sum(q.stars for q in coded)
    assert all(grades["blank"][g][0] == 0 and grades["perfect"][g][0] == grades["perfect"][g][1] > 0 for g in checks)
    [by_hand] = set(grades["perfect"]) - set(checks)
    assert grades["perfect"][by_hand][2] and grades["perfect"][by_hand][1] == 5 # read by a person
