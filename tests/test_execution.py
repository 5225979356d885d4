"""Programs that a model might write, run: each gets a named outcome, and nothing of it is left."""
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftlab import confinement
from sftlab.errors import DataError, SftlabError
from sftlab.execution import OUTCOMES, check_many, check_solution, harmless, run_program

LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs run on Linux and macOS only")
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n"
RIGHT = "def f(x):\n    return x + 1\n"


def census(place):
    "Processes of cages whose folder is in `place`."
    found = []
    for process in psutil.process_iter():
        try:
            if str(place) in " ".join(process.cmdline()) or str(place) in process.cwd():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def cage():
    "What this system cannot enforce; skips where programs cannot be run at all."
    try:
        return run_program("pass", seconds=30).unprotected
    except SftlabError as error:
        pytest.skip(str(error))


@pytest.fixture
def clean(tmp_path, monkeypatch, cage):
    "Folders of runs are made here; afterwards neither one of them nor a process is left."
    if {"files outside", "network"} & set(cage):
        pytest.skip(f"this system does not enforce: {', '.join(cage)}")
    place = tmp_path / "runs"
    place.mkdir()
    for folder in (place, *tmp_path.parents):
        if folder == place or folder.name.startswith("pytest-"):
            folder.chmod(0o755)  # a user of its own has to get there
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == [], "files are left"
    assert census(place) == [], "processes are left"


@pytest.fixture
def decoy(tmp_path, monkeypatch):
    "A home with secrets, and a secret in the environment."
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_rsa").write_text("SECRET-KEY")
    (home / "token").write_text("SECRET-TOKEN")
    for path in (home / ".ssh" / "id_rsa", home / "token"):
        path.chmod(0o644)  # as careless as can be: only the cage protects them
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "SECRET-ENV")
    return home


# Each: what it does, the outcomes that are right, the program. HOME and PARENT are filled in.
ATTACKS = {
    "an endless loop": ("timed out", "while True: pass"),
    "a fork bomb": ("too many processes, timed out", "import os\nwhile True: os.fork()"),
    "a fork bomb that goes on": ("timed out", """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass"""),
    "a list of 10 GB": ("out of memory", "x = [0] * (10 * 2**30 // 8)"),
    "memory bit by bit": ("out of memory", "x = []\nwhile True: x.append(bytearray(2**20))"),
    "memory in many processes": ("out of memory", """
        import os, time
        for _ in range(6):
            if os.fork() == 0:
                break
        x = bytes(range(256)) * (40 * 4096)
        time.sleep(60)"""),
    "an endless print": ("too much output", "while True: print('spam' * 100)"),
    "os._exit(0)": ("left early", "import os; os._exit(0)"),
    "SIGTERM ignored": ("timed out", """
        import signal, time
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        while True: time.sleep(1)"""),
    "a key in the learner's home": ("blocked", "print(open('HOME/.ssh/id_rsa').read())"),
    "a list of the learner's home": ("blocked", "import os; print(os.listdir('HOME'))"),
    "a file outside, written": ("blocked", "open('HOME/mark', 'w').write('x')"),
    "a file outside, emptied": ("blocked", "import os; os.truncate('HOME/token', 0)"),
    "a file outside, removed": ("blocked", "import os; os.remove('HOME/token')"),
    "a file outside, renamed": ("blocked", "import os; os.rename('HOME/token', 'mine')"),
    "a file outside, linked": ("blocked", "import os; os.link('HOME/token', 'mine'); open('mine')"),
    "permissions outside": ("blocked", "import os; os.chmod('HOME/token', 0)"),
    "a time outside": ("blocked", "import os; os.utime('HOME/token', (0, 0))"),
    "a symlink out of the folder": ("blocked", """
        import os
        os.symlink('HOME/token', 'mine')
        print(open('mine').read())"""),
    "up by dots": ("blocked", "print(open('../' * 20 + 'HOME/token').read())"),
    "a socket": ("blocked", "import socket; socket.create_connection(('127.0.0.1', 22))"),
    "a unix socket": ("blocked", "import socket; socket.socket(socket.AF_UNIX)"),
    "a name looked up": ("blocked", "import socket; socket.getaddrinfo('example.org', 80)"),
    "a page": ("failed", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000')"),
    "another program": ("blocked", "import subprocess; subprocess.run(['/bin/sh', '-c', 'id'])"),
    "os.system": ("failed", "import os; assert os.system('touch HOME/mark') == 0"),
    "its parent killed": ("killed itself, timed out, blocked, failed, passed", """
        import os
        os.kill(os.getppid(), 9)"""),
    "everybody killed": ("killed itself, timed out, blocked, failed, passed", """
        import os
        os.kill(-1, 9)"""),
    "the learner's process killed": ("failed, blocked", "import os; os.kill(PARENT, 9)"),
    "itself killed": ("killed itself", "import os; os.kill(os.getpid(), 9)"),
    "deep recursion": ("failed", "def f(n): return f(n + 1)\nf(0)"),
    "very deep recursion": ("failed, crashed, timed out, out of memory", """
        import sys
        sys.setrecursionlimit(10**9)
        def f(n): return [f(n + 1)]
        f(0)"""),
    "reading what is not there": ("failed", "input()"),
    "a daemon": ("passed", """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(60):
                    try: os.close(fd)
                    except OSError: pass
                time.sleep(60)
            os._exit(0)"""),
    "a daemon that keeps the output": ("passed", """
        import os, signal, time
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        import sys
        sys.stdout.flush()"""),
    "a full disk": ("too much disk", """
        for i in range(10_000):
            with open(f'f{i}', 'wb') as file:
                file.write(b'x' * 2**20)"""),
    "a large file": ("too much disk", """
        with open('f', 'wb') as file:
            while True:
                file.write(b'x' * 2**20)"""),
    "files without names": ("too much disk, out of memory, too many files", """
        import os
        kept = []
        while True:
            file = open('f', 'wb')
            os.remove('f')
            file.write(b'x' * 2**20)
            kept.append(file)"""),
    "a million files": ("too much disk", "for i in range(10**6): open(f'f{i}', 'w').close()"),
    "many files open": ("too many files", "x = [open('f', 'w') for _ in range(1000)]"),
    "folders in folders": ("too much disk", """
        import os
        while True:
            os.mkdir('d')
            os.chdir('d')"""),
    "a folder without permissions": ("passed", """
        import os
        os.makedirs('a/b')
        os.mkdir('c', 0)"""),
    "a segfault": ("crashed", "import ctypes; ctypes.string_at(0)"),
    "threads that never end": ("timed out", """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()"""),
    "a thousand threads": ("too many processes", """
        import threading, time
        for _ in range(1000):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"""),
    "stdout closed": ("passed", "import os, sys; sys.stdout.close(); os.close(1); os.close(2)"),
    "every file closed": ("left early", "import os; os.closerange(0, 1000)"),
    "atexit": ("timed out", "import atexit, time; atexit.register(time.sleep, 60)"),
    "an exit code at the end": ("left early", "import atexit, os; atexit.register(os._exit, 3)"),
    "__del__": ("timed out", """
        import time
        class A:
            def __del__(self): time.sleep(60)
        a = A()"""),
    "another process, read": ("blocked", "print(open('/proc/PARENT/environ').read())"),
    "another process's memory": ("blocked", "open('/proc/PARENT/mem', 'rb').read(1)"),
    "its judge's memory": ("blocked", """
        import os
        open(f'/proc/{os.getppid()}/mem', 'rb').read(1)"""),
    "the environment": ("passed", "import os; print(dict(os.environ))"),
    "the shared memory of all": ("blocked", "open('/dev/shm/sftlab-test', 'w')"),
    "a group killed": ("killed itself", "import os; os.kill(0, 9)"),
    "itself stopped": ("timed out", "import os; os.kill(os.getpid(), 19)"),
    "a pipe by name": ("blocked", "import os; os.mkfifo('pipe'); open('pipe')"),
    "a huge power": ("timed out", "10 ** 10 ** 9"),
    "a slow pattern": ("timed out", "import re; re.match('(a+)+$', 'a' * 60 + 'b')"),
    "shared memory": ("blocked", """
        from multiprocessing import shared_memory
        shared_memory.SharedMemory('sftlab', create=True, size=10)"""),
    "memory as a file": ("blocked", "import os; os.memfd_create('x')"),
    "a device": ("blocked", "open('/dev/tty', 'w')"),
    "root again": ("blocked", "import os; os.setuid(0); open('/etc/shadow')"),
    "limits lifted": ("failed", """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"""),
    "the learner's limits": ("blocked, failed", """
        import resource
        resource.prlimit(PARENT, resource.RLIMIT_CPU, (0, 0))"""),
    "limits read": ("passed", "import resource; resource.getrlimit(resource.RLIMIT_AS)"),
    "a user namespace": ("failed", """
        import ctypes, os
        number = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]
        made = ctypes.CDLL(None).syscall(number, 0x10000011, 0, 0, 0, 0)
        assert made == 0, 'refused'"""),
    "no Python": ("failed", "this is ( not Python"),
    "a null byte": ("failed", "x = 1\0"),
    "deep source": ("failed, out of memory, crashed", "(" * 10_000 + ")" * 10_000),
    "an exception that lies": ("failed, timed out", """
        class E(Exception):
            def __str__(self): raise E
        raise E"""),
}


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="what macOS can enforce is less; its results say so")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_has_a_name_and_leaves_nothing(name, clean, decoy):
    outcomes, source = ATTACKS[name]
    source = textwrap.dedent(source).replace("HOME", str(decoy)).replace("PARENT", str(os.getpid()))
    seconds = 0.5 if "timed out" in outcomes else 20
    memory_mb = 128 if "memory" in outcomes else 512
    found = run_program(source, seconds=seconds, memory_mb=memory_mb)
    allowed = outcomes.split(", ")
    if found.unprotected:  # where there are no namespaces: no child processes
        allowed += ["too many processes", "blocked", "timed out"]
    assert found.outcome in OUTCOMES and found.outcome in allowed, found
    assert "SECRET" not in found.output + found.reason
    assert bool(found.reason) == (found.outcome != "passed")
    assert len(found.reason.splitlines()) <= 1 and found.seconds < 20
    assert (decoy / "token").read_text() == "SECRET-TOKEN"
    assert sorted(os.listdir(decoy)) == [".ssh", "token"]
    assert (decoy / "token").stat().st_mode & 0o777 == 0o644


CHEATS = {
    "left while loading": ("left early", "import os; os._exit(0)"),
    "left while called": ("left early", "import os\ndef f(x): os._exit(0)"),
    "sys.exit while loading": ("left early", "import sys; sys.exit()"),
    "sys.exit while called": ("left early", "import sys\ndef f(x): sys.exit(0)"),
    "an own AssertionError": ("failed", """
        import builtins
        builtins.AssertionError = type('Quiet', (), {})
        def f(x): pass"""),
    "own comparisons in operator": ("failed", """
        import builtins, operator
        operator.eq = lambda a, b: True
        builtins.all = builtins.any = builtins.bool = lambda *a: True
        def f(x): return 0"""),
    "an own check": ("failed", "def check(candidate): pass\ndef f(x): pass"),
    "equal to everything": ("failed", """
        class Equal:
            def __eq__(self, other): return True
        def f(x): return Equal()"""),
    "an integer equal to everything": ("failed", """
        class Equal(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        def f(x): return Equal(7)"""),
    "code in a pickle": ("failed", """
        class A:
            def __reduce__(self): return eval, ('print("pwned")',)
        def f(x): return A()"""),
    "a class changed by a pickle": ("failed", """
        import pickle, os, struct
        def f(x):
            data = b'\\x80\\x04cbuiltins\\nint\\n}\\x8c\\x06__eq__cbuiltins\\nset\\nsb.'
            for fd in range(3, 64):
                try: os.write(fd, struct.pack('=Q', len(data)) + data)
                except OSError: pass"""),
    "rubbish in every file": ("failed", """
        import os
        def f(x):
            for fd in range(3, 100):
                try: os.write(fd, b'[\\"token\\", \\"passed\\", \\"\\"]\\n' * 10)
                except OSError: pass
            return 0"""),
    "a huge answer": ("failed", """
        import os, struct
        def f(x):
            for fd in range(3, 100):
                try: os.write(fd, struct.pack('=Q', 2**62))
                except OSError: pass
            return 0"""),
    "a search for the token": ("failed", """
        import gc, json, os, sys
        found = [o for o in gc.get_objects() if isinstance(o, dict) and 'token' in o]
        def f(x):
            frame, names = sys._getframe(), []
            while frame:
                names += [n for n in frame.f_locals if n in ('secret', 'token', 'test')]
                names += [v for v in frame.f_locals.values()
                          if isinstance(v, dict) and {'token', 'test'} & set(v)]
                frame = frame.f_back
            raise ValueError(f'{len(found)} objects, {len(names)} names')"""),
    "its own memory as a file": ("blocked", """
        def f(x):
            memory = open('/proc/self/mem', 'rb')"""),
    "the judge killed": ("failed, blocked", """
        import os
        def f(x):
            os.kill(os.getppid(), 9)
            return 0"""),
    "the judge stopped": ("failed, blocked", """
        import os, signal
        def f(x):
            os.kill(os.getppid(), signal.SIGSTOP)
            return 0"""),
    "the judge's limits": ("blocked", """
        import os, resource
        def f(x):
            resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
            return 0"""),
    "an answer before it is asked": ("failed", """
        import os, pickle, struct
        data = pickle.dumps(('ended', {'f': ('module', 'antigravity')}))
        os.write(61, struct.pack('=Q', len(data)) + data)
        def f(x): pass"""),
    "a message of no known form": ("failed", """
        import os, pickle, struct
        data = pickle.dumps(5)
        os.write(61, struct.pack('=Q', len(data)) + data)
        def f(x): pass"""),
    "an outcome of its own": ("failed", """
        import os, pickle, struct
        data = pickle.dumps(('raised', 'passed', 'x' * 10**6))
        os.write(61, struct.pack('=Q', len(data)) + data)
        def f(x): pass"""),
    "silence": ("timed out", """
        import os, time
        def f(x):
            os.closerange(3, 100)
            time.sleep(60)"""),
    "no such function": ("failed", "g = 1"),
    "not a function": ("failed", "f = 2"),
    "an endless generator": ("failed", "def f(x):\n    while True: yield 2"),
    "an exception that ends a loop": ("failed", "def f(x): raise StopIteration"),
    "an exception nobody has": ("failed", """
        class E(BaseException): pass
        def f(x): raise E"""),
    "an interrupt": ("failed", "def f(x): raise KeyboardInterrupt"),
    "an exception that leaves in its words": ("failed, left early", """
        import os
        class E(Exception):
            def __str__(self): os._exit(0)
        def f(x): raise E"""),
}


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="what macOS can enforce is less; its results say so")
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(name, clean):
    outcomes, source = CHEATS[name]
    seconds = 0.5 if "timed out" in outcomes else 20
    found = check_solution(textwrap.dedent(source), CHECK, "f", seconds=seconds)
    assert not found and found.outcome in outcomes.split(", "), found
    assert found.reason and "pwned" not in found.output


def test_a_search_for_the_token_finds_nothing(clean):
    found = check_solution(textwrap.dedent(CHEATS["a search for the token"][1]), CHECK, "f")
    assert "ValueError: 0 objects, 0 names" in found.reason


SWALLOWS = """
def check(candidate):
    try:
        candidate(1)
    except BaseException:
        pass
    try:
        candidate(1)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("source", ["import os\ndef f(x): os._exit(0)",
                                    "import sys\ndef f(x): sys.exit(0)",
                                    "class A: pass\ndef f(x): return A()"])
def test_a_test_that_catches_everything_cannot_be_left(source, clean):
    assert not check_solution(source, SWALLOWS, "f")
    assert check_solution("def f(x): raise ValueError", SWALLOWS, "f")


def test_a_loop_is_not_ended_by_the_program(clean):
    test = "def check(candidate):\n    assert all(map(lambda x: candidate(x) == x + 1, [1, 2]))"
    assert check_solution(RIGHT, test, "f")
    assert not check_solution("def f(x): raise StopIteration", test, "f")


@pytest.mark.parametrize("test", ["import os; os._exit(0)", "import sys; sys.exit()",
                                  "raise KeyboardInterrupt", "assert False", "not ( Python"])
def test_tests_that_do_not_end_do_not_pass(test, clean):
    assert not check_solution(RIGHT, test)
    assert not check_solution(RIGHT, f"def check(candidate): pass\n{test}", "f")


RIGHT_ONES = {
    "asserts only": (RIGHT, "assert f(1) == 2 and f(-1) == 0", None),
    "a function for the tests": (RIGHT, CHECK, "f"),
    "an argument changed": ("def f(x): x.sort(); x.append(9)",
                            "x = [3, 1]\nassert f(x) is None and x == [1, 3, 9]", None),
    "a dictionary changed": ("def f(x): x.pop('a')", "x = {'a': 1}\nf(x)\nassert x == {}", None),
    "an error asked for": ("def f(x): raise KeyError('no')", """
try:
    f(1)
except KeyError as error:
    assert "no" in str(error)
else:
    assert False""", None),
    "helpers of the program": ("import math\nTEN = 10\ndef g(x): return x\ndef f(x): return x",
                               "assert math.floor(f(1.5)) == 1 and g(TEN) == 10", None),
    "a Counter": ("from collections import Counter\ndef f(x): return Counter(x)",
                  "assert f('aab') == {'a': 2, 'b': 1}", None),
    "a named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
                      "def f(): return P(1, 2)", "assert f() == (1, 2)", None),
    "all kinds of values": ("def f(x): return x", """
for x in (None, True, 1, 10 ** 5000, 1.5, 2j, "s\\ud800", b"b", (1, [2, {3}]), {4: {"a": 5}},
          range(3), frozenset({1}), bytearray(b"x"), float("inf"), slice(1, 2)):
    assert f(x) == x and type(f(x)) is type(x)""", None),
    "one that removes itself": ("def f(x):\n    globals().pop('f', 0)\n    return x + 1", CHECK,
                                "f"),
    "threads": ("from concurrent.futures import ThreadPoolExecutor as Pool\nwith Pool(4) as pool:\n"
                "    n = sum(pool.map(abs, [1, -1]))\ndef f(x): return x + n - 1", CHECK, "f"),
    "files of its own": ("open('a', 'w').write('1')\n"
                         "def f(x): return x + int(open('a').read())", CHECK, "f"),
    "a process begun": ("import os\ndef f(x):\n    os.fork()\n    return x + 1", CHECK, "f"),
    "it prints": ("print('load')\ndef f(x): print('call'); return x + 1", CHECK, "f"),
    "its own __name__": ("def f(x): return x + (__name__ == '__main__')", CHECK, "f"),
    "names like a builtin's": ("def sum(x): return 0\ndef f(x): return x + 1",
                               "assert sum([1, 2]) == 3 and f(1) == 2", None),
    "keyword arguments": ("def f(x, *, y=1): return x + y", "assert f(x=1, y=4) == 5", None),
    "state between calls": ("n = 0\ndef f():\n global n\n n += 1\n return n",
                            "assert [f(), f(), f()] == [1, 2, 3]", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT_ONES)
def test_a_right_solution_passes(name, clean):
    program, test, entry_point = RIGHT_ONES[name]
    found = check_solution(program, test, entry_point, seconds=20)
    if found.unprotected and found.outcome == "too many processes":
        pytest.skip("this system allows no processes or threads")
    assert found, found
    assert found.reason == ""


def test_what_was_printed_comes_back_harmless(clean):
    source = ("import sys\nprint(input())\nprint('\\x1b[2J\\u202e', file=sys.stderr)\n"
              "print('\\r\\x07\\x9b')")
    found = run_program(source, stdin="Grüße 你好\n")
    assert found.output == "Grüße 你好\n\\x1b[2J\\u202e\n\\r\\x07\\x9b\n"
    found = run_program("raise ValueError('\\x1b[2J\\n\\u2028' + 'x' * 10_000)")
    assert found.reason.isprintable() and "\\x1b[2J" in found.reason and len(found.reason) < 400


def test_much_output_is_cut_off(clean):
    found = run_program("import sys\nwhile True: sys.stdout.write('\\x1b' * 10_000)", seconds=10)
    assert found.outcome == "too much output" and set(found.output) == set("\\x1b")
    assert len(found.output) == 4 * 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.thorough)])
def test_humaneval(step, real_data, clean, record_property):
    "Every fourth task, or each: its solution passes, and doing nothing does not."
    rows = [json.loads(line) for line in gzip.open(real_data / "HumanEval.jsonl.gz", "rt")][::step]
    began = time.perf_counter()
    for body, right in (("canonical_solution", True), (None, False)):
        items = [(row["prompt"] + (row[body] if body else "    pass\n"), row["test"],
                  row["entry_point"]) for row in rows]
        found = check_many(items, seconds=20)
        wrong = {r["task_id"]: e for r, e in zip(rows, found) if bool(e) is not right}
        assert len(found) == 164 // step and wrong == {}
    record_property("seconds", time.perf_counter() - began)


def test_many_come_back_in_order(clean):
    sources = [f"def f(x): return x + {n % 2}" for n in range(6)]
    found = check_many([(source, CHECK, "f") for source in sources], workers=3)
    assert [bool(e) for e in found] == [False, True] * 3
    assert check_many([]) == []


# --- systems that can enforce less

WEAKER = """
import ctypes, json, os, struct, sys
from sftlab import confinement
calls = {"unshare": ((272, 97),), "landlock": ((444, 444),), "setuid": ((105, 146), (106, 144))}
refused = {n: n for name in sys.argv[1].split(",") for n in calls[name]}
code = confinement._filter(os.uname().machine, refused)
buffer = ctypes.create_string_buffer(code, len(code))
confinement._prctl(confinement.NO_NEW_PRIVS, 1)
program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
confinement._prctl(confinement.SET_SECCOMP, 2, ctypes.c_char_p(program))

from sftlab.errors import SftlabError
from sftlab.execution import check_solution, run_program
decoy = sys.argv[2]
programs = dict(
    right="print(1)", bomb="import os\\nwhile True: os.fork()",
    daemon="import os, time\\nif os.fork() == 0:\\n os.setsid()\\n time.sleep(99)",
    parent="import os; os.kill(os.getppid(), 9)", all="import os; os.kill(-1, 9)",
    read=f"print(open({decoy!r}).read())", write=f"open({decoy!r}, 'w')",
    environ=f"open('/proc/{os.getpid()}/environ').read()",
    socket="import socket; socket.socket()",
    limit=f"import resource; resource.prlimit({os.getpid()}, resource.RLIMIT_CPU, (0, 0))",
    disk="for i in range(10**6): open(f'f{i}', 'wb').write(b'x' * 2**20)")
try:
    ended = {name: run_program(source, seconds=2) for name, source in programs.items()}
    check = "def check(candidate):\\n    assert candidate(1) == 2"
    ended["solution"] = check_solution("def f(x): return x + 1", check, "f")
    ended["killer"] = check_solution("import os\\ndef f(x): os.kill(os.getppid(), 9)", check, "f")
except SftlabError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps({n: [e.outcome, e.output, e.unprotected] for n, e in ended.items()}))
"""
ROOT_ONLY = ("setuid",)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["unshare", "landlock", "setuid", "unshare,landlock"])
def test_where_less_can_be_enforced_it_is_said_or_refused(missing, clean, decoy):
    if os.uname().machine not in confinement.MACHINES or not LINUX:
        pytest.skip("takes calls of the system away, which is done on Linux")
    if missing in ROOT_ONLY and os.geteuid() != 0:
        pytest.skip("only root can be another user")
    key = decoy / "token"
    found = subprocess.run([sys.executable, "-c", WEAKER, missing, str(key)], text=True,
                           capture_output=True, env={**os.environ, "TMPDIR": str(clean)})
    assert found.returncode == 0, found.stderr
    ended = json.loads(found.stdout)
    assert key.read_text() == "SECRET-TOKEN"
    if isinstance(ended, str):
        assert "cannot be run safely" in ended and "landlock" in missing
        return
    named = {"unshare": "own process space", "landlock": "files outside", "setuid": "another user"}
    assert all(set(e[2]) >= {named[m] for m in missing.split(",")} for e in ended.values())
    assert ended["right"][:2] == ["passed", "1\n"] and ended["solution"][0] == "passed"
    assert ended["killer"][0] != "passed"
    assert ended["bomb"][0] in ("too many processes", "out of memory", "timed out")
    assert ended["write"][0] == ended["environ"][0] == ended["socket"][0] == "blocked"
    assert ended["disk"][0] == "too much disk" and ended["limit"][0] == "blocked"
    assert ("landlock" in missing) or ended["read"][0] == "blocked"


def test_nothing_is_missing_for_root_with_its_rights(cage):
    if not LINUX or subprocess.run(["unshare", "-pnmi", "-f", "true"]).returncode:
        pytest.skip("not root with CAP_SYS_ADMIN on Linux")
    missing = set(cage) - (set() if confinement._landlock_version() else {"files outside"})
    assert missing == set()


# --- the process that asked ends

ASKS = "from sftlab.execution import run_program; run_program('while True: pass', seconds=60)"


@pytest.mark.slow
def test_what_runs_ends_with_the_process_that_asked(clean):
    asks = subprocess.Popen([sys.executable, "-c", ASKS], env={**os.environ, "TMPDIR": str(clean)})
    wait_for(lambda: len(census(clean)) >= 3)
    asks.kill()
    asks.wait()
    wait_for(lambda: census(clean) == [])
    for folder in clean.iterdir():
        folder.rmdir()  # empty


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(clean):
    asks = subprocess.Popen([sys.executable, "-c", ASKS], stderr=subprocess.PIPE,
                            env={**os.environ, "TMPDIR": str(clean)})
    wait_for(lambda: len(census(clean)) >= 3)
    asks.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in asks.communicate(timeout=30)[1]


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# --- arguments, and small parts

@pytest.mark.parametrize("wrong, said", [
    (dict(source=b"pass"), "source is bytes"), (dict(stdin=None), "stdin is NoneType"),
    (dict(seconds=0), "seconds is 0"), (dict(seconds=float("nan")), "seconds is nan"),
    (dict(seconds=True), "seconds is True"), (dict(memory_mb=1), "memory_mb is 1"),
    (dict(memory_mb=1.5), "memory_mb is 1.5")])
def test_wrong_arguments_are_refused(wrong, said):
    with pytest.raises(DataError, match=said):
        run_program(**{"source": "pass", **wrong})


def test_wrong_tests_are_refused():
    with pytest.raises(DataError, match="never calls it"):
        check_solution(RIGHT, CHECK)
    with pytest.raises(DataError, match="leave entry_point out"):
        check_solution(RIGHT, "assert f(1) == 2", "f")
    with pytest.raises(DataError, match="test is NoneType"):
        check_solution("pass", None)
    with pytest.raises(DataError, match="workers is 0"):
        check_many([], workers=0)


def test_it_loads_quickly():
    source = ("import sys, sftlab.execution; heavy = {'torch', 'numpy', 'psutil', 'tqdm'}\n"
              "print([m for m in heavy if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


@settings(max_examples=50)
@given(st.text())
def test_harmless_text_is_what_a_terminal_can_show(text):
    shown = harmless(text)
    assert harmless(shown) == shown
    for letter in shown.replace("\n", "").replace("\t", ""):
        assert ord(letter) >= 32 and not 127 <= ord(letter) < 160
        assert letter not in "\u061c\u200e\u200f\u2028\u2029\ufeff"
        assert not "\u202a" <= letter <= "\u202e" and not "\u2066" <= letter <= "\u2069"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10)


@settings(max_examples=40)
@given(plain)
def test_plain_data_comes_through_unchanged(value):
    channel = confinement.Channel(*os.pipe())
    channel.send(value)
    back = channel.receive()
    assert back == value and repr(back) == repr(value)
    os.close(channel.writing)
    channel.reading.close()


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_rubbish_in_the_channel_is_refused_or_plain(data):
    reading, writing = os.pipe()
    os.write(writing, len(data).to_bytes(8, sys.byteorder) + data)
    os.close(writing)
    channel = confinement.Channel(reading, None)
    try:
        channel.receive()
    except confinement.Gone:
        pass
    channel.reading.close()
