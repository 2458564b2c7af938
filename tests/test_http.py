"""Asking a model server: what is tried again, what is not, and what is said in the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from minnow.config import UserError
from minnow.http import post_json


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[int, str]], list[dict[str, Any]], list]]:
    """Address, replies to give in turn, requests that came (headers and body), pauses that were made."""
    replies: list[tuple[int, str]] = []
    came: list[dict[str, Any]] = []
    pauses: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append({"body": body, "key": self.headers["Authorization"]})
            status, text = replies.pop(0)
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr("minnow.http.time", SimpleNamespace(sleep=pauses.append))
    yield f"http://127.0.0.1:{running.server_port}", replies, came, pauses
    running.shutdown()
    running.server_close()


def said(reply: Any) -> str:
    return reply["said"]


def test_busy_broken_and_wordless_servers_are_asked_again_with_a_growing_pause(server) -> None:
    url, replies, came, pauses = server
    replies += [(429, ""), (503, ""), (200, '{"error": "overloaded"}'), (200, "no JSON"), (200, '{"said": "yes"}')]
    tries = []
    before = lambda: tries.append(len(came))  # noqa: E731
    assert post_json(url, {"a": 1}, said, key="k", seconds=5, attempts=5, pause=0.5, before=before) == "yes"
    assert [request["body"] for request in came] == [{"a": 1}] * 5
    assert came[0]["key"] == "Bearer k"
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    assert tries == [0, 1, 2, 3, 4]


def test_a_refusal_is_final_and_patience_ends(server) -> None:
    url, replies, came, pauses = server
    replies += [(401, "who are you?")]
    with pytest.raises(UserError, match=r"could not be asked \(HTTP 401: who are you\?\)"):
        post_json(url, {}, said, key=None, seconds=5)
    assert len(came) == 1
    assert came[0]["key"] is None
    replies += [(200, "[]")] * 3
    with pytest.raises(UserError, match="replied without an answer"):
        post_json(url, {}, said, key=None, seconds=5, attempts=3)
    assert len(pauses) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirection_takes_the_key_elsewhere(server, status: int) -> None:
    """urllib follows 301 to 303 with all headers, to any host, and asks there without the body."""
    url, replies, came, _ = server
    elsewhere = url.replace("127.0.0.1", "localhost")
    replies += [(status, f"{elsewhere}/v1")]
    with pytest.raises(UserError, match=rf"\(HTTP {status}: it sends on to {elsewhere}/v1"):
        post_json(url, {}, said, key="k", seconds=5)
    assert len(came) == 1


def test_a_redirection_to_nowhere_is_told_as_any_refusal(server) -> None:
    url, replies, *_ = server
    replies += [(304, "")]
    with pytest.raises(UserError, match=r"\(HTTP 304: \)"):
        post_json(url, {}, said, key=None, seconds=5)


def test_an_empty_reply_is_none(server) -> None:
    url, replies, *_ = server
    replies += [(200, "")]
    assert post_json(url, {}, lambda reply: reply, key=None, seconds=5) is None
