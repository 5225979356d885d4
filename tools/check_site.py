"""Look at the website as it will be published: python tools/check_site.py _docs

Links and anchors lead somewhere, nothing comes from elsewhere, pages say what they are and what
their pictures show, they are light, and every text can be read in both themes. Where there is a
browser: no page slides sideways on a phone, and a search finds lessons first.
"""
import functools
import gzip
import http.server
import json
import re
import shutil
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sftlab.plots import contrast

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 300_000  # bytes of a page, as a server sends it
LEAST = 4.5  # contrast of a text (WCAG 2.2, AA)
PHONE = 390  # pixels
WAIT = 120_000  # milliseconds that a page may take on a busy machine
NO_PAGES = ("nbs/live/", "site_libs/", "download/")  # the live page has tests of its own
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"),
          ("video", "src"), ("audio", "src"), ("embed", "src"), ("object", "data")}
LOADED_LINKS = {"stylesheet", "icon", "apple-touch-icon", "preload", "prefetch", "manifest",
                "modulepreload", "preconnect", "dns-prefetch", "shortcut icon"}
PAIRS = [("ink", "paper"), ("quiet", "paper"), ("link", "paper"), ("ink", "block-paper"),
         ("quiet", "block-paper"), ("code", "code-paper"), ("link", "code-paper"),
         ("bar-ink", "bar"), ("side-ink", "side"), ("link", "side"), ("foot-ink", "foot")]
QUERIES = ("LoRA", "packing", "memory", "chat template", "perplexity", "quantize")


class Page(HTMLParser):
    "What a page holds, as far as it can be wrong."

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.metas = set(), [], [], {}
        self.undescribed, self.eager, self.sizeless = [], [], []
        self.title = self.lang = ""
        self._in_title = self._in_svg = False
        self.feed(text)
        styles = re.findall(r"<style\b[^>]*>(.*?)</style>|\bstyle=\"([^\"]*)\"", text, re.S)
        self.loads += [target for pair in styles for target in css_loads("".join(pair))]

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "html":
            self.lang = given.get("lang", "")
        if tag == "title" and not self.title and not self._in_svg:
            self._in_title = True
        if tag == "svg":
            self._in_svg = True
        if tag == "meta":
            self.metas[given.get("name", given.get("property", ""))] = given.get("content", "")
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in LOADED_LINKS:
            self.loads.append(given.get("href", ""))
        if tag == "img":
            self.picture(given)
        self.loads += [given[name] for name in given if (tag, name) in LOADED]
        for part in given.get("srcset", "").split(","):
            self.loads += part.split()[:1]

    def picture(self, given):
        if not given.get("alt", "").strip() and given.get("role") != "presentation":
            self.undescribed.append(given.get("src", "")[:80])
        if given.get("loading") != "lazy":
            self.eager.append(given.get("src", ""))
        elif not (given.get("width") and given.get("height")):
            self.sizeless.append(given.get("src", ""))

    def handle_endtag(self, tag):
        self._in_title = self._in_title and tag != "title"
        self._in_svg = self._in_svg and tag != "svg"

    def handle_data(self, data):
        if self._in_title:
            self.title += data


def css_loads(
    css:str, # a style sheet
) -> list: # what it loads
    without = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    quoted = re.findall(r"@import\s+[\"']([^\"']+)", without)
    return quoted + re.findall(r"url\(\s*[\"']?((?!data:|#)[^\"')]+)", without)


def read(
    site:Path, # folder of the website
) -> dict: # path, relative to the folder -> `Page`
    "All pages."
    paths = {path.relative_to(site).as_posix(): path for path in sorted(site.rglob("*.html"))}
    return {name: Page(path.read_text("utf-8")) for name, path in paths.items()
            if not name.startswith(NO_PAGES)}


def place(
    site:Path,
    name:str, # of a page or style sheet
    target:str, # what it leads to: a path
) -> Path: # of the file
    "The file that a relative address means."
    path = unquote(urlsplit(target).path)
    base = site if path.startswith("/") else (site / name).parent
    found = (base / path.lstrip("/")).resolve()
    return found / "index.html" if found.is_dir() else found


def is_elsewhere(target:str) -> bool: # whether an address names a host
    return bool(re.match(r"(?:https?:)?//", target))


def dead_links(site:Path, pages:dict) -> list: # of faults
    "Links to pages, files or places in pages that are not there."
    found = []
    for name, page in pages.items():
        for link in dict.fromkeys(page.links):
            if is_elsewhere(link) or re.match(r"(?:mailto|javascript|data):", link):
                continue
            path, anchor = urlsplit(link).path, unquote(urlsplit(link).fragment)
            file = place(site, name, link) if path else site / name
            if not file.is_file():
                found.append(f"{name}: the link {link} leads nowhere")
                continue
            if file.suffix in (".ipynb", ".qmd") and "download/" not in link:
                found.append(f"{name}: the link {link} leads to the source of a page")
                continue
            there = pages.get(file.relative_to(site.resolve()).as_posix()) if path else page
            if anchor and there and anchor not in there.ids:
                found.append(f"{name}: the link {link} leads to a place that is not in the page")
    return found


def missing_files(site:Path, pages:dict) -> list: # of faults
    "Pictures, scripts and styles that are not there."
    return [f"{name}: {target[:100]} is not there" for name, page in pages.items()
            for target in dict.fromkeys(page.loads)
            if target and not is_elsewhere(target) and not target.startswith("data:")
            and not place(site, name, target).is_file()]


def other_hosts(site:Path, pages:dict) -> list: # of faults
    "What would be loaded from elsewhere, by a page or by a style sheet."
    found = [f"{name}: loads {target}" for name, page in pages.items()
             for target in dict.fromkeys(page.loads) if is_elsewhere(target)]
    for path in sorted(site.rglob("*.css")):
        sheet = path.relative_to(site).as_posix()
        found += [f"{sheet}: loads {target}" for target in css_loads(path.read_text("utf-8"))
                  if is_elsewhere(target)]
    return found


def poor_heads(site:Path, pages:dict) -> list: # of faults
    "Pages that do not say what they are, and pictures that do not say what they show."
    found, titles = [], defaultdict(list)
    for name, page in pages.items():
        if not page.title.strip():
            found.append(f"{name}: has no title")
        if not page.lang:
            found.append(f"{name}: does not say its language")
        found += [f"{name}: has no {meta}" for meta in
                  ("description", "og:title", "og:image", "twitter:card")
                  if not page.metas.get(meta, "").strip() and name != "404.html"]
        if name != "404.html":  # its mark decorates
            found += [f"{name}: the picture {source} has no description"
                      for source in page.undescribed]
        if name != "index.html":  # which leads to the front page, and is named as it is
            titles[page.title.strip()].append(name)
    found += [f"{', '.join(names)}: one title, {title!r}" for title, names in titles.items()
              if len(names) > 1]
    return found


def heavy_pages(site:Path, pages:dict) -> list: # of faults
    "Pages that take long to come: their text, and the pictures that do not wait."
    found = []
    for name, page in pages.items():
        size = len(gzip.compress((site / name).read_bytes()))
        files = [place(site, name, source) for source in page.eager if not is_elsewhere(source)]
        size += sum(file.stat().st_size for file in set(files) if file.is_file())
        if size > LARGEST:
            found.append(f"{name}: {size:,} bytes, more than {LARGEST:,}")
    return found


def moving_pages(site:Path, pages:dict) -> list: # of faults
    "Pictures that come late, and then push away what is being read: no room is kept for them."
    return [f"{name}: the picture {source} has no width and height, and comes late"
            for name, page in pages.items() for source in page.sizeless]


def color(
    written:str, # in CSS: #rgb, #rrggbb or rgb(…)
) -> str: # "#rrggbb", or "" for a color that is none of these
    written = written.strip().lower()
    if found := re.fullmatch(r"#([0-9a-f])([0-9a-f])([0-9a-f])", written):
        return "#" + "".join(2 * digit for digit in found.groups())
    if re.fullmatch(r"#[0-9a-f]{6}", written):
        return written
    if found := re.fullmatch(r"rgba?\(([\d.]+)[, ]+([\d.]+)[, ]+([\d.]+)(?:[, /]+1)?\)", written):
        return "#" + "".join(f"{round(float(part)):02x}" for part in found.groups())
    return {"white": "#ffffff", "black": "#000000"}.get(written, "")


def themes(site:Path) -> list: # of dicts: variable -> colour; one a theme
    "The variables of our own styles, with the colours of code."
    found = []
    for dark in (False, True):
        sheets = [path for path in sorted(site.rglob("*.css")) if ("dark" in path.name) is dark]
        css = "\n".join(path.read_text("utf-8") for path in sheets
                        if path.name.startswith(("bootstrap", "quarto-syntax")))
        variables = re.findall(r"--(site-[\w-]+|quarto-hl-\w+-color):\s*([^;}]+)", css)
        found.append({name: color(value) for name, value in variables})
    return found


def unreadable(site:Path, pages:dict) -> list: # of faults
    "Pairs of colours of our styles that are too much alike."
    found = []
    for title, variables in zip(("light", "dark"), themes(site)):
        code = [name for name in variables if name.startswith("quarto-hl")]
        pairs = [(f"site-{text}", f"site-{paper}") for text, paper in PAIRS]
        pairs += [(name, "site-block-paper") for name in code if variables[name]]
        for text, paper in pairs:
            if missing := [name for name in (text, paper) if not variables.get(name)]:
                found.append(f"{title} theme: no colour {missing[0]}")
                continue
            ratio = contrast(variables[text], variables[paper])
            if ratio < LEAST:
                found.append(f"{title} theme: {text} on {paper} has a contrast of {ratio:.1f}")
    return found


def poor_search(site:Path, pages:dict) -> list: # of faults
    "Styles among what is searched, and an order in which lessons do not come first."
    entries = json.loads((site / "search.json").read_text("utf-8"))
    found = [f"search.json: {entry['href']} holds a style sheet" for entry in entries
             if re.search(r"#T_\w+|\.dataframe t", entry["text"])]
    lessons = [bool(re.match(r"nbs/\d\d_", entry["href"])) for entry in entries]
    if lessons != sorted(lessons, reverse=True):
        found.append("search.json: lessons do not come first")
    return found


CHECKS = (dead_links, missing_files, other_hosts, poor_heads, heavy_pages, moving_pages, unreadable,
          poor_search)

# Text that does not stand out from what it is on. A background that is a picture is not judged.
READABLE = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (a, b) => {
    const part = a.length > 3 ? a[3] : 1;
    return [0, 1, 2].map(i => a[i] * part + b[i] * (1 - part));
  };
  const paper = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.backgroundImage !== 'none') return null;
      layers.push(parse(style.backgroundColor));
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || element.closest('script, style, noscript, svg')) continue;
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const behind = paper(element);
    if (!behind) continue;
    let ink = parse(getComputedStyle(element).color);
    for (let at = element; at; at = at.parentElement) {
      const shown = Number(getComputedStyle(at).opacity);
      if (shown < 1) ink = [...ink.slice(0, 3), (ink[3] ?? 1) * shown];
    }
    const pair = [light(over(ink, behind)), light(behind)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const large = size >= 24 || size >= 18.66 && Number(style.fontWeight) >= 700;
    if (ratio < (large ? 3 : 4.5)) {
      found.push(`${ratio.toFixed(1)} ${element.tagName}.${element.className} ` +
                 node.textContent.trim().slice(0, 40));
    }
  }
  return found;
}"""
SLIDES = """() => {
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= wide) return '';
  const own = [...document.querySelectorAll('body *')].filter(element => {
    if (element.getBoundingClientRect().right <= wide + 1) return false;
    for (let at = element.parentElement; at; at = at.parentElement)
      if (getComputedStyle(at).overflowX !== 'visible' && at !== document.body) return false;
    return true;
  });
  return own.slice(-1).map(e => `${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 40)}`)
    .join('') || 'something';
}"""


@contextmanager
def server(
    site:Path,
):
    "A server on this machine, as its address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def look(
    context, # of a browser
    name:str, # of the page of the site
    address:str, # of the server
    scheme:str, # light or dark
) -> list: # of faults
    "Open a page as a reader does."
    found, seen, page = [], [], context.new_page()
    page.on("request", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: found.append(f"{name}: {str(error)[:100]}"))
    page.goto(address + name, wait_until="load")
    page.wait_for_timeout(150)
    if over := page.evaluate(SLIDES):
        found.append(f"{name}: slides sideways at {PHONE} pixels: {over}")
    found += [f"{name}: {scheme}, contrast {text}" for text in page.evaluate(READABLE)]
    found += [f"{name}: asks for {url}" for url in dict.fromkeys(seen)
              if not url.startswith((address, "data:", "blob:"))]
    page.close()
    return found


def search(
    page, # of a browser
    address:str, # of the server
) -> list: # of faults
    "Type into the search as a learner does."
    found = []
    page.set_default_timeout(WAIT)
    for query in QUERIES:
        page.goto(address + "nbs/index.html", wait_until="load")
        page.locator("#quarto-search button").click()
        page.locator("input[type=search]").fill(query)
        first = page.locator(".search-result-link").first
        first.wait_for()
        if not re.search(r"nbs/\d\d_", first.get_attribute("href")):
            found.append(f"search: {query!r} finds {first.get_attribute('href')} before a lesson")
    return found


def in_a_browser(site:Path, pages:dict, browser) -> list: # of faults
    "What only a browser knows: pages on a phone in both themes, and what a search finds."
    from tqdm import tqdm
    found = []
    with server(site) as address:
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport=dict(width=PHONE, height=800),
                                          color_scheme=scheme)
            context.set_default_timeout(WAIT)
            names = sorted(set(pages) - {"index.html"})  # which leads to the front page
            for name in tqdm(names, desc=f"{scheme}, {PHONE} pixels"):
                found += look(context, name, address, scheme)
        found += search(browser.new_page(), address)
    return found


def check(
    site:Path, # folder of the website
) -> list: # of faults: a line each
    "All that needs no browser."
    pages = read(site)
    return [fault for one in CHECKS for fault in one(site, pages)]


def main():
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    if not (site / "index.html").is_file():
        sys.exit(f"{site} is no website: build it with make docs")
    found = check(site)
    sys.path.insert(0, str(ROOT / "tests"))
    from lab import BROWSERS, QUIET
    if path := next(filter(None, map(shutil.which, BROWSERS)), None):
        from playwright.sync_api import sync_playwright
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=QUIET)
            found += in_a_browser(site, read(site), browser)
            browser.close()
    else:
        print("no browser: pages on a phone and the search were not looked at")
    print("\n".join(found) or f"{site}: nothing wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
