"""Conversations with two tools, a calculator and a look-up of the pond's facts: calls, results, errors, answers."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from minnow.data.pond.arithmetic import problems
from minnow.data.pond.questions import ask
from minnow.data.pond.relations import LANGUAGES, RELATIONS, VALUES, Language
from minnow.data.pond.stories import PHRASEBOOKS, answer
from minnow.data.pond.world import Creature, Split, World, all_names
from minnow.tokenizer.chat import Conversation, Message, ToolCall
from minnow.tools import CALCULATOR, lookup_tool

Kind = Literal["look_up", "calculate", "parallel", "error", "none"]
KINDS: tuple[Kind, ...] = ("look_up", "calculate", "parallel", "error", "none")


TOOLS = (CALCULATOR.schema, lookup_tool({}).schema)


@dataclass(frozen=True)
class Episode:
    """One request, the calls it needs (in this order), their results, and the answer."""

    kind: Kind
    language: Language
    prompt: str
    calls: tuple[ToolCall, ...]
    results: tuple[str, ...]
    answer: str

    @property
    def request(self) -> Conversation:
        """The user's message, with the tools."""
        return Conversation((Message("user", self.prompt),), TOOLS)

    @property
    def answered(self) -> Conversation:
        """Request, calls and results: what the final answer stands behind. Without calls, the request."""
        if not self.calls:
            return self.request
        results = tuple(Message("tool", result) for result in self.results)
        return Conversation((*self.request.messages, Message("assistant", "", None, self.calls), *results), TOOLS)

    @property
    def whole(self) -> Conversation:
        """All of it."""
        return Conversation((*self.answered.messages, Message("assistant", self.answer)), TOOLS)


def episodes(world: World, split: Split, language: Language, seed: int = 0) -> Iterator[Episode]:
    """An endless stream. Held out are its creatures, the names that nobody bears, and the pairs of numbers.

    What the look-up says in training episodes is drawn at random, and half of them ask about names that nobody bears: a
    model that has read the stories would otherwise learn to answer from memory, and not from the result, and to call
    for a creature that it knows, and not for the one that is named. In the held-out ones it says what is true.
    """
    rng = random.Random(f"pond/tools/{world.seed}/{seed}/{split}/{language}")
    sums = problems(world, split, language, seed=seed + 1)
    strangers = _strangers(world, split)
    book = PHRASEBOOKS[language]

    def look_up(known: bool = True) -> Episode:
        is_made_up = split == "training" and rng.random() < 0.5
        creature = rng.choice(world.members(split) if known and not is_made_up else strangers)
        relation = rng.choice(RELATIONS)
        if known and split == "training":
            creature = replace(creature, facts=dict(creature.facts) | {relation: rng.choice(VALUES[relation])})
        name = creature.name(language)
        call = ToolCall("look_up", {"subject": name, "property": relation})
        result = creature.fact(relation, language) if known else _error(f"nothing is known about '{name}'")
        reply = answer(book, creature, relation) if known else _UNKNOWN[language]
        kind: Kind = "look_up" if known else "error"
        return Episode(kind, language, ask(book, creature, relation, rng), (call,), (result,), reply)

    def calculate() -> Episode:
        problem = next(sums)
        call = ToolCall("calculate", {"expression": f"{problem.a} {problem.sign} {problem.b}"})
        return Episode("calculate", language, problem.prompt, (call,), (str(problem.result),), problem.answer)

    while True:
        kind = rng.choices(KINDS, weights=(0.3, 0.25, 0.25, 0.1, 0.1))[0]
        if kind == "look_up":
            yield look_up()
        elif kind == "calculate":
            yield calculate()
        elif kind == "error":
            yield look_up(known=False)
        elif kind == "parallel":
            parts = [look_up(), calculate() if rng.random() < 0.5 else look_up()]
            rng.shuffle(parts)
            yield _together(parts, book.space)
        else:
            asked, reply = rng.choice(book.small_talk)
            yield Episode("none", language, rng.choice(asked), (), (), reply)


def tool_conversations(world: World, count: int) -> Iterator[Conversation]:
    """`count` conversations of the training split, in both languages."""
    rng = random.Random(f"pond/tools/{world.seed}")
    streams = {language: episodes(world, "training", language) for language in LANGUAGES}
    for _ in range(count):
        yield next(streams[rng.choice(LANGUAGES)]).whole


def calculator_conversations(world: World, count: int, *, used: float = 0.4) -> Iterator[Conversation]:
    """`count` sums of the training split with the calculator at hand, in both languages.

    Its teacher does most of them in the head and calls it in a share `used`. A small model that answers as readily has
    not learnt to add: a start for reinforcement, which finds out that calling pays.
    """
    rng = random.Random(f"pond/calculator/{world.seed}")
    sums = {language: problems(world, "training", language, seed=3) for language in LANGUAGES}
    for _ in range(count):
        problem = next(sums[rng.choice(LANGUAGES)])
        user, answer = Message("user", problem.prompt), Message("assistant", problem.answer)
        call = ToolCall("calculate", {"expression": f"{problem.a} {problem.sign} {problem.b}"})
        called = (Message("assistant", "", None, (call,)), Message("tool", str(problem.result)))
        yield Conversation((user, *(called if rng.random() < used else ()), answer), (CALCULATOR.schema,))


_UNKNOWN: dict[Language, str] = {"en": "I do not know that creature.", "zh": "我不认识这个小动物。"}


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def _together(parts: list[Episode], space: str) -> Episode:
    """Several requests in one message: their calls are made at once."""
    return Episode(
        "parallel",
        parts[0].language,
        space.join(part.prompt for part in parts),
        tuple(call for part in parts for call in part.calls),
        tuple(result for part in parts for result in part.results),
        space.join(part.answer for part in parts),
    )


def _strangers(world: World, split: Split) -> list[Creature]:
    """Creatures that do not exist: names of the same kind that nobody bears, a fifth of them held out."""
    taken = {creature.en for creature in world.creatures}
    facts = {relation: VALUES[relation][0] for relation in RELATIONS}
    found = []
    for en, zh in all_names():
        side: Split = "held_out" if zlib.crc32(en.encode()) % 5 == 0 else "training"
        if en not in taken and side == split:
            found.append(Creature(en, zh, split, facts))
    return found


def sample_episodes(world: World, split: Split, count: int) -> list[Episode]:
    """`count` episodes in both languages, for an examination."""
    streams = [episodes(world, split, language, seed=7) for language in LANGUAGES]
    return [episode for stream in streams for episode in itertools.islice(stream, count // len(streams))]
