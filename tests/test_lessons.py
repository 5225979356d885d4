"""One line in a table adds a lesson.

The lists are in step with tools/lessons.yml; and a lesson made as CONTRIBUTING says (a notebook, a
master of exercises, a line) is listed, exported, linked and checked like every other.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTS = ("nbs/index.ipynb", "exercises/README.md", "_quarto.yml")


@pytest.fixture(scope="module")
def lessons():
    "tools/lessons.py, as a module."
    spec = importlib.util.spec_from_file_location("lessons", ROOT / "tools/lessons.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_project(to):
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    for name in ("nbs", "exercises", "sftlab", "tests", "tools", ".github"):
        shutil.copytree(ROOT / name, to / name, ignore=hidden)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, to)
    return to


def test_every_list_is_in_step_with_the_table(lessons, tmp_path):
    copy = copy_project(tmp_path)
    lessons.main(copy)
    changed = [name for name in LISTS if (copy / name).read_bytes() != (ROOT / name).read_bytes()]
    assert changed == [], "run make lessons"


def test_the_table_names_what_is_there(lessons):
    rows = lessons.written()
    notebooks = sorted(p.stem for p in ROOT.glob("nbs/[0-9]*.ipynb"))
    assert [row["notebook"] for row in rows] == notebooks
    masters = sorted(p.stem for p in ROOT.glob("exercises/solutions/*.ipynb"))
    assert sorted(row["exercise"] for row in rows) == masters
    assert all(row["notebook"].startswith(f"{row['number']:02}_") for row in rows)


def test_without_its_marks_a_list_is_not_guessed(lessons):
    with pytest.raises(SystemExit, match="found 0 times"):
        lessons.between("no marks here\n", "lessons", "x\n")


def cell(kind, source, name):
    made = dict(cell_type=kind, id=name, metadata={}, source=source.splitlines(keepends=True))
    return made | (dict(execution_count=None, outputs=[]) if kind == "code" else {})


def notebook(path, *parts):
    cells = [cell(kind, text, f"{path.stem[:2]}{i:06}") for i, (kind, text) in enumerate(parts)]
    kernel = dict(display_name="python3", language="python", name="python3")
    made = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


LINE = ('- {notebook: 99_doubling, title: "Doubling", see: "twice as much", exercise: 99_doubling, '
        'write: "a double", seconds: 40}\n')


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    "The project with one more lesson, made as CONTRIBUTING says."
    root = copy_project(tmp_path_factory.mktemp("grown"))
    table = root / "tools/lessons.yml"
    lines = table.read_text().splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if line.startswith("- ")]
    planned = [i for i in rows if "notebook:" not in lines[i]]
    place = planned[0] if planned else len(lines)  # it takes the place of a planned one
    number = f"{sum(i < place for i in rows) + 1:02}"
    lines[place:place + 1] = [LINE.replace("99", number)]
    table.write_text("".join(lines))
    notebook(root / f"nbs/{number}_doubling.ipynb",
             ("markdown", "# Doubling\n\n> Twice as much."),
             ("code", "#| default_exp doubling"),
             ("code", '#| export\ndef double(x:float) -> float: # twice `x`\n'
                      '    "Double a number."\n    return 2 * x'),
             ("code", "assert double(2) == 4"))
    master = json.loads((ROOT / "exercises/solutions/02_data.ipynb").read_text())
    sources = ["".join(c["source"]) for c in master["cells"]]
    sources[0] = re.sub("^# .*", f"# Exercises {number}: doubling", sources[0])
    parts = [(c["cell_type"], s.replace("default_exp study.checks.data",
                                        "default_exp study.checks.doubling"))
             for c, s in zip(master["cells"], sources)]
    notebook(root / f"exercises/solutions/{number}_doubling.ipynb", *parts)
    env = os.environ | {"PYTHONPATH": str(root)}
    for path in ("nbs", "exercises/solutions"):
        subprocess.run([Path(sys.executable).parent / "nbdev_export", "--path", path],
                       cwd=root, env=env, check=True, capture_output=True)
    learners = "from sftlab.study.masters import make_notebooks; make_notebooks()"
    for command in (["-c", learners], ["tools/lessons.py"], ["tools/readme.py"]):
        subprocess.run([sys.executable, *command], cwd=root, env=env, check=True)
    return root, number


def test_one_more_lesson_is_listed_everywhere(grown):
    root, number = grown
    page = f"{number}_doubling.ipynb"
    assert (root / "sftlab/doubling.py").exists()
    readme = (root / "README.md").read_text()
    assert f"- **[{number} Doubling](nbs/{page})**<br>Twice as much" in readme
    assert f"[{number} Doubling]({page})" in (root / "nbs/index.ipynb").read_text()
    site = (root / "_quarto.yml").read_text()
    assert site.count(f"nbs/{page}") == 2 and site.count("api/doubling.qmd") == 2
    row = rf"\| \[{number}_doubling\]\({page}\) \| {number} \| a double \|"
    assert re.search(row, (root / "exercises/README.md").read_text())


@pytest.mark.slow
def test_one_more_lesson_passes_the_checks_of_the_others(grown):
    root, number = grown
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "tests/test_docs.py", "tests/test_form.py", "tests/test_lessons.py",
               "-k", "doubling or (not nbs and not grown and not one_more)"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40
