"""The task `preference`: would the model rather give the better answer than the worse one?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from minnow.config import UserError
from minnow.data.pairs import PreferencePair, parse_preference
from minnow.data.pond.preferences import preference_pairs
from minnow.data.readers import read_parsed
from minnow.engine.hidden import packed_hidden
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, labels, register
from minnow.evaluation.statistics import Interval, wilson_interval
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs
from minnow.tokenizer.chat import Message, Rendered

Item = TypeVar("Item")

SEQUENCES_AT_ONCE = 32
POND_PAIRS = 1000


@dataclass(frozen=True)
class LabelledPair:
    """A pair and the name of the figure it counts for."""

    pair: PreferencePair
    label: str


class PairTask(Task[LabelledPair]):
    """A task whose rows are pairs and whose scores are 0, a half or 1."""

    unit = "share"

    def __init__(self, pairs: Sequence[LabelledPair]) -> None:
        self._rows = pairs

    def rows(self) -> Sequence[LabelledPair]:
        """The pairs in their order."""
        return self._rows

    def figure(self, row: LabelledPair) -> str:
        """By file, or by kind and language of the pond's pairs."""
        return f"{self.name}/{row.label}"

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Wilson's: pairs are trials."""
        return wilson_interval(sum(score.value for score in scores), len(scores))


class PreferenceTask(PairTask):
    """Share of pairs whose better answer is the likelier one, summed over its tokens; equal ones count a half."""

    name = "preference"

    def score_rows(self, subject: Subject, rows: Sequence[LabelledPair]) -> list[Score]:
        """Compare the log-probabilities of both answers."""
        rendered = [side for row in rows for side in row.pair.render(subject.tokenizer)]
        logprobs = answer_logprobs(subject.model, rendered)
        return [
            Score(win(chosen, rejected), details=shown(row) | {"chosen_nats": chosen, "rejected_nats": rejected})
            for row, (chosen, rejected) in zip(rows, in_pairs(logprobs), strict=True)
        ]


@torch.no_grad()
def answer_logprobs(model: CausalLM, conversations: Sequence[Rendered]) -> list[float]:
    """Log-probability of the weighted tokens of each conversation, nats."""
    device = model.head_weight.device
    found: list[float] = []
    for group in groups(conversations):
        hidden_ND = packed_hidden(model, [rendered.ids[:-1].tolist() for rendered in group])
        targets_N = torch.cat([torch.from_numpy(rendered.ids[1:]).long() for rendered in group]).to(device)
        weights_N = torch.cat([torch.from_numpy(rendered.weights[1:]) for rendered in group])
        # On the host: Apple's GPUs have no float64.
        logprobs_N = token_logprobs(hidden_ND, model.head_weight, targets_N).cpu().double() * weights_N
        found += [float(part.sum()) for part in logprobs_N.split([len(rendered.ids) - 1 for rendered in group])]
    return found


def groups(conversations: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """As many at a time as go through a model together."""
    return (
        conversations[start : start + SEQUENCES_AT_ONCE] for start in range(0, len(conversations), SEQUENCES_AT_ONCE)
    )


def in_pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    """Values of chosen and rejected answers in turn, as pairs."""
    return list(zip(values[::2], values[1::2], strict=True))


def win(better: float, worse: float) -> float:
    """1, 0, or a half for a tie."""
    return 0.5 + 0.5 * ((better > worse) - (better < worse))


def shown(row: LabelledPair) -> dict[str, str]:
    """What a person wants to see of a pair."""
    return {
        "prompt": _text(row.pair.prompt),
        "chosen": _text(row.pair.chosen),
        "rejected": _text(row.pair.rejected),
    }


def labelled_pairs(options: TaskOptions) -> list[LabelledPair]:
    """The pairs of the given files, labelled by file; without any, held-out ones of the pond."""
    if not options.pairs:
        return [
            LabelledPair(parse_preference(vars(pair)), f"{'known' if pair.known else 'visitor'}/{pair.language}")
            for pair in preference_pairs(find_world(options), "held_out", POND_PAIRS)
        ]
    pairs: list[LabelledPair] = []
    for path, label in zip(options.pairs, labels(options.pairs), strict=True):
        of_path = [LabelledPair(pair, label) for _, pair in read_parsed((path,), parse_preference)]
        if not of_path:
            raise UserError(f"{path}: there is not one pair to examine; leave it out of --pairs")
        pairs += of_path
    return pairs


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages)


@register("preference")
def make(options: TaskOptions) -> Task[LabelledPair]:
    """Pairs of the files given, or of the pond."""
    return PreferenceTask(labelled_pairs(options))
