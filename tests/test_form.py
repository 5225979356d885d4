"""The form of what people read: no lesson too long, one of each thing, errors of one family.

`ruff` holds the lines (`make lint`). Here are the sizes of lessons, and what no linter knows.
"""
import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftlab import errors

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(ROOT.glob("nbs/[0-9][0-9]_*.ipynb"))
LIMITS = dict(cells=40, appendix=20, exported=250, words=2_500, function=15)


def module_of(lesson):
    "The exported module of a lesson, as a path."
    found = re.search(r"#\| default_exp (\S+?)[\\\"]", lesson.read_text("utf-8"))[1]
    return ROOT / "sftlab" / (found.replace(".", "/") + ".py")


def cells_of(notebook):
    "All but badge and installation on Colab: tools/colab.py writes them, and they teach nothing."
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [c for c in cells if not c.get("id", "").startswith("colab-")]


def sources(notebook, kind):
    cells = cells_of(notebook)
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def is_exported(source):
    return re.match(r"#\| ?exporti?\b", source) is not None


def code_lines(source):
    "Lines with code: no blank ones, none that are only a comment."
    return [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]


def longest_function(notebook):
    "Lines of the longest exported function, signature and docstring not counted: its body."
    longest = 0
    for source in filter(is_exported, sources(notebook, "code")):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body:
                    longest = max(longest, body[-1].end_lineno - body[0].lineno + 1)
    return longest


def sizes(notebook):
    "How large a lesson is."
    code, prose = sources(notebook, "code"), sources(notebook, "markdown")
    exported = sum(len(code_lines(s)) for s in code if is_exported(s))
    words = sum(len(s.split()) for s in prose)
    main, rest = main_and_appendix(notebook)
    return dict(cells=main, appendix=rest, exported=exported, words=words,
                function=longest_function(notebook))


def main_and_appendix(notebook):
    "How many cells come before a heading `## Appendix`, and how many from there on."
    cells = cells_of(notebook)
    begins = [i for i, c in enumerate(cells) if c["cell_type"] == "markdown"
              and re.search(r"(?m)^#+ Appendix", "".join(c["source"]))]
    main = min(begins, default=len(cells))
    return main, len(cells) - main


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_not_too_long(lesson):
    over = {name: n for name, n in sizes(lesson).items() if n > LIMITS[name]}
    assert over == {}, f"{lesson.stem} is over its limits {LIMITS}"


def notebook_with(folder, *cells):
    path = folder / "01_x.ipynb"
    made = [dict(cell_type=kind, source=source) for kind, source in cells]
    path.write_text(json.dumps(dict(cells=made)))
    return path


def test_sizes_are_counted_right(tmp_path):
    body = "".join(f"    x{i} = {i}\n" for i in range(7))
    long = f"#| export\ndef f(\n    a, # one\n):\n    'Doc.'\n{body}"
    path = notebook_with(tmp_path, ("markdown", "# One two"), ("code", long), ("code", "f(1)"),
                         ("markdown", "## Appendix: three"), ("code", "f(2)"))
    assert sizes(path) == dict(cells=3, appendix=2, exported=11, words=6, function=7)


# --- ruff: what it must refuse, and what it must let pass

def ruff(folder, source, name="x.py"):
    (folder / name).write_text(source)
    command = [Path(sys.executable).parent / "ruff", "check", "--output-format", "concise",
               "--config", ROOT / "pyproject.toml", folder / name]
    done = subprocess.run(command, capture_output=True, text=True)
    return set(re.findall(r": ([A-Z]+\d+) ", done.stdout))


@pytest.mark.parametrize("source, rule", [
    ("x = 1" + " + 1" * 30, "E501"),
    ("if 1: x = 2", "E701"),
    ("x = 1; y = 2", "E702"),
    ("import os", "F401"),
    ("try:\n    x = 1\nexcept ValueError:\n    raise TypeError('x')", "B904"),
    ("from typing import List\nx: List[int] = []", "UP006"),
])
def test_the_linter_refuses(source, rule, tmp_path):
    assert rule in ruff(tmp_path, source + "\n")


def test_the_linter_lets_pass(tmp_path):
    assert ruff(tmp_path, "def f(x): return list(zip(x, x))\n") == set()


def test_the_linter_reads_notebooks(tmp_path):
    cell = dict(cell_type="code", source="if 1: x = 2", metadata={}, outputs=[],
                execution_count=None)
    notebook = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    assert "E701" in ruff(tmp_path, json.dumps(notebook), "x.ipynb")


# --- one of each

CODE = sorted(ROOT.glob("sftlab/**/[!_]*.py"))


def test_nothing_else_writes_whole_or_not_at_all():
    "One scheme of temporary names: `files.atomic`."
    texts = {p.relative_to(ROOT).as_posix(): p.read_text() for p in CODE}
    allowed = {"sftlab/files/atomic.py"}
    renames = {name for name, text in texts.items() if "os.replace(" in text}
    assert renames - allowed <= {"sftlab/study/progress.py"}  # puts a broken file aside
    partial = {n for n, text in texts.items() if re.search(r"\.part(ial)?\b[\"']", text)}
    assert partial <= allowed


def classes(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_errors_are_of_one_family():
    ours = {c for c in vars(errors).values() if inspect.isclass(c)}
    assert all(issubclass(c, errors.SftlabError) for c in ours) and len(ours) > 9
    assert all(issubclass(c, (ValueError, RuntimeError)) for c in ours - {errors.SftlabError})
    for path in CODE:
        if path.stem != "errors":
            names = [c.name for c in classes(ast.parse(path.read_text()))]
            wrong = [name for name in names if name.endswith("Error")]
            assert wrong == [], f"{path}: errors are defined in sftlab.errors"


def raising(function):
    "Names of our errors that a function raises itself."
    raised = [n.exc for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None]
    calls = {getattr(getattr(exc, "func", exc), "id", "") for exc in raised}
    return {name for name in calls if name in vars(errors)}


def guarded(function):
    "Whether a function calls a guard, other than one that only adds to a list of `problems`."
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
    guards = [c for c in calls if getattr(c.func, "id", "").startswith("check_")]
    return any("problems" not in [getattr(a, "id", "") for a in c.args] for c in guards)


def is_command(function):
    "Whether it is a command of the program: its docstring is help for people."
    decorators = [ast.unparse(d) for d in function.decorator_list]
    return any(re.match(r"\w*app\.(command|callback)", d) for d in decorators)


def silent(path):
    "Public functions that raise one of our errors and do not say so."
    tree = ast.parse(path.read_text())
    found = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"]
    found = [f for f in found if not is_command(f)]
    said = {f.name: ast.get_docstring(f) or "" for f in found}
    quiet = [f.name for f in found if any(error not in said[f.name] for error in raising(f))]
    asks = [f.name for f in found if guarded(f) and not re.search(r"Error\b", said[f.name])]
    return sorted({*quiet, *asks})


@pytest.mark.parametrize("path", [p for p in CODE if p.stem != "errors"],
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_functions_say_what_they_raise(path):
    assert silent(path) == []


def test_a_function_that_does_not_say_it_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f(x):\n    'Do it.'\n    raise DataError('no')\n")
    assert silent(path) == ["f"]
    path.write_text("def f(x):\n    'Do it, or raise a `DataError`.'\n    raise DataError('no')\n")
    assert silent(path) == []
    path.write_text("def f(x):\n    'Do it.'\n    check_x(x)\n")
    assert silent(path) == ["f"]


# --- rooms: imports only downward

def imports(path, late):
    "The modules of ours that a module imports, at its top or (late) inside functions."
    tree, package = ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).parts[:-1])
    nodes = ast.walk(tree) if late else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if name.split(".")[0] == "sftlab":
                found.add(name)
    return found


LESSON_MODULES = {".".join(module_of(p).relative_to(ROOT).with_suffix("").parts) for p in LESSONS}


def test_guards_import_no_lesson():
    for path in ROOT.glob("sftlab/guards/[!_]*.py"):
        below = {m for m in imports(path, late=True) if not m.startswith("sftlab.guards")}
        assert below <= {"sftlab.errors"}, path


SPECIAL_TOKENS = "sftlab.special_tokens"  # what lesson 03 encodes with; imports no lesson
RENDERING = "sftlab.rendering"  # goes on where lesson 03 ends


def test_lessons_import_only_what_comes_before():
    order = [".".join(module_of(p).relative_to(ROOT).with_suffix("").parts) for p in LESSONS]
    for i, name in enumerate(order):
        path = ROOT / (name.replace(".", "/") + ".py")
        for other in imports(path, late=False):
            below = other.startswith("sftlab.guards") or other in (
                "sftlab.errors", "sftlab.models", "sftlab.plots", SPECIAL_TOKENS, RENDERING)
            assert below or other in order[:i], f"{name} imports {other} at its top"


@pytest.mark.parametrize("room, may", [
    ("files", ("files", "guards", "errors")),
    ("audit", ("audit", "files", "guards", "errors", "plots"))])
def test_a_room_imports_from_those_below_and_lessons(room, may):
    for path in ROOT.glob(f"sftlab/{room}/[!_]*.py"):
        for name in imports(path, late=True) - LESSON_MODULES:
            below = name.split(".")[1] in (*may, "models", "rendering", "special_tokens",
                                           "execution")  # imports errors and guards
            assert below, f"{path} imports {name}"
