"""Environments: tools are really called, mistakes come back as words, the game has an end."""

import json
import sys

import pytest

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.data.prompts import Prompt
from minnow.rl.environments import environment_maker
from minnow.tokenizer.chat import Conversation, Message, ToolCall


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


def test_look_up_knows_the_pond_in_both_languages(tmp_path):
    world = World.generate(0, creatures=4, held_out=1)
    write_pond(tmp_path / "pond", world)
    make = environment_maker("look_up", pond=str(tmp_path / "pond"))
    for creature in world.creatures:
        for language in ("en", "zh"):
            environment = make(prompt("Where?"))
            call = ("look_up", {"subject": creature.name(language), "property": "home"})
            assert environment.step(calls(call)).messages[0].content == creature.fact("home", language)
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
