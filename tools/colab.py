"""Make every notebook run on Colab: python tools/colab.py

Lessons, exercises and labs get two cells after their title: a badge that opens them on Colab, and
a cell that installs the course there. Their ids begin with `colab-`: by that the website leaves
them out, and this tool finds them again. Relative links become addresses, since a notebook that is
opened alone has no neighbours. All of it comes from `git_url` and `branch` in settings.ini: in a
fork, change those, and run `make lessons`.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

from sftlab.files.atomic import atomic_file
from sftlab.study.links import absolute_links, address, local_links
from sftlab.study.masters import make_notebooks, notebook_text
from sftlab.study.needs import NEEDS

ROOT = Path(__file__).resolve().parent.parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
MARK = "colab-"  # how the ids of our cells begin
CARDS = {"qlora_t4": "T4", "your_data": "T4", "bigger_card": "L4"}  # what Colab opens a lab with

# It installs once a session: a restarted notebook, run from its top, passes over it. datasets<5: a
# newer one would replace huggingface_hub too. No -q: it would hide Colab's button to restart.
INSTALL = """\
# On Colab, this installs the course. Anywhere else, it does nothing.
import sys
from importlib.metadata import distributions

if "google.colab" in sys.modules and not list(distributions(name="sftlab")):
    # PEFT refuses to work next to Colab's old torchao.
    %pip uninstall -q -y torchao
    %pip install {course} "datasets<5"
{more}\
    print("Installed. If Colab offers to restart the session, do that. Then: Runtime > Run all.")"""


def settings(root:Path=ROOT):
    ini = ConfigParser()
    ini.read(root / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def repository(root:Path=ROOT) -> tuple: # such as ("sftlab/sftlab", "main")
    "Owner and name on GitHub, and the branch that learners see."
    kept = settings(root)
    return re.sub(r"^https://github\.com/|/$", "", kept["git_url"]), kept["branch"]


def course_notebooks(root:Path=ROOT) -> dict: # path -> path of the notebook that a learner opens
    "Lessons, labs, and the masters of the exercises, relative to `root`."
    found = [*root.glob("nbs/[0-9]*.ipynb"), *root.glob("nbs/labs/*.ipynb"),
             *root.glob("exercises/solutions/*.ipynb")]
    paths = [path.relative_to(root).as_posix() for path in sorted(found)]
    return {path: path.replace("/solutions/", "/") for path in paths}


def colab_url(page:str, root:Path=ROOT) -> str: # `page`: such as "nbs/01_base_vs_instruct.ipynb"
    "The address that opens a notebook on Colab."
    return address(page, *repository(root))


def extras(page:str, root:Path=ROOT) -> list: # requirements
    "What a notebook needs besides the package."
    name = Path(page).stem if "/labs/" in page else Path(page).name[:2]
    lab = settings(root)["lab_requirements"].split()
    named = {re.match(r"[\w-]+", requirement)[0]: requirement for requirement in lab}
    return [named[package] for package, users in NEEDS.items() if name in users]


def our_cells(page:str, root:Path=ROOT) -> list: # of cells, in the form of a notebook's file
    "The badge, and the cell that installs."
    badge = f"[![Open in Colab]({BADGE})]({colab_url(page, root)})"
    kept = settings(root)
    course = f'"{kept["lib_name"]} @ git+{kept["git_url"]}@{kept["branch"]}"'
    needed = " ".join(f'"{requirement}"' for requirement in extras(page, root))
    more = f"    %pip install {needed}\n" if needed else ""
    code = INSTALL.format(course=course, more=more)
    kinds = dict(execution_count=None, outputs=[])
    return [dict(cell_type="markdown", id=f"{MARK}badge", metadata={}, source=[badge]),
            dict(cell_type="code", id=f"{MARK}install", metadata={},
                 source=code.splitlines(True), **kinds)]


def known_files(root:Path=ROOT) -> set: # of paths
    "What a link may lead to."
    found = [path for top in ("nbs", "exercises") for path in (root / top).rglob("*.*")]
    names = {path.relative_to(root).as_posix() for path in found}
    return {name for name in names if "/." not in name and "/solutions/" not in name}


def finished(notebook:dict, page:str, known:set, root:Path=ROOT) -> dict: # the notebook
    "A notebook with both cells after its title, addresses for links, and no state of widgets."
    cells = [c for c in notebook["cells"] if not c["id"].startswith(MARK)]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            text = local_links("".join(cell["source"]), page, known)
            cell["source"] = absolute_links(text, page, known, *repository(root)).splitlines(True)
    cells[1:1] = our_cells(page, root)
    metadata = {name: x for name, x in notebook["metadata"].items() if name != "widgets"}
    if Path(page).stem in CARDS:
        metadata |= dict(accelerator="GPU", colab=dict(gpuType=CARDS[Path(page).stem]))
    return notebook | dict(cells=cells, metadata=metadata)


def main(root:Path=ROOT):
    known = known_files(root)
    for path, page in course_notebooks(root).items():
        text = (root / path).read_text("utf-8")
        made = notebook_text(finished(json.loads(text), page, known, root))
        if made != text:
            with atomic_file(root / path) as file:
                file.write(made)
    make_notebooks(root / "exercises/solutions", root / "exercises")


if __name__ == "__main__":
    main()
