"""Lesson 22: a server answers as the notebook did, a GGUF file is the model, and servers die.

Real servers: `transformers serve`, and llama.cpp's where xllamacpp is installed. For faults there
is a server that does as it is told.
"""
import contextlib
import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sftlab.audit.serving import check_serving, served_model
from sftlab.errors import ModelError, OutputError, ServingError
from sftlab.files.gguf import (
    export_gguf, gguf_layout, gguf_name, permute, read_gguf, without_markers)
from sftlab.guards.serving import GGUF_KINDS, KEY_VARIABLE, in_a_line
from sftlab.local_server import TRANSFORMERS_SERVE, free_port, serving
from sftlab.models import load
from sftlab.serving import Answer, answer_here, ask, fetch, first_difference, prompt_ids_there
from sftlab.tiny.world import as_messages, examples

QUESTIONS = [e["question"] for e in examples("test", 3)]
MESSAGES = [dict(role="user", content="hi")]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load("tiny")
    tokenizer.eos_token = "<|im_end|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


# --- the process

LISTEN = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(f"{child.pid}")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def listening(tmp_path):
    return [sys.executable, "-c", LISTEN, "{port}", str(tmp_path / "pid")]


def child(tmp_path):
    return int((tmp_path / "pid").read_text())


def gone(pid, seconds=15):
    "Whether a process ends in time."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_server_ends_with_its_children(tmp_path):
    with serving(listening(tmp_path)) as url:
        assert fetch(url, "/any") == {} and psutil.pid_exists(child(tmp_path))
    assert gone(child(tmp_path))
    with pytest.raises(ServingError, match="no server answers"):
        fetch(url, "/any")


def test_it_ends_after_an_error_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), serving(listening(tmp_path)):
        raise KeyboardInterrupt
    assert gone(child(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_it_ends_when_the_notebook_is_killed(tmp_path):
    code = ("import sys, time\nfrom sftlab.local_server import serving\n"
            "with serving(sys.argv[1:]) as url:\n    print(url, flush=True)\n    time.sleep(600)")
    notebook = subprocess.Popen([sys.executable, "-c", code, *listening(tmp_path)],
                                stdout=subprocess.PIPE, text=True)
    assert notebook.stdout.readline().startswith("http://127.0.0.1:")
    os.kill(notebook.pid, signal.SIGKILL)
    notebook.wait()
    assert gone(child(tmp_path))


@pytest.mark.parametrize("code, said", [
    ("print('no GPU \\x1b[31mfound')", r"ended before it was ready.*has ended.*no GPU \\x1b\[31m"),
    ("raise SystemExit(3)", "wrote: nothing"),
    ("import time; print('loading', flush=True); time.sleep(600)", "not ready after 3 s.*loading")])
def test_a_server_that_does_not_start_says_why(code, said):
    with pytest.raises(ServingError, match=said) as error, \
            serving([sys.executable, "-c", code], seconds=3):
        raise AssertionError("it is not there")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_server_that_dies_shows_its_last_words(tmp_path):
    with pytest.raises(ServingError, match="no server answers.*the server has ended"), \
            serving(listening(tmp_path)) as url:
        [keeper] = [process for process in psutil.Process().children()
                    if str(tmp_path) in " ".join(process.cmdline())]
        keeper.children()[0].kill()
        assert gone(child(tmp_path)) and gone(keeper.pid)  # what the server had started, too
        fetch(url, "/any")


def test_free_ports_are_free():
    assert len({free_port() for _ in range(5)}) > 1


# --- asking: a server that does as it is told

@contextlib.contextmanager
def telling(status=200, body=b"{}", headers=(), wait=0.0):
    "A server with one answer for everything; yields its address and the headers that came."
    came = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            came.append((self.path, dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(wait)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("told, said", [
    (dict(status=500, body=b"Internal Server Error"), "500: Internal Server Error.*name of the"),
    (dict(status=404, body=b'{"error": {"message": "no model"}}'), "404: no model"),
    (dict(status=401, body=b'{"detail": "who?"}'), f"401: who.*{KEY_VARIABLE}"),
    (dict(status=302, headers=[("Location", "http://127.0.0.1:9/")]), "another address"),
    (dict(body=b"<html>"), "no JSON"), (dict(body=b"\xff\xfe"), "no JSON"),
    (dict(body=b"[]"), "without choices"), (dict(body=b'{"choices": []}'), "without choices"),
    (dict(body=b'{"choices": [{"message": "hi"}]}'), "without choices.0.message.role"),
    (dict(wait=2.0), "did not answer within 0.5 s"),
    (dict(headers=[("Transfer-Encoding", "chunked")], body=b"zz"), "broke off")])
def test_bad_answers_are_one_line(told, said):
    with telling(**told) as (url, _), pytest.raises(ServingError, match=said) as error:
        ask(url, "tiny", MESSAGES, seconds=0.5)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("usage", [None, {}, dict(prompt_tokens=None), [1], "many"])
@pytest.mark.parametrize("logprobs", [None, {}, [], dict(content=None), dict(content=[dict(a=1)])])
def test_what_a_server_does_not_tell_is_unknown(usage, logprobs):
    message = dict(role="assistant", content=None)
    choice = dict(message=message, finish_reason=None, logprobs=logprobs)
    with telling(body=json.dumps(dict(choices=[choice], usage=usage)).encode()) as (url, _):
        assert ask(url, "tiny", MESSAGES) == Answer("", None)
        assert prompt_ids_there(url, "tiny", MESSAGES) is None


@pytest.mark.parametrize("told, ids", [([1, 2], [1, 2]), (None, None), ("1 2", None), (12, None)])
def test_ids_are_read_where_a_vllm_tells_them(told, ids):
    choice = dict(message=dict(role="assistant", content="a"), finish_reason="stop", token_ids=told)
    body = dict(choices=[choice], prompt_token_ids=told, usage=dict(prompt_tokens=2))
    with telling(body=json.dumps(body).encode()) as (url, _):
        assert ask(url, "m", MESSAGES, return_token_ids=True) == Answer("a", 2, ids, ids, "stop")


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address_may_end_in_v1(end):
    with telling() as (url, came):
        fetch(url + end, "/v1/models")
    assert came[0][0] == "/v1/models"


def test_a_key_is_sent_and_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with telling(status=401, body=b'{"error": "sk-mine is wrong"}') as (url, came):
        with pytest.raises(ServingError):
            fetch(url, "/x")
        assert "Authorization" not in came[-1][1]  # a key for another service stays here
        monkeypatch.setenv(KEY_VARIABLE, "sk-mine")
        with pytest.raises(ServingError) as error:
            fetch(url, "/x")
        assert came[-1][1]["Authorization"] == "Bearer sk-mine"
    assert "sk-mine" not in str(error.value)


def test_no_proxy_sees_what_goes_to_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with telling() as (url, _):
        assert fetch(url, "/x") == {}


@pytest.mark.parametrize("listed, said", [([], "lists 0"), (["a", "b"], r"lists 2 models \(a, b")])
def test_the_model_must_be_named_where_it_is_not_clear(listed, said):
    body = json.dumps(dict(data=[dict(id=name) for name in listed])).encode()
    with telling(body=body) as (url, _), pytest.raises(ServingError, match=said):
        served_model(url)


@given(st.text(max_size=300), st.text(alphabet="ghk-", min_size=1, max_size=9))
def test_a_line_is_one_line_without_the_key(text, key):
    line = in_a_line(text + key + text, key)
    assert line.isprintable() and len(line) <= 201 and key not in line


@given(st.lists(st.sampled_from(["prompt_ids", "prompt_tokens", "ids", "text", "ended"])))
def test_the_first_difference_is_the_first(changed):
    here = Answer("a", 2, [1, 2], [3], "stop")
    other = dict(text="b", prompt_tokens=3, prompt_ids=[1, 3], ids=[4], ended="length")
    there = Answer(**{**vars(here), **{name: other[name] for name in changed}})
    names = dict(prompt_ids="prompt ids", prompt_tokens="prompt length", ids="answer ids",
                 text="text", ended="end")
    expected = next((said for name, said in names.items() if name in changed), "")
    assert first_difference(here, there) == first_difference(there, here) == expected
    unknown = Answer(**{**vars(there), **dict.fromkeys(changed)})
    assert first_difference(here, unknown) == ""


# --- GGUF

def small(**options):
    torch.manual_seed(0)
    config = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**config | options)).eval()


def from_transformers(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                dtype=torch.float32).eval()


@pytest.mark.parametrize("options", [
    dict(), dict(tie_word_embeddings=True), dict(num_key_value_heads=4), dict(head_dim=32),
    dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), dict(rms_norm_eps=1e-5)],
    ids=str)
def test_a_float32_file_is_the_model_to_the_last_bit(options, tiny, tmp_path):
    model = small(**options)
    export_gguf(model, tiny[1], tmp_path / "m.gguf", pre="gpt-2", kind="F32")
    again = from_transformers(tmp_path / "m.gguf")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert again(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_each_kind_is_what_the_library_makes(kind, tiny, tmp_path):
    model = small()
    export_gguf(model, tiny[1], tmp_path / "m.gguf", pre="gpt-2", kind=kind)
    _, weights = read_gguf(tmp_path / "m.gguf")
    stored = gguf.GGMLQuantizationType[kind]
    own = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    rounded = gguf.dequantize(gguf.quantize(own, stored), stored)
    assert (weights["blk.0.ffn_up.weight"] == rounded).all()
    step = dict(F32=0, F16=2**-11, BF16=2**-8, Q8_0=2**-7)[kind]
    assert abs(rounded - own).max() <= step * abs(own).max()
    assert len(weights) == len(list(model.parameters()))


@given(heads=st.integers(1, 6), pairs=st.integers(1, 8), width=st.integers(1, 4))
def test_permute_is_llama_cpps(heads, pairs, width):
    "As its converter has it, and undone by transformers' way of reading."
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
    weight = np.arange(heads * 2 * pairs * width).reshape(-1, width)
    theirs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    ours = permute(weight, heads)
    assert (ours == theirs.swapaxes(1, 2).reshape(weight.shape)).all()
    back = LlamaTensorProcessor()._reverse_permute_weights(ours, heads, heads)
    assert (back == weight).all()


def test_names_are_the_librarys():
    model = small()
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert [gguf_name(name) for name in model.state_dict()] == [
        known.get_name(name, try_suffixes=(".weight",)) for name in model.state_dict()]


TAGS = st.sampled_from(["{% generation %}", "{%- generation -%}", "{%-generation%}",
                        "{% generation -%}"])
ENDS = st.sampled_from(["{% endgeneration %}", "{%- endgeneration -%}", "{% endgeneration-%}"])
TEXT = st.text(alphabet=" \nab", max_size=6)


@given(TEXT, TAGS, TEXT, ENDS, TEXT, st.booleans())
@settings(max_examples=60)
def test_a_template_without_markers_renders_the_same(a, tag, b, end, c, trim):
    from transformers.utils.chat_template_utils import _compile_jinja_template
    whole = a + tag + b + end + c
    assert "generation" not in without_markers(whole)
    theirs = _compile_jinja_template(whole).render()
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(without_markers(whole))
    assert plain.render() == theirs


def test_the_tokenizer_comes_back(tiny, tmp_path):
    model, tokenizer = tiny
    export_gguf(model, tokenizer, tmp_path / "m.gguf", pre="gpt-2")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token_id, again.pad_token_id) == (2, 3)
    for question in QUESTIONS:
        messages = [dict(role="user", content=question)]
        assert again.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == (
            answer_here(None, tokenizer, messages).prompt_ids)


def test_more_rows_than_tokens_and_tokens_that_are_not_special(tiny, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["<think>"])
    export_gguf(small(vocab_size=4100), tokenizer, tmp_path / "m.gguf", pre="gpt-2")
    found, _ = read_gguf(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][4095:] == [
        tokenizer.convert_ids_to_tokens(4095), "<think>", "[PAD4097]", "[PAD4098]", "[PAD4099]"]
    assert found["tokenizer.ggml.token_type"][4095:] == [1, 4, 5, 5, 5]
    assert found["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    with pytest.raises(ModelError, match="4097 tokens and the embedding 4096"):
        export_gguf(small(), tokenizer, tmp_path / "other.gguf", pre="gpt-2")


def test_a_file_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    export_gguf(small(), tiny[1], path, pre="gpt-2")
    before = path.read_bytes()
    assert sum(gguf_layout(path).values()) == len(before)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OutputError, match="No space left"):
        export_gguf(small(num_hidden_layers=1), tiny[1], path, pre="gpt-2")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 200, 60_000, 130_000])
def test_a_damaged_file_is_refused(keep, tiny, tmp_path):
    path = tmp_path / "m.gguf"
    export_gguf(small(), tiny[1], path, pre="gpt-2")
    path.write_bytes(path.read_bytes()[:keep])
    for read in (read_gguf, gguf_layout):
        with pytest.raises(ModelError, match="no GGUF file"):
            read(path)


# --- real servers

@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    "`transformers serve`, and a folder with a model for it."
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = tiny
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "cache").mkdir()
    with serving(TRANSFORMERS_SERVE, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(folder / "cache")) as url:
        yield url, str(folder / "tiny")


@pytest.mark.slow
def test_transformers_serve_answers_as_the_notebook(served, tiny):
    url, name = served
    report = check_serving(url, *tiny, QUESTIONS, name=name, max_tokens=12)
    report.assert_ok()
    assert report.counts() == dict(prompts=3, answers=3)


@pytest.mark.slow
def test_a_wrong_name_is_one_line(served, tiny):
    with pytest.raises(ServingError, match="answers with 500.*is the name of the model right"):
        check_serving(served[0], *tiny, QUESTIONS[:1], name="nope")
    with pytest.raises(ServingError, match="lists 0 models"):
        check_serving(served[0], *tiny, QUESTIONS[:1])


@pytest.mark.slow
def test_a_server_with_a_folder_has_one_name(tiny, tmp_path, monkeypatch):
    "`transformers serve FOLDER`, as one types it; `/v1/models` does not list it."
    with contextlib.redirect_stderr(io.StringIO()):
        tiny[0].save_pretrained(tmp_path / "out/merged")
    tiny[1].save_pretrained(tmp_path / "out/merged")
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    command = [*TRANSFORMERS_SERVE, "out/merged"]
    with serving(command, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache")) as url:
        check_serving(url, *tiny, QUESTIONS[:1], name="out/merged", max_tokens=6).assert_ok()
        with pytest.raises(ServingError, match="lists 0 models.*FOLDER, as typed"):
            check_serving(url, *tiny, QUESTIONS[:1])
        for name in (str(tmp_path / "out/merged"), "merged"):
            with pytest.raises(ServingError, match="400: Server is pinned to 'out/merged'.*name"):
                check_serving(url, *tiny, QUESTIONS[:1], name=name)
        with pytest.raises(ServingError, match="422.*return_token_ids"):  # only vLLM's
            ask(url, "out/merged", MESSAGES, 4, return_token_ids=True)


@pytest.mark.slow
def test_openais_client_hears_the_same(served, tiny):
    openai = pytest.importorskip("openai")
    url, name = served
    with openai.OpenAI(base_url=url + "/v1", api_key="x") as client:
        for question in QUESTIONS:
            messages = [dict(role="user", content=question)]
            theirs = client.chat.completions.create(
                model=name, messages=messages, max_tokens=12, temperature=0)
            ours = ask(url, name, messages, 12)
            assert ours.text == theirs.choices[0].message.content
            assert ours.prompt_tokens == theirs.usage.prompt_tokens
            assert ours.ended == theirs.choices[0].finish_reason


@pytest.mark.slow
def test_what_transformers_serve_cannot_do(served, tiny):
    "Limits that lesson 22 tells: when this fails, they have gone."
    url, name = served
    with pytest.raises(ServingError, match="500"):
        ask(url, name, MESSAGES, 4, stop=[])
    export_gguf(*tiny, f"{name}/m.gguf", pre="gpt-2", kind="F32")
    with pytest.raises(ServingError, match="500"):
        ask(url, f"{name}:m.gguf", MESSAGES, 4)


TASK = """\
task: asked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_lm_eval_gives_one_score_here_and_there(served, tiny, tmp_path, monkeypatch):
    pytest.importorskip("tenacity", reason="lm-eval asks servers with it: pip install lm-eval[api]")
    evaluator = pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager
    url, name = served
    answers = [answer_here(*tiny, as_messages(e)["messages"][:1], 12) for e in examples("test", 3)]
    rows = [dict(question=q, answer=a.text if i else "no")
            for i, (q, a) in enumerate(zip(QUESTIONS, answers))]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "asked.yaml").write_text(TASK.format(file=tmp_path / "asked.jsonl"))
    monkeypatch.setenv("OPENAI_API_KEY", "x")  # lm-eval asks for one
    scores = []
    for kind, options in (("hf", dict(pretrained=name, dtype="float32", device="cpu")),
                          ("local-chat-completions", dict(
                              model=name, base_url=url + "/v1/chat/completions",
                              tokenizer_backend=None, num_concurrent=1))):
        done = evaluator.simple_evaluate(
            model=kind, model_args=options, tasks=["asked"], apply_chat_template=True,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0, log_samples=True)
        scores.append(done["results"]["asked"]["exact_match,none"])
    assert scores[0] == scores[1] == pytest.approx(2 / 3)
    chat = get_model("local-chat-completions")(
        model=name, base_url=url + "/v1/chat/completions", tokenizer_backend=None)
    with pytest.raises(NotImplementedError):
        chat.loglikelihood([])


def test_an_unknown_pre_is_refused_by_llama_cpp_and_not_by_transformers(tiny, tmp_path):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")
    export_gguf(small(), tiny[1], tmp_path / "m.gguf", pre="no-such-name")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(tmp_path / "m.gguf"), 64, -1
    with pytest.raises(RuntimeError, match="Failed to init"):
        llama.Server(params)


@pytest.mark.parametrize("kind", ("F32", "Q8_0"))
def test_llama_cpp_reads_the_file_as_transformers_does(kind, tiny, tmp_path):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")
    export_gguf(*tiny, tmp_path / "m.gguf", pre="llama-bpe", kind=kind)
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(tmp_path / "m.gguf"), 512, 1
    params.cpuparams.n_threads, params.verbosity = 1, -1
    server = llama.Server(params)
    model = from_transformers(tmp_path / "m.gguf")
    model.generation_config.eos_token_id = tiny[1].eos_token_id
    report = check_serving(server.listening_address, model, tiny[1], QUESTIONS, max_tokens=12,
                           logprobs=True)
    assert "token for token" in repr(report) and report.counts()["prompts"] == 3
    if kind == "F32":  # in eight bits llama.cpp rounds what goes into a matrix, too
        report.assert_ok()
        assert all(row.there.ids is not None for row in report.rows)
