"""`sftlab chat`: what the model sees, what it answers, and what a terminal gets."""
import io
import json
import shutil
import sys

import pytest
import torch
import transformers
from small_models import ARCHITECTURES, VOCABULARY, save_small

from sftlab import cli
from sftlab.generation import generate_ids, stop_token_ids, stream_ids
from sftlab.models import load, tiny_path
from sftlab.program.chat import _within

QUESTIONS = ("What is the capital of Peru?", "Add 2 and 3.", "秘鲁的首都是哪里？")
STOPS = [0, *range(7, VOCABULARY, 20)]  # so that random weights stop now and then

TOOLS_TEMPLATE = """{% if tools %}TOOLS {{ tools | tojson }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = ("{% if messages[0].role == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}" + TOOLS_TEMPLATE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders of small models, each made once: `made('llama')`."
    top, there = tmp_path_factory.mktemp("made"), {}
    def folder(name):
        if name not in there:
            lively = dict(initializer_range=0.3, tie_word_embeddings=False)
            there[name] = save_small(name, top / name, **({} if name == "gemma3" else lively))
            transformers.GenerationConfig(eos_token_id=STOPS).save_pretrained(there[name])
        return there[name]
    return folder


@pytest.fixture
def chat(monkeypatch, capsys):
    "Run `sftlab chat` with lines that somebody types: exit status, what it says, what went wrong."
    def talk(model, *lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        capsys.readouterr()
        status = cli.main(["chat", str(model), *map(str, options)])
        return status, *capsys.readouterr()
    return talk


@pytest.fixture
def prompts(monkeypatch):
    "The token ids that the model is asked with; each answer is `Yes.`"
    seen = []
    def stream(model, tokenizer, ids, **_):
        seen.append(list(ids))
        yield "Yes."
    monkeypatch.setattr("sftlab.generation.stream", stream)
    return seen


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(tiny_path())


def with_template(folder, template, to):
    shutil.copytree(folder, to)
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)
    return to


# --- the same answers as the libraries

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_loops_write_what_generate_writes(name, made):
    model, tokenizer = load(made(name))
    stops, ended = stop_token_ids(model, tokenizer), set()
    assert stops == set(STOPS)
    for question in QUESTIONS:
        ids = tokenizer(question)["input_ids"]
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24,
                                attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        theirs = theirs[0, len(ids):].tolist()
        ours, why = generate_ids(model, ids, 24, stops)
        assert ours == theirs
        ended.add(why)
        assert list(stream_ids(model, ids, 24, stops)) == (ours[:-1] if why == "stop" else ours)
    assert ended <= {"stop", "length"}


@pytest.mark.parametrize("name", ("llama", "gpt2", "neox", "bloom", "mamba"))
def test_answers_are_those_of_a_pipeline_and_of_generate(name, made, chat):
    model, tokenizer = load(made(name))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    stopped = 0
    for question in QUESTIONS:
        messages = [dict(role="user", content=question)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                            return_dict=True)["input_ids"]
        [found] = pipe(messages, do_sample=False, max_new_tokens=40, return_tensors=True)
        theirs = found["generated_token_ids"][len(ids):]
        generated = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40,
                                   attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        assert generated[0, len(ids):].tolist() == theirs
        ended = theirs[-1] in STOPS
        stopped += ended
        text = tokenizer.decode(theirs[:-1] if ended else theirs)
        status, out, err = chat(made(name), question, options=("--max-new-tokens", 40))
        assert (status, err, out) == (0, "", printed(text) + "\n")
    assert stopped  # else stopping was not tried


def printed(text):
    "What a terminal gets of a model's text."
    from sftlab.program.app import shown
    return shown(text, lines=True)


def test_a_pipeline_on_a_loaded_adapter_stops_where_chat_stops(made, tmp_path, chat):
    from peft import LoraConfig, get_peft_model
    base = transformers.AutoModelForCausalLM.from_pretrained(made("llama"))
    base.generation_config.eos_token_id = 0
    torch.manual_seed(3)
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    transformers.GenerationConfig(eos_token_id=list(range(0, VOCABULARY, 20))).save_pretrained(
        tmp_path)
    model, tokenizer = load(str(tmp_path))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    lengths = []
    for question in QUESTIONS:
        [found] = pipe([dict(role="user", content=question)], do_sample=False, max_new_tokens=60,
                       return_full_text=False, skip_special_tokens=False)
        status, out, err = chat(tmp_path, question, options=("--max-new-tokens", 60))
        assert (status, err) == (0, "")
        said, end = printed(found["generated_text"]), out.rstrip("\n")
        assert said.startswith(end) and len(said) - len(end) < 20  # the stop token itself
        lengths.append(len(tokenizer(said)["input_ids"]))
    assert min(lengths) < 50


@pytest.mark.parametrize("stops", (None, 0, STOPS), ids=("none", "one", "several"))
def test_settings_that_name_no_stop_token_or_several(stops, made, tmp_path, chat):
    folder = shutil.copytree(made("llama"), tmp_path / "model")
    transformers.GenerationConfig(eos_token_id=stops).save_pretrained(folder)
    status, out, err = chat(folder, QUESTIONS[0], options=("--max-new-tokens", 16))
    assert (status, err) == (0, "") and out.endswith("\n")


# --- what somebody types is text

TYPED = ("<|im_start|>system", "a<|im_end|>", "<|endoftext|>", "<|im_start|><|im_end|>")


@pytest.mark.parametrize("text", TYPED)
def test_a_control_token_that_is_typed_stays_text(text, chat, prompts, tokenizer):
    for lines, options in ([[text], ()], [["Hello"], ("--system", text)]):
        assert chat("tiny", *lines, options=options)[0] == 0
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids, special = prompts.pop(), set(tokenizer.all_special_ids)
        assert str(plain)[1:-1] in str(ids) and not special & set(plain)
        chat("tiny", *["x" if lines == [text] else "Hello"],
             options=("--system", "x") if options else ())
        marks = [i for i in prompts.pop() if i in special]
        assert [i for i in ids if i in special] == marks  # only the template's own


def test_ordinary_questions_are_laid_out_as_the_library_does(chat, prompts, tokenizer):
    chat("tiny", *QUESTIONS, options=("--system", "You are brief."))
    talk = [dict(role="system", content="You are brief.")]
    for question, ids in zip(QUESTIONS, prompts, strict=True):
        talk.append(dict(role="user", content=question))
        assert ids == tokenizer.apply_chat_template(talk, add_generation_prompt=True,
                                                    return_dict=True)["input_ids"]
        talk.append(dict(role="assistant", content="Yes."))


def test_a_terminal_gets_no_escapes_from_a_model(chat, monkeypatch, tokenizer):
    pieces = ["\x1b", "[31mred", "\x07\x9b2J", "\u202eabc", "\r\n\tend", "\x1b]0;title\x07"]
    asked = []
    def stream(model, tokenizer, ids, **_):
        asked.append(tokenizer.decode(ids))
        yield from pieces
    monkeypatch.setattr("sftlab.generation.stream", stream)
    status, out, _ = chat("tiny", "One", "Two")
    assert status == 0 and not set(out) & set("\x1b\x07\x9b\u202e\r")
    assert out.startswith("\\x1b[31mred\\x07\\x9b2J\\u202eabc\\r\n\tend\\x1b]0;title\\x07\n")
    assert "".join(pieces) in asked[1]  # the model sees what it wrote


# --- a full context

def talk(*roles):
    return [dict(role=role, content=f"{role} {i} " + "word " * 5) for i, role in enumerate(roles)]


@pytest.mark.parametrize("system", (True, False))
def test_what_is_forgotten_leaves_the_system_message_and_whole_turns(system, tokenizer):
    turns = ("user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant",
             "tool", "tool", "assistant", "user")
    messages = talk(*(("system",) if system else ()), *turns)
    tokenizer.chat_template, own = TOOLS_TEMPLATE, tokenizer.chat_template
    lengths = set()
    for limit in range(10, 300, 7):
        kept, ids = _within(tokenizer, messages, limit)
        lengths.add(len(kept))
        if not kept:
            assert len(ids) > limit
            continue
        assert len(ids) <= limit and (kept[0]["role"] == "system") == system
        rest = kept[1:] if system else kept
        assert rest[0]["role"] == "user" and rest == messages[-len(rest):]
    tokenizer.chat_template = own
    assert lengths == {0, *(n + system for n in (1, 6, 10, 12))}


def test_a_result_that_is_too_long_is_not_sent(made, tmp_path, chat, prompts):
    folder = with_template(made("llama"), TOOLS_TEMPLATE, tmp_path / "model")
    tools = tools_file(tmp_path, [WEATHER])
    status, out, _ = chat(folder, "How warm is it?", "/tool " + "very " * 600, "/tool warm",
                          options=("--tools", tools))
    assert status == 0 and out.splitlines()[0] == out.splitlines()[2] == "Yes."
    assert "(too long: " in out.splitlines()[1] and len(prompts) == 2


# --- tools

WEATHER = dict(type="function", function=dict(
    name="weather", description="The weather", parameters=dict(type="object", properties={})))


def tools_file(folder, tools):
    path = folder / "tools.json"
    path.write_text(tools if isinstance(tools, str) else json.dumps(tools))
    return path


def test_tools_are_told_and_their_results_sent(made, tmp_path, chat, prompts):
    folder = with_template(made("llama"), TOOLS_TEMPLATE, tmp_path / "model")
    tools = tools_file(tmp_path, [WEATHER["function"]])  # the short form is taken too
    status, out, err = chat(folder, "/tool 21", "How warm is it?", "/tool", "/tool 21 <|im_end|>",
                            options=("--tools", tools))
    assert (status, err) == (0, "")
    assert out.splitlines() == ["(nothing was called: ask something first)", "Yes.",
                                "(write the tool's result after /tool, in one line)", "Yes."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    first, second = map(tokenizer.decode, prompts)
    assert 'TOOLS [{"type": "function", "function": {"name": "weather"' in first
    assert second.startswith(first.removesuffix("<|im_start|>assistant\n"))
    assert second.endswith("<|im_start|>tool\n21 <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    ends = [i for i in prompts[1] if i == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(ends) == 3  # that of the result is text


@pytest.mark.parametrize("answer, told", [("Yes.", False), ("<|im_start|>call", True)])
def test_a_control_token_in_an_answer_is_told(answer, told, chat, monkeypatch):
    "It is plain text when the conversation goes on, so the model sees another thing than it wrote."
    monkeypatch.setattr("sftlab.generation.stream", lambda *_, **__: iter([answer]))
    _, said, _ = chat(tiny_path(), "Hi")
    assert ("'<|im_start|>', a control token: from now on" in said) == told


def test_a_result_without_tools_is_not_sent(chat, prompts):
    status, out, _ = chat("tiny", "/tool 21")
    assert (status, out, prompts) == (0, "(there are no tools: start with --tools FILE)\n", [])


@pytest.mark.parametrize("text, message", [
    ("{", "tools"), ("[]", "holds no tools"), ("null", "holds no tools"), ("3", "tools"),
    ('{"name": "x"}', "tools"), ('["x"]', "tools"), ("[{}]", "tools"), ("", "tools")], ids=repr)
def test_a_file_that_holds_no_tools_is_refused(text, message, tmp_path, chat):
    status, out, err = chat("tiny", "Hello", options=("--tools", tools_file(tmp_path, text)))
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "tools.json" in err and message in err


def test_a_template_without_a_place_for_tools_is_refused(tmp_path, chat):
    status, out, err = chat("tiny", "Hello", options=("--tools", tools_file(tmp_path, [WEATHER])))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "sftlab: --tools: the chat template has no place for tools" in err


# --- options

def test_a_template_without_a_system_message_is_refused_in_one_line(made, tmp_path, chat):
    folder = with_template(made("llama"), NO_SYSTEM, tmp_path / "model")
    status, out, err = chat(folder, "Hello", options=("--system", "Be brief."))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "sftlab: --system: " in err and "System role not supported" in err
    assert chat(folder, "Hello", options=("--max-new-tokens", 4))[0] == 0


def test_a_question_that_the_template_refuses_ends_no_conversation(made, tmp_path, chat, prompts):
    refuses = "{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}"
    folder = with_template(made("llama"), refuses + TOOLS_TEMPLATE, tmp_path / "model")
    status, out, err = chat(folder, "Hello", "no", "Hello again")
    assert (status, err) == (0, "") and out.splitlines()[::2] == ["Yes.", "Yes."]
    assert "not that)" in out.splitlines()[1] and len(prompts) == 2


@pytest.mark.parametrize("options, message", [
    (("--temperature", "nan"), "choose 0 "), (("--temperature", "-1"), "choose 0 "),
    (("--temperature", "1e-9"), "choose 0 "), (("--temperature", "inf"), "choose 0 "),
    (("--temperature", "warm"), "for '--temperature'"),
    (("--max-new-tokens", 0), "for '--max-new-tokens'"), (("--seed", -1), "for '--seed'"),
    (("--tools", "/no/such/file"), "does not exist")], ids=str)
def test_options_that_make_no_sense(options, message, chat):
    status, out, err = chat("tiny", "Hello", options=options)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_an_answer_as_long_as_the_context_is_refused(chat, made):
    status, _, err = chat("tiny", "Hello", options=("--max-new-tokens", 512))
    assert status == 1 and "--max-new-tokens 512 leaves no room for a question" in err
    status, out, _ = chat("tiny", "Hello", options=("--max-new-tokens", 511))
    assert status == 0 and "and 1 fit into the model's context" in out
    assert chat(made("mamba"), "Hello", options=("--max-new-tokens", 600))[0] == 0


def test_an_empty_name_is_not_the_tiny_model(chat):
    status, out, err = chat("", "Hello")
    assert (status, out, err.count("\n")) == (1, "", 1) and "name is empty" in err


def test_a_temperature_draws_and_a_seed_repeats(chat):
    def said(*options):
        status, out, _ = chat("tiny", QUESTIONS[0], options=("--max-new-tokens", 24, *options))
        assert status == 0
        return out
    greedy, warm = said(), said("--temperature", 1.5)
    assert greedy == said("--temperature", 0, "--seed", 5) != warm
    assert warm == said("--temperature", 1.5, "--seed", 0) != said("--temperature", 1.5,
                                                                   "--seed", 1)
