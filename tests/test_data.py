"SFT files: nothing lost, nothing invented, what cannot be read is named; splits do not leak."

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from sftlab.audit.data import dataset_stats
from sftlab.audit.duplicates import near_duplicates, shingles
from sftlab.data import FORMATS, TASK_PHRASINGS, as_instructions, split_rows, to_messages
from sftlab.errors import DataError, MaskError, OutputError
from sftlab.files.formats import from_messages
from sftlab.files.rows import read_messages, read_rows, rejected_path, scan, to_dataset
from sftlab.files.writers import write_rows
from sftlab.guards.data import parse_arguments, parse_tools
from sftlab.guards.rows import check_message_rows, check_token_rows

# A text that says something, and holds none of the control characters that are refused.
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\r"), min_size=1
).filter(lambda t: t.strip() and "[" not in t)  # a cell that begins with [ may be a list
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)
fields = st.fixed_dictionaries(
    {},
    optional=dict(
        id=st.integers(-(2**31), 2**31),
        source=texts,
        weight=st.floats(allow_nan=False, allow_infinity=False, width=16),
    ),
)
containers = st.sampled_from([".json", ".jsonl", ".jsonl.gz"])


def talk(pairs, system=None, last=None):
    messages = [dict(role="system", content=system)] if system else []
    for question, answer in pairs:
        messages += [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return messages + ([dict(role="user", content=last)] if last else [])


calls = st.fixed_dictionaries(
    dict(name=texts, arguments=st.dictionaries(texts, texts | st.integers(0, 9), max_size=2))
)


@st.composite
def conversations(draw, tools=True):
    "A system text or none, one to four exchanges, some with tool calls or a last question."
    turns = talk(draw(pairs), draw(st.none() | texts))
    if tools and draw(st.booleans()):
        call = dict(
            role="assistant", tool_calls=[dict(type="function", function=draw(calls))]
        ) | draw(st.sampled_from([{}, {"content": ""}]))
        turns[-1:-1] = [call, dict(role="tool", content=draw(texts), name="weather")]
    if draw(st.booleans()):
        turns.append(dict(role="user", content=draw(texts)))
    return turns


def distinct(rows):
    "Rows as a file may hold them: no conversation twice."
    return list(
        {
            json.dumps(
                [
                    row.get(k)
                    for k in (
                        "instruction",
                        "input",
                        "output",
                        "system",
                        "history",
                        "conversations",
                        "prompt",
                        "completion",
                        "messages",
                        "tools",
                    )
                ],
                sort_keys=True,
            ): row
            for row in rows
        }.values()
    )


alpaca_rows = st.builds(
    lambda need, more, rest: need | more | rest,
    st.fixed_dictionaries(dict(instruction=texts, output=texts)),
    st.fixed_dictionaries(
        {},
        optional=dict(
            input=texts | st.just(""),
            system=texts | st.just(""),
            history=st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2),
        ),
    ),
    fields,
)
speakers = {
    "user": ["human", "user"],
    "assistant": ["gpt", "assistant", "chatgpt"],
    "tool": ["tool", "observation"],
    "system": ["system"],
}


@st.composite
def sharegpt_rows(draw):
    turns = [
        {
            "from": draw(st.sampled_from(speakers[t["role"]])),
            **({"value": t["content"]} if "content" in t else {}),
            **{k: v for k, v in t.items() if k not in ("role", "content")},
        }
        for t in draw(conversations())
    ]
    if turns[-1]["from"] in speakers["assistant"] and draw(st.booleans()):
        called = dict(value=json.dumps(draw(calls)))
        turns[-1:-1] = [{"from": "function_call"} | called, {"from": "observation"} | called]
    system = {"system": draw(texts)} if turns[0]["from"] != "system" and draw(st.booleans()) else {}
    return dict(conversations=turns) | system | draw(fields)


ROWS = dict(
    alpaca=alpaca_rows,
    sharegpt=sharegpt_rows(),
    messages=st.builds(lambda turns, rest: dict(messages=turns) | rest, conversations(), fields),
    prompt=st.builds(lambda q, a, rest: dict(prompt=q, completion=a) | rest, texts, texts, fields),
)


@pytest.mark.parametrize("format", ROWS)
def test_there_and_back_is_the_same_row(format):
    @given(ROWS[format])
    def check(row):
        assert from_messages(to_messages(row), format) == row

    check()


def called(**turn):
    "A row in which the assistant calls a tool, with some fields of its turn changed."
    call = dict(role="assistant", tool_calls=[dict(name="f")]) | turn
    turns = [dict(role="user", content="Hi"), call, dict(role="tool", content="x")]
    return dict(messages=turns + [dict(role="assistant", content="Done")])


RIGHT_CALLS = [
    [dict(name="f")],
    [dict(name="f", arguments={})],
    [dict(id="1", type="function", function=dict(name="f", arguments='{"a": 1}'))],
    [dict(function=dict(name="f", arguments={"a": [None, {"b": "c"}]})), dict(name="g")],
    [dict(function=dict(name="f", arguments="")), dict(name="g", arguments={})],
]


@pytest.mark.parametrize("calls", RIGHT_CALLS, ids=range(len(RIGHT_CALLS)))
def test_calls_that_can_be_learned(calls):
    row = called(tool_calls=calls)
    assert to_messages(row) == row


WRONG_CALLS = [
    ("text", "'messages[1].tool_calls' is a string"),
    (dict(name="f"), "'messages[1].tool_calls' is an object"),
    (["f"], "'messages[1].tool_calls[0]' is a string"),
    ([dict(arguments={})], "'messages[1].tool_calls[0]' has no name"),
    ([dict(name="f"), dict(function=dict(name=""))], "calls[1].function' has no name"),
    ([dict(function="f")], "'messages[1].tool_calls[0].function' is a string"),
    ([dict(name="f", arguments=[1])], "calls[0].arguments' is a list"),
    ([dict(name="f", arguments="Lima")], "calls[0].arguments' is a string that holds no JSON"),
    ([dict(name="f", arguments='"{}"')], "calls[0].arguments' is a string that holds a string"),
    ([dict(name="f", arguments='{"a": NaN}')], "arguments' is a string that holds no JSON"),
    ([dict(name="f", arguments={"a": float("nan")})], "tool_calls' holds NaN or Infinity"),
]


@pytest.mark.parametrize("calls, why", WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_calls_that_cannot_be_learned(calls, why):
    with pytest.raises(DataError) as e:
        to_messages(called(tool_calls=calls))
    assert why in str(e.value)


def test_only_the_assistant_calls():
    row = called()
    row["messages"][0]["tool_calls"] = [dict(name="f")]
    with pytest.raises(DataError, match="tool_calls' is in a turn by user: put it"):
        to_messages(row)
    row["messages"][0]["tool_calls"] = None
    assert to_messages(row) == row


def packed(value):
    "A ShareGPT row with a call in a turn by function_call."
    said = [("human", "Hi"), ("function_call", value), ("observation", "x"), ("gpt", "Done")]
    return dict(conversations=[{"from": name, "value": text} for name, text in said])


def test_a_turn_by_function_call_holds_a_call():
    call = dict(name="f", arguments=dict(a=1))
    for right in (call, [call, call], dict(name="f")):
        assert from_messages(to_messages(packed(json.dumps(right))), "sharegpt") == packed(
            json.dumps(right)
        )
    for wrong, why in (
        ("I call f.", "'conversations[1].value' is by function_call and holds no JSON"),
        ("", "'conversations[1].value' is null"),
        ('{"arguments": {}}', "'conversations[1].value[0]' has no name"),
        ('{"name": "f", "arguments": 1}', "'conversations[1].value[0].arguments' is a number"),
        ("5", "'conversations[1].value' is a number"),
    ):
        with pytest.raises(DataError) as e:
            to_messages(packed(wrong))
        assert why in str(e.value)


def text_parts(*texts):
    return [dict(type="text", text=text) for text in texts]


def test_parts_of_text_are_read_as_one_string():
    said = [turn("user", text_parts("What is ", "2 + 3?")), turn("assistant", text_parts("5"))]
    want = talk([("What is 2 + 3?", "5")])
    assert to_messages(dict(messages=said)) == dict(messages=want)
    assert to_messages(dict(prompt=said[:1], completion=said[1:])) == dict(messages=want)
    assert isinstance(said[0]["content"], list)  # the row itself is as it was
    filled = [part | dict(image=None, annotations=[]) for part in text_parts("What is 2 + 3?")]
    said[0] = turn("user", filled)  # as a table writes it
    assert to_messages(dict(messages=said)) == dict(messages=want)


@given(st.lists(texts, min_size=1, max_size=4))
def test_no_character_of_a_part_is_lost(some):
    row = dict(messages=[turn("user", text_parts(*some)), turn("assistant")])
    assert to_messages(row)["messages"][0]["content"] == "".join(some)


def test_parts_are_what_trl_makes_of_messages():
    from trl.data_utils import prepare_multimodal_messages

    said = talk([("a", "b"), ("c", "d")], system="e")
    assert to_messages(dict(messages=prepare_multimodal_messages(said)))["messages"] == said


def test_a_call_with_no_parts_says_nothing():
    assert to_messages(called(content=[]))["messages"][1]["content"] == ""


PART = dict(type="text", text="Hi")
WRONG_PARTS = [
    ([PART, dict(type="image_url")], "content[1]' is of the type 'image_url', and no text"),
    ([dict(type="thinking", thinking="Hm")], "content[0]' is of the type 'thinking', and no text"),
    ([dict(text="Hi")], "content[0]' is of the type 'None'"),
    ([PART | dict(text=5)], "content[0]' is of the type 'text', and no text"),
    (["Hi"], "content[0]' is a string: only parts of text can be read"),
    ([PART | dict(cache_control=dict(a=1))], "content[0]' has 'cache_control' next to its text"),
    ([PART | dict(text="a\0")], "content[0]' has the control character U+0000"),
    ([PART | dict(text=" ")], "content' is empty"),
    ([], "content' is empty"),
]


@pytest.mark.parametrize("parts, why", WRONG_PARTS, ids=range(len(WRONG_PARTS)))
def test_parts_that_are_no_text_are_refused_with_their_place(parts, why):
    with pytest.raises(DataError) as e:
        to_messages(dict(messages=[turn("user", parts), turn("assistant")]))
    assert why in str(e.value) and "messages[0]." in str(e.value)


def test_a_developer_is_the_system():
    said = talk([("a", "b")], system="c")
    new = [said[0] | dict(role="developer"), *said[1:]]
    assert to_messages(dict(messages=new)) == dict(messages=said)
    assert to_messages(dict(prompt=new[:2], completion=new[2:])) == dict(messages=said)
    with pytest.raises(DataError, match="turn 2 is a system message in the middle"):
        to_messages(dict(messages=[said[0], *new]))


def test_tools_are_a_list_or_json_of_one():
    tool = dict(name="f", parameters=dict(type="object"))
    whole = dict(type="function", function=tool)
    talk_of = lambda tools: dict(messages=talk([("a", "b")]), tools=tools)
    for right in (None, "", [], "[]", [tool], [whole], json.dumps([tool]), [dict(name="g"), whole]):
        assert to_messages(talk_of(right)) == talk_of(right)
    for wrong, why in (
        ("text", "field 'tools' is a string that holds no JSON"),
        (tool, "field 'tools' is an object"),
        (5, "field 'tools' is a number"),
        ("5", "field 'tools' is a number"),
        ([json.dumps(tool)], "field 'tools[0]' is a string"),
        ([dict(type="function", function=dict(name=None))], "'tools[0].function' has no name"),
        ([dict(name="f", parameters="none")], "'tools[0].parameters' is a string"),
        ('{"a": 1', "field 'tools' is a string that holds no JSON"),
    ):
        with pytest.raises(DataError) as e:
            to_messages(talk_of(wrong))
        assert why in str(e.value)


def test_tools_and_arguments_in_one_form():
    tool = dict(name="f", parameters=dict(type="object"))
    whole = [dict(type="function", function=tool)]
    for tools in (whole, [tool], json.dumps([tool]), json.dumps(whole), [tool | {"type": "x"}]):
        assert parse_tools(tools) == whole
    assert [parse_tools(nothing) for nothing in (None, "", " ", [], "[]")] == [None] * 5
    for arguments in ({"a": None}, '{"a": null}'):
        assert parse_arguments(arguments) == {"a": None}
    assert [parse_arguments(nothing) for nothing in (None, "", {})] == [{}] * 3
    for parse in (parse_tools, parse_arguments):
        with pytest.raises(DataError, match="is a string that holds no JSON"):
            parse("text")


@pytest.mark.parametrize("weight", [0, 1, None, 0.0])
def test_a_weight_that_is_kept(weight):
    row = dict(messages=[turn("user"), turn("assistant") | dict(weight=weight), turn("user"),
                         turn("assistant")])  # fmt: skip
    assert to_messages(row) == row


@pytest.mark.parametrize("weight", [2, -1, 0.5, "1", [1], float("nan")])
def test_a_weight_that_is_neither_0_nor_1(weight):
    row = dict(messages=[turn("user"), turn("assistant") | dict(weight=weight)])
    with pytest.raises(DataError, match=r"'messages\[1\].weight' is .*: write 1 .learned. or 0"):
        to_messages(row)


def test_a_row_in_which_nothing_is_to_be_learned():
    silent = turn("assistant") | dict(weight=0)
    with pytest.raises(DataError, match="weight 0 in every turn by the assistant"):
        to_messages(dict(messages=[turn("user"), silent, turn("user"), silent]))


def write(path, rows, container, ascii):
    dump = lambda x: json.dumps(x, ensure_ascii=ascii)
    text = dump(rows) if container == ".json" else "\n".join(map(dump, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if container.endswith("gz") else text.encode())
    return path


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file"


@pytest.mark.parametrize("format", ROWS)
def test_every_row_of_a_file_comes_back(there, format):
    @given(st.lists(ROWS[format], min_size=1, max_size=5), containers, st.booleans())
    def check(made, container, ascii):
        rows = distinct(made)
        kept = list(scan(write(there, rows, container, ascii)))
        assert [
            r.problems for r in kept if r.row is None and "is the same as" not in r.problems[0].what
        ] == []  # two rows that say the same in different words of the format
        assert [from_messages(r.row, format) for r in kept if r.row] == [
            r.source for r in kept if r.row
        ] and [r.source for r in kept] == rows

    check()


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".csv.gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(tmp_path_factory, format, ending):
    folder = tmp_path_factory.mktemp("written")

    @settings(max_examples=25)
    @given(
        st.lists(st.tuples(texts, texts), min_size=1, max_size=5, unique=True),
        st.integers(0, 10**9),
    )
    def check(made, n):
        rows = [dict(messages=talk([pair]), source=str(i)) for i, pair in enumerate(made)]
        path = folder / f"{n}{ending}"
        path.unlink(missing_ok=True)
        write_rows(rows, path, format)
        assert read_rows(path) == rows

    check()


@given(
    st.lists(
        st.builds(lambda turns, rest: dict(messages=turns) | rest, conversations(), fields),
        min_size=1,
        max_size=5,
    )
)
def test_a_dataset_holds_what_the_rows_hold(rows):
    names = {name for row in rows for name in row}
    assert list(to_dataset(rows)) == [{name: row.get(name) for name in names} for row in rows]


def test_a_dataset_of_plain_turns_has_plain_types():
    dataset = to_dataset(
        [
            dict(messages=talk([("a", "b")]), tags=["x"], n=1),
            dict(messages=talk([("c", "d")]), tags=[1, "y"], n=None),
        ]
    )
    assert (
        str(dataset.features["messages"]).startswith("List({")
        and dataset["tags"][1] == [1, "y"]
        and dataset["n"][1] is None
    )
    with pytest.raises(DataError, match="'id' holds values of several types .int, str."):
        to_dataset([dict(messages=talk([("a", "b")]), id=i) for i in (1, "1")])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: (
        st.lists(x)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "instruction",
                    "output",
                    "conversations",
                    "from",
                    "value",
                    "prompt",
                    "completion",
                    "history",
                    "system",
                ]
            )
            | st.text(),
            x,
        )
    ),
)


@given(
    st.one_of(
        st.binary(),
        st.text().map(str.encode),
        ANY.map(json.dumps).map(str.encode),
        st.lists(ANY.map(json.dumps)).map("\n".join).map(str.encode),
        st.binary().map(lambda b: b"PAR1" + b),
        st.binary().map(lambda b: b"\x1f\x8b" + b),
    )
)
def test_any_file_is_read_or_refused(there, content):
    there.write_bytes(content)
    try:
        rows = [r.row for r in scan(there) if r.row]
    except DataError as e:
        assert str(e).startswith(str(there))
    else:
        assert all({m["role"] for m in r["messages"]} >= {"assistant"} for r in rows)


GOOD = '{"instruction": "Name a fruit.", "input": "", "output": "Apple"}'
OTHER = '{"instruction": "Name a tool.", "output": "Hammer"}'


def turn(role, content="x"):
    return {"role": role, "content": content}


def row(*roles):
    return json.dumps(dict(messages=[turn(r) for r in roles]))


USER, ASSISTANT = (json.dumps(turn(role, "Hi")) for role in ("user", "assistant"))
CALL = '{"role": "assistant", "content": null, "tool_calls": []}'
REFUSED = (
    {  # content of the file -> what the message must say
        b'{"text": "Rain."}': [
            "line 1",
            "found the fields text",
            "accepted are",
            "instruction",
            "conversations",
            "messages",
            "prompt",
        ],
        b'{"text": "Rain."}\n{"text": "Snow."}': ["line 1", "found the fields text"],
        b'{"data": [%s]}' % GOOD.encode(): ["found the fields data"],
        b"{}": ["found the fields (none)"],
        b"[]": ["holds no rows"],
        b"": ["holds no rows"],
        b"\n \n": ["holds no rows"],
        b"[1]": ["row 1", "a number instead of an object"],
        b'["a"]': ["row 1", "a string instead of an object"],
        b"null": ["neither JSON nor the head of a table"],
        f"[{GOOD}, [{OTHER}]]": ["row 2", "a list instead of an object"],
        f'{GOOD}\n\n{{"instruction": "Hi"}}': [
            "line 3",
            "field 'output' is missing",
            "found: instruction",
            "take the row out",
        ],
        f'[{GOOD}, {{"instruction": "Hi", "output": "  "}}]': [
            "row 2",
            "field 'output' is empty",
            "fill it in",
        ],
        f'[{GOOD}, {{"instruction": "", "input": "Hi", "output": ""}}]': [
            "row 2",
            "field 'instruction' is empty",
            "field 'output' is empty",
        ],
        '[{"instruction": "Hi", "input": ["a"], "output": "Hi"}]': [
            "field 'input' is a list",
            "make it a string",
        ],
        '[{"instruction": "Hi", "output": null}]': ["field 'output' is null"],
        '[{"instruction": "Hi", "output": true}]': ["field 'output' is true or false"],
        '[{"instruction": "Hi", "output": {"a": 1}}]': ["field 'output' is an object"],
        '[{"instruction": "Hi", "output": "\\ud83d"}]': ["field 'output' has half a character"],
        '[{"instruction": "Hi", "output": "a\\u0007"}]': [
            "control character U+0007 (character 2)",
            "take it out",
        ],
        '[{"instruction": "Hi", "history": [["a"]], "output": "b"}]': [
            "field 'history' is not a list of pairs"
        ],
        '[{"instruction": "Hi", "history": [["a", ""]], "output": "b"}]': [
            "field 'history[0][1]' is empty"
        ],
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "robot", "value": "Hi"}]}': [
            "'conversations[1].from' is 'robot'",
            "human, gpt",
        ],
        '{"conversations": [{"from": "human"}, {"from": "gpt", "value": "Hi"}]}': [
            "'conversations[0].value' is missing"
        ],
        '{"conversations": [{"role": "user", "content": "Hi"}]}': [
            "'conversations[0].from' is missing",
            "role, content",
        ],
        '{"conversations": "Hi"}': ["field 'conversations' is a string", "list of turns"],
        '{"conversations": ["Hi"]}': ["field 'conversations[0]' is a string", "from and value"],
        '{"conversations": []}': ["no turn by the assistant"],
        '{"messages": [{"role": "human", "content": "Hi"}]}': [
            "'messages[0].role' is 'human'",
            "system, user, assistant, tool",
        ],
        '{"messages": [{"role": ["user"], "content": "Hi"}]}': ["'messages[0].role' is a list"],
        '{"messages": [{"role": "user", "content": [{"type": "image", "url": "cat.png"}]}]}': [
            "'messages[0].content[0]' is of the type 'image', and no text",
            "only parts of text can be read",
        ],
        '{"messages": [' + USER + ", " + CALL + "]}": ["'messages[1].content' is null"],
        '{"prompt": "Hi"}': ["field 'completion' is missing"],
        '{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hi"}': [
            "field 'completion' is a string",
            "list of turns",
        ],
        row("user"): ["no turn by the assistant", "nothing to learn"],
        row("system"): ["no turn by the assistant"],
        row("assistant", "user"): ["turn 1 is by assistant where user should speak"],
        row("user", "user", "assistant"): [
            "turn 2 is by user, as is the one before",
            "missing between",
        ],
        row("user", "assistant", "assistant"): ["turn 3 is by assistant, as is the one before"],
        row("system", "user", "user", "assistant"): ["turn 3 is by user, as is the one before"],
        row("user", "assistant", "system"): [
            "turn 3 is a system message in the middle",
            "move it to the start",
        ],
        row("system", "system", "user", "assistant"): ["turn 2 is a system message in the middle"],
        row("user", "tool", "assistant"): ["turn 2 is by tool where assistant should speak"],
        row("user", "assistant", "tool", "user", "assistant"): [
            "turn 4 is by user where assistant should speak"
        ],
        f"{GOOD}\n{row('user', 'assistant')}": [
            "line 2",
            "has the field 'messages', but the rows before have 'instruction'",
            "a file holds one format",
        ],
        '{"instruction": "Hi", "output": "Hi", "messages": []}': [
            "fields instruction and messages are both there",
            "keep the one to be learned from",
            "remove_columns",
        ],
        '{"system": "Be rude.", "messages": [' + USER + ", " + ASSISTANT + "]}": [
            "field 'system' is part of the conversation, but is outside of it",
            "make turns of it",
        ],
        f"{GOOD}\n{OTHER}\n{GOOD}": ["line 3", "is the same as line 1"],
        f"[{GOOD}, {OTHER[:-5]}": ["row 2", "line 1, column", "cut short"],
        f"{GOOD}\n{OTHER[:-5]}": ["line 2: column", "cut short"],
        f"[\n{GOOD},\n{OTHER}\n}}": ["row 2", "line 4, column 1", "broken"],
        f"[{GOOD}] {OTHER}": ["row 2", "Extra data"],
        f"[{GOOD},]": ["row 2", "broken"],
        "instruction,answer\nName a fruit.,Apple": [
            "line 2: field 'output' is missing (found: instruction, answer)"
        ],
        "question,answer\nName a fruit.,Apple": [
            "line 1: found 'question,answer'",
            "neither JSON nor",
        ],
        "instruction,output\nName a fruit.,Apple,red": [
            "line 2",
            "has 3 cells where the head has 2",
            "quotes",
        ],
        'instruction,output\nA,B\n"Name a fruit.,Apple': ["line 3", "the table is broken here"],
        "instruction,output\nName a fruit.,": ["line 2: field 'output' is empty"],
        b"\x1f\x8b\x08\x00": ["cannot be read"],
        "text;instruction;output\nA;B": ["has 2 cells where the head has 3"],
        "instruction,instruction,output\nA,B,C": ["line 1: two columns are called 'instruction'"],
        'instruction,"output\nA,B': ["line 1: the head of the table is broken"],
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x07 damaged": ["cannot be read"],
        '{"conversations": [{"from": "human", "value": "Hi", "role": "user"}, '
        '{"from": "gpt", "value": "Hi"}]}': [
            "field 'conversations[0]' has from and value, and role too"
        ],
        '{"messages": [{"role": "user", "content": "", "tool_calls": [1]}, ' + ASSISTANT + "]}": [
            "'messages[0].content' is empty"
        ],
        '{"messages": [{"role": "user", "content": "Hi", "name": "\\ud83d"}, ' + ASSISTANT + "]}": [
            "'messages[0].name' has a byte that is not UTF-8, or half a character"
        ],
        '[{"instruction": "Hi", "output": "\\ude00"}]': ["half a character (U+DE00"],
        GOOD.encode("utf-16-le"): ["is UTF-16 or UTF-32"],
        b"PK\x03\x04\x14\x00": ["is a zip or Excel file", "save the sheet as CSV"],
        f"{GOOD},": ["line 1: has a comma after the object", "take it out"],
        '{"instruction": "Hi", "instruction": "Ho", "output": "x"}': [
            "has the name 'instruction' twice in one object"
        ],
        "[" + OTHER + ', {"messages": [{"role": "user", "content": "q", "content": "y"}]}]': [
            "row 2: has the name 'content' twice"
        ],
        '{"messages": [' + USER + ', {"role": "assistant", "tool_calls": "yes"}]}': [
            "'messages[1].tool_calls' is a string",
            "write a list of objects with a name",
        ],
        '{"messages": [' + USER + ", " + ASSISTANT + '], "tools": "text"}': [
            "line 1: field 'tools' is a string that holds no JSON",
            "write a list of objects with a name",
        ],
        GOOD.replace('"input": ""', '"score": NaN'): [
            "line 1: field 'score' holds NaN or Infinity",
            "write null",
        ],
        '{"instruction": "Hi", "output": NaN}': [
            "field 'output' is NaN (what pandas writes for an empty cell)"
        ],
        b"PAR1 and no more": ["not a whole Parquet file", "fetch it again"],
        b"\xff\xd8\xff\xe0\x00\x10JFIF": ["bytes that are no text"],
        GOOD.encode("utf-16"): ["is UTF-16 or UTF-32", "save it as UTF-8"],
        GOOD.replace("Apple", "Äpfel").encode("latin-1"): [
            "line 1: field 'output' has a byte that is not UTF-8 (0xc4, character 1)"
        ],
        GOOD.replace('"input": ""', '"id": "Ä"').encode("latin-1"): [
            "field 'id' has a byte that is not UTF-8"
        ],
        "[" * 100_000: ["JSON that no data set needs"],
        '[{"instruction": "Hi", "output": %s}]' % ("9" * 5000): ["JSON that no data set needs"],
    }
)


@pytest.mark.parametrize("content", REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_reason(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as e:
        read_rows(path)
    said = str(e.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    for part in REFUSED[content]:
        assert part in said, said


@pytest.mark.parametrize(
    "text",
    [
        "a < b and b > c",
        "[1] says so",
        "x|y",
        "<b>bold</b>",
        "<|",
        "f(<x>)",
        "line\nline\ttab\r\n",
        "naïve 🦙 e\u0301",
        "A\u2028B",
        "<S>",
        "<s>struck out</s>",
        "What does <|im_end|> mean? And <eos>, [TOOL_CALLS], <turn|>, <|im_start|>system?",
        "[INST] <<SYS>> <</SYS>> [/INST] <start_of_turn> <｜User｜>",
    ],
)
def test_ordinary_text_is_not_refused(tmp_path, text):
    (tmp_path / "f").write_text(json.dumps(dict(instruction=text, output=text)))
    assert [m["content"] for m in read_rows(tmp_path / "f")[0]["messages"]] == [text, text]


@pytest.mark.parametrize(
    "path, why",
    [
        ("nothing_here.json", "No such file"),
        ("data/nothing.jsonl", "No such file"),
        ("a\0b", "cannot be read"),
        ("nobody/nothing", "is no file here, and cannot be loaded as a data set"),
    ],
)
def test_no_such_file(path, why):
    with pytest.raises(DataError, match=why):
        read_rows(path)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        rows = [json.loads(GOOD) | dict(score=None), {"instruction": "Hi", "output": ""}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="^owner/fruits: row 2: field 'output' is empty"):
        read_rows("owner/fruits")
    [row] = read_rows("owner/fruits", on_error="quarantine")
    assert row == dict(messages=talk([("Name a fruit.", "Apple")]), input="")
    assert asked[0] == ("owner/fruits", "train")
    assert [p.name for p in tmp_path.iterdir()] == ["owner-fruits.rejected.jsonl"]
    assert rejected_path("owner/fruits").name == "owner-fruits.rejected.jsonl"


def test_a_data_set_of_several_configurations(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ValueError("Config name is missing.\nPlease pick one: ['main', 'socratic']\n\tMore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as e:
        read_rows("owner/maths")
    said = str(e.value)
    assert "\n" not in said and "['main', 'socratic']" in said and "download the file" in said


def test_rejected_rows_are_next_to_a_folder():
    assert str(rejected_path("data/set/")) == "data/set.rejected.jsonl"
    assert str(rejected_path("data/a.jsonl")) == "data/a.jsonl.rejected.jsonl"


MATHS = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv", "f.parquet"])
def test_columns_of_other_names(tmp_path, name):
    rows = [dict(prompt=f"{i} + 1?", completion=str(i + 1), level="easy") for i in range(3)]
    renamed = [{MATHS.get(k, k): v for k, v in row.items()} for row in rows]
    if name == "f.parquet":
        import datasets

        datasets.Dataset.from_list(renamed).to_parquet(tmp_path / name)
    elif name == "f.csv":
        lines = [",".join(renamed[0]), *(",".join(row.values()) for row in renamed)]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        write(tmp_path / name, renamed, name[1:], False)
    want = [to_messages(row) for row in rows]
    assert read_rows(tmp_path / name, columns=MATHS) == want
    assert list(read_messages(tmp_path / name, columns=MATHS)) == want
    assert [r.source for r in scan(tmp_path / name, MATHS)] == renamed
    with pytest.raises(DataError) as e:
        read_rows(tmp_path / name, columns={"prompt": "query", "completion": "answer"})
    assert "has no column 'query' (found: question, answer, level)" in str(e.value)
    with pytest.raises(DataError, match="has no column 'no' .*found: question,answer,level|'no'"):
        read_rows(tmp_path / name, columns={"prompt": "no", "completion": "none"})


def test_a_column_may_hold_turns(tmp_path):
    question = json.dumps([turn("user", "Hi")]).replace('"', '""')
    answer = json.dumps([turn("assistant", "Ho")]).replace('"', '""')
    (tmp_path / "f.csv").write_text(f'question,answer\n"{question}","{answer}"\n')
    [row] = read_rows(tmp_path / "f.csv", columns=MATHS)
    assert row == dict(messages=talk([("Hi", "Ho")]))


def test_what_is_wrong_is_told_in_the_names_of_the_file(tmp_path):
    good = dict(question="Hi", answer="Ho")
    for rows, why in (
        ([good, dict(question="Hi", answer="")], "line 2: field 'answer' is empty"),
        ([good, dict(question="Hi")], "line 2: has no column 'answer' (found: question)"),
        ([good | dict(prompt="x")], "has a column 'prompt', which 'question' was to be read as"),
        ([good | dict(messages=[])], "fields prompt and messages are both there"),
    ):
        (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError) as e:
            read_rows(tmp_path / "f.jsonl", columns=MATHS)
        assert why in str(e.value)
    with pytest.raises(DataError, match="there is no column 'question': choose one of prompt"):
        read_rows(tmp_path / "f.jsonl", columns={"question": "prompt"})


SAID = talk([("Hi", "Ho"), ("Who?", "Me.")])
SHARED = [
    {"from": "human" if said["role"] == "user" else "gpt", "value": said["content"]}
    for said in SAID
]
TWO_FORMATS = {  # fields as well-known sets have them -> what is carried along
    "ultrachat_200k": (dict(prompt="Hi", prompt_id="7", messages=SAID), "prompt prompt_id"),
    "no_robots": (dict(prompt="Hi", messages=SAID, category="Chat"), "prompt category"),
    "Magpie": (
        dict(uuid="7", instruction="Hi", response="Ho", conversations=SHARED),
        "uuid instruction response",
    ),
    "an empty column": (dict(instruction="Hi", output=None, messages=SAID), "instruction output"),
    "a prompt of turns": (dict(prompt=SAID[:1], messages=SAID), "prompt"),
}


@pytest.mark.parametrize("name", TWO_FORMATS)
def test_of_two_formats_in_a_row_the_whole_one_is_read(name, tmp_path):
    row, rest = TWO_FORMATS[name]
    want = dict(messages=SAID) | {field: row[field] for field in rest.split()}
    assert to_messages(row) == want
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    assert read_rows(tmp_path / "f.jsonl") == [want]
    table = read_messages(tmp_path / "f.jsonl").select_columns("messages")
    assert list(table) == [dict(messages=SAID)]  # what TRL takes
    assert to_messages(want) == want  # once more


def test_of_two_whole_formats_in_a_row_none_is_read():
    for row, why in (
        (dict(prompt="Hi", completion="Ho", messages=SAID), "prompt and messages"),
        (dict(instruction="Hi", output="Ho", conversations=SHARED), "instruction and conv"),
        (dict(conversations=SHARED, messages=SAID), "conversations and messages"),
        (dict(instruction="Hi", prompt="Hi"), "instruction and prompt"),  # neither is whole
        (dict(prompt=None, messages=None), "prompt and messages"),
    ):
        with pytest.raises(DataError, match=f"fields {why}.* are both there: keep the one"):
            to_messages(row)


def test_a_real_file_with_columns_of_its_own(real_data):
    rows = read_rows(real_data / "gsm8k_test.jsonl", columns=MATHS)
    lines = (real_data / "gsm8k_test.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == len(lines) > 1000
    first = json.loads(lines[0])
    assert rows[0]["messages"] == talk([(first["question"], first["answer"])])


def test_an_unknown_file_is_shown_by_one_row(tmp_path):
    rows = [dict(dialog=[dict(speaker="A", text="long " * 99)]) for _ in range(175)]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as e:
        read_rows(tmp_path / "f.jsonl")
    said = str(e.value)
    assert "\n" not in said and "found the fields dialog: accepted are" in said
    assert '(the row: {"dialog": [{"speaker": "A"' in said and len(said) < 800


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(tmp_path, number):
    row = dict(messages=talk([("a", "b")]), score=[dict(x=number)])
    for value in (row, dict(messages=[row["messages"][0] | dict(n=number), row["messages"][1]])):
        with pytest.raises(DataError, match="(score|messages.0..n)' holds NaN or Infinity"):
            to_messages(value)
    for name in ("f.jsonl", "f.json", "f.csv", "f.parquet"):
        with pytest.raises(DataError, match="NaN|Infinity|not JSON compliant|cannot hold"):
            write_rows([row], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert to_messages(dict(messages=row["messages"], score="NaN"))["score"] == "NaN"


def test_an_empty_cell_of_a_table_of_numbers_is_nothing(tmp_path):
    import pandas as pd

    rows = dict(instruction=["a", "b"], output=["c", "d"], score=[1.5, None])
    pd.DataFrame(rows).to_parquet(tmp_path / "pandas.parquet")
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table(rows | dict(score=[1.5, float("nan")]))
    write_table(table, tmp_path / "nan.parquet")
    for name in ("pandas.parquet", "nan.parquet"):
        one, two = read_rows(tmp_path / name)
        assert one["score"] == 1.5 and "score" not in two


# --- rows of messages, rows of tokens

TALK, TOKENS = [dict(messages=talk([("a", "b")]))], [dict(input_ids=[1, 2], labels=[-100, 2])]


def both(check, rows):
    with pytest.raises(MaskError) as e:
        check(rows, MaskError)
    return str(e.value)


def test_rows_of_messages_and_rows_of_tokens(tmp_path):
    from datasets import Dataset

    (tmp_path / "f").write_text(GOOD + "\n" + OTHER)
    for form in (list, tuple, Dataset.from_list):
        check_message_rows(form(TALK), DataError)
        check_token_rows(form(TOKENS), DataError)
        assert "holds input_ids, not messages" in both(check_message_rows, form(TOKENS))
        said = both(check_token_rows, form(TALK))
        assert "encode first, with `sftlab.masking.encode_rows(tokenizer, rows)`" in said
    check_message_rows(read_messages(tmp_path / "f"), DataError)
    check_message_rows([], DataError)
    check_token_rows([], DataError)
    mixed = Dataset.from_list([TALK[0] | dict(input_ids=None), TALK[0] | dict(input_ids=[1])])
    check_message_rows(mixed, DataError)  # None counts as missing
    assert "encode first" in both(check_token_rows, mixed)


@pytest.mark.parametrize(
    "rows, why",
    [
        ("chats.jsonl", "rows are 'chats.jsonl', a string or path: read a file with"),
        (Path("a/b.json"), "a string or path"),
        (TALK[0], "rows are one dict: make it a list of rows"),
        (dict(input_ids=[1], labels=[1]), "rows are one dict"),
        ([dict(instruction="a", output="b")], "read_messages`"),
        ([dict(conversations=[])], "found: conversations"),
        (TALK[0]["messages"], "row 1 is one message"),
        ([TALK[0]["messages"]], "row 1 is a list: make a row of the messages"),
        ((row for row in TALK), "of the type generator: give a list"),
        (None, "rows are null"),
        ([None], "row 1 is null where a dict is wanted"),
        ([dict(messages=None)], "read_messages`"),
    ],
    ids=range(12),
)
def test_what_is_no_list_of_rows(rows, why):
    for check in (check_message_rows, check_token_rows):
        assert why in both(check, rows)


def test_tables_that_are_no_list_of_rows():
    import pandas as pd
    from datasets import Dataset, DatasetDict

    parts = DatasetDict(train=Dataset.from_list(TALK), test=Dataset.from_list(TALK))
    assert "in parts (train, test): give one of them" in both(check_message_rows, parts)
    assert "of the type DataFrame" in both(check_token_rows, pd.DataFrame(TALK))
    assert "row 1 has no labels" in both(check_token_rows, [dict(input_ids=[1])])


def test_a_folder_is_loaded_as_a_data_set(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        f"{GOOD}\n" + OTHER.replace('"output"', '"input": null, "output"')
    )
    assert [r["messages"][1]["content"] for r in read_rows(tmp_path / "set")] == ["Apple", "Hammer"]


def test_the_first_problems_are_named_together(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(
        "\n".join(
            [GOOD] + [f'{{"instruction": "Hi {i}", "output": ""}}' for i in range(4)] + [OTHER]
        )
    )
    with pytest.raises(DataError) as e:
        read_rows(path, show=2)
    lines = str(e.value).split("\n")
    assert lines[0].endswith("4 of 6 rows cannot be used") and len(lines) == 5
    assert (
        lines[1].startswith("  line 2: ")
        and lines[2].startswith("  line 3: ")
        and lines[3] == "  and 2 more: `sftlab data check` shows all"
        and "quarantine" in lines[4]
    )


def test_what_must_be_accepted(tmp_path):
    path = tmp_path / "file"
    want = talk([("Name a fruit.", "Apple")])
    for content in (
        GOOD,
        f"[{GOOD}]",
        f"\n{GOOD}\n\n",
        json.dumps(json.loads(GOOD), indent=2),
        GOOD.replace('"input": "", ', ""),
        "instruction,output\nName a fruit.,Apple\n",
        "instruction\toutput\r\nName a fruit.\tApple",
        GOOD.replace('"input": ""', '"input": null, "id": 7, "system": "", "history": []'),
    ):
        path.write_bytes(content.encode())
        assert [r["messages"] for r in read_rows(path)] == [want], content
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n")
    assert read_rows(path)[0]["messages"] == want


def test_objects_over_several_lines_one_after_the_other(tmp_path):
    rows = [json.loads(GOOD), json.loads(OTHER)]
    (tmp_path / "f").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    assert [r.source for r in scan(tmp_path / "f")] == rows
    (tmp_path / "f").write_text(
        json.dumps(rows[0], indent=2) + "\n" + json.dumps(rows[1], indent=2)[:-4]
    )
    assert [bool(r.row) for r in scan(tmp_path / "f")] == [True, False]


def test_files_put_one_behind_the_other(tmp_path):
    (tmp_path / "f").write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b"\n\xef\xbb\xbf" + OTHER.encode()
    )
    assert len(read_rows(tmp_path / "f")) == 2


def test_rows_from_a_pipe(tmp_path):
    code = "from sftlab.files.rows import scan; print(sum(bool(r.row) for r in scan('/dev/stdin')))"
    lines = "".join(
        json.dumps(dict(instruction=f"Question {i}", output="x")) + "\n" for i in range(3000)
    )
    for content in (lines.encode(), gzip.compress(lines.encode())):
        assert (
            subprocess.run(
                [sys.executable, "-c", code], input=content, capture_output=True, check=True
            ).stdout
            == b"3000\n"
        )


def test_an_open_quote_loses_no_text(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text('instruction,output\nA,B\n"C,D\nE,F\nG,H\n')
    assert len(read_rows(path, on_error="quarantine")) == 1
    assert json.loads(rejected_path(path).read_text())["source"] == '"C,D\nE,F\nG,H\n'


def test_what_a_tool_says_may_be_nothing(tmp_path):
    turns = [
        turn("user"),
        dict(role="assistant", content="\n", tool_calls=[dict(name="f")]),
        turn("tool", ""),
        turn("assistant"),
    ]
    assert to_messages(dict(messages=turns))["messages"] == turns


def test_rows_before_the_first_known_one_count_too(tmp_path):
    (tmp_path / "f").write_text('{"made by": "me"}\n' + GOOD + "\n" + OTHER)
    assert [(r.place, bool(r.row)) for r in scan(tmp_path / "f")] == [
        ("line 1", False),
        ("line 2", True),
        ("line 3", True),
    ]


good_or_bad = st.sampled_from(
    [
        GOOD,
        OTHER,
        '{"instruction": "Hi"}',
        "{broken",
        row("user", "assistant"),
        "[]",
        '{"instruction": "a", "output": "b", "input": 5}',
        GOOD[:-3],
    ]
)


@given(st.lists(good_or_bad, min_size=1, max_size=12))
def test_kept_and_rejected_are_all_rows(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("q") / "file.jsonl"
    path.write_text("\n".join([GOOD.replace("fruit", "sport"), *lines]))
    kept = read_rows(path, on_error="quarantine")
    beside = rejected_path(path)
    rejected = (
        [json.loads(line) for line in beside.read_text().splitlines()] if beside.exists() else []
    )
    assert len(kept) + len(rejected) == 1 + len(lines) and all(r["problems"] for r in rejected)
    places = [int(r["place"].split()[1]) for r in rejected]
    for place, r in zip(places, rejected):
        assert r["source"] == (
            json.loads(lines[place - 2])
            if isinstance(r["source"], (dict, list))
            else lines[place - 2]
        )
    assert read_rows(path, on_error="quarantine") == kept  # a second time: the same file beside it
    if rejected:
        with pytest.raises(DataError):
            read_rows(path)


def test_the_file_of_rejected_rows_is_not_written_over(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(GOOD + "\n{}")
    rejected_path(path).write_text("what I fixed by hand")
    with pytest.raises(OutputError, match="is there already"):
        read_rows(path, on_error="quarantine")
    assert rejected_path(path).read_text() == "what I fixed by hand"
    with pytest.raises(
        DataError, match="there is no on_error 'ignore': choose one of raise, quarantine"
    ):
        read_rows(path, on_error="ignore")


def test_fields_that_some_rows_lack_are_kept(tmp_path):
    rows = [
        dict(messages=talk([("a", "b")])),
        dict(messages=talk([("c\n\nd", "e")]), input="d", note=None),
    ]
    for name in ("f.parquet", "f.jsonl"):
        write_rows(rows, tmp_path / name, "alpaca")
        assert [
            {k: v for k, v in row.items() if v is not None} for row in read_rows(tmp_path / name)
        ] == [{k: v for k, v in row.items() if v is not None} for row in rows]
    write_rows(
        [r | dict(input=r.get("input"), note=None) for r in rows], tmp_path / "f.csv", "alpaca"
    )
    assert [row["messages"] for row in read_rows(tmp_path / "f.csv")] == [
        row["messages"] for row in rows
    ]


@pytest.mark.parametrize(
    "row, format",
    [
        (dict(messages=talk([("a", "b")]), output="mine"), "alpaca"),
        (dict(messages=talk([("a", "b")]), completion="mine"), "prompt"),
        (dict(messages=talk([("a", "b")], system="x"), system="y"), "alpaca"),
    ],
)
def test_a_field_of_the_rows_own_is_not_written_over(row, format):
    with pytest.raises(DataError, match="of its own"):
        from_messages(row, format)


def test_a_turns_own_fields_do_not_change_what_is_said():
    for extra in (dict(value="evil"), {"from": "alice"}, {"from": "human"}, {"from": "field"}):
        with pytest.raises(DataError, match="'value', or a field 'from'"):
            from_messages(dict(messages=[turn("user"), turn("assistant") | extra]), "sharegpt")
    for wrong in ("other", 7, ["x"]):
        with pytest.raises(DataError, match="not the end of the question"):
            from_messages(dict(messages=talk([("a", "b")]), input=wrong), "alpaca")
    for turns in (
        [turn("system") | dict(weight=1), turn("user"), turn("assistant")],
        [turn("user"), turn("assistant") | {"from": "function_call"}],
    ):
        with pytest.raises(DataError, match="nothing else"):
            from_messages(dict(messages=turns), "alpaca")


@pytest.mark.parametrize("convert", [to_messages, from_messages])
def test_a_format_that_there_is_not(convert):
    with pytest.raises(DataError, match="there is no format 'chatml': choose one of alpaca"):
        convert(dict(messages=talk([("a", "b")])), "chatml")


def test_writing(tmp_path):
    rows = [dict(messages=talk([("a", "b")])), dict(messages=talk([("c", "d")], last="e"))]
    for words in (
        ["f.txt", "messages", "names no container"],
        ["f.json", "chatml", "there is no format"],
        ["f.jsonl", "alpaca", "row 2 cannot be written as alpaca"],
        ["f.jsonl", "prompt", "row 2 cannot be written as prompt"],
    ):
        with pytest.raises(DataError, match=words[2]):
            write_rows(rows, tmp_path / words[0], words[1])
    assert list(tmp_path.iterdir()) == []
    write_rows(rows, tmp_path / "f.jsonl")
    with pytest.raises(OutputError, match="is there already"):
        write_rows(rows[:1], tmp_path / "f.jsonl")
    assert read_rows(tmp_path / "f.jsonl") == rows
    with pytest.raises(DataError, match="cannot hold field 'tools', a list"):
        write_rows([rows[0] | dict(tools=[{}])], tmp_path / "f.csv")
    with pytest.raises(DataError, match="a list or object holds a null"):
        write_rows([rows[0] | dict(tags=[{"a": None}])], tmp_path / "f.parquet")
    with pytest.raises(DataError, match="JSON has no form for"):
        write_rows([rows[0] | dict(tags={1, 2})], tmp_path / "g.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is there already"):
        write_rows(rows, tmp_path / "link.jsonl")
    (tmp_path / "link.jsonl").unlink()
    with pytest.raises(DataError, match="a table wants the same"):
        write_rows([rows[0], rows[1] | dict(id=1)], tmp_path / "f.csv")
    with pytest.raises(DataError, match="write JSONL"):
        write_rows([r | dict(id=i) for r, i in zip(rows, (1, "x"))], tmp_path / "f.parquet")
    for name in ("f.jsonl/g.json", "f.jsonl/g.parquet"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_rows(rows, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]
    for name in ("new/folder/g.json", "new/other/g.parquet"):
        write_rows(rows, tmp_path / name)
        assert read_rows(tmp_path / name) == rows


def test_packed_files_of_the_same_rows_are_the_same(tmp_path):
    rows = [dict(messages=talk([("a", "b")]))]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_rows(rows, tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).startswith(b'{"messages"')


@pytest.mark.parametrize(
    "row",
    [
        dict(messages=talk([("a", "b")])),
        dict(prompt=talk([], last="a"), completion=[dict(role="assistant", content="b")]),
    ],
)
def test_messages_are_not_the_rows_own(row):
    before = json.dumps(row)
    for message in to_messages(row)["messages"]:
        message["content"] = "changed"
    assert json.dumps(row) == before


def rows_of(words):
    return [dict(messages=talk([(f"Say {w}.", w)]), author=w[0]) for w in words]


@given(st.lists(st.integers(0, 30), min_size=3, max_size=60), st.integers(0, 99))
def test_a_split_keeps_all_rows_and_tears_no_twins(numbers, seed):
    rows = rows_of([f"{n} {n + 1} {n * n} {n * 7}" for n in numbers])
    if len(set(numbers)) < 3:
        with pytest.raises(DataError, match="groups of rows that differ"):
            split_rows(rows, seed=seed)
        return
    parts = split_rows(rows, seed=seed)
    key = lambda r: r["messages"][1]["content"]
    assert all(parts.values()) and sorted(map(key, sum(parts.values(), []))) == sorted(
        map(key, rows)
    )
    seen = [set(map(key, part)) for part in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert parts == split_rows(rows, seed=seed)


def test_a_split_takes_the_shares_asked_for_heeds_the_seed_and_the_groups():
    rng = random.Random(0)
    rows = rows_of(["".join(rng.choices("abcdefghij", k=8)) for _ in range(400)])
    parts = split_rows(rows, {"train": 0.85, "test": 0.15})
    assert {name: len(part) for name, part in parts.items()} == {"train": 340, "test": 60}
    assert split_rows(rows, {"train": 0.85, "test": 0.15}, seed=1)["test"] != parts["test"]
    by = split_rows(rows, {"train": 0.7, "test": 0.3}, by="author")
    assert (
        not {r["author"] for r in by["train"]} & {r["author"] for r in by["test"]}
        and 60 <= len(by["test"]) <= 180
    )
    with pytest.raises(DataError, match="row 1 has no field 'who'"):
        split_rows(rows, by="who")
    for bad in ({}, {"train": 0.5, "test": 0}, {"train": 1.5, "test": -0.5}):
        with pytest.raises(DataError, match="must be numbers above 0"):
            split_rows(rows, bad)
    assert {n: len(p) for n, p in split_rows(rows, {"train": 80, "test": 20}).items()} == {
        "train": 320,
        "test": 80,
    }
    pairs = rows_of(
        [
            f"{w} {i}"
            for i in range(100)
            for w in (
                "one two three four five six seven eight nine ten",
                "One two three four five six seven eight nine TEN",
            )
        ]
        + [f"{i} {i * i} {i + 7} and so on" for i in range(1000, 1200)]
    )
    test = split_rows(pairs, {"train": 0.8, "test": 0.2})["test"]
    assert (
        0.2 < sum("ten" in r["messages"][1]["content"].lower() for r in test) / len(test) < 0.8
    )  # pairs go everywhere, and not to the largest part
    skewed = [r | dict(author="most" if i < 350 else r["author"]) for i, r in enumerate(rows)]
    assert {r["author"] for r in split_rows(skewed, by="author")["train"]} == {
        "most"
    }  # the largest group goes where there is most room


@given(
    st.lists(
        st.lists(
            st.sampled_from("red blue green one two three four".split()), min_size=1, max_size=8
        ),
        max_size=12,
    )
)
def test_near_duplicates_are_all_close_pairs_and_what_they_link(texts):
    texts = [" ".join(words) for words in texts]
    sets, group = [shingles(t) for t in texts], near_duplicates(texts)
    alike = lambda i, j: len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    reach = {i: {i} for i in range(len(texts))}
    for _ in texts:
        for i in reach:
            reach[i] |= {j for k in list(reach[i]) for j in range(len(texts)) if alike(k, j)}
    for i in reach:
        assert {j for j in range(len(texts)) if group[j] == group[i]} <= reach[i]
        assert all(group[j] == group[i] for j in reach[i] if sets[i] == sets[j])


def test_a_text_like_one_of_a_group_is_found_though_it_is_not_like_the_first():
    rng, missed = random.Random(0), 0
    for _ in range(100):
        a = [f"w{rng.random()}" for _ in range(50)]
        b, c = a + ["x"], a[9:] + ["x"]  # b is like a and like c; a is not like c
        group = near_duplicates([" ".join(a), " ".join(b), " ".join(c)])
        missed += len(set(group)) > 1
    assert missed <= 1  # a pair at 0.8 is met in 99.98 % of the cases


def test_a_shared_beginning_does_not_make_it_slow():
    import time

    begin = " ".join(f"w{i}" for i in range(150))
    start = time.process_time()
    near_duplicates([f"{begin} " + " ".join(f"v{i}x{j}" for j in range(60)) for i in range(250)])
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "one, two, same",
    [
        ("The cat sat on the mat!", "the CAT sat on the mat", True),
        ("今天天气很好，我们去公园。", "今天天气很好我们去公园", True),
        ("The cat sat on the mat", "The dog sat on the mat", False),
        ("yes", "no", False),
        ("😀", "🙏", False),
        ("café", "cafe\u0301", True),
        ("की", "का", False),
        ("1 + 2", "1 + 3", False),
    ],
)
def test_what_counts_as_nearly_the_same(one, two, same):
    assert (len(set(near_duplicates([one, two]))) == 1) == same


@given(st.text(), st.text())
def test_instructions_carry_every_character_of_the_data(text, label):
    questions, answer = TASK_PHRASINGS["classification"]
    try:
        (row,) = as_instructions(
            [dict(text=text, label=label)], questions, answer, labels="good, bad"
        )
    except DataError:
        return  # empty, or no text
    assert text in row["messages"][0]["content"] and row["messages"][1]["content"] == label


def test_instructions_name_what_is_missing():
    with pytest.raises(DataError, match="row 2: nothing for the slot 'label'"):
        as_instructions(
            [dict(text="a", label="b"), dict(text="a")],
            *TASK_PHRASINGS["classification"],
            labels="b",
        )
    for nothing in (None, " ", float("nan")):
        with pytest.raises(DataError, match="row 1: nothing for the slot 'label'"):
            as_instructions(
                [dict(text="a", label=nothing)], *TASK_PHRASINGS["classification"], labels="b"
            )
    assert (
        as_instructions([dict(t="a", s="b")], "Say {t}.", "{s}")[0]["messages"][0]["content"]
        == "Say a."
    )  # one phrasing, not a list
    for template in ("Say {t", "Say {}", "Say {t!x}", "Say {t:d}"):
        with pytest.raises(DataError, match="for braces that are no slot"):
            as_instructions([dict(t="a", s="b")], template, "{s}")
    with pytest.raises(DataError, match="row 1: field 'completion' has the control character"):
        as_instructions([dict(t="a", s="\x07")], "{t}", "{s}")
    with pytest.raises(DataError, match="nothing for the slot 'language'"):
        as_instructions([dict(source="a", target="b")], *TASK_PHRASINGS["translation"])
    many = as_instructions(
        [dict(text=f"a {{x}} {i}", summary="b") for i in range(60)], *TASK_PHRASINGS["summary"]
    )
    assert (
        len({m["messages"][0]["content"].replace(f"a {{x}} {i}", "") for i, m in enumerate(many)})
        == 3
    )  # each phrasing is drawn


def test_the_stats_count_what_is_there():
    table = dataset_stats(
        [dict(messages=talk([("Hi", "Hello"), ("你好", "早")], system="Be kind"))]
    )
    assert table.iloc[0].to_dict() == dict(
        turns=5,
        length=2 + 5 + 2 + 1 + 7,
        answers=6,
        roles="assistant system user",
        scripts="Han + Latin",
    )


def test_reading_imports_no_heavy_library(tmp_path):
    (tmp_path / "f").write_text(GOOD)
    code = """
import sys
from sftlab.files.rows import iter_valid_rows
from sftlab.files.writers import write_rows
write_rows(iter_valid_rows(sys.argv[1]), sys.argv[1] + ".csv")
heavy = {"torch", "trl", "transformers", "datasets", "numpy", "pandas", "pyarrow", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "f"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


MEMORY = """
import resource, sys
from sftlab.files.rows import iter_valid_rows, scan
from sftlab.files.writers import write_rows
n = sum(1 for record in scan(sys.argv[1]))
write_rows(iter_valid_rows(sys.argv[1]), sys.argv[1] + ".out.jsonl", "sharegpt")
unit = 1 if sys.platform == "darwin" else 1024
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    used = {}
    for n in (2_000, 40_000):
        with open(tmp_path / "f.jsonl", "w") as f:
            for i in range(n):
                f.write(
                    json.dumps(
                        dict(instruction=f"Question {i} " + "word " * 100, output=f"Answer {i}")
                    )
                    + "\n"
                )
        count, used[n] = map(
            int,
            subprocess.run(
                [sys.executable, "-c", MEMORY, tmp_path / "f.jsonl"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split(),
        )
        assert count == n
        (tmp_path / "f.jsonl.out.jsonl").unlink()
    assert used[40_000] - used[2_000] < 8e6  # the file grew by 22 MB


REAL = {
    "alpaca_en_demo.json": ("alpaca", 999),
    "alpaca_zh_demo.json": ("alpaca", 1000),
    "sharegpt_dummy_conversation.json": ("sharegpt", 500),
}


@pytest.mark.parametrize("name", REAL)
def test_real_file(real_data, tmp_path, name):
    format, count = REAL[name]
    file = json.loads((real_data / name).read_text("utf-8"))
    found = list(scan(real_data / name))
    kept = [r for r in found if r.row]
    assert len(found) == len(file) == count and [r.source for r in found] == file
    repeated = {
        json.dumps({k: v for k, v in row.items() if k != "id"}, sort_keys=True) for row in file
    }
    assert len(kept) == len(repeated) and all(
        "is the same as" in str(r.problems[0]) for r in found if not r.row
    )  # nothing but rows that are there twice
    for record in (
        kept
    ):  # by another road than the code's: every text of the file, in order, and nothing else
        raw = record.source
        if "output" in raw:
            want = ["\n\n".join(filter(None, [raw["instruction"], raw["input"]])), raw["output"]]
        else:
            want = [t["value"] for t in raw["conversations"]]
        assert [m["content"] for m in record.row["messages"]] == want
        assert [m["role"] for m in record.row["messages"]] == ["user", "assistant"] * (
            len(want) // 2
        )
    write_rows([r.row for r in kept], tmp_path / "there.parquet", "messages")
    write_rows(read_rows(tmp_path / "there.parquet"), tmp_path / "back.json", format)
    assert json.loads((tmp_path / "back.json").read_text("utf-8")) == [r.source for r in kept]
    assert list(read_messages(tmp_path / "there.parquet")["messages"]) == [
        r.row["messages"] for r in kept
    ]


@pytest.mark.parametrize("name", ["c4_demo.jsonl", "gsm8k_test.jsonl", "HumanEval.jsonl.gz"])
def test_real_file_of_another_kind(real_data, name):
    with pytest.raises(DataError, match="accepted are|field 'completion' is missing"):
        read_rows(real_data / name)
