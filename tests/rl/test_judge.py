"""The judge over HTTP: marks, retries, and failures that are never zeros."""

import dataclasses
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.rl.environment import SingleTurn
from minnow.rl.judge import JudgeConfig, judge_reward
from minnow.rl.left_out import left_out_figures
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.tokenizer.chat import Conversation, Message
from tests.rl.test_rewards import episode

BROKEN = 0
"""A status that sends less than it says."""
SLOW = 1
"""A status whose reply comes after a second."""


@pytest.fixture
def judge(monkeypatch):
    """A server that marks by the answer's text; `replies` overrides what it says next."""
    monkeypatch.setattr("minnow.http.time", SimpleNamespace(sleep=lambda seconds: None))
    asked, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            status, text = (
                replies.pop(0) if replies else (200, "9" if "good" in body["messages"][1]["content"] else "2")
            )
            if status == SLOW:
                time.sleep(1)
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200 if status in (BROKEN, SLOW) else status)
            self.send_header("Content-Length", str(len(content) + (100 if status == BROKEN else 0)))
            self.end_headers()
            with suppress(BrokenPipeError):  # nobody waits any more
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, replies
    server.shutdown()
    server.server_close()


def test_marks(judge, monkeypatch):
    url, asked, _ = judge
    monkeypatch.setenv("MINNOW_JUDGE_KEY", "k")
    items = [episode("a good one"), episode("a bad one", reference=None)]
    assert judge_reward(JudgeConfig(url=url, weight=2.0), items) == [0.9, 0.2]
    path, key, body = next(entry for entry in asked if "good" in entry[2]["messages"][1]["content"])
    assert (path, key, body["temperature"]) == ("/v1/chat/completions", "Bearer k", 0)
    assert "compare with:\n4" in body["messages"][1]["content"]


def test_the_judge_reads_what_the_user_asked_and_a_right_answer_of_zero(judge):
    """Nobody else's words stand under the question; 0 is an answer like any other."""
    url, asked, _ = judge
    messages = [Message("system", "Be brief."), Message("user", "Hello."), Message("assistant", "Hi.")]
    prompt = Prompt(Conversation((*messages, Message("user", "3 - 3?"))), reference=0)
    item = dataclasses.replace(episode("0"), environment=SingleTurn(prompt))
    judge_reward(JudgeConfig(url=url), [item])
    assert asked[0][2]["messages"][1]["content"] == (
        "Question:\nHello.\n\n3 - 3?\n\nAnswer:\n0\n\nA right answer, to compare with:\n0"
    )


def test_the_judge_is_asked_as_configured(judge):
    url, asked, _ = judge
    judge_reward(JudgeConfig(url=f"{url}/", model="whale", instruction="Mark it."), [episode("4")])
    ((path, _, body),) = asked
    assert path == "/v1/chat/completions"
    assert body["messages"][0] == {"role": "system", "content": "Mark it."}
    assert (body["model"], body["max_tokens"]) == ("whale", 16), "room for '**6.5** out of 10', none for an essay"


def test_as_one_reward_of_several(judge):
    url, asked, _ = judge
    items = [episode("good: 4")]
    Rewarder(RewardConfig(judge=JudgeConfig(url=url, weight=2.0))).score(items)
    assert items[0].rewards == {"answer": 1, "environment": 0, "judge": 0.9}  # before the weight, as the others
    assert items[0].reward == pytest.approx(2.8)
    asked.clear()
    Rewarder(RewardConfig(judge=JudgeConfig(url=url, weight=0.0))).score(items := [episode("4")])
    assert items[0].rewards == {"answer": 1, "environment": 0}
    assert not asked


def test_busy_is_asked_again_and_failure_is_said(judge):
    url, asked, replies = judge
    replies += [(503, ""), (429, ""), (200, "7")]
    assert judge_reward(JudgeConfig(url=url, parallel=1), [episode("x")]) == [0.7]
    assert len(asked) == 3
    replies[:] = [(401, "")]
    with pytest.raises(UserError, match="HTTP 401"):
        judge_reward(JudgeConfig(url=url, parallel=1), [episode("x")])
    with pytest.raises(UserError, match="could not be asked"):
        judge_reward(JudgeConfig(url="http://127.0.0.1:9/v1", seconds=1), [episode("x")])


def test_a_reply_without_a_mark_is_left_out_and_never_a_zero(judge, caplog):
    url, _, replies = judge
    said = ["fine!", "70", "-5", "Marks from 0 to 10: 7", "", "8/10.", "**6.5** out of 10", "10"]
    replies += [(200, text) for text in said]
    items = [episode(f"answer {n}", asked=f"question {n}") for n in range(len(said))]
    Rewarder(RewardConfig(answer=0, judge=JudgeConfig(url=url, parallel=1))).score(items)
    assert [item.left_out for item in items] == ["judge"] * 5 + [None] * 3
    assert [item.reward for item in items[5:]] == [0.8, 0.65, 1.0]
    assert all(item.rewards == {} for item in items[:5])
    assert "gave no number from 0 to 10 but '-5', for the prompt 'question 2'" in caplog.text
    assert left_out_figures(items)["judge_failures"] == 5.0


def test_a_reply_that_breaks_off_is_asked_for_again(judge):
    """http.client.IncompleteRead is no OSError."""
    url, asked, replies = judge
    replies += [(BROKEN, "9"), (200, "7")]
    assert judge_reward(JudgeConfig(url=url, parallel=1), [episode("x")]) == [0.7]
    assert len(asked) == 2


def test_a_slow_reply_is_asked_for_again(judge):
    """`seconds` is for one try: the later ones have their own."""
    url, asked, replies = judge
    replies += [(SLOW, "2"), (SLOW, "2")]
    assert judge_reward(JudgeConfig(url=url, seconds=0.4), [episode("good")]) == [0.9]
    assert len(asked) > 2


def test_a_judge_that_fails_in_another_way_is_no_zero_either(monkeypatch):
    def post_json(*_, **__):
        raise RuntimeError("odd")

    monkeypatch.setattr("minnow.rl.judge.post_json", post_json)
    with pytest.raises(UserError, match="the judge whale at http://pond/v1 failed: RuntimeError: odd"):
        judge_reward(JudgeConfig(url="http://pond/v1", model="whale"), [episode("x")])


def test_settings():
    with pytest.raises(UserError, match="rewards.judge.parallel is 0"):
        JudgeConfig(parallel=0)
    with pytest.raises(UserError, match="rewards.judge.seconds is 0"):
        JudgeConfig(seconds=0)
