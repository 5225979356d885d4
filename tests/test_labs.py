"""The labs on any card, without one: what is chosen, what is said when memory runs out, what is
never shown, and a run that goes on after its kernel was killed.

That each lab runs from top to bottom offline is in `test_notebooks.py`.
"""
import gc
import json
import os
import re
import subprocess
import sys
import time
import traceback
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import psutil
import pytest
import torch

from sftlab.errors import DataError, LoRAError, ModelError, OutputError, SftlabError, TrainingError
from sftlab.evaluation import fingerprint
from sftlab.figures.labs import in_parts
from sftlab.finetune import add_lora, default_learning_rate, encode_for_training, finetune
from sftlab.guards.memory import room_on
from sftlab.labs import machine, runs, sharing
from sftlab.labs.machine import LAB_PRESETS, Card, estimate_run, open_lab, what_to_halve
from sftlab.memory import count_parameters
from sftlab.models import load
from sftlab.packing import PACKED, pack_rows
from sftlab.rendering import prompt_ids
from sftlab.templates import TEMPLATES
from sftlab.tiny.world import as_messages, examples
from sftlab.training import evaluate_nll, target_nll_sum

ROOT = Path(__file__).resolve().parent.parent
LABS = sorted(ROOT.glob("nbs/labs/*.ipynb"))
MODEL, DATA = "Qwen/Qwen3-1.7B-Base", "owner/name/folder/file.jsonl"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    "Runs are kept in the folder that one is in; no test leaves anything."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "DRIVE", tmp_path / "none")
    monkeypatch.delenv("SFTLAB_PRESET", raising=False)


@pytest.fixture
def card(monkeypatch):
    "A function that makes torch speak of a card that is not there."
    def pretend(capability, gib=14.56, name="Tesla T4"):
        said = dict(is_available=lambda: True, get_device_name=lambda *_: name,
                    get_device_capability=lambda *_: capability,
                    is_bf16_supported=lambda *_: True,  # as a T4 says
                    get_device_properties=lambda *_: SimpleNamespace(total_memory=gib * 2**30))
        for function, answer in said.items():
            monkeypatch.setattr(torch.cuda, function, answer)
    return pretend


def a_lab(**options): return open_lab("test", MODEL, DATA, **options)


# --- what is chosen

@pytest.mark.parametrize("capability, dtype", [
    ((5, 2), "float16"), ((6, 1), "float16"), ((7, 0), "float16"), ((7, 5), "float16"),
    ((8, 0), "bfloat16"), ((8, 6), "bfloat16"), ((8, 9), "bfloat16"), ((9, 0), "bfloat16"),
    ((10, 0), "bfloat16"), ((12, 0), "bfloat16")])
def test_the_number_format_follows_from_the_compute_capability(card, capability, dtype):
    card(capability)
    lab = a_lab()
    assert str(lab.dtype) == f"torch.{dtype}" and lab.device == "cuda"
    assert f"{capability[0]}.{capability[1]}" in repr(lab)


def test_without_a_card_everything_is_tiny_and_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lab = a_lab(method="qlora")
    assert (lab.preset, lab.model, lab.data, lab.device) == ("tiny", "tiny", None, "cpu")
    assert lab.dtype == torch.float32


def test_a_card_that_is_not_used_has_no_say(card):
    card((7, 5))
    lab = a_lab(preset="tiny")
    assert lab.dtype == torch.float32 and lab.card is None


@pytest.mark.parametrize("capability, gib, preset", [
    ((7, 5), 14.56, "t4"), ((8, 9), 22.2, "gpu"), ((8, 0), 39.6, "gpu"), ((6, 1), 22.4, "t4"),
    ((8, 6), 5.8, "small"), ((8, 6), 11.6, "t4")])
def test_the_preset_follows_from_memory_and_capability(capability, gib, preset):
    assert machine.choose_preset(Card("x", capability, gib)) == preset


def test_one_word_chooses(monkeypatch, card):
    monkeypatch.setenv("SFTLAB_PRESET", "small")
    assert a_lab().preset == "small"
    assert a_lab(preset="tiny").preset == "tiny"
    monkeypatch.setenv("SFTLAB_PRESET", "t4")
    with pytest.raises(ModelError, match="needs a CUDA card"):
        a_lab()
    card((7, 5))
    assert a_lab().preset == "t4" and a_lab().model == MODEL


@pytest.mark.parametrize("options, said", [
    (dict(preset="huge"), "no preset 'huge': choose one of tiny"),
    (dict(batches=2), "no setting 'batches': choose from")])
def test_what_does_not_exist_is_one_line(options, said):
    with pytest.raises(ModelError, match=said) as e:
        a_lab(**options)
    assert "\n" not in str(e.value)


def test_nobody_asks_whether_bfloat16_is_supported():
    for path in ROOT.glob("sftlab/labs/*.py"):
        assert "is_bf16_supported(" not in path.read_text(), path


# --- memory, predicted

def llama(hidden, mlp, layers, heads, kv_heads, vocab=128_256, tied=True):
    from transformers import LlamaConfig
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied)


SIZES = {"1B": llama(2048, 8192, 16, 32, 8), "3B": llama(3072, 8192, 28, 24, 8),
         "8B": llama(4096, 14_336, 32, 32, 8, tied=False)}


@pytest.mark.parametrize("name, billions", [("1B", 1.24), ("3B", 3.21), ("8B", 8.03)])
def test_a_t4_has_room_for_the_preset(name, billions):
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(SIZES[name])
    assert built.num_parameters() == count_parameters(SIZES[name])
    assert round(built.num_parameters() / 1e9, 2) == billions
    e = estimate_run(SIZES[name], LAB_PRESETS["t4"], "qlora", torch.float16)
    assert e.total < 14.5 * 2**30 and e.total < room_on(14.56)
    assert e.terms["weights"] > 0.5e9 * billions  # else something was forgotten


def test_the_named_models_fit_where_the_labs_say():
    assert all(e.total < room_on(14.56) for e in machine.t4_estimates(a_lab()).values())
    large = machine.config_of("Qwen/Qwen3-8B-Base")
    assert 1.2 * estimate_run(large, LAB_PRESETS["gpu"], "lora", torch.bfloat16).total > 2**30 * 20
    assert estimate_run(large, LAB_PRESETS["gpu"], "lora", torch.bfloat16).total < room_on(22)


def test_configs_that_are_known_are_those_of_the_models():
    "Sizes as their pages have them: 0.6, 1.7, 4.0 and 8.2 billion."
    found = [round(count_parameters(machine.config_of(n)) / 1e9, 1) for n in machine.KNOWN]
    assert found == [0.6, 1.7, 4.0, 8.2]


def test_the_learning_rates_are_those_of_finetune():
    large = SimpleNamespace(num_parameters=lambda: 1_700_000_000)
    small = SimpleNamespace(num_parameters=lambda: 2_700_000)
    for name, settings in LAB_PRESETS.items():
        of = small if name == "tiny" else large
        assert settings.learning_rate == default_learning_rate(of, settings.method)


def test_memory_is_drawn_in_four_parts_with_a_mark_at_nine_tenths():
    estimates = machine.t4_estimates(a_lab())
    fig = machine.plot_on_card(estimates, machine.T4)
    texts = [t.get_text() for t in fig.legends[0].get_texts()]
    assert texts[:2] == ["T4: 15.6 GB", "90 %: 14.1 GB"] and len(texts) <= 6
    for e in estimates.values():
        assert sum(in_parts(e.terms).values()) == pytest.approx(e.total / 1e9)


def test_tables_and_pictures_are_of_the_settings_that_the_lab_names():
    "A lab with `batch=1` is not shown with the preset's batch."
    lab = open_lab("test", LARGE, DATA, preset="tiny", batch=1)
    table = machine.fits_table(lab)
    assert list(table) == ["here", "t4", "gpu"] and set(table.loc["batch"]) == {1}
    assert table.loc["learning_rate", "t4"] == "0.0002" and table.loc["method", "gpu"] == "lora"
    e = estimate_run(machine.config_of(LARGE), replace(LAB_PRESETS["t4"], batch=1), "qlora",
                     torch.float16)
    assert lab.on("t4").estimate().total == e.total == machine.t4_estimates(lab)[
        "Qwen3-8B-Base"].total
    assert table.loc["predicted_memory", "t4"] == f"{e.total / 1e9:.2f} GB"


def test_the_largest_batch_that_fits_leaves_a_tenth_of_the_card():
    lab = open_lab("test", LARGE, DATA, preset="tiny", batch=1)
    table = machine.what_fits(lab, (machine.L4,), (2048, 65_536))
    n, none = table.iloc[:, 0]
    there, room = lab.on("gpu"), 0.9 * machine.L4.gb * 1e9
    assert none == 0 and there.estimate(batch=n).total < room <= there.estimate(batch=2 * n).total


def test_what_is_chosen_is_all_in_the_table():
    said = repr(a_lab(rows=90, epochs=2, learning_rate=1e-4, r=4))
    for part in ("rows=90", "epochs=2", "learning_rate=0.0001", "rank 4, alpha 8"):
        assert part in said


# --- out of memory

LARGE = "Qwen/Qwen3-8B-Base"


@pytest.mark.parametrize("changes, method, gib, term, do", [
    (dict(batch=64), "qlora", 14.56, "activations", "batch=32, accumulate=4"),
    (dict(batch=1, max_length=32_768), "qlora", 14.56, "activations", "max_length=16384"),
    (dict(batch=1, max_length=64, r=512), "qlora", 14.56, "optimizer", "r=256"),
    (dict(), "lora", 14.56, "weights", 'method="qlora"'),
    (dict(), "qlora", 8, "weights", "a smaller model")])
def test_the_setting_of_the_largest_term_is_halved(changes, method, gib, term, do):
    settings = replace(LAB_PRESETS["t4"], **changes)
    e = estimate_run(machine.config_of(LARGE), settings, method, torch.float16)
    advice = what_to_halve(e, settings, method, gib)
    assert advice.startswith(f"{term}: ") and advice.endswith(f"; take {do}")
    if "=" in do and "method" not in do:  # the advice, followed, makes the run smaller
        followed = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", do)}
        smaller = estimate_run(machine.config_of(LARGE), replace(settings, **followed), method,
                               torch.float16)
        assert smaller.terms[term] < 0.6 * e.terms[term]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.0 GB)")])
def test_out_of_memory_in_any_words_becomes_one_line(card, error):
    card((7, 5))
    with pytest.raises(TrainingError) as e, machine.memory_advice(a_lab(batch=64)):
        raise error
    assert "\n" not in str(e.value) and "Tesla T4 (15.6 GB)" in str(e.value)
    assert str(e.value).endswith("; take batch=32, accumulate=4, in open_lab(…)")
    assert e.value.__suppress_context__ and e.value.__cause__ is None


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error), match=str(error)), machine.memory_advice(a_lab()):
        raise error


def test_a_run_that_would_fit_has_company(card):
    card((7, 5))
    with pytest.raises(TrainingError, match="something else is on the card, so restart"):
        with machine.memory_advice(a_lab()):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_tensors_of_the_failed_step_are_let_go():
    class Large:
        pass
    kept = []

    def step():
        large = Large()
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError), machine.memory_advice(a_lab()):
        step()
    gc.collect()
    assert kept[0]() is None


# --- the adapter's number format

ROWS = [as_messages(e) for e in examples("train", 16)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_next_to_a_base_in_float16_the_adapter_stays_in_float32(method, tmp_path):
    model, tokenizer = load("tiny", dtype=torch.float16, four_bit=method == "qlora")
    trainer = finetune(model, tokenizer, ROWS, tmp_path / "out", method, epochs=0.5)
    assert runs.trained_dtypes(trainer.model) == ["float32"]
    assert trainer.model.get_input_embeddings().weight.dtype == torch.float16
    from safetensors.torch import load_file
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


# --- a base whose chat template adds thoughts

QWEN3 = r"""
{%- set last = namespace(question=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > last.question %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
OWN = machine.LabPreset(None, "lora", 46, 6, 256, 4, 1, 8, 8, 24, 5e-3)


def save_qwen3(folder, template=QWEN3):
    "A small random model of this type, whose template does with thoughts as Qwen3's does."
    from transformers import Qwen3Config, Qwen3ForCausalLM
    _, tokenizer = load("tiny")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=1024, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["ours", "TRL's"])
def qwen3(request, tmp_path, monkeypatch):
    "A lab on such a model, from a local folder; with TRL's text of Qwen3's own template, too."
    from trl.chat_template_utils import qwen3_chat_template
    monkeypatch.setitem(LAB_PRESETS, "small", OWN)
    monkeypatch.setenv("SFTLAB_PRESET", "small")
    folder = save_qwen3(tmp_path / "qwen3", QWEN3 if request.param == "ours" else
                        qwen3_chat_template)
    return open_lab("test", folder, "mine.jsonl")


def test_what_is_trained_is_what_is_asked(qwen3, capsys):
    _, tokenizer = qwen3.load()
    assert "plain ChatML, which is saved with the adapter" in capsys.readouterr().out
    several = dict(messages=[*ROWS[0]["messages"], *ROWS[1]["messages"]])
    for row in [*ROWS, several]:
        [encoded] = encode_for_training(tokenizer, [row])
        ids, labels, at = encoded["input_ids"], encoded["labels"], 0
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                prompt = prompt_ids(tokenizer, row["messages"][:i])
                end = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), len(prompt)) + 1
                assert ids[:len(prompt)] == prompt and labels[at:len(prompt)] == [-100] * (
                    len(prompt) - at)
                assert labels[len(prompt):end] == ids[len(prompt):end]
                assert tokenizer.decode(ids[len(prompt):end - 1]) == message["content"]
                at = end


def test_a_template_that_adds_nothing_stays(tmp_path, capsys):
    model, tokenizer = load("tiny")
    assert machine.plain_layout(model, tokenizer, "lora") is tokenizer
    assert capsys.readouterr().out == ""
    tokenizer.chat_template = None
    assert "generation" in machine.plain_layout(model, tokenizer, "lora").chat_template
    assert "came without a chat template" in capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_that_is_learned_perfectly_is_right(qwen3):
    "Two rows, until they are known by heart: exact match is 1, and each answer ends by itself."
    lab = replace(qwen3, settings=replace(OWN, epochs=40, batch=2))
    rows = [row for row in ROWS if len(row["messages"][-1]["content"]) < 24][:2]
    model, tokenizer = lab.load()
    run = runs.train(lab, model, tokenizer, rows * 4, rows)
    after = runs.ask(lab, run.model, run.tokenizer, rows, keep=False)
    assert [row["output"] for row in after.of("held out")] == [
        row["messages"][-1]["content"] for row in rows]
    table = runs.scores_table(dict(after=after))
    assert table.loc["after", "right"] == table.loc["after", "stopped"] == 1
    loaded = runs.train(lab, lab.load()[0], tokenizer, rows * 4, rows)  # from its folder
    assert loaded.tokenizer.chat_template == tokenizer.chat_template != QWEN3


# --- rows, and an adapter that is none

def test_a_file_that_the_hub_does_not_give_is_one_line():
    with pytest.raises(DataError, match="is no file here, and the hub does not give it") as e:
        runs.local_file("owner/name/folder/file.jsonl")
    assert "\n" not in str(e.value)


def test_of_a_sorted_file_all_topics_are_taken(capsys):
    "A tenth of the rows, and each of the ten topics is there; what is left out is said."
    sorted_rows = [dict(topic=n // 50) for n in range(500)]
    lab = a_lab(preset="tiny", rows=50)
    taken = runs.take(lab, sorted_rows)
    assert len(taken) == 50 and {row["topic"] for row in taken} == set(range(10))
    assert taken == runs.take(lab, sorted_rows) and taken == sorted(taken, key=lambda r: r["topic"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "500 usable, 50 taken; open_lab(…, rows=…) takes more"
    assert runs.take(lab, sorted_rows[:20]) == sorted_rows[:20]
    assert capsys.readouterr().out == "20 usable, 20 taken\n"


def test_rows_of_a_file_are_drawn_from_all_of_it(tmp_path, capsys):
    rows = [as_messages(e) for e in examples("train", 120)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lab = open_lab("test", MODEL, "mine.jsonl", preset="tiny", rows=60, questions=10)
    parts = runs.read_rows_of(lab)
    assert "120 usable, 60 taken; open_lab(…, rows=…) takes more" in capsys.readouterr().out
    texts = [row["messages"] for row in rows]
    places = [texts.index(row["messages"]) for part in parts for row in part]
    assert len(places) == 60 and len(parts[1]) == 10 and sum(n >= 60 for n in places) > 15


def test_packed_rows_have_the_loss_of_the_same_rows_alone():
    "Whatever a single packed row has: the shortest answers are in a row of their own."
    model, tokenizer = load("tiny")
    alone = encode_for_training(tokenizer, [as_messages(e) for e in examples("train", 40)])
    packed, _ = pack_rows(alone, 256)
    of_all = evaluate_nll(model, alone, 8, loss_fn=target_nll_sum).nll
    of_packed = evaluate_nll(model, packed, 1, **PACKED).nll
    assert of_packed == pytest.approx(of_all, abs=1e-5)
    single = [evaluate_nll(model, [row], 1, **PACKED).nll for row in packed]
    assert max(single) > of_all + 1


def test_padding_is_compared_at_the_tokens_of_a_packed_row(capsys):
    _, tokenizer = load("tiny")
    rows = [as_messages(e) for e in examples("train", 40)]
    table = runs.fill_table(a_lab(preset="tiny"), tokenizer, rows)
    lengths = [len(row["input_ids"]) for row in encode_for_training(tokenizer, rows)]
    [n] = re.findall(r"padded, (\d+) rows", table.index[0])
    assert abs(int(n) * sum(lengths) / len(lengths) - 256) <= sum(lengths) / len(lengths) / 2
    assert table["token slots"].dtype == int and table.loc["packed", "token slots"] % 256 == 0
    padded, packed = table["token slots"]
    assert capsys.readouterr().out == (
        f"{padded:,} to {packed:,} token slots: {100 * (1 - packed / padded):.0f} % less to "
        "compute\n")


def test_packing_is_drawn_with_the_chats_of_one_packed_row(monkeypatch):
    shown = []
    monkeypatch.setattr("sftlab.plots.show", lambda fig, alt: shown.append(alt))
    _, tokenizer = load("tiny")
    lab = a_lab(preset="tiny")
    runs.plot_fill(lab, tokenizer, ROWS)
    lengths = [len(row["input_ids"]) for row in encode_for_training(tokenizer, ROWS)]
    n = int(shown[0].split()[0])
    assert sum(lengths[:n]) <= 256 < sum(lengths[:n + 1])
    assert f"{1 - sum(lengths[:n]) / 256:.0%} are" in shown[0]


def test_a_model_that_is_not_the_tiny_one_is_left_to_llama_cpp(tmp_path, capsys):
    assert sharing.export(tmp_path / "merged") is None  # nothing is loaded: there is nothing
    said = capsys.readouterr().out
    assert "convert_hf_to_gguf.py merged --outfile merged.gguf" in said
    assert "uv venv llama-env" in said and not re.search(r"^ *pip install", said, re.MULTILINE)
    turn = r"<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n".replace(r"\n", "\n")
    assert "FROM ./merged.gguf" in said and turn in said


def test_what_a_merge_takes_is_said_before():
    said = sharing.merge_needs(a_lab(preset="tiny"))
    assert said == f"A merge of {MODEL} takes 4.1 GB of memory and 3.4 GB in runs."


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    model, tokenizer = load("tiny")
    model = add_lora(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")  # B is zero
    model.generation_config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoRAError, match="changes no logit"):
        runs.check_reloaded(a_lab(), runs.LabRun(tmp_path, model, tokenizer, {}), ROWS[:1])


def test_another_setting_is_another_run():
    folders = [runs.run_folder(a_lab(**options), rows, ROWS[:1]) for options, rows in (
        (dict(), ROWS), (dict(), ROWS), (dict(r=4), ROWS), (dict(), ROWS[1:]))]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert all(folder.parent == Path("runs").resolve() for folder in folders)


# --- rows that are too long

def chat(*words): # a conversation with an answer of so many words to each question
    turns = []
    for n in words:
        turns += [dict(role="user", content="Where?"),
                  dict(role="assistant", content=" ".join(n * ["here"]))]
    return dict(messages=turns)


def test_a_row_that_is_too_long_ends_with_a_whole_answer(capsys):
    "Else it would teach not to stop; one whose first answer is too long is left out, with a count."
    _, tokenizer = load("tiny")
    lab = a_lab(preset="tiny", max_length=64)
    rows = [chat(3), chat(3, 5, 200), chat(200), chat(5, 200, 3), ROWS[0] | dict(topic="kept")]
    fit = runs.keep_what_fits(lab, tokenizer, rows)
    assert fit == [chat(3), chat(3, 5), chat(5), rows[4]] and rows[1] == chat(3, 5, 200)
    assert capsys.readouterr().out == (
        "4 of 5 rows are kept, 2 of them without their last turns; 1 are left out, whose first "
        "answer ends after 64 tokens (max_length=64)\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in encode_for_training(tokenizer, fit):
        assert len(row["input_ids"]) <= 64 and [n for n in row["labels"] if n != -100][-1] == end
    with pytest.raises(DataError, match="no first answer is whole within 64 tokens"):
        runs.keep_what_fits(lab, tokenizer, [chat(200)])


def test_a_row_counts_with_all_its_tokens_in_the_picture(capsys, monkeypatch):
    "Two halves below the limit are a row above it."
    shown = []
    monkeypatch.setattr("sftlab.plots.show", lambda fig, alt: shown.append(alt))
    _, tokenizer = load("tiny")
    row = dict(messages=[dict(role="user", content=" ".join(30 * ["here"])),
                         dict(role="assistant", content=" ".join(30 * ["there"]))])
    sharing.picture_of([row, ROWS[0]], tokenizer, 50)
    assert "A histogram of 2 rows" in shown[0] and "1 are longer than the limit of 50" in shown[0]
    said = capsys.readouterr().out
    assert "1 of 2 rows are longer than max_length=50." in said
    assert "Messages in a conversation, and how many have that: 2 (2)." in said


# --- what a run takes, and leaves

def test_the_peak_is_that_of_steps_alone(card, monkeypatch):
    "A held-out pass between two steps is not counted, and what it left cached is given back."
    card((7, 5))
    held = dict(now=1, peak=0, reserved=0, emptied=0)
    def take(size): held.update(peak=max(held["peak"], size), reserved=max(held["reserved"], size))
    said = dict(reset_peak_memory_stats=lambda: held.update(peak=0), synchronize=lambda: None,
                max_memory_allocated=lambda: held["peak"],
                max_memory_reserved=lambda: held["reserved"],
                empty_cache=lambda: held.update(reserved=0, emptied=held["emptied"] + 1))
    for name, function in said.items():
        monkeypatch.setattr(torch.cuda, name, function)
    peak = runs._Peak()
    take(900)  # before the first step
    for size in (100, 300, 200):
        peak.begin()
        take(size)
        peak.end()
        take(900)
        peak.empty = True  # as the meter says after a held-out pass
    assert (peak.allocated, peak.reserved, held["emptied"]) == (300, 300, 3)


def test_held_out_rows_are_measured_each_tenth_of_a_run_of_one_epoch():
    assert [n for n in range(1, 101) if runs._is_a_tenth(n, 100, 1)] == [*range(10, 100, 10)]
    assert [n for n in range(1, 76) if runs._is_a_tenth(n, 75, 3)] == [
        7, 14, 21, 35, 42, 56, 63, 70]
    assert not runs._is_a_tenth(50, 100, 2)  # the end of an epoch is measured anyway


def test_old_checkpoints_are_emptied_and_deleted(tmp_path, monkeypatch):
    "Drive keeps what is deleted: so nothing large is."
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/weights").write_bytes(b"large")
    sizes, delete = [], runs.shutil.rmtree
    monkeypatch.setattr(runs.shutil, "rmtree", lambda folder, **options: (
        sizes.append((folder.name, (folder / "weights").stat().st_size)),
        delete(folder, **options)))
    runs.drop_old_checkpoints(tmp_path)
    assert sizes == [("checkpoint-9", 0)]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100"}
    assert (tmp_path / "checkpoint-10/weights").read_bytes() == b"large"


def test_no_weights_are_copied_to_tell_models_apart():
    "Only a sample of the base; an adapter's every number counts."
    model, tokenizer = load("tiny")
    model = add_lora(model, tokenizer)
    sampled = runs._Sampled(model)
    sizes = {name: p.numel() for name, p in sampled.state_dict().items()}
    assert max(n for name, n in sizes.items() if "lora_" not in name) == 64
    first = fingerprint(sampled, tokenizer)
    assert first == fingerprint(sampled, tokenizer)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data[-1, -1] = 1e-3
    assert fingerprint(sampled, tokenizer) != first


def test_solved_examples_come_before_a_question(monkeypatch):
    asked = []
    monkeypatch.setattr("sftlab.evaluation.evaluate", lambda model, tokenizer, tasks, **_: (
        asked.append(tasks[0].items)))
    runs.ask(a_lab(preset="tiny"), torch.nn.Linear(1, 1), None, ROWS[:1], solved=ROWS[1:3])
    [[item]] = asked
    assert item["messages"] == [*ROWS[1]["messages"], *ROWS[2]["messages"],
                                *ROWS[0]["messages"][:-1]]


def test_a_base_that_was_trained_is_not_asked_as_a_base():
    "A cell that asks the base, run again after the training, stops."
    model, tokenizer = load("tiny")
    tuned = add_lora(model, tokenizer)
    lab = a_lab(preset="tiny", max_new_tokens=2)
    assert len(runs.ask(lab, tuned, tokenizer, ROWS[:1], keep=False).answers) == 1
    with pytest.raises(TrainingError, match="has the adapter of a run on it"):
        runs.ask(lab, model, tokenizer, ROWS[:1], keep=False)


def test_an_adapter_that_answers_otherwise_is_refused(monkeypatch, tmp_path):
    "A few answers may differ, most may not."
    model, tokenizer = load("tiny")
    model = add_lora(model, tokenizer)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(1e-3)
    model.save_pretrained(tmp_path / "adapter")
    model.generation_config.save_pretrained(tmp_path / "adapter")
    answers = iter([["a", "b", "c", "d"], ["a", "b", "c", "x"], ["a", "b", "c", "d"],
                    ["a", "x", "x", "x"]])

    def answer(*_, **__):
        rows = [dict(output=text) for text in next(answers)]
        return SimpleNamespace(of=lambda _: rows)

    monkeypatch.setattr(runs, "ask", answer)
    run = runs.LabRun(tmp_path, model, tokenizer, {})
    assert runs.check_reloaded(a_lab(), run, ROWS[:4])["same_answers"] == 3
    with pytest.raises(LoRAError, match="only 1 of 4 answers are as they were"):
        runs.check_reloaded(a_lab(), run, ROWS[:4])


# --- Colab: Drive, upload, no card

@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    "Not on Colab: another test may have loaded its stand-in."
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)


@pytest.fixture
def colab(monkeypatch):
    "A function that puts a `google.colab` in place, which does as it is told."
    def pretend(mount=None, upload=None):
        colab = ModuleType("google.colab")
        colab.drive, colab.files = SimpleNamespace(mount=mount), SimpleNamespace(upload=upload)
        monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        sys.modules["google"].colab = colab
    return pretend


def test_runs_are_kept_on_drive_where_it_is_mounted(colab, monkeypatch, tmp_path, capsys):
    drive = tmp_path / "drive/MyDrive"
    monkeypatch.setattr(machine, "DRIVE", drive)
    colab(mount=lambda place: Path(place, "MyDrive").mkdir(parents=True))
    assert machine.mount_drive() == drive / "sftlab"
    assert runs.run_folder(a_lab(), ROWS, ROWS).parent == drive / "sftlab"


def test_a_refused_drive_is_one_line_and_the_lab_goes_on(colab, monkeypatch, tmp_path, capsys):
    def refuse(place): raise ValueError("mount failed")
    monkeypatch.setattr(machine, "DRIVE", tmp_path / "none/MyDrive")
    colab(mount=refuse)
    assert machine.mount_drive() == Path("runs").resolve()
    assert capsys.readouterr().out.startswith("Drive is not mounted (ValueError): a run is lost")


@pytest.mark.parametrize("sent, said", [
    ({}, "no file was chosen: run the cell again"),
    ({"a.jsonl": b"", "b.jsonl": b""}, "2 files were chosen: run the cell again")])
def test_an_upload_that_is_none_is_one_line(colab, sent, said):
    colab(upload=lambda: sent)
    with pytest.raises(DataError, match=said) as e:
        sharing.get_file()
    assert "\n" not in str(e.value)


def test_on_colab_without_a_card_it_says_in_bold_what_is_trained(colab, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    a_lab()
    assert shown == []  # elsewhere the page says it
    colab()
    a_lab()
    [said] = shown
    assert said["text/html"].startswith(
        f"<p><b>No GPU found: this run trains the tiny stand-in, NOT {MODEL}. To train that: "
        "Runtime &gt; Change runtime type &gt; T4 GPU")
    a_lab(preset="tiny")  # somebody wants it
    assert len(shown) == 1


def test_on_colab_a_sample_can_be_taken(colab):
    colab(upload=lambda: pytest.fail("nobody uploads"))
    rows, wrong = sharing.look_at(sharing.get_file("sample"))
    assert len(rows) == 240 and len(wrong) == 4
    said = wrong.iloc[:, 1].tolist()
    assert said[1].endswith("(Invalid control character): fix it, or fetch the file again")
    assert said[2] == "is the same as line 31: left out, the other is kept"


def test_an_upload_is_taken(colab):
    colab(upload=lambda: {"mine.jsonl": b"{}"})
    assert sharing.get_file() == "mine.jsonl"


def test_a_file_without_any_good_row_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(DataError, match="none of its rows can be used; line 1: ") as e:
        sharing.look_at("bad.jsonl")
    assert "\n" not in str(e.value)


def test_an_error_that_a_person_can_fix_is_shown_as_one_line(monkeypatch, capsys):
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    machine.one_line_errors()
    shell.user_ns["fail"] = lambda: sharing.get_file("missing.jsonl")
    done = shell.run_cell("fail()")
    assert isinstance(done.error_in_exec, SftlabError)
    assert capsys.readouterr().out.strip().splitlines() == [
        'DataError: there is no file missing.jsonl: give its path, or "sample", or leave the name '
        "empty to upload one on Colab"]
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out


# --- the hub: only on a yes, and no token anywhere

TOKEN = "hf_" + "PlantedTokenOfATest"


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = dict(base_model_name_or_path=MODEL, peft_type="LORA")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Hub:
    "Stands for `HfApi`: notes what is sent, or fails as it is told."
    sent, fails, taken = [], None, False

    def __init__(self, token): self.token = token

    def create_repo(self, repo, **options):
        if Hub.fails:
            raise Hub.fails
        Hub.sent.append(("create", repo, options))
        return f"https://huggingface.co/{repo}"

    def file_exists(self, repo, file): return Hub.taken
    def upload_file(self, **options): Hub.sent.append(("file", options))
    def upload_folder(self, **options): Hub.sent.append(("folder", options))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub
    Hub.sent, Hub.fails, Hub.taken = [], None, False
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Hub


@pytest.mark.parametrize("answer", ["no", "", "y", "Yes!", "YES", True, None, 1])
def test_nothing_is_sent_without_an_explicit_yes(hub, adapter, answer):
    assert sharing.push_adapter(adapter, "me/x", answer) is None and hub.sent == []
    assert sharing.push_adapter(adapter, "me/x") is None and hub.sent == []


def test_on_a_yes_the_adapter_goes_to_a_private_repository(hub, adapter, capsys):
    assert sharing.push_adapter(adapter, "me/x", "yes") == "https://huggingface.co/me/x"
    (_, repo, options), (_, card), (_, folder) = hub.sent
    assert repo == "me/x" and options["private"] is True
    assert MODEL in card["path_or_fileobj"].decode() and folder["folder_path"] == str(adapter)
    assert "run.json" not in folder["allow_patterns"] and TOKEN not in capsys.readouterr().out


def test_an_adapter_that_is_there_is_not_written_over(hub, adapter):
    hub.taken = True
    with pytest.raises(OutputError, match="holds an adapter already"):
        sharing.push_adapter(adapter, "me/x", "yes")
    assert [kind for kind, *_ in hub.sent] == ["create"]


def test_an_adapter_of_a_base_that_nobody_has_is_refused(hub, adapter, tmp_path):
    (adapter / "adapter_config.json").write_text(
        json.dumps(dict(base_model_name_or_path=str(tmp_path))))
    with pytest.raises(OutputError, match="a folder of this machine, which nobody else has"):
        sharing.push_adapter(adapter, "me/x", "yes")
    assert hub.sent == []


def test_without_a_token_it_says_where_one_goes(hub, adapter, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OutputError, match="add the secret HF_TOKEN"):
        sharing.push_adapter(adapter, "me/x", "yes")


@pytest.mark.parametrize("text", [
    f"401 Client Error. Invalid token {TOKEN}", f"url: https://me:{TOKEN}@huggingface.co/api",
    f"headers={{'authorization': 'Bearer {TOKEN}'}}", "hf_AnotherTokenThatNobodyPlanted is wrong"])
def test_no_token_is_shown_whatever_the_hub_says(hub, adapter, text, capsys):
    hub.fails = RuntimeError(text)
    with pytest.raises(OutputError, match="me/x was not published: ") as e:
        sharing.push_adapter(adapter, "me/x", "yes")
    shown = "".join(traceback.format_exception(e.value)) + "".join(capsys.readouterr())
    assert TOKEN not in shown and "AnotherToken" not in shown and "***" in str(e.value)
    assert e.value.__context__ is None and "\n" not in str(e.value)


# --- the notebooks

def code_of(path):
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_there_are_three(): assert len(LABS) == 3


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_lab_is_short(path):
    assert len(nbformat.read(path, 4).cells) <= 25
    assert all(len(source.splitlines()) <= 25 for source in code_of(path))


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_model_and_data_are_named_in_one_cell(path):
    cells = [s for s in code_of(path) if re.search(r"^lab = open_lab\(", s, re.MULTILINE)]
    assert len(cells) == 1 and re.search(r"\bmodel=", cells[0]) and re.search(r"\bdata=", cells[0])


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_no_output_holds_a_place_of_a_machine(path):
    outputs = [cell.outputs for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users)/", json.dumps(outputs))


def run_cells(path, folder):
    "Run a lab's cells here, on another model, with a file in place of the hub's; its names."
    from IPython.core.interactiveshell import InteractiveShell
    rows = [as_messages(e)["messages"] for e in examples("train", 46)]
    for messages in rows:  # learned soon
        messages[-1]["content"] = "#### 4"
    Path("mine.jsonl").write_text("\n".join(json.dumps(dict(messages=m)) for m in rows))
    shell = InteractiveShell()
    for source in code_of(path):
        if "google.colab" in source:
            continue
        source = re.sub(r'model="Qwen/.*?"', f'model="{folder}"', source)
        source = re.sub(r'data="[^"]*/.*?"', 'data="mine.jsonl"', source)
        source = re.sub(r'^FILE = .*', 'FILE = "mine.jsonl"', source)
        source = re.sub(r"columns=dict\(.*?\),", "", source)
        done = shell.run_cell(source)
        assert done.success, f"{source}\n{done.error_before_exec or done.error_in_exec!r}"
    return shell.user_ns


@pytest.mark.slow
@pytest.mark.parametrize("qwen3", ["ours"], indirect=True)
@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_labs_cells_do_with_a_base_that_adds_thoughts(path, qwen3, monkeypatch):
    "Training, answers, merge and server agree, and a right answer is right."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = run_cells(path, qwen3.named_model)
    assert found["lab"].model == qwen3.named_model
    assert "report" not in found or found["report"].ok  # the server's
    saved = Path(found["run"].adapter, "chat_template.jinja").read_text()
    assert saved == TEMPLATES["chatml"].jinja
    assert {row["output"] for row in found["after"].of("held out")} == {"#### 4"}
    assert set(found["after"].scores("held out")) == {1}


def start(notebook):
    "Run a notebook in a process of its own, offline."
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests/offline"), "OMP_NUM_THREADS": "1",
                        "SFTLAB_OFFLINE_LOG": str(notebook.with_name("refused"))}
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", str(notebook)]
    return subprocess.Popen(command, cwd=notebook.parent, env=env, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def short(tmp_path):
    "The first lab up to its training, with fewer rows."
    book = nbformat.read(ROOT / "nbs/labs/qlora_t4.ipynb", 4)
    trains = next(i for i, cell in enumerate(book.cells) if "run = train(" in cell.source)
    book.cells = book.cells[:trains + 1]
    for cell in book.cells:
        cell.source = cell.source.replace('method="qlora")',
                                          'method="qlora", rows=90, questions=5)')
    nbformat.write(book, tmp_path / "lab.ipynb")
    return tmp_path / "lab.ipynb"


def kill_at_a_checkpoint(run, folder, seconds):
    "Kill a notebook, its kernel too, as soon as a checkpoint is whole; return its step."
    until, whole = time.monotonic() + seconds, []
    while time.monotonic() < until and run.poll() is None and not whole:
        time.sleep(0.05)
        whole = list(folder.glob("runs/*/checkpoints/checkpoint-*/complete"))
    for process in [run, *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()
    assert whole, f"no checkpoint within {seconds} s: {run.communicate()[1][-2000:]}"
    run.communicate()
    return max(int(path.parent.name.split("-")[1]) for path in whole)


@pytest.mark.slow
def test_a_killed_lab_goes_on_where_it_was(tmp_path):
    notebook = short(tmp_path)
    step = kill_at_a_checkpoint(start(notebook), tmp_path, 600)
    again = start(notebook)
    _, said = again.communicate(timeout=900)
    assert again.returncode == 0, said[-2000:]
    [facts] = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/adapter/run.json")]
    assert facts["first_step"] >= step >= 10  # what was done is not repeated
    assert facts["steps"] == facts["steps_planned"] > step
    steps = [entry["step"] for entry in facts["history"] if "loss" in entry]
    assert len(steps) == len(set(steps))
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert not (tmp_path / "refused").exists()  # the network was not asked for
