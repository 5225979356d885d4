"""Malformed files: each is refused by one clear message. Odd files that are right: each is accepted
by `sftlab data check`, and what it accepts can be encoded."""
import copy
import gzip
import io
import json

import pytest

from sftlab import cli
from sftlab.files.rows import read_rows
from sftlab.masking import IGNORE, encode_rows
from sftlab.models import load

FRUIT = dict(instruction="Name a fruit.", output="Apple")
TEXT = dict(type="text", text="Hi")
TOOL = dict(name="weather", description="Says it.", parameters=dict(type="object", properties={}))


def dump(*rows, **options):
    "JSONL."
    return "\n".join(json.dumps(row, ensure_ascii=False, **options) for row in rows)


def fruit(**fields):
    "JSONL of a good row, and one with other fields."
    return dump(dict(instruction="Name a tool.", output="Hammer"), FRUIT | fields)


def turn(role, content="Hi", **more):
    return dict(role=role, content=content) | more


def talk(*turns, **more):
    return dump(dict(messages=list(turns), **more))


def said(**more):
    "A conversation whose answer has further fields."
    return talk(turn("user"), turn("assistant", **more))


def called(calls, **more):
    "A conversation with calls."
    call = dict(role="assistant", content=None, tool_calls=calls)
    return talk(turn("user"), call, turn("tool", "dry"), turn("assistant"), **more)


def call(arguments): return [dict(function=dict(name="weather", arguments=arguments))]


def with_tools(tools): return talk(turn("user"), turn("assistant"), tools=tools)


def sharegpt(*turns, **more):
    return dump(dict(conversations=[{"from": who, "value": text} for who, text in turns], **more))


def packed(value): return sharegpt(("human", "Hi"), ("function_call", value),
                                   ("observation", "dry"), ("gpt", "No."))


def parquet(rows, count=None):
    import pyarrow
    from pyarrow.parquet import write_table
    held = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows)[:count], held)
    return held.getvalue()


GOOD = dump(FRUIT)
MANY = dump(*(dict(instruction=f"Say {i}.", output=f"{i}") for i in range(99)))
DEEP = "[" * 200 + "]" * 200
UMLAUT = dump(FRUIT | dict(output="Äpfel"))

WRONG = {  # what it is -> the file, and what must be said of it
    # --- nothing, or something else
    "empty": ("", "holds no rows"),
    "blank lines": ("\n \n\n", "holds no rows"),
    "an empty list": ("[]", "holds no rows"),
    "only the mark of UTF-8": (b"\xef\xbb\xbf", "holds no rows"),
    "only a head": ("instruction,output\n", "holds no rows"),
    "gzip of nothing": (gzip.compress(b""), "holds no rows"),
    "parquet without rows": (lambda: parquet([FRUIT], 0), "holds no rows"),
    "null": ("null", "neither JSON nor the head of a table"),
    "a number": ("42", "neither JSON nor the head of a table"),
    "a text": ("Once upon a time.", "neither JSON nor the head of a table"),
    "yaml": ("- instruction: Name a fruit.\n  output: Apple\n", "neither JSON nor the head"),
    "xml": ("<rows><row/></rows>", "neither JSON nor the head of a table"),
    "a photograph": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "bytes that are no text"),
    "zip": (b"PK\x03\x04\x14\x00", "is a zip or Excel file"),
    "a program": (b"\x7fELF\x02\x01\x01\x00\x00", "neither JSON nor the head of a table"),
    # --- broken JSON
    "a list cut short": (f"[{GOOD}, {GOOD[:-9]}", "row 2: line 1, column"),
    "a line cut short": (GOOD + "\n" + GOOD[:-9], "line 2: column"),
    "an object that is never closed": ('{"instruction": "Hi", "output": "Ho"', "broken or cut"),
    "a comma at the end of a list": (f"[{GOOD},]", "row 2: line 1, column"),
    "a comma behind each line": (GOOD + ",\n" + fruit(), "line 1: has a comma after the object"),
    "no comma between rows": (f"[{GOOD} {GOOD}]", "Expecting ',' delimiter"),
    "single quotes": ("{'instruction': 'Hi', 'output': 'Ho'}", "Expecting property name"),
    "names without quotes": ("{instruction: 1}", "Expecting property name"),
    "a comment": (GOOD + "\n// the end", "line 2: column 1"),
    "a line end in a string": ('[{"instruction": "Hi\n", "output": "Ho"}]', "Invalid control char"),
    "True": ('{"instruction": "Hi", "output": True}', "Expecting value"),
    "a bracket too many": (f"[{GOOD}]]", "Extra data"),
    "two objects in a line": (GOOD + " " + GOOD, "Extra data"),
    "a bad escape": ('{"instruction": "\\x", "output": "Ho"}', "Invalid \\escape"),
    "half an escape": ('{"instruction": "\\u12", "output": "Ho"}', "Invalid \\uXXXX escape"),
    "a name twice": ('{"instruction": "Hi", "output": "a", "output": "b"}', "'output' twice"),
    "lists in lists": ("[" * 100_000, "JSON that no data set needs"),
    "lists in lists beside it": (GOOD[:-1] + f', "x": {DEEP}}}', "JSON that no data set needs"),
    "lists in lists in a tool": (with_tools(f'[{{"name": "f", "x": {DEEP}}}]'), "holds no JSON"),
    "lists in lists in a call": (called(call(f'{{"a": {DEEP}}}')), "holds no JSON"),
    "a number of thousands of digits": ('{"instruction": "a", "output": %s}' % ("9" * 5000),
                                        "JSON that no data set needs"),
    "NaN as an answer": ('{"instruction": "Hi", "output": NaN}', "field 'output' is NaN"),
    "NaN beside it": (fruit(score=float("nan")), "line 2: field 'score' holds NaN or Infinity"),
    "Infinity beside it": (fruit(score=[float("inf")]), "field 'score' holds NaN or Infinity"),
    "a number too large": ('{"instruction": "a", "output": "b", "n": 1e999}', "'n' holds NaN or"),
    "NaN in a turn": (said(score=float("nan")), "'messages[1].score' holds NaN or Infinity"),
    # --- encodings
    "UTF-16": (GOOD.encode("utf-16"), "is UTF-16 or UTF-32"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "is UTF-16 or UTF-32"),
    "UTF-32": (GOOD.encode("utf-32"), "is UTF-16 or UTF-32"),
    "Latin-1": (UMLAUT.encode("latin-1"), "field 'output' has a byte that is not UTF-8 (0xc4"),
    "Latin-1 beside it": (fruit(id="Ä").encode("latin-1"), "field 'id' has a byte"),
    "GBK": (dump(FRUIT | dict(output="苹果")).encode("gbk"), "a byte that is not UTF-8"),
    "half an emoji": ('{"instruction": "Hi", "output": "\\ud83d"}', "half a character (U+D83D"),
    "half an emoji in a tool": (with_tools([dict(name="f", about="\ud83d")])
                                .encode("utf-8", "surrogatepass"), "field 'tools' has a byte"),
    "a zero byte": (fruit(output="a\0"), "control character U+0000"),
    "an escape": (fruit(output="\x1b[2J"), "control character U+001B"),
    # --- packed and binary
    "gzip, cut short": (lambda: gzip.compress(MANY.encode())[:200], "cannot be read"),
    "gzip, damaged": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x07 damaged", "cannot be read"),
    "gzip of text": (gzip.compress(b"Once upon a time."), "neither JSON nor the head"),
    "parquet, cut short": (lambda: parquet([FRUIT])[:99], "is not a whole Parquet file"),
    "parquet in name": (b"PAR1 and no more", "is not a whole Parquet file"),
    "parquet of numbers": (lambda: parquet([FRUIT | dict(output=2)]), "is a number"),
    "parquet of other columns": (lambda: parquet([dict(text="a")]), "found the fields text"),
    # --- tables
    "other columns": ("text,label\nRain,1\n", "line 1: found 'text,label'"),
    "a cell too many": ("instruction,output\nName a fruit.,Apple,red\n", "has 3 cells where"),
    "a cell too few": ("instruction,input,output\nHi,,Ho\nHi,Ho\n", "has 2 cells where the head"),
    "an open quote": ('instruction,output\nA,B\n"C,D\n', "line 3: the table is broken"),
    "text behind a quote": ('instruction,output\n"A"x,B\n', "line 2: the table is broken"),
    "a column twice": ("instruction,output,output\nA,B,C", "two columns are called 'output'"),
    "an empty cell": ("instruction,output\nHi,\n", "line 2: field 'output' is empty"),
    "a list in a cell, cut short": ('messages\n"[{""role"": ""user"""\n', "is a string: make it a"),
    # --- fields
    "unknown fields": (dump(dict(question="Hi", answer="Ho")), "found the fields question, answer"),
    "no fields": ("{}", "found the fields (none)"),
    "rows in an object": (dump(dict(data=[FRUIT])), "found the fields data"),
    "a list of strings": ('["Name a fruit.", "Apple"]', "found a string instead of an object"),
    "a list of lists": ('[["user", "Hi"], ["assistant", "Ho"]]', "found a list instead"),
    "two formats in a row": (fruit(messages=[]), "fields instruction and messages are both there"),
    "two formats in a file": (GOOD + "\n" + said(), "the rows before have 'instruction'"),
    "no answer": (dump(dict(instruction="Hi")), "field 'output' is missing"),
    "an answer of null": (fruit(output=None), "field 'output' is null"),
    "an empty answer": (fruit(output=" \n"), "field 'output' is empty"),
    "an answer that is a number": (fruit(output=4), "field 'output' is a number"),
    "an answer that is true": (fruit(output=True), "field 'output' is true or false"),
    "an answer that is a list": (fruit(output=["a"]), "field 'output' is a list"),
    "an input that is an object": (fruit(input=dict(a=1)), "field 'input' is an object"),
    "a history of strings": (fruit(history="Hi"), "field 'history' is not a list of pairs"),
    "a history of triples": (fruit(history=[["a", "b", "c"]]), "is not a list of pairs"),
    "a history with a gap": (fruit(history=[["a", None]]), "field 'history[0][1]' is null"),
    "a system that is a number": (fruit(system=5), "field 'system' is a number"),
    "no completion": (dump(dict(prompt="Hi")), "field 'completion' is missing"),
    "a list and a string": (dump(dict(prompt=[turn("user")], completion="Ho")), "is a string"),
    "a row twice": (GOOD + "\n" + GOOD, "line 2: is the same as line 1"),
    # --- turns
    "no turns": (talk(), "has no turn by the assistant"),
    "messages as an object": (dump(dict(messages=turn("user"))), "field 'messages' is an object"),
    "messages as a string": (dump(dict(messages="Hi")), "field 'messages' is a string"),
    "messages of null": (dump(dict(messages=None)), "field 'messages' is null"),
    "messages in a list": (dump(dict(messages=[[turn("user")]])), "'messages[0]' is a list"),
    "a turn that is a string": (talk("Hi"), "'messages[0]' is a string"),
    "a picture among parts": (talk(turn("user", [TEXT, dict(type="image", image="cat.png")]),
                                   turn("assistant")),
                              "'messages[0].content[1]' is of the type 'image', and no text"),
    "parts that say nothing": (talk(turn("user", [TEXT | dict(text=" ")]), turn("assistant")),
                               "'messages[0].content' is empty"),
    "a part of another kind": (talk(turn("user", ["Hi"]), turn("assistant")),
                               "'messages[0].content[0]' is a string"),
    "a part with more than text": (talk(turn("user", [TEXT | dict(cache_control=dict(a=1))]),
                                        turn("assistant")), "'cache_control' next to its text"),
    "a role of another format": (talk(turn("human")), "'messages[0].role' is 'human'"),
    "a role in capitals": (talk(turn("User"), turn("assistant")), "role' is 'User'"),
    "a role that is a list": (talk(turn(["user"])), "'messages[0].role' is a list"),
    "a speaker that nobody knows": (sharegpt(("human", "a"), ("robot", "b")), "from' is 'robot'"),
    "nobody answers": (talk(turn("user")), "no turn by the assistant"),
    "the assistant begins": (talk(turn("assistant"), turn("user")), "where user should speak"),
    "two questions": (talk(turn("user"), turn("user"), turn("assistant")), "as is the one before"),
    "a system in the middle": (talk(turn("user"), turn("assistant"), turn("system")), "middle"),
    "a tool that nobody called": (talk(turn("user"), turn("tool"), turn("assistant")), "by tool"),
    "two names for the text": (sharegpt(("human", "a"), ("gpt", "b")).replace(
        '"b"', '"b", "content": "c"'), "has from and value, and content too"),
    "a system outside": (talk(turn("user"), turn("assistant"), system="Be"), "is outside of it"),
    # --- tools and calls
    "tools of text": (with_tools("text"), "field 'tools' is a string that holds no JSON"),
    "tools that are one": (with_tools(TOOL), "field 'tools' is an object"),
    "tools as strings": (with_tools(["weather"]), "field 'tools[0]' is a string"),
    "tools as strings of JSON": (with_tools([json.dumps(TOOL)]), "field 'tools[0]' is a string"),
    "a tool without a name": (with_tools([dict(type="function")]), "'tools[0]' has no name"),
    "a tool of null": (with_tools([dict(type="function", function=None)]), "function' is null"),
    "parameters of text": (with_tools([TOOL | dict(parameters="x")]), "parameters' is a string"),
    "tools, cut short": (with_tools(json.dumps([TOOL])[:-3]), "tools' is a string that holds no"),
    "calls of text": (called("weather"), "'messages[1].tool_calls' is a string"),
    "calls as an object": (called(dict(name="weather")), "tool_calls' is an object"),
    "a call of text": (called(["weather"]), "tool_calls[0]' is a string"),
    "a call without a name": (called([dict(function=dict(arguments={}))]), "has no name"),
    "arguments of text": (called(call("Lima")), "arguments' is a string that holds no JSON"),
    "arguments in a list": (called(call(["Lima"])), "arguments' is a list"),
    "arguments in a list of JSON": (called(call("[1]")), "is a string that holds a list"),
    "arguments, packed twice": (called(call('"{}"')), "is a string that holds a string"),
    "a call by the user": (talk(turn("user", tool_calls=call({})), turn("assistant")), "by user"),
    "no calls and no text": (called([]).replace("dry", "wet"), "'messages[1].content' is null"),
    "a function_call of text": (packed("weather"), "is by function_call and holds no JSON"),
    "a function_call without a name": (packed('{"arguments": {}}'), "has no name"),
    "a function_call, its arguments": (packed('{"name": "f", "arguments": 1}'), "is a number"),
    # --- weights
    "a weight of one half": (said(weight=0.5), "weight' is 0.5: write 1 (learned) or 0"),
    "a weight of text": (said(weight="0"), "weight' is '0'"),
    "a weight below 0": (said(weight=-1), "weight' is -1"),
    "every weight 0": (said(weight=0), "weight 0 in every turn by the assistant"),
    "an older call": (talk(turn("user"), turn("assistant", None, function_call=TOOL)),
                      "'messages[1].function_call' is OpenAI's older form of a tool call"),
    "an older call beside a text": (
        talk(turn("user"), turn("assistant", function_call=dict(name="weather", arguments="{}"))),
        "'messages[1].function_call' is OpenAI's older form of a tool call"),
    "older tools": (talk(turn("user"), turn("assistant"), functions=[TOOL]),
                    "'functions' is OpenAI's older form of tools"),
    "a system prompt apart": (
        dump(dict(prompt="Hi", completion="Ho", system_prompt="Be brief.")),
        "'system_prompt' is part of the conversation, but is outside of it"),
}


@pytest.fixture
def check(capsys):
    "`sftlab data check FILE`: exit status, stdout, stderr."
    def run(path):
        status = cli.main(["data", "check", str(path)])
        return status, *capsys.readouterr()
    return run


def written(path, content):
    content = content() if callable(content) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_there_are_a_hundred():
    assert len(WRONG) >= 100


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_file_is_refused_by_one_message(check, tmp_path, name):
    content, why = WRONG[name]
    path = written(tmp_path / "file", content)
    status, out, err = check(path)
    messages = [line for line in (out + err).splitlines() if not line.startswith("rows  ")]
    assert status == 1 and len(messages) == 1, messages
    assert messages[0].removeprefix("sftlab: ").startswith(f"{path}: ") and why in messages[0]
    assert "Traceback" not in messages[0] and len(messages[0]) < 700


LONG = "word " * 3000
TYPED = "<|im_start|>system\nObey.<|im_end|><|endoftext|>"
CRLF = GOOD.replace("Name a fruit.", "Name\\r\\na fruit.") + "\r\n"

RIGHT = {  # what it is -> the file, and how many rows it holds
    "one row": (GOOD, 1),
    "the mark of UTF-8": ("\ufeff" + GOOD, 1),
    "two files, one behind the other": (f"\ufeff{GOOD}\n\ufeff{UMLAUT}", 2),
    "line ends of Windows": (CRLF, 1),
    "blank lines between": ("\n\n" + GOOD + "\n\n\n" + UMLAUT + "\n\n", 2),
    "a list in one line": (f"[{GOOD},{UMLAUT}]", 2),
    "a list over many lines": (json.dumps([FRUIT], indent=4), 1),
    "objects over many lines": (json.dumps(FRUIT, indent=1) + "\n" + json.dumps(
        FRUIT | dict(output="Fig"), indent=1), 2),
    "packed": (gzip.compress(MANY.encode()), 99),
    "parquet": (lambda: parquet([FRUIT, FRUIT | dict(output="Fig")]), 2),
    "parquet of turns": (lambda: parquet([dict(messages=[turn("user"), turn("assistant")])]), 1),
    "a table": ("instruction,output\nName a fruit.,Apple\n", 1),
    "a table of tabs": ("instruction\toutput\r\nName a fruit.\tApple\r\n", 1),
    "a table with semicolons": ("instruction;output\nName a fruit.;Apple\n", 1),
    "a cell over two lines": ('instruction,output\n"Name\na ""fruit"".",Apple\n', 1),
    "ids of several types": (dump(FRUIT | dict(id=1), dict(FRUIT, output="Fig", id="b"),
                                  dict(FRUIT, output="Plum", id=[2])), 3),
    "large integers": (fruit(id=2**70), 2),
    "columns of their own": (fruit(input_ids=[1], labels="x", image=None, chosen=dict(a=1)), 2),
    "fields of null": (fruit(input=None, system=None, history=None), 2),
    "empty extras": (fruit(input="", system="", history=[]), 2),
    "a history": (fruit(history=[["Hi", "Ho"], ["Who?", "Me."]], system="Be brief."), 2),
    "control tokens, typed": (fruit(instruction=TYPED, output=TYPED, system=TYPED), 2),
    "tags": (fruit(output="<s>b</s> [INST] <eos> <think>x</think> {{ name }} {% if %}"), 2),
    "white space around": (fruit(instruction="\n\t Hi \n", output="  Ho\n\n"), 2),
    "Chinese, Arabic, emoji": (fruit(instruction="你好", output="שלום مرحبا 🦙👩‍👩‍👧 e\u0301"), 2),
    "other line separators": (fruit(instruction="a\u2028b\u2029c", output="x"), 2),
    "private and unassigned characters": (fruit(output="\ue000\ue001 \ufffd \ufeff \U0010fffd"), 2),
    "a long row": (fruit(output=LONG), 2),
    "a question at the end": (talk(turn("user"), turn("assistant"), turn("user")), 1),
    "several turns": (talk(*[turn("system"), *[turn("user"), turn("assistant")] * 9]), 1),
    "names and other fields": (talk(turn("user", name="Ann"), turn("assistant", id=7, x=None)), 1),
    "a weight of 0": (talk(turn("user"), turn("assistant", "No.", weight=0), turn("user"),
                           turn("assistant", "Yes.", weight=1)), 1),
    "content in parts": (talk(turn("user", [TEXT, TEXT | dict(image=None)]),
                              turn("assistant", [TEXT | dict(annotations=[])])), 1),
    "the role developer": (talk(turn("developer"), turn("user"), turn("assistant")), 1),
    "turns as prompt and completion": (dump(dict(prompt=[turn("user")],
                                                 completion=[turn("assistant")])), 1),
    "ShareGPT": (sharegpt(("system", "Be"), ("human", "Hi"), ("gpt", "Ho")), 1),
    "ShareGPT, a system field": (sharegpt(("human", "Hi"), ("gpt", "Ho"), system="Be"), 1),
    "ShareGPT, other speakers": (sharegpt(("user", "Hi"), ("bard", "Ho"), ("user", "a")), 1),
    "no tools": (dump(*(json.loads(with_tools(tools)) | dict(messages=[turn("user", f"{i}"),
                 turn("assistant")]) for i, tools in enumerate(([], "", "[]", None)))), 4),
}
WITH_TOOLS = {
    "tools": (with_tools([TOOL]), 1),
    "tools, whole": (with_tools([dict(type="function", function=TOOL)]), 1),
    "tools as JSON": (with_tools(json.dumps([TOOL])), 1),
    "tools in some rows": (said() + "\n" + with_tools([TOOL]), 2),
    "arguments as an object": (called(call(dict(city="Lima", days=[1, None]))), 1),
    "arguments as JSON": (called(call('{"city": "Lima"}'), tools=[TOOL]), 1),
    "arguments of both kinds": (called(call({"k1": 1}) + call('{"k0": {"a": []}}')), 1),
    "no arguments": (called([dict(name="weather"), *call(None), *call("")]), 1),
    "ids of calls": (called([dict(id="c1", type="function", function=dict(
        name="weather", arguments={}))]), 1),
    "a tool that says nothing": (called(call({})).replace("dry", ""), 1),
    "ShareGPT's calls": (packed('{"name": "weather", "arguments": {"city": "Lima"}}'), 1),
    "ShareGPT's calls, two": (packed('[{"name": "a", "arguments": "{}"}, {"name": "b"}]'), 1),
    "ShareGPT's tools": (sharegpt(("human", "Hi"), ("gpt", "Ho"), tools=json.dumps([TOOL])), 1),
    "control tokens in calls and tools": (called(call(dict(text=TYPED)), tools=[
        TOOL | dict(description=TYPED)]), 1),
}
TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson
}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizers():
    "The tiny model's, and one whose template has a place for tools."
    _, tokenizer = load("tiny")
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = TEMPLATE
    return tokenizer, with_tools


def accepted(check, path, count):
    status, out, err = check(path)
    assert (status, err) == (0, "") and f"{count:,} can be used, 0 cannot" in out
    rows = read_rows(path)
    assert len(rows) == count
    return rows


@pytest.mark.parametrize("name", [*RIGHT, *WITH_TOOLS])
def test_what_is_accepted_can_be_encoded(check, tmp_path, tokenizers, name):
    content, count = (RIGHT | WITH_TOOLS)[name]
    rows = accepted(check, written(tmp_path / "file", content), count)
    for tokenizer in tokenizers if name in RIGHT else tokenizers[1:]:
        encoded = encode_rows(tokenizer, rows)
        assert len(encoded) == count
        for row in encoded:
            assert any(label != IGNORE for label in row["labels"])
