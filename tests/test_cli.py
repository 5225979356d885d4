"The command line as people use it: right, wrong, interrupted."
import io
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from calling import call

from sftlab import cli, errors
from sftlab.data import split_rows
from sftlab.models import load
from sftlab.program.data import data_app
from sftlab.tiny.world import examples

SFTLAB = [sys.executable, "-m", "sftlab.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two small files and what was trained on them, and what the screen said."
    folder = tmp_path_factory.mktemp("cli")
    made = examples("train", 24)
    alpaca = [dict(instruction=e["question"], input="", output=e["answer"]) for e in made]
    words = "word " * 2000
    long = [dict(instruction="Repeat.", input="", output=words),
            dict(instruction=f"Repeat. {words}", input="", output="No.")]
    (folder / "alpaca.json").write_text(json.dumps(alpaca + long))
    with open(folder / "chats.jsonl", "w") as chats:
        for e in made:
            turns = [{"from": "human", "value": e["question"]},
                     {"from": "gpt", "value": e["answer"]}]
            print(json.dumps(dict(conversations=turns)), file=chats)
    def train(name, data, *more):
        return call("train", "--data", folder / data, "--output", folder / name, *more)
    screens = dict(
        lora=train("lora", "alpaca.json", "--epochs", 2, "--seed", 3),
        full=train("full", "chats.jsonl", "--epochs", 1, "--method", "full", "--max-rows", 12),
        qlora=train("qlora", "alpaca.json", "--epochs", 3, "--method", "qlora"))
    (folder / "screens.json").write_text(json.dumps(screens))
    return folder


def screen(folder, name):
    return json.loads((folder / "screens.json").read_text())[name]


def run_of(folder, name):
    return json.loads((folder / name / "run.json").read_text())


@pytest.mark.slow
def test_training_tells_what_it_does(folder):
    status, out, err = screen(folder, "lora")
    assert (status, err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].isalpha())
    assert said["read"].startswith("26 rows from ")
    assert ("2 of 26 rows are longer and are cut there; 1 of these have no answer before the cut "
            "and are left out") in said["context"]
    assert said["split"].startswith("23 rows to train on, 2 held out")
    assert "fluent nonsense" in said["note"] and "--model Qwen/Qwen3-0.6B-Base" in said["note"]
    told = [line for line in out.splitlines() if "held-out loss" in line]
    assert [line.split(":")[0].strip() for line in told] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(out.count(f"\n{word} ") == 2 for word in ("question", "before", "after"))
    assert said["next"] == f"sftlab chat {folder / 'lora'}"


@pytest.mark.slow
def test_training_leaves_a_whole_result(folder):
    run = run_of(folder, "lora")
    assert run["held_out_nll_after"] < run["held_out_nll_before"]
    rows = ("rows", "rows_cut", "rows_left_out", "rows_trained", "rows_held_out")
    assert [run[name] for name in rows] == [26, 2, 1, 23, 2]
    settings = ("method", "epochs", "learning_rate", "seed", "steps")
    assert [run[name] for name in settings] == ["lora", 2, 5e-3, 3, 6]
    picture = (folder / "lora" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert not list(folder.glob(".*"))
    assert all(path.is_file() for path in (folder / "lora").iterdir())


@pytest.mark.slow
def test_what_is_told_of_rows_is_what_the_lessons_find(folder):
    "Cut and left out as lesson 04's labels say; the loss is that of the saved adapter."
    from sftlab.files.rows import read_rows
    from sftlab.finetune import held_out_nll
    from sftlab.masking import encode_rows
    net, tokenizer = load("tiny")
    run, read = run_of(folder, "lora"), read_rows(folder / "alpaca.json")
    encoded = encode_rows(tokenizer, read)
    assert sum(len(row["input_ids"]) > 512 for row in encoded) == run["rows_cut"]
    fit = [row for row, e in zip(read, encoded) if any(x != -100 for x in e["labels"][1:512])]
    assert len(read) - len(fit) == run["rows_left_out"]
    share = 0.1
    parts = split_rows(fit, {"train": 1 - share, "held out": share}, run["seed"])
    assert held_out_nll(net, tokenizer, parts["held out"]) == pytest.approx(
        run["held_out_nll_before"], rel=1e-6)
    tuned, _ = load(str(folder / "lora"))
    assert held_out_nll(tuned, tokenizer, parts["held out"]) == pytest.approx(
        run["held_out_nll_after"], rel=1e-6)


@pytest.mark.slow
def test_other_programs_load_the_results(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    def model(path): return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base, full = model(load("tiny")[0].name_or_path), model(folder / "full")
    tokenizer = AutoTokenizer.from_pretrained(folder / "full")
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        assert not torch.equal(full(ids).logits, before)
        lora = PeftModel.from_pretrained(base, folder / "lora").eval()
        assert not torch.equal(lora(ids).logits, before)


@pytest.mark.slow
def test_qlora_trains_next_to_weights_in_four_bits(folder):
    """The adapter alone is saved, and is put on weights in 4 bits again, where it gives the loss
    that was printed."""
    from bitsandbytes.nn import Linear4bit
    status, out, err = screen(folder, "qlora")
    assert (status, err) == (0, "")
    assert "4 bits and float32 on cpu" in out and ": the adapter, loss.png" in out
    run, lora = run_of(folder, "qlora"), run_of(folder, "lora")
    assert run["method"] == "qlora" and run["held_out_nll_after"] < run["held_out_nll_before"]
    assert run["held_out_nll_before"] != lora["held_out_nll_before"]
    assert (folder / "qlora/adapter_model.safetensors").exists()
    assert not (folder / "qlora/model.safetensors").exists()
    def layers(name, **how):
        model = load(str(folder / name), **how)[0]
        return sum(isinstance(module, Linear4bit) for module in model.modules())
    assert layers("qlora") == 28 and layers("qlora", four_bit=False) == 0 and layers("lora") == 0


@pytest.mark.slow
def test_max_rows(folder):
    status, out, _ = screen(folder, "full")
    assert status == 0 and "24 rows from" in out and "12 of them are used" in out
    run = run_of(folder, "full")
    assert run["rows"] == run["rows_trained"] + run["rows_held_out"] == 12


@pytest.mark.slow
def test_a_result_is_never_written_over(folder):
    before = {f: f.read_bytes() for f in (folder / "lora").iterdir()}
    status, out, err = call("train", "--data", folder / "alpaca.json", "--output", folder / "lora")
    assert (status, out) == (1, "") and "holds a finished run" in err and err.count("\n") == 1
    assert before == {f: f.read_bytes() for f in (folder / "lora").iterdir()}


ROW = '{"instruction": "Hi", "output": "Hello"}'
OTHER = ROW.replace("Hi", "Ho")
FILES = {"alpaca": f"{ROW}\n{OTHER}", "text": '{"text": "x"}', "one": ROW, "twice": f"{ROW}\n{ROW}",
         "bad": ROW + '\n{"instruction": "Hi"}'}
TRAIN = "train --data {alpaca} --output {out} "


@pytest.mark.parametrize("status, words, says", [
    (2, "train", "Missing option '--data'"),
    (2, "train --data {alpaca}", "Missing option '--output'"),
    (2, "train --data nothing.json --output {out}", "'nothing.json' does not exist"),
    (2, "train --data . --output {out}", "is a directory"),
    (2, "trian", "No such command 'trian'"),
    (2, TRAIN + "--epoch 1", "No such option: --epoch"),
    (2, TRAIN + "--epochs 0", "'--epochs'"),
    (2, TRAIN + "--epochs nan", "'--epochs'"),
    (2, TRAIN + "--epochs many", "'--epochs'"),
    (2, TRAIN + "--learning-rate -1", "'--learning-rate'"),
    (2, TRAIN + "--learning-rate nan", "'--learning-rate'"),
    (2, TRAIN + "--method lora4", "'full', 'lora', 'qlora'"),
    (2, TRAIN + "--max-rows 1", "'--max-rows'"),
    (2, TRAIN + "--seed -1", "'--seed'"),
    (2, "chat", "Missing argument 'DIR'"),
    (2, "doctor now", "unexpected extra argument"),
    (1, "train --data {text} --output {out}", "found the fields text: accepted are"),
    (1, "train --data {one} --output {out}", "only 1 rows or groups of rows that differ, and 2"),
    (1, "train --data {twice} --output {out}", "line 2: is the same as line 1"),
    (1, "train --data {bad} --output {out}", "line 2: field 'output' is missing"),
    (1, "train --data {alpaca} --output {alpaca}/deeper", "cannot be made"),
    (1, TRAIN + "--model nobody/nothing", "'nobody/nothing' is not on this machine"),
    (1, TRAIN + "--model {here}", "holds no model"),
    (1, "chat {here}/nothing", "There is no folder"),
    (2, "memory tiny --rank 0", "'--rank'"),
    (2, "memory tiny --method dora", "'--method'"),
    (1, "memory gpt-5", "Known without any file: llama-2-7b"),
    (1, "memory {here}", "holds no model"),
    (1, "progress {here}/nothing", "there is no folder"),
])
def test_mistakes_get_one_line(tmp_path, status, words, says):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    names = {name: tmp_path / name for name in (*FILES, "out")} | dict(here=tmp_path)
    got, out, err = call(*[word.format(**names) for word in words.split()])
    assert (got, err.count("\n")) == (status, 1), (got, err)
    assert err.startswith("sftlab: ") and says in err, err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def call_that_meets(monkeypatch, fail):
    "A command in the middle of which `fail()` is called."
    monkeypatch.setattr("sftlab.program.memory.estimate", lambda *_, **__: fail())
    return call("memory", "llama-2-7b")


def raising(error):
    def fail(): raise error
    return fail


@pytest.mark.parametrize("kind", [errors.SftlabError, *errors.SftlabError.__subclasses__()])
def test_every_error_of_the_course_gets_one_line(monkeypatch, kind):
    found = call_that_meets(monkeypatch, raising(kind("here: this is wrong: fix it")))
    assert found == (1, "", "sftlab: here: this is wrong: fix it\n")


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(2**60, dtype=torch.uint8),
    lambda: numpy.empty(2**60, "uint8"),
    raising(MemoryError()),
    raising(torch.OutOfMemoryError("no room on the GPU")),
    raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")),
    raising(RuntimeError("[enforce fail at alloc_cpu.cpp:1] data. DefaultCPUAllocator: not enough "
                         "memory: you tried to allocate 8 bytes.")),
    raising(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
], ids=["torch", "numpy", "python", "type", "gpu", "windows", "context"])
def test_memory_that_ran_out_is_told_with_what_to_do(monkeypatch, fail):
    status, out, err = call_that_meets(monkeypatch, fail)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("sftlab: not enough memory: use a smaller model, or --method lora (")


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("unsupported memory format option ChannelsLast"),
    RuntimeError("some elements refer to a single memory location"),
    ValueError("out of memory"),
])
def test_a_bug_that_speaks_of_memory_stays_a_bug(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        call_that_meets(monkeypatch, raising(error))
    assert raised.value is error


def test_memory_says_what_fits_and_what_does_not():
    from sftlab.memory import estimate, max_that_fits
    run = ("llama-2-7b", "--method", "qlora", "--card", 16, "--lora-rank", 16, "--batch")
    status, out, err = call("memory", *run, 2)
    assert (status, err) == (0, "") and out.startswith(repr(estimate("llama-2-7b", "qlora", 2)))
    rows = max_that_fits("llama-2-7b", "qlora", 16, length=1024)
    tokens = max_that_fits("llama-2-7b", "qlora", 16, batch=2)
    assert out.splitlines()[-1].endswith(
        f"this run fits; rows of 1,024 tokens: {rows:,} at most; 2 rows at a time: {tokens:,} "
        "tokens at most")
    assert "this run does not fit" in call("memory", *run, rows + 1)[1]
    assert "this run perhaps fits" in call("memory", *run, rows)[1]
    status, out, err = call("memory", "llama-65b", "--method", "qlora", "--card", 24)
    assert status == 1 and err.count("\n") == 1
    assert "a card of 24 GB has 23.2 to give: weights alone are 33.4" in err


def test_memory_reads_a_config_and_knows_the_presets():
    from sftlab.memory import estimate
    predicted = estimate(load("tiny")[0], "full", precision="fp32")
    _, out, _ = call("memory", "tiny", "--method", "full", "--precision", "fp32")
    assert out.strip() == repr(predicted)
    assert call("memory", "Qwen/Qwen3-4B-Base") == call("memory", "qwen3-4b")
    assert call("memory", "gpu") == call("memory", "qwen3-8b") != call("memory", "qwen3-4b")


def test_memory_keeps_the_four_bits_of_a_preset():
    "As `sftlab train` does: t4 is loaded in 4 bits, whatever adapter is asked for."
    _, qlora, _ = call("memory", "qwen3-4b", "--method", "qlora")
    assert call("memory", "t4", "--method", "qlora") == (0, qlora, "")
    for words in (("t4",), ("t4", "--method", "lora")):
        status, out, err = call("memory", *words)
        note, rest = out.split("\n", 1)
        assert (status, rest, err) == (0, qlora, "") and note.startswith("note     t4: its weights")
    status, out, err = call("memory", "t4", "--method", "full")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "t4: weights in 4 bits cannot be trained: use the method qlora" in err


def test_memory_and_train_share_names_and_the_rank():
    from peft import LoraConfig
    _, out, _ = call("memory", "qwen3-4b")
    assert "qwen3-4b, lora r=8, 1 x 1,024" in out and LoraConfig().r == 8
    new = call("memory", "qwen3-4b", "--lora-rank", 4, "--batch-size", 2, "--max-length", 64)
    old = call("memory", "qwen3-4b", "--rank", 4, "--batch", 2, "--length", 64)
    assert new == old and "lora r=4, 2 x 64" in new[1]


def config_folder(path, content):
    path.mkdir()
    (path / "config.json").write_bytes(content if isinstance(content, bytes) else
                                       json.dumps(content).encode())
    return path


SMALL = dict(vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
GATED = SMALL | dict(intermediate_size=128, num_key_value_heads=2)


@pytest.mark.parametrize("config, says", [
    (dict(model_type="gemma", head_dim=24, **GATED), "gemma, lora r=8, 1 x 64"),
    (dict(model_type="gpt2", **SMALL), "gpt2, lora r=8, 1 x 64"),
    (dict(model_type="bloom", **SMALL), "transformers has no sdpa for bloom"),
    (dict(model_type="llama", quantization_config=dict(
        quant_method="bitsandbytes", load_in_4bit=True), **GATED), "llama, qlora r=8, 1 x 64"),
], ids=["gemma", "gpt2", "bloom", "four-bits"])
def test_memory_estimates_a_folder(tmp_path, config, says):
    folder = config_folder(tmp_path / "llama-2-7b", config) # its name says nothing
    status, out, err = call("memory", folder, "--max-length", 64)
    assert (status, err) == (0, "") and says in out


@pytest.mark.parametrize("config, says", [
    (b"", "not a valid JSON"), (b"{", "not a valid JSON"), (b"\xff\xfe\x00", "not a valid JSON"),
    (b"[]", "cannot be read"), (b"3", "cannot be read"), (b"null", "cannot be read"),
    ({}, "cannot be read"), (dict(model_type=3), "cannot be read"),
    (dict(model_type="nope"), "cannot be read"),
    (dict(model_type="llama", hidden_size="big"), "'hidden_size' expected int, got str"),
    (dict(model_type="llama", num_attention_heads=0), "cannot be read"),
    (dict(model_type="llama", num_hidden_layers=10**12), "no model has so many"),
    (dict(model_type="gpt2", n_layer=10**12), "no model has so many"),
    (dict(model_type="gpt2", activation_function="nope"), "gpt2: no such model can be built"),
    (dict(model_type="mixtral"), "mixtral cannot be estimated: the kinds of models that can are"),
    (dict(model_type="mamba"), "mamba cannot be estimated"),
    (dict(model_type="bert"), "bert cannot be estimated"),
    (dict(model_type="llama", quantization_config=dict(quant_method="gptq", bits=4)),
     "quantised by gptq"),
], ids=str)
def test_memory_refuses_a_folder_in_one_line(tmp_path, config, says):
    folder = config_folder(tmp_path / "folder", config)
    status, out, err = call("memory", folder)
    assert (status, out, err.count("\n")) == (1, "", 1) and says in err


def test_memory_says_that_an_adapter_is_none(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    status, out, err = call("memory", tmp_path)
    assert (status, out) == (1, "") and err.endswith(
        "is an adapter: name the model that it was made for\n")


@pytest.mark.parametrize("words", [
    "--card nan", "--card inf", "--card 1e308", "--card -1", "--card 0", "--batch-size 0",
    "--batch-size 1000000000000", "--max-length 1" + 300 * "0", "--lora-rank 1000000000",
    "--max-length x"], ids=lambda words: words[:20])
def test_memory_refuses_sizes_that_nothing_has(words):
    status, out, err = call("memory", "qwen3-4b", *words.split())
    assert (status, out) == (2, "") and words.split()[0] in err


def used_by(command): # seconds of CPU, and what was printed
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, done.stdout


@pytest.mark.slow
def test_help_is_quick():
    assert min(used_by([*SFTLAB, "--help"])[0] for _ in range(3)) < 0.5


COMMANDS = ("data", "train", "chat", "eval", "merge", "memory", "doctor", "lab", "progress")


def test_help_has_examples():
    status, help, _ = call("--help")
    assert status == 0 and all(f"\n  {command} " in help for command in COMMANDS)
    for command in ("train", "chat", "eval", "merge", "memory", "lab", "progress"):
        status, out, _ = call(command, "--help")
        assert status == 0 and f"\n    sftlab {command}" in out
    for command in ("check", "convert", "split", "stats", "audit"):
        status, out, _ = call("data", command, "--help")
        assert status == 0 and f"\n    sftlab data {command}" in out
    assert call() == (2, help, "")


def test_commands_have_their_names_and_their_functions_others():
    "In a module, `train` is what a lesson teaches."
    registered = [*cli.app.registered_commands, *data_app.registered_commands]
    commands = {command.name: command.callback for command in registered}
    assert set(commands) == {*COMMANDS, "check", "convert", "split", "stats", "audit"} - {"data"}
    assert all(function.__name__ == f"{name}_command" for name, function in commands.items())


# A command that is slow on purpose, so that it can be interrupted in the middle.
SLOW_TRAINING = """
import sys, time, transformers
from sftlab import cli
step = transformers.Trainer.training_step
def slow(*args, **kwargs):
    print("step", flush=True)
    time.sleep(0.2)
    return step(*args, **kwargs)
transformers.Trainer.training_step = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def visible(folder): return list(folder.glob("[!.]*"))


@pytest.mark.slow
def test_training_interrupted_early_leaves_nothing(tmp_path):
    data, place = tmp_path / "rows.jsonl", tmp_path / "place"
    place.mkdir()
    rows = [dict(instruction=e["question"], output=e["answer"]) for e in examples("train", 24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "--data", data, "--output", place / "out", "--epochs", "100"]
    run = subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, *words], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step"):
            break
    assert run.poll() is None and list(place.glob(".*out*")) and not visible(place) # in the middle
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.endswith("sftlab: stopped\n") and "Traceback" not in err
    assert list(place.iterdir()) == [] # it had written no checkpoint to go on from


def chat(monkeypatch, model, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return call("chat", model)


@pytest.mark.slow
def test_chat_answers_line_by_line(folder, monkeypatch):
    question = "What is the capital of Peru?"
    for model in ("lora", "full"):
        status, out, err = chat(monkeypatch, folder / model, question, "", "Are you sure?")
        assert (status, err) == (0, "") and len(out.splitlines()) >= 2
    status, out, _ = chat(monkeypatch, folder / "lora", "/quit", question)
    assert (status, out) == (0, "")


def test_chat_says_what_it_forgets(monkeypatch):
    seen = []
    def stream(model, tokenizer, ids, max_new_tokens, **_):
        seen.append((tokenizer.decode(ids), len(ids), max_new_tokens))
        yield "Yes."
    monkeypatch.setattr("sftlab.generation.stream", stream)
    words = " ".join(["seven"] * 60)
    status, out, _ = chat(monkeypatch, "tiny", f"first {words}", f"second {words}",
                          "third " + 20 * words, "fourth")
    assert status == 0 and out.splitlines().count("Yes.") == 3
    assert all(n + room <= 512 for _, n, room in seen)
    last = seen[-1][0]
    assert "(too long: " in out and "third" not in last
    assert last.endswith("fourth<|im_end|>\n<|im_start|>assistant\n")
    assert ("first" in last) == ("forgotten" not in out)
    assert "second" in last and "Yes.<|im_end|>" in last
    status, out, _ = chat(monkeypatch, "tiny", *[f"{n} {words}" for n in range(6)])
    assert "the oldest 2 messages are forgotten" in out
    assert "\n0 seven" not in seen[-1][0] and "\n5 seven" in seen[-1][0]


SLOW_CHAT = """
import sys, time
from sftlab import cli, generation
stream = generation.stream
def slow(*a, **k):
    for piece in stream(*a, **k | dict(stop_ids=())):
        time.sleep(0.1)
        yield piece or "."
generation.stream = slow
sys.exit(cli.main(["chat", "tiny"]))
"""


@pytest.mark.slow
def test_control_c_stops_the_answer_and_not_the_program():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SLOW_CHAT])
    text = ""
    def read_until(found, seconds=60):
        nonlocal text
        end = time.time() + seconds
        while not found(text):
            assert time.time() < end, text
            if select.select([terminal], [], [], 0.2)[0]:
                text += os.read(terminal, 65536).decode(errors="replace")
    def prompted(text): return text.endswith("> ")
    try:
        read_until(prompted)
        os.write(terminal, b"Hello\n")
        start = len(text)
        read_until(lambda t: len(t) > start + len("Hello\r\n") + 3)
        os.write(terminal, b"\x03") # Ctrl-C in the middle of the answer
        read_until(lambda t: "(stopped)" in t and prompted(t), seconds=10)
        time.sleep(0.5) # the prompt is shown a moment before keys are read
        os.write(terminal, b"\x03") # and at the prompt
        read_until(lambda t: "(Ctrl-D or /quit ends)" in t.split("(stopped)")[1] and prompted(t))
        os.write(terminal, b"\x04") # Ctrl-D
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = None
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)


def test_doctor(monkeypatch):
    status, out, err = call("doctor")
    assert (status, err) == (0, "") and "yes  lessons" in out
    for name in ("python", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes",
                 "jupyterlab", "device", "memory", "disk"):
        assert f"\n{name} " in "\n" + out, name
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "trl" else "1.0")
    status, out, _ = call("doctor")
    assert status == 1 and "no   lessons" in out and "pip install trl" in out


def test_progress_looks_for_a_copy_of_the_course(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, nothing_done, err = call("progress")
    assert (status, err) == (0, "") and nothing_done.startswith("0 of ")
    (tmp_path / "sftlab-course").mkdir()
    (tmp_path / "sftlab-course" / ".sftlab.json").write_text("{}")
    kept = {"generation.temperature": dict(state="right", tries=1)}
    (tmp_path / "sftlab-course" / "sftlab-progress.json").write_text(json.dumps(kept))
    assert call("progress")[1].startswith("1 of ")
    assert call("progress", "sftlab-course") == call("progress")
    (tmp_path / "other").mkdir()
    assert call("progress", "other")[1] == nothing_done


NAMES = ["alpaca_en_demo.json", "alpaca_zh_demo.json", "sharegpt_dummy_conversation.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_real_file(real_data, tmp_path, monkeypatch, name):
    shutil.copy(real_data / name, tmp_path / name)
    status, out, err = call("train", "--data", tmp_path / name, "--output", tmp_path / "out",
                            "--epochs", 1, "--max-rows", 40, "--on-error", "quarantine")
    assert (status, err) == (0, ""), err
    run = run_of(tmp_path, "out")
    assert run["rows"] == 40 and run["held_out_nll_after"] < run["held_out_nll_before"]
    status, out, err = chat(monkeypatch, tmp_path / "out", "Who are you?")
    assert (status, err) == (0, "") and out.strip()
