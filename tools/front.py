"""What the front page shows of the model, and the mark of the course in all its sizes.

python tools/front.py            all of it: after a new adapter, or a change of the live page's look
python tools/front.py answers    four questions with both answers, into nbs/index.ipynb
python tools/front.py stills     pictures of the live page, into nbs/images/ (needs Chromium)
python tools/front.py icons      icons and social card, into nbs/_site/ (needs Chromium)
"""
import html
import io
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import lessons
import live

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs/index.ipynb"
IMAGES = ROOT / "nbs/images"
SITE = ROOT / "nbs/_site"  # for the website's top folder; no learner gets it
MARK = SITE / "favicon.svg"
LIMIT = 48  # tokens of an answer, as on the live page
SIZES = {"desk": 1080, "phone": 480}  # widths of the stills, in CSS pixels
COLOURS = 128  # of a picture: a quarter of the bytes
PLAIN = """ /* the answers and the fine-tuning, without the settings */
.course, h1, .lead, #examples, .knobs, #status, .hint, article details, .which, footer,
#tune > p, #settings, #score { display: none !important }
main { padding: 1rem; max-width: none }
.line { margin-bottom: .9rem }
.pair { margin-bottom: .9rem; align-items: stretch }
.out { min-height: 0; margin-bottom: 0 }
#tune { padding-bottom: .8rem }
#lab { margin-top: .6rem }
#asked td { height: auto }
@media (max-width: 640px) { #asked { display: none } }
"""
CARD = """<!doctype html><html lang="en"><meta charset="utf-8"><style>
* { box-sizing: border-box; margin: 0 }
body { width: 1200px; height: 630px; padding: 58px 64px 0; overflow: hidden;
  background: #1b2836; color: #fff; font-family: "Liberation Sans", Arial, Helvetica, sans-serif }
header { display: flex; align-items: center; gap: 20px; font-size: 40px; font-weight: 700 }
svg { width: 66px; height: 66px }
svg rect:first-child { fill: #26384a }
h1 { font-size: 62px; line-height: 1.14; margin: 30px 0 36px; letter-spacing: -1px }
div { display: grid; grid-template-columns: 1fr 1fr; gap: 26px }
section { background: #fbfaf7; color: #1d2430; border-top: 8px solid var(--c);
  border-radius: 14px; padding: 22px 26px; font-size: 25px; line-height: 1.4; height: 310px;
  }
h2 { color: var(--c); font-size: 25px; margin-bottom: 8px }
b { background: #e2f1f6; color: #0c6787; border-radius: 6px; padding: 2px 12px; font-size: 21px }
i { color: #5a6373; font-style: normal }
em { margin-left: auto; font: 400 27px/1 "Liberation Sans", Arial, sans-serif; color: #c3cad2 }
</style><header>MARK sftlab <em>no GPU, no network</em></header>
<h1>Fine-tune a language model.<br>On your laptop, in a notebook.</h1>
<div><section style="--c:#a34a12"><h2>Before: it continues</h2><i>ASKED</i> BASE</section>
<section style="--c:#0c6787"><h2>After: it answers</h2><i>ASKED</i><br>INSTRUCT <b>stops</b>
</section></div></html>"""


def answered() -> list: # of (question, what the base wrote, what the instruct model wrote)
    "Lesson 01's four questions, asked of the live page's two models; `…` where one did not stop."
    from sftlab.files.adapters import load_adapter
    from sftlab.generation import complete
    from sftlab.lora import merge
    from sftlab.models import load
    from sftlab.tiny.pretraining import chat_prompt
    base, tokenizer = load("tiny")
    instruct = merge(load_adapter(load("tiny")[0], live.PAGE / "adapter"))
    stops = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}

    def said(model, prompts):
        found = complete(model, tokenizer, prompts, LIMIT, stops)
        return [done.text.strip() + " …" * (done.reason != "stop") for done in found]
    before = said(base, [tokenizer.eos_token + question for question in live.ASKED])
    after = said(instruct, [chat_prompt(tokenizer, question) for question in live.ASKED])
    return list(zip(live.ASKED, before, after))


def as_text(
    text:str, # anything
) -> str: # Markdown that shows it as it is, in a cell of a table
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def answer_table(
    rows:list, # from `answered`
) -> str: # Markdown
    "What nbs/index.ipynb shows between its marks."
    lines = ["| You ask | Before: the base continues | After: it answers, and stops |",
             "|----|--------|------|"]
    return "\n".join(lines + [f"| {' | '.join(map(as_text, row))} |" for row in rows]) + "\n"


def answers():
    "Ask, and write the answers into the front page."
    notebook = json.loads(INDEX.read_text("utf-8"))
    made = "\n" + answer_table(answered()) + "\n"
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "<!-- answers -->" in source:
            text = lessons.between(source + "\n", "answers", made).rstrip("\n")
            cell["source"] = text.splitlines(keepends=True)
    lessons.write_notebook(INDEX, notebook)


@contextmanager
def browser():
    "Chromium, without a window."
    from playwright.sync_api import sync_playwright
    sys.path.insert(0, str(ROOT / "tests"))
    from lab import QUIET, find_browser
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=find_browser(), args=QUIET)
        yield running
        running.close()


def write_png(
    content:bytes, # of a PNG
    path:Path, # where to
):
    "Write a picture with few colours, whole or not at all."
    from PIL import Image

    from sftlab.files.atomic import atomic_file
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(COLOURS, dither=0)
    with atomic_file(path, "wb") as file:
        picture.save(file, "PNG", optimize=True)


def stills(
    size:int=300, # conversations to fine-tune on
):
    "Ask on the live page, fine-tune there, and take pictures: wide and narrow, light and dark."
    from playwright.sync_api import expect
    with live.server(live.site()) as address, browser() as running:
        page = running.new_page(device_scale_factor=2, bypass_csp=True)
        page.goto(address)
        page.locator("#pace").select_option("0")
        page.locator("#go").click()
        expect(page.locator("#status")).to_contain_text("a second", timeout=120_000)
        page.locator(f"[name=size][value='{size}']").check(force=True)
        page.locator("#start").click()
        expect(page.locator("#tune-status")).to_contain_text("Done", timeout=900_000)
        page.add_style_tag(content=PLAIN)
        for name, width in SIZES.items():
            for scheme in ("light", "dark"):
                page.set_viewport_size(dict(width=width, height=400))
                page.emulate_media(color_scheme=scheme)
                shown = page.locator("main").screenshot(animations="disabled")
                write_png(shown, IMAGES / f"live-{name}-{scheme}.png")


def picture_of(
    running, # the browser
    page:str, # HTML
    width:int, height:int, # in pixels
) -> bytes: # PNG
    page_shown = running.new_page(viewport=dict(width=width, height=height))
    page_shown.set_content(page)
    return page_shown.screenshot()


def data_uri() -> str: # for the live page, which may fetch nothing from another folder
    "The mark, inside a link."
    return "data:image/svg+xml," + quote(MARK.read_text("utf-8").replace("\n", ""))


def icons():
    "The mark as icons, the social card, and the live page's icon."
    mark = MARK.read_text("utf-8")
    square = mark.replace(' rx="15"', "")  # a phone rounds the corners itself
    icon = f"<style>body {{ margin: 0 }} svg {{ width: 180px; display: block }}</style>{square}"
    asked, before, after = answered()[0]
    card = CARD.replace("MARK", mark).replace("ASKED", html.escape(asked))
    card = card.replace("BASE", html.escape(before)).replace("INSTRUCT", html.escape(after))
    with browser() as running:
        write_png(picture_of(running, icon, 180, 180), SITE / "apple-touch-icon.png")
        write_png(picture_of(running, card, 1200, 630), SITE / "social-card.png")
    page = live.PAGE / "index.html"
    link = f'<link rel="icon" href="{data_uri()}">'
    text = re.sub(r'<link rel="icon" href="[^"]*">', lambda _: link, page.read_text("utf-8"))
    page.write_text(text, "utf-8")


COMMANDS = dict(answers=answers, stills=stills, icons=icons)

if __name__ == "__main__":
    if not set(sys.argv[1:]) <= set(COMMANDS):
        sys.exit(__doc__)
    for name in sys.argv[1:] or COMMANDS:
        COMMANDS[name]()
