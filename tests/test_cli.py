"The command line as people use it: right, wrong, interrupted."
import contextlib, io, json, os, pty, resource, select, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from sftlab import cli
from sftlab.tiny.world import examples

SFTLAB = [sys.executable, "-m", "sftlab.cli"]

def call(*words):
    "Exit status, stdout and stderr of one command, run in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two small files and what was trained on them, and what the screen said."
    folder = tmp_path_factory.mktemp("cli")
    made = examples("train", 24)
    alpaca = [dict(instruction=e["question"], input="", output=e["answer"]) for e in made]
    long = [dict(instruction="Repeat.", input="", output="word " * 2000), dict(instruction="Repeat. " + "word " * 2000, input="", output="No.")]
    (folder / "alpaca.json").write_text(json.dumps(alpaca + long))
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(dict(conversations=[
        {"from": "human", "value": e["question"]}, {"from": "gpt", "value": e["answer"]}])) for e in made))
    screens = dict(
        lora=call("train", "--data", folder / "alpaca.json", "--output", folder / "lora", "--epochs", 2, "--seed", 3),
        full=call("train", "--data", folder / "chats.jsonl", "--output", folder / "full", "--epochs", 1, "--method", "full", "--max-rows", 12),
        qlora=call("train", "--data", folder / "alpaca.json", "--output", folder / "qlora", "--epochs", 3, "--method", "qlora"))
    (folder / "screens.json").write_text(json.dumps(screens))
    return folder

def screen(folder, name):
    return json.loads((folder / "screens.json").read_text())[name]

def test_training_tells_what_it_does(folder):
    status, out, err = screen(folder, "lora")
    assert (status, err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].isalpha())
    assert said["read"].startswith("26 rows from ")
    assert "2 of 26 rows are longer and are cut there; 1 of these have no answer before the cut and are left out" in said["context"]
    assert said["split"].startswith("23 rows to train on, 2 held out")
    assert "fluent nonsense" in said["note"] and "--model Qwen/Qwen3-0.6B-Base" in said["note"]
    assert [line.split(":")[0].strip() for line in out.splitlines() if "held-out loss" in line] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(out.count(f"\n{word} ") == 2 for word in ("question", "before", "after"))
    assert said["next"] == f"sftlab chat {folder / 'lora'}"

def test_training_leaves_a_whole_result(folder):
    run = json.loads((folder / "lora" / "run.json").read_text())
    assert run["held_out_nll_after"] < run["held_out_nll_before"]
    assert (run["rows"], run["rows_cut"], run["rows_left_out"], run["rows_trained"], run["rows_held_out"]) == (26, 2, 1, 23, 2)
    assert (run["method"], run["epochs"], run["learning_rate"], run["seed"], run["steps"]) == ("lora", 2, 5e-3, 3, 6)
    assert (folder / "lora" / "loss.png").read_bytes().startswith(b"\x89PNG") and (folder / "lora" / "loss.png").stat().st_size > 5000
    assert not list(folder.glob(".*"))

def test_other_programs_load_the_results(folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = AutoModelForCausalLM.from_pretrained(cli.load("tiny")[0].name_or_path, dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder / "full")("Hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        assert not torch.equal(full(ids).logits, before)
        assert not torch.equal(PeftModel.from_pretrained(base, folder / "lora").eval()(ids).logits, before)

def test_qlora_trains_beside_weights_in_four_bits(folder):
    "The adapter alone is saved, and is put on weights in 4 bits again, where it gives the loss that was printed."
    from bitsandbytes.nn import Linear4bit
    status, out, err = screen(folder, "qlora")
    assert (status, err) == (0, "") and "4 bits and float32 on cpu" in out and ": the adapter, loss.png" in out
    run = json.loads((folder / "qlora/run.json").read_text())
    assert run["method"] == "qlora" and run["held_out_nll_after"] < run["held_out_nll_before"] != json.loads((folder / "lora/run.json").read_text())["held_out_nll_before"]
    assert (folder / "qlora/adapter_model.safetensors").exists() and not (folder / "qlora/model.safetensors").exists()
    layers = lambda name, **how: sum(isinstance(m, Linear4bit) for m in cli.load(str(folder / name), **how)[0].modules())
    assert layers("qlora") == 28 and layers("qlora", four_bit=False) == 0 and layers("lora") == 0

def test_max_rows(folder):
    status, out, _ = screen(folder, "full")
    assert status == 0 and "24 rows from" in out and "12 of them are used" in out
    run = json.loads((folder / "full" / "run.json").read_text())
    assert run["rows"] == run["rows_trained"] + run["rows_held_out"] == 12

def test_a_result_is_never_written_over(folder):
    before = {f: f.read_bytes() for f in (folder / "lora").iterdir()}
    status, out, err = call("train", "--data", folder / "alpaca.json", "--output", folder / "lora")
    assert (status, out) == (1, "") and "holds a finished run" in err and err.count("\n") == 1
    assert before == {f: f.read_bytes() for f in (folder / "lora").iterdir()}

DATA = ["train", "--data", "{alpaca}", "--output", "{out}"]

@pytest.mark.parametrize("status, words, says", [
    (2, ["train"], "Missing option '--data'"),
    (2, ["train", "--data", "{alpaca}"], "Missing option '--output'"),
    (2, ["train", "--data", "nothing.json", "--output", "{out}"], "'nothing.json' does not exist"),
    (2, ["train", "--data", ".", "--output", "{out}"], "is a directory"),
    (2, ["trian"], "No such command 'trian'"),
    (2, [*DATA, "--epoch", "1"], "No such option: --epoch"),
    (2, [*DATA, "--epochs", "0"], "'--epochs'"),
    (2, [*DATA, "--epochs", "nan"], "'--epochs'"),
    (2, [*DATA, "--epochs", "many"], "'--epochs'"),
    (2, [*DATA, "--learning-rate", "-1"], "'--learning-rate'"),
    (2, [*DATA, "--learning-rate", "nan"], "'--learning-rate'"),
    (2, [*DATA, "--method", "lora4"], "'full', 'lora', 'qlora'"),
    (2, [*DATA, "--max-rows", "1"], "'--max-rows'"),
    (2, [*DATA, "--seed", "-1"], "'--seed'"),
    (2, ["chat"], "Missing argument 'DIR'"),
    (2, ["doctor", "now"], "unexpected extra argument"),
    (1, ["train", "--data", "{text}", "--output", "{out}"], "found the fields text: accepted are"),
    (1, ["train", "--data", "{one}", "--output", "{out}"], "only 1 rows or groups of rows that differ, and 2 parts"),
    (1, ["train", "--data", "{twice}", "--output", "{out}"], "line 2: is the same as line 1"),
    (1, ["train", "--data", "{bad}", "--output", "{out}"], "line 2: field 'output' is missing"),
    (1, ["train", "--data", "{alpaca}", "--output", "{alpaca}/deeper"], "cannot be made"),
    (1, [*DATA, "--model", "nobody/nothing"], "'nobody/nothing' is not on this machine"),
    (1, [*DATA, "--model", "{here}"], "holds no model"),
    (1, ["chat", "{here}/nothing"], "There is no folder"),
    (2, ["memory", "tiny", "--rank", "0"], "'--rank'"),
    (2, ["memory", "tiny", "--method", "dora"], "'--method'"),
    (1, ["memory", "gpt-5"], "Known without any file: llama-2-7b"),
    (1, ["memory", "{here}"], "holds no model"),
])
def test_mistakes_get_one_line(tmp_path, status, words, says):
    row = '{"instruction": "Hi", "output": "Hello"}'
    for name, content in (("alpaca", row + "\n" + row.replace("Hi", "Ho")), ("text", '{"text": "x"}'), ("one", row), ("twice", f"{row}\n{row}"), ("bad", row + '\n{"instruction": "Hi"}')):
        (tmp_path / name).write_text(content)
    names = {name: tmp_path / name for name in ("alpaca", "text", "one", "twice", "bad", "out")} | dict(here=tmp_path)
    got, out, err = call(*[word.format(**names) for word in words])
    assert (got, err.count("\n")) == (status, 1) and err.startswith("sftlab: ") and says in err, (got, err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

def test_memory_says_what_fits_and_what_does_not():
    from sftlab.memory import estimate, largest
    status, out, err = call("memory", "llama-2-7b", "--method", "qlora", "--card", 16, "--batch", 2)
    assert (status, err) == (0, "") and out.startswith(repr(estimate("llama-2-7b", "qlora", 2)))
    rows, tokens = largest("llama-2-7b", "qlora", 16, length=1024), largest("llama-2-7b", "qlora", 16, batch=2)
    assert out.splitlines()[-1].endswith(f"this run fits; rows of 1,024 tokens: {rows:,} at most; 2 rows at a time: {tokens:,} tokens at most")
    assert "this run does not fit" in call("memory", "llama-2-7b", "--method", "qlora", "--card", 16, "--batch", rows + 1)[1]
    status, out, err = call("memory", "llama-65b", "--method", "qlora", "--card", 24)
    assert status == 1 and err.count("\n") == 1 and "a card of 24 GB has 23.2 to give: weights alone are 33.4" in err

def test_memory_reads_a_config_and_knows_the_presets():
    from sftlab.memory import estimate
    assert call("memory", "tiny", "--method", "full", "--precision", "fp32")[1].strip() == repr(estimate(cli.load("tiny")[0], "full", precision="fp32"))
    assert call("memory", "t4") == call("memory", "Qwen/Qwen3-4B-Base") == call("memory", "qwen3-4b") != call("memory", "gpu")

def test_help_is_quick_and_has_examples():
    used = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*SFTLAB, "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0 and all(f"\n  {command} " in done.stdout for command in ("data", "train", "chat", "doctor", "lab"))
    assert min(used) < 0.5 # seconds of CPU
    for command in ("train", "chat", "lab"):
        status, out, _ = call(command, "--help")
        assert status == 0 and f"\n    sftlab {command}" in out
    status, out, _ = call()
    assert status == 2 and out == done.stdout

# A command that is slow on purpose, so that it can be interrupted in the middle.
SLOW_TRAINING = """
import sys, time, transformers
from sftlab import cli
step = transformers.Trainer.training_step
transformers.Trainer.training_step = lambda *a, **k: (print("step", flush=True), time.sleep(0.2), step(*a, **k))[-1]
sys.exit(cli.main(sys.argv[1:]))
"""

def test_training_interrupted_early_leaves_nothing(folder, tmp_path):
    words = ["train", "--data", folder / "chats.jsonl", "--output", tmp_path / "out", "--epochs", "100"]
    run = subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("step"):
            break
    assert run.poll() is None and list(tmp_path.glob(".*out*")) and not list(tmp_path.glob("[!.]*")) # it was in the middle
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.endswith("sftlab: stopped\n") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [] # it had written no checkpoint to go on from

def chat(monkeypatch, model, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return call("chat", model)

def test_chat_answers_line_by_line(folder, monkeypatch):
    for model in ("lora", "full"):
        status, out, err = chat(monkeypatch, folder / model, "What is the capital of Peru?", "", "Are you sure?")
        assert (status, err) == (0, "") and len(out.splitlines()) >= 2
    status, out, _ = chat(monkeypatch, folder / "lora", "/quit", "What is the capital of Peru?")
    assert (status, out) == (0, "")

def test_chat_says_what_it_forgets(folder, monkeypatch):
    seen = []
    def stream(model, tokenizer, ids, max_new_tokens, **_):
        seen.append((tokenizer.decode(ids), len(ids), max_new_tokens))
        yield "Yes."
    monkeypatch.setattr("sftlab.generation.stream", stream)
    words = " ".join(["seven"] * 60)
    status, out, _ = chat(monkeypatch, folder / "lora", f"first {words}", f"second {words}", "third " + 20 * words, "fourth")
    assert status == 0 and out.splitlines().count("Yes.") == 3
    assert all(n + room <= 512 for _, n, room in seen)
    last = seen[-1][0]
    assert "(too long: " in out and "third" not in last and last.endswith("fourth<|im_end|>\n<|im_start|>assistant\n")
    assert ("first" in last) == ("forgotten" not in out) and "second" in last and "Yes.<|im_end|>" in last
    status, out, _ = chat(monkeypatch, folder / "lora", *[f"{n} {words}" for n in range(6)])
    assert "the oldest 2 messages are forgotten" in out and "\n0 seven" not in seen[-1][0] and "\n5 seven" in seen[-1][0]

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

def test_control_c_stops_the_answer_and_not_the_program():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SLOW_CHAT])
    text = ""
    def until(found, seconds=60):
        nonlocal text
        end = time.time() + seconds
        while not found(text):
            assert time.time() < end, text
            if select.select([terminal], [], [], 0.2)[0]:
                text += os.read(terminal, 65536).decode(errors="replace")
    try:
        until(lambda t: t.endswith("> "))
        os.write(terminal, b"Hello\n")
        start = len(text)
        until(lambda t: len(t) > start + len("Hello\r\n") + 3)
        os.write(terminal, b"\x03") # Ctrl-C in the middle of the answer
        until(lambda t: "(stopped)" in t and t.endswith("> "), seconds=10)
        time.sleep(0.5) # the prompt is shown a moment before keys are read
        os.write(terminal, b"\x03") # and at the prompt
        until(lambda t: "(Ctrl-D or /quit ends)" in t.split("(stopped)")[1] and t.endswith("> "))
        os.write(terminal, b"\x04") # Ctrl-D
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = None
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
        os.close(terminal)

def test_doctor(monkeypatch):
    status, out, err = call("doctor")
    assert (status, err) == (0, "") and "yes  lessons" in out
    for name in ("python", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "jupyterlab", "device", "memory", "disk"):
        assert f"\n{name} " in "\n" + out, name
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "trl" else "1.0")
    status, out, _ = call("doctor")
    assert status == 1 and "no   lessons" in out and "pip install trl" in out

@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A course of a few files, and the commands that would have been started."
    import sftlab
    root = tmp_path / "repository"
    for name in ("nbs/01_base_vs_instruct.ipynb", "nbs/reference/cli.ipynb", "nbs/images/a.svg", "exercises/q.ipynb",
                 "exercises/solutions/q.ipynb", "nbs/.ipynb_checkpoints/01-checkpoint.ipynb", "nbs/_quarto.yml", "sftlab/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    started = []
    monkeypatch.setattr(sftlab, "__file__", str(root / "sftlab" / "__init__.py"))
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.chdir(tmp_path)
    return root, started

def files(folder):
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}

def test_lab_copies_the_course_and_opens_lesson_one(repository, tmp_path):
    root, started = repository
    status, out, err = call("lab", "course", "--no-browser", "--ServerApp.port=8890")
    assert (status, err) == (0, "") and "4 files copied" in out
    assert files(tmp_path / "course") == {"01_base_vs_instruct.ipynb", "reference/cli.ipynb", "images/a.svg", "exercises/q.ipynb", cli.LIST}
    (command,) = started
    assert command[1:6] == ["-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path / 'course'}", "--LabApp.default_url=/lab/tree/01_base_vs_instruct.ipynb", "--ServerApp.ip=127.0.0.1"]
    assert command[6:8] == ["--no-browser", "--ServerApp.port=8890"]
    assert call("lab", "--no-browser")[0] == 0 and files(tmp_path / "sftlab-course") == files(tmp_path / "course")
    assert "--no-browser" in started[-1]

def contents(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}

def no_list(folder): # the learner's folder without the list of what was copied
    return {name: text for name, text in contents(folder).items() if name != cli.LIST}

LESSON, PICTURE = "01_base_vs_instruct.ipynb", "images/a.svg"

def publish(root, version, *names):
    "A new version of some of the course's files."
    for name in names or (LESSON, PICTURE):
        (root / "nbs" / name).write_text(f"{name}, version {version}")

def test_lab_brings_what_is_untouched_up_to_date(repository, tmp_path):
    root, _ = repository
    call("lab", "course")
    publish(root, 2)
    (root / "nbs" / "new.ipynb").write_text("new")
    status, out, _ = call("lab", "course")
    assert status == 0 and "3 files copied" in out and "changed" not in out
    assert files(tmp_path / "course") == {LESSON, PICTURE, "new.ipynb", "reference/cli.ipynb", "exercises/q.ipynb", cli.LIST}
    assert (tmp_path / "course" / LESSON).read_text() == f"{LESSON}, version 2"
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "course").rglob("*")}
    assert "0 files copied" in call("lab", "course")[1]
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "course").rglob("*")} == before

def test_lab_never_overwrites_what_was_changed(repository, tmp_path):
    root, _ = repository
    call("lab", "course")
    mine = tmp_path / "course" / LESSON
    mine.write_text("what I wrote")
    assert "changed" not in call("lab", "course")[1] and files(tmp_path / "course") == {LESSON, PICTURE, "reference/cli.ipynb", "exercises/q.ipynb", cli.LIST}
    for version in (2, 3): # the second new version takes the place of the first
        publish(root, version)
        status, out, _ = call("lab", "course")
        (line,) = [line for line in out.splitlines() if "changed" in line]
        assert status == 0 and "2 files copied" in out and line.endswith(": 01_base_vs_instruct.new.ipynb")
        after = no_list(tmp_path / "course")
        assert after == {LESSON: "what I wrote", "01_base_vs_instruct.new.ipynb": f"{LESSON}, version {version}", PICTURE: f"{PICTURE}, version {version}",
                         "reference/cli.ipynb": "nbs/reference/cli.ipynb", "exercises/q.ipynb": "exercises/q.ipynb"}
        assert "0 files copied" in call("lab", "course")[1] and no_list(tmp_path / "course") == after

def test_lab_keeps_a_new_version_that_was_changed_too(repository, tmp_path):
    root, _ = repository
    course = tmp_path / "course"
    for version, name in ((1, "a.ipynb"), (2, "a.new.ipynb"), (3, "a.new.new.ipynb")):
        publish(root, version, "a.ipynb")
        call("lab", "course")
        assert (course / name).read_text() == f"a.ipynb, version {version}"
        if version < 3:
            (course / name).write_text(f"my notes on version {version}")
    assert (course / "a.ipynb").read_text() == "my notes on version 1" and (course / "a.new.ipynb").read_text() == "my notes on version 2"

def test_lab_puts_a_deleted_file_back(repository, tmp_path):
    root, _ = repository
    course = tmp_path / "course"
    call("lab", "course")
    (course / LESSON).write_text("what I wrote")
    publish(root, 2)
    call("lab", "course")
    (course / LESSON).unlink()
    (course / "reference" / "cli.ipynb").unlink()
    assert "2 files copied" in call("lab", "course")[1]
    assert (course / LESSON).read_text() == f"{LESSON}, version 2" and (course / "reference" / "cli.ipynb").exists()
    assert not list(course.glob("*.new.*")) # it is no newer than the file beside it now
    publish(root, 3)
    call("lab", "course")
    assert (course / LESSON).read_text() == f"{LESSON}, version 3" and not list(course.glob("*.new.*"))

def test_lab_leaves_what_nobody_else_made(repository, tmp_path):
    root, _ = repository
    course = tmp_path / "course"
    course.mkdir()
    for name in (LESSON, "01_base_vs_instruct.new.ipynb", "diary.txt"):
        (course / name).write_text("mine")
    call("lab", "course")
    assert {text for name, text in no_list(course).items() if text != "mine"} == {f"nbs/{name}" for name in (LESSON, PICTURE, "reference/cli.ipynb")} | {"exercises/q.ipynb"}
    assert (course / "01_base_vs_instruct.new.new.ipynb").read_text() == f"nbs/{LESSON}"
    assert all((course / name).read_text() == "mine" for name in (LESSON, "01_base_vs_instruct.new.ipynb", "diary.txt"))

@pytest.mark.parametrize("broken", [None, "", "{", "[]", "1", '{"01_base_vs_instruct.ipynb": 1, "images/a.svg": ["x"]}', "\xff", "[" * 100_000], ids=range(8))
def test_without_its_list_lab_takes_every_difference_for_the_learners(repository, tmp_path, broken):
    root, _ = repository
    course = tmp_path / "course"
    call("lab", "course")
    if broken is None:
        (course / cli.LIST).unlink()
    else:
        (course / cli.LIST).write_text(broken, "latin-1")
    publish(root, 2)
    status, out, err = call("lab", "course")
    assert (status, err) == (0, "") and "2 files copied" in out and "images/a.new.svg" in out
    assert (course / LESSON).read_text() == f"nbs/{LESSON}" and (course / "01_base_vs_instruct.new.ipynb").read_text() == f"{LESSON}, version 2"
    assert "0 files copied" in call("lab", "course")[1] # the list is whole again
    assert json.loads((course / cli.LIST).read_text()).keys() == {LESSON, PICTURE, "reference/cli.ipynb", "exercises/q.ipynb",
                                                                "01_base_vs_instruct.new.ipynb", "images/a.new.svg"}

def copy(root, folder):
    cli._copy({path.name: path for path in sorted(root.iterdir())}, folder)

def kill_in_a_step(
    when, # "in" (a file is half written) or "after"
    count, # in which step: a step puts a file in its place or takes one away
):
    "Let this process be killed while it copies."
    def killing(step):
        def wrapped(path, *args):
            nonlocal count
            count -= 1
            if count == 0 and when == "in":
                path.write_bytes(path.read_bytes()[:3])
            else:
                step(path, *args)
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return wrapped
    os.replace, unlink = killing(os.replace), killing(Path.unlink)
    Path.unlink = lambda path, missing_ok=False: path.exists() and unlink(path)

def copy_and_be_killed(root, folder, when, count) -> int: # exit status
    if (child := os.fork()) == 0:
        try:
            kill_in_a_step(when, count)
            copy(root, folder)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def much_to_do(root, folder):
    "A learner's folder in which the next run has everything to do: replace, put beside, put back, add and take away."
    root.mkdir(parents=True)
    def publish(version, *names):
        for name in names:
            (root / name).write_text(version)
    publish("version 1", "back", "changed", "deleted", "untouched")
    copy(root, folder)
    for name in ("changed", "deleted"):
        (folder / name).write_text("my notes")
    publish("version 2", "deleted") # goes beside
    copy(root, folder)
    for name in ("back", "deleted"):
        (folder / name).unlink()
    publish("version 3", "added", "changed", "untouched")

def test_a_killed_lab_is_made_good_by_the_next(tmp_path):
    def run(when, count):
        root, folder = (tmp_path / f"{when}-{count}" / name for name in ("root", "folder"))
        much_to_do(root, folder)
        status = copy_and_be_killed(root, folder, when, count)
        assert (folder / "changed").read_text() == "my notes"
        assert {text for name, text in no_list(folder).items() if not name.endswith(".partial")} <= {"my notes", "version 1", "version 2", "version 3"}
        if status:
            copy(root, folder)
        return status, contents(folder)
    status, whole = run("after", 0) # never
    assert status == 0 and {name: text for name, text in whole.items() if name != cli.LIST} == {
        "added": "version 3", "back": "version 1", "changed": "my notes", "changed.new": "version 3", "deleted": "version 2", "untouched": "version 3"}
    for step in range(1, 11): # five files written and one taken away, and the list after each of the four that are new to it
        assert run("after", step) == (-signal.SIGKILL, whole), step
    assert run("after", 11) == (0, whole)
    for step in (1, 2, 4):
        assert run("in", step) == (-signal.SIGKILL, whole), step # a file, the list, a file beside another

def test_lab_writes_nothing_through_links(repository, tmp_path):
    root, _ = repository
    course, outside = tmp_path / "course", tmp_path / "outside"
    outside.mkdir()
    course.mkdir()
    (outside / "a.ipynb").write_text("outside")
    for link in (LESSON, f".{LESSON}.partial", cli.LIST, f".{cli.LIST}.partial"):
        (course / link).symlink_to(outside / "a.ipynb")
    (course / "exercises").mkdir()
    (course / "exercises" / "q.ipynb").symlink_to(outside / "nowhere")
    status, out, err = call("lab", "course")
    assert (status, err) == (0, "") and contents(outside) == {"a.ipynb": "outside"}
    assert (course / LESSON).is_symlink() and (course / "01_base_vs_instruct.new.ipynb").read_text() == f"nbs/{LESSON}"
    assert (course / "exercises" / "q.new.ipynb").exists() and not (course / cli.LIST).is_symlink()
    for link in ("reference", "images"):
        (shelf := tmp_path / link).mkdir()
        (course / link / ("cli.ipynb" if link == "reference" else "a.svg")).unlink()
        (course / link).rmdir()
        (course / link).symlink_to(shelf)
        status, _, err = call("lab", "course")
        assert status == 1 and err.count("\n") == 1 and f"course/{link} lies outside of course" in err and not list(shelf.iterdir())
        (course / link).unlink()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere") # the whole folder may be a link: that is where the learner wants it
    (tmp_path / "elsewhere").mkdir()
    assert call("lab", "link")[0] == 0 and (tmp_path / "elsewhere" / LESSON).exists()

@pytest.mark.parametrize("make", [
    lambda course: course.write_text("a file"),
    lambda course: course.symlink_to("nowhere"),
    lambda course: course.symlink_to("course"),
    lambda course: (course.mkdir(), (course / "reference").write_text("a file")),
    lambda course: (course.mkdir(), (course / "reference").symlink_to("nowhere")),
], ids=["file", "dead link", "loop", "file inside", "dead link inside"])
def test_lab_says_what_stands_in_the_way_of_a_folder(repository, tmp_path, make):
    make(tmp_path / "course")
    status, _, err = call("lab", "course")
    assert status == 1 and err.count("\n") == 1 and "is not a folder, and the course needs one of that name" in err
    assert "course" in err and not (tmp_path / "nowhere").exists()

def test_lab_leaves_a_link_that_took_a_files_place(repository, tmp_path):
    root, _ = repository
    call("lab", "course")
    mine = (tmp_path / "course" / LESSON).rename(tmp_path / "kept elsewhere.ipynb")
    (tmp_path / "course" / LESSON).symlink_to(mine)
    publish(root, 2)
    call("lab", "course")
    assert (tmp_path / "course" / LESSON).is_symlink() and mine.read_text() == f"nbs/{LESSON}"
    assert (tmp_path / "course" / "01_base_vs_instruct.new.ipynb").read_text() == f"{LESSON}, version 2"

def test_lab_leaves_a_folder_where_a_file_should_be(repository, tmp_path):
    (tmp_path / "course" / LESSON).mkdir(parents=True)
    status, out, _ = call("lab", "course")
    assert status == 0 and (tmp_path / "course" / "01_base_vs_instruct.new.ipynb").read_text() == f"nbs/{LESSON}"

def test_lab_finds_the_course_inside_an_installed_package(repository, tmp_path):
    root, _ = repository
    (root / "sftlab" / "course").mkdir()
    for name in ("nbs", "exercises"):
        (root / name).rename(root / "sftlab" / "course" / name)
    call("lab", "course")
    assert files(tmp_path / "course") == {LESSON, PICTURE, "reference/cli.ipynb", "exercises/q.ipynb", cli.LIST}

def test_lab_without_what_it_needs(repository, monkeypatch):
    root, started = repository
    (root / "nbs" / "01_base_vs_instruct.ipynb").unlink()
    status, _, err = call("lab", "course")
    assert status == 1 and "pip install '.[lab]'" in err and err.count("\n") == 1
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None)
    status, _, err = call("lab", "course")
    assert status == 1 and "pip install 'sftlab[lab]'" in err and err.count("\n") == 1
    assert started == [] and not Path("course").exists()

def test_lab_starts_the_real_thing(tmp_path):
    pytest.importorskip("jupyterlab")
    done = subprocess.run([*SFTLAB, "lab", tmp_path / "course", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1][0].isdigit(), done.stderr
    assert {"01_base_vs_instruct.ipynb", "02_instruction_data.ipynb"} <= files(tmp_path / "course")

@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "sharegpt_dummy_conversation.json"])
def test_real_file(real_data, tmp_path, monkeypatch, name):
    shutil.copy(real_data / name, tmp_path / name)
    status, out, err = call("train", "--data", tmp_path / name, "--output", tmp_path / "out", "--epochs", 1, "--max-rows", 40, "--on-error", "quarantine")
    assert (status, err) == (0, ""), err
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["rows"] == 40 and run["held_out_nll_after"] < run["held_out_nll_before"]
    status, out, err = chat(monkeypatch, tmp_path / "out", "Who are you?")
    assert (status, err) == (0, "") and out.strip()
