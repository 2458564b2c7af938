"""Questions about the pond's pictures: what trains a model that sees, and what it is examined on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from minnow.data.pond.phrasebook import Wordings
from minnow.data.pond.picture_words import ASPECTS, BOOKS, Aspect, PictureBook
from minnow.data.pond.pictures import Group, Scene, scenes
from minnow.data.pond.questions import Wording
from minnow.data.pond.relations import LANGUAGES, Language
from minnow.data.pond.stories import PHRASEBOOKS, PondDocument

HELD_OUT_PICTURES = 100


@dataclass(frozen=True)
class PictureQuestion:
    """A question about a held-out picture, with one right answer, compared by `normal_form`."""

    scene: Scene
    picture: int
    """Number of the held-out picture."""
    language: Language
    wording: Wording
    aspect: Aspect
    prompt: str
    answer: str
    guess: str
    """The answer that training gives most often to such a question: what it is worth to know without looking."""

    def row(self) -> dict[str, Any]:
        """The conversation as a row of `pictures_held_out.jsonl`, with what else is known."""
        known = {name: getattr(self, name) for name in ("language", "wording", "aspect", "guess")}
        return picture_row(held_out_path(self.picture), [(self.prompt, self.answer)]) | known


def training_path(number: int) -> str:
    """Where a training picture lies in the pond's folder."""
    return f"pictures/{number:06}.png"


def held_out_path(number: int) -> str:
    """Where a held-out picture lies in the pond's folder."""
    return f"pictures/held_out_{number:03}.png"


def picture_row(path: str, exchanges: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation about a picture that stands before its first question."""
    messages: list[dict[str, Any]] = []
    for prompt, reply in exchanges:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    messages[0]["content"] = [{"type": "image", "image": path}, {"type": "text", "text": exchanges[0][0]}]
    return {"messages": messages}


def picture_captions(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """A caption in each language of the first `count` training scenes, on a request in a trained wording.

    Eyes learn from these first: a caption says all that is known of a picture, where an answer says one thing, and a
    model that does not look yet does well at guessing it. seed: the world's.
    """
    rng = random.Random(f"pond/picture_captions/{seed}")
    for number, scene in enumerate(itertools.islice(scenes(seed, "training"), count)):
        for book in (BOOKS[language] for language in LANGUAGES):
            request = rng.choice(book.requests.trained)
            yield picture_row(training_path(number), [(request, book.caption(scene.groups))])


def picture_conversations(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Three questions about each of the same scenes, in a language that is drawn, in trained wordings."""
    rng = random.Random(f"pond/picture_conversations/{seed}")
    for number, scene in enumerate(itertools.islice(scenes(seed, "training"), count)):
        book = BOOKS[rng.choice(LANGUAGES)]
        exchanges = [_exchange(book, aspect, rng.choice(scene.groups), rng) for aspect in rng.sample(ASPECTS, 3)]
        yield picture_row(training_path(number), exchanges)


def picture_texts(seed: int, count: int) -> Iterator[PondDocument]:
    """`count` documents without pictures: a training scene in words, and questions about it.

    A language model that has read these knows the words, and looks up in what stands before a question; then only the
    pictures are new to it.
    """
    rng = random.Random(f"pond/picture_texts/{seed}")
    for scene in itertools.islice(scenes(seed, "training", "picture_texts"), count):
        book = BOOKS[rng.choice(LANGUAGES)]
        asked, answered = rng.choice(PHRASEBOOKS[book.language].dialogue)
        lines = [book.caption(scene.groups)]
        for aspect in rng.sample(ASPECTS, 3):
            prompt, reply = _exchange(book, aspect, rng.choice(scene.groups), rng)
            lines += [asked + prompt, answered + reply]
        yield PondDocument("\n".join(lines), book.language, "pictures")


def picture_questions(seed: int, wording: Wording, language: Language) -> list[PictureQuestion]:
    """A question of each aspect about every held-out picture; seed, the world's, draws group and wording."""
    book = BOOKS[language]
    rng = random.Random(f"pond/picture_questions/{seed}/{wording}/{language}")
    asked = []
    for number, scene in enumerate(itertools.islice(scenes(seed, "held_out"), HELD_OUT_PICTURES)):
        for aspect in ASPECTS:
            group = rng.choice(scene.groups)
            prompt, reply = _exchange(book, aspect, group, rng, wording)
            guess = _guesses(seed)[_known(book, aspect, group)]
            asked.append(PictureQuestion(scene, number, language, wording, aspect, prompt, reply, guess))
    return asked


def _exchange(
    book: PictureBook, aspect: Aspect, group: Group, rng: random.Random, wording: Wording = "trained"
) -> tuple[str, str]:
    return book.fill(rng.choice(_of(book.questions[aspect], wording)), group), book.answer(aspect, group)


def _of(wordings: Wordings, wording: Wording) -> tuple[str, ...]:
    return wordings.trained if wording == "trained" else wordings.unseen


def _known(book: PictureBook, aspect: Aspect, group: Group) -> str:
    """All that a question can tell of its answer: the first wording tells as much as any."""
    return book.fill(book.questions[aspect].trained[0], group)


@cache
def _guesses(seed: int) -> dict[str, str]:
    """By what a question tells: the answer that training pictures give most often."""
    answers: dict[str, Counter[str]] = {}
    for scene in itertools.islice(scenes(seed, "training"), 1000):
        for group, aspect, book in itertools.product(scene.groups, ASPECTS, BOOKS.values()):
            answers.setdefault(_known(book, aspect, group), Counter())[book.answer(aspect, group)] += 1
    return {known: counts.most_common(1)[0][0] for known, counts in answers.items()}
