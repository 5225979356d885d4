"""Small models, files and chat templates to try together: what a person may bring along.

Each file comes with the conversations that it means, written out by hand, so that nothing that
reads it is its own judge.
"""
import json
from dataclasses import dataclass

import torch
import transformers
from small_models import ARCHITECTURES, LLAMA_LIKE, VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import chat_template_utils

from sftlab.models import tiny_path

LENGTH = 1024  # tokens that each model can read
MODELS = {name: ARCHITECTURES[name] for name in (
    "llama", "qwen2", "qwen3", "gpt2", "neox", "opt", "bloom", "mixtral", "mamba", "gemma3")}
# Logits that are bent before the softmax. (Gemma 3 has a part for pictures, too.)
MODELS["gemma2"] = ("Gemma2Config", LLAMA_LIKE | dict(
    head_dim=16, sliding_window=32, final_logit_softcapping=0.5))
# GPT-2's and OPT's are not 0, and then no two passes have the same loss.
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout")

# --- chat templates

TEMPLATES = dict(
    chatml=None,  # the tiny model's own
    llama3=chat_template_utils.llama3_chat_template,
    gemma3=chat_template_utils.gemma3_chat_template,
    qwen3=chat_template_utils.qwen3_chat_template)
CONTROL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<bos>", "<start_of_turn>", "<end_of_turn>"]
BOS = dict(llama3="<|begin_of_text|>", gemma3="<bos>")
PLAIN = dict(llama="llama3", mixtral="llama3", gemma2="gemma3", gemma3="gemma3")
END = dict(chatml="<|im_end|>", llama3="<|eot_id|>", gemma3="<end_of_turn>", qwen3="<|im_end|>")


def template_of(model, shape):
    "The name of the template that a run uses: tools and thoughts need one that has a place for it."
    return "qwen3" if shape in ("tools", "thinking") else PLAIN.get(model, "chatml")


def tokenizer_with(template):
    "The tiny model's tokenizer, with a chat template and all tokens that any of them needs."
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_special_tokens({"extra_special_tokens": CONTROL}, False)
    if template in BOS:
        tokenizer.bos_token = BOS[template]
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    tokenizer.model_max_length = LENGTH
    return tokenizer


def save_model(name, template, folder):
    "A model with random weights, larger than usual so that answers differ, and its tokenizer."
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**settings)
    text = config.get_text_config(decoder=True)
    text.vocab_size = VOCABULARY + 64
    for field in DROPOUTS:
        if hasattr(text, field):
            setattr(text, field, 0.0)
    for field in ("max_position_embeddings", "n_positions"):
        if hasattr(text, field):
            setattr(text, field, LENGTH)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 4
    model.save_pretrained(folder)
    tokenizer_with(template).save_pretrained(folder)
    return str(folder)


# --- files

@dataclass
class Shape:
    "Rows as a file has them, and as they are meant."
    rows: list  # of the file
    talks: list  # of {"messages", "tools"}
    columns: dict = None  # what the file calls prompt and completion


def talk(*turns, tools=None):
    return dict(messages=[dict(role=role, content=text) for role, text in turns], tools=tools)


WORDS = ["moss", "a lamp", "nine red birds", "the old mill by the sea", "rain", "salt & pepper",
         "x = 3;\n    y = x ** 2", "two words", "Zoë's café", "an answer of some more words", "ok"]


def alpaca():
    rows, talks = [], []
    for n, word in enumerate(WORDS):
        row = dict(instruction=f"Say {n} in other words.", input="", output=word)
        turns = [("user", row["instruction"]), ("assistant", word)]
        if n % 3 == 1:
            row["input"] = f"{n}, please"
            turns[0] = ("user", f"Say {n} in other words.\n\n{n}, please")
        if n % 4 == 2:
            row["history"] = [["Hello?", "Yes."]]
            turns = [("user", "Hello?"), ("assistant", "Yes."), *turns]
        if n % 4 == 3:
            row["system"] = "Be brief."
            turns = [("system", "Be brief."), *turns]
        rows.append(row)
        talks.append(talk(*turns))
    return Shape(rows, talks)


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools():
    "Arguments whose names are others in each row, calls side by side, rows without tools."
    rows, talks = [], []
    for n, word in enumerate(WORDS):
        if n % 5 == 4:
            rows.append(dict(conversations=[{"from": "human", "value": f"Say {n}."},
                                            {"from": "gpt", "value": word}]))
            talks.append(talk(("user", f"Say {n}."), ("assistant", word)))
            continue
        parameters = {"type": "object", "properties": {f"k{n}": {"type": "string"}}}
        held = [{"type": "function", "function": {
            "name": f"find_{n}", "description": f"Find {n}.", "parameters": parameters}}]
        arguments = {f"k{n}": n, "words": [word, None, True], "deep": {f"d{n}": 0.5}}
        calls = [dict(name=f"find_{n}", arguments=arguments)]
        if n % 5 == 3:
            calls.append(dict(name=f"find_{n}", arguments={}))
        turns = [{"from": "human", "value": f"Find {n}."},
                 {"from": "function_call", "value": json.dumps(
                     calls if len(calls) > 1 else calls[0], ensure_ascii=n % 2 == 0)},
                 {"from": "observation", "value": json.dumps({"found": word})},
                 {"from": "gpt", "value": f"It is {word}."}]
        messages = [dict(role="user", content=f"Find {n}."),
                    dict(role="assistant", content="", tool_calls=[call(**c) for c in calls]),
                    dict(role="tool", content=json.dumps({"found": word})),
                    dict(role="assistant", content=f"It is {word}.")]
        row = dict(conversations=turns, tools=json.dumps(held))
        if n % 5 == 2:
            row["system"] = "Use tools."
            messages.insert(0, dict(role="system", content="Use tools."))
        rows.append(row)
        talks.append(dict(messages=messages, tools=held))
    return Shape(rows, talks)


def several():
    "Several turns; some answers are not to be learned."
    rows, talks = [], []
    for n, word in enumerate(WORDS):
        turns = [("user", f"First {n}?"), ("assistant", word), ("user", f"And then {n}?"),
                 ("assistant", f"{word} again"), ("user", "Thanks"), ("assistant", "Bye")]
        made = talk(*([("system", f"You are {n}.")] if n % 2 else []), *turns[:2 + n % 3 * 2])
        if n % 3 == 2:
            made["messages"][-3]["weight"] = 0
            made["messages"][-1]["weight"] = 1
        rows.append(dict(messages=made["messages"]))
        talks.append(made)
    return Shape(rows, talks)


def chinese():
    words = ["你好！", "北京是中国的首都。", "谢谢", "一二三四五", "龘靐齉爩", "水 water 火",
             "👩‍👩‍👧 家庭", "「引用」——好的", "全角ＡＢＣ１２３", "第一行\n第二行", "好"]
    rows = [dict(instruction=f"请说第{n}句话。", input="", output=word)
            for n, word in enumerate(words)]
    return Shape(rows, [talk(("user", r["instruction"]), ("assistant", r["output"]))
                        for r in rows])


def own():
    "Columns with names of their own, and others that a trainer would take for its own."
    rows, talks = [], []
    ids = [1, "a", None, 2.5, [1], {"x": 1}, True, 10 ** 30, "b", -1, ""]
    for n, word in enumerate(WORDS):
        row = dict(id=ids[n], question=f"What is {n}?", answer=word, input_ids=[n, 1, 2],
                   labels=[n], attention_mask=[0], position_ids=[9], seq_lengths=[1], image="a.png",
                   images=[], chosen="x", rejected="y", text="other", assistant_masks=[1])
        if n % 2:
            row.pop("labels")
        rows.append(row)
        talks.append(talk(("user", f"What is {n}?"), ("assistant", word)))
    return Shape(rows, talks, dict(prompt="question", completion="answer"))


def thinking():
    "Thoughts in the text, or in a field of their own, in the last turn and in earlier ones."
    rows, talks = [], []
    for n, word in enumerate(WORDS):
        thought, apart = f"{n} is {word}?\nYes, {n}.", n % 2 == 1
        answer = dict(role="assistant", content=f"<think>\n{thought}\n</think>\n\n{word}")
        if apart:
            answer = dict(role="assistant", content=word, reasoning_content=thought)
        messages = [dict(role="user", content=f"Think of {n}."), answer]
        if n % 3 == 2:
            messages += [dict(role="user", content="Now do not."),
                         dict(role="assistant", content="Done.")]
        rows.append(dict(messages=messages))
        talks.append(dict(messages=messages, tools=None))
    return Shape(rows, talks)


SHAPES = dict(alpaca=alpaca, tools=tools, several=several, chinese=chinese, own=own,
              thinking=thinking)


def write(rows, path):
    "JSONL, a row a line."
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path
