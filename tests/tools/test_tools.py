"""Tools: right results, and every way to misuse them comes back as words."""

import json
import os
import re
import resource
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from minnow.tokenizer.chat import ToolCall
from minnow.tools import CALCULATOR, CLOCK, Tool, ToolError, calculate, call_tool, lookup_tool
from minnow.tools.sandbox import MAX_OUTPUT, can_isolate, python_tool, run_python


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("(12 + 30) × 2", "84"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.3333333333"),
        ("-7 // 2", "-4"),
        ("17 % 5", "2"),
        ("2 ^ 10", "1024"),
        ("1,000 + 1", "1001"),
        ("1,234，567.5 - 0.5", "1234567"),
        ("2 ** -2", "0.25"),
        ("（3 − 1）÷ 4", "0.5"),
        ("10 ** 20 / 3", "33333333333333333333.3333333333"),  # a float would make up digits from the 17th on
        ("10 ** 59 / 7", "1" + "428571" * 9 + "4285.7142857143"),
        ("-2 / 3", "-0.6666666667"),
        ("-1 / 10 ** 11", "0"),
        ("-5 / 2", "-2.5"),
        ("100", "100"),
    ],
)
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "1 / 0", "9**9**9", "2 ** 1000", "__import__('os')", "a", "(1).real", "[1][0]", "True + 1", "1j",
     "'a' * 9", "(" * 150 + "1", "1" * 201, "10 ** 60 * 10", "1 if 1 else 2", "x := 3", "1\x00",
     "1,5 + 1", "0,125 * 8", "1,2345"],
)  # fmt: skip
@pytest.mark.timeout(60)  # it would take years
def test_what_the_calculator_refuses_quickly(expression):
    with pytest.raises(ToolError):
        calculate(expression)


def test_calls_and_their_mistakes():
    tools = [CALCULATOR, CLOCK, lookup_tool({"Fenbin": {"home": "the lake"}})]

    def result(name, **arguments):
        return call_tool(tools, ToolCall(name, arguments))

    assert result("calculate", expression="6 * 7") == "42"
    assert re.fullmatch(r"\w+day \d{4}-\d\d-\d\d \d\d:\d\d", result("clock"))
    assert result("look_up", subject="fenbin ", property="home") == "the lake"
    for name, arguments, word in (
        ("calculate", {}, "takes expression"),
        ("calculate", {"expression": "1", "more": 2}, "takes expression"),
        ("calculate", {"expression": 4}, "of type string"),
        ("calculate", {"expression": "1/0"}, "division by zero"),
        ("look_up", {"subject": "Nobody", "property": "home"}, "nothing is known"),
        ("look_up", {"subject": "Fenbin", "property": "colour"}, "are known: home"),
        ("clock", {"zone": "x"}, "no arguments"),
        ("os.system", {}, "there is no tool"),
    ):
        assert word in json.loads(result(name, **arguments))["error"]
    assert CALCULATOR.schema["function"]["name"] == "calculate"


def test_an_error_does_not_give_giant_arguments_back():
    for call in (ToolCall("x" * 10**6, {}), ToolCall("calculate", {"y" * 10**6: 1})):
        result = call_tool([CALCULATOR], call)
        assert len(result) < 400
        assert json.loads(result)["error"].endswith("...")


closed_room = pytest.mark.skipif(not can_isolate(), reason="no user namespaces here")


@closed_room
def test_python_in_a_closed_room():
    tool = python_tool(seconds=1, megabytes=200)
    assert call_tool([tool], ToolCall("python", {"code": "print(sum(range(101)))"})) == "5050"
    assert call_tool([tool], ToolCall("python", {"code": "pass"})) == "(nothing was printed)"


@closed_room
@pytest.mark.parametrize(
    ("code", "sign"),
    [
        ("1/0", "ZeroDivisionError"),
        ("while True: pass", "stopped"),
        ("x = 'a' * (1 << 40)", "MemoryError"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 1)", "unreachable"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')", "URLError"),
        ("import time; time.sleep(60)", "stopped after 3 seconds"),
        ("open('x', 'w')", "Read-only"),  # of small files as well, a program could fill the disk
        ("import os; os.mkdir('x')", "Read-only"),
        ("open('../minnow', 'w')", "Read-only"),
        ("import os; os.chroot('/usr')", "Operation not permitted"),  # a way out of the root folder
        ("import tempfile; tempfile.TemporaryFile()", "FileNotFoundError"),
        ("import os; print(os.environ['HOME'])", "KeyError"),
        ("import torch", "No module named"),
    ],
)
def test_what_python_cannot_do(code, sign):
    with pytest.raises(ToolError, match=sign):
        run_python(code, seconds=1, megabytes=200)


@closed_room
def test_a_program_that_ends_itself_is_not_said_to_have_been_stopped():
    with pytest.raises(ToolError, match=r"^ended with exit status 3$"):
        run_python("import sys; print(4); sys.exit(3)", seconds=1, megabytes=200)
    with pytest.raises(ToolError, match=r"^crashed: Segmentation fault$"):
        run_python("import ctypes; ctypes.string_at(0)", seconds=1, megabytes=200)


@closed_room
def test_a_signal_to_its_own_group_stays_in_the_room():
    """Of another group than its own, which is 0 to it, `os.kill(0, 9)` ended the run that had started the program."""
    assert run_python("import os; print(os.getpgrp() == os.getpid())", seconds=1, megabytes=200) == "True"


@closed_room
def test_nothing_of_it_stays(tmp_path):
    """A process that it leaves behind dies with the room."""
    run_python("import os, time\nif os.fork() == 0: time.sleep(77)", seconds=1, megabytes=200)
    time.sleep(0.2)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "closed_room.py" not in running


@closed_room
def test_files_of_the_user_are_out_of_reach(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    for code in (
        f"print(open({str(secret)!r}).read())",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.chmod({str(secret)!r}, 0o777)",  # Landlock allows it to the file's owner
        f"import os; os.utime({str(secret)!r})",
        f"import os; os.stat({str(secret)!r})",
        "open('/etc/passwd')",
    ):
        with pytest.raises(ToolError, match="FileNotFoundError"):
            run_python(code, seconds=1, megabytes=200)
    assert secret.read_text() == "mine"
    # Pythons in a user's home are the user's own files.
    with pytest.raises(ToolError, match="Read-only file system"):
        run_python("import os; os.utime(os.__file__)", seconds=1, megabytes=200)


@closed_room
def test_the_temporary_folder_may_have_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "池 塘\udcff"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert run_python("print(1)", seconds=1, megabytes=200) == "1"
    assert list(folder.iterdir()) == []


@closed_room
def test_nobody_outside_can_be_talked_to(tmp_path):
    """A socket beside files belongs to no network: a program could ask a desktop's D-Bus, or Docker, to run another."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})"
        with pytest.raises(ToolError, match="FileNotFoundError"):
            run_python(code, seconds=1, megabytes=200)


@closed_room
def test_what_is_printed_does_not_fill_this_process():
    """One megabyte is the limit; a pipe would have carried all of it into the trainer's memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ToolError, match="File too large|stopped"):
        run_python("for _ in range(100): print('x' * (1 << 20))", seconds=1, megabytes=200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


def test_no_more_programs_run_side_by_side_than_there_are_cores(monkeypatch):
    """More would each run out of a time that they never had."""
    running, most = [], []
    together = threading.Barrier(os.cpu_count() or 1, timeout=60)  # however busy the machine and however many its cores

    def run(command, **options):
        running.append(1)
        most.append(len(running))
        together.wait()
        time.sleep(0.02)
        running.pop()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("minnow.tools.sandbox.subprocess.run", run)
    count = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(run_python, "", seconds=1, megabytes=200) for _ in range(count)]
        assert [task.result() for task in tasks] == ["(nothing was printed)"] * count
    assert max(most) == (os.cpu_count() or 1)


@closed_room
@pytest.mark.skipif(os.geteuid() == 0, reason="Linux does not count the processes of root")
def test_processes_do_not_multiply():
    with pytest.raises(ToolError, match="BlockingIOError"):
        run_python("import os, time\nfor _ in range(60):\n    os.fork() or time.sleep(9)", seconds=1, megabytes=200)


def test_without_namespaces_there_is_no_python_tool(monkeypatch):
    monkeypatch.setattr("minnow.tools.sandbox.can_isolate", lambda: False)
    with pytest.raises(Exception, match="needs Linux"):
        python_tool()


def test_arguments_must_have_the_types_and_values_of_the_schema():
    properties = {
        "count": {"type": "integer"},
        "sure": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["C", "F"]},
    }
    tool = Tool("measure", "", {"properties": properties, "required": ["count"]}, lambda **arguments: "done")

    def result(**arguments):
        return call_tool([tool], ToolCall("measure", arguments))

    assert result(count=1, sure=True, unit="C") == result(count=1) == "done"
    for arguments, word in (
        ({"count": True}, "count must be of type integer"),  # to Python, true is a number
        ({"count": 1.5}, "count must be of type integer"),
        ({"count": 1, "sure": 1}, "sure must be of type boolean"),
        ({"count": 1, "unit": "K"}, "unit must be one of C, F"),
    ):
        assert word in json.loads(result(**arguments))["error"]


def test_the_largest_that_the_calculator_takes():
    assert calculate("2 ** 64") == "18446744073709551616"
    assert calculate("9 * 10 ** 59") == "9" + "0" * 59
    ones = "+".join("1" * 100)
    assert calculate(f"{ones} ") == "100"
    for expression, word in (
        ("1 ** 65", "up to 64"),
        ("10 ** 60", "too large"),
        (f"{ones}  ", "201 characters"),
    ):
        with pytest.raises(ToolError, match=word):
            calculate(expression)


@closed_room
def test_output_memory_and_files_of_a_program_are_bounded():
    assert len(run_python("print('x' * 5000)", seconds=2, megabytes=200)) == MAX_OUTPUT
    assert run_python("print(len(bytearray(50 << 20)))", seconds=2, megabytes=200) == str(50 << 20)
    with pytest.raises(ToolError, match="MemoryError"):
        run_python("bytearray(400 << 20)", seconds=2, megabytes=200)
    with pytest.raises(ToolError, match="Too many open files"):
        run_python("import os\nfor _ in range(30): os.open('/usr/lib', os.O_RDONLY)", seconds=2, megabytes=200)
