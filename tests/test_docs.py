"The website, as far as it goes without Quarto: every page is listed, processed and linked."
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text())
RENDER = CONFIG["project"]["render"]
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("nbs/**/*.ipynb"))
             if not p.parent.name.startswith(".")]


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


def leaves(contents):
    "The pages of a sidebar, in order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from leaves(entry.get("contents", []))


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
    assert sorted(RENDER) == sorted(NOTEBOOKS + [f"api/{name}.qmd" for name in modules])


def test_the_sidebar_lists_every_page_once_in_the_same_order():
    assert list(leaves(CONFIG["website"]["sidebar"]["contents"])) == RENDER


def test_the_navigation_bar_leads_to_pages():
    for entry in CONFIG["website"]["navbar"]["left"]:
        assert entry["href"] in RENDER or entry["href"].startswith("nbs/live/")


def test_lessons_are_in_course_order():
    lessons = [name for name in RENDER if re.match(r"nbs/\d\d_", name)]
    assert lessons and lessons == sorted(lessons)


def test_page_names_do_not_collide_without_their_numbers():
    pages = [str(Path(name).with_name(re.sub(r"^\d+_", "", Path(name).stem))) for name in RENDER]
    assert len(set(pages)) == len(pages)


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
def test_a_processed_notebook_keeps_its_words(site, name):
    kind, front = cells(site / name)[0]
    title = re.match(r"# (.*)", cells(ROOT / name)[0][1])[1]
    assert kind == "raw" and yaml.safe_load(front.strip().strip("-"))["title"] == title
    page = "\n".join(source for _, source in cells(site / name))
    prose = [source for kind, source in cells(ROOT / name)[1:] if kind == "markdown"]
    wanted = [line for source in prose for line in source.splitlines()]
    assert [line for line in wanted if line not in page] == []
    assert not re.search(r"^#\| *(default_exp|export|hide)", page, flags=re.MULTILINE)


def test_a_title_cell_with_more_in_it_loses_nothing(docs):
    notebook = docs.read_nb(ROOT / NOTEBOOKS[0])
    notebook.cells[0].source = "# Title\n\n> One line.\n\nProse.\n\n- a: list"
    docs.split_title(notebook)
    first, second = [c.source.strip() for c in notebook.cells[:2]]
    assert (first, second) == ("# Title\n\n> One line.", "Prose.\n\n- a: list")


@pytest.mark.parametrize("name", [n for n in RENDER if n.startswith("api/")])
def test_an_api_page_names_all_that_its_module_exports(site, name):
    module = importlib.import_module(f"sftlab.{Path(name).stem}")
    page = (site / name).read_text()
    def there(item):
        item = re.escape(item)
        return re.search(rf"^## {item}$|`{item}`", page, flags=re.MULTILINE)
    assert not [item for item in module.__all__ if not there(item)]
    source = re.search(r"\]\(\.\./(.*?\.ipynb)\)", page)[1]
    assert source in RENDER


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
    rows = re.findall(r"^\| (\d\d) \| (.*?) \|", markdown("nbs/index.ipynb"), flags=re.MULTILINE)
    lessons = [Path(name).name for name in NOTEBOOKS if re.match(r"nbs/\d\d_", name)]
    there = {name[:2]: name for name in lessons}
    assert [number for number, _ in rows] == [f"{i:02}" for i in range(1, len(rows) + 1)]
    for number, lesson in rows:
        assert ("(planned)" in lesson) == (number not in there), f"lesson {number}: {lesson}"
        assert number not in there or there[number] in lesson
    assert set(there) <= {number for number, _ in rows}


def test_readme_is_made_from_the_index_and_its_picture_from_lesson_01():
    made = tool("readme")
    assert made.readme() == (ROOT / "README.md").read_text(), "run make readme"
    shown = (ROOT / "nbs/images/before_after.png").read_bytes()
    assert made.picture() == shown, "run make readme"


def test_readme_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert any(t.endswith("before_after.png") for t in targets)
    inside = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in inside if not (ROOT / t).exists()] == []


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
