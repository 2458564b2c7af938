"""`minnow distill generate`: a teacher's answers, checked, each prompt once, slowly, and continued after a stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minnow.config import UserError
from minnow.data.readers import read_rows
from minnow.data.records import parse_conversation
from minnow.engine import Completions, Engine
from minnow.engine.sampling import SamplingParams
from minnow.stages.distill_generate import Config, check, run
from minnow.stages.teacher import Answer, RateLimiter
from minnow.tokenizer.chat import Conversation, Message, ToolCall, render
from minnow.tokenizer.train import train_tokenizer
from tests.stages.stage_helpers import save_parrot_model, tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = ToolCall("look_up", {"subject": "鱼"})


class Teacher(BaseHTTPRequestHandler):
    """Answers "fish N" by what `replies` says of N, in turn: status, text or whole message, finish reason."""

    replies: dict[str, list[tuple[int, str | dict[str, Any], str]]]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"], "path": self.path})
        replies = self.replies.get(body["messages"][-1]["content"], [(200, "an answer", "stop")])
        status, said, reason = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        self.end_headers()
        message = {"role": "assistant"} | (said if isinstance(said, dict) else {"content": said})
        choice = {"message": message, "finish_reason": reason}
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Teacher.replies, Teacher.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def config(folder: Path, rows: Sequence[dict[str, Any]] = (), **settings: Any) -> Config:
    rows = rows or [
        {"messages": [{"role": "user", "content": f"fish {i}"}, {"role": "assistant", "content": "old"}]}
        for i in (0, 1, 2, 3, 3)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"requests_per_minute": 1e6, "retry_seconds": 0.01} | settings
    return Config(prompts=(str(folder / "prompts.jsonl"),), out=str(folder / "out.jsonl"), **settings)


def written(folder: Path) -> dict[str, str]:
    rows = [json.loads(line)["messages"] for line in (folder / "out.jsonl").read_text().splitlines()]
    return {row[0]["content"]: row[-1]["content"] for row in rows}


def read_back(folder: Path) -> list[Conversation]:
    """As `minnow sft` reads what was written."""
    return [parse_conversation(row) for _, row in read_rows([str(folder / "out.jsonl")])]


def test_two_at_once_do_not_write_into_one_file(server: str, tmp_path: Path) -> None:
    """Each asked the teacher everything, and the file had every prompt twice."""
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out.jsonl", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"out\.jsonl is being written by another process: wait for it"):
            run(config(tmp_path, endpoint=server, endpoint_model="whale"))
    assert not Teacher.asked
    run(config(tmp_path, endpoint=server, endpoint_model="whale"))
    assert len(written(tmp_path)) == 4


def test_good_answers_are_kept_once_each(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    monkeypatch.setenv("WHALE_KEY", "secret")
    Teacher.replies = {
        "fish 0": [(200, " good \n", "stop")],
        "fish 1": [(200, "cut off", "length")],
        "fish 2": [(429, "", ""), (500, "", ""), (200, "late", "stop")],
    }
    how: dict[str, Any] = {"endpoint_model": "whale", "api_key_variable": "WHALE_KEY"}
    run(config(tmp_path, endpoint=f"{server}/", temperature=0.25, max_tokens=77, **how))
    assert written(tmp_path) == {"fish 0": "good", "fish 2": "late", "fish 3": "an answer"}
    assert len(Teacher.asked) == 6, "fish 3 stands there twice and is asked once; fish 2 took three tries"
    assert {(asked["model"], asked["temperature"], asked["max_tokens"]) for asked in Teacher.asked} == {
        ("whale", 0.25, 77)
    }
    assert {asked["key"] for asked in Teacher.asked} == {"Bearer secret"}
    assert {asked["path"] for asked in Teacher.asked} == {"/v1/chat/completions"}


def test_it_goes_on_where_it_was(server: str, tmp_path: Path) -> None:
    Teacher.replies = {"fish 3": [(400, "no such model", "")]}
    with pytest.raises(UserError, match="400.*no such model.*goes on from there"):
        run(config(tmp_path, endpoint=server, parallel=1))
    assert set(written(tmp_path)) == {"fish 0", "fish 1", "fish 2"}
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"messages": [{"role": "us')  # as a kill leaves it
    Teacher.replies, Teacher.asked = {}, []
    run(config(tmp_path, endpoint=server))
    assert [asked["messages"][-1]["content"] for asked in Teacher.asked] == ["fish 3"]
    assert set(written(tmp_path)) == {f"fish {i}" for i in range(4)}


def test_a_teacher_that_runs_here(tmp_path: Path) -> None:
    teacher = save_parrot_model(tmp_path / "teacher", "swims§<|im_end|>§")
    run(config(tmp_path, model=str(teacher), max_rows=2, device="cpu", temperature=0.0))
    assert written(tmp_path) == {"fish 0": "swims", "fish 1": "swims"}


@pytest.mark.parametrize("thinking", [True, False, None])
def test_a_teacher_that_runs_here_thinks_where_it_is_told_to(
    thinking: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt ends with an open think block then, and what it says up to the block's end are its thoughts."""
    script = "hm§</think>§swims§<|im_end|>§" if thinking else "swims§<|im_end|>§"
    teacher = save_parrot_model(tmp_path / "teacher", script)
    read: list[str] = []
    generate = Engine.generate

    def listen(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completions]:
        read.extend(map(engine.tokenizer.decode, prompts))
        return generate(engine, prompts, params)

    monkeypatch.setattr(Engine, "generate", listen)
    run(config(tmp_path, model=str(teacher), max_rows=1, device="cpu", temperature=0.0, enable_thinking=thinking))
    assert [text.endswith("<think>\n") for text in read] == [bool(thinking)]
    answer = Message("assistant", "swims", "hm" if thinking else None)
    assert read_back(tmp_path) == [Conversation((Message("user", "fish 0"), answer))]


def test_so_many_requests_are_under_way_as_parallel_says(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until six are there; with fewer at a time none would ever be answered."""
    together = threading.Barrier(6, timeout=60)
    answer = Teacher.do_POST

    def wait_for_the_others(self: Teacher) -> None:
        together.wait()
        answer(self)

    monkeypatch.setattr(Teacher, "do_POST", wait_for_the_others)
    run(config(tmp_path, [{"prompt": f"fish {i}"} for i in range(6)], endpoint=server, parallel=6))
    assert len(written(tmp_path)) == 6


def test_more_prompts_than_a_teacher_that_runs_here_reads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = save_parrot_model(tmp_path / "teacher", "swims§<|im_end|>§")
    monkeypatch.setattr("minnow.stages.teacher.ENGINE_BATCH", 3)
    run(config(tmp_path, model=str(teacher), device="cpu", temperature=0.0))
    assert written(tmp_path) == {f"fish {i}": "swims" for i in range(4)}


def test_the_settings_of_sampling_reach_the_teacher_that_runs_here(tmp_path: Path) -> None:
    settings = config(tmp_path, model="a", temperature=0.25, max_tokens=77, seed=5)
    assert settings.sampling == SamplingParams(temperature=0.25, max_tokens=77, seed=5)


HISTORY = (
    Message("system", "Look it up."),
    Message("user", "Who eats fish?"),
    Message("assistant", "", "I must look.", (CALL, CALL)),
    Message("tool", "otters"),
    Message("tool", "herons"),
)
HISTORY_ROW = {
    "messages": [
        {"role": "system", "content": "Look it up."},
        {"role": "user", "content": "Who eats fish?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I must look.",
            "tool_calls": [{"name": "look_up", "arguments": {"subject": "鱼"}}] * 2,
        },
        {"role": "tool", "content": "otters"},
        {"role": "tool", "content": "herons"},
        {"role": "assistant", "content": "The old answer."},
    ],
    "tools": [TOOL],
}


def test_the_endpoint_reads_everything_and_what_it_says_is_read_back(server: str, tmp_path: Path) -> None:
    arguments = json.dumps(CALL.arguments)
    call = {"id": "x", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    Teacher.replies = {
        "herons": [(200, {"content": " Otters and herons. ", "reasoning_content": "\nTwo results.\n"}, "stop")],
        "fish 0": [(200, {"content": None, "tool_calls": [call]}, "tool_calls")],
        "fish 1": [(200, "<think>\nHm.\n</think>\n\nA minnow.", "stop")],
    }
    flat = {"prompt": "fish 0", "tools": json.dumps([TOOL["function"]])}
    settings = config(tmp_path, [HISTORY_ROW, flat, {"prompt": "fish 1"}], endpoint=server, enable_thinking=True)
    run(settings)
    told, tools, plain = sorted(Teacher.asked, key=lambda asked: -len(asked["messages"]) - ("tools" in asked))
    first, second = told["messages"][2]["tool_calls"]
    assert first | {"id": ""} == second | {"id": ""}
    assert first["function"] == {"name": "look_up", "arguments": '{"subject": "鱼"}'}
    assert told["messages"][2]["reasoning_content"] == "I must look."
    assert [m["tool_call_id"] for m in told["messages"][3:]] == [first["id"], second["id"]]
    assert told["tools"] == tools["tools"] == [TOOL]
    assert "tools" not in plain
    assert {str(asked["chat_template_kwargs"]) for asked in Teacher.asked} == {"{'enable_thinking': True}"}
    assert sorted(read_back(tmp_path), key=lambda c: -len(c.messages) - len(c.tools)) == [
        Conversation((*HISTORY, Message("assistant", "Otters and herons.", "Two results.")), (TOOL,)),
        Conversation((Message("user", "fish 0"), Message("assistant", "", None, (CALL,))), (TOOL,)),
        Conversation((Message("user", "fish 1"), Message("assistant", "A minnow.", "Hm."))),
    ]
    asked = len(Teacher.asked)
    run(settings)
    assert len(Teacher.asked) == asked, "all is answered"


def test_prompts_that_differ_in_tools_calls_or_thoughts_are_all_asked(server: str, tmp_path: Path) -> None:
    def changed(**change: Any) -> dict[str, Any]:
        messages = [dict(message) for message in HISTORY_ROW["messages"]]  # type: ignore[attr-defined]
        messages[2] |= change
        return HISTORY_ROW | {"messages": messages}

    rows = [
        HISTORY_ROW,
        {"messages": HISTORY_ROW["messages"]},
        changed(reasoning_content="Hm."),
        changed(tool_calls=[{"name": "look_up", "arguments": {}}] * 2),
    ]
    settings = config(tmp_path, rows, endpoint=server)
    run(settings)
    assert len(Teacher.asked) == len(read_back(tmp_path)) == 4
    assert not any("chat_template_kwargs" in asked for asked in Teacher.asked), "a server decides by itself"
    run(settings)
    assert len(Teacher.asked) == 4


def test_rows_of_any_form_are_asked(server: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "fish 2"}, {"from": "gpt", "value": "old"}]
    rows = [
        {"prompt": "fish 0", "answer": "4"},
        {"prompt": [{"role": "user", "content": "fish 1"}]},
        {"conversations": turns, "prompt": "the first turn, as some data sets repeat it"},
        {"instruction": "fish", "input": "3", "output": "old", "prompt": None},
        {"question": "fish 4", "prompt": None},
    ]
    run(config(tmp_path, rows, endpoint=server))
    assert set(written(tmp_path)) == {"fish 0", "fish 1", "fish 2", "fish\n3", "fish 4"}


def test_a_teacher_that_runs_here_thinks_and_calls(tmp_path: Path) -> None:
    text = '{"name":"look"}'
    tokenizer = train_tokenizer([text, "pond", "swims"] * 20, 340)
    script = f"pond§</think>§swims§<tool_call>§{text}§</tool_call>§§<|im_end|>§"
    teacher = save_parrot_model(tmp_path / "teacher", script, tokenizer=tokenizer)
    settings: dict[str, Any] = {"model": str(teacher), "device": "cpu", "temperature": 0.0}
    row = {"prompt": "fish 0", "tools": [{"name": "look"}]}
    run(config(tmp_path, [row, HISTORY_ROW], enable_thinking=True, **settings))
    answer = Message("assistant", "swims", "pond", (ToolCall("look", {}),))
    tool = {"type": "function", "function": {"name": "look"}}
    assert read_back(tmp_path) == [Conversation((Message("user", "fish 0"), answer), (tool,))], (
        "the other prompt has no such tool"
    )


def test_a_prompt_that_the_teacher_cannot_hold_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_parrot_model(tmp_path / "teacher", "swims§<|im_end|>§", context=64)
    rows = [{"prompt": "fish " * 100}, {"prompt": "fish 0"}]
    run(config(tmp_path, rows, model=str(teacher), device="cpu", temperature=0.0))
    assert written(tmp_path) == {"fish 0": "swims"}
    assert "1 too long for the teacher's context" in capsys.readouterr().err


@pytest.mark.parametrize(("room", "problem"), [(0, "too long for the teacher's context"), (1, "cut at max_tokens")])
def test_a_prompt_must_leave_room_for_an_answer(
    room: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Conversation((Message("user", "fish 0"),))
    length = len(render(tiny_tokenizer(), asked, add_generation_prompt=True).ids)
    teacher = save_parrot_model(tmp_path / "teacher", "swims§<|im_end|>§", context=length + room)
    run(config(tmp_path, [{"prompt": "fish 0"}], model=str(teacher), device="cpu", temperature=0.0))
    assert f"1 {problem}" in capsys.readouterr().err


def said(content: str, thought: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", content, thought, calls)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(said("yes"), "stop"), None),
        (Answer(said("yes", "because", CALL), "tool_calls"), None),
        (Answer(said(""), "stop"), "empty"),
        (Answer(said("", "only a thought"), "stop"), "empty"),
        (Answer(said("yes"), "length"), "cut at max_tokens"),
        (Answer(None, "length"), "cut at max_tokens"),
        (Answer(None, "context"), "too long for the teacher's context"),
        (Answer(said("yes"), "content_filter"), "ended by content_filter"),
        (Answer(None, "stop"), "malformed"),
        (Answer(said("yes<|im_end|>"), "stop"), "with control tokens"),
        (Answer(said("yes<|reserved_0|>"), "stop"), "with control tokens"),
        (Answer(said("yes", "I </think> it"), "stop"), "with control tokens"),
        (Answer(said("yes", None, ToolCall("look_up", {"a": "<tool_call>"})), "stop"), "with control tokens"),
        (Answer(said("yes", None, ToolCall("look_down", {})), "stop"), "calling an unknown tool"),
        (Answer(said("maybe", "yes"), "stop"), "not matching must_match"),
    ],
)
def test_what_is_kept(answer: Answer, problem: str | None) -> None:
    assert check(answer, [TOOL], must_match="yes.*") == problem


def test_must_match_is_about_the_whole_content_and_all_its_lines() -> None:
    def kept(content: str, pattern: str, *calls: ToolCall) -> bool:
        return check(Answer(said(content, None, *calls), "stop"), [TOOL], must_match=pattern) is None

    assert kept("42", r"\d+")
    assert not kept("42 or so", r"\d+")
    assert not kept("It is 42", r"\d+")
    assert kept("It is\n42", r".*\d+")
    assert not kept("", r"\d+", CALL), "a turn that only calls says nothing"


def test_thoughts_under_their_newer_name_are_read(server: str, tmp_path: Path) -> None:
    """vLLM calls them `reasoning` now, and said `reasoning_content` before."""
    Teacher.replies = {"fish 0": [(200, {"content": "Yes.", "reasoning": "Hm."}, "stop")]}
    run(config(tmp_path, [{"prompt": "fish 0"}], endpoint=server))
    assert read_back(tmp_path)[0].messages[-1] == Message("assistant", "Yes.", "Hm.")


def test_half_a_character_in_a_tool_comes_out_as_it_came(server: str, tmp_path: Path) -> None:
    """Half of a surrogate pair has no UTF-8: as an escape it is written, and the prompt is known again."""
    tool = {"name": "look_up", "description": "finds \ud83d"}
    settings = config(tmp_path, [{"prompt": "fish 0", "tools": [tool]}], endpoint=server)
    run(settings)
    assert read_back(tmp_path)[0].tools == ({"type": "function", "function": tool},)
    run(settings)
    assert len(Teacher.asked) == 1


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "look_up", "arguments": "{no json"}},
        {"function": {"name": "look_up", "arguments": "[1]"}},
        {"function": {"arguments": "{}"}},
    ],
)
def test_a_malformed_call_is_not_kept(
    call: dict[str, Any], server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Teacher.replies = {"fish 0": [(200, {"content": "", "tool_calls": [call]}, "tool_calls")]}
    run(config(tmp_path, [{"prompt": "fish 0", "tools": [TOOL]}], endpoint=server))
    assert read_back(tmp_path) == []
    assert "1 malformed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sign"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"must_match": "(yes"}, "must_match '\\(yes' is no regular expression"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"parallel": 0}, "parallel at least 1"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute must be positive"),
        ({"retry_seconds": -1.0}, "retry_seconds is -1.0"),
        ({"endpoint": "localhost:8000/v1"}, "begins with http"),
    ],
)
def test_bad_values_are_refused_at_once(settings: dict[str, Any], sign: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sign):
        config(tmp_path, **{"endpoint": "http://127.0.0.1:9/v1", **settings})


def test_bad_rows_and_another_file_are_refused_before_anything_is_asked(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts.jsonl:1: tool 1 of `tools` has no `name`"):
        run(config(tmp_path, [{"prompt": "fish 0", "tools": [{"type": "function"}]}], endpoint=server))
    (tmp_path / "out.jsonl").write_text('{"text": "a story"}\n')
    with pytest.raises(UserError, match=r"out.jsonl:1: not written by this command .*give another --out"):
        run(config(tmp_path, endpoint=server))
    assert Teacher.asked == []


def test_by_default_a_server_is_asked_once_a_second() -> None:
    """What others share is not to be flooded by who gave no limit."""
    settings = Config(prompts=("a",), out="b", endpoint="http://127.0.0.1:9/v1")
    assert RateLimiter(settings.requests_per_minute).pause == 1.0
    assert settings.api_key_variable == "OPENAI_API_KEY"


def test_requests_start_evenly() -> None:
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    limiter = RateLimiter(120, clock=lambda: now[0], sleep=sleep)
    for _ in range(4):
        limiter.wait()
    assert now[0] == pytest.approx(1.5), "120 a minute: half a second apart"
    now[0] += 10
    limiter.wait()
    assert len(pauses) == 3, "after a pause there is nothing to wait for"


def test_one_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one teacher"):
        config(tmp_path)
    with pytest.raises(UserError, match="one teacher"):
        config(tmp_path, model="a", endpoint="b")
