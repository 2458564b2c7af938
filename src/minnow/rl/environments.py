"""The environments by name: a question, tools that are really called, and a little game."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minnow.config import UserError
from minnow.data.pond.relations import LANGUAGES, RELATIONS
from minnow.data.pond.write import load_world
from minnow.data.prompts import Prompt
from minnow.rl.environment import Environment, Reply, SingleTurn
from minnow.rl.environment_calls import make, shown
from minnow.rl.rollouts import RolloutConfig
from minnow.rl.user_code import load_object
from minnow.tokenizer.chat import Conversation, Message
from minnow.tokenizer.special import TOOL_CALL
from minnow.tools import CALCULATOR, Tool, ToolError, call_tool, lookup_tool
from minnow.tools.sandbox import python_tool

ENVIRONMENTS = ("question", "calculator", "look_up", "python", "guess")


@dataclass
class ToolUse:
    """A question and tools: every call is answered, and a turn without a call ends the episode. Rewards judge its
    answer."""

    prompt: Prompt
    tools: Sequence[Tool]

    def reset(self) -> Conversation:
        """Return the prompt with the tools described."""
        return Conversation(self.prompt.conversation.messages, tuple(tool.schema for tool in self.tools))

    def step(self, answer: Message) -> Reply:
        """Call what is to be called; mistakes come back as words."""
        results = [Message("tool", call_tool(self.tools, call)) for call in answer.tool_calls]
        results += _misspelt(answer)
        return Reply(tuple(results), done=not results)


def _misspelt(answer: Message) -> list[Message]:
    """What to say where a call was begun and is none; the parser has left it in the content."""
    if TOOL_CALL not in answer.content:
        return []
    wanted = 'a call is a JSON object {"name": ..., "arguments": {...}} between the tags'
    return [Message("tool", json.dumps({"error": wanted}))]


class GuessNumber:
    """A little game: find a number from 1 to `highest` (the row's `highest`, else 15) with the tool `guess`.

    The prompt's reference is the number; without one it is drawn from the prompt's text. Finding it earns 1. UserError
    for a number that cannot be found.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        highest = prompt.row.get("highest")
        self.highest = 15 if highest is None else _whole(prompt, "`highest`", highest)
        if self.highest < 1:
            raise UserError(
                f"environment guess: `highest` of the prompt {shown(prompt)} is {self.highest}, not 1 or more"
            )
        if prompt.reference is None:
            self.secret = random.Random(str(prompt.conversation.messages)).randint(1, self.highest)
        else:
            self.secret = _whole(prompt, "the answer", prompt.reference)
            if not 1 <= self.secret <= self.highest:
                raise UserError(
                    f"environment guess: the answer of the prompt {shown(prompt)} is {self.secret}, which nobody can "
                    f"guess: numbers go from 1 to {self.highest}, the row's `highest`"
                )
        parameters = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
        self.tool = Tool("guess", f"Guess the number from 1 to {self.highest}.", parameters, self._guess)
        self.found = False

    def reset(self) -> Conversation:
        """Return the prompt with the tool described."""
        self.found = False
        return Conversation(self.prompt.conversation.messages, (self.tool.schema,))

    def step(self, answer: Message) -> Reply:
        """Say higher or lower; the first call of a turn counts."""
        if not answer.tool_calls:
            misspelt = _misspelt(answer)
            return Reply(tuple(misspelt), done=not misspelt)
        result = call_tool([self.tool], answer.tool_calls[0])
        return Reply((Message("tool", result),), done=self.found, reward=float(self.found))

    def _guess(self, number: int) -> str:
        if not 1 <= number <= self.highest:
            raise ToolError(f"the number is from 1 to {self.highest}")
        self.found = number == self.secret
        return "found" if self.found else "higher" if self.secret > number else "lower"


def _whole(prompt: Prompt, what: str, value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise UserError(f"environment guess: {what} of the prompt {shown(prompt)} is {value!r}, no whole number")
    return int(number)


def environment_maker(
    name: str, *, pond: str | None, seconds: float = RolloutConfig.environment_seconds
) -> Callable[[Prompt], Environment]:
    """The function that makes an episode of a prompt: one of ENVIRONMENTS, or MODULE:CLASS of the user's own.

    `pond`: folder with the world that `look_up` knows. `seconds`: longest wait for the making of one of the user's own.
    UserError for a name that is neither, and for a pond that nobody looks into.
    """
    if pond is not None and name != "look_up":
        raise UserError(f"--pond {pond} is what environment look_up knows; environment {name} does not read it")
    if ":" in name:
        own: Callable[[Prompt], Environment] = load_object(name, "environment")
        return lambda prompt: make(own, prompt, seconds=seconds)
    if name not in ENVIRONMENTS:
        raise UserError(f"environment {name!r}: there are {', '.join(ENVIRONMENTS)}, and MODULE:CLASS of your own")
    if name == "question":
        return SingleTurn
    if name == "guess":
        return GuessNumber
    if name == "calculator":
        tools = [CALCULATOR]
    elif name == "python":
        tools = [python_tool()]
    else:
        if pond is None:
            raise UserError("environment look_up needs the world it looks things up in: say --pond DIR")
        tools = [lookup_tool(_facts(Path(pond)))]
    return lambda prompt: ToolUse(prompt, tools)


def _facts(folder: Path) -> dict[str, dict[str, str]]:
    """Every creature's facts, under its English and its Chinese name, in that language."""
    return {
        creature.name(language): {relation: creature.fact(relation, language) for relation in RELATIONS}
        for creature in load_world(folder).creatures
        for language in LANGUAGES
    }
