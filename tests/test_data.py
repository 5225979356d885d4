"Reading SFT files: nothing lost, nothing invented, and what cannot be read is named."
import json, subprocess, sys
import pytest
from hypothesis import given, settings, strategies as st
from sftlab.data import DataError, hold_out, read_messages, to_messages

# A text that says something: any characters (JSON escapes them all), but not blank.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
conversations = st.tuples(st.none() | texts, turns, st.none() | texts)

def as_messages(conversation):
    system, pairs, last = conversation # `last`: a question that stays unanswered
    messages = [dict(role="system", content=system)] if system else []
    for q, a in pairs: messages += [dict(role="user", content=q), dict(role="assistant", content=a)]
    return dict(messages=messages + ([dict(role="user", content=last)] if last else []))

def as_sharegpt(row, names):
    return dict(id="x", conversations=[{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in row["messages"]])

def write(path, rows, container, ascii):
    dump = lambda x: json.dumps(x, ensure_ascii=ascii)
    text = dump(rows) if container == "json" else "\n".join(map(dump, rows)) + "\n"
    path.write_bytes(text.encode("utf-8"))
    return path

containers = st.sampled_from(["json", "jsonl"])
def shared(tmp_path_factory): return tmp_path_factory.getbasetemp() / "file"

@settings(deadline=None)
@given(st.lists(conversations, min_size=1, max_size=5), containers, st.booleans())
def test_messages_come_back_as_they_were(tmp_path_factory, made, container, ascii):
    rows = [as_messages(c) for c in made]
    assert read_messages(write(shared(tmp_path_factory), rows, container, ascii)) == rows

@settings(deadline=None)
@given(st.lists(conversations, min_size=1, max_size=5), containers, st.sampled_from(["gpt", "chatgpt", "assistant"]))
def test_sharegpt_says_the_same(tmp_path_factory, made, container, name):
    rows = [as_messages(c) for c in made]
    file = [as_sharegpt(r, {"user": "human", "assistant": name}) for r in rows]
    assert read_messages(write(shared(tmp_path_factory), file, container, True)) == rows

@settings(deadline=None)
@given(st.lists(st.tuples(texts, st.none() | st.just("") | texts, texts), min_size=1, max_size=5), containers, st.booleans())
def test_alpaca_keeps_every_character(tmp_path_factory, made, container, ascii):
    file = [dict(instruction=i, input=x, output=o) for i, x, o in made]
    want = [dict(messages=[dict(role="user", content=f"{i}\n\n{x}" if x else i), dict(role="assistant", content=o)]) for i, x, o in made]
    assert read_messages(write(shared(tmp_path_factory), file, container, ascii)) == want

ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["messages", "role", "content", "instruction", "output", "conversations", "from", "value"]) | st.text(), x))

@settings(deadline=None)
@given(st.one_of(st.binary(), st.text().map(str.encode), ANY.map(json.dumps).map(str.encode)))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    path = shared(tmp_path_factory)
    path.write_bytes(content)
    try: rows = read_messages(path)
    except DataError as e: assert str(e).startswith(str(path))
    else: assert all({m["role"] for m in r["messages"]} >= {"user", "assistant"} for r in rows)

GOOD = '{"instruction": "Name a fruit.", "input": "", "output": "Apple"}'
def turn(role, content="x"): return {"role": role, "content": content}
def row(*roles): return json.dumps(dict(messages=[turn(r) for r in roles]))

REFUSED = { # content of the file -> what the message must say
    b'{"text": "Rain."}': ["row 1", "found the fields text", "accepted are", "instruction", "conversations", "messages"],
    b'{"text": "Rain."}\n{"text": "Snow."}': ["line 1", "found the fields text"],
    b'{"data": [%s]}' % GOOD.encode(): ["found the fields data"],
    b'{}': ["found the fields (none)"],
    b'[]': ["holds no rows"],
    b'': ["holds no rows"],
    b'\n \n': ["holds no rows"],
    b'[1]': ["row 1", "a number instead of an object"],
    b'["a"]': ["row 1", "a text instead of an object"],
    b'null': ["null instead of an object"],
    f'[{GOOD}, [{GOOD}]]': ["row 2", "a list instead of an object"],
    f'{GOOD}\n\n{{"instruction": "Hi"}}': ["line 3", "field 'output' is missing", "found: instruction", "take the row out"],
    f'[{GOOD}, {{"instruction": "Hi", "output": "  "}}]': ["row 2", "field 'output' is empty", "fill it in"],
    f'[{GOOD}, {{"instruction": "", "input": "Hi", "output": "Hi"}}]': ["row 2", "field 'instruction' is empty"],
    '[{"instruction": "Hi", "input": ["a"], "output": "Hi"}]': ["field 'input' is a list", "make it a text"],
    '[{"instruction": "Hi", "output": null}]': ["field 'output' is null"],
    '[{"instruction": "Hi", "output": true}]': ["field 'output' is true or false"],
    '[{"instruction": "Hi", "output": {"a": 1}}]': ["field 'output' is an object"],
    '[{"instruction": "Hi", "output": "\\ud83d"}]': ["field 'output' has half a character"],
    '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "robot", "value": "Hi"}]}': ["'conversations[1].from' is 'robot'", "human, gpt"],
    '{"conversations": [{"from": "human"}, {"from": "gpt", "value": "Hi"}]}': ["'conversations[0].value' is missing"],
    '{"conversations": [{"role": "user", "content": "Hi"}]}': ["'conversations[0].from' is missing", "role, content"],
    '{"conversations": "Hi"}': ["field 'conversations' is a text", "list of turns"],
    '{"conversations": ["Hi"]}': ["field 'conversations[0]' is a text", "from and value"],
    '{"conversations": []}': ["no turn by the assistant"],
    '{"messages": [{"role": "human", "content": "Hi"}]}': ["'messages[0].role' is 'human'", "system, user, assistant"],
    '{"messages": [{"role": ["user"], "content": "Hi"}]}': ["'messages[0].role' is a list"],
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}': ["'messages[0].content' is a list"],
    row("user"): ["no turn by the assistant", "nothing to learn"],
    row("system"): ["no turn by the assistant"],
    row("assistant", "user"): ["turn 1 is by assistant where user should speak"],
    row("user", "user", "assistant"): ["turn 2 is by user where assistant should speak"],
    row("system", "user", "user", "assistant"): ["turn 3 is by user where assistant should speak"],
    row("user", "assistant", "system"): ["turn 3 is by system where user should speak"],
    row("system", "system", "user", "assistant"): ["turn 2 is by system where user should speak"],
    f'{GOOD}\n{row("user", "assistant")}': ["line 2", "found the fields messages", "the rows before have 'instruction'"],
    '{"instruction": "Hi", "output": "Hi", "messages": []}': ["fields instruction and messages are both there"],
    '{"system": "Be rude.", "instruction": "Hi", "output": "Hi"}': ["field 'system'", "write the row as messages"],
    '{"history": [["a", "b"]], "instruction": "Hi", "output": "Hi"}': ["field 'history'"],
    '{"tools": "[]", "conversations": []}': ["field 'tools'"],
    f'[{GOOD}, {GOOD[:-5]}': ["line 1, column", "cut short"],
    f'{GOOD}\n{GOOD[:-5]}': ["line 2, column", "cut short"],
    f'[\n{GOOD},\n{GOOD}\n}}': ["line 4, column 1", "broken"],
    "instruction,output\nName a fruit.,Apple": ["line 1", "found 'instruction,output'", "not JSON"],
    b"\x1f\x8b\x08\x00": ["byte 2 is not UTF-8", "unpack"],
    GOOD.replace("Apple", "Äpfel").encode("latin-1"): ["is not UTF-8"],
    "[" * 100_000: ["JSON that no data set needs"],
    '[{"instruction": "Hi", "output": %s}]' % ("9" * 5000): ["JSON that no data set needs"],
}

@pytest.mark.parametrize("content", REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_reason(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as e: read_messages(path)
    said = str(e.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    for part in REFUSED[content]: assert part in said, said

@pytest.mark.parametrize("path, why", [(".", "Is a directory"), ("nothing_here.json", "No such file")])
def test_no_such_file(path, why):
    with pytest.raises(DataError, match=why): read_messages(path)

def test_the_first_problems_are_named_together(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join([GOOD] + 4 * ['{"instruction": "Hi", "output": ""}'] + [GOOD]))
    with pytest.raises(DataError) as e: read_messages(path, show=2)
    lines = str(e.value).split("\n")
    assert lines[0].endswith("4 of 6 rows cannot be used") and len(lines) == 4
    assert lines[1].startswith("  line 2: ") and lines[2].startswith("  line 3: ") and lines[3] == "  and 2 more"

def test_what_must_be_accepted(tmp_path):
    path = tmp_path / "file"
    want = [to_messages(json.loads(GOOD))]
    for content in (GOOD, f"[{GOOD}]", f"\n{GOOD}\n\n", json.dumps(json.loads(GOOD), indent=2), GOOD.replace('"input": "", ', ""),
                    GOOD.replace('"input": ""', '"input": null, "id": 7, "system": "", "history": []')):
        path.write_text(content)
        assert read_messages(path) == want, content
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n")
    assert read_messages(path) == want
    path.write_text(GOOD.replace("Apple", "A\u2028B"), encoding="utf-8")
    assert read_messages(path)[0]["messages"][1]["content"] == "A\u2028B"

@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0, 1), st.integers(0, 99))
def test_hold_out_keeps_all_rows_and_no_twins(numbers, fraction, seed):
    rows = [dict(messages=[turn("user", str(n)), turn("assistant", str(n))]) for n in numbers]
    if len(set(numbers)) < 2:
        with pytest.raises(DataError, match="two different rows"): hold_out(rows, fraction, seed)
        return
    train, held = hold_out(rows, fraction, seed)
    key = lambda r: r["messages"][0]["content"]
    assert train and held and sorted(map(key, train + held)) == sorted(map(str, numbers))
    assert not {key(r) for r in train} & {key(r) for r in held}
    assert (train, held) == hold_out(rows, fraction, seed)

def test_hold_out_takes_the_share_asked_for_and_heeds_the_seed():
    rows = [to_messages(dict(instruction=f"{n}", output="x")) for n in range(200)]
    train, held = hold_out(rows, 0.1)
    assert (len(train), len(held)) == (180, 20)
    assert hold_out(rows, 0.1, seed=1)[1] != held

def test_reading_imports_neither_torch_nor_trl():
    code = "import sys, sftlab.data; print(sorted({'torch', 'trl', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

REAL = {"alpaca_en_demo.json": 999, "alpaca_zh_demo.json": 1000, "sharegpt_dummy_conversation.json": 500}

@pytest.mark.parametrize("name", REAL)
def test_real_file(real_data, name):
    rows, file = read_messages(real_data / name), json.loads((real_data / name).read_text("utf-8"))
    assert len(rows) == len(file) == REAL[name]
    for row, raw in zip(rows, file): # by another road than the code's: every text of the file, in order, and nothing else
        if "output" in raw: want = ["\n\n".join(filter(None, [raw["instruction"], raw["input"]])), raw["output"]]
        else: want = [t["value"] for t in raw["conversations"]]
        assert [m["content"] for m in row["messages"]] == want
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(want) // 2)

@pytest.mark.parametrize("name", ["c4_demo.jsonl", "gsm8k_test.jsonl", "HumanEval.jsonl.gz"])
def test_real_file_of_another_kind(real_data, name):
    with pytest.raises(DataError, match="accepted are"): read_messages(real_data / name)
