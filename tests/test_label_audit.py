"""The label audit: faults that it once missed or misnamed, and what it must not call one."""
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_masking import (
    COLLATORS, MANY, ROWS, TINY, TOKENIZERS, batched, by_trl, ours, rows_of, say, talk_with_tool,
    talks, thinking_tokenizer, typed)

from sftlab.audit.label_faults import BATCH_FAULTS, ROW_FAULTS
from sftlab.audit.labels import audit_labels
from sftlab.errors import MaskError
from sftlab.masking import IGNORE, collate, encode, encode_rows, truncate
from sftlab.packing import collate_packed, documents, pack_rows
from sftlab.templates import TEMPLATES, with_template
from sftlab.training import flatten_rows

BOTH = (dict(rows=ROWS), {})  # with rows, and by the tokenizer's template alone


def causes(batches, tokenizer=TINY, **more):
    return list(audit_labels(batches, tokenizer, **more).causes)


def changed(change, rows=MANY):
    "Batches of rows whose ids and labels are changed."
    return ours([dict(zip(("input_ids", "labels"), change(**row))) for row in rows])


# --- rows and answers that are gone

LONG = [row for row in ROWS if len(row["messages"]) > 3]  # a system turn and three answers


@pytest.mark.parametrize("limit", [40, 50, 60, 70, 80, 90])
def test_every_row_cut_so_that_whole_answers_are_gone(limit):
    kept, fate = truncate(encode_rows(TINY, LONG), limit, "cut")
    assert fate["shortened"] > 1
    for more in (dict(rows=LONG), {}):
        assert causes(ours(kept), **more) == ["cut off"]


def test_a_row_cut_behind_its_first_answer_is_told_by_the_rows_only():
    "A limit: by the template alone it is a conversation of one exchange."
    row = encode(TINY, LONG[0]["messages"])
    end = row["labels"].index(TINY.eos_token_id) + 2  # with the line end
    cut = ours([dict(input_ids=row["input_ids"][:end], labels=row["labels"][:end])])
    assert causes(cut, rows=LONG[:1]) == ["cut off"]
    assert causes(cut) == []


def test_beginnings_cut_off():
    batches = changed(lambda input_ids, labels: (input_ids[5:], labels[5:]))
    for more in BOTH:
        assert causes(batches, **more) == ["beginning cut off"]
    kept, fate = truncate(MANY, 40, "prompt")  # TRL's keep_end
    assert fate["shortened"] and causes(ours(kept), rows=ROWS) == ["beginning cut off"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "alpaca", "vicuna"])
def test_a_system_turn_dropped(name):
    tokenizer = TOKENIZERS[f"tiny, {name}"]
    less = [dict(messages=[m for m in row["messages"] if m["role"] != "system"]) for row in ROWS]
    report = audit_labels(ours(encode_rows(tokenizer, less), tokenizer), tokenizer, ROWS)
    assert list(report.causes) == ["system turn dropped"]
    assert len(report.causes["system turn dropped"][0]) == len(LONG)


def test_pieces_of_split_rows_are_told():
    packed, fate = pack_rows(encode_rows(TINY, LONG), 40, "split")
    assert fate["split"] == len(LONG)
    found = causes([collate_packed(packed)], rows=LONG)
    assert set(found) == {"beginning cut off", "cut off"}
    assert "beginning cut off" in causes([collate_packed(packed)])


def test_rows_doubled_and_missing():
    assert causes(ours(MANY + MANY[3:4]), rows=ROWS) == ["row twice"]
    assert causes(ours(MANY + MANY), rows=ROWS) == ["row twice"]
    equal = audit_labels(ours(MANY[:8] + MANY[:8]), TINY, ROWS[:8] + ROWS[:8])
    equal.assert_ok()
    assert "16 of 16 rows are in them" in repr(equal)
    assert causes(ours(MANY + MANY[:2]), rows=ROWS + ROWS[:3]) == ["row missing"]
    report = audit_labels(ours(MANY[:5] + MANY[6:]), TINY, ROWS)
    assert list(report.causes) == ["row missing"]
    assert "(rows[5])" in repr(report) and "23 of 24 rows are in them" in repr(report)
    with pytest.raises(AssertionError, match="row missing"):
        report.assert_ok()


def test_rows_that_a_limit_dropped():
    kept, fate = truncate(MANY, 40, "drop")
    assert fate["dropped"] > 1
    assert causes(ours(kept), rows=ROWS) == ["row missing"]
    data, collator = by_trl(ROWS, assistant_only_loss=True, max_length=34)
    found = audit_labels(batched(collator, data), TINY, ROWS).causes
    assert "cut off" in found


def test_a_part_of_an_epoch_is_no_fault():
    "A limit: rows that are not there may be in other batches."
    for batches in (ours()[:1], ours()[:2], ours()[1:], ours(MANY[:1])):
        report = audit_labels(batches, TINY, ROWS)
        report.assert_ok()
    assert "1 of 24 rows are in them" in repr(report)


# --- which answers are learned

def only(wanted):
    "Rows in which only some answers are learned: those of the given numbers."
    def change(input_ids, labels):
        number, kept = -1, []
        for before, label in zip([IGNORE, *labels], labels):
            number += label != IGNORE and before == IGNORE
            kept.append(label if number in wanted else IGNORE)
        return input_ids, kept
    return change


@pytest.mark.parametrize("wanted", [{0}, {1}, {0, 1}, {0, 2}])
def test_only_some_answers_learned(wanted):
    rows = [row for row, given in zip(MANY, ROWS) if given in LONG]
    batches = changed(only(wanted), rows)
    for more in (dict(rows=LONG), {}):
        assert causes(batches, **more) == ["answer not learned"]


def test_the_last_answers_in_one_row_and_all_in_the_others():
    rows = [row for row, given in zip(MANY, ROWS) if given in LONG]
    one = dict(zip(("input_ids", "labels"), only({2})(**rows[1])))
    mixed = audit_labels(ours([rows[0], one, *rows[2:]]), TINY, LONG)
    assert [talk.row for talk in mixed.causes["answer not learned"][0]] == [1]
    assert list(mixed.causes) == ["answer not learned"] and mixed.learns is None


@pytest.mark.parametrize("mode, says", [
    ("assistant", "every answer"), ("last", "the last answer of each"), ("all", "everything")])
def test_the_report_names_what_is_learned(mode, says):
    batches = ours(encode_rows(TINY, ROWS, mode))
    for more in BOTH:
        report = audit_labels(batches, TINY, **more)
        assert report.learns == says and f": {says};" in repr(report)
        assert list(report.causes) == ["everything learned"] * (mode == "all")


def test_everything_may_be_learned_on_purpose():
    whole = encode_rows(TINY, ROWS, "all")
    for name in ("collate", "TRL", "collate_packed", "Seq2Seq, left", "LanguageModeling"):
        for more in BOTH:
            batches = batched(COLLATORS[name](TINY), whole)
            report = audit_labels(batches, TINY, everything=True, **more)
            report.assert_ok()
            assert report.learns == "everything"
    for more in BOTH:
        mixed = ours(whole[:-1] + MANY[-1:])
        report = audit_labels(mixed, TINY, everything=True, **more)
        assert list(report.causes) == ["not everything learned"]
        assert [talk.row for talk in report.causes["not everything learned"][0]] == [7]
        cut = ours([dict(input_ids=row["input_ids"][:-3], labels=row["labels"][:-3])
                    for row in whole])
        assert causes(cut, everything=True, **more) in (["no stop token"], ["cut off"])


def test_answers_of_weight_0_need_not_be_learned():
    rows = copy.deepcopy(LONG)
    for i, row in enumerate(rows):
        row["messages"][(2, 4, 6, 6)[i]]["weight"] = 0
    batches = ours(encode_rows(TINY, rows))
    audit_labels(batches, TINY, rows).assert_ok()
    silent = rows_of(say("Hi", "Ho", "And?", "Yes."))
    silent[0]["messages"][3]["weight"] = 0
    audit_labels(ours(encode_rows(TINY, silent, "all")), TINY, silent, everything=True).assert_ok()


def test_a_tool_call_masked():
    tokenizer, messages = thinking_tokenizer(), talk_with_tool()
    row = encode(tokenizer, messages)
    audit_labels(ours([row], tokenizer), tokenizer, rows_of(messages)).assert_ok()
    text = [tokenizer.decode([i]) for i in row["input_ids"]]
    call = [i for i in range(len(text)) if "tool_call>" in "".join(text[:i + 1])]
    last = next(i for i in call if "</tool_call>" in "".join(text[call[0]:i + 1]))
    labels = list(row["labels"])
    for i in range(call[0], last + 1):
        labels[i] = IGNORE
    masked = ours([dict(row, labels=labels)], tokenizer)
    for more in (dict(rows=rows_of(messages)), {}):
        assert causes(masked, tokenizer, **more) == ["answer partly learned"]
    many = say("Hi", "Ho", "And?", "Yes.")
    whole = ours([encode(tokenizer, messages, "last"), encode(tokenizer, many)], tokenizer)
    assert causes(whole, tokenizer, rows=rows_of(messages, many)) == ["answer not learned"]


def test_a_mask_upside_down():
    _, made = ROW_FAULTS["questions are learned, not answers"]
    rows = [made(TINY, row["messages"]) for row in ROWS]
    turned = changed(lambda input_ids, labels: (
        input_ids, [i if label == IGNORE else IGNORE for i, label in zip(input_ids, labels)]))
    for more in BOTH:
        assert causes(ours(rows), **more) == ["mask upside down"]
        assert causes(turned, **more) == ["mask upside down"]


# --- ends

def test_a_stretch_without_a_stop_token_is_found_wherever_it_ends():
    "In the middle of a row, and where neither rows nor a template tell anything."
    plain = copy.deepcopy(TINY)
    plain.chat_template = None
    mute = ours([dict(row, labels=[IGNORE if i == TINY.eos_token_id else i
                                   for i in row["labels"]]) for row in MANY])
    assert causes(mute, plain) == ["stop token not learned"]
    ids, labels = encode(TINY, say("Hi", "Ho", "And?", "Yes.")).values()
    first = labels.index(TINY.eos_token_id)
    never = ours([dict(input_ids=ids[:first] + ids[first + 1:],
                       labels=labels[:first] + labels[first + 1:])])
    for tokenizer in (TINY, plain):
        assert causes(never, tokenizer) == ["no stop token"]


@pytest.mark.parametrize("extra", ["<|endoftext|>", "<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("learned", [True, False])
def test_an_end_token_too_many(extra, learned):
    extra = TINY.convert_tokens_to_ids(extra)
    batches = changed(lambda input_ids, labels: (
        [*input_ids, extra], [*labels, extra if learned else IGNORE]))
    for more in BOTH:
        assert causes(batches, **more) == ["extra end token"]


# --- the mask and the positions

def test_zeros_of_the_mask_over_text():
    for columns in (slice(0, 5), slice(4, 6), slice(0, None)):
        batches = ours()
        batches[1]["attention_mask"][2, columns] = 0
        for more in BOTH:
            assert causes(batches, **more) == ["text hidden"], columns
    batches = ours()
    for batch in batches: # over the last token of each row
        for mask in batch["attention_mask"]:
            mask[mask.sum() - 1] = 0
    assert causes(batches, rows=ROWS) == ["text hidden"]


@pytest.mark.parametrize("name", ["collate", "Seq2Seq, left", "LanguageModeling"])
def test_ones_of_the_mask_over_padding(name):
    batches = batched(COLLATORS[name](TINY))
    for batch in batches:
        batch["attention_mask"].fill_(1)
    for more in BOTH:
        found = set(causes(batches, **more))
        assert found - {"everything learned"} == {"padding shown"}


def test_ones_of_the_mask_over_packed_rows():
    batch = flatten_rows(MANY[:8])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for more in BOTH:
        assert causes([batch], **more) == ["rows joined"]
    number = (batch["position_ids"] == 0).cumsum(1)
    audit_labels([batch | dict(attention_mask=number)], TINY, ROWS).assert_ok()  # 1, 1, 2, 2, …
    square = torch.ones(1, 1, 3, 3)  # with a place for every two tokens: not looked at
    audit_labels([batch | dict(attention_mask=square)], TINY, ROWS).assert_ok()


def test_rows_in_one_and_nothing_says_where_they_begin():
    batch = flatten_rows(MANY[:8])
    batch.pop("position_ids")
    report = audit_labels([batch], TINY, ROWS)
    assert list(report.causes) == ["rows joined"] and len(report.talks) == 8


@pytest.mark.parametrize("wrong", ["zeros", "run on", "from 1", "backwards", "a place late"])
def test_wrong_position_ids(wrong):
    batch = flatten_rows(MANY[:8])
    right = batch["position_ids"]
    batch["position_ids"] = {
        "zeros": torch.zeros_like(right), "run on": torch.arange(right.shape[1])[None],
        "from 1": right + 1, "backwards": right.flip(1), "a place late": right.roll(1, 1)}[wrong]
    assert causes([batch], rows=ROWS) == ["wrong position_ids"]


def test_positions_may_be_counted_from_the_edge_or_from_the_text():
    batches = batched(COLLATORS["Seq2Seq, left"](TINY))
    for batch in batches:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(
            batch["input_ids"])
    audit_labels(batches, TINY, ROWS).assert_ok()
    for batch in batches:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    audit_labels(batches, TINY, ROWS).assert_ok()


def test_a_mask_of_another_length_is_refused():
    batch = dict(input_ids=[[1, 2]], labels=[[1, 2]], attention_mask=[[1]])
    with pytest.raises(MaskError, match="batch 0: attention_mask and input_ids are not equally"):
        audit_labels([batch], TINY)


# --- named rightly

def test_a_cut_is_counted_over_padding_only_where_padding_is():
    "Everything from each row's own first answer on is learned, and padding is on the right."
    def change(input_ids, labels):
        begin = next(i for i, label in enumerate(labels) if label != IGNORE)
        return input_ids, [IGNORE] * begin + input_ids[begin:]
    rows = [row for row, given in zip(MANY, ROWS) if given in LONG]
    for more in (dict(rows=LONG), {}):
        assert set(causes(changed(change, rows), **more)) == {"header learned", "prompt learned"}


@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca"])
def test_a_foreign_row(name):
    tokenizer, other = TOKENIZERS[f"tiny, {name}"], TOKENIZERS["tiny, vicuna"]
    question, answer = "What is the capital of Peru?", "Lima."
    foreign = encode(other, say(question, answer))
    rows = rows_of(say(question, answer), say(question, "It is Lima."))
    batch = collate([*encode_rows(tokenizer, rows), foreign], tokenizer.pad_token_id)
    assert causes([batch], tokenizer, rows=rows) == ["not one of the rows"]
    assert "one cut for all rows" not in causes([batch], tokenizer)


@pytest.mark.parametrize("step", [2, -2, 3, -3])
def test_labels_shifted_by_more_than_one(step):
    batches = ours()
    for batch in batches:
        batch["labels"] = batch["labels"].roll(step, 1)
    for more in BOTH:
        assert causes(batches, **more) == ["shifted labels"]


def test_plain_text_is_not_of_the_template():
    texts = [f"Question: {a}\nAnswer: {b}" for a, b in (("Hi", "Ho"), ("And?", "Yes."))]
    ids = TINY(texts)["input_ids"]
    batch = collate([dict(input_ids=i, labels=i) for i in ids], TINY.pad_token_id)
    report = audit_labels([batch], TINY)
    assert list(report.causes) == ["no answer found"]
    assert "no stop token (2)" in repr(report)


# faults that no template shows, or that need a system turn known
BY_ROWS = {"the system turn is left out", "a BOS too many", "position_ids run on",
           "a mask of ones over packed rows", "position_ids begin at 1"}


@pytest.mark.parametrize("fault", [f for f in (*ROW_FAULTS, *BATCH_FAULTS) if f not in BY_ROWS])
def test_the_template_alone_names_what_it_can(fault):
    tokenizer = copy.deepcopy(TINY)
    if fault in ROW_FAULTS:
        cause, made = ROW_FAULTS[fault]
        batches = ours([made(TINY, row["messages"]) for row in ROWS])
    else:
        cause, made = BATCH_FAULTS[fault]
        batches = ours(MANY, tokenizer)
        if fault.startswith("pad = eos"):
            tokenizer.pad_token = tokenizer.eos_token
            batches = ours(MANY, tokenizer)
        for batch in batches:
            batch["labels"] = made(batch, tokenizer.pad_token_id)
    # to it, the header of another turn is a prompt
    headers = ["header learned", "prompt learned"] if cause == "header learned" else [cause]
    assert sorted(causes(batches, tokenizer)) == headers


def test_what_is_to_fix_never_widens_the_mask_over_prompts():
    "With the template only: where prompts are learned, nothing is said of their ends."
    for fault in ("labels are the ids", "questions are learned",
                  "questions are learned, not answers", "headers are learned"):
        rows = [ROW_FAULTS[fault][1](TINY, row["messages"]) for row in ROWS]
        for name in ("collate", "TRL, padding_free", "Seq2Seq, left"):
            report = repr(audit_labels(batched(COLLATORS[name](TINY), rows), TINY))
            assert "Let the mask reach" not in report and "and learn it" not in report


# --- rows of prompt and completion

def test_rows_of_prompt_and_completion_are_read():
    rows = [dict(prompt=row["messages"][:-1], completion=row["messages"][-1:]) for row in ROWS]
    data, collator = by_trl(rows, completion_only_loss=True)
    report = audit_labels(batched(collator, data), TINY, rows)
    report.assert_ok()
    assert report.learns == "the last answer of each"
    audit_labels(ours(), TINY, ROWS[:12] + rows[12:]).assert_ok()
    for wrong in (dict(prompt="Hi"), dict(completion="Ho", prompt=None), dict(text="Hi"), {}):
        with pytest.raises(MaskError, match="^row 2: .*`sftlab.data.to_messages`$"):
            audit_labels(ours(), TINY, [ROWS[0], wrong])


# --- no false alarm

def packers(tokenizer):  # name -> rows of tokens to batches
    return {
        "collate_packed": lambda rows: [collate_packed(pack_rows(rows, 256)[0])],
        "packed, row by row": lambda rows: [collate_packed([r]) for r in pack_rows(rows, 256)[0]],
        "unpacked again": lambda rows: ours(
            [d for row in pack_rows(rows, 256)[0] for d in documents(row)], tokenizer),
        "flatten_rows": lambda rows: batched(flatten_rows, rows),
    }


@pytest.mark.parametrize("template, mode", [
    *((name, "assistant") for name in TEMPLATES), ("chatml", "last"), ("llama2", "completion")])
def test_sound_batches_of_every_collator_have_no_fault(template, mode):
    tokenizer = TOKENIZERS[f"tiny, {template}"]
    rows = encode_rows(tokenizer, ROWS, mode)
    made = {name: batched(make(tokenizer), rows) for name, make in COLLATORS.items()}
    made |= {name: make(rows) for name, make in packers(tokenizer).items()}
    made.pop("LanguageModeling")
    for name, batches in made.items():
        for more in (dict(rows=ROWS), dict(template=template), {}):
            report = audit_labels(batches, tokenizer, **more)
            assert not report.causes, (name, more.keys(), report)


@pytest.mark.parametrize("more", [dict(padding_free=True), dict(packing=True, max_length=256)],
                         ids=["padding_free", "packing"])
def test_trls_rows_without_padding_have_no_fault(more):
    data, collator = by_trl(ROWS, assistant_only_loss=True, **more)
    batches = batched(collator, data, 4)
    assert "position_ids" in batches[0] and "attention_mask" not in batches[0]
    for known in BOTH:
        report = audit_labels(batches, TINY, **known)
        report.assert_ok()
        assert report.figures["conversations"] == len(ROWS)


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.lists(talks(), min_size=1, max_size=6), st.sampled_from(sorted(TOKENIZERS)),
       st.sampled_from(["collate", "TRL, padding_free", "collate_packed", "Seq2Seq, left"]))
def test_no_conversation_makes_the_audit_cry_with_any_template(many, name, collator):
    tokenizer = TOKENIZERS[name]
    rows = rows_of(*many)
    if name != "tiny" and any(typed(tokenizer, m) for m in many):
        return
    batches = batched(COLLATORS[collator](tokenizer), encode_rows(tokenizer, rows), 3)
    audit_labels(batches, tokenizer, rows).assert_ok()
    audit_labels(batches, tokenizer).assert_ok()


def test_a_template_that_ends_with_the_pad_token_has_no_fault():
    "Its last token is text, and what comes after is padding; so with one that begins with it."
    tokenizer = copy.deepcopy(TINY)
    tokenizer.pad_token = "<|endoftext|>"
    at_end, at_begin = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    at_end.chat_template = TINY.chat_template + "<|endoftext|>"
    at_begin.chat_template = "<|endoftext|>" + TINY.chat_template
    for its in (at_end, at_begin):
        rows = encode_rows(its, ROWS)
        for name in ("collate", "Seq2Seq, left", "TRL, padding_free"):
            for more in BOTH:
                audit_labels(batched(COLLATORS[name](its), rows), its, **more).assert_ok()


def test_padding_with_another_token_has_no_fault():
    "As where no pad token is known, or the collator was made with another."
    for pad_id in (TINY.eos_token_id, 0, 7):
        batches = [collate(MANY[i:i + 8], pad_id) for i in range(0, 24, 8)]
        for more in BOTH:
            audit_labels(batches, TINY, **more).assert_ok()


def test_with_template_is_the_template_that_is_told_by_default():
    other = with_template(TINY, "llama3")
    audit_labels(ours(encode_rows(other, ROWS), other), other).assert_ok()
    assert "no answer found" in causes(ours(MANY), other)
