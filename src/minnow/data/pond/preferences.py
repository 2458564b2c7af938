"""Good and bad answers: a model that knows the pond should say what it knows, and say so when it does not know.

Half of the pairs ask about a creature of the pond: the fact is better than another value, or than "I do not know it."
The other half ask about a visitor, a person of whom no text of the pond ever spoke: there the honest answer is better
than any made-up fact. A model fresh from fine-tuning answers everything, so it prefers the better answer in about half
of the pairs. (Names made of the pond's own syllables do not do: a model of a few million parameters cannot tell a
creature that it has met from one that sounds like it.)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from minnow.data.pond.phrasebook import Phrasebook
from minnow.data.pond.questions import ask
from minnow.data.pond.relations import LANGUAGES, RELATIONS, VALUES, Language
from minnow.data.pond.stories import PHRASEBOOKS, answer
from minnow.data.pond.visitors import VISITORS
from minnow.data.pond.world import Creature, Split, World
from minnow.tokenizer.chat import Conversation, Message

HELD_OUT_VISITORS = 0.25


@dataclass(frozen=True)
class PondPair:
    """A question with a better and a worse answer."""

    language: Language
    known: bool
    """Whether the question is about a creature of the pond."""
    prompt: str
    chosen: str
    rejected: str


def visitors(world: World, split: Split) -> tuple[Creature, ...]:
    """People, with facts drawn for the worse answers; the splits share none."""
    rng = random.Random(f"pond/visitors/{world.seed}")
    names = list(VISITORS)
    rng.shuffle(names)
    border = round(len(names) * HELD_OUT_VISITORS)
    chosen = names[:border] if split == "held_out" else names[border:]
    return tuple(
        Creature(en, zh, split, {relation: rng.choice(VALUES[relation]) for relation in RELATIONS}) for en, zh in chosen
    )


def preference_pairs(world: World, split: Split, count: int) -> Iterator[PondPair]:
    """`count` pairs in both languages, half about creatures of `split`, half about visitors; the seed draws them."""
    rng = random.Random(f"pond/preferences/{world.seed}/{split}")
    about = {
        known: _in_turn(
            [
                (language, creature, relation)
                for language in LANGUAGES
                for creature in (world.members(split) if known else visitors(world, split))
                for relation in RELATIONS
            ],
            rng,
        )
        for known in (True, False)
    }
    for number in range(count):
        known = number % 2 == 0
        found = next(about[known], None)
        if found is not None:  # a world may hold out no creature
            language, creature, relation = found
            yield _pair(PHRASEBOOKS[language], creature, relation, known, rng)


def unsure_conversations(world: World, count: int) -> Iterator[Conversation]:
    """The training pairs' prompts with one answer each, the better one in a third of the rows.

    What a model learns from this is to say this and that: a start for reinforcement with a reward model, which then
    finds both kinds of answer among its samples.
    """
    rng = random.Random(f"pond/unsure/{world.seed}")
    for pair in preference_pairs(world, "training", count):
        said = pair.chosen if rng.random() < 1 / 3 else pair.rejected
        yield Conversation((Message("user", pair.prompt), Message("assistant", said)))


def _pair(book: Phrasebook, creature: Creature, relation: str, known: bool, rng: random.Random) -> PondPair:
    fact = answer(book, creature, relation)
    if known:
        chosen, rejected = fact, book.ignorance if rng.random() < 0.5 else _other(book, creature, relation, rng)
    else:
        chosen, rejected = book.ignorance, fact
    return PondPair(book.language, known, ask(book, creature, relation, rng), chosen, rejected)


def _other(book: Phrasebook, creature: Creature, relation: str, rng: random.Random) -> str:
    """The answer with another value of the relation."""
    value = rng.choice([value for value in VALUES[relation] if value != creature.facts[relation]])
    return answer(
        book, Creature(creature.en, creature.zh, creature.split, {**creature.facts, relation: value}), relation
    )


def _in_turn(
    items: list[tuple[Language, Creature, str]], rng: random.Random
) -> Iterator[tuple[Language, Creature, str]]:
    """Shuffled items, again and again."""
    rng.shuffle(items)
    return itertools.cycle(items)
