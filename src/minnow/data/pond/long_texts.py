"""Long texts with a hidden fact: something is said of a stranger, and far below it is asked for.

A stranger is a creature that does not live in this world. Its facts are drawn anew for every text and stand nowhere
else, so only who reads the text can know them: a model that answers has used its context, not its memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minnow.config import UserError
from minnow.data.pond.phrasebook import Phrasebook
from minnow.data.pond.questions import ask
from minnow.data.pond.relations import LANGUAGES, RELATIONS, VALUES, Language
from minnow.data.pond.stories import PHRASEBOOKS, PondDocument, answer, state, statement_documents
from minnow.data.pond.world import Creature, Split, World, all_names


@dataclass(frozen=True)
class HiddenFact:
    """A text up to a question's answer, and the answer."""

    language: Language
    relation: str
    text: str
    """Ends with the opener of the answer's line, without the space that may follow it."""
    answer: str


def strangers(world: World, split: Split) -> list[tuple[str, str]]:
    """Names (English, Chinese) that no creature of the world bears; half of them are held out from training texts.

    Raises UserError for a world that has used up the names.
    """
    taken = {creature.en for creature in world.creatures}
    free = [name for name in all_names() if name[0] not in taken]
    if len(free) < 2:
        raise UserError(f"the pond has {len(taken)} creatures: no names are left for strangers, so make it smaller")
    random.Random(f"pond/strangers/{world.seed}").shuffle(free)
    half = len(free) // 2
    return free[:half] if split == "training" else free[half:]


def _stranger(name: tuple[str, str], split: Split, rng: random.Random) -> Creature:
    facts = {relation: rng.choice(VALUES[relation]) for relation in RELATIONS}
    return Creature(en=name[0], zh=name[1], split=split, facts=facts)


def long_documents(world: World, count: int, characters: int, split: Split = "training") -> Iterator[PondDocument]:
    """`count` texts of about `characters` characters in both languages: the pond's documents one after another,
    strangers of `split` among them, and again and again a question about one that came by earlier."""
    rng = random.Random(f"pond/long/{world.seed}/{split}")
    names = strangers(world, split)
    fillers = {language: statement_documents(world, language, rng) for language in LANGUAGES}
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        # A Chinese character says about as much as four English letters.
        length = characters if language == "en" else characters // 4
        writer = _Writer(PHRASEBOOKS[language], fillers[language], split, rng)
        yield PondDocument(writer.write(names, length), language, "long")


@dataclass(frozen=True)
class _Writer:
    book: Phrasebook
    filler: Iterator[PondDocument]
    split: Split
    rng: random.Random

    def write(self, names: list[tuple[str, str]], length: int) -> str:
        """Paragraphs until there are `length` characters: newcomers, questions about them, other documents."""
        newcomers = self.rng.sample(names, len(names))
        met: list[tuple[Creature, str]] = []
        paragraphs: list[str] = []
        written = 0
        while written < length:
            kind = self.rng.random()
            if kind < 0.3 and newcomers:
                stranger = _stranger(newcomers.pop(), self.split, self.rng)
                relations = self.rng.sample(RELATIONS, self.rng.randint(1, 3))
                met += [(stranger, relation) for relation in relations]
                paragraph = self.book.space.join(_fact(self.book, stranger, name, self.rng) for name in relations)
            elif kind < 0.9 and met:
                question, reply = _question(self.book, *self.rng.choice(met), self.rng)
                paragraph = question + reply
            else:
                paragraph = next(self.filler).text
            paragraphs.append(paragraph)
            written += len(paragraph) + 1
        return "\n".join(paragraphs)


def _fact(book: Phrasebook, stranger: Creature, relation: str, rng: random.Random) -> str:
    return state(book, stranger, relation, rng.choice(book.statements[relation]))


def _question(book: Phrasebook, stranger: Creature, relation: str, rng: random.Random) -> tuple[str, str]:
    """Two lines, cut where the answer begins: its first token holds the space before it."""
    asked, answered = rng.choice(book.dialogue)
    question = f"{asked}{ask(book, stranger, relation, rng)}\n{answered.rstrip()}"
    return question, answered[len(answered.rstrip()) :] + answer(book, stranger, relation)


def hidden_facts(
    world: World, language: Language, count: int, *, tokens: int, num_tokens: Callable[[str], int]
) -> Iterator[HiddenFact]:
    """`count` examination texts in which one fact about a held-out stranger is hidden, and asked for at the end.

    The fact stands at depths that are spread evenly from the beginning to just before the question.

    Args:
        world: whose documents stand around the fact.
        language: of the text.
        count: texts.
        tokens: length of text and answer together, at most, and less by a paragraph at most.
        num_tokens: counts the tokens of a text.
    """
    rng = random.Random(f"pond/hidden/{world.seed}/{language}/{tokens}")
    book = PHRASEBOOKS[language]
    names = strangers(world, "held_out")
    filler = statement_documents(world, language, rng)
    for index in range(count):
        stranger = _stranger(rng.choice(names), "held_out", rng)
        relation = rng.choice(RELATIONS)
        fact = _fact(book, stranger, relation, rng)
        question, reply = _question(book, stranger, relation, rng)
        room = tokens - num_tokens(f"\n{fact}\n{question}{reply}")
        paragraphs: list[str] = []
        while room > 0:
            paragraph = next(filler).text
            room -= num_tokens(f"\n{paragraph}")
            if room >= 0:
                paragraphs.append(paragraph)
        depth = round((index + 0.5) / count * len(paragraphs))
        text = "\n".join([*paragraphs[:depth], fact, *paragraphs[depth:], question])
        yield HiddenFact(language, relation, text, reply)
