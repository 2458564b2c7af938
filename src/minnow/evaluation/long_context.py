"""The task `long-context`: does the model read on beyond its trained length, and does it find what stood far above?

Each text is read with the model as it is and, unless its frequencies are stretched already, with YaRN. Bits per byte
by position show where a model loses the thread; a hidden fact shows whether it still finds anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.pictures import TEXT_ONLY
from minnow.data.pond.long_texts import HiddenFact, hidden_facts, long_documents
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World
from minnow.data.readers import read_texts, said_texts
from minnow.engine.hidden import packed_hidden
from minnow.evaluation.bits_per_byte import token_nats
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, register
from minnow.evaluation.statistics import Interval, bootstrap_ratio, wilson_interval
from minnow.model.config import ModelConfig
from minnow.model.context import extend_context
from minnow.model.transformer import CausalLM

BEYOND = 4
"""By default texts are this many times as long as the model was trained for."""
SPANS = 16
"""Equal parts of the longest text whose bits per byte are told apart."""
DOCUMENTS = 64
FACTS = 32
"""Hidden facts of each language and length."""
MIN_TOKENS = 64
"""A question with its fact and a line between takes as much."""
CHARACTERS_PER_TOKEN = 8
"""More than any token of the pond's text has: its texts are long enough."""


@dataclass(frozen=True)
class Reading:
    """A way to read a long text."""

    name: str
    config: ModelConfig
    length: int
    """Tokens seen at once."""

    @contextmanager
    def applied(self, model: CausalLM) -> Iterator[CausalLM]:
        """The model, reading so for the while."""
        before = model.config
        model.config = self.config
        try:
            yield model
        finally:
            model.config = before


def trained_length(config: ModelConfig) -> int:
    """Tokens that the model was trained on before its context was stretched, if it was."""
    scaling = config.rope_scaling
    return config.max_position_embeddings if scaling is None else scaling.original_max_position_embeddings


def readings(config: ModelConfig, context: int) -> list[Reading]:
    """In pieces of the trained length; whole, as the model is; whole, with YaRN."""
    trained = trained_length(config)
    ways = [Reading("in pieces", config, min(trained, context)), Reading("as it is", config, context)]
    if config.rope_scaling is None and context > trained:
        ways.append(Reading("yarn", extend_context(config, "yarn", context / trained), context))
    return ways


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a document, read in one way."""

    document: int
    reading: Reading
    start: int
    stop: int


class LongTexts(Task[Span]):
    """Bits per byte of long texts, by position and as a whole.

    Figures: `READING/START-STOP`, positions in tokens, and `READING/all`.
    """

    name = "long-context"
    unit = "bits per byte"

    def __init__(self, subject: Subject, texts: Sequence[str], context: int) -> None:
        documents = subject.tokenizer.encode_batch(list(texts))
        self._documents = [document[:context] for document in documents if len(document) >= context][:DOCUMENTS]
        if not self._documents:
            longest = max(map(len, documents), default=0)
            raise UserError(
                f"long-context: no text of {context} tokens (the longest of {len(documents)} has {longest}); give "
                "longer ones with --text, or a smaller --context"
            )
        self._context = context
        self._readings = readings(subject.model.config, context)

    def rows(self) -> Sequence[Span]:
        """Every document in every reading, whole and in parts."""
        borders = [round(self._context * part / SPANS) for part in range(SPANS + 1)]
        spans = [(0, self._context), *pairwise(borders)]
        return [
            Span(document, reading, start, stop)
            for reading in self._readings
            for start, stop in spans
            for document in range(len(self._documents))
        ]

    def figure(self, row: Span) -> str:
        """By reading and position."""
        whole = (row.start, row.stop) == (0, self._context)
        return f"{row.reading.name}/all" if whole else f"{row.reading.name}/{row.start}-{row.stop}"

    def score_rows(self, subject: Subject, rows: Sequence[Span]) -> list[Score]:
        """Read each document once in each way, and add up its spans."""
        token_bytes = subject.tokenizer.token_bytes()
        nats = {reading: self._nats(subject, reading) for reading in dict.fromkeys(row.reading for row in rows)}
        scores = []
        for row in rows:
            ids = self._documents[row.document][row.start : row.stop]
            span = nats[row.reading][row.document][row.start : row.stop]
            size = float(token_bytes[ids].sum())
            scores.append(Score(span.sum().item() / math.log(2), size, {"document": row.document}))
        return scores

    def _nats(self, subject: Subject, reading: Reading) -> list[Tensor]:
        start = subject.tokenizer.start_id
        with reading.applied(subject.model) as model:
            return token_nats(model, self._documents, start, reading.length, allow_beyond_trained_length=True)

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Bootstrap over documents."""
        return bootstrap_ratio([score.value for score in scores], [score.weight for score in scores])


@dataclass(frozen=True)
class HiddenFactRow:
    """A question at the end of a text of about `tokens` tokens, read in one way."""

    fact: HiddenFact
    reading: Reading
    tokens: int


class HiddenFacts(Task[HiddenFactRow]):
    """Share of hidden facts whose answer the model gives word for word.

    Every token of the right answer must be the likeliest one after those before it: what greedy decoding would write.
    Figures: `READING/TOKENS`, for texts of `context` tokens, half as many, and so on to a quarter of the trained
    length.
    """

    name = "hidden-fact"
    unit = "share"

    def __init__(self, subject: Subject, world: World, context: int) -> None:
        config, tokenizer = subject.model.config, subject.tokenizer
        _, *whole = readings(config, context)
        lengths = [context]
        while lengths[-1] // 2 >= max(MIN_TOKENS, trained_length(config) // 4):
            lengths.append(lengths[-1] // 2)
        self._rows = [
            HiddenFactRow(fact, reading, length)
            for reading in whole
            for length in reversed(lengths)
            for language in LANGUAGES
            for fact in hidden_facts(
                world,
                language,
                FACTS,
                tokens=length - 1,  # the end-of-text token stands before
                num_tokens=lambda text: len(tokenizer.encode(text)),
            )
        ]

    def rows(self) -> Sequence[HiddenFactRow]:
        """Both languages, all lengths, all readings."""
        return self._rows

    def figure(self, row: HiddenFactRow) -> str:
        """By reading and length."""
        return f"{row.reading.name}/{row.tokens}"

    def score_rows(self, subject: Subject, rows: Sequence[HiddenFactRow]) -> list[Score]:
        """One text at a time."""
        return [self._score(subject, row) for row in rows]

    @torch.no_grad()
    def _score(self, subject: Subject, row: HiddenFactRow) -> Score:
        tokenizer = subject.tokenizer
        ids = [tokenizer.start_id, *tokenizer.encode(row.fact.text + row.fact.answer)]
        # A token may hold the last sign of the opener and the first of the answer: then it is part of the answer.
        question = [tokenizer.start_id, *tokenizer.encode(row.fact.text)]
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(ids, question, strict=False))
        answer = len(ids) - sum(1 for _ in shared)
        with row.reading.applied(subject.model) as model:
            hidden_ND = packed_hidden(model, [ids], allow_beyond_trained_length=True)
            likeliest = model.logits(hidden_ND[-answer - 1 : -1]).argmax(-1).tolist()
        said = tokenizer.decode(likeliest)
        details = {"language": row.fact.language, "relation": row.fact.relation, "expected": row.fact.answer}
        return Score(float(likeliest == ids[-answer:]), details=details | {"likeliest": said, "tokens": len(ids)})

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


@register("long-context")
def make(options: TaskOptions) -> list[Task[Any]]:
    """Bits per byte by position (of the given texts, else of the pond's) and, where there is a pond, hidden facts."""
    if options.subject is None:
        raise ValueError("long-context needs TaskOptions.subject: its rows depend on the model's trained length")
    context = options.context
    if context is None:
        context = BEYOND * trained_length(options.subject.model.config)
    if context < MIN_TOKENS:
        raise UserError(f"--context {context} is too short to tell anything: give at least {MIN_TOKENS} tokens")
    try:
        world = find_world(options)
    except UserError:
        if options.pond is not None or not options.texts:
            raise
        return [LongTexts(options.subject, list(read_texts(options.texts, said_texts, TEXT_ONLY)), context)]
    if options.texts:
        texts = list(read_texts(options.texts, said_texts, TEXT_ONLY))
    else:
        texts = [text.text for text in long_documents(world, DOCUMENTS, CHARACTERS_PER_TOKEN * context, "held_out")]
    return [LongTexts(options.subject, texts, context), HiddenFacts(options.subject, world, context)]
