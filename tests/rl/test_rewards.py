"""Rewards: right answers, text, composition, and what happens when one fails."""

import json
import math
import re
import sys
import threading
from dataclasses import replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from minnow.config import UserError
from minnow.data.prompts import Prompt, parse_prompt
from minnow.data.values import RowError
from minnow.evaluation.judge import RewardModelJudge, TransformersJudge
from minnow.model.pretrained import save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.rl.answers import is_right, last_number
from minnow.rl.environment import SingleTurn
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import Trajectory
from minnow.rl.text_rewards import format_reward, language_reward, length_reward, overlong_reward
from minnow.tokenizer.chat import Conversation, Message, ToolCall
from tests.rl.helpers import tiny


def episode(content, *, reference="4", ending="stop", reasoning=None, tokens=3, asked="2 + 2?", row=None):
    prompt = Prompt(Conversation((Message("user", asked),)), reference, row or {})
    answer = Message("assistant", content, reasoning)
    return Trajectory(
        SingleTurn(prompt),
        0,
        [1] * tokens,
        [True] * tokens,
        [-0.1] * tokens,
        [answer],
        ending,
        conversation=Conversation((*prompt.conversation.messages, answer)),
    )


@pytest.mark.parametrize(
    ("answer", "reference", "kind", "right"),
    [
        ("It is 4.", "4", "auto", True),
        ("2 + 2 = 4, not 5", "4", "auto", False),
        ("1,024 fish", "1024", "number", True),
        ("４只", "4", "auto", True),
        ("-3", "3", "number", False),
        ("3.50", "3.5", "number", True),
        ("It hums.", "it hums", "text", True),
        ("它住在湖里。", "它住在湖里", "auto", True),
        ("It hums loudly.", "It hums", "text", False),
        ("the lake and the hill", ["lake", "hill"], "auto", True),
        ("the lake", ["lake", "hill"], "auto", False),
        ("it is 2", "1 + 1 = 2\n#### 2", "auto", True),  # GSM8K's rows
        ("it is 1", "1 + 1 = 2\n#### 2", "auto", False),
        ("it is 1,234", "... so 1234.\n#### 1,234", "number", True),
        ("It is 2.", "#### 1 is too few\n#### 2", "auto", True),  # the last of them
        ("The lake.", "It swims there. #### the lake", "auto", True),
        ("there are 12", ["2"], "auto", False),
        ("there are 2, not 12", [2, "12"], "auto", True),
        ("1,200 fish", [1200, "fish"], "auto", True),
        ("It is C#.", "It must be C#", "auto", False),
        ("c#", "So it is this one.\n#### C#", "auto", True),
        ("", "C####", "auto", False),  # nothing stands behind it
        ("x is 5", "#### Answer\nx is 5", "auto", False),  # a heading
        ("so 15% of 13 cats", ["5%"], "auto", False),
        ("so 15% of 13 cats", ["3 cats"], "auto", False),
        ("0.5% of 3 cats", ["0.5%", "3 cats"], "auto", True),
        ("page 12.5", ["page 1"], "auto", False),
    ],
)
def test_is_right(answer, reference, kind, right):
    assert is_right(answer, reference, kind) is right


@pytest.mark.parametrize("reference", [{"target": 42, "numbers": [6, 7]}, [{"target": 42}], ["42", {"target": 42}]])
def test_a_reference_that_nothing_equals_is_refused(reference):
    """verl's rows may hold an object for a reward function of their own, an agent's a list of them."""
    with pytest.raises(UserError, match=r"is an object.*rewards.answer 0"):
        is_right("42", reference, "auto")


def test_an_object_is_no_mathematics():
    """math-verify found a number in it: whoever answered 7 to {"target": 42, "numbers": [6, 7]} was right."""
    pytest.importorskip("math_verify")
    item = episode("7", reference={"target": 42, "numbers": [6, 7]})
    rewarder = Rewarder(RewardConfig(answer_kind="maths", maths_seconds=60))
    with pytest.raises(UserError, match=r"is an object.*rewards.answer 0"):
        rewarder.score([item])


@pytest.mark.parametrize("kind", ["text", "number", "maths"])
def test_a_list_is_its_one_item_or_refused(kind):
    """As a text, ["4"] equals no answer: every one would earn 0, silently."""
    if kind == "maths":
        pytest.importorskip("math_verify")
    items = [episode("4", reference=["4"]), episode("5", reference=["4"])]
    rewarder = Rewarder(RewardConfig(answer_kind=kind, maths_seconds=60))
    rewarder.score(items)
    assert [item.rewards["answer"] for item in items] == [1, 0]
    with pytest.raises(UserError, match=r"\['3', '4'\] is a list.*answer_kind contains"):
        rewarder.score([episode("4", reference=["3", "4"])])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12-4", "4"),  # a subtraction
        ("12 - 4 = 8", "8"),
        ("x-4", "4"),
        ("(2)-4", "4"),
        ("x^{2}-4", "4"),
        ("3 - -4", "-4"),
        ("x = -4", "-4"),
        ("x=-4", "-4"),
        ("= −4", "-4"),  # Unicode minus
        ("is –4.", "-4"),  # en dash as a minus
        ("10–12", "12"),  # and as a range
        ("2024-01-05", "5"),
        ("T-1000", "1000"),
        ("(-4)", "-4"),
        ("**-4**", "-4"),
        (r"\boxed{-4}", "-4"),
        ("$-4", "-4"),
        ("-$4", "-4"),
        ("- 4 fish", "4"),  # an item of a list
        ("1,234.5", "1234.5"),
        ("12,345,678 or 12,34,567", "1234567"),
        ("1,234, then", "1234"),
        ("{1,2,3}", "3"),
        ("1.5e3", "1500"),
        ("2e-3", "0.002"),
        ("5e", "5"),
        ("it is .5", "0.5"),
        ("-.5", "-0.5"),
        ("４２", "42"),
        ("－１，２３４．５", "-1234.5"),
        ("答案是-4。", "-4"),
        ("答案：−4", "-4"),
        ("第3-4页", "4"),
        ("零下４度", "4"),
        ("그것은-4", "-4"),
    ],
)
def test_the_last_number_and_its_sign(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.timeout(60)  # a search that begins anew at each character takes many minutes
def test_a_long_answer_is_searched_in_no_time():
    for text in ("1" * 10**5, "11," * 10**4, "111," * 10**4 + "1", "-" * 10**5, "1e" * 10**4, "1e" + "9" * 30):
        last_number(text)


def test_last_number_of_nothing():
    assert last_number("none at all") is None
    with pytest.raises(UserError, match="holds no number"):
        is_right("4", "four", "number")


def test_text_rewards():
    said = Message("assistant", "4", "two and two")
    assert format_reward(said, thinking=True, ended=True) == 1
    assert format_reward(said, thinking=False, ended=True) == 0  # it thought unasked
    assert format_reward(Message("assistant", "4"), thinking=True, ended=True) == 0
    assert format_reward(said, thinking=True, ended=False) == 0
    # 5 tokens of at least 10: 0.5; 150 with 100 as the longest: 2 - 1.5 = 0.5
    assert [length_reward(n, 10, 100) for n in (5, 10, 100, 150, 300)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert language_reward("它住在哪里？", "它住在湖里。") == 1
    assert language_reward("它住在哪里？", "in the lake") == 0
    assert language_reward("Where?", "in the 湖") == pytest.approx(5 / 8)  # 5 Latin letters against 3 for a character
    assert language_reward("2 + 2", "4") == 1


def test_a_missing_answer_is_wrong_and_a_cut_off_one_too():
    items = [episode("4"), episode("5"), episode("4", ending="length"), episode("4", reference=None)]
    Rewarder(RewardConfig()).score(items)
    assert [item.rewards["answer"] for item in items] == [1, 0, 0, 0]


def test_rewards_are_weighted_and_kept_one_by_one():
    items = [episode("4"), episode("5", ending="length")]
    items[0].reward = 0.5  # the environment's
    config = RewardConfig(answer=2.0, environment=1.0, format=0.5, overlong=0.25)
    Rewarder(config).score(items)
    assert items[0].rewards == {"answer": 1, "environment": 0.5, "format": 1, "overlong": 0}
    assert items[0].reward == 2.0 + 0.5 + 0.5
    assert items[1].reward == -0.25


def test_the_last_tokens_are_punished_gently_before_the_cut():
    """DAPO, equation 13, with L_max 100 and L_cache 20: (80 - 90) / 20 = -0.5."""
    assert [overlong_reward(tokens, 100, 20.0) for tokens in (50, 80, 90, 100, 120)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong_reward(100, 100, 0.0) == 0.0
    items = [episode("4", tokens=9), episode("4", tokens=2), episode("4", tokens=3, ending="length")]
    config = RewardConfig(answer=0, overlong=2.0, overlong_buffer=0.2)
    Rewarder(config, max_tokens=10).score(items)
    assert [item.reward for item in items] == [-1.0, 0.0, -2.0]
    with pytest.raises(UserError, match="a share, from 0 to 1"):
        RewardConfig(overlong_buffer=20)
    for wrong in ({"longest": 0}, {"shortest": 300}):  # the first divided by zero, in the middle of a run
        with pytest.raises(UserError, match="rewards.shortest .* rewards.longest"):
            RewardConfig(**wrong)


def test_a_loop_in_the_thoughts_is_seen():
    items = [episode("4", reasoning="round and " * 40), episode("4", reasoning="two and two")]
    Rewarder(RewardConfig(answer=0, repetition=1.0)).score(items)
    assert items[0].reward < -0.8
    assert items[1].reward == 0


def test_a_loop_of_calls_is_seen():
    """The same call over and over leaves no text; two calls of a usual agent are no loop."""
    items = [episode("4"), episode("4")]
    loop, usual = [{"expression": "12 + 34"}] * 10, [{"expression": "12 + 34"}, {"expression": "46 * 7"}]
    for item, calls in zip(items, (loop, usual), strict=True):
        item.answers = [Message("assistant", "", None, tuple(ToolCall("calculate", call) for call in calls))]
    Rewarder(RewardConfig(answer=0, repetition=1.0)).score(items)
    assert items[0].reward < -0.8
    assert items[1].reward == 0


def test_a_program_that_is_changed_until_it_runs_is_no_loop():
    """Three of them were a repetition of more than one half: the watch would have ended the run."""
    program = (
        "def total(numbers):\n    return sum(number for number in numbers if number % {} == 0)\nprint(total([1, 2, 3]))"
    )
    tried, item = [program.format(n) for n in (2, 3, 5)], episode("4")
    for calls, repetition in ((tried, 0.0), ([tried[0]] * 3, -0.623)):  # 70% was there before: (0.7 - 0.2) / 0.8
        item.answers = [Message("assistant", "", None, (ToolCall("python", {"code": call}),)) for call in calls]
        Rewarder(RewardConfig(answer=0, repetition=1.0)).score([item])
        assert item.rewards["repetition"] == pytest.approx(repetition, abs=0.001)
    # A loop within a call, and calls of three letters again and again, are loops as they were.
    for calls in ([tried[0] + "\nprint(1)" * 60], ["2+2"] * 10):
        item.answers = [Message("assistant", "", None, (ToolCall("python", {"code": call}),)) for call in calls]
        Rewarder(RewardConfig(answer=0, repetition=1.0)).score([item])
        assert item.rewards["repetition"] < -0.5


def test_other_calls_with_the_same_words_are_no_loop():
    """Four tools asked about one city were a repetition of three quarters: the watch would have ended the run."""
    others = [(name, {"city": "Paris"}) for name in ("area", "people", "mayor", "river")]
    undone = [(name, {way: "a red fish"}) for name in ("list", "pond") for way in ("add", "remove")]
    for calls, loops in ((others, False), (undone, False), (others[:1] * 4, True)):
        item = episode("4")
        item.answers = [Message("assistant", "", None, (ToolCall(*call),)) for call in calls]
        Rewarder(RewardConfig(answer=0, repetition=1.0)).score([item])
        assert (item.reward < -0.5) if loops else (item.reward == 0)


def test_no_answer_of_a_model_stops_a_run_by_its_json():
    schema = {"type": "string"}
    items = [episode(text, row={"schema": schema}) for text in ('"\\ud800"', "[" * 100_000, '"four"')]
    Rewarder(RewardConfig(answer=0, json_schema=1.0)).score(items)
    assert [item.reward for item in items] == [0, 0, 1]
    with pytest.raises(UserError, match=r"json_schema: the `schema` of the prompt '2 \+ 2\?' is none"):
        Rewarder(RewardConfig(answer=0, json_schema=1.0)).score([episode("4", row={"schema": {"type": "strin"}})])


def test_json_schema():
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    items = [episode(text, row={"schema": schema}) for text in ('{"n": 4}', '{"n": "4"}', "4", "{")]
    Rewarder(RewardConfig(answer=0, json_schema=1.0)).score(items)
    assert [item.reward for item in items] == [1, 0, 0, 0]
    with pytest.raises(UserError, match="needs a `schema`"):
        Rewarder(RewardConfig(answer=0, json_schema=1.0)).score([episode("4")])


def test_a_schema_fetches_nothing():
    """Rows come from anywhere: one could have the trainer ask addresses of its own network, or open files."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/inside"}
        with pytest.raises(UserError, match="a schema may refer to its own parts only"):
            Rewarder(RewardConfig(answer=0, json_schema=1.0)).score([episode("4", row={"schema": schema})])
        server.shutdown()
    assert asked == []
    schema = {"$ref": "#/$defs/four", "$defs": {"four": {"const": 4}}}
    item = episode("4", row={"schema": schema})
    Rewarder(RewardConfig(answer=0, json_schema=1.0)).score([item])
    assert item.reward == 1


def broken(trajectories):
    raise ZeroDivisionError("oops")


def nan(trajectories):
    return [float("nan")] * len(trajectories)


def constant(trajectories):
    return [3.0] * len(trajectories)


RETURNED = [True]
"""What `returns` returns."""


def returns(trajectories):
    return RETURNED[0]


def hangs(trajectories):
    threading.Event().wait(20)


def test_the_function_that_the_handbook_shows(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    name = re.search(r"--rewards.functions (\S+)", block)[1]
    (tmp_path / f"{name.partition(':')[0]}.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    items = [episode("Yes, please."), episode("No.")]
    Rewarder(RewardConfig(answer=0, functions=(name,))).score(items)
    assert [item.reward for item in items] == [0.5, 0.0]


def test_functions_of_ones_own_and_failures_are_never_silent_zeros():
    here = __name__
    items = [episode("4")]
    Rewarder(RewardConfig(functions=(f"{here}:constant@0.5",))).score(items)
    assert items[0].rewards[f"{here}:constant"] == 3.0
    assert items[0].reward == 1 + 1.5
    with pytest.raises(UserError, match=r"broken.*ZeroDivisionError: oops \(.*test_rewards.py:\d+\)"):
        Rewarder(RewardConfig(functions=(f"{here}:broken",))).score(items)
    with pytest.raises(UserError, match="finite"):
        Rewarder(RewardConfig(functions=(f"{here}:nan",))).score(items)
    with pytest.raises(UserError, match="MODULE:NAME"):
        Rewarder(RewardConfig(functions=("nowhere:nothing",)))
    with pytest.raises(UserError, match="weight 0"):
        Rewarder(RewardConfig(answer=0, environment=0))


@pytest.mark.parametrize(
    ("value", "sign"),
    [
        (None, "failed: TypeError"),
        (True, "failed: TypeError"),  # one for all
        (3.0, "failed: TypeError"),
        ([1.0], "gave 1 numbers for 2 answers"),
        ([1.0, 2.0, 3.0], "gave 3 numbers for 2 answers"),
        ([], "gave 0 numbers for 2 answers"),
        ([1.0, None], "gave None for the prompt 'the second'"),
        ([1.0, math.nan], "gave nan for the prompt 'the second'"),
        ([-math.inf, 1.0], "gave -inf for the prompt 'the first'"),
        ([10**400, 1.0], "gave 1000.* for the prompt 'the first'"),
        ("12", "gave '1' for the prompt 'the first'"),
        ([[1.0, 2.0], [3.0, 4.0]], r"gave \[1.0, 2.0\] for the prompt 'the first'"),
        (torch.ones(2, 3), "gave tensor.* for the prompt 'the first'"),
        (torch.tensor([1.0, math.nan]), "gave tensor.* for the prompt 'the second'"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_named_with_its_row(value, sign):
    RETURNED[0] = value
    rewarder = Rewarder(RewardConfig(functions=(f"{__name__}:returns",)))
    with pytest.raises(UserError, match=rf"the reward '{__name__}:returns' {sign}"):
        rewarder.score([episode("4", asked="the first"), episode("4", asked="the second")])


@pytest.mark.parametrize("value", [[True, False], torch.tensor([1.0, 0.0]), iter([1, 0])])
def test_bools_and_tensors_are_numbers(value):
    RETURNED[0] = value
    items = [episode("4"), episode("4")]
    Rewarder(RewardConfig(answer=0, functions=(f"{__name__}:returns",))).score(items)
    assert [item.reward for item in items] == [1.0, 0.0]


def test_a_function_that_hangs_and_a_weight_that_is_none_end_the_run():
    config = RewardConfig(functions=(f"{__name__}:hangs",), functions_seconds=0.2)
    with pytest.raises(UserError, match=r"hangs' took more than rewards.functions_seconds \(0.2\) for 1 answers"):
        Rewarder(config).score([episode("4")])
    with pytest.raises(UserError, match="has weight nan"):
        Rewarder(RewardConfig(functions=(f"{__name__}:constant@nan",)))
    with pytest.raises(UserError, match="rewards.maths_seconds is 0"):
        RewardConfig(maths_seconds=0)


class Marks:
    """A reward model that gives one number."""

    model = None

    def __init__(self, number):
        self.number = number

    def __call__(self, conversations):
        if self.number is None:
            raise RuntimeError("out of memory")
        return [self.number] * len(conversations)


@pytest.mark.parametrize(
    ("number", "sign"), [(math.nan, "gave nan for the prompt"), (None, "RuntimeError: out of mem")]
)
def test_a_reward_model_that_fails_is_no_zero(monkeypatch, number, sign):
    """B14: `except Exception: score = 0` taught that whatever broke the reward model was worth nothing."""
    monkeypatch.setattr("minnow.rl.rewards.load_judge", lambda path, device: Marks(number))
    for squash in (False, True):
        config = RewardConfig(reward_model="x", reward_model_squash=squash)
        with pytest.raises(UserError, match=f"the reward 'reward_model' .*{sign}"):
            Rewarder(config).score([episode("4")])


def test_a_huge_mark_is_squashed(monkeypatch):
    monkeypatch.setattr("minnow.rl.rewards.load_judge", lambda path, device: Marks(-1e4))
    items = [episode("4")]
    config = RewardConfig(answer=0, reward_model="x", reward_model_squash=True)
    Rewarder(config).score(items)
    assert items[0].reward == 0.0


def test_prompt_rows():
    asked = parse_prompt({"question": "2 + 2?", "answer": "4", "system": "Be short."})
    assert [m.role for m in asked.conversation.messages] == ["system", "user"]
    assert asked.reference == "4"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "None"}]
    verl = {"prompt": turns[:1], "reward_model": {"style": "rule", "ground_truth": "7"}}
    assert parse_prompt(verl).reference == "7"
    assert parse_prompt(verl | {"answer": "8"}).reference == "8"
    for nothing in ("", [], None, " \n", ["", " "]):  # it would stand in every answer, or an empty one would equal it
        assert parse_prompt(verl | {"answer": nothing}).reference == "7"
        assert parse_prompt({"prompt": "hi", "answer": nothing, "reward_model": "a text"}).reference is None
    assert parse_prompt({"prompt": "hi", "answer": 0, "solution": "none"}).reference == 0
    for row in ({"conversations": turns, "gt": ["3"]}, {"messages": turns[:1], "gt": ["3"]}, {"prompt": turns[:1]}):
        prompt = parse_prompt(row)
        assert [m.content for m in prompt.conversation.messages] == ["hi"]
        assert prompt.reference == row.get("gt")
        assert prompt.conversation.tools == ()
    # Tools beside what is asked (as objects or as their JSON), or on its system message as data sets have them.
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    declaring = [{"role": "system", "content": "Be short.", "tools": tools}, *turns]
    for row in (
        {"question": "2 + 2?", "tools": tools},
        {"prompt": "2 + 2?", "system": "Be short.", "tools": json.dumps(tools)},
        {"prompt": turns, "tools": tools},
        {"messages": turns, "tools": tools},
        {"instruction": "2 + 2?", "tools": tools},
        {"messages": declaring},
        {"conversations": declaring[:2]},
        {"prompt": declaring},
    ):
        conversation = parse_prompt(row).conversation
        assert conversation.tools == tuple(tools), row
        assert conversation.messages[-1].role == "user"
    with pytest.raises(RowError, match="two different lists of tools"):
        parse_prompt({"messages": declaring, "tools": [{**tools[0], "type": "other"}]})
    with pytest.raises(RowError, match="no `prompt`"):
        parse_prompt({"text": "x"})
    with pytest.raises(RowError, match="empty"):
        parse_prompt({"prompt": " "})


def test_a_reward_model_reads_the_whole_episode(tmp_path):
    model, tokenizer = tiny()
    reward_model = RewardModel(model.config, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reward_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_pretrained(reward_model, tmp_path / "rm", tokenizer=tokenizer)
    items = [episode("yes"), episode("no, never"), episode("yes")]
    looked = (Message("assistant", "", None, (ToolCall("look", {}),)), Message("tool", "4"), items[2].answer)
    items[2].conversation = Conversation((Message("user", "2 + 2?"), *looked))
    config = RewardConfig(answer=0, environment=0, reward_model=str(tmp_path / "rm"), reward_model_weight=2.0)
    Rewarder(config).score(items)
    judge = RewardModelJudge(reward_model, tokenizer)
    for item in items:
        (expected,) = judge([item.conversation])
        assert item.rewards["reward_model"] == pytest.approx(expected, abs=1e-5)
        assert item.reward == pytest.approx(2 * expected, abs=1e-5)
    raw = [item.rewards["reward_model"] for item in items]
    assert len({round(reward, 5) for reward in raw}) == 3
    Rewarder(replace(config, reward_model_squash=True)).score(items)
    assert [item.rewards["reward_model"] for item in items] == pytest.approx([1 / (1 + math.exp(-r)) for r in raw])
    template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    (tmp_path / "rm" / "chat_template.jinja").write_text(template)  # not ours: transformers reads it
    Rewarder(config).score(items)
    theirs = TransformersJudge(tmp_path / "rm", torch.device("cpu"))
    expected = theirs([item.conversation for item in items])
    assert [item.rewards["reward_model"] for item in items] == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(raw, abs=1e-3)
    save_pretrained(model, tmp_path / "lm", tokenizer=tokenizer)
    with pytest.raises(UserError, match="not a sequence-classification model"):
        Rewarder(replace(config, reward_model=str(tmp_path / "lm")))
