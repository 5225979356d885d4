"""The live page: the tiny model in a browser. Its page is nbs/live/, its weights are the package's.

python tools/live.py              put page, weights and questions together in _live/site/
python tools/live.py site FOLDER  the same in another folder, such as _docs/nbs/live
python tools/live.py serve        the same, and serve it on http://127.0.0.1:8000
python tools/live.py build        make kernel.wasm and vendor/tokenizers.js anew (needs npm)
python tools/live.py adapter      train the instruct model's adapter anew (a minute or two)
python tools/live.py measure      print speed, seconds, memory and bytes (needs Chromium)
"""
import functools
import gzip
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs/live"
WORK = ROOT / "_live"  # git does not track it
SHOWN = ["index.html", "live.css", "*.js", "kernel.wasm", "vendor/tokenizers.js", "vendor/LICENSE"]
MADE = ["kernel.wasm", "vendor/tokenizers.js", "vendor/LICENSE"]  # by `build`
MADE_FROM = ["kernel.ts", "vendor/entry.js", "package.json", "package-lock.json"]
SIZES = (30, 100, 300, 1000)  # conversations to fine-tune on
ASKED = ["What is the capital of Brazil?", "What is a baby goat called?", "Calculate 87 - 25.",
         "Put these numbers in order: 54, 12, 79, 53"]  # as in lesson 01


def sha256(
    path:Path, # of a file
) -> str: # in hexadecimal
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(
    path:Path, # where to
    value, # anything that JSON can say
):
    "Write a small file, in one line."
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "utf-8")


def conversations() -> dict: # number of them -> list of [question, answer]
    "What the page can fine-tune on: the rows of the experiment of lesson 01, first seed."
    from sftlab.tiny.world import examples
    return {n: [[e["question"], e["answer"]] for e in examples("train", n)] for n in SIZES}


def questions(
    each:int=3, # questions of a kind
    more:int=3, # of the first kinds one more, to make it sixty
) -> list: # of [question, answer]
    "Held-out questions, evenly over the kinds, from the course's test set."
    from sftlab.tiny.world import KINDS, test_set
    items, chosen = test_set(), []
    for place, kind in enumerate(KINDS):
        n = each + (place < more)
        chosen += [item for item in items if item["kind"] == kind][:n]
    return [[item["question"], item["answer"]] for item in chosen]


def measured() -> dict: # conversations -> % exact: the mean of the runs of lesson 01
    "What lesson 01 measured, on all the questions of the test set."
    from sftlab.study.experiments import results
    runs = results("01_learning_curve", ROOT / "nbs/experiments")
    means = runs[runs["epochs"] == 3].groupby("rows")["exact"].mean()
    return {int(rows): round(float(exact), 1) for rows, exact in means.items()}


def shots() -> list: # four solved examples for the few-shot prompt
    from sftlab.tiny.world import examples
    capitals = [e for e in examples("train", 1000) if e["kind"] == "capital"][:4]
    return [dict(question=e["question"], answer=e["answer"]) for e in capitals]


def write_data(
    to:Path, # folder, made where it is missing
):
    "The weights and the questions, with a list of them: bytes and hash of each."
    from sftlab.models import tiny_path
    to.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_path() / name, to / name)
    shutil.copyfile(PAGE / "adapter/adapter_model.safetensors", to / "adapter.safetensors")
    shutil.copyfile(PAGE / "adapter/adapter_config.json", to / "adapter_config.json")
    write_json(to / "conversations.json", conversations())
    write_json(to / "questions.json", dict(
        asked=ASKED, held_out=questions(), measured=measured(), shots=shots()))
    files = sorted(path for path in to.iterdir() if path.name != "manifest.json")
    write_json(to / "manifest.json", {
        path.name: dict(bytes=path.stat().st_size, sha256=sha256(path)) for path in files})


def page_files() -> list: # paths, relative to nbs/live
    "What a browser gets of nbs/live."
    found = {path for pattern in SHOWN for path in PAGE.glob(pattern)}
    return sorted(path.relative_to(PAGE).as_posix() for path in found)


def site(
    to:Path=WORK / "site", # folder, replaced where it exists
) -> Path: # the folder
    "Put together what a server has to show."
    if to.exists() and not (to / "data/manifest.json").is_file():
        sys.exit(f"{to} is there already, and is no live page: name another folder")
    shutil.rmtree(to, ignore_errors=True)
    for name in page_files():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PAGE / name, to / name)
    write_data(to / "data")
    return to


@contextmanager
def server(
    folder:Path, # what to serve
    port:int=0, # 0: any that is free
):
    "A server on this machine, as its address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def serve(
    port:int=8000,
):
    "Serve the page on this machine, for development, until Ctrl-C."
    with server(site(), port) as address:
        print(address)
        threading.Event().wait()


def build():
    "Make what npm's packages are needed for, and note the hashes of what it was made from."
    work = WORK / "npm"
    shutil.rmtree(work, ignore_errors=True)
    (work / "vendor").mkdir(parents=True)
    for name in MADE_FROM:
        shutil.copy(PAGE / name, work / name)
    packages = "node_modules/@huggingface/tokenizers"
    for command in (
            ["npm", "ci", "--no-audit", "--no-fund"],
            ["npx", "asc", "kernel.ts", "-O3", "--enable", "simd", "--runtime", "stub",
             "--importMemory", "--noAssert", "--use", "abort=", "-o", "kernel.wasm"],
            ["npx", "esbuild", "vendor/entry.js", "--bundle", "--minify", "--format=esm",
             "--legal-comments=none", "--banner:js=// @huggingface/tokenizers, Apache 2.0: LICENSE",
             "--outfile=vendor/tokenizers.js"]):
        subprocess.run(command, cwd=work, check=True)
    shutil.copy(work / packages / "LICENSE", work / "vendor/LICENSE")
    for name in MADE:
        shutil.copy(work / name, PAGE / name)
    built = {name: sha256(PAGE / name) for name in (*MADE, *MADE_FROM)}
    (PAGE / "built.json").write_text(json.dumps(built, indent=1) + "\n")


def adapter(
    learning_rate:float=1.25e-3, # the best of lesson 07 for a thousand conversations
):
    "Train the instruct model: LoRA on a thousand conversations, kept in bfloat16."
    import torch

    from sftlab.files.adapters import save_adapter
    from sftlab.lora import adapters, inject, token_rows, train_tokens
    from sftlab.masking import encode_rows
    from sftlab.models import load
    from sftlab.tiny.world import as_messages, examples
    from sftlab.training import PADDING_FREE, TrainingConfig, train
    model, tokenizer = load("tiny")
    rows = encode_rows(tokenizer, [as_messages(e) for e in examples("train", 1000)])
    torch.manual_seed(0)
    inject(model)
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    train_tokens(model, marks)  # without them it would not learn to stop: lesson 07
    train(model, rows, TrainingConfig(learning_rate=learning_rate), **PADDING_FREE)
    for layer in (*adapters(model).values(), token_rows(model)):
        layer.to(torch.bfloat16)
    shutil.rmtree(PAGE / "adapter", ignore_errors=True)
    save_adapter(model, PAGE / "adapter", "tiny")


def packed(
    paths, # of files
) -> int: # bytes, as a server sends them
    return sum(len(gzip.compress(path.read_bytes())) for path in paths)


def measure(
    size:int=300, # conversations to fine-tune on
):
    "Drive the page in a browser, and print what it costs."
    import psutil
    from playwright.sync_api import expect, sync_playwright
    sys.path.insert(0, str(ROOT / "tests"))
    from lab import QUIET, find_browser
    folder = site()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: "
          "with more than 0.5, what follows is slower than it is")
    print(f"page: {packed(folder / name for name in page_files()):,} bytes packed, "
          f"data {packed((folder / 'data').iterdir()):,}")
    with server(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=QUIET)
        page = browser.new_page()
        page.goto(address)
        session = browser.new_browser_cdp_session()

        def megabytes():
            found = session.send("SystemInfo.getProcessInfo")["processInfo"]
            pages = [psutil.Process(p["id"]) for p in found if p["type"] == "renderer"]
            return round(sum(p.memory_full_info().uss for p in pages) / 1e6)
        print(f"memory of the page: {megabytes()} MB at the start")
        page.locator("#pace").select_option("0")
        start = time.time()
        page.locator("#go").click()
        expect(page.locator("#status")).to_contain_text("a second", timeout=60_000)
        print(f"first answers after {time.time() - start:.1f} s; {megabytes()} MB")
        page.locator("#go").click()
        page.locator("#status").get_by_text("a second").wait_for()
        page.wait_for_timeout(2000)
        print(page.locator("#status").inner_text())
        page.locator(f"[name=size][value='{size}']").check(force=True)
        page.locator("#start").click()
        expect(page.locator("#tune-status")).to_contain_text("Done", timeout=600_000)
        print(page.locator("#tune-status").inner_text())
        print(page.locator("#score").inner_text())
        print(f"memory of the page: {megabytes()} MB")
        browser.close()


COMMANDS = dict(site=site, serve=serve, build=build, adapter=adapter, measure=measure)

if __name__ == "__main__":
    name, *words = sys.argv[1:] or ["site"]
    if name not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[name](*map(Path if name == "site" else int, words))
