"""What looks at the rendered website finds each kind of fault, and nothing in a site without any.

Where the website has been built (`make docs`), it is looked at too.
"""
import base64
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "tools/check_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title} – sftlab</title>
<meta name="description" content="What it is about."><meta property="og:title" content="{title}">
<meta property="og:image" content="https://sftlab.github.io/sftlab/card.png">
<meta name="twitter:card" content="summary_large_image">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="canonical" href="https://sftlab.github.io/sftlab/"><link rel="icon" href="{up}mark.png">
<link rel="stylesheet" href="{up}site_libs/bootstrap/bootstrap-1.min.css">
<style>body {{ background: #fff; color: #222 }} pre {{ overflow-x: auto }}</style>
</head><body><h1 id="top">{title}</h1><p>{words}</p>
<p><a href="{up}nbs/01_a.html#top">one</a> <a href="https://github.com/sftlab">elsewhere</a>
<a href="#top">up</a> <a href="{up}download/a.ipynb" download>file</a></p>
<img src="{up}mark.png" alt="A dot"><svg><title>not the title</title></svg>
</body></html>
"""
COLORS = dict(ink="#222", paper="#fff", quiet="#555", link="#00509d", line="#ccc", code="#701a5a",
              bar="#1b3a5b", side="#fff", foot="#f2f4f7") | {
    "code-paper": "#f2f4f7", "block-paper": "#f6f8fa", "bar-ink": "#fff", "side-ink": "#444",
    "foot-ink": "rgb(60, 60, 60)"}
DARK = dict(zip(COLORS, ["#ddd", "#111", "#aaa", "#7ab8f5", "#333", "#f0a6d2", "#10202f", "#111",
                         "#1e2328", "#222", "#1e2328", "#ddd", "#ccc", "#ccc"]))
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
                         "WjR9awAAAABJRU5ErkJggg==")


def sheet(colors):
    found = "".join(f"--site-{name}: {value};" for name, value in colors.items())
    return f"/* https://elsewhere.example */:root{{{found}}} hr{{background:url(data:image/png;,)}}"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, "utf-8")


@pytest.fixture
def site(tmp_path):
    "A small website without a fault."
    for name, title in (("index.html", "first"), ("nbs/index.html", "sftlab"),
                        ("nbs/01_a.html", "1 · A"), ("api/a.html", "sftlab.a")):
        up = "../" * name.count("/")
        write(tmp_path / name, PAGE.format(title=title, up=up, words=f"About {title}."))
    write(tmp_path / "mark.png", PIXEL)
    for name in ("download/a.ipynb", "nbs/01_a.ipynb"):  # Quarto copies sources that it leaves out
        write(tmp_path / name, "{}")
    for dark, colors, ink in (("", COLORS, "#004085"), ("dark-", DARK, "#8ddb8c")):
        write(tmp_path / f"site_libs/bootstrap/bootstrap-{dark}1.min.css", sheet(colors))
        write(tmp_path / f"site_libs/quarto-html/quarto-syntax-highlighting-{dark}2.css",
              f":root {{ --quarto-hl-kw-color: {ink}; --quarto-hl-bu-color: inherit; }}")
    entries = [dict(href=name, text="words") for name in ("nbs/01_a.html", "api/a.html")]
    write(tmp_path / "search.json", json.dumps(entries))
    return tmp_path


def test_a_site_without_a_fault_is_accepted(checker, site):
    assert checker.check(site) == []


A, CSS = "nbs/01_a.html", "site_libs/bootstrap/bootstrap-1.min.css"
DARK_CSS = "site_libs/bootstrap/bootstrap-dark-1.min.css"
FAULTS = {  # what is wrong: file, what is put in place of what, words of the fault
    "a link to no page": (A, 'href="../nbs/01_a.html#top"', 'href="02_b.html"', "02_b.html leads"),
    "a notebook that is no page": (A, 'href="#top"', 'href="02_b.ipynb"', "02_b.ipynb leads"),
    "the source of a page": (A, 'href="#top"', 'href="01_a.ipynb"', "the source of a page"),
    "a link to no place": (A, "01_a.html#top", "01_a.html#none", "not in the page"),
    "no place in the same page": (A, 'href="#top"', 'href="#none"', "#none leads to a place"),
    "a lost download": (A, "download/a.ipynb", "download/b.ipynb", "leads nowhere"),
    "no picture": (A, 'img src="../mark.png"', 'img src="../gone.png"', "gone.png is not there"),
    "no style sheet": (A, "bootstrap-1.min", "bootstrap-9.min", "is not there"),
    "no picture of another size": (A, "<img ", '<img srcset="x.png 1x, ../mark.png 2x" ',
                                   "x.png is not there"),
    "a script from elsewhere": (A, "</body>", '<script src="https://cdn.example/r.js"></script>',
                                "loads https://cdn.example/r.js"),
    "the same without https:": (A, "</body>", '<script src="//cdn.example/r.js"></script>',
                                "loads //cdn.example"),
    "a font from elsewhere": (A, '<link rel="icon"', '<link rel="preconnect" '
                              'href="https://fonts.example"><link rel="icon"', "fonts.example"),
    "a picture from elsewhere": (A, 'src="../mark.png"', 'src="https://x.example/a.png"',
                                 "loads https://x.example/a.png"),
    "a style from elsewhere": (A, "<style>", '<style>@import "https://x.example/a.css";',
                               "loads https://x.example/a.css"),
    "a font in a sheet": (CSS, ":root", "@import url(https://fonts.example/css);:root",
                          "bootstrap-1.min.css: loads https://fonts.example"),
    "a background from elsewhere": (CSS, "data:image/png;,", "'https://x.example/p.png'",
                                    "loads https://x.example/p.png"),
    "no title": (A, "<title>1 · A – sftlab</title>", "", "has no title"),
    "the title of another page": (A, "<title>1 · A", "<title>sftlab.a", "one title"),
    "no language": (A, ' lang="en"', "", "language"),
    "no description": (A, "What it is about.", "", "has no description"),
    "no card": (A, 'name="twitter:card"', 'name="other"', "has no twitter:card"),
    "no name when shared": (A, 'property="og:title"', 'property="x"', "has no og:title"),
    "a picture that says nothing": (A, 'alt="A dot"', 'alt=""', "has no description"),
    "a picture without alt": (A, ' alt="A dot"', "", "mark.png has no description"),
    "a picture that moves the text": (A, "<img ", '<img loading="lazy" width="1" ',
                                      "mark.png has no width and height"),
    "pale text": (CSS, "--site-side-ink: #444", "--site-side-ink: #999",
                  "light theme: site-side-ink on site-side"),
    "dark on dark": (DARK_CSS, "--site-code: #f0a6d2", "--site-code: #701a5a", "dark theme"),
    "a colour that is missing": (DARK_CSS, "--site-foot-ink: #ccc;", "", "no colour site-foot-ink"),
    "pale code": ("site_libs/quarto-html/quarto-syntax-highlighting-2.css", "#004085", "#aabbcc",
                  "quarto-hl-kw-color on site-block-paper"),
    "styles are searched": ("search.json", '"words"', '".dataframe tbody tr {"', "style sheet"),
    "the reference is found first": ("search.json", "nbs/01_a.html", "nbs/a.html",
                                     "lessons do not come first")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(checker, site, fault):
    name, old, new, words = FAULTS[fault]
    text = (site / name).read_text("utf-8")
    assert old in text
    (site / name).write_text(text.replace(old, new, 1), "utf-8")
    if fault == "the reference is found first":
        entries = json.loads((site / name).read_text("utf-8"))
        entries.append(dict(href="nbs/02_b.html", text="words"))
        (site / name).write_text(json.dumps(entries), "utf-8")
    found = checker.check(site)
    assert len(found) == 1 and words in found[0], found


def test_heavy_pages_are_found_and_pictures_that_wait_are_not_counted(checker, site):
    noise = os.urandom(checker.LARGEST)
    (site / "mark.png").write_bytes(noise)
    found = checker.check(site)
    assert len(found) == 4 and all("bytes, more than" in fault for fault in found)
    for path in site.rglob("*.html"):
        late = '<img loading="lazy" width="1" height="1" '
        path.write_text(path.read_text("utf-8").replace("<img ", late), "utf-8")
    assert checker.check(site) == []


def test_colours_are_read_as_they_are_written(checker):
    written = ["#FFF", "#0b5cad", "rgb(255, 0, 16)", "rgba(1,2,3,1)", "white"]
    assert [checker.color(text) for text in written] == [
        "#ffffff", "#0b5cad", "#ff0010", "#010203", "#ffffff"]
    assert [checker.color(text) for text in ("inherit", "rgba(1,2,3,.5)", "")] == ["", "", ""]


def test_our_own_styles_can_be_read_in_both_themes(checker):
    "The same pairs, from what the themes are made of: no site is needed."
    for theme in ("light", "dark"):
        source = (ROOT / f"tools/site/{theme}.scss").read_text("utf-8")
        given = dict(re.findall(r"^\$([\w-]+): (#\w+);", source, flags=re.M))
        rules = (ROOT / "tools/site/rules.scss").read_text("utf-8")
        named = dict(re.findall(r"--site-([\w-]+): #\{\$([\w-]+)\}", rules))
        colors = {name: checker.color(given[variable]) for name, variable in named.items()}
        code = json.loads((ROOT / f"tools/site/code-{theme}.theme").read_text("utf-8"))
        assert checker.color(code["background-color"]) == colors["block-paper"]
        for text, paper in checker.PAIRS:
            assert checker.contrast(colors[text], colors[paper]) >= checker.LEAST, (text, paper)
        for kind, style in code["text-styles"].items():
            ink = style["text-color"]
            assert checker.contrast(ink, colors["block-paper"]) >= checker.LEAST, kind


@pytest.fixture(scope="module")
def browser():
    from lab import QUIET, find_browser
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_browser(), args=QUIET)
        yield started
        started.close()


SEEN = {  # what only a browser knows: put into a page, words of the fault
    "a wide word": (f"<p>{'x' * 300}</p>", "slides sideways"),
    "pale text": ('<p style="color:#999">pale</p>', "contrast 2.8"),
    "pale by opacity": ('<p style="opacity:.4">pale</p>', "contrast"),
    "a script that fails": ("<script>define(1)</script>", "define is not defined"),
    "a script that asks elsewhere": ("<script>fetch('http://127.0.0.1:9/x').catch(e => 0)</script>",
                                     "asks for http://127.0.0.1:9/x")}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *SEEN])
def test_a_browser_finds_what_only_it_can(checker, browser, site, fault):
    text = (site / A).read_text("utf-8") + f"<pre>{'x' * 300}</pre>"  # which scrolls in its box
    made, words = SEEN.get(fault, ("", ""))
    (site / A).write_text(text + made, "utf-8")
    with checker.server(site) as address:
        context = browser.new_context(viewport=dict(width=checker.PHONE, height=800))
        found = checker.look(context, A, address, "light")
        context.close()
    assert (found == []) if not fault else len(found) == 1 and words in found[0], found


@pytest.mark.skipif(not (ROOT / "_docs/index.html").exists(), reason="make docs has not been run")
def test_the_website_that_was_built_has_no_fault(checker):
    assert checker.check(ROOT / "_docs") == []
