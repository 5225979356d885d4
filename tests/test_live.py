"""The live page (nbs/live/): the same numbers as Python's, and a browser that uses it.

The JavaScript modules run in node, through tests/live.mjs; the page runs in Chromium, served from a
temporary folder. A greedy answer may differ only where the two best logits are nearly equal.
"""
import functools
import gzip
import http.server
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect, sync_playwright
from safetensors.torch import save_file

from lab import QUIET, find_browser
from sftlab.files.adapters import adapter_tensors, load_adapter
from sftlab.generation import few_shot_prompt, truncate_at_stop, wilson_interval
from sftlab.lora import adapters, inject, merge, train_tokens
from sftlab.masking import encode
from sftlab.models import load
from sftlab.tiny.pretraining import chat_prompt
from sftlab.tiny.world import ANIMALS, COUNTRIES, as_messages, examples
from sftlab.training import (PADDING_FREE, TrainingConfig, count_targets, effective_batches,
                             lr_multiplier, new_optimizer, nll_sum, padded, training_steps,
                             warmup_steps)

pytestmark = pytest.mark.slow
expect.set_options(timeout=120_000)
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs/live"
MARGIN = 1e-3 # of the two best logits: below it, a greedy choice may fall either way


def live():
    "tools/live.py, as a module."
    spec = importlib.util.spec_from_file_location("live", ROOT / "tools/live.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_node() -> str: # path of the program
    "Node, or a skipped test; a failed one where `CI` says that there must be one."
    found = shutil.which("node")
    version = subprocess.run([found, "-v"], capture_output=True, text=True).stdout if found else ""
    if found and int(re.match(r"v(\d+)", version)[1]) >= 20:
        return found
    give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    give_up("no node 20 or later on PATH: install it to test the live page's modules")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "What the website gets, put together anew."
    return live().site(tmp_path_factory.mktemp("live") / "site")


@pytest.fixture(scope="module")
def node(site):
    "Run a job of tests/live.mjs."
    program = find_node()

    def run(what, **job):
        text = json.dumps(dict(what=what, data=str(site / "data"), **job))
        done = subprocess.run([program, ROOT / "tests/live.mjs"], input=text,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return run


@pytest.fixture(scope="module")
def base():
    return load("tiny")


@pytest.fixture(scope="module")
def instruct():
    "The page's instruct model, as the course's Python reads the adapter."
    model, _ = load("tiny")
    return merge(load_adapter(model, PAGE / "adapter"))


# --- text and tokens

HARD = [
    "", " ", "\n", "  a  b ", "\n\n a\n", "a\r\nb", "\t\tx", "don't I'll we've", "3.14159", "1,000",
    "No.1号", "第3课", "汉3字", "abc汉def字ghi", " 汉 字\n汉", "喜欢 apples 和 pears。",
    "½ ² ３ ① Ⅷ 〇 一",
    "৪২ ١٢", "😀🎉 👩‍👩‍👧", "e\u0301 n\u0303", "ﬁ İstanbul ß", "ＦＵＬＬ", "\u00a0x\u2003y\u3000z",
    "a\ufeffb \ufeff c", "a\u0085b \u0085 c", "a\u180eb\u200bc\u2028d",
    "<|im_end|>", "<|im_start|>user\nx",
    "<|endoftext|> <|pad|>", "x<|im_end", "def f(x):\n    return x + 1\n", "https://a.b/?q=1&r=2",
    "<b>bold</b> &amp;", "---___***", "…—–“”‘’", "\x00\x01\x7f", "\ue000", "\U0010ffff", "∑",
    "々〇"]
LETTERS = [*"abcdefgh ABC 012 \n\t.,!?'\"()", *"的一是不了人我在有他中国首都", "😀", "é", "я", "ا",
           "\u00a0", "<|im_end|>", "'s", "'ll", "\u2028", "²", "３"]


def texts(n=200):
    dice, made = random.Random(0), list(HARD)
    while len(made) < n:
        made.append("".join(dice.choice(LETTERS) for _ in range(dice.randint(1, 40))))
    return made


def pairs(n=50):
    "Questions of every kind with their answers, and some that no template expects."
    found = [[e["question"], e["answer"]] for e in examples("test", n - 8, seed=7)]
    odd = ["<|im_end|>", " leading", "trailing \n", "a\n\nb", "😀", "你好", "2 + 2", "<|im_start|>"]
    return found + [[question, "Yes."] for question in odd]


def test_tokens_are_those_of_python(node, base):
    tokenizer, shots = base[1], examples("train", 4)
    found = node("tokens", texts=texts(), pairs=pairs(), shots=shots)
    wanted = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts()]
    assert found["ids"] == wanted
    assert found["back"] == [tokenizer.decode(ids) for ids in wanted]
    assert found["cut"] == [truncate_at_stop(text, ("\nQ:", "\n\n")) for text in texts()]
    assert found["fewShot"] == [few_shot_prompt(shots, q) for q, _ in pairs()]


def test_conversations_are_those_of_python(node, base):
    tokenizer = base[1]
    found = node("tokens", texts=[], pairs=pairs(), shots=[])
    messages = [as_messages(dict(question=q, answer=a))["messages"] for q, a in pairs()]
    rows = [encode(tokenizer, m) for m in messages]
    assert found["rows"] == [dict(ids=r["input_ids"], labels=r["labels"]) for r in rows]
    assert found["everything"] == [encode(tokenizer, m, mode="all")["labels"] for m in messages]
    assert found["chats"] == [chat_prompt(tokenizer, q) for q, _ in pairs()]
    usual = [q for q, _ in pairs() if "<|" not in q]  # typed marks are text here
    wanted = [tokenizer(chat_prompt(tokenizer, q))["input_ids"] for q in usual]
    assert [p for p, (q, _) in zip(found["prompts"], pairs()) if "<|" not in q] == wanted


# --- answers

def differs(
    model, # of Python
    prompt:list, answer:list, # token ids
    limit:int, # the most tokens of an answer
) -> bool:
    """Whether greedy decoding would have written something else.

    One pass over prompt and answer shows it: each token must be the most likely one after those
    before it, and the answer must end where it should."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    if not bool((logits.amax(1) - chosen <= MARGIN).all()):
        return True
    stops = [id in (0, 2) for id in answer]
    return any(stops[:-1]) or len(answer) < limit and not stops[-1]


@pytest.fixture(scope="module")
def prompts(base):
    "Token ids of the base's prompts and of the instruct model's."
    def plain(text): return base[1](text, split_special_tokens=True)["input_ids"]
    asked = [q for q, _ in pairs()]
    turns = [[1, *plain(f"user\n{q}"), 2, *plain("\n"), 1, *plain("assistant\n")] for q in asked]
    return dict(base=[[0, *plain(q)] for q in asked], instruct=turns)


@pytest.mark.parametrize("backend, n, limit", [("kernel", 50, 32), ("plain", 6, 16)])
def test_greedy_answers_are_those_of_python(node, base, instruct, prompts, backend, n, limit):
    asked = {name: of_all[-n:] for name, of_all in prompts.items()}
    found = node("answers", backend=backend, limit=limit, **asked)
    for name, model in (("base", base[0]), ("instruct", instruct)):
        answers = list(zip(asked[name], found[name]))
        wrong = [differs(model, prompt, answer, limit) for prompt, answer in answers]
        assert len(wrong) == n and not any(wrong), f"{name}: {sum(wrong)} answers differ"
    if n == 50:  # and the adapter belongs to this base: most answers are right
        decoded = [base[1].decode(ids).removesuffix("<|im_end|>") for ids in found["instruct"]]
        assert sum(said == right for said, (_, right) in zip(decoded[:42], pairs())) > 30


def test_a_different_answer_would_be_noticed(base, prompts):
    "The control of the comparison."
    model, prompt = base[0], prompts["base"][0]
    right = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0]
    right = right[len(prompt):].tolist()
    assert not differs(model, prompt, right, 8)
    assert differs(model, prompt, [*right[:4], (right[4] + 1) % 4096, *right[5:]], 8)
    assert differs(model, prompt, right[:-1], 8)  # it ended too early


# --- training

def prepared(method, folder):
    "A model ready to be trained, and the first values of its adapter as a file."
    model, tokenizer = load("tiny")
    tensors = {"none": torch.zeros(1)}
    if method == "lora":
        torch.manual_seed(0)
        inject(model)
        for layer in adapters(model).values():  # not zero, so that A has a gradient
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        train_tokens(model, [1, 2])
        tensors = {name: p.detach().contiguous() for name, p in adapter_tensors(model).items()}
    save_file(tensors, folder / "first.safetensors")
    rows = [encode(tokenizer, as_messages(e)["messages"]) for e in examples("train", 48)]
    return model, rows


def long_row(tokenizer):
    answers = " ".join(e["answer"] for e in examples("train", 40))
    return encode(tokenizer, as_messages(dict(question="Say a lot.", answer=answers))["messages"])


def for_page(rows): return [dict(ids=r["input_ids"], labels=r["labels"]) for r in rows]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_are_those_of_torch(node, base, method, tmp_path):
    model, rows = prepared(method, tmp_path)
    rows = rows[:6] + [long_row(base[1])] * 2  # more than one pass has room for
    assert sum(len(row["input_ids"]) for row in rows) > 640
    batch = padded(rows)
    loss = nll_sum(model, batch) / count_targets(batch)
    loss.backward()
    wanted = dict(model.named_parameters())
    if method == "lora":
        wanted = {name: p for name, p in adapter_tensors(model).items()}
    save_file({name: p.grad.contiguous() for name, p in wanted.items()}, tmp_path / "g.safetensors")
    found = node("gradients", settings=dict(method=method), rows=for_page(rows),
                 first=str(tmp_path / "first.safetensors"),
                 gradients=str(tmp_path / "g.safetensors"))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(found["distances"]) == len(wanted)
    assert max(found["distances"].values()) <= 1e-4


@pytest.mark.parametrize("method, rate", [("full", 1e-3), ("lora", 5e-3)])
def test_losses_of_twenty_steps_are_those_of_torch(node, method, rate, tmp_path):
    model, rows = prepared(method, tmp_path)
    settings = TrainingConfig(epochs=2, batch_size=4, learning_rate=rate)
    order = [batch for _, batch in effective_batches(rows, settings, collate=lambda r: r)][:20]
    figures = training_steps(model, new_optimizer(model, settings), rows, settings, **PADDING_FREE)
    wanted = [next(figures) for _ in range(20)]
    found = node("steps", settings=dict(method=method), first=str(tmp_path / "first.safetensors"),
                 batches=[for_page(batches[0]) for batches in order],
                 rates=[step["learning_rate"] for step in wanted])
    assert found["losses"] == pytest.approx([step["loss"] for step in wanted], abs=1e-3)
    assert found["losses"][-1] < 0.6 * found["losses"][0]


def test_schedule_and_batches_are_the_courses(node):
    lengths, rows = [1, 3, 12, 114], list(range(20))
    found = node("schedule", lengths=lengths, rows=rows, seed=0)
    for n, rates in zip(lengths, found["rates"]):
        warmup = warmup_steps(0.05, n)
        assert rates == pytest.approx([lr_multiplier(i, n, warmup=warmup) for i in range(n)])
    epochs = [sum(found["batches"][i:i + 3], []) for i in (0, 3, 6)]
    assert [len(batch) for batch in found["batches"]] == [8, 8, 4] * 3
    assert all(sorted(epoch) == rows for epoch in epochs) and epochs[0] != epochs[1]


def test_a_loss_that_is_no_number_ends_the_run(node, base):
    row = encode(base[1], as_messages(examples("train", 1)[0])["messages"])
    assert "learning rate is too high" in node("explode", rows=for_page([row]))
    nothing = [dict(ids=row["input_ids"], labels=[-100] * len(row["labels"]))]
    assert "Nothing is learned" in node("explode", rows=nothing)


def test_intervals_are_the_courses_and_editing_loses_nothing(node):
    shares = [[0, 60], [1, 60], [42, 60], [60, 60]]
    found = node("texts", shares=shares)
    for ours, share in zip(found["intervals"], shares):
        assert ours == pytest.approx(wilson_interval(*share))
    assert found["kept"] == [True] * 4


# --- files: what is built, what is damaged

def test_what_npm_made_belongs_to_its_sources():
    """`python tools/live.py build` has run since kernel.ts or a version was changed."""
    built = json.loads((PAGE / "built.json").read_text())
    tool = live()
    assert set(built) == {*tool.MADE, *tool.MADE_FROM}
    assert built == {name: tool.sha256(PAGE / name) for name in built}
    assert "Apache License" in (PAGE / "vendor/LICENSE").read_text()


def test_the_page_is_light(site):
    "300 KB, packed, without what tools/live.py puts into data/."
    size = sum(len(gzip.compress((site / name).read_bytes())) for name in live().page_files())
    assert size < 300_000


def test_the_service_worker_keeps_every_file():
    listed = re.search(r"FILES = \[(.*?)\]", (PAGE / "sw.js").read_text(), re.DOTALL)[1]
    wanted = set(live().page_files()) - {"index.html", "sw.js", "vendor/LICENSE"} | {"./"}
    assert set(re.findall(r"'(.*?)'", listed)) == wanted


def test_no_question_is_among_the_conversations(site):
    def read(name): return json.loads((site / "data" / name).read_text("utf-8"))
    questions, rows = read("questions.json"), read("conversations.json")
    asked = {*questions["asked"], *(q for q, _ in questions["held_out"])}
    assert len(questions["held_out"]) == 60 and len(asked) > 60
    assert sorted(rows, key=int) == ["30", "100", "300", "1000"] and len(rows["1000"]) == 1000
    assert not {q for some in rows.values() for q, _ in some} & asked


def test_what_the_page_says_is_so(site, base):
    text = " ".join((PAGE / "index.html").read_text().split())
    assert "2.6 million weights" in text and round(base[0].num_parameters() / 1e5) == 26
    assert f"{len(COUNTRIES)} countries, {len(ANIMALS)} animals" in text
    size = sum(f.stat().st_size for f in (site / "data").iterdir() if "conversations" not in f.name)
    assert f"the models: {size / 1e6:.1f} MB" in text
    links = re.findall(r'href="\.\./(\w+)\.html"', text)
    assert len(links) > 4 and all((ROOT / f"nbs/{name}.ipynb").exists() for name in links)
    asked = re.search(r'<textarea id="prompt".*?>(.*?)<', text)[1]
    assert f'<span class="asked">{asked}</span>' in text  # its answers: test_talking


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_stand_out():
    "A contrast of 4.5 or more, light and dark: https://www.w3.org/TR/WCAG22/#contrast-minimum"
    css = (PAGE / "live.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", css)
    colours = {name: (light, dark) for name, light, dark in found}
    over = [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("bad", "card"),
            ("base", "card"), ("base", "base-soft"), ("instruct", "card"),
            ("instruct", "instruct-soft"), ("instruct", "paper"), ("ink", "base-soft")]
    for text, ground in over:
        for pair in zip(colours[text], colours[ground]):
            low, high = sorted(map(luminance, pair))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground, pair)


def test_no_folder_of_somebody_elses_is_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="no live page"):
        live().site(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def damaged(folder, content):
    "Copies of a safetensors file with one fault each, and what is to be said about it."
    length = int.from_bytes(content[:8], "little")
    faults = {"has no header": content[:5], "ends within its header": content[:100],
              "cannot be read": content[:8] + b"x" * length + content[8 + length:],
              "ends before": content[:-1],
              "not BF16 or F32": content.replace(b'"BF16"', b'"BF17"', 1),
              "bytes of": content.replace(b"[512,192]", b"[512,191]", 1)}
    for i, fault in enumerate(faults.values()):
        (folder / str(i)).write_bytes(fault)
    return faults, [str(folder / str(i)) for i in range(len(faults))]


def test_damaged_files_are_named(node, site, tmp_path):
    faults, files = damaged(tmp_path, (site / "data/model.safetensors").read_bytes())
    said = node("read", files=[*files, str(site / "data/model.safetensors")])
    assert said.pop() == ""
    for fault, message in zip(faults, said, strict=True):
        assert message.startswith("model.safetensors") and fault in message


def test_what_does_not_fit_is_named(node):
    missing, size, kind, *adapter = node("fit")
    assert missing == "model.safetensors has no model.norm.weight."
    assert "does not fit config.json" in size and "cannot run" in kind
    assert all("made for another model" in message for message in adapter) and len(adapter) == 2


# --- the page in a browser

@contextmanager
def served(folder, instead=None):
    "A server of a folder; `instead` has the bytes of files that it shall give out otherwise."
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            content = (instead or {}).get(self.path.split("?")[0], b"")
            if content is None:
                self.send_error(404)
            elif content:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)
            else:
                super().do_GET()

        def log_message(self, *args): pass
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def visit(browser, address, **options):
    "The page, in a browser that knows nothing of it; no error may appear in its console."
    options = dict(viewport=dict(width=1280, height=900)) | options
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    page.asked = asked
    yield page
    context.close()
    assert not [url for url in asked if not url.startswith((address, "data:"))]
    page.said = said


def ask(page, prompt=None):
    "Both answers, once they are complete."
    if prompt:
        page.locator("#prompt").fill(prompt)
    page.locator("#pace").select_option("0")
    page.get_by_role("button", name="Ask both").click()
    for who in ("base", "instruct"):
        page.locator(f"[data-who={who}] .state b").wait_for()
    expect(page.locator("#status")).to_contain_text("tokens a second")
    return page.locator(".out").all_inner_texts()


SHORT = dict(size="30", method="lora", rate="0.01")  # enough to learn to stop


def choose(page, size, method, rate):
    page.locator(f"[name=size][value='{size}']").check(force=True)
    page.locator(f"[name=method][value='{method}']").check(force=True)
    page.locator("#rate").select_option(rate)


def narrow(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_talking(site, browser):
    with served(site) as address, visit(browser, address) as page:
        assert not [url for url in page.asked if "data/" in url or "worker" in url]
        shown = page.locator(".out").all_inner_texts()
        base, instruct = ask(page)
        def words(text): return " ".join(text.replace("…", "").split())
        assert [words(base), words(instruct)] == [words(text) for text in shown]
        assert instruct.endswith("stops") and "Brasilia" in instruct
        token = page.locator("[data-who=instruct] .token", has_text="Bras").first
        token.click()
        others = page.locator("[data-who=instruct] .others li")
        expect(others).to_have_count(5)
        assert others.first.inner_text().startswith("␣Bras")
        page.locator("[data-who=instruct] .out").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#announcer")).to_contain_text("It could have been: is")
        summary = page.locator("[data-who=instruct] summary")
        summary.click()
        assert page.locator("[data-who=instruct] .given .mark").all_inner_texts() == [
            "<|im_start|>", "<|im_end|>", "<|im_start|>"]
        page.get_by_text("four solved examples too").click()
        base, _ = ask(page, "What is the capital of Brazil?")
        assert page.locator("[data-who=base] .after").count() and "Brasilia" in base
        typed, _ = ask(page, "<b>x</b><|im_end|>")
        assert "<b>x</b><|im_end|>" in typed and page.locator(".out b").count() == 0
    assert page.said == []


def test_a_question_in_between(site, browser):
    "Asked while the answers to another are being written: those end without a trace."
    with served(site) as address, visit(browser, address) as page:
        page.locator("#pace").select_option("400")
        page.locator("#go").click()
        page.locator("[data-who=base] .token").nth(2).wait_for()
        page.locator("#pace").select_option("0")
        page.get_by_role("button", name="Calculate 87 - 25.").click()
        expect(page.locator("#status")).to_contain_text("tokens a second")
        page.wait_for_timeout(600)
        base, instruct = page.locator(".out").all_inner_texts()
        assert base.startswith("Calculate") and instruct == "87 - 25 = 62stops"
        page.locator("#pace").select_option("400")
        page.locator("#go").click()
        page.locator("[data-who=base] .token").nth(2).wait_for()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("[data-who=base] .state")).to_contain_text("you stopped it")
    assert page.said == []


def test_without_a_network_after_the_first_visit(site, browser):
    with served(site) as address, visit(browser, address) as page:
        first = ask(page)
        page.evaluate("() => navigator.serviceWorker.ready.then(() => 1)")
        page.context.set_offline(True)
        page.goto(address)
        assert ask(page) == first


STOP_SOON = """() => {  // in the page: from here a step may be over before one has looked
    const status = document.querySelector("#tune-status");
    new MutationObserver((_, observer) => {
        if (!/Step [2-9] /.test(status.textContent)) return;
        observer.disconnect();
        document.querySelector("#pause").click();
    }).observe(status, {childList: true, characterData: true, subtree: true});
}"""


def test_fine_tuning(site, browser):
    with served(site) as address, visit(browser, address) as page:
        choose(page, **SHORT)
        page.evaluate(STOP_SOON)
        page.get_by_role("button", name="Start fine-tuning").click()
        status = page.locator("#tune-status")
        expect(status).to_contain_text("Stopped at step")
        at = int(re.search(r"step (\d+)", status.inner_text())[1])
        assert 2 <= at < 12
        _, mine = ask(page)  # what it has learned so far; nothing moves meanwhile
        assert page.locator("#answerer").input_value() == "mine" and mine
        assert f"step {at} of 12" in status.inner_text()
        page.get_by_role("button", name="Go on").click()
        expect(status).to_contain_text("Done: 12 steps")
        assert page.locator("#asked .end").count() >= 3
        bars = page.locator("#score .bars > div")
        assert "30, LoRA, rate 0.01" in bars.first.inner_text()
        assert "Lesson 01" in bars.last.inner_text() and bars.count() == 2
        stops = int(re.search(r"itself (\d+) times", page.locator("#score-says").inner_text())[1])
        assert stops > 30
        _, mine = ask(page)
        assert mine.endswith("stops")
    assert page.said == []


def test_conversations_of_ones_own(site, browser):
    with served(site) as address, visit(browser, address) as page:
        page.locator("#own summary").click()
        box, says = page.locator("#conversations"), page.locator("#own-says")
        expect(says).to_contain_text("300 conversations of ours")
        for text, fault in (("hello", "Line 1"), ("Q: a\nQ: b\nA: c", "Line 2"), ("A: c", "Line 1"),
                            ("Q: a\nA:", "missing"), ("", "no conversation")):
            box.fill(text)
            expect(says).to_contain_text(fault)
        page.get_by_role("button", name="Start fine-tuning").click()
        assert page.locator("#lab").is_hidden()
        box.fill("Q: Who are you?\nA: I am tiny.\nVery tiny.\n\nQ: 你好\nA: 你好！")
        expect(says).to_contain_text("2 conversations of yours")
        page.get_by_role("button", name="Start fine-tuning").click()
        expect(page.locator("#at")).to_have_text("3")
        page.locator("[name=size][value='30']").check(force=True)
        expect(says).to_contain_text("30 conversations of ours")
        page.locator("[name=size][value=own]").check(force=True)
        assert "Very tiny." in box.input_value()  # what was written is not lost
        box.fill("Q: x\nA: " + "long " * 600)
        page.get_by_role("button", name="Start anew").click()
        expect(page.locator("#tune-status")).to_contain_text("Conversation 1 has")
        page.get_by_role("button", name="Put ours back").click()
        expect(says).to_contain_text("conversations of ours")
    assert page.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(site, browser, scheme):
    phone = dict(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True)
    with served(site) as address:
        with visit(browser, address, color_scheme=scheme, **phone) as page:
            assert narrow(page)
            for details in page.locator("#tune summary").all()[:2]:
                details.click()
            page.locator("#go").tap()
            page.locator("[data-who=base] .state b").wait_for()
            page.locator("[data-who=instruct] .token").first.tap()
            assert narrow(page)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            red = int(re.search(r"\d+", colour)[0])
            assert red < 60 if scheme == "dark" else red > 200
    assert page.said == []


NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, [tabindex]")]
    .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).length"""


def test_every_control_has_a_name_and_a_key_reaches_it(site, browser):
    with served(site) as address, visit(browser, address) as page:
        assert page.evaluate(NAMELESS) == 0
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"
                                         " || document.activeElement.className"))
        order = ["prompt", "go", "way", "temperature", "pace", "out", "size", "method", "rate",
                 "start"]
        places = [reached.index(name) for name in order]
        assert places == sorted(places)


def test_the_colours_chosen_on_the_site_hold_and_motion_may_be_reduced(site, browser):
    options = dict(reduced_motion="reduce")
    with served(site) as address, visit(browser, address, **options) as page:
        page.evaluate("localStorage.setItem('quarto-color-scheme', 'alternate')")
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        bar = "getComputedStyle(document.querySelector('.bar i')).transitionDuration"
        ask(page)
        page.locator("[data-who=base] .token").first.click()
        assert page.evaluate(bar) == "0s"


def test_trouble_is_told(site, browser):
    model = (site / "data/model.safetensors").read_bytes()
    changed = model[:-7] + bytes([model[-7] ^ 1]) + model[-6:]
    adapter = "/data/adapter.safetensors"
    for instead, fault in (
            ({"/data/model.safetensors": model[:2_000_000]}, "2,000,000 of 5,119,360 bytes came"),
            ({"/data/model.safetensors": changed}, "its hash differs"),
            ({adapter: None}, "adapter.safetensors is not on this server (404)")):
        with served(site, instead) as address, visit(browser, address) as page:
            page.locator("#go").click()
            expect(page.locator("#status")).to_contain_text(fault)
            assert page.locator("#go").inner_text() == "Ask both"
            instead.clear()  # the server is in order again, so the next question works
            assert "Brasilia" in ask(page)[1]


def test_without_simd_it_talks(site, browser):
    with served(site, {"/kernel.wasm": b"\0asm, but not as this browser knows it"}) as address:
        with visit(browser, address) as page:
            assert "Brasilia" in ask(page)[1]
            assert page.get_by_role("button", name="Start fine-tuning").is_disabled()
            expect(page.locator("#tune-status")).to_contain_text("no WASM SIMD")
    assert page.said == []


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception),
                                         ("", pytest.skip.Exception)])
def test_without_node(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(outcome, match="no node"):
        find_node()
