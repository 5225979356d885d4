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
    "labs": "Labs: cards, recovery, advice",
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


def parts(
    rows:list, # from `table`; a part begins where a row names it
) -> dict: # part -> rows
    "The lessons by part of the course."
    found = {}
    for row in rows:
        name = row.get("part") or next(reversed(found))
        found.setdefault(name, []).append(row)
    return found


def lesson_map(rows:list) -> str: # Markdown
    "What nbs/index.ipynb shows: a list for each part, which the website makes cards of."
    text = []
    for name, part in parts(rows).items():
        text += ["", f"### {name}", ""]
        for row in part:
            title = f"{row['number']:02} {row['title']}"
            name = f"{title} *(planned)*"
            if "notebook" in row:
                name = f"**[{title}]({row['notebook']}.ipynb)**"
            text.append(f"- {name}<br>{row['see'][0].upper()}{row['see'][1:]}")
    return "\n".join(text[1:]) + "\n"


def labs(root:Path) -> list: # of paths
    "The labs, from small to large."
    order = ("qlora_t4", "your_data", "bigger_card")
    found = {path.stem: path for path in sorted(root.glob("nbs/labs/*.ipynb"))}
    names = [name for name in order if name in found]
    return [found[name] for name in names + [name for name in found if name not in order]]


def lab_list(root:Path) -> str: # Markdown
    "What nbs/index.ipynb shows of the labs: the title of each, and the line below it."
    lines = []
    for path in labs(root):
        first = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        title, says = re.match(r"# (.*)\n+> (.*)", first).groups()
        lines.append(f"- **[{title}](labs/{path.name})**: {says}")
    return "\n".join(lines) + "\n"


def write_notebook(
    path:Path, # where to
    notebook:dict, # as read from JSON
):
    "Write a notebook as Jupyter does."
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", "utf-8")


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


HANDBOOK = [f"nbs/reference/{name}.ipynb" for name in ("start", "using", "cli", "glossary")]


def behind(root:Path) -> dict: # heading -> pages
    "The notebooks that are neither lessons nor the handbook, room by room."
    found = {}
    for room, heading in ROOMS.items():
        paths = sorted((root / "nbs/reference" / room).glob("*.ipynb"))
        names = [path.relative_to(root).as_posix() for path in paths]
        found[heading] = [name for name in names if name not in HANDBOOK]
    return {heading: names for heading, names in found.items() if names}


def sections(named:dict) -> list: # heading -> pages; as Quarto wants it
    return [dict(section=heading, contents=pages) for heading, pages in named.items()]


def reference(root:Path) -> dict: # heading -> pages
    "The pages about modules: those of lessons first, then room by room."
    taught = {row["exercise"].split("_", 1)[1] for row in written(root) if "exercise" in row}
    found = {}
    for name in modules(root):
        heading = "Lessons" if name in taught else ROOMS[name.rpartition(".")[0]]
        found.setdefault(heading, []).append(f"api/{name}.qmd")
    return found


def sidebars(root:Path) -> list: # of dicts, as Quarto wants them
    "One sidebar for what a learner reads, and one for what is inside: none holds it all."
    rows = written(root)
    exercises = [f"exercises/{row['exercise']}.ipynb" for row in rows if "exercise" in row]
    inside = dict(section="How it is built", contents=sections(behind(root)))
    lessons = {part: [f"nbs/{row['notebook']}.ipynb" for row in some if "notebook" in row]
               for part, some in parts(table(root)).items()}
    lessons = {part: pages for part, pages in lessons.items() if pages}
    found = {
        "Lessons": [dict(text="The course", href="nbs/index.ipynb"), *sections(lessons)],
        "Exercises": ["exercises/index.qmd", *exercises],
        "Labs": [path.relative_to(root).as_posix() for path in labs(root)],
        "Handbook": [name for name in HANDBOOK if (root / name).exists()],
        "Reference": ["api/index.qmd", *sections(reference(root)), inside],
    }
    return [dict(id=title.lower(), title=title, style="floating", contents=pages,
                 **{"collapse-level": 1 if title == "Reference" else 2})
            for title, pages in found.items() if pages]


def leaves(contents:list): # of a sidebar: pages, named pages, and sections of pages
    "The pages of a sidebar, in order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        elif "href" in entry:
            yield entry["href"]
        else:
            yield from leaves(entry["contents"])


def page_lists(root:Path) -> tuple: # of YAML: what to render, the sidebars
    "The two lists of pages in _quarto.yml, in the same order."
    bars = sidebars(root)
    pages = [page for bar in bars for page in leaves(bar["contents"])]
    return tuple(yaml.safe_dump(part, sort_keys=False, width=200) for part in (pages, bars))


def indented(text:str, by:int) -> str:
    return "".join(" " * by + line for line in text.splitlines(keepends=True))


def main(root:Path=ROOT):
    index = root / "nbs/index.ipynb"
    notebook = json.loads(index.read_text("utf-8"))
    lists = dict(lessons=lesson_map(table(root)), labs=lab_list(root))
    for cell in notebook["cells"]:
        for name, made in lists.items():
            source = "".join(cell["source"])
            if f"<!-- {name} -->" in source:
                text = between(source + "\n", name, f"\n{made}\n").rstrip("\n")
                cell["source"] = text.splitlines(keepends=True)
    write_notebook(index, notebook)
    exercises = root / "exercises/README.md"
    made = between(exercises.read_text("utf-8"), "exercises", exercise_list(table(root)))
    exercises.write_text(made, "utf-8")
    site = root / "_quarto.yml"
    render, sidebar = page_lists(root)
    made = between(site.read_text("utf-8"), "pages", indented(render, 4))
    site.write_text(between(made, "sidebar", indented(sidebar, 4)), "utf-8")


if __name__ == "__main__":
    main()
