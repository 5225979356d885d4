"""Make README.md from nbs/index.ipynb: python tools/readme.py

Links are made to work from the top of the project, where README.md is. The front page's picture is
the one that lesson 01 draws.
"""
import base64
import json
import posixpath
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n"


LINK = re.compile(r'(\]\(|\b(?:src|srcset)=")([^)\s"]+)')


def from_the_top(
    match, # of LINK, the target relative to nbs/
) -> str: # the same, relative to the top of the project
    target = match[2]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    return match[1] + posixpath.normpath(posixpath.join("nbs", target))


def readme() -> str:
    "The front page of the course as Markdown."
    text, _ = MarkdownExporter().from_filename(ROOT / "nbs/index.ipynb")
    return NOTE + LINK.sub(from_the_top, text).strip() + "\n"


def picture() -> bytes: # PNG
    "The picture that lesson 01 draws in its cell labelled `before-after`."
    lesson = json.loads((ROOT / "nbs/01_base_vs_instruct.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in lesson["cells"]]
    place = next(i for i, s in enumerate(sources) if s.startswith("#| label: before-after"))
    shown = [o["data"] for o in lesson["cells"][place]["outputs"] if "data" in o]
    html = next("".join(data["text/html"]) for data in shown if "text/html" in data)
    return base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", html)[1])


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    (ROOT / "nbs/images").mkdir(exist_ok=True)
    (ROOT / "nbs/images/before_after.png").write_bytes(picture())
