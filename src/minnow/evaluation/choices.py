"""The task `choices`: questions of public benchmarks, answered by which choice the model finds likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from math import isnan

import torch

from minnow.config import UserError
from minnow.data.questions import Question, parse_question
from minnow.data.readers import read_parsed
from minnow.engine.hidden import packed_hidden
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, labels, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 8192
LOGITS_AT_ONCE = 512
"""Tokens whose logits over the whole vocabulary are held at a time."""


@dataclass(frozen=True)
class LabelledQuestion:
    """A question and the name of the file that it counts for."""

    question: Question
    label: str


@dataclass(frozen=True)
class Ending:
    """Token ids of a context and its ending; the ending is scored from token `start` on."""

    ids: list[int]
    start: int


class ChoicesTask(Task[LabelledQuestion]):
    """Share of the questions whose right choice has the greatest log-probability per byte; equal ones share a point.

    Without the division, long choices would lose for being long (Brown et al., 2005.14165, section 2.4, divide by
    tokens, which differ from model to model). A text to complete is right if each token is the model's likeliest. Where
    several choices are right, each of them is, as lm-evaluation-harness has it for AGIEval.
    """

    name = "choices"
    unit = "share"

    def __init__(self, questions: Sequence[LabelledQuestion]) -> None:
        self._rows = questions

    def rows(self) -> Sequence[LabelledQuestion]:
        """The questions in their order."""
        return self._rows

    def figure(self, row: LabelledQuestion) -> str:
        """`accuracy/FILE`; for texts to complete `completed/FILE`."""
        return f"{'completed' if row.question.is_completion else 'accuracy'}/{row.label}"

    def score_rows(self, subject: Subject, rows: Sequence[LabelledQuestion]) -> list[Score]:
        """Read every choice behind its context."""
        longest = subject.model.config.max_position_embeddings
        encoded = [encode_endings(subject.tokenizer, row, longest) for row in rows]
        read = iter(ending_logprobs(subject.model, [ending for endings in encoded for ending in endings]))
        return [_score(row.question, [next(read) for _ in endings]) for row, endings in zip(rows, encoded, strict=True)]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's: questions are trials."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


def _score(question: Question, read: Sequence[tuple[float, bool]]) -> Score:
    logprobs = [logprob for logprob, _ in read]
    details = {"context": question.contexts[question.right[0]], "choices": question.endings, "right": question.right}
    details |= {"logprobs": logprobs, "greedy": [greedy for _, greedy in read]}
    if question.is_completion:
        return Score(float(read[0][1]), details=details)
    per_byte = [value / len(ending.strip().encode()) for value, ending in zip(logprobs, question.endings, strict=True)]
    best = [index for index, value in enumerate(per_byte) if value == max(per_byte)]
    return Score(len({*question.right} & {*best}) / len(best), details=details)


def encode_endings(tokenizer: Tokenizer, row: LabelledQuestion, longest: int) -> list[Ending]:
    """Tokens of each choice behind its context, read from a document's start on.

    A token may reach over the border between the two. All choices behind one context are therefore scored from the
    same place on, the first where any of them differs from the context alone. What is too long loses its beginning.
    UserError where not even the choice fits into `longest` tokens.
    """
    question = row.question
    alone = tokenizer.encode_batch(list(question.contexts))
    whole = tokenizer.encode_batch([a + b for a, b in zip(question.contexts, question.endings, strict=True)])
    starts = [_common(context, ids) for context, ids in zip(alone, whole, strict=True)]
    if len(set(question.contexts)) == 1:
        starts = [min(starts)] * len(starts)
    endings = []
    for ending, ids, start in zip(question.endings, whole, starts, strict=True):
        left_out = max(0, len(ids) - longest)  # the last token is predicted only, and the start token is read
        if left_out > start:
            raise UserError(
                f"{row.label}: a choice of {len(ids) - start} tokens does not fit into the model's context of "
                f"{longest}: {ending[:80]!r}"
            )
        endings.append(Ending([tokenizer.start_id, *ids[left_out:]], start - left_out + 1))
    return endings


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@torch.no_grad()
def ending_logprobs(model: CausalLM, endings: Sequence[Ending]) -> list[tuple[float, bool]]:
    """Log-probability of each ending in nats, and whether each of its tokens is the likeliest one."""
    found: list[tuple[float, bool]] = []
    for batch in _batches(endings):
        hidden_ND = packed_hidden(model, [ending.ids[:-1] for ending in batch])
        hidden_of_each = hidden_ND.split([len(ending.ids) - 1 for ending in batch])
        for ending, hidden_TD in zip(batch, hidden_of_each, strict=True):
            targets_T = torch.tensor(ending.ids[ending.start :], device=hidden_TD.device)
            logprob, greedy = 0.0, True
            parts = hidden_TD[ending.start - 1 :].split(LOGITS_AT_ONCE)
            for part_TD, wanted_T in zip(parts, targets_T.split(LOGITS_AT_ONCE), strict=True):
                logits_TV = model.logits(part_TD).float()
                logprob += float(logits_TV.log_softmax(-1).gather(1, wanted_T[:, None]).sum())
                greedy &= bool((logits_TV.argmax(-1) == wanted_T).all())
            if isnan(logprob):
                raise UserError("the model's scores are not numbers: its weights are damaged")
            found.append((logprob, greedy))
    return found


def _batches(endings: Sequence[Ending]) -> Iterator[list[Ending]]:
    batch: list[Ending] = []
    for ending in endings:
        if batch and sum(len(each.ids) for each in batch) + len(ending.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ending)
    if batch:
        yield batch


def labelled_questions(paths: Sequence[str], shots: int = 0, shots_from: str | None = None) -> list[LabelledQuestion]:
    """The questions of the files, labelled by file, behind so many solved ones.

    UserError names a bad row by FILE:LINE, or a file without any or with too few.
    """
    solved = None if shots_from is None else _questions(shots_from)
    questions: list[LabelledQuestion] = []
    for path, label in zip(paths, labels(paths), strict=True):
        of_path = _questions(path)
        if not of_path:
            raise UserError(f"{path}: there is not one question to examine; leave it out of --choices")
        if shots:
            examples = of_path if solved is None else solved
            of_path = [_behind(question, examples, shots, shots_from or path) for question in of_path]
        questions += [LabelledQuestion(question, label) for question in of_path]
    return questions


def _questions(path: str) -> list[Question]:
    return [question for _, question in read_parsed((path,), parse_question)]


def _behind(question: Question, examples: Sequence[Question], shots: int, path: str) -> Question:
    """The question behind the first `shots` examples that are not itself, solved, with empty lines between."""
    solved = [example.solved for example in islice((each for each in examples if each != question), shots)]
    if len(solved) < shots:
        raise UserError(f"{path}: {len(solved)} questions to show in front of another one, but --shots is {shots}")
    return replace(question, contexts=tuple("\n\n".join([*solved, context]) for context in question.contexts))


@register("choices")
def make(options: TaskOptions) -> Task[LabelledQuestion]:
    """The questions of the files given."""
    if not options.choices:
        raise UserError("--tasks choices examines files of questions: name them with --choices FILE")
    return ChoicesTask(labelled_questions(options.choices, options.shots, options.shots_from))
