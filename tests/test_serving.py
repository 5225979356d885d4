"""What `finetune` saves answers, and stops, in other programs as it does in `sftlab chat`.

An adapter is read together with its base, whose generation settings end at the base's own end
token: transformers and PEFT need the adapter's (`generation_config.json`) as an argument. A whole
model, trained or merged, needs none.
"""
import contextlib
import io
import json
import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from sftlab import cli
from sftlab.finetune import finetune
from sftlab.generation import stop_token_ids, stream
from sftlab.models import load, tiny_path
from sftlab.rendering import prompt_ids
from sftlab.tiny.world import as_messages, examples

pytestmark = pytest.mark.slow
warnings.filterwarnings("ignore")
QUESTIONS = [[dict(role="user", content=e["question"])] for e in examples("test", 5)]
ROOM = dict(max_new_tokens=48, do_sample=False)
FLOAT32 = dict(dtype=torch.float32)  # in bfloat16 another token may win


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with an adapter, the same merged, and a model of which all weights were trained."
    folder = tmp_path_factory.mktemp("serving")
    rows = [as_messages(e) for e in examples("train", 240)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for method in ("lora", "full"):
            model, tokenizer = load("tiny")
            finetune(model, tokenizer, rows, folder / method, method=method, epochs=1,
                     learning_rate=2e-3 if method == "full" else None)
        assert cli.main(["merge", str(folder / "lora"), "--output", str(folder / "merged"),
                         "--dtype", "float32"]) == 0
    return folder


def in_chat(folder):
    model, tokenizer = load(str(folder))
    ids = [prompt_ids(tokenizer, question) for question in QUESTIONS]
    return ["".join(stream(model, tokenizer, i, max_new_tokens=48)) for i in ids]


@pytest.fixture(scope="module")
def expected(made):
    "What `sftlab chat` says with each, most of it ended by the model itself."
    answers = {name: in_chat(made / name) for name in ("lora", "full", "merged")}
    assert answers["merged"] == answers["lora"]
    for name, said in answers.items():
        lengths = [len(AutoTokenizer.from_pretrained(made / name)(a)["input_ids"]) for a in said]
        assert sum(length < 40 for length in lengths) >= 3, said
    return answers


def generated(model, folder, **settings):
    "Answers by `generate`, without the token that ended them."
    tokenizer, answers = AutoTokenizer.from_pretrained(folder), []
    for question in QUESTIONS:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **ROOM,
                                 **settings)[0, ids.shape[1]:].tolist()
        if out[-1] in stop_token_ids(model, tokenizer):
            out.pop()
        answers.append(tokenizer.decode(out))
    return answers


def piped(pipe, **settings):
    return [pipe(question, **ROOM, **settings)[0]["generated_text"][-1]["content"]
            for question in QUESTIONS]


def settings_of(folder):
    return dict(generation_config=GenerationConfig.from_pretrained(folder))


def base():
    return AutoModelForCausalLM.from_pretrained(tiny_path(), **FLOAT32)


@pytest.mark.parametrize("name", ("lora", "full", "merged"))
def test_load_and_generate(made, expected, name):
    assert generated(load(str(made / name))[0], made / name) == expected[name]


def test_an_adapter_of_peft_stops_too(made, expected, tmp_path):
    "PEFT saves no generation settings: the end token of the tokenizer beside it counts."
    folder = tmp_path / "peft"
    shutil.copytree(made / "lora", folder)
    (folder / "generation_config.json").unlink()
    assert generated(load(str(folder))[0], folder) == expected["lora"]


@pytest.mark.parametrize("name", ("full", "merged"))
def test_a_whole_model_needs_no_argument(made, expected, name):
    model = AutoModelForCausalLM.from_pretrained(made / name)
    assert model.dtype == torch.float32
    assert generated(model, made / name) == expected[name]
    assert piped(pipeline("text-generation", str(made / name))) == expected[name]


WAYS = dict(
    pipeline=lambda folder, settings: piped(
        pipeline("text-generation", str(folder), **FLOAT32, **settings)),
    pipeline_call=lambda folder, settings: piped(
        pipeline("text-generation", str(folder), **FLOAT32), **settings),
    auto_model=lambda folder, settings: generated(
        AutoModelForCausalLM.from_pretrained(folder, **FLOAT32, **settings), folder),
    auto_peft=lambda folder, settings: generated(
        AutoPeftModelForCausalLM.from_pretrained(folder, **FLOAT32, **settings), folder),
    peft=lambda folder, settings: generated(
        PeftModel.from_pretrained(base(), folder), folder, **settings))


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_adapter_with_its_generation_config(made, expected, way):
    assert WAYS[way](made / "lora", settings_of(made / "lora")) == expected["lora"]


def test_an_adapter_alone_runs_on(made, expected):
    "A limit of transformers, that the documentation tells: when this fails, it has gone."
    assert piped(pipeline("text-generation", str(made / "lora"), **FLOAT32)) != expected["lora"]


TASK = """\
task: asked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "-"
generation_kwargs: {{until: [], max_gen_toks: 48, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def evaluated(tmp_path):
    "A function from what lm-eval takes as a model to its answers."
    evaluator = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    rows = [json.dumps(dict(question=q[0]["content"])) for q in QUESTIONS]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    (tmp_path / "asked.yaml").write_text(TASK.format(file=tmp_path / "asked.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    def answers(**model):
        done = evaluator.simple_evaluate(
            model="hf", model_args=model | dict(device="cpu", dtype="float32"), tasks=["asked"],
            task_manager=tasks, apply_chat_template=True, log_samples=True, bootstrap_iters=0)
        samples = sorted(done["samples"]["asked"], key=lambda sample: sample["doc_id"])
        return [sample["resps"][0][0] for sample in samples]
    return answers


@pytest.mark.parametrize("name", ("full", "merged"))
def test_a_whole_model_in_lm_eval(made, expected, evaluated, name):
    assert evaluated(pretrained=str(made / name)) == expected[name]


def test_an_adapter_in_lm_eval(made, evaluated, tmp_path):
    "One without rows of the embedding, as models other than the tiny one have."
    model = PeftModel.from_pretrained(base(), made / "lora")
    model.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(made / "lora").save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    config["trainable_token_indices"] = None
    (tmp_path / "plain/adapter_config.json").write_text(json.dumps(config))
    drop_rows(tmp_path / "plain/adapter_model.safetensors")
    answers = evaluated(pretrained=str(tiny_path()), peft=str(tmp_path / "plain"),
                        tokenizer=str(tmp_path / "plain"))
    assert answers == in_chat(tmp_path / "plain")


def drop_rows(file):
    "Take trained rows of the embedding out of an adapter's file."
    from safetensors.torch import load_file, save_file
    kept = {name: t for name, t in load_file(file).items() if "trainable_tokens" not in name}
    save_file(kept, file, metadata={"format": "pt"})


def test_trained_rows_of_a_tied_embedding_in_lm_eval(made, evaluated):
    "lm-eval ties weights anew, where PEFT has put a layer: merge first. When this fails, it works."
    with pytest.raises(AttributeError, match="embed_tokens"):
        evaluated(pretrained=str(tiny_path()), peft=str(made / "lora"),
                  tokenizer=str(made / "lora"))
