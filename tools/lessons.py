"""Bring all that lists lessons in step with the table tools/lessons.yml: python tools/lessons.py

That is the map in nbs/index.ipynb (and README.md, which is made from it), the pages in _quarto.yml,
and the list in exercises/README.md. Pages of the API and of the companions are found by looking.
"""
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # folder of nbs/reference -> heading in the sidebar
    "": "Loading, training, plots",
    "program": "The program: its commands",
    "guards": "Guards: what is refused",
    "files": "Files: what is read and written",
    "audit": "Audits: what went wrong in silence",
    "figures": "Figures of the lessons",
    "tiny": "The tiny model and its world",
    "study": "Exercises, experiments, speed",
}


def table(root:Path=ROOT) -> list: # of dicts, in the order of the course; `number` is added
    "The lessons, those that are planned too."
    rows = yaml.safe_load((root / "tools/lessons.yml").read_text("utf-8"))
    return [dict(row, number=n) for n, row in enumerate(rows, 1)]


def written(root:Path=ROOT) -> list: # of dicts
    "The lessons that are there."
    return [row for row in table(root) if "notebook" in row]


def between(
    text:str,
    name:str, # of the marks: <!-- name --> and <!-- /name -->, or the same after # in YAML
    made:str, # what goes between them
) -> str:
    "The text with what is between two marks replaced."
    marks = [rf"([ \t]*(?:<!--|#) {mark}{name}(?: -->)?[ \t]*\n)" for mark in ("", "/")]
    found, n = re.subn(marks[0] + ".*?" + marks[1], lambda m: m[1] + made + m[2], text, flags=re.S)
    if n != 1:
        sys.exit(f"the marks {name!r} and '/{name}' were found {n} times: they must be there once")
    return found


def lesson_map(rows:list) -> str: # Markdown
    "What nbs/index.ipynb shows."
    lines = ["| | lesson | what you will see |", "|---|---|---|"]
    for row in rows:
        name = row["title"] + " (planned)"
        if "notebook" in row:
            name = f"[{row['title']}]({row['notebook']}.ipynb)"
        lines.append(f"| {row['number']:02} | {name} | {row['see']} |")
    return "\n".join(lines) + "\n"


def exercise_list(rows:list) -> str: # Markdown
    "What exercises/README.md shows."
    lines = ["| | after lesson | what you write |", "|---|---|---|"]
    for row in rows:
        if "exercise" in row:
            name = f"[{row['exercise']}]({row['exercise']}.ipynb)"
            lines.append(f"| {name} | {row['number']:02} | {row['write']} |")
    return "\n".join(lines) + "\n"


def modules(root:Path) -> list: # such as ["generation", …, "tiny.world"]
    "The package's modules in the order of their pages: lessons, then the rest, then room by room."
    order = [row["exercise"].split("_", 1)[1] for row in written(root) if "exercise" in row]
    found = []
    for path in sorted(root.glob("sftlab/**/[!_]*.py")):
        name = ".".join(path.relative_to(root / "sftlab").with_suffix("").parts)
        if not name.startswith("study.checks"):   # answers to exercises
            found.append(name)
    def place(name):  # lessons as they come, then the top of the package, then the rooms
        room = list(ROOMS).index(name.rpartition(".")[0])
        return (name not in order, room, order.index(name) if name in order else 0, name)
    return sorted(found, key=place)


def behind(root:Path) -> dict: # heading -> pages
    "The notebooks that are not lessons, room by room."
    found = {}
    for room, heading in ROOMS.items():
        pages = sorted((root / "nbs/reference" / room).glob("*.ipynb"))
        found[heading] = [p.relative_to(root).as_posix() for p in pages if p.stem != "glossary"]
    return found


def page_lists(root:Path) -> tuple: # of YAML: what to render, the sidebar
    "The two lists of pages in _quarto.yml, in the same order."
    lessons = [f"nbs/{row['notebook']}.ipynb" for row in written(root)]
    rooms = {heading: pages for heading, pages in behind(root).items() if pages}
    api = [f"api/{name}.qmd" for name in modules(root)]
    glossary = "nbs/reference/glossary.ipynb"
    pages = ["nbs/index.ipynb", *lessons, glossary, *sum(rooms.values(), []), *api]
    sidebar = ["nbs/index.ipynb", dict(section="Lessons", contents=lessons), glossary]
    inside = [dict(section=heading, contents=pages) for heading, pages in rooms.items()]
    sidebar.append(dict(section="Behind the lessons", contents=inside))
    sidebar.append(dict(section="API", contents=api))
    return tuple(yaml.safe_dump(part, sort_keys=False, width=200) for part in (pages, sidebar))


def indented(text:str, by:int) -> str:
    return "".join(" " * by + line for line in text.splitlines(keepends=True))


def main(root:Path=ROOT):
    index = root / "nbs/index.ipynb"
    notebook = json.loads(index.read_text("utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "<!-- lessons -->" in source:
            made = between(source + "\n", "lessons", "\n" + lesson_map(table(root)) + "\n")
            cell["source"] = made.rstrip("\n").splitlines(keepends=True)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    index.write_text(text + "\n", "utf-8")
    exercises = root / "exercises/README.md"
    made = between(exercises.read_text("utf-8"), "exercises", exercise_list(table(root)))
    exercises.write_text(made, "utf-8")
    site = root / "_quarto.yml"
    render, sidebar = page_lists(root)
    made = between(site.read_text("utf-8"), "pages", indented(render, 4))
    site.write_text(between(made, "sidebar", indented(sidebar, 6)), "utf-8")


if __name__ == "__main__":
    main()
