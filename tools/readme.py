"""Make README.md from nbs/index.ipynb: python tools/readme.py [FILE]

Links are made to work from the top of the project, where README.md is.
"""
import posixpath
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n"


def from_the_top(
    match, # of `](target`, the target relative to nbs/
) -> str: # the same, relative to the top of the project
    target = match[1]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    return "](" + posixpath.normpath(posixpath.join("nbs", target))


def readme() -> str:
    "The front page of the course as Markdown."
    text, _ = MarkdownExporter().from_filename(ROOT / "nbs/index.ipynb")
    return NOTE + re.sub(r"\]\(([^)\s]+)", from_the_top, text).strip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "README.md").write_text(readme(), encoding="utf-8")
