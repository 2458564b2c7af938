"""Questions about single facts, and the dialogues that teach how to answer them."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from minnow.data.pond.phrasebook import Phrasebook
from minnow.data.pond.relations import RELATIONS, Language
from minnow.data.pond.stories import PHRASEBOOKS, Deck, Mention, PondDocument, answer
from minnow.data.pond.world import Creature, Split, World
from minnow.tokenizer.chat import Conversation, Message

Wording = Literal["trained", "unseen"]


@dataclass(frozen=True)
class Question:
    """A question with one right answer: a whole sentence of fixed form, compared by `normal_form`."""

    language: Language
    split: Split
    wording: Wording
    creature: str
    """English name."""
    relation: str
    prompt: str
    answer: str


def normal_form(text: str) -> str:
    """What exact match compares: NFKC, lower case, single spaces, no punctuation at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).rstrip(".!。 ")


@cache
def wordings(language: Language, relation: str, wording: Wording) -> tuple[str, ...]:
    """All question templates with a slot {x}.

    Trained = trained lead x trained core. Unseen = any lead x unseen core: what asks for the fact is new.
    """
    book = PHRASEBOOKS[language]
    templates = []
    for kind, cores in book.question_cores[relation].items():
        leads = book.question_leads[kind]
        if wording == "trained":
            pairs = [(lead, core) for core in cores.trained for lead in leads.trained]
        else:
            pairs = [(lead, core) for core in cores.unseen for lead in leads.trained + leads.unseen]
        templates += [lead.replace("{core}", core) for lead, core in pairs]
    seen: tuple[str, ...] = wordings(language, relation, "trained") if wording == "unseen" else ()
    return tuple(template for template in dict.fromkeys(templates) if template not in seen)


def ask(book: Phrasebook, creature: Creature, relation: str, rng: random.Random, wording: Wording = "trained") -> str:
    """A question after one fact."""
    template = rng.choice(wordings(book.language, relation, wording))
    return book.sentence(template, x=creature.name(book.language))


def questions(world: World, split: Split, wording: Wording, language: Language) -> list[Question]:
    """One question for every creature of `split` and every relation; the world's seed draws the wording."""
    book = PHRASEBOOKS[language]
    rng = random.Random(f"pond/questions/{world.seed}/{split}/{wording}/{language}")
    return [
        Question(
            language=language,
            split=split,
            wording=wording,
            creature=creature.en,
            relation=relation,
            prompt=ask(book, creature, relation, rng, wording),
            answer=answer(book, creature, relation),
        )
        for creature in world.members(split)
        for relation in RELATIONS
    ]


Exchange = tuple[str, str]


def _fact_exchanges(
    book: Phrasebook, deck: Deck, rng: random.Random, turns: int
) -> tuple[list[Exchange], list[Mention]]:
    """`turns` questions: about one creature, mostly named once, and now and then the same about another."""
    creature = deck.deal()
    relation = rng.choice(RELATIONS)
    exchanges = [(ask(book, creature, relation, rng), answer(book, creature, relation))]
    mentions = [(creature.en, relation)]
    for _ in range(turns - 1):
        if rng.random() < 0.3:
            creature = deck.deal(other_than=creature)
            prompt = book.sentence(rng.choice(book.switches), x=creature.name(book.language))
        else:
            relation = rng.choice([name for name in RELATIONS if name != relation])
            by_name = rng.random() < 0.3
            prompt = ask(book, creature, relation, rng) if by_name else rng.choice(book.follow_ups[relation])
        exchanges.append((prompt, answer(book, creature, relation)))
        mentions.append((creature.en, relation))
    return exchanges, mentions


def _summary(book: Phrasebook, deck: Deck, rng: random.Random) -> Exchange:
    creature = deck.deal()
    relations = [name for name in RELATIONS if name in ("colour", "home", "food")]
    sentences = [answer(book, creature, relation) for relation in relations]
    prompt = book.sentence(rng.choice(book.summaries), x=creature.name(book.language))
    return prompt, book.space.join(sentences)


def _small_talk(book: Phrasebook, rng: random.Random) -> Exchange:
    prompts, reply = rng.choice(book.small_talk)
    return rng.choice(prompts), reply


def question_documents(world: World, language: Language, rng: random.Random) -> Iterator[PondDocument]:
    """An endless stream of dialogues in plain text about training creatures."""
    book = PHRASEBOOKS[language]
    deck = Deck(world.members("training"), rng)
    while True:
        exchanges, mentions = _fact_exchanges(book, deck, rng, turns=rng.randint(2, 6))
        if rng.random() < 0.1:
            exchanges.insert(0, _small_talk(book, rng))
        asked, answered = rng.choice(book.dialogue)
        lines = [f"{asked}{prompt}\n{answered}{reply}" for prompt, reply in exchanges]
        yield PondDocument("\n".join(lines), language, "questions", tuple(mentions))


def conversations(world: World, language: Language, seed: int = 0) -> Iterator[Conversation]:
    """An endless stream of conversations for SFT about training creatures, with trained wordings.

    Of ten, six ask one question, two go on for two to four, and two are small talk or a request to tell more.
    """
    book = PHRASEBOOKS[language]
    rng = random.Random(f"pond/conversations/{world.seed}/{seed}/{language}")
    deck = Deck(world.members("training"), rng)
    while True:
        kind = rng.choices(("single", "several", "summary", "talk"), weights=(0.6, 0.2, 0.06, 0.14))[0]
        if kind == "summary":
            exchanges = [_summary(book, deck, rng)]
        elif kind == "talk":
            exchanges = [_small_talk(book, rng)]
            if rng.random() < 0.5:
                exchanges += _fact_exchanges(book, deck, rng, turns=1)[0]
        else:
            exchanges = _fact_exchanges(book, deck, rng, turns=1 if kind == "single" else rng.randint(2, 4))[0]
        messages = [Message("system", rng.choice(book.system_prompts))] if rng.random() < 0.1 else []
        for prompt, reply in exchanges:
            messages += [Message("user", prompt), Message("assistant", reply)]
        yield Conversation(tuple(messages))
