"""Ids and labels: equal to transformers' and TRL's on whatever people say; an audit that names each
fault, in every collator's batches, and nothing where there is none."""
import copy
import random
import re
from html import unescape

import pytest
import trl
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening,
    PreTrainedTokenizerFast)
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from sftlab.audit.label_faults import (
    BATCH_FAULTS, LIST_FAULTS, ROW_FAULTS, mutation_table)
from sftlab.audit.labels import LABEL_FAULTS, audit_labels, label_auditor
from sftlab.errors import MaskError
from sftlab.files.rows import scan
from sftlab.masking import IGNORE, MODES, collate, encode, encode_rows, truncate
from sftlab.models import load
from sftlab.packing import collate_packed
from sftlab.plots import labels_html
from sftlab.templates import TEMPLATES, with_template
from sftlab.tiny.world import as_messages, examples

disable_progress_bars()
REAL = ("alpaca_en_demo.json", "alpaca_zh_demo.json", "sharegpt_dummy_conversation.json")


def tiny():
    tokenizer = load("tiny")[1]
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def metaspace():
    """A tokenizer like those of Llama 2 and Mistral: spaces are part of tokens, and one is put
    before the first text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [f"{e['question']} {e['answer']}" for e in examples("train", 300)]
    lines = [line for text in texts for line in text.splitlines()]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TINY = tiny()
TOKENIZERS = {"tiny": TINY, "metaspace": with_template(metaspace(), "chatml")}
TOKENIZERS |= {f"tiny, {name}": with_template(TINY, name) for name in TEMPLATES}
letters = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co"])
words = st.text(letters | st.sampled_from("\n \t#:"), max_size=12)
pieces = st.sampled_from(
    ["\n", "\n\n", " ", "Lima", "猫", "42", "def f(x):\n    return x", "###", ":"])
contents = st.lists(pieces | words, max_size=4).map("".join)


@st.composite
def talks(draw, contents=contents):
    "A conversation: a system text or none, one to three exchanges."
    system = draw(st.none() | contents.filter(str.strip))
    turns = [] if system is None else [dict(role="system", content=system)]
    for _ in range(draw(st.integers(1, 3))):
        turns += [dict(role=role, content=draw(contents)) for role in ("user", "assistant")]
    return turns


def typed(tokenizer, messages):
    "Whether somebody wrote a special token."
    special = [token.content.strip() for token in tokenizer.added_tokens_decoder.values()]
    return any(token in m["content"] for m in messages for token in special)


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
    roles = ("user", "assistant")
    return [dict(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


def test_what_each_mode_learns():
    messages = [dict(role="system", content="Be brief.")] + say("Hi", "Hello", "And?", "Bye")
    learned = {mode: learned_text(TINY, encode(TINY, messages, mode)) for mode in MODES}
    # each answer with the mark that ends it, no header, no line end after it
    assert learned["assistant"] == ["Hello<|im_end|>", "Bye<|im_end|>"]
    assert learned["last"] == ["Bye<|im_end|>"]
    assert learned["completion"] == ["Bye<|im_end|>\n"]  # to the very end
    assert learned["all"] == [TINY.apply_chat_template(messages, tokenize=False)]


def test_completion_is_all_that_follows_the_last_question():
    messages = say("Hi", "Hello", "Weather?", "I look.")
    messages += [dict(role="tool", content="Sun"), dict(role="assistant", content="Sun.")]
    assert learned_text(TINY, encode(TINY, messages, "completion")) == [
        "I look.<|im_end|>\n<|im_start|>tool\nSun<|im_end|>\n"
        "<|im_start|>assistant\nSun.<|im_end|>\n"]
    assert learned_text(TINY, encode(TINY, messages, "last")) == ["Sun.<|im_end|>"]


def test_a_token_that_header_and_answer_share_is_learned():
    row = encode(TINY, say("Hi", "\n\nHello"))
    assert learned_text(TINY, row) == ["\n\n\nHello<|im_end|>"]  # the first line end: the header's


def test_a_typed_stop_token_is_text():
    row = encode(TINY, say("Say <|im_end|> twice", "<|im_end|><|im_end|>"))
    assert row["labels"].count(TINY.eos_token_id) == 1  # that of the template
    assert row["input_ids"].count(TINY.eos_token_id) == 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_transformers_masks(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(talks())
    def check(messages):
        assume(not typed(tokenizer, messages))
        out = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = out["input_ids"], out["assistant_masks"]
        row = encode(tokenizer, messages)
        assert row["input_ids"] == ids
        assert row["labels"] == [token if m else IGNORE for token, m in zip(ids, mask)]
    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_many_rows_are_as_one_by_one(name):
    "Also where special tokens were typed, and where header and answer melt."
    tokenizer = TOKENIZERS[name]
    marks = ["<|im_end|>", "</s>", "<s>", "a<|im_start|>assistant\n", "<|eot_id|>b"]
    marked = contents | st.sampled_from(marks)
    by_name = name.split(", ")[-1] if ", " in name else None

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.lists(talks(marked), max_size=3), st.sampled_from(MODES),
           st.sampled_from([None, by_name]))
    def check(many, mode, template):
        rows = encode_rows(tokenizer, [dict(messages=m) for m in many], mode, template)
        assert rows == [encode(tokenizer, m, mode, template) for m in many]
    check()


def by_trl(rows, tokenizer=TINY, **more):
    "The rows as TRL prepares them, and the collator that it would use."
    args = SFTConfig(
        "runs/test", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, eos_token=tokenizer.eos_token, **{"max_length": None} | more)
    data = Dataset.from_list(rows)
    own = copy.deepcopy(tokenizer)
    trainer = SFTTrainer(load("tiny")[0], args, train_dataset=data, processing_class=own)
    return trainer.train_dataset, trainer.data_collator


def assert_equal_to_trl(many):
    rows = [dict(messages=m) for m in many]
    split = [dict(prompt=m[:-1], completion=m[-1:]) for m in many]
    ways = {
        "assistant": (rows, dict(assistant_only_loss=True)),
        "completion": (split, dict(completion_only_loss=True)),
        "all": (rows, {}),
    }
    for mode, (given_rows, more) in ways.items():
        theirs, ours = by_trl(given_rows, **more)[0], encode_rows(TINY, rows, mode)
        assert len(theirs) == len(ours)
        for i, row in enumerate(ours):
            assert theirs[i]["input_ids"] == row["input_ids"], (mode, i, many[i])
            assert theirs[i]["labels"] == row["labels"], (mode, i, many[i])


@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(st.lists(talks().filter(lambda m: not typed(TINY, m)), min_size=20, max_size=20))
def test_labels_are_trls(many):
    assert_equal_to_trl(many)


def real_talks(folder, name, n=400):
    "Up to `n` conversations of a real file that end with an answer and hold no special token."
    rows = [record.row["messages"] for record in scan(folder / name) if record.row]
    rows = [m for m in rows if m[-1]["role"] == "assistant" and not typed(TINY, m)]
    return random.Random(0).sample(rows, min(n, len(rows)))


@pytest.mark.parametrize("name", REAL)
def test_labels_are_trls_on_real_rows(real_data, name):
    many = real_talks(real_data, name)
    assert len(many) == 400
    assert_equal_to_trl(many)


def as_row(pairs):  # of (id, whether it is learned)
    labels = [i if learned else IGNORE for i, learned in pairs]
    return dict(input_ids=[i for i, _ in pairs], labels=labels)


pairs = st.tuples(st.integers(0, 50), st.booleans())
a_row = st.lists(pairs, min_size=1, max_size=9).map(as_row)
rows_of_ids = st.lists(a_row, min_size=1, max_size=5)


@given(rows_of_ids)
def test_batches_are_trls(rows):
    ours, theirs = collate(rows, 99), TRLCollator(99)(rows)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype


@given(rows_of_ids, st.integers(1, 9), st.sampled_from(["drop", "cut", "prompt"]))
def test_no_row_gets_lost_uncounted(rows, limit, how):
    kept, fate = truncate(rows, limit, how)
    assert sum(fate.values()) == len(rows) and len(kept) == fate["whole"] + fate["shortened"]
    assert all(len(row["input_ids"]) == len(row["labels"]) <= limit for row in kept)
    short = [row for row in rows if len(row["input_ids"]) <= limit]
    assert [row for row in kept if row in rows] == short  # untouched, in their order
    assert how != "drop" or fate["shortened"] == 0


def test_what_truncation_leaves():
    ids, labels = list(range(10)), [IGNORE] * 6 + [6, 7, 8] + [IGNORE]
    row = dict(input_ids=ids, labels=labels)

    def kept(max_length, how):
        return truncate([row], max_length, how)[0]

    def dropped(max_length, how):
        return truncate([row], max_length, how)[1]["dropped"]

    assert truncate([row], 10, "drop") == ([row], dict(whole=1, shortened=0, dropped=0))
    assert truncate([row], 9, "drop") == ([], dict(whole=0, shortened=0, dropped=1))
    assert kept(8, "cut") == [dict(input_ids=ids[:8], labels=labels[:8])]  # 8, the stop, is lost
    assert dropped(6, "cut") == 1  # nothing left to learn
    assert kept(5, "prompt") == [dict(input_ids=ids[5:], labels=labels[5:])]
    assert dropped(4, "prompt") == 1  # an answer to nothing: no token comes before it
    assert dropped(3, "prompt") == 1


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("how, limit, more", [
    ("cut", 24, {}), ("cut", 48, {}), ("prompt", 40, dict(truncation_mode="keep_end"))])
def test_truncation_is_trls(how, limit, more):
    theirs = by_trl(ROWS, assistant_only_loss=True, max_length=limit, **more)[0]
    ours, fate = truncate(MANY, limit, how)
    assert fate["shortened"] > 0
    assert theirs["input_ids"][:] == [row["input_ids"] for row in ours]
    assert theirs["labels"][:] == [row["labels"] for row in ours]


def test_trl_cuts_at_1024_tokens_unless_told_otherwise():
    rows = rows_of(say("Sing.", "la " * 1200), say("la " * 1200, "Often."))
    [kept] = by_trl(rows, assistant_only_loss=True, max_length=SFTConfig.max_length)[0]
    assert SFTConfig.max_length == len(kept["labels"]) == 1024
    assert TINY.eos_token_id not in kept["labels"]


def thinking_tokenizer():
    tokenizer = copy.deepcopy(TINY)
    tokenizer.chat_template = qwen3_training_chat_template
    return tokenizer


def talk_with_tool():
    call = dict(function=dict(name="weather", arguments=dict(city="Lima")))
    return [
        dict(role="user", content="Is it warm?"),
        dict(role="assistant", content="", reasoning_content="Look it up.", tool_calls=[call]),
        dict(role="tool", content="24 degrees"),
        dict(role="assistant", content="Yes.", reasoning_content="24 is warm.")]


def test_calls_and_thoughts_are_learned_and_results_are_not():
    tokenizer, messages = thinking_tokenizer(), talk_with_tool()
    called, answered = learned_text(tokenizer, encode(tokenizer, messages))
    assert called.startswith("<think>\nLook it up.") and '"city": "Lima"' in called
    assert answered == "<think>\n24 is warm.\n</think>\n\nYes.<|im_end|>\n"
    [everything_after] = learned_text(tokenizer, encode(tokenizer, messages, "completion"))
    assert "24 degrees" in everything_after
    [no_thought] = learned_text(tokenizer, encode(tokenizer, say("Hi", "Ho")))
    assert no_thought == "<think>\n\n</think>\n\nHo<|im_end|>\n"


def test_trl_learns_of_tools_what_we_say():
    "Of a completion with several messages it learns the tool's results, too."
    tokenizer, messages = thinking_tokenizer(), talk_with_tool()
    split = [dict(prompt=messages[:1], completion=messages[1:])]
    for mode, (rows, more) in {"assistant": (rows_of(messages), dict(assistant_only_loss=True)),
                               "completion": (split, {})}.items():
        [theirs] = by_trl(rows, tokenizer, **more)[0]
        assert theirs["labels"] == encode(tokenizer, messages, mode)["labels"]


def test_todays_collator_takes_no_labels():
    row = encode(TINY, say("Hi", "Ho"))
    made = DataCollatorForLanguageModeling(TINY, mlm=False)([row])
    assert made["labels"][0].tolist() == row["input_ids"] != row["labels"]
    assert not hasattr(trl, "DataCollatorForCompletionOnlyLM")


def rows_of(*many):
    return [dict(messages=messages) for messages in many]


@pytest.mark.parametrize("call, says", [
    (lambda: encode(TINY, say("Hi", "Ho"), "answers"),
     "no mode 'answers'.*assistant, last, completion, all"),
    (lambda: encode(TINY, say("Hi")), "no turn is the assistant's"),
    (lambda: encode(TINY, say("Hi", "Ho", "And?"), "completion"),
     "nobody answers the last question"),
    (lambda: encode_rows(TINY, rows_of(say("Hi", "Ho"), say("Hi"))),
     "^row 2: .*no turn is the assistant's"),
    (lambda: encode_rows(TINY, rows_of(say(None))),
     r"^row 1: messages\[0\].content is not a string"),
    (lambda: collate([dict(input_ids=[1], labels=[1])], None), "pad_token"),
    (lambda: truncate([], 5, "middle"), "no way to truncate 'middle': .*drop, cut, prompt"),
    (lambda: audit_labels([], TINY), "no batches"),
    (lambda: audit_labels([dict(input_ids=[[1]])], TINY), "batch 0 has no labels"),
    (lambda: audit_labels([dict(labels=[[1]])], TINY), "batch 0 has no input_ids"),
    (lambda: audit_labels([dict(input_ids=[[1, 2]], labels=[[1]])], TINY),
     "batch 0: .*not equally long"),
])
def test_what_cannot_be_used_is_told(call, says):
    with pytest.raises(MaskError, match=says):
        call()


ROWS = [as_messages(e) for e in examples("train", 24)]
SYSTEM = dict(role="system", content="Be brief.")
for i in range(0, 24, 6):  # some with a system turn and three answers
    ROWS[i] = dict(messages=[SYSTEM, *(m for row in ROWS[i:i + 3] for m in row["messages"])])
MANY = [encode(TINY, row["messages"]) for row in ROWS]


def left(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    return DataCollatorForSeq2Seq(tokenizer)


def ids_only(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return lambda rows: collator([dict(input_ids=row["input_ids"]) for row in rows])


COLLATORS = {  # name -> from a tokenizer to a collator
    "collate": lambda t: lambda rows: collate(rows, t.pad_token_id),
    "TRL": lambda t: TRLCollator(t.pad_token_id),
    "TRL, padding_free": lambda t: TRLCollator(t.pad_token_id, padding_free=True),
    "collate_packed": lambda t: collate_packed,
    "Flattening": lambda t: DataCollatorWithFlattening(return_position_ids=True),
    "Seq2Seq": DataCollatorForSeq2Seq,
    "Seq2Seq, left": left,
    "LanguageModeling": ids_only,
}


def batched(collator, rows=MANY, size=8):
    rows = [dict(row) for row in rows]
    return [collator(rows[i:i + size]) for i in range(0, len(rows), size)]


def ours(rows=MANY, tokenizer=TINY):
    "Batches made by `collate`."
    return batched(COLLATORS["collate"](tokenizer), rows)


def test_the_audit_names_every_fault_in_every_collator_and_nothing_else():
    table = mutation_table(TINY, ROWS, COLLATORS)
    print("\n" + table.to_string())
    assert list(table.loc["(no fault)"]) == ["nothing named"] * 7 + ["everything learned"]
    faults = table.drop("(no fault)")
    assert faults.isin(["named", "named below", "-"]).all(axis=None)
    # where every fault is possible, every one is named as a cause
    of_packed = ["a mask of ones over packed rows", "position_ids run on"]
    padded, packed = ["collate", "TRL", "Seq2Seq"], ["TRL, padding_free", "collate_packed"]
    assert (faults.drop(of_packed)[padded] == "named").all(axis=None)
    assert (faults.loc[of_packed, packed] == "named").all(axis=None)
    made = (*ROW_FAULTS.values(), *LIST_FAULTS.values(), *BATCH_FAULTS.values())
    without_rows = {"no answer found", "not everything learned"}  # test_label_audit.py
    # no fault in the list that nobody makes
    assert {cause for cause, _ in made} | without_rows == set(LABEL_FAULTS)


def test_a_mutation_table_of_an_audit_that_sees_nothing_says_so(monkeypatch):
    "The control: with one check taken out, its faults are told as missed."
    monkeypatch.setattr("sftlab.audit.labels._check_ends", lambda *_: None)
    table = mutation_table(TINY, ROWS[:8], {"collate": COLLATORS["collate"]})["collate"]
    assert table["the stop token is masked"] == "missed: nothing"
    assert table["headers are learned"] == "named"


def test_what_follows_from_a_fault_is_a_fault():
    follows = {fault for about in LABEL_FAULTS.values() for fault in about.follows}
    assert follows and follows <= set(LABEL_FAULTS)


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("mode", ["assistant", "last", "completion"])
def test_sound_batches_have_no_fault(template, mode):
    tokenizer = TINY if template is None else TOKENIZERS[f"tiny, {template}"]
    batches = ours(encode_rows(tokenizer, ROWS, mode), tokenizer)
    for more in (dict(rows=ROWS), dict(template=template or TINY.chat_template), {}):
        audit_labels(batches, tokenizer, **more).assert_ok()


def test_trls_own_batches_have_no_fault():
    split = [dict(prompt=row["messages"][:-1], completion=row["messages"][-1:]) for row in ROWS]
    packed = dict(assistant_only_loss=True, packing=True, max_length=256)
    for rows, more in ((ROWS, dict(assistant_only_loss=True)),
                       (split, dict(completion_only_loss=True)), (ROWS, packed)):
        data, collator = by_trl(rows, **more)
        report = audit_labels(batched(collator, data), TINY, ROWS)
        figures = report.figures  # packed ones too are taken apart
        assert figures["told"] == figures["conversations"] == len(ROWS)
        report.assert_ok()


def test_a_template_that_learns_more_after_its_stop_token_has_no_fault():
    "Qwen3's, as TRL trains it: the stop token, then a line end that is learned too."
    tokenizer = thinking_tokenizer()
    batches = ours(encode_rows(tokenizer, ROWS))
    for more in (dict(rows=ROWS), dict(template=tokenizer.chat_template), {}):
        report = audit_labels(batches, tokenizer, **more)
        report.assert_ok()
        assert report.stop == tokenizer.convert_tokens_to_ids("<|im_end|>")
    for batch in batches:
        batch["labels"].masked_fill_(batch["labels"] == report.stop, IGNORE)
    for more in (dict(rows=ROWS), dict(template=tokenizer.chat_template)):
        causes = audit_labels(batches, tokenizer, **more).causes
        assert list(causes) == ["stop token not learned"]


@pytest.mark.parametrize("name", REAL)
def test_real_rows_have_no_fault(real_data, name):
    rows = rows_of(*real_talks(real_data, name, 100))
    batches = ours(encode_rows(TINY, rows))
    for more in (dict(rows=rows), dict(template="chatml"), {}):
        audit_labels(batches, TINY, **more).assert_ok()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(talks(), min_size=1, max_size=6),
       st.sampled_from(["collate", "TRL", "TRL, padding_free", "collate_packed", "Seq2Seq, left"]))
def test_no_conversation_makes_the_audit_cry(many, name):
    rows = rows_of(*many)
    batches = batched(COLLATORS[name](TINY), encode_rows(TINY, rows), 3)
    audit_labels(batches, TINY, rows).assert_ok()


def padded_texts(messages, side="right"):
    "Conversations as text, padded; labels are the ids, but not of padding."
    texts = [TINY.apply_chat_template(m, tokenize=False) for m in messages]
    batch = dict(TINY(texts, padding=True, padding_side=side, return_tensors="pt"))
    return batch | dict(labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def test_the_ways_of_many_tutorials_are_named():
    pair = [say("What is the capital of Peru?", "Lima."), say("Say cat.", "Cat is the word.")]
    copied = padded_texts(pair)
    copied["labels"] = copied["input_ids"].clone()
    assert list(audit_labels([copied], TINY, rows_of(*pair)).causes) == ["everything learned"]
    n = len(TINY.apply_chat_template(pair[0][:1], add_generation_prompt=True)["input_ids"])
    for side in ("right", "left"):
        cut = padded_texts(pair, side)
        cut["labels"][:, :n] = -100
        assert list(audit_labels([cut], TINY, rows_of(*pair)).causes) == ["one cut for all rows"]
    same = copy.deepcopy(TINY)
    same.pad_token = same.eos_token
    by_id = DataCollatorForLanguageModeling(same, mlm=False)(
        [dict(input_ids=encode(TINY, m)["input_ids"]) for m in pair])
    causes = audit_labels([by_id], same, rows_of(*pair)).causes
    assert set(causes) == {"everything learned", "pad is the stop token"}


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_one_bad_row_among_many_is_found_where_it_is(fault):
    cause, made = ROW_FAULTS[fault]
    cut = fault == "cut after 28 tokens"
    longest = max(range(len(ROWS)), key=lambda i: len(MANY[i]["input_ids"]))
    bad = longest if cut else 12  # with three answers and a system turn
    rows = list(MANY)
    rows[bad] = made(TINY, ROWS[bad]["messages"])
    given = ROWS
    if cut:
        kept = [i for i, row in enumerate(rows) if i == bad or len(row["input_ids"]) <= 28]
        rows, given = [rows[i] for i in kept], [ROWS[i] for i in kept]
        bad = next(i for i, row in enumerate(rows) if row not in MANY)
    causes = audit_labels(ours(rows), TINY, given).causes
    assert list(causes) == [cause]
    assert [(talk.batch, talk.row) for talk in causes[cause][0]] == [divmod(bad, 8)]


def test_without_rows_the_tokenizers_own_template_tells_prompts():
    batches = ours([encode(TINY, row["messages"], "all") for row in ROWS])
    for more in ({}, dict(template="chatml"), dict(rows=ROWS)):
        report = audit_labels(batches, TINY, **more)
        assert list(report.causes) == ["everything learned"] and report.learns == "everything"
    plain = copy.deepcopy(TINY)
    plain.chat_template = None
    report = audit_labels(batches, plain)
    assert not report.causes and "cannot be told" in repr(report) and report.learns is None


def test_batches_may_be_lists_or_arrays():
    batches = ours()
    as_lists = [{key: value.tolist() for key, value in batch.items()} for batch in batches]
    as_arrays = [{key: value.numpy() for key, value in batch.items()} for batch in batches]
    told = repr(audit_labels(batches, TINY, ROWS))
    assert repr(audit_labels(as_lists, TINY, ROWS)) == told
    assert repr(audit_labels(iter(as_arrays), TINY, ROWS)) == told


def test_an_auditor_keeps_nothing_of_the_batches_before():
    audit = label_auditor(TINY, ROWS)
    everything = ours([encode(TINY, row["messages"], "all") for row in ROWS])
    assert list(audit(everything).causes) == ["everything learned"]
    assert repr(audit(ours())) == repr(audit_labels(ours(), TINY, ROWS))
    audit(ours()).assert_ok()


def test_padding_without_attention_mask_is_known_by_its_token():
    batches = [{key: batch[key] for key in ("input_ids", "labels")} for batch in ours()]
    report = audit_labels(batches, TINY, ROWS)
    report.assert_ok()
    padding = sum((batch["input_ids"] == TINY.pad_token_id).sum().item() for batch in batches)
    assert report.figures["padding"] == padding > 0


def test_figures_are_counts():
    figures = audit_labels(batched(COLLATORS["TRL"](TINY)), TINY, ROWS).figures
    labels = [label for row in MANY for label in row["labels"]]
    assert figures["tokens"] == len(labels)
    assert figures["learned"] == sum(label != IGNORE for label in labels)
    assert (figures["batches"], figures["conversations"], figures["told"]) == (3, 24, 24)


def test_the_report_is_for_people():
    odd = say("<b>Hi</b>", "Ho")
    batch = collate([encode(TINY, odd, "all"), MANY[0]], TINY.pad_token_id)
    report = audit_labels([batch], TINY, [dict(messages=odd), ROWS[0]])
    says = ("everything learned: 1 conversations .batch 0 row 0.*\n"
            ".*To fix: Mask all but the answers.*\n"
            ".*What follows: prompt learned .1., header learned .1.")
    with pytest.raises(AssertionError, match=says):
        report.assert_ok()
    html = report._repr_html_()
    assert "<b>Hi" not in html and "&lt;b&gt;Hi" in html and "✗" in html
    assert "To fix" not in html and "to fix" in html
    assert "No fault" in audit_labels(ours(), TINY, ROWS)._repr_html_()


def test_labels_shown_are_whole():
    for row in MANY:
        html = labels_html(row["input_ids"], row["labels"], TINY)
        assert unescape(re.sub("<[^>]+>", "", html)) == TINY.decode(row["input_ids"])
