"""Sums and differences of two-digit numbers, with the steps that a person would write down."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minnow.data.pond.questions import conversations
from minnow.data.pond.relations import LANGUAGES, Language
from minnow.data.pond.world import Split, World
from minnow.tokenizer.chat import Conversation, Message

Sign = Literal["+", "-"]

_QUESTIONS: dict[tuple[Language, Sign], tuple[str, ...]] = {
    ("en", "+"): (
        "What is {a} + {b}?",
        "How much is {a} plus {b}?",
        "{x} has {a} shells and finds {b} more. How many shells does {x} have now?",
        "There are {a} fish in the pond and {b} more swim in. How many fish are there now?",
    ),
    ("en", "-"): (
        "What is {a} - {b}?",
        "How much is {a} minus {b}?",
        "{x} has {a} shells and gives {b} away. How many shells does {x} have now?",
        "There are {a} fish in the pond and {b} swim away. How many fish are there now?",
    ),
    ("zh", "+"): (
        "{a} + {b} 等于多少？",
        "{a} 加 {b} 是多少？",
        "{x}有 {a} 个贝壳，又找到 {b} 个。{x}现在有多少个贝壳？",
        "池塘里有 {a} 条鱼，又游来 {b} 条。现在有多少条鱼？",
    ),
    ("zh", "-"): (
        "{a} - {b} 等于多少？",
        "{a} 减 {b} 是多少？",
        "{x}有 {a} 个贝壳，送走了 {b} 个。{x}现在有多少个贝壳？",
        "池塘里有 {a} 条鱼，游走了 {b} 条。现在有多少条鱼？",
    ),
}
_ANSWERS = {"en": "The answer is {n}.", "zh": "答案是 {n}。"}


@dataclass(frozen=True)
class Problem:
    """One exercise; `prompt` asks it in words."""

    language: Language
    a: int
    sign: Sign
    b: int
    prompt: str

    @property
    def result(self) -> int:
        """a + b or a - b."""
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def answer(self) -> str:
        """The sentence that answers."""
        return self.sentence(self.result)

    def sentence(self, result: int) -> str:
        """The sentence that answers with `result`."""
        return _ANSWERS[self.language].format(n=result)

    @property
    def carries(self) -> bool:
        """Whether the ones reach into the tens: a one to carry or to borrow."""
        a_ones, b_ones = self.a % 10, self.b % 10
        return a_ones + b_ones >= 10 if self.sign == "+" else a_ones < b_ones

    @property
    def steps(self) -> str:
        """Ones, then tens with what is carried or borrowed: single digits all along."""
        return self.working()[0]

    def working(self, *, forgetful: bool = False) -> tuple[str, int]:
        """The steps and the result they come to; a forgetful pupil leaves out what is carried or borrowed."""
        (a_tens, a_ones), (b_tens, b_ones) = divmod(self.a, 10), divmod(self.b, 10)
        kept = self.carries and not forgetful
        if self.sign == "+":
            ones, tens = a_ones + b_ones, a_tens + b_tens + kept
            lines = (f"{a_ones} + {b_ones} = {ones}", f"{a_tens} + {b_tens}{' + 1' * kept} = {tens}")
        else:
            a_ones += 10 * self.carries
            ones, tens = a_ones - b_ones, a_tens - b_tens - kept
            lines = (f"{a_ones} - {b_ones} = {ones}", f"{a_tens} - {b_tens}{' - 1' * kept} = {tens}")
        result = 10 * tens + ones % 10
        sum_up = f"{self.a} {self.sign} {self.b} = {result}"
        if self.language == "en":
            return f"Ones: {lines[0]}. Tens: {lines[1]}. So {sum_up}.", result
        return f"个位：{lines[0]}。十位：{lines[1]}。所以 {sum_up}。", result


def split_of(a: int, sign: Sign, b: int) -> Split:
    """A tenth of all pairs of numbers is held out, in both orders and both languages."""
    first, second = (max(a, b), min(a, b)) if sign == "+" else (a, b)
    return "held_out" if zlib.crc32(f"{first} {sign} {second}".encode()) % 10 == 0 else "training"


def problems(world: World, split: Split, language: Language, seed: int = 0) -> Iterator[Problem]:
    """An endless stream of exercises of one split: numbers from 10 to 99, no result below zero."""
    rng = random.Random(f"pond/arithmetic/{world.seed}/{seed}/{split}/{language}")
    names = [creature.name(language) for creature in world.creatures]
    while True:
        sign: Sign = rng.choice(("+", "-"))
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if sign == "-" and a < b:
            a, b = b, a
        if split_of(a, sign, b) == split:
            template = rng.choice(_QUESTIONS[language, sign])
            yield Problem(language, a, sign, b, template.format(a=a, b=b, x=rng.choice(names)))


def arithmetic_conversations(
    world: World, count: int, *, thinking: float = 0.5, replay: float = 0.2, forgetful: float = 0.0
) -> Iterator[Conversation]:
    """`count` conversations in both languages: exercises of the training split, and a share `replay` of others.

    A share `thinking` of the exercises has the steps as reasoning, the rest is answered at once: one model learns
    both, and the think block in its prompt says which is asked for. In a share `forgetful` of the exercises with steps
    and a carry the carry is forgotten, and the answer is wrong.
    """
    rng = random.Random(f"pond/arithmetic/{world.seed}")
    exercises = {language: problems(world, "training", language) for language in LANGUAGES}
    others = {language: conversations(world, language, seed=2) for language in LANGUAGES}
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        if rng.random() < replay:
            yield next(others[language])
            continue
        problem = next(exercises[language])
        reasoning, result = None, problem.result
        if rng.random() < thinking:
            # Nothing is drawn where nothing is forgotten, so that arithmetic.jsonl stays what it was.
            reasoning, result = problem.working(forgetful=forgetful > 0 and rng.random() < forgetful)
        yield Conversation((Message("user", problem.prompt), Message("assistant", problem.sentence(result), reasoning)))
