"The website, as far as it goes without Quarto: every page is listed, processed and linked."
import base64
import html
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text())
RENDER = CONFIG["project"]["render"]
NOTEBOOKS = [p.relative_to(ROOT).as_posix()
             for where in ("nbs/**/*.ipynb", "exercises/*.ipynb") for p in sorted(ROOT.glob(where))
             if not p.parent.name.startswith((".", "_"))]
MODULES = [name for name in RENDER if name.startswith("api/") and name != "api/index.qmd"]


sys.path.insert(0, str(ROOT / "tools"))  # tools import one another


def tool(name):
    "One of the project's tools, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs(): return tool("docs")


@pytest.fixture(scope="module")
def site(docs, tmp_path_factory):
    "What Quarto would read."
    to = tmp_path_factory.mktemp("site") / "proc"
    docs.prepare(to)
    return to


@pytest.fixture(scope="module")
def lists(): return tool("lessons")


def cells(path):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]


def markdown(name):
    "The prose of a notebook, without what is code in it."
    text = "\n\n".join(source for kind, source in cells(ROOT / name) if kind == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def slug(heading):
    "The anchor that a heading gets, in Quarto and in JupyterLab."
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_every_notebook_and_module_has_its_page():
    code = [p.relative_to(ROOT / "sftlab") for p in ROOT.glob("sftlab/**/[!_]*.py")]
    modules = [".".join(p.with_suffix("").parts) for p in code if "checks" not in p.parts]
    assert {"generation", "tiny.world", "files.atomic"} <= set(modules)
    indexes = ["exercises/index.qmd", "api/index.qmd"]
    assert sorted(RENDER) == sorted(NOTEBOOKS + indexes + [f"api/{name}.qmd" for name in modules])


def test_the_sidebars_list_every_page_once_in_the_same_order(lists):
    bars = CONFIG["website"]["sidebar"]
    assert [page for bar in bars for page in lists.leaves(bar["contents"])] == RENDER


def test_every_notebook_has_a_title_of_its_own(docs):
    titles = [docs.page_title(name) for name in NOTEBOOKS if name in RENDER] + ["Exercises"]
    assert sorted(set(titles)) == sorted(titles)


def test_what_learners_read_is_apart_from_what_is_inside(lists):
    bars = {bar["id"]: list(lists.leaves(bar["contents"])) for bar in CONFIG["website"]["sidebar"]}
    inside = bars.pop("reference")
    assert {"lessons", "exercises", "handbook"} <= set(bars)
    assert all(re.match(r"api/|nbs/reference/", name) for name in inside)
    assert "nbs/reference/glossary.ipynb" in bars["handbook"]


def test_the_navigation_bar_leads_to_pages_and_each_sidebar_is_reached(lists):
    "Quarto marks the first entry that the page's sidebar holds: none may hold another's page."
    targets = [entry["href"] for entry in CONFIG["website"]["navbar"]["left"]]
    assert all(target in RENDER or target.startswith("nbs/live/") for target in targets)
    for bar in CONFIG["website"]["sidebar"]:
        assert len(set(lists.leaves(bar["contents"])) & set(targets)) == 1, bar["id"]


def test_lessons_are_in_course_order():
    lessons = [name for name in RENDER if re.match(r"nbs/\d\d_", name)]
    assert lessons and lessons == sorted(lessons)


def test_site_and_settings_agree():
    ini = (ROOT / "settings.ini").read_text()
    settings, site = dict(re.findall(r"^(\w+) = (.*)$", ini, flags=re.MULTILINE)), CONFIG["website"]
    assert (site["title"], site["description"]) == (settings["title"], settings["description"])
    assert site["repo-url"] == settings["git_url"]
    assert site["site-url"] == settings["doc_host"] + settings["doc_baseurl"]


def test_pages_are_readable_offline():
    "No option that fetches scripts from elsewhere or needs a browser to build."
    html = CONFIG["format"]["html"]
    assert html["html-math-method"] == "mathml"
    assert set(CONFIG["format"]) == {"html"} and "keep-md" not in html
    assert {"light", "dark"} == set(html["theme"]) and CONFIG["website"]["search"]


def test_every_page_is_processed(site):
    pages = [p for p in site.rglob("*") if p.suffix in (".ipynb", ".qmd")]
    made = {p.relative_to(site).as_posix() for p in pages}
    assert made == set(RENDER)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_processed_notebook_keeps_its_words(docs, site, name):
    (kind, front), *rest = cells(site / name)
    front = yaml.safe_load(front.strip().strip("-"))
    title = re.match(r"# (.*)", cells(ROOT / name)[0][1])[1]
    number = re.match(r"nbs/(\d\d)_", name)
    assert kind == "raw" and front["title"] == (f"{int(number[1])} · " if number else "") + title
    assert front["description"].strip(), "the line after the title: > what one will see"
    page = "\n".join(source for _, source in rest)
    prose = [docs.with_links(source, name) for kind, source in cells(ROOT / name)[1:]
             if kind == "markdown" and "colab-badge.svg" not in source]
    wanted = [line for source in prose for line in source.splitlines()]
    assert [line for line in wanted if line not in page] == []
    assert not re.search(r"^!\[", page, flags=re.M), "Quarto would forget what the picture shows"
    assert not re.search(r"^#\| *(default_exp|export\w*|hide)\b", page, flags=re.MULTILINE)


def code_of_cell(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def code_of(path):
    "The code of a notebook, without directives."
    return [line for kind, source in cells(path) if kind == "code" for line in code_of_cell(source)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_processed_notebook_keeps_its_code_and_folds_what_is_hidden(site, name):
    kept = json.loads((ROOT / name).read_text("utf-8"))["cells"]
    for_colab = [cell for cell in kept if cell["id"] == "colab-install"]
    lines = code_of(ROOT / name)
    for cell in for_colab:
        install = code_of_cell("".join(cell["source"]))
        assert lines[:len(install)] == install
        lines = lines[len(install):]
    assert code_of(site / name) == lines
    hidden = [source for kind, source in cells(ROOT / name)
              if kind == "code" and "#| hide" in source.splitlines()]
    folded = [source for kind, source in cells(site / name) if "#| code-fold: true" in source]
    lines = "\n".join(folded).splitlines()
    assert all(line in lines for source in hidden for line in code_of_cell(source))


def test_title_and_line_are_taken_out_and_nothing_else(docs):
    notebook = docs.read_nb(ROOT / NOTEBOOKS[0])
    notebook.cells[0].source = "# Title\n\n> One line.\n\nProse.\n\n- a: list"
    assert docs.opening(notebook) == "One line."
    assert notebook.cells[0].source == "Prose.\n\n- a: list"


def code_cell(docs, source, outputs=()):
    cell = docs.mk_cell(source, "code")
    cell.outputs = list(outputs)
    docs.for_reading(cell)
    return cell


def test_directives_of_nbdev_go_and_those_of_quarto_stay(docs):
    shown = code_cell(docs, "#| export\n#| label: chart\nx = 1 #| hide")
    assert shown.source == "#| label: chart\nx = 1 #| hide"
    assert code_cell(docs, "#| default_exp tiny.world").source == ""
    hidden = code_cell(docs, "#| hide\nimport torch\nx = 1", [dict(output_type="stream")])
    assert hidden.source.splitlines() == [
        "#| code-fold: true", '#| code-summary: "Imports and set-up"', "import torch", "x = 1"]
    assert hidden.outputs == []
    drawn = code_cell(docs, "#| code-fold: true\ndraw(import_of(x))", [dict(output_type="stream")])
    assert '"Show the code"' in drawn.source and len(drawn.outputs) == 1


def test_imports_alone_are_folded(docs):
    imports = "#| export\nimport math\nimport torch\n\ntorch.set_num_threads(1)"
    assert '"Imports and set-up"' in code_cell(docs, imports).source
    for other in ("import torch", imports + "\nx = 1", "x = 1\n" + imports,
                  "%pip install a\nimport a\nimport b\nimport c"):
        assert "code-fold" not in code_cell(docs, other).source


def test_folds_that_follow_each_other_are_one(docs):
    imports = ["import a\nimport b\nimport c\nimport d", "import e\nimport f\n\nimport g"]
    words = docs.mk_cell("Words.", "markdown")
    made = docs.one_fold([words, *(code_cell(docs, text) for text in imports), words,
                          code_cell(docs, imports[0]), code_cell(docs, "x = 1")])
    assert [len(cell.source.splitlines()) for cell in made] == [1, 11, 1, 6, 1]
    assert made[1].source.count("code-fold") == 1 and "\n\nimport e\n" in made[1].source


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 1200, 500)).decode()


def test_outputs_are_fit_for_a_page(docs, tmp_path):
    "No warnings, no widgets, no pictures inside, no HTML that makes Quarto load other scripts."
    name, styles = "nbs/reference/tiny/world.ipynb", []
    show = lambda **output: docs.shown(output, name, tmp_path, styles)
    assert show(name="stderr", output_type="stream", text="UserWarning") is None
    assert show(data={docs.WIDGET: {}, "text/plain": "HBox()"}) is None
    assert show(name="stdout", text="kept")["text"] == "kept"
    html = (f'<style>#T_1 {{ color: red }}</style><div><style scoped>.dataframe {{}}</style>'
            f'<img alt="a line" width="600" src="data:image/png;base64,{PNG}"></div>')
    made = show(data={"text/html": html, "text/plain": "DataFrame"})["data"]
    assert set(made) == {"text/markdown"} and styles == ["<style>#T_1 { color: red }</style>"]
    assert "<style" not in made["text/markdown"] and "base64" not in made["text/markdown"]
    assert 'alt="a line" width="600" height="250" loading="lazy"' in made["text/markdown"]
    source = re.search(r'src="(.*?)"', made["text/markdown"])[1]
    path = os.path.normpath(tmp_path / Path(name).parent / source)
    assert Path(path).read_bytes()[:4] == b"\x89PNG"


def outputs(name, site=ROOT):
    notebook = json.loads((site / name).read_text("utf-8"))
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_says_what_one_sees(name):
    shown = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs(name)]
    prose = "\n".join(source for kind, source in cells(ROOT / name) if kind == "markdown")
    pictures = re.findall(r"<img\b[^>]*>", "".join(shown) + prose)
    assert [p[:100] for p in pictures if not re.search(r'alt="[^"]+"', p)] == []
    assert not re.search(r"!\[\s*\]\(", prose), "a picture without a description: ![]( )"
    assert not any(re.match("image/", kind) for o in outputs(name) for kind in o.get("data", {}))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_loads_anything_or_warns(site, name):
    made = json.dumps(outputs(name, site))
    loads = r"<script\b[^>]*\bsrc|src=\\?\"https?:|@import|url\(|<link|\b(?:fetch|import)\s*\("
    assert not re.search(loads, made)
    assert not any(output.get("name") == "stderr" for output in outputs(name, site))


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if re.match(r"nbs/\d\d_", n)])
def test_no_table_of_a_lesson_is_cut(name):
    "pandas shows a row or column of dots, or ends a cell after 50 characters."
    shown = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs(name))
    items = re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", shown, flags=re.S)
    cut = [item for item in items
           if item == "..." or item.endswith("...") and len(html.unescape(item)) == 50]
    assert cut == []


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if re.match(r"nbs/\d\d_|exer", n)])
def test_a_lesson_says_where_it_is_from_and_leads_on(docs, site, name):
    ways = cells(site / name)[1][1]
    targets = re.findall(r'\]\(([^)]+)\)|href="([^"]+)"', ways)
    targets = [a or b for a, b in targets]
    assert f"https://colab.research.google.com/github/sftlab/sftlab/blob/main/{name}" in targets
    assert f"../download/{name}" in targets and docs.code_at() + name in targets
    row = (docs.lesson_rows() | docs.exercise_rows())[name]
    other = f"nbs/{row['notebook']}.ipynb" if name.startswith("exer") else None
    if not other and "exercise" in row:
        other = f"exercises/{row['exercise']}.ipynb"
    assert not other or f"../{other}" in targets


def test_a_lesson_has_one_name(docs):
    for name, row in docs.lesson_rows().items():
        assert docs.page_title(name) == f"{row['number']} · {row['title']}"


LINKS = {  # from a page, to: what becomes of it
    ("exercises/07_lora.ipynb", "../07_lora.ipynb#merge"): "../nbs/07_lora.ipynb#merge",
    ("nbs/07_lora.ipynb", "exercises/07_lora.ipynb"): "../exercises/07_lora.ipynb",
    ("nbs/index.ipynb", "../exercises/README.md"): "../exercises/index.qmd",
    ("nbs/index.ipynb", "../CHANGELOG.md"):
        "https://github.com/sftlab/sftlab/blob/main/CHANGELOG.md",
    ("nbs/index.ipynb", "images/x.png"): "images/x.png",
    ("nbs/index.ipynb", "live/index.html"): "live/index.html",
    ("nbs/index.ipynb", "https://sftlab.github.io/sftlab/nbs/live/index.html"): "live/index.html",
    ("nbs/07_lora.ipynb", "https://github.com/sftlab/sftlab/blob/main/nbs/08_qlora.ipynb#x"):
        "08_qlora.ipynb#x",
    ("nbs/07_lora.ipynb", "https://github.com/sftlab/sftlab"): "https://github.com/sftlab/sftlab",
    ("nbs/07_lora.ipynb", "#merge"): "#merge",
    ("nbs/07_lora.ipynb", "nowhere.ipynb"): "nowhere.ipynb"}


@pytest.mark.parametrize("name, target", LINKS)
def test_links_become_those_of_the_site(docs, name, target):
    text = f"[a]({target}) `[a]({target})`\n"
    assert docs.with_links(text, name) == f"[a]({LINKS[name, target]}) `[a]({target})`\n"


@pytest.mark.parametrize("name", RENDER)
def test_links_of_a_processed_page_lead_to_pages_or_files(docs, site, name):
    if name.endswith(".ipynb"):
        text = "\n".join(source for kind, source in cells(site / name) if kind == "markdown")
    else:
        text = (site / name).read_text("utf-8")
    prose = "".join(docs.CODE.split(text)[::2])
    targets = [target.partition("#")[0] for _, target in docs.LINK.findall(prose)]
    inside = [target for target in targets if target and not re.match(r"[a-z]+:|/", target)]
    there = [os.path.normpath(os.path.join(os.path.dirname(name), target)) for target in inside]
    notebooks = {f"download/{page}" for page in NOTEBOOKS}
    lost = [path for path in there if path not in RENDER and path not in notebooks
            and (path.endswith((".ipynb", ".qmd")) or not (site / path).is_file())]
    assert lost == []


def test_no_line_ends_before_a_percent_sign(docs):
    made = docs.with_links("From 4 % to `5 %`.", "nbs/07_lora.ipynb")
    assert made == "From 4\N{NO-BREAK SPACE}% to `5 %`."


def test_lessons_are_found_first(docs):
    names = ["api/lora.html#inject", "nbs/reference/guards/lora.html", "nbs/reference/cli.html",
             "exercises/07_lora.html", "nbs/07_lora.html#x", "nbs/index.html", "nbs/07_lora.html"]
    made = docs.searchable([dict(href=name, title="LoRA", section="Use", text="words")
                            for name in names])
    assert [entry["href"] for entry in made] == [names[i] for i in (4, 6, 3, 5, 2, 0, 1)]
    assert [len(entry["title"].split()) > 1 for entry in made] == [False] * 5 + [True] * 2
    assert [entry["section"] for entry in made[:3]] == ["Use", "Use",
                                                        "Use, in an exercise of the course"]
    assert all(len(entry["section"].split()) > 5 for entry in made[2:])
    assert [entry["text"] for entry in made] == ["words"] * 5 + ["", "words"]


def test_the_first_page_has_a_name_and_leads_to_the_front_page(docs):
    page = docs.home()
    assert re.search(r'<html lang="en">.*<title>sftlab: .*</title>', page, flags=re.S)
    assert "url=nbs/index.html" in page and 'property="og:image"' in page
    assert 'name="description"' in page and "<script" not in page


@pytest.mark.parametrize("name", MODULES)
def test_an_api_page_tells_all_that_its_module_exports(docs, site, name):
    module = docs.api.module(Path(name).stem)
    page = (site / name).read_text("utf-8")
    front = yaml.safe_load(page.split("---")[1])
    assert front["title"] == f"sftlab.{module.name}" and front["description"].strip()
    for item in importlib.import_module(f"sftlab.{module.name}").__all__:
        assert re.search(rf"^##+ {re.escape(item)} {{#", page, flags=re.M), item
        assert f"](#{item})" in page, f"{item} is not in the table of names"
    assert re.search(r"\]\(\.\./(.*?\.ipynb)\)", page)[1] in RENDER
    lines = (ROOT / module.path).read_text("utf-8").splitlines()
    for owner, number in re.findall(r"^##+ (\S+) {#.*?blob/main/.*?\.py#L(\d+)\)",
                                    page.partition("\n## Values")[0], flags=re.M | re.S):
        assert re.search(rf"\b{owner.split('.')[-1]}\b", lines[int(number) - 1]), owner
    anchors = re.findall(r"^##+ .*{#(\S+)}", page, flags=re.M)
    assert len(set(anchors)) == len(anchors)
    assert {target for target in re.findall(r"\]\(#([^)]+)\)", page)} <= set(anchors)


MODULE = '''"""What it is for."""

# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/07_lora.ipynb.
__all__ = ['LIMIT', 'Thing', 'use', 'Wrong']
# %% x
LIMIT = 3 # things

class Thing(Base):
    "A thing."
    def __init__(self,
        size:int=8, # in cm
        *, name:str="x|y", # shown
    ):
        self.size = size

    def grow(self, by): # the new size, (batch, length)
        "Make it larger; raises a `Wrong` or a `ValueError` if it is."
        return by

    def _hidden(self): pass

def use(
    thing, # any
    how="well", # or badly
): # what came of it
    """Use it as an <img>, or `<b>`. Raises a `LoRAError` for nothing."""
    return thing

class Wrong(ValueError):
    "Not right."
'''


@pytest.fixture
def made(docs, tmp_path, monkeypatch):
    "The page of a small module."
    (tmp_path / "sftlab").mkdir()
    (tmp_path / "sftlab/made.py").write_text(MODULE)
    docs.api.errors()
    monkeypatch.setattr(docs.api, "ROOT", tmp_path)
    yield docs.api.api_page("made", "7 · LoRA", "https://code/")
    docs.api.module.cache_clear()


@pytest.mark.parametrize("wanted", [
    'description: "What it is for."', "[7 · LoRA](../nbs/07_lora.ipynb)",
    "| [`Thing`](#Thing) | A thing. (A kind of `Base`.) |",
    "| [`use`](#use) | Use it as an \\<img>, or `<b>`. |",
    'class Thing(size: int = 8, *, name: str = \'x|y\')',
    "| `size` | `int` | `8` | in cm |", r"| `name` | `str` | `'x\|y'` | shown |",
    "### Thing.grow {#Thing.grow}", "**Returns** the new size, (batch, length)",
    "**Raises** `ValueError`", "use(thing, how='well')",
    "| `how` | `'well'` | or badly |", "**Returns** what came of it",
    "**Raises** [`LoRAError`](errors.qmd#LoRAError)", "class Wrong(ValueError)",
    "\n\nUse it as an \\<img>, or `<b>`.",
    "## Values", "LIMIT = 3", "things", "https://code/sftlab/made.py#L8"])
def test_an_api_page_says(made, wanted):
    assert wanted in made


def test_an_api_page_hides_what_is_private_and_mixes_nothing_up(made):
    assert "_hidden" not in made and "`self`" not in made
    assert "or badly: what came of it" not in made and "| `*` |" not in made


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_somewhere(name):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = Path(os.path.normpath(Path(name).parent / path)).as_posix() if path else name
        if not (ROOT / page).exists() or page.endswith(".ipynb") and page not in RENDER:
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", markdown(page), flags=re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(target)
    assert not broken


def test_the_map_of_lessons_says_which_are_planned():
    text = markdown("nbs/index.ipynb")
    part = text[text.index("<!-- lessons -->"):text.index("<!-- /lessons -->")]
    rows = re.findall(r"^- \**\[?(\d\d) (.*?)<br>", part, flags=re.MULTILINE)
    lessons = [Path(name).name for name in NOTEBOOKS if re.match(r"nbs/\d\d_", name)]
    there = {name[:2]: name for name in lessons}
    assert [number for number, _ in rows] == [f"{i:02}" for i in range(1, len(rows) + 1)]
    for number, lesson in rows:
        assert ("(planned)" in lesson) == (number not in there), f"lesson {number}: {lesson}"
        assert number not in there or f"({there[number]})" in lesson
    assert set(there) <= {number for number, _ in rows}


def test_readme_is_made_from_the_index_and_its_picture_from_lesson_01():
    made = tool("readme")
    assert made.readme() == (ROOT / "README.md").read_text(), "run make readme"
    shown = (ROOT / "nbs/images/before_after.png").read_bytes()
    assert made.picture() == shown, "run make readme"


def test_readme_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    inside = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in inside if not (ROOT / t.partition("#")[0]).exists()] == []


def test_the_live_page_goes_with_the_site(site):
    assert (site / "nbs/live/index.html").is_file() and (site / "nbs/live/data").is_dir()
    targets = [entry["href"] for entry in CONFIG["website"]["navbar"]["left"]]
    assert "nbs/live/index.html" in targets and "nbs/live/**" in CONFIG["project"]["resources"]


def test_glossary_terms_are_unique_and_explained():
    text = markdown("nbs/reference/glossary.ipynb")
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)[1:]
    terms = dict(zip(parts[::2], parts[1::2]))
    assert len(terms) == len(parts) // 2, "a term is explained twice"
    assert all(len(text.split()) >= 8 for text in terms.values())


def test_without_quarto_one_line_says_what_to_install():
    done = subprocess.run([sys.executable, ROOT / "tools/docs.py"], capture_output=True, text=True,
                          env=os.environ | {"PATH": "/nowhere"})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "https://quarto.org" in done.stderr
