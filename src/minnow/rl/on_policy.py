"""On-policy distillation: the student answers, and learns what its teacher thinks at every token of the answer.

    L = E_x E_{y ~ student(. | x)} sum_t D( teacher(. | x, y_<t), student(. | x, y_<t) )

GKD (Agarwal et al., arXiv 2306.13649, algorithm 1), as a mean over the tokens of an update. No gradient goes through
the drawing of y. A student that only ever reads other people's texts never learns to go on from its own mistakes; here
it reads its own, beside as much of data as `share` leaves.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minnow.data.batches import Batch, Share
from minnow.data.order import global_batch_rows
from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.experience import pack_trajectories
from minnow.rl.phase_rollouts import MakeEnvironment
from minnow.rl.rollouts import RolloutConfig, RolloutEngine, Trajectory, play
from minnow.training.distillation import Distillation
from minnow.training.distribution import gather, is_first, rank, sum_over_ranks, world_size
from minnow.training.metrics_log import MetricsLog
from minnow.training.objective import BatchSource

_OWN = 0x6BD  # keeps the choice of own answers or data apart from other draws with the same seed


@dataclass(frozen=True)
class Student:
    """The model that is trained, as it answers at this moment, and how its answers become rows."""

    engine: RolloutEngine
    make_environment: MakeEnvironment
    rollout: RolloutConfig
    sequence_length: int
    rows_per_micro_batch: int

    def answer(self, prompts: Sequence[Prompt], places: Sequence[int], seed: int) -> list[Trajectory]:
        """Episodes number `places` of those with every prompt, `rollout.samples` each; the drawing depends on `seed`
        and an episode's place alone."""
        model = self.engine.model
        was_training = model.training
        model.eval()
        self.engine.weights_updated()
        environments = [self.make_environment(prompts[place // self.rollout.samples]) for place in places]
        answered = play(self.engine, environments, places, self.rollout, seed=seed, longest=self.sequence_length)
        model.train(was_training)
        return answered

    def rows(self, answers: Sequence[Trajectory]) -> list[Batch]:
        """Packed micro-batches, supervised where the student wrote: the token that ended its turn is among them, and
        of an answer that was cut off all there is. Nobody has to say how it should have gone on."""
        numbers = range(len(answers))
        packed = pack_trajectories(answers, numbers, self.sequence_length, self.rows_per_micro_batch)
        return [part.batch for part in packed]


class OnPolicyBatches:
    """A BatchSource of updates on the student's own answers and, for the rest of 1 - share, of updates on data.

    What a step is depends on (seed, step) and the student's weights alone: a resumed run draws the same answers again,
    so checkpoints keep nothing of it. Every process draws its share of the answers and trains on it.
    """

    def __init__(
        self,
        student: Student,
        prompts: Sequence[Prompt],
        *,
        share: float,
        data: BatchSource[Batch] | None,
        seed: int,
        total_steps: int,
        log: MetricsLog,
    ) -> None:
        """`data` may be None where `share`, GKD's lambda, is 1. `log` gets a line for each update on own answers."""
        self.student, self.prompts, self.data, self.seed, self.log = student, prompts, data, seed, log
        self.own = np.random.default_rng([seed, _OWN]).random(total_steps) < share
        """Whether an update is one on own answers, by step."""
        self._own_before = self.own.cumsum() - self.own
        self._begun = False

    def micro_batches(self, step: int, share: Share) -> Sequence[Batch]:
        """Return this process's share of the step's answers, drawn now, or of its rows of data."""
        if not self._begun and is_first():
            self.log.rewind(step + 1)  # a stopped run may have got further than its last checkpoint
        self._begun = True
        before = int(self._own_before[step])
        if not self.own[step]:
            assert self.data is not None
            return self.data.micro_batches(step - before, share)
        rollout, start = self.student.rollout, time.perf_counter()
        numbers = global_batch_rows(self.seed, before, rollout.prompts, len(self.prompts))
        places = range(share.rank, len(numbers) * rollout.samples, share.world_size)
        seed = zlib.crc32(f"{self.seed}/{step}".encode())
        answers = self.student.answer([self.prompts[number] for number in numbers], places, seed)
        self._log(step, answers, time.perf_counter() - start)
        return self.student.rows(answers)

    def _log(self, step: int, answers: Sequence[Trajectory], seconds: float) -> None:
        everyone = _of_everyone(answers)
        if is_first():
            text = self.student.engine.tokenizer.decode(answers[0].ids)
            self.log.append({"step": step + 1, **_means(everyone), "seconds_writing": seconds, "sample": text})


@dataclass(frozen=True)
class Agreement:
    """An evaluation for the Trainer: the divergence of student and teacher on the student's answers to prompts that it
    does not practise on, drawn with the same seed each time; nats a token."""

    student: Student
    prompts: Sequence[Prompt]
    objective: Distillation

    @torch.no_grad()
    def __call__(self, model: CausalLM) -> dict[str, float]:
        """Mean over all tokens that the student wrote, and what its answers look like. Each process takes its share."""
        model.eval()
        places = range(rank(), len(self.prompts) * self.student.rollout.samples, world_size())
        answers = self.student.answer(self.prompts, places, seed=0)
        total = count = 0.0
        for batch in self.student.rows(answers):
            total += float(self.objective(model, batch.to(model.head_weight.device)).metrics["divergence"])
            count += self.objective.count(batch)
        total, count = sum_over_ranks([total, count])
        figures = {"divergence": total / count, **_means(_of_everyone(answers))}
        return {f"held_out/{name}": value for name, value in figures.items()}


def answer_figures(answers: Sequence[Trajectory]) -> list[dict[str, float]]:
    """Of every answer: its length in tokens that the student wrote, and 1 if it was cut off."""
    return [{"length": float(a.num_trained), "truncated": float(a.ending == "length")} for a in answers]


def _of_everyone(answers: Sequence[Trajectory]) -> list[dict[str, float]]:
    """The figures of all processes' answers."""
    return [figures for part in gather(answer_figures(answers)) for figures in part]


def _means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
