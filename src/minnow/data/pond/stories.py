"""Text that states facts: profiles, stories, comparisons, groups, names in two languages. No questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from minnow.data.pond.chinese import CHINESE
from minnow.data.pond.english import ENGLISH
from minnow.data.pond.phrasebook import Phrasebook, slots
from minnow.data.pond.relations import RELATIONS, Language
from minnow.data.pond.world import Creature, World

PHRASEBOOKS: dict[Language, Phrasebook] = {"en": ENGLISH, "zh": CHINESE}
LINES_SHARE = 0.2
"""Of the documents that list facts, these stand one sentence a line. A name after a line break and one after a space
are different tokens, and people type both."""
PRONOUN_SHARE = 0.4
"""Of a profile's sentences, these say "it": so do the answers, which then are recalled from a name further back."""

Mention = tuple[str, str]
"""(the creature's English name, the relation): one fact, stated once."""


@dataclass(frozen=True)
class PondDocument:
    """A pretraining document and what it says."""

    text: str
    language: Language
    kind: str
    mentions: tuple[Mention, ...] = ()


@dataclass
class Deck:
    """Deals creatures in shuffled rounds, so that all come up equally often."""

    creatures: Sequence[Creature]
    rng: random.Random
    left: list[Creature] = field(default_factory=list)

    def deal(self, other_than: Creature | None = None) -> Creature:
        """The next creature; where a second one is wanted, not the same again."""
        if not self.left:
            self.left = list(self.creatures)
            self.rng.shuffle(self.left)
        creature = self.left.pop()
        return self.deal() if creature is other_than else creature


def _joined(book: Phrasebook, sentences: Sequence[str], rng: random.Random) -> str:
    return ("\n" if rng.random() < LINES_SHARE else book.space).join(sentences)


def state(book: Phrasebook, creature: Creature, relation: str, template: str) -> str:
    """One fact of `creature` in the words of `template`."""
    return book.sentence(template, x=creature.name(book.language), v=creature.fact(relation, book.language))


def answer(book: Phrasebook, creature: Creature, relation: str) -> str:
    """The one sentence that answers a question after `relation`: "It is red."

    It does not repeat the name. Held-out names stand in no answer of the training text, so a small model that was to
    begin with the name would begin with another creature's: it then is examined in copying, not in what it knows.
    """
    return state(book, creature, relation, book.pronouns[relation][0])


def profile(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """Five to nine facts of one creature in any order."""
    creature = deck.deal()
    relations = rng.sample(RELATIONS, rng.randint(5, len(RELATIONS)))
    sentences = []
    if rng.random() < 0.5:
        sentences.append(book.sentence(rng.choice(book.openings), x=creature.name(book.language)))
    for relation in relations:
        by_pronoun = sentences and rng.random() < PRONOUN_SHARE
        templates = (book.pronouns if by_pronoun else book.statements)[relation]
        sentences.append(state(book, creature, relation, rng.choice(templates)))
    return PondDocument(
        _joined(book, sentences, rng), book.language, "profile", tuple((creature.en, name) for name in relations)
    )


def story(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """A day in the life of one creature, with visitors."""
    creature = deck.deal()
    scenes = [rng.choice(group) for group in book.scenes if rng.random() < 0.7]
    lines = [*scenes, rng.choice(book.endings)]
    words = {"x": creature.name(book.language)}
    words |= {relation: creature.fact(relation, book.language) for relation in RELATIONS}
    mentions: list[Mention] = []
    if any("y" in slots(line) for line in lines):
        visitor = deck.deal(other_than=creature)
        words["y"] = visitor.name(book.language)
        words |= {f"y_{relation}": visitor.fact(relation, book.language) for relation in RELATIONS}
        mentions += [(visitor.en, slot[2:]) for line in lines for slot in set(slots(line)) if slot.startswith("y_")]
    mentions += [(creature.en, slot) for line in lines for slot in set(slots(line)) if slot in RELATIONS]
    text = book.space.join(book.sentence(line, **words) for line in lines)
    return PondDocument(text, book.language, "story", tuple(sorted(mentions)))


def comparison(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """Two creatures side by side."""
    one = deck.deal()
    two = deck.deal(other_than=one)
    relations = rng.sample(RELATIONS, rng.randint(2, 5))
    sentences = [
        book.sentence(
            rng.choice(book.contrasts[relation]),
            x=one.name(book.language),
            v=one.fact(relation, book.language),
            y=two.name(book.language),
            w=two.fact(relation, book.language),
        )
        for relation in relations
    ]
    return PondDocument(
        _joined(book, sentences, rng),
        book.language,
        "comparison",
        tuple((creature.en, relation) for relation in relations for creature in (one, two)),
    )


def news(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """Single facts of several creatures: here the sentence alone says who is meant."""
    facts = [(deck.deal(), rng.choice(RELATIONS)) for _ in range(rng.randint(3, 7))]
    sentences = [state(book, creature, name, rng.choice(book.statements[name])) for creature, name in facts]
    return PondDocument(
        _joined(book, sentences, rng),
        book.language,
        "news",
        tuple((creature.en, name) for creature, name in facts),
    )


def group(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """Creatures that share an answer, for one or two relations."""
    sentences, mentions = [], []
    for relation in rng.sample(RELATIONS, 2):
        value = deck.deal().facts[relation]
        sharing = [creature for creature in deck.creatures if creature.facts[relation] == value]
        chosen = rng.sample(sharing, min(len(sharing), 4))
        if len(chosen) < 2:
            sentences.append(state(book, chosen[0], relation, rng.choice(book.statements[relation])))
        else:
            names = book.join_names([creature.name(book.language) for creature in chosen])
            sentences.append(book.sentence(book.groups[relation], v=value.word(book.language), names=names))
        mentions += [(creature.en, relation) for creature in chosen]
    return PondDocument(book.space.join(sentences), book.language, "group", tuple(mentions))


def translation(book: Phrasebook, deck: Deck, rng: random.Random) -> PondDocument:
    """A creature's name in the other language, and a few facts said in both."""
    creature = deck.deal()
    other = PHRASEBOOKS["zh" if book.language == "en" else "en"]
    sentences = [
        book.sentence(
            rng.choice(book.translations), x=creature.name(book.language), other=creature.name(other.language)
        )
    ]
    relations = rng.sample(RELATIONS, rng.randint(1, 3))
    for relation in relations:
        sentences += [state(both, creature, relation, both.statements[relation][0]) for both in (book, other)]
    mentions = tuple((creature.en, relation) for relation in relations for _ in range(2))
    return PondDocument("\n".join(sentences), book.language, "translation", mentions)


Writer = Callable[[Phrasebook, Deck, random.Random], PondDocument]
# Kinds and shares. Statements about one creature carry the learning (a fact learnt as "red are: Bolko" is not
# recalled after "Bolko is"), so lists of creatures stay few.
KINDS: dict[Writer, float] = {
    profile: 0.40,
    story: 0.28,
    comparison: 0.12,
    news: 0.12,
    group: 0.03,
    translation: 0.05,
}


def statement_documents(world: World, language: Language, rng: random.Random) -> Iterator[PondDocument]:
    """An endless stream of documents in one language that state facts of all creatures evenly."""
    decks = {writer: Deck(world.creatures, rng) for writer in KINDS}
    while True:
        (writer,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
        yield writer(PHRASEBOOKS[language], decks[writer], rng)
