"""`minnow distill generate`: a teacher's answers, checked, each prompt once, slowly, and continued after a stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minnow.config import UserError
from minnow.stages.distill_generate import Answer, Config, RateLimiter, check, run
from tests.stages.stage_helpers import save_parrot_model


class Teacher(BaseHTTPRequestHandler):
    """Answers "fish N" by what `replies` says of N, in turn."""

    replies: dict[str, list[tuple[int, str, str]]]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"], "path": self.path})
        replies = self.replies.get(body["messages"][-1]["content"], [(200, "an answer", "stop")])
        status, text, reason = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        self.end_headers()
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
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


def config(folder: Path, **settings: Any) -> Config:
    rows = [
        {"messages": [{"role": "user", "content": f"fish {i}"}, {"role": "assistant", "content": "old"}]}
        for i in (0, 1, 2, 3, 3)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"requests_per_minute": 1e6, "retry_seconds": 0.01} | settings
    return Config(prompts=(str(folder / "prompts.jsonl"),), out=str(folder / "out.jsonl"), **settings)


def written(folder: Path) -> dict[str, str]:
    rows = [json.loads(line)["messages"] for line in (folder / "out.jsonl").read_text().splitlines()]
    return {row[0]["content"]: row[-1]["content"] for row in rows}


def test_good_answers_are_kept_once_each(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Teacher.replies = {
        "fish 0": [(200, " good \n", "stop")],
        "fish 1": [(200, "cut off", "length")],
        "fish 2": [(429, "", ""), (500, "", ""), (200, "late", "stop")],
    }
    run(config(tmp_path, endpoint=server, endpoint_model="whale"))
    assert written(tmp_path) == {"fish 0": "good", "fish 2": "late", "fish 3": "an answer"}
    assert len(Teacher.asked) == 6, "fish 3 stands there twice and is asked once; fish 2 took three tries"
    assert {asked["model"] for asked in Teacher.asked} == {"whale"}
    assert {asked["key"] for asked in Teacher.asked} == {"Bearer secret"}
    assert {asked["path"] for asked in Teacher.asked} == {"/v1/chat/completions"}


def test_it_goes_on_where_it_was(server: str, tmp_path: Path) -> None:
    Teacher.replies = {"fish 3": [(400, "no such model", "")]}
    with pytest.raises(UserError, match="400 .*no such model"):
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


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer("yes", True), None),
        (Answer("  ", True), "empty"),
        (Answer("yes", False), "cut at max_tokens"),
        (Answer("yes<|im_end|>", True), "with control tokens"),
        (Answer("maybe", True), "not matching must_match"),
    ],
)
def test_what_is_kept(answer: Answer, problem: str | None) -> None:
    assert check(answer, must_match="yes.*") == problem


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
