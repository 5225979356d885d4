"""Build the website in _docs/: python tools/docs.py

Notebooks are written to _proc/ as Quarto wants them, with a page of documentation for each module,
and Quarto makes the site from there. Nothing is executed: outputs are shown as they are kept.
"""
import ast
import base64
import json
import posixpath
import re
import shutil
import struct
import subprocess
import sys
from configparser import ConfigParser
from functools import lru_cache
from html import escape
from pathlib import Path

import api
import colab
import lessons
import live
import yaml
from execnb.nbio import mk_cell, read_nb, write_nb

from sftlab.study.links import local_links

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
SETUP = re.compile(r"(?:#.*\n|\s*\n)*(?:import|from) ")
EXERCISES = "exercises/index.qmd"  # made from exercises/README.md
# what pandas puts before each table; tools/site/rules.scss does better
PANDAS = re.compile(r"<style scoped>.*?</style>\s*", re.S)
STYLE = re.compile(r"<style\b.*?</style>\s*", re.S)
PICTURE = re.compile(r'(<img\b[^>]*?)src="data:image/png;base64,([^"]+)"')
LINK = re.compile(r'(\]\(|\b(?:href|src|srcset)=")([^)\s"]+)(?=[)\s"])')
IMAGE = re.compile(r"^!\[([^\]]+)\]\((\S+)\)$", re.M)
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)
PERCENT = re.compile(r"(?<=\d) %")
# Where the site's search may find something, and what it then says of a heading there.
PLACES = {
    r"nbs/\d\d_": "",
    "nbs/labs/": ", in a lab on a graphics card",
    "exercises/": ", in an exercise of the course",
    "nbs/[^/]*$": ", on a page about the course",
    "nbs/reference/[^/]*$": ", in a guide to the programs",
    "api/": ", in the reference of the package",
    "": ", in how the course is built"}


@lru_cache(None)
def settings() -> dict: # name -> value
    "What settings.ini says of the project."
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def code_at(
    kind:str="blob", # or `raw`
) -> str: # address of the project's files, ending in /
    return f"{settings()['git_url']}/{kind}/{settings()['branch']}/"


def site_at() -> str: # address of the site, ending in /
    return settings()["doc_host"] + settings()["doc_baseurl"].rstrip("/") + "/"


@lru_cache(None)
def pages() -> tuple: # paths of the site's pages, relative to the top of the project
    "The pages that the site is made of, in its own order."
    return tuple(yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))["project"]["render"])


@lru_cache(None)
def lesson_rows() -> dict: # page -> row of tools/lessons.yml
    return {f"nbs/{row['notebook']}.ipynb": row for row in lessons.written()}


@lru_cache(None)
def exercise_rows() -> dict: # page -> row of tools/lessons.yml
    return {f"exercises/{row['exercise']}.ipynb": row for row in lessons.written()
            if "exercise" in row}


@lru_cache(None)
def page_title(
    name:str, # of a notebook
) -> str:
    "The notebook's own title, after its number where it is a lesson."
    first = "".join(json.loads((ROOT / name).read_text("utf-8"))["cells"][0]["source"])
    title = re.match(r"# (.*)", first)[1]
    row = lesson_rows().get(name)
    return f"{row['number']} · {title}" if row else title


def opening(
    notebook, # begins with `# Title`, perhaps `> one line`, perhaps more
) -> str: # the line, or ""
    "Take title and line out of a notebook: they become its front matter."
    first = notebook.cells[0]
    found = re.match(r"# .*\n*(?:> (.*)\n*)?", first.source)
    first.source = first.source[found.end():].strip()
    return api.without_links(found[1] or "")


def directives(
    source:str, # of a code cell
) -> tuple: # of lines: nbdev's directives, without their mark; what else there is
    "Take out what is for nbdev: `export`, `default_exp` and the like, not `code-fold: true`."
    lines = source.splitlines()
    ours = [line for line in lines if re.match(r"#\| *\w+(?: [\w.]+)?\s*$", line)]
    return [line[2:].strip() for line in ours], [line for line in lines if line not in ours]


def only_imports(
    code:str, # of a cell, without directives
) -> bool:
    "Whether there are imports and no more: calls such as `optuna.logging.set_verbosity(…)` pass."
    try:
        found = ast.parse(code).body
    except SyntaxError:  # one of IPython's commands
        return False
    def set_up(line): return isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)
    def imports(line): return isinstance(line, ast.Import | ast.ImportFrom)
    return bool(found) and imports(found[0]) and all(imports(x) or set_up(x) for x in found)


def for_reading(
    cell, # of code
):
    """Directives go. What is folded or hidden is shown folded, for nobody can follow without its
    imports; and so are imports alone, for a page does not begin with them."""
    marks, lines = directives(cell.source)
    if "hide" in marks:
        cell.outputs = []
    fold = "hide" in marks or "#| code-fold: true" in lines
    if fold or len(lines) > 3 and only_imports("\n".join(lines)) and not cell.outputs:
        lines = [line for line in lines if "code-fold" not in line]
        code = "\n".join(line for line in lines if not line.startswith("#|"))
        about = "Imports and set-up" if SETUP.match(code) else "Show the code"
        fold = ["#| code-fold: true", f'#| code-summary: "{about}"'] if code.strip() else []
        lines = fold + lines
    cell.source = "\n".join(lines)


def one_fold(
    cells:list, # as `for_reading` left them
) -> list: # the same, where one fold of imports follows another, in one
    head = '#| code-fold: true\n#| code-summary: "Imports and set-up"\n'
    def folded(cell): return cell.source.startswith(head) and not cell.get("outputs")
    kept = []
    for cell in cells:
        if kept and folded(kept[-1]) and folded(cell):
            kept[-1].source += "\n\n" + cell.source.removeprefix(head)
        else:
            kept.append(cell)
    return kept


def as_raw_html(
    html:str, # of an output
) -> str: # Markdown that shows it
    "Quarto loads require.js and jQuery from elsewhere for a notebook with HTML outputs: not so."
    return f"````{{=html}}\n{html.strip()}\n````\n"


def picture_files(
    html:str, # with pictures in it
    name:str, # of the page
    to:Path, # folder that Quarto reads
) -> str: # the same with pictures that are files
    "A page is read sooner when its pictures come after it, to a place that is kept for them."
    folder = f"pictures/{Path(name).with_suffix('').as_posix()}"

    def write(found):
        (to / folder).mkdir(parents=True, exist_ok=True)
        path = f"{folder}/{len(list((to / folder).iterdir())) + 1}.png"
        data = base64.b64decode(found[2])
        (to / path).write_bytes(data)
        size = ""
        if width := re.search(r'\bwidth="(\d+)"', found[1]):
            wide, tall = struct.unpack(">II", data[16:24])
            size = f'height="{round(int(width[1]) * tall / wide)}" '
        return f'{found[1]}{size}loading="lazy" src="{relative(path, name)}"'
    return PICTURE.sub(write, html)


def shown(
    output, # of a cell
    name:str, # of the page
    to:Path, # folder that Quarto reads
    styles:list, # what goes into the page's head, added to
):
    "An output as the site shows it, or None: no warnings, no widgets that nothing would drive."
    data = output.get("data", {})
    if output.get("name") == "stderr" or WIDGET in data:
        return None
    if "text/html" in data and "text/markdown" not in data:
        html = PANDAS.sub("", "".join(data["text/html"]))
        styles += STYLE.findall(html)
        html = picture_files(STYLE.sub("", html), name, to)
        output["data"] = {"text/markdown": as_raw_html(html)}
    return output


def relative(
    path:str, # of a file of the site, perhaps with an anchor
    name:str, # of the page that leads there
) -> str:
    return posixpath.relpath(path, posixpath.dirname(name) or ".")


def candidates(
    path:str, # what a link leads to, relative to the page
    name:str, # of the page
):
    "Where a link may lead: in this project, or in a learner's copy, where exercises are inside."
    yield posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    if name.startswith("exercises/"):
        yield posixpath.normpath(posixpath.join("nbs", posixpath.dirname(name), path))
    yield posixpath.normpath(posixpath.join(posixpath.dirname(name), path)).removeprefix("nbs/")


def linked(
    target:str, # of a link in a notebook
    name:str, # of the page
) -> str: # the same on the site
    "Links to pages of the site lead to these; links to other files lead to the project."
    path, mark, rest = target.partition("#")
    for start in (code_at(), site_at()):
        if target.startswith(start):
            inside = path.removeprefix(start)
            if start == site_at() or inside in pages():
                return relative(inside or "index.html", name) + mark + rest
    if not path or re.match(r"[a-z]+:|/", path):
        return target
    for place in candidates(path, name):
        place = EXERCISES if place in ("exercises/README.md", "exercises") else place
        if place in pages():
            return relative(place, name) + mark + rest
    place = next(candidates(path, name))
    if (ROOT / place).exists() and not place.startswith(("nbs/images/", "nbs/live/")):
        return code_at() + place + mark + rest
    return target


def described(
    text:str, # Markdown
) -> str: # the same, with pictures as HTML
    "Of a picture alone in its paragraph Quarto makes a caption, and forgets to describe it."
    return IMAGE.sub(lambda m: f'<img alt="{escape(m[1])}" src="{m[2]}">', text)


@lru_cache(None)
def known() -> frozenset: # paths
    "What a link of a lesson or an exercise may lead to."
    return frozenset(colab.known_files())


def with_links(
    text:str, # Markdown of a page
    name:str, # of the page
) -> str: # the same, its links as on the site
    "No line ends between a number and its %. Code is left as it is."
    parts = CODE.split(text)
    if name in colab.course_notebooks().values():  # there links are addresses, for Colab
        parts[::2] = [local_links(part, name, known()) for part in parts[::2]]
    parts[::2] = [LINK.sub(lambda m: m[1] + linked(m[2], name), described(part))
                  for part in parts[::2]]
    parts[::2] = [PERCENT.sub("\N{NO-BREAK SPACE}%", part) for part in parts[::2]]
    return "".join(parts)


def module_of(
    notebook, # as it is kept
) -> str: # the module that it exports, or ""
    named = [re.search(r"^#\| *default_exp (\S+)", cell.source, re.M) for cell in notebook.cells]
    return next((found[1] for found in named if found), "")


def ways(
    name:str, # of a notebook
    module:str, # that it exports, or ""
) -> str: # Markdown, one line
    "What a reader may do with the page: open, download, do its exercises, look things up."
    links = [f'<a href="{relative("download/" + name, name)}" download>Download</a>']
    if name in colab.course_notebooks().values():  # what can install the course there
        links.insert(0, f"[Open in Colab]({colab.colab_url(name)})")
    if row := lesson_rows().get(name):
        if "exercise" in row:
            page = f"exercises/{row['exercise']}.ipynb"
            links.append(f"[Exercises]({relative(page, name)})")
    if row := exercise_rows().get(name):
        lesson = f"nbs/{row['notebook']}.ipynb"
        links.append(f"[Lesson {page_title(lesson)}]({relative(lesson, name)})")
    if f"api/{module}.qmd" in pages():
        links.append(f"[Reference: `sftlab.{module}`]({relative(f'api/{module}.qmd', name)})")
    links.append(f"[View source]({code_at()}{name})")
    return "::: {.page-ways}\n" + "\n".join(links) + "\n:::"


def front_matter(
    name:str, # of the page
    line:str, # what the page is about
    styles:list, # of outputs
) -> str: # YAML between two lines
    "Title, description and what else Quarto is told about a page."
    found = dict(title=page_title(name), description=line)
    if name == "nbs/index.ipynb":
        found["image"] = relative("social-card.png", name)  # not the page's first picture
        found["pagetitle"] = f"{settings()['title']}: {settings()['description']}"
    if name.startswith("exercises/"):
        found["repo-actions"] = False  # made from its master: nothing to edit
    icon = relative("apple-touch-icon.png", name)
    head = [f'<link rel="apple-touch-icon" href="{icon}">', *dict.fromkeys(styles)]
    found["include-in-header"] = dict(text="".join(head))
    head = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n"


def process(
    name:str, # a notebook, relative to the top of the project
    to:Path, # folder that Quarto will read
):
    "Front matter, links of the site, and no cells or directives that are for Colab or nbdev."
    notebook, styles = read_nb(ROOT / name), []
    notebook.cells = [c for c in notebook.cells if not c.id.startswith(colab.MARK)]
    module, line = module_of(notebook), opening(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, name)
        if cell.cell_type == "code":
            for_reading(cell)
            made = [shown(output, name, to, styles) for output in cell.outputs]
            cell.outputs = [output for output in made if output]
    head = [mk_cell(front_matter(name, line, styles), "raw")]
    if name != "nbs/index.ipynb":
        head.append(mk_cell(ways(name, module), "markdown"))
    notebook.cells = head + one_fold([cell for cell in notebook.cells if cell.source.strip()])
    notebook.metadata.pop("widgets", None)
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, to / name)


def exercise_index() -> str: # Markdown
    "exercises/README.md as a page."
    text = (ROOT / "exercises/README.md").read_text("utf-8")
    body = text.partition("\n")[2]
    head = ("---\ntitle: Exercises\n"
            "description: A notebook of questions for each lesson, each with a check and hints.\n"
            "repo-actions: false\n---\n")
    return head + with_links(body, EXERCISES)


def write_page(
    name:str, # of a page, such as `api/lora.qmd`
    to:Path, # folder that Quarto will read
):
    "Write a page that is not a notebook."
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    if name == EXERCISES:
        text = exercise_index()
    elif name == "api/index.qmd":
        text = api.index_page(lessons.reference(ROOT))
    else:
        module = Path(name).stem
        text = api.api_page(module, page_title(api.module(module).notebook), code_at())
    (to / name).write_text(text, "utf-8")


def prepare(
    to:Path, # folder to make, replaced where it exists
):
    "Everything that Quarto needs to make the site."
    shutil.rmtree(to, ignore_errors=True)
    for name in pages():
        if name.endswith(".ipynb"):
            process(name, to)
        else:
            write_page(name, to)
    for images in ROOT.glob("nbs/**/images"):
        shutil.copytree(images, to / images.relative_to(ROOT))
    live.site(to / "nbs/live")
    shutil.copytree(ROOT / "nbs/_site", to, dirs_exist_ok=True)  # icons, card, 404.html
    shutil.copytree(ROOT / "tools/site", to / "tools/site")
    shutil.copy(ROOT / "_quarto.yml", to)


def home() -> str: # HTML
    "The page at the top of the site, which leads to the front page: pages keep their folders."
    about, title = settings()["description"], settings()["title"]
    at = site_at() + "nbs/index.html"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {about}</title>
<meta name="description" content="{about}">
<meta http-equiv="refresh" content="0; url=nbs/index.html">
<link rel="canonical" href="{at}">
<link rel="icon" href="favicon.svg">
<meta property="og:title" content="{title}">
<meta property="og:description" content="{about}">
<meta property="og:url" content="{at}">
<meta property="og:image" content="{site_at()}social-card.png">
<meta name="twitter:card" content="summary_large_image">
</head>
<body><p><a href="nbs/index.html">{title}: {about}</a></p></body>
</html>
"""


def search_rank(
    entry:dict, # of search.json
) -> int: # the lower, the earlier
    "Lessons before labs and exercises, these before the rest, the insides of the package last."
    href = entry["href"].partition("#")[0]
    return next(n for n, start in enumerate(PLACES) if re.match(start, href))


def searchable(
    entries:list, # of search.json
) -> list: # the same, in the order in which equal finds are shown
    """Words lead to lessons first. A find counts more in a short heading, so those of other pages
    get longer ones, without the page's title; of the reference, names are searched and not their
    tables."""
    for entry in entries:
        rank = search_rank(entry)
        if entry.get("section"):
            entry["section"] += list(PLACES.values())[rank]
        if rank > 4:
            entry["title"] += list(PLACES.values())[rank]
        if entry["href"].startswith("api/"):
            entry["text"] = ""
    return sorted(entries, key=search_rank)


def finish(
    site:Path, # what Quarto has made
):
    "What Quarto does not do: the first page, the order of finds, the notebooks to download."
    (site / "index.html").write_text(home(), "utf-8")
    found = json.loads((site / "search.json").read_text("utf-8"))
    (site / "search.json").write_text(json.dumps(searchable(found), ensure_ascii=False), "utf-8")
    for name in pages():
        if name.endswith(".ipynb"):
            (site / "download" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, site / "download" / name)


def main():
    if not shutil.which("quarto"):
        sys.exit("The website is made with Quarto, which is not on PATH: install it from "
                 "https://quarto.org/docs/get-started/ and run make docs again.")
    work, site = ROOT / "_proc", ROOT / "_docs"
    prepare(work)
    subprocess.run(["quarto", "render"], cwd=work, check=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work / "_docs", site)
    finish(site)
    print(f"The website is in {site}: open {site / 'index.html'}")


if __name__ == "__main__":
    main()
