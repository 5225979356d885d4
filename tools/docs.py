"""Build the website in _docs/: python tools/docs.py

Notebooks go through nbdev's processors into _proc/, next to one page of documentation a module,
and Quarto makes the site from there. Lessons are shown as they are; nothing is executed.
"""
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import live
import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.processors import FilterDefaults
from nbdev.showdoc import show_doc

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
HOME = """<!doctype html>
<meta charset="utf-8"><meta http-equiv="refresh" content="0; url=nbs/index.html">
<a href="nbs/index.html">sftlab</a>
"""


def pages(
    config:dict, # `_quarto.yml`, parsed
) -> list: # paths of the site's pages, relative to the top of the project
    "The pages that the site is made of, in its own order."
    return config["project"]["render"]


def split_title(
    notebook, # opens with `# Title`, perhaps `> one line`, perhaps more
):
    "Give title and quoted line a cell of their own: nbdev makes front matter of it."
    first = notebook.cells[0]
    title = re.match(r"# .*\n*(?:> .*\n*)?", first.source).group()
    rest = first.source[len(title):].strip()
    first.source = title
    if rest:
        notebook.cells.insert(1, mk_cell(rest, "markdown"))


def is_empty(
    cell, # a processed cell
) -> bool: # whether nothing is left of it but directives such as `default_exp`
    return all(line.startswith("#|") for line in cell.source.strip().splitlines())


def process(
    name:str, # a notebook, relative to the top of the project
    to:Path, # folder that Quarto will read
):
    "Write the notebook as Quarto wants it: front matter, no directives, no widgets."
    notebook = read_nb(ROOT / name)
    split_title(notebook)
    FilterDefaults()(notebook)
    notebook.cells = [cell for cell in notebook.cells if not is_empty(cell)]
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    write_nb(notebook, to / name)


def api_page(
    module:str, # name inside the package, such as `generation` or `tiny.world`
) -> str: # Markdown
    "Signature, parameters and docstring of everything that a module exports."
    loaded = importlib.import_module(f"sftlab.{module}")
    code = (ROOT / "sftlab" / f"{module.replace('.', '/')}.py").read_text()
    source = re.search(r"File to edit: (?:\.\./)+(.*?\.ipynb)", code)[1]
    text = [f"---\ntitle: sftlab.{module}\n---\n",
            f"Written and explained in [this notebook](../{source}).\n"]
    values = []
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isroutine(value) or inspect.isclass(value):
            text.append(show_doc(value, name=name, title_level=2)._repr_markdown_() + "\n")
        else:
            values.append(f"`{name}`")
    if values:
        text.append(f"---\n\nAlso exported, as values: {', '.join(values)}.\n")
    return "\n".join(text)


def prepare(
    to:Path, # folder to make, replaced where it exists
):
    "Everything that Quarto needs to make the site."
    shutil.rmtree(to, ignore_errors=True)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    for name in pages(config):
        if name.startswith("api/"):
            (to / "api").mkdir(parents=True, exist_ok=True)
            (to / name).write_text(api_page(Path(name).stem))
        else:
            process(name, to)
    for images in ROOT.glob("nbs/**/images"):
        shutil.copytree(images, to / images.relative_to(ROOT))
    live.site(to / "nbs/live")
    shutil.copy(ROOT / "_quarto.yml", to)


def main():
    if not shutil.which("quarto"):
        sys.exit("The website is made with Quarto, which is not on PATH: install it from "
                 "https://quarto.org/docs/get-started/ and run make docs again.")
    work, site = ROOT / "_proc", ROOT / "_docs"
    prepare(work)
    subprocess.run(["quarto", "render"], cwd=work, check=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work / "_docs", site)
    (site / "index.html").write_text(HOME)  # pages keep their folders, the front page too
    print(f"The website is in {site}: open {site / 'index.html'}")


if __name__ == "__main__":
    main()
