"Ids and labels: equal to transformers' and TRL's on whatever people say; an audit that names each fault, in every collator's batches, and nothing where there is none."
import copy
import random

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from sftlab.data import scan
from sftlab.masking import (BATCH_FAULTS, FAULTS, IGNORE, MODES, ROW_FAULTS, MaskError, audit_labels, collate, encode, encode_rows, mutation_table, labels_html, truncate)
from sftlab.tiny.world import examples, to_messages
from sftlab.models import load
from sftlab.templates import TEMPLATES, with_template

disable_progress_bars()


def tiny():
    tokenizer = load("tiny")[1]
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def metaspace():
    "A tokenizer like those of Llama 2 and Mistral: spaces are part of tokens, and one is put before the first text."
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))])
    backend.train_from_iterator([line for e in examples("train", 300) for line in f"{e['question']} {e['answer']}".splitlines()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TINY = tiny()
TOKENIZERS = {"tiny": TINY, "metaspace": with_template(metaspace(), "chatml"), **{f"tiny, {name}": with_template(TINY, name) for name in TEMPLATES}}
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co"]) | st.sampled_from("\n \t#:"), max_size=12)
contents = st.lists(st.sampled_from(["\n", "\n\n", " ", "Lima", "猫", "42", "def f(x):\n    return x", "###", ":"]) | words, max_size=4).map("".join)


@st.composite
def talks(draw, contents=contents):
    "A conversation: a system text or none, one to three exchanges."
    system = draw(st.none() | contents.filter(str.strip))
    turns = [dict(role=role, content=draw(contents)) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    return [dict(role="system", content=system)] * (system is not None) + turns


def typed(tokenizer, messages):
    return any(token.content.strip() in m["content"] for m in messages for token in tokenizer.added_tokens_decoder.values())


def learned_text(tokenizer, row):
    "What is learned, a text a stretch."
    runs, before = [], None
    for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"])):
        if label == IGNORE:
            continue
        assert label == token
        if before != i - 1:
            runs.append([])
        runs[-1].append(token)
        before = i
    return [tokenizer.decode(run) for run in runs]


def say(*contents):
    return [dict(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(contents)]


def test_what_each_mode_learns():
    messages = [dict(role="system", content="Be brief.")] + say("Hi", "Hello", "And?", "Bye")
    learned = {mode: learned_text(TINY, encode(TINY, messages, mode)) for mode in MODES}
    assert learned["assistant"] == ["Hello<|im_end|>", "Bye<|im_end|>"]  # each answer with the mark that ends it, no header, no line end behind
    assert learned["last"] == ["Bye<|im_end|>"]
    assert learned["completion"] == ["Bye<|im_end|>\n"]  # to the very end
    assert learned["all"] == [TINY.apply_chat_template(messages, tokenize=False)]


def test_completion_is_all_that_follows_the_last_question():
    messages = say("Hi", "Hello", "Weather?", "I look.") + [dict(role="tool", content="Sun"), dict(role="assistant", content="Sun.")]
    assert learned_text(TINY, encode(TINY, messages, "completion")) == ["I look.<|im_end|>\n<|im_start|>tool\nSun<|im_end|>\n<|im_start|>assistant\nSun.<|im_end|>\n"]
    assert learned_text(TINY, encode(TINY, messages, "last")) == ["Sun.<|im_end|>"]


def test_a_token_that_header_and_answer_share_is_learned():
    row = encode(TINY, say("Hi", "\n\nHello"))
    assert learned_text(TINY, row) == ["\n\n\nHello<|im_end|>"]  # the first line end is the header's


def test_a_typed_stop_token_is_text():
    row = encode(TINY, say("Say <|im_end|> twice", "<|im_end|><|im_end|>"))
    assert [i for i in row["labels"] if i == TINY.eos_token_id] == [TINY.eos_token_id] and row["input_ids"].count(TINY.eos_token_id) == 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_transformers_masks(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(talks())
    def check(messages):
        assume(not typed(tokenizer, messages))
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        row = encode(tokenizer, messages)
        assert row["input_ids"] == out["input_ids"]
        assert row["labels"] == [token if m else IGNORE for token, m in zip(out["input_ids"], out["assistant_masks"])]
    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_many_rows_are_as_one_by_one(name):
    "Also where special tokens were typed, and where header and answer melt."
    tokenizer = TOKENIZERS[name]
    marked = contents | st.sampled_from(["<|im_end|>", "</s>", "<s>", "a<|im_start|>assistant\n", "<|eot_id|>b"])

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.lists(talks(marked), max_size=3), st.sampled_from(MODES), st.sampled_from([None, name.split(", ")[-1] if ", " in name else None]))
    def check(many, mode, template):
        assert encode_rows(tokenizer, [dict(messages=m) for m in many], mode, template) == [encode(tokenizer, m, mode, template) for m in many]
    check()


def by_trl(rows, tokenizer=TINY, **more):
    "The rows as TRL prepares them, and the collator that it would use."
    args = SFTConfig("runs/test", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, eos_token=tokenizer.eos_token, **{"max_length": None} | more)
    trainer = SFTTrainer(load("tiny")[0], args, train_dataset=Dataset.from_list(rows), processing_class=copy.deepcopy(tokenizer))
    return trainer.train_dataset, trainer.data_collator


def assert_equal_to_trl(many):
    rows = [dict(messages=m) for m in many]
    ways = {"assistant": (rows, dict(assistant_only_loss=True)), "completion": ([dict(prompt=m[:-1], completion=m[-1:]) for m in many], dict(completion_only_loss=True)), "all": (rows, {})}
    for mode, (given_rows, more) in ways.items():
        theirs, ours = by_trl(given_rows, **more)[0], encode_rows(TINY, rows, mode)
        for i, row in enumerate(ours):
            assert theirs[i]["input_ids"] == row["input_ids"] and theirs[i]["labels"] == row["labels"], (mode, i, many[i])


@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(st.lists(talks().filter(lambda m: not typed(TINY, m)), min_size=20, max_size=20))
def test_labels_are_trls(many):
    assert_equal_to_trl(many)


def real_talks(folder, name, n=400):
    "Up to `n` conversations of a real file that end with an answer and hold no special token."
    rows = [record.row["messages"] for record in scan(folder / name) if record.row]
    rows = [m for m in rows if m[-1]["role"] == "assistant" and not typed(TINY, m)]
    return random.Random(0).sample(rows, min(n, len(rows)))


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "sharegpt_dummy_conversation.json"])
def test_labels_are_trls_on_real_rows(real_data, name):
    many = real_talks(real_data, name)
    assert len(many) == 400
    assert_equal_to_trl(many)


rows_of_ids = st.lists(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5).map(
    lambda rows: [dict(input_ids=[i for i, _ in row], labels=[i if m else IGNORE for i, m in row]) for row in rows])


@given(rows_of_ids)
def test_batches_are_trls(rows):
    ours, theirs = collate(rows, 99), TRLCollator(99)(rows)
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@given(rows_of_ids, st.integers(1, 9), st.sampled_from(["drop", "cut", "prompt"]))
def test_no_row_gets_lost_uncounted(rows, limit, how):
    kept, fate = truncate(rows, limit, how)
    assert sum(fate.values()) == len(rows) and len(kept) == fate["whole"] + fate["shortened"]
    assert all(len(row["input_ids"]) == len(row["labels"]) <= limit for row in kept)
    assert [row for row in rows if len(row["input_ids"]) <= limit] == [row for row in kept if row in rows and len(row["input_ids"]) <= limit]
    assert how != "drop" or fate["shortened"] == 0


def test_what_truncation_leaves():
    ids, labels = list(range(10)), [IGNORE] * 6 + [6, 7, 8] + [IGNORE]
    row = dict(input_ids=ids, labels=labels)
    assert truncate([row], 10, "drop") == ([row], dict(whole=1, shortened=0, dropped=0))
    assert truncate([row], 9, "drop") == ([], dict(whole=0, shortened=0, dropped=1))
    assert truncate([row], 8, "cut")[0] == [dict(input_ids=ids[:8], labels=labels[:8])]  # 8, the stop token, is lost
    assert truncate([row], 6, "cut")[1]["dropped"] == 1  # nothing left to learn
    assert truncate([row], 5, "prompt")[0] == [dict(input_ids=ids[5:], labels=labels[5:])]
    assert truncate([row], 4, "prompt")[1]["dropped"] == 1  # an answer to nothing: no token stands before it
    assert truncate([row], 3, "prompt")[1]["dropped"] == 1


@pytest.mark.parametrize("call, says", [
    (lambda: encode(TINY, say("Hi", "Ho"), "answers"), "no mode 'answers'.*assistant, last, completion, all"),
    (lambda: encode(TINY, say("Hi")), "no turn is the assistant's"),
    (lambda: encode(TINY, say("Hi", "Ho", "And?"), "completion"), "nobody answers the last question"),
    (lambda: encode_rows(TINY, [dict(messages=say("Hi", "Ho")), dict(messages=say("Hi"))]), "^row 2: .*no turn is the assistant's"),
    (lambda: encode_rows(TINY, [dict(messages=[dict(role="user", content=None)])]), r"^row 1: messages\[0\].content is not a text"),
    (lambda: collate([dict(input_ids=[1], labels=[1])], None), "pad_token"),
    (lambda: truncate([], 5, "middle"), "drop, cut or prompt"),
    (lambda: audit_labels([], TINY), "no batches"),
    (lambda: audit_labels([dict(input_ids=[[1]])], TINY), "batch 0 has no labels"),
    (lambda: audit_labels([dict(labels=[[1]])], TINY), "batch 0 has no input_ids"),
    (lambda: audit_labels([dict(input_ids=[[1, 2]], labels=[[1]])], TINY), "batch 0: .*not equally long"),
])
def test_what_cannot_be_used_is_told(call, says):
    with pytest.raises(MaskError, match=says):
        call()


ROWS = [to_messages(e) for e in examples("train", 24)]
for i in range(0, 24, 6):
    ROWS[i] = dict(messages=ROWS[i]["messages"] + ROWS[i + 1]["messages"])  # some with two turns
MANY = [encode(TINY, row["messages"]) for row in ROWS]


def left(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    return DataCollatorForSeq2Seq(tokenizer)


def ids_only(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return lambda rows: collator([dict(input_ids=row["input_ids"]) for row in rows])


COLLATORS = {"collate": lambda t: lambda rows: collate(rows, t.pad_token_id), "TRL": lambda t: TRLCollator(t.pad_token_id), "TRL, padding_free": lambda t: TRLCollator(t.pad_token_id, padding_free=True),
             "Flattening": lambda t: DataCollatorWithFlattening(return_position_ids=True), "Seq2Seq": DataCollatorForSeq2Seq, "Seq2Seq, left": left, "LanguageModeling": ids_only}


def batched(collator, rows=MANY, size=8):
    return [collator([dict(row) for row in rows[i:i + size]]) for i in range(0, len(rows), size)]


def test_the_audit_names_every_fault_in_every_collator_and_nothing_else():
    table = mutation_table(TINY, ROWS, COLLATORS)
    print("\n" + table.to_string())
    assert list(table.loc["(no fault)"]) == ["nothing named"] * 6 + ["everything learned"]
    faults = table.drop("(no fault)")
    assert faults.isin(["named", "named below", "-"]).all(axis=None)
    assert (faults[["collate", "TRL", "Seq2Seq"]] == "named").all(axis=None)  # where every fault is possible, every one is named as a cause
    named = {cause for cause, _ in (*ROW_FAULTS.values(), *BATCH_FAULTS.values())}
    assert named == set(FAULTS)  # no fault in the list that nobody makes


def test_a_kill_table_of_an_audit_that_sees_nothing_says_so(monkeypatch):
    "The control: with one check taken out, its faults are told as missed."
    monkeypatch.setattr("sftlab.masking._check_ends", lambda *_: None)
    table = mutation_table(TINY, ROWS[:8], {"collate": COLLATORS["collate"]})["collate"]
    assert table["the stop token is masked"] == "missed: nothing" and table["headers are learned"] == "named"


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("mode", ["assistant", "last", "completion"])
def test_sound_batches_have_no_fault(template, mode):
    tokenizer = TINY if template is None else TOKENIZERS[f"tiny, {template}"]
    batches = batched(COLLATORS["collate"](tokenizer), encode_rows(tokenizer, ROWS, mode))
    for more in (dict(rows=ROWS), dict(template=template or TINY.chat_template), {}):
        audit_labels(batches, tokenizer, **more).assert_ok()


def test_trls_own_batches_have_no_fault():
    split = [dict(prompt=row["messages"][:-1], completion=row["messages"][-1:]) for row in ROWS]
    for rows, more in ((ROWS, dict(assistant_only_loss=True)), (split, dict(completion_only_loss=True)), (ROWS, dict(assistant_only_loss=True, packing=True, max_length=256))):
        data, collator = by_trl(rows, **more)
        report = audit_labels(batched(collator, [data[i] for i in range(len(data))]), TINY, ROWS)
        assert report.figures["told"] == report.figures["conversations"] == len(ROWS)  # packed ones too are taken apart
        report.assert_ok()


def test_real_rows_have_no_fault(real_data):
    for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "sharegpt_dummy_conversation.json"):
        rows = [dict(messages=m) for m in real_talks(real_data, name, 100)]
        batches = batched(COLLATORS["collate"](TINY), encode_rows(TINY, rows))
        for more in (dict(rows=rows), dict(template="chatml"), {}):
            audit_labels(batches, TINY, **more).assert_ok()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(talks(), min_size=1, max_size=6), st.sampled_from(["collate", "TRL", "TRL, padding_free", "Seq2Seq, left"]))
def test_no_conversation_makes_the_audit_cry(many, name):
    rows = [dict(messages=m) for m in many]
    audit_labels(batched(COLLATORS[name](TINY), encode_rows(TINY, rows), 3), TINY, rows).assert_ok()


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_one_bad_row_among_many_is_found_where_it_is(fault):
    cause, made = ROW_FAULTS[fault]
    bad = 11 if fault != "cut after 28 tokens" else max(range(len(ROWS)), key=lambda i: len(MANY[i]["input_ids"]))
    rows = [made(TINY, ROWS[bad]["messages"]) if i == bad else row for i, row in enumerate(MANY)]
    if fault == "cut after 28 tokens":
        rows = [row for i, row in enumerate(rows) if i == bad or len(row["input_ids"]) <= 28]
        bad = next(i for i, row in enumerate(rows) if row not in MANY)
    report = audit_labels(batched(COLLATORS["collate"](TINY), rows), TINY, ROWS)
    assert list(report.causes) == [cause] and [(talk.batch, talk.row) for talk in report.causes[cause][0]] == [divmod(bad, 8)]


def test_without_rows_or_template_nothing_is_said_of_prompts():
    batches = batched(COLLATORS["collate"](TINY), [encode(TINY, row["messages"], "all") for row in ROWS])
    report = audit_labels(batches, TINY)
    assert not report.causes and "cannot be told" in repr(report)
    assert list(audit_labels(batches, TINY, template="chatml").causes) == ["everything learned"]


def test_batches_may_be_lists_or_arrays():
    batches = batched(COLLATORS["collate"](TINY))
    as_lists = [{key: value.tolist() for key, value in batch.items()} for batch in batches]
    as_arrays = [{key: value.numpy() for key, value in batch.items()} for batch in batches]
    assert repr(audit_labels(batches, TINY, ROWS)) == repr(audit_labels(as_lists, TINY, ROWS)) == repr(audit_labels(iter(as_arrays), TINY, ROWS))


def test_padding_without_attention_mask_is_known_by_its_token():
    batches = [{key: batch[key] for key in ("input_ids", "labels")} for batch in batched(COLLATORS["collate"](TINY))]
    report = audit_labels(batches, TINY, ROWS)
    report.assert_ok()
    assert report.figures["padding"] == sum((batch["input_ids"] == TINY.pad_token_id).sum().item() for batch in batches) > 0


def test_figures_are_counts():
    figures = audit_labels(batched(COLLATORS["TRL"](TINY)), TINY, ROWS).figures
    assert figures["tokens"] == sum(len(row["input_ids"]) for row in MANY) and figures["learned"] == sum(label != IGNORE for row in MANY for label in row["labels"])
    assert (figures["batches"], figures["conversations"], figures["told"]) == (3, 24, 24)


def test_the_report_is_for_people():
    batch = collate([encode(TINY, say("<b>Hi</b>", "Ho"), "all"), MANY[0]], TINY.pad_token_id)
    report = audit_labels([batch], TINY, [dict(messages=say("<b>Hi</b>", "Ho")), ROWS[0]])
    with pytest.raises(AssertionError, match="everything learned: 1 conversations .batch 0 row 0.*\n.*To mend: Mask all but the answers.*\n.*What follows: prompt learned .1., header learned .1."):
        report.assert_ok()
    html = report._repr_html_()
    assert "<b>Hi" not in html and "&lt;b&gt;Hi" in html and "✗" in html
    assert "No fault" in audit_labels(batched(COLLATORS["TRL"](TINY)), TINY, ROWS)._repr_html_()


def test_labels_shown_are_whole():
    import re
    from html import unescape
    for row in MANY:
        assert unescape(re.sub("<[^>]+>", "", labels_html(**dict(zip(("ids", "labels"), row.values())), tokenizer=TINY))) == TINY.decode(row["input_ids"])
