"""The live page (nbs/live/): the same numbers as Python's, and a browser that uses it.

The JavaScript modules run in node, through tests/live.mjs; the page runs in Chromium, served from a
temporary folder. A greedy answer may differ only where the two best logits are nearly equal.
"""
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sftlab.files.adapters import adapter_tensors, load_adapter
from sftlab.generation import few_shot_prompt, truncate_at_stop
from sftlab.lora import adapters, inject, merge, train_tokens
from sftlab.masking import encode
from sftlab.models import load
from sftlab.tiny.pretraining import chat_prompt
from sftlab.tiny.world import as_messages, examples
from sftlab.training import (PADDING_FREE, TrainingConfig, count_targets, effective_batches,
                             new_optimizer, nll_sum, padded, training_steps)

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize("backend, n, limit", [("kernel", 50, 48), ("plain", 8, 16)])
def test_greedy_answers_are_those_of_python(node, base, instruct, prompts, backend, n, limit):
    asked = {name: of_all[-n:] for name, of_all in prompts.items()}
    found = node("answers", backend=backend, limit=limit, **asked)
    for name, model in (("base", base[0]), ("instruct", instruct)):
        answers = list(zip(asked[name], found[name]))
        wrong = [differs(model, prompt, answer, limit) for prompt, answer in answers]
        assert len(wrong) == n and not any(wrong), f"{name}: {sum(wrong)} answers differ"
    if n == 50:
        assert sum(ids[-1] == 2 for ids in found["instruct"]) > 40


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


def for_page(rows): return [dict(ids=r["input_ids"], labels=r["labels"]) for r in rows]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_are_those_of_torch(node, method, tmp_path):
    model, rows = prepared(method, tmp_path)
    batch = padded(rows[:8])
    loss = nll_sum(model, batch) / count_targets(batch)
    loss.backward()
    wanted = dict(model.named_parameters())
    if method == "lora":
        wanted = {name: p for name, p in adapter_tensors(model).items()}
    save_file({name: p.grad.contiguous() for name, p in wanted.items()}, tmp_path / "g.safetensors")
    found = node("gradients", settings=dict(method=method), rows=for_page(rows[:8]),
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
