"""Environments: tools are really called, mistakes come back as words, the game has an end."""

import json
import sys

import pytest

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.data.prompts import Prompt
from minnow.rl.environments import environment_maker
from minnow.tokenizer.chat import Conversation, Message, ToolCall, render_continuation
from minnow.tokenizer.parse import parse_assistant
from minnow.tools.sandbox import can_isolate
from tests.rl.helpers import tiny


def prompt(text, reference=None, **row):
    return Prompt(Conversation((Message("user", text),)), reference, row)


def calls(*pairs):
    return Message("assistant", "", tool_calls=tuple(ToolCall(name, arguments) for name, arguments in pairs))


def test_calculator_answers_every_call_until_there_is_none():
    environment = environment_maker("calculator", pond=None)(prompt("6 x 7?", "42"))
    assert environment.reset().tools[0]["function"]["name"] == "calculate"
    reply = environment.step(calls(("calculate", {"expression": "6*7"}), ("calculate", {"expression": "1/0"})))
    assert [m.role for m in reply.messages] == ["tool", "tool"]
    assert reply.messages[0].content == "42"
    assert "division by zero" in json.loads(reply.messages[1].content)["error"]
    assert not reply.done
    assert environment.step(Message("assistant", "It is 42.")).done


@pytest.mark.skipif(not can_isolate(), reason="no closed room on this machine")
def test_python_runs_what_the_model_writes():
    environment = environment_maker("python", pond=None)(prompt("6 x 7?", "42"))
    assert environment.reset().tools[0]["function"]["name"] == "python"
    reply = environment.step(calls(("python", {"code": "print(6 * 7)"}), ("python", {"code": "open('/etc/passwd')"})))
    assert reply.messages[0].content == "42"
    assert "FileNotFoundError" in json.loads(reply.messages[1].content)["error"]
    assert environment.step(Message("assistant", "It is 42.")).done


def test_look_up_knows_the_pond_in_both_languages(tmp_path):
    world = World.generate(0, creatures=4, held_out=1)
    write_pond(tmp_path / "pond", world)
    make = environment_maker("look_up", pond=str(tmp_path / "pond"))
    for creature in world.creatures:
        for language in ("en", "zh"):
            environment = make(prompt("Where?"))
            call = ("look_up", {"subject": creature.name(language), "property": "home"})
            assert environment.step(calls(call)).messages[0].content == creature.fact("home", language)
    with pytest.raises(UserError, match="environment question does not read it"):  # look_up was forgotten
        environment_maker("question", pond=str(tmp_path / "pond"))
    with pytest.raises(UserError, match="--pond"):
        environment_maker("look_up", pond=None)


def test_the_game():
    environment = environment_maker("guess", pond=None)(prompt("Find it.", "7"))
    environment.reset()

    def guess(number):
        return environment.step(calls(("guess", {"number": number})))

    assert guess(3).messages[0].content == "higher"
    assert guess(9).messages[0].content == "lower"
    assert "from 1 to 15" in guess(99).messages[0].content
    assert not guess(8).done
    found = guess(7)
    assert (found.done, found.reward) == (True, 1.0)
    gave_up = environment_maker("guess", pond=None)(prompt("Find it."))
    assert 1 <= gave_up.secret <= 15
    assert gave_up.step(Message("assistant", "no idea")).reward == 0
    assert gave_up.secret == environment_maker("guess", pond=None)(prompt("Find it.")).secret


@pytest.mark.parametrize("name", ["calculator", "guess"])
@pytest.mark.parametrize(
    ("written", "sign"),
    [
        ("<tool_call>{bad</tool_call>", "a call is a JSON object"),
        ("<tool_call>", "a call is a JSON object"),
        ('<tool_call>{"name": "NAME", "arguments": "{}"}</tool_call>', "a call is a JSON object"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "a call is a JSON object"),
        (
            '<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": ' + "9" * 5000 + "}}</tool_call>",
            "a call is a JSON object",
        ),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "there is no tool 'other'"),
        ('<tool_call>{"name": "NAME"}</tool_call>', "NAME takes ARGUMENT; got none"),
        ('<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": NaN}}</tool_call>', "ARGUMENT must be of type"),
        ('<tool_call>{"name": "NAME", "arguments": {"ARGUMENT": null}}</tool_call>', "ARGUMENT must be of type"),
        ('<tool_call>{"name": "NAME", "arguments": {"\\ud800": 1}}</tool_call>', "NAME takes ARGUMENT"),
    ],
)
def test_a_wrong_call_comes_back_as_words_and_the_episode_goes_on(name, written, sign):
    environment = environment_maker(name, pond=None)(prompt("Well?", "7"))
    tool = environment.reset().tools[0]["function"]
    (argument,) = tool["parameters"]["required"]
    written, sign = (text.replace("NAME", tool["name"]).replace("ARGUMENT", argument) for text in (written, sign))
    reply = environment.step(parse_assistant(written))
    assert (reply.done, reply.reward, len(reply.messages)) == (False, 0.0, 1)
    assert sign in json.loads(reply.messages[0].content)["error"]
    ids = render_continuation(tiny()[1], reply.messages)  # half a character does not stop a run
    assert ids


def test_a_right_call_beside_a_wrong_one_is_answered():
    environment = environment_maker("calculator", pond=None)(prompt("6 x 7?", "42"))
    right = '<tool_call>{"name": "calculate", "arguments": {"expression": "6*7"}}</tool_call>'
    reply = environment.step(parse_assistant(right + "<tool_call>{bad</tool_call>"))
    assert reply.messages[0].content == "42"
    assert "JSON object" in reply.messages[1].content


def test_the_game_plays_again_and_needs_a_number_that_can_be_found():
    environment = environment_maker("guess", pond=None)(prompt("Find it.", 20.0, highest="20"))
    for _ in range(2):
        environment.reset()
        first = environment.step(calls(("guess", {"number": 1}), ("guess", {"number": 20})))  # the first one counts
        assert (first.messages[0].content, first.done, first.reward) == ("higher", False, 0.0)
        assert environment.step(calls(("guess", {"number": 20}))).done
    for reference, row, sign in (
        ("seven", {}, "the answer of the prompt 'Find it.' is 'seven', no whole number"),
        ("7.5", {}, "no whole number"),
        ("99", {}, "is 99, which nobody can guess: numbers go from 1 to 15"),
        ("0", {}, "which nobody can guess"),
        (None, {"highest": 0}, "is 0, not 1 or more"),
        (None, {"highest": "ten"}, "`highest` of the prompt 'Find it.' is 'ten', no whole number"),
    ):
        with pytest.raises(UserError, match=sign):
            environment_maker("guess", pond=None)(prompt("Find it.", reference, **row))


def test_a_game_of_ones_own_is_found_beside_the_user(tmp_path, monkeypatch):
    (tmp_path / "own_game.py").write_text(
        "class Echo:\n    def __init__(self, prompt):\n        self.prompt = prompt\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    asked = prompt("Say it.", "it")
    assert environment_maker("own_game:Echo", pond=None)(asked).prompt is asked
    with pytest.raises(UserError, match=r"environment 'own_game:Eco'.*has no attribute"):
        environment_maker("own_game:Eco", pond=None)
    with pytest.raises(UserError, match=r"environment 'gues': there are question, .*guess, and MODULE:CLASS"):
        environment_maker("gues", pond=None)
