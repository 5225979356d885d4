"""Every notebook of the course opens on Colab and installs what it needs.

Here is what costs little: badges, install cells, links. tests/colab/ runs notebooks in an
environment with Colab's own versions (make test-colab).
"""
import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from sftlab.study.links import local_links
from sftlab.study.needs import NEEDS
from test_docs import slug
from test_lessons import copy_project

ROOT = Path(__file__).resolve().parent.parent


def tool():
    "tools/colab.py, as a module."
    spec = importlib.util.spec_from_file_location("colab", ROOT / "tools/colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


colab = tool()
PAGES = sorted({*colab.course_notebooks(), *colab.course_notebooks().values()})
EVERY = [p.relative_to(ROOT).as_posix() for top in ("nbs", "exercises")
         for p in sorted((ROOT / top).rglob("*.ipynb")) if "/." not in p.as_posix()]


def cells(page, root=ROOT):
    return json.loads((root / page).read_text("utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


# --- badge and install cell

def test_there_are_lessons_and_exercises_among_them():
    assert len(PAGES) > 40 and "exercises/01_generation.ipynb" in PAGES
    assert "exercises/solutions/01_generation.ipynb" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_badge_opens_the_notebook_that_a_learner_works_in(page):
    badges = [c for c in cells(page) if colab.BADGE in text(c)]
    assert [c["id"] for c in badges] == ["colab-badge"]
    github, branch = colab.repository()
    [opened] = re.findall(rf"\(https://colab\.research\.google\.com/github/{github}/blob/{branch}/"
                          r"([^)]*)\)$", text(badges[0]))
    assert opened == page.replace("/solutions/", "/") and (ROOT / opened).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_first_code_is_the_installation(page):
    title, badge, install, *rest = cells(page)
    assert text(title).startswith("# ") and badge["id"] == "colab-badge"
    assert install["id"] == "colab-install" and install["outputs"] == []
    assert not [c for c in rest if c["id"].startswith("colab-")]
    code = text(install)
    assert max(map(len, code.splitlines())) <= 100
    assert " -q" not in code.split("%pip install", 1)[1], "-q hides Colab's button to restart"


def test_running_the_tool_again_changes_nothing(tmp_path):
    copy = copy_project(tmp_path)
    colab.main(copy)
    changed = [p for p in PAGES if (copy / p).read_bytes() != (ROOT / p).read_bytes()]
    assert changed == [], "run make lessons"


def test_a_fork_changes_one_line(tmp_path):
    "And everything leads there: badges, installation, links. Back again, all is as it was."
    copy = copy_project(tmp_path)
    ini = copy / "settings.ini"
    kept = ini.read_text()
    ours, theirs = colab.settings()["git_url"], "https://github.com/me/my-course"
    ini.write_text(kept.replace(f"git_url = {ours}", f"git_url = {theirs}"))
    colab.main(copy)
    for page in PAGES:
        found = (copy / page).read_text("utf-8")
        assert f"sftlab @ git+{theirs}@main" in found
        assert "github/me/my-course/blob/main/" in found
        sources = "\n".join(text(c) for c in cells(page, copy) if c["cell_type"] == "markdown")
        known = colab.known_files(copy)
        local = local_links(sources, page, known)
        assert "my-course" not in local.replace(colab.colab_url(
            page.replace("/solutions/", "/"), copy), "")
        assert "github/sftlab/sftlab" not in sources
    ini.write_text(kept)
    colab.main(copy)
    assert [p for p in PAGES if (copy / p).read_bytes() != (ROOT / p).read_bytes()] == []


def test_a_new_lab_gets_both_cells_and_a_card(tmp_path):
    copy = copy_project(tmp_path)
    shutil.rmtree(copy / "nbs/labs", ignore_errors=True)
    (copy / "nbs/labs").mkdir()
    lab = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(
        "# QLoRA\n\n> A lab. See [lesson 08](../08_qlora.ipynb).")])
    nbformat.write(lab, copy / "nbs/labs/qlora_t4.ipynb")
    colab.main(copy)
    made = json.loads((copy / "nbs/labs/qlora_t4.ipynb").read_text())
    assert [c["id"] for c in made["cells"][1:]] == ["colab-badge", "colab-install"]
    assert '%pip install "bitsandbytes>=' in text(made["cells"][2])
    assert made["metadata"]["accelerator"] == "GPU"
    assert colab.colab_url("nbs/08_qlora.ipynb") in text(made["cells"][0])


# --- what the install cell does

class Shell:
    "An IPython that only notes what it would install."
    def __init__(self):
        self.done = []

    def run_line_magic(self, name, line, *more):
        self.done.append(f"{name} {line}")


def run_install(page, monkeypatch, on_colab, installed):
    "Run a notebook's install cell as IPython does."
    from importlib import metadata

    from IPython.core.inputtransformer2 import TransformerManager
    [cell] = [c for c in cells(page) if c["id"] == "colab-install"]
    shell = Shell()
    if on_colab:
        monkeypatch.setitem(__import__("sys").modules, "google.colab", object())
    else:
        monkeypatch.delitem(__import__("sys").modules, "google.colab", raising=False)
    found = [object()] if installed else []
    monkeypatch.setattr(metadata, "distributions", lambda name: iter(found))
    code = TransformerManager().transform_cell(text(cell))
    exec(compile(code, page, "exec"), {"get_ipython": lambda: shell})
    return shell.done


@pytest.mark.parametrize("page", PAGES)
def test_it_installs_on_colab_once_and_nowhere_else(page, monkeypatch, capsys):
    assert run_install(page, monkeypatch, on_colab=False, installed=False) == []
    assert run_install(page, monkeypatch, on_colab=True, installed=True) == []
    assert capsys.readouterr().out == ""
    done = run_install(page, monkeypatch, on_colab=True, installed=False)
    assert done[0] == "pip uninstall -q -y torchao"
    assert done[1].startswith('pip install "sftlab @ git+https://github.com/')
    assert capsys.readouterr().out.count("restart") == 1


def names_imported(page):
    "Top-level names that a notebook's own cells import."
    for cell in cells(page):
        if cell["cell_type"] == "code" and not cell["id"].startswith("colab-"):
            for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!](?!=).*", "", text(cell)))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module.split(".")[0]


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith("nbs/")])
def test_a_lesson_that_imports_a_library_installs_it(page):
    named = {name.replace("-", "_"): name for name in NEEDS if name != "transformers"}
    wanted = {named[name] for name in names_imported(page) if name in named}
    assert wanted <= {Requirement(r).name for r in colab.extras(page)}


def test_the_lists_of_needs_are_in_step():
    lab = {Requirement(r).name for r in colab.settings()["lab_requirements"].split()}
    assert set(NEEDS) == lab - {"jupyterlab", "ipykernel"}
    assert [Requirement(r).name for r in colab.extras("nbs/15_metrics.ipynb")] == [
        "sacrebleu", "rouge-score", "lm-eval"]


# --- links

LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page):
    prose = [text(c) for c in cells(page) if c["cell_type"] == "markdown"]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", "\n\n".join(prose), flags=re.DOTALL)
    return LINK.findall(prose)


@pytest.mark.parametrize("page", PAGES)
def test_no_link_needs_a_neighbour(page):
    assert [t for t in links(page) if not re.match(r"[a-z]+:|#", t)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_into_the_course_lead_somewhere(page):
    github, branch = colab.repository()
    for target in links(page):
        ours = re.match(rf"https://\S+?/{github}/(?:blob/)?{branch}/([^#]+)(?:#(.*))?$", target)
        if ours:
            path, anchor = ours.groups()
            assert (ROOT / path).is_file(), target
            if anchor:
                prose = "\n".join(text(c) for c in cells(path) if c["cell_type"] == "markdown")
                assert anchor in map(slug, re.findall(r"(?m)^#+ (.*)$", prose)), target
        else:
            assert f"/{github.split('/')[0]}/" not in target, f"{target}: another branch?"


def test_a_copy_of_the_course_needs_no_network():
    "Every link between its pages is relative there, and the file is there."
    from sftlab.study.workspace import course_content, course_files
    files = course_files()
    inside = [p.removeprefix("nbs/") for p in PAGES if "/solutions/" not in p]
    pattern = re.compile(r"\]\(((?!https?:|mailto:|#)[^)\s]+)\)")
    count = 0
    for name in inside:
        found = json.loads(course_content(name, files))["cells"]
        for cell in found:
            if cell["cell_type"] == "markdown" and cell["id"] != "colab-badge":
                prose = re.sub(r"```.*?```|`[^`\n]*`", "", text(cell), flags=re.DOTALL)
                assert "/sftlab/sftlab/blob/" not in prose, name
                for target in pattern.findall(prose):
                    path = (ROOT / name).parent / target.partition("#")[0]
                    copied = Path(path).resolve().relative_to(ROOT).as_posix()
                    assert copied in files, f"{name}: {target}"
                    count += 1
    assert count > 60


# --- state

@pytest.mark.parametrize("page", EVERY)
def test_no_notebook_keeps_the_state_of_widgets(page):
    "It is kilobytes, and useless without the kernel that made it."
    assert "widgets" not in json.loads((ROOT / page).read_text("utf-8"))["metadata"]


# --- what goes wrong on Colab

def test_an_old_torchao_is_named_with_its_remedy(monkeypatch, tmp_path):
    "In training, in loading an adapter, and by `sftlab doctor`. PEFT raises an ImportError."
    import peft.import_utils

    from sftlab import cli
    from sftlab.errors import FinetuneError, ModelError
    from sftlab.finetune import add_lora
    from sftlab.guards.models import in_one_line
    from sftlab.models import load

    def refuse():
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0, but "
                          "only versions above 0.16.0 are supported")
    model, tokenizer = load("tiny")
    monkeypatch.setattr(peft.import_utils, "is_torchao_available", refuse)
    with pytest.raises(FinetuneError) as in_training:
        add_lora(model, tokenizer)
    with pytest.raises(ModelError) as in_loading, in_one_line(tmp_path):
        refuse()
    for raised in (in_training, in_loading):
        assert "pip uninstall -y torchao" in str(raised.value) and "\n" not in str(raised.value)
    found = {what: fix for what, works, fix in cli._what_is_missing() if not works}
    assert found["LoRA, lessons 07 and later"].startswith("pip uninstall -y torchao")
    monkeypatch.undo()
    assert add_lora(model, tokenizer) and cli._what_is_missing() == []


def test_doctor_says_which_lessons_lack_what(monkeypatch):
    from sftlab import cli
    from sftlab.study import needs
    assert needs.missing() == {}
    monkeypatch.setattr(needs, "is_missing", lambda wanted: wanted.startswith(("bits", "lm-eval")))
    found = {what: fix for what, works, fix in cli._what_is_missing() if not works}
    four_bit = next(what for what in found if what.startswith("lesson 06, lesson 08"))
    assert found[four_bit] == "pip install 'bitsandbytes>=0.48'"
    assert found["lesson 15, lesson 16"].startswith("pip install 'lm-eval[api]>=")


@pytest.mark.parametrize("requirement, lacks", [
    ("numpy", False), ("numpy>=99", True), ("no-such-thing", True),
    ("transformers[serving]", False)])
def test_a_requirement_counts_with_version_and_extras(requirement, lacks):
    from sftlab.study.needs import is_missing
    assert is_missing(requirement) == lacks


def test_an_extra_that_is_incomplete_is_missing(monkeypatch):
    from sftlab.study import needs
    versions = {"transformers": "5.20"}

    def version(name):
        if name not in versions:
            raise needs.PackageNotFoundError(name)
        return versions[name]
    monkeypatch.setattr(needs, "version", version)
    monkeypatch.setattr(needs, "requires", lambda name: ['fastapi>=0.1; extra == "serving"'])
    assert needs.is_missing("transformers[serving]") and not needs.is_missing("transformers>=5")
    versions["fastapi"] = "0.2"
    assert not needs.is_missing("transformers[serving]")


def test_results_are_found_from_any_folder(tmp_path, monkeypatch):
    from sftlab.study.experiments import results
    monkeypatch.chdir(tmp_path)
    names = [path.stem for path in (ROOT / "nbs/experiments").glob("*.json")]
    assert len(results(names[0])) > 0
    with pytest.raises(FileNotFoundError, match="experiments/no_such.json"):
        results("no_such")
    (tmp_path / "experiments").mkdir()  # what is near goes first
    shutil.copy(ROOT / f"nbs/experiments/{names[0]}.json", tmp_path / "experiments/no_such.json")
    assert len(results("no_such")) == len(results(names[0]))


# --- the stand-in and the lists of tests/colab

@pytest.fixture
def freeze(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/colab")
    import freeze
    return freeze


LISTS = ("a==1.0\ntorch @ https://x.org/torch-2.11.0%2Bcpu-cp313-cp313-x.whl\nPyArrow==18.1.0\n"
         "google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz\n# a note\n",
         "torch @ https://x.org/torch-2.12.0%2Bcpu-cp314-cp314-x.whl\npyarrow==18.1.0\npeft==1.0\n")


def test_a_newer_list_says_what_changed(freeze, tmp_path, capsys):
    paths = [tmp_path / "old.txt", tmp_path / "new.txt"]
    for path, lines in zip(paths, LISTS):
        path.write_text(lines)
    old, new = map(freeze.read, paths)
    assert old == {"a": "1.0", "torch": "2.11.0", "pyarrow": "18.1.0", "google-colab": "1.0.0"}
    assert freeze.changes(old, new, ["peft", "pyarrow", "torch"]) == [
        "peft: not there -> 1.0", "torch: 2.11.0 -> 2.12.0"]
    freeze.main(paths[1], paths[0])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "4 of 3 packages differ; of those that the course meets, 3"
    assert said[1:] == ["Python: 3.13 -> 3.14", "peft: not there -> 1.0",
                        "torch: 2.11.0 -> 2.12.0"]
    freeze.main(paths[0], paths[0])
    assert capsys.readouterr().out.endswith("the course meets, 0\n")


def test_the_kept_list_is_colabs(freeze):
    path = ROOT / "tests/colab/freeze.txt"
    assert "github.com/googlecolab/backend-info" in path.read_text().split("\n\n")[0]
    kept = freeze.read(path)
    assert len(kept) > 600 and freeze.python_version(path) in ("3.12", "3.13")
    known = ("torch", "transformers", "peft", "datasets", "pyarrow", "ipython", "ipywidgets")
    assert set(known) <= set(kept) and set(known) <= set(freeze.concerned())
    assert "jupyterlab" not in freeze.concerned()


def test_the_course_asks_for_nothing_that_colab_cannot_have(freeze):
    "What is replaced must not be loaded when a kernel starts, or each learner has to restart."
    kept = freeze.read(ROOT / "tests/colab/freeze.txt")
    asked = [Requirement(r) for r in colab.settings()["requirements"].split()]
    replaced = {r.name for r in asked if not r.specifier.contains(kept.get(r.name, "0"))}
    assert replaced == {"trl", "datasets"}


def test_the_stand_in_does_what_a_notebook_asks_for(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests/colab/standin")
    from google.colab import drive, files, userdata
    drive.mount(str(tmp_path / "drive"))
    assert (tmp_path / "drive/MyDrive").is_dir() and "Mounted" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFTLAB_COLAB_UPLOAD", raising=False)
    assert files.upload() == {}
    picked = tmp_path / "elsewhere/rows.jsonl"
    picked.parent.mkdir()
    picked.write_text("{}")
    monkeypatch.setenv("SFTLAB_COLAB_UPLOAD", str(picked))
    assert files.upload() == {"rows.jsonl": b"{}"} and (tmp_path / "rows.jsonl").exists()
    with pytest.raises(FileNotFoundError):
        files.download("none")
    with pytest.raises(userdata.SecretNotFoundError):
        userdata.get("HF_TOKEN")


def test_what_is_run_there_is_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/colab")
    import run
    assert all((ROOT / page).is_file() for page in run.CHOSEN) and set(run.RUN_ON) <= set(PAGES)
    assert run.torch_of(ROOT / "tests/colab/freeze.txt").startswith("torch @ https://")
