"""How tests are shared out between two processes: a file in one of them, notebooks in both."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, kept_together

FILE = "import time\n" + "".join(f"def test_{n}(): time.sleep(.05)\n" for n in range(6))
NOTEBOOKS = ("import time\nimport pytest\n@pytest.mark.parametrize('name', range(9))\n"
             "def test_notebook_runs(name): time.sleep(.2)\n")


@pytest.mark.slow
def test_a_file_stays_together_and_notebooks_come_last_in_both(tmp_path):
    "As `make test` does it: what is asked of xdist may be ignored without a word."
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    for name, text in {"a": FILE, "b": FILE, "c": NOTEBOOKS, "d": FILE}.items():
        (tmp_path / f"tests/test_{name}.py").write_text(text)
    own = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    [words] = re.findall(r"-m pytest (.*)", (ROOT / "Makefile").read_text())[:1]
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider",
                           *words.split()], cwd=tmp_path, env=own, capture_output=True, text=True)
    ran = re.findall(r"\[gw(\d)\].*PASSED tests/test_(\w)\.py", done.stdout)
    assert len(ran) == 27, done.stdout + done.stderr
    where = {name: {worker for worker, file in ran if file == name} for name in "abcd"}
    assert [len(where[name]) for name in "abcd"] == [1, 1, 2, 1]
    assert [file for _, file in ran[-6:]] == ["c"] * 6


def test_what_is_kept_together():
    assert kept_together("tests/test_a.py::test_x[a::b@c]") == "tests/test_a.py"
    notebook = "tests/test_notebooks.py::test_notebook_runs[nbs/01.ipynb]"
    assert kept_together(notebook) == notebook
