"""B5: an agent's rollouts left out the token that ended a turn, so that stopping was never credited and outputs ran on;
rendered the dialogue again and hoped for the same tokens; cut long contexts on the left and trained on what was never
seen; and played one episode at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tests.rl.helpers import tiny

from minnow.data.prompts import Prompt
from minnow.engine import Engine
from minnow.objectives.policy import PolicyLossConfig
from minnow.rl.environment import Reply
from minnow.rl.experience import PolicyBatch, PolicyObjective, pack_trajectories
from minnow.rl.rollouts import RolloutConfig, Trajectory, play
from minnow.tokenizer.chat import Conversation, Message

CONFIG = RolloutConfig(max_tokens=6, max_turns=3)


class EveryTurnEnds(Engine):
    """An untrained model hardly ever ends its turn; and this one writes what reads back as other tokens."""

    calls = 0

    def generate(self, prompts, params, **options):
        self.calls += 1
        end = self.tokenizer.im_end_id
        odd = [self.tokenizer.encode(letter)[0] for letter in "yes"]  # "yes" is a token of its own in most texts
        return [
            replace(
                answers,
                completions=tuple(
                    replace(c, ids=[*odd, end], logprobs=[-0.5] * 4, finish_reason="stop") for c in answers.completions
                ),
            )
            for answers in super().generate(prompts, params, **options)
        ]


@dataclass
class Echo:
    prompt: Prompt

    def reset(self) -> Conversation:
        return self.prompt.conversation

    def step(self, answer: Message) -> Reply:
        return Reply((Message("tool", f"you said {answer.content}"),))


def environments(count: int) -> list[Echo]:
    return [Echo(Prompt(Conversation((Message("user", f"say {n}"),)))) for n in range(count)]


@pytest.fixture(scope="module")
def engine() -> EveryTurnEnds:
    return EveryTurnEnds(*tiny())


@pytest.fixture(scope="module")
def trajectories(engine: EveryTurnEnds) -> list[Trajectory]:
    engine.calls = 0
    return play(engine, environments(4), range(4), CONFIG, seed=0, longest=128)


def test_the_token_that_ends_each_turn_is_trained_and_moves_the_policy(engine, trajectories) -> None:
    """An advantage of 1 must make <|im_end|> likelier at every place where a turn ended."""
    end = engine.tokenizer.im_end_id
    for trajectory in trajectories:
        wrote = [i for i, trained in zip(trajectory.ids, trajectory.trained, strict=True) if trained]
        assert wrote.count(end) == len(trajectory.answers) == 3
    packed = pack_trajectories(trajectories, range(4), 128, 8)
    assert len(packed) == 1
    batch = packed[0].batch
    supervised = batch.targets_BT[batch.weights_BT > 0]
    assert int((supervised == end).sum()) == 12  # 4 episodes of 3 turns
    ends = (supervised == end).float()
    only_ends = PolicyBatch(
        **vars(batch),
        sequence_N=packed[0].sequence_N,
        num_sequences=4,
        advantages_N=ends,  # nothing else is rewarded
        old_logprobs_N=torch.zeros(len(ends)),
        ref_logprobs_N=None,
        correction_N=None,
    )
    engine.model.zero_grad()
    PolicyObjective(PolicyLossConfig(), 1.0)(engine.model, only_ends).loss_sum.backward()
    gradient = engine.model.head_weight.grad
    assert gradient is not None
    assert gradient[end].norm() > 0


def test_what_the_model_wrote_stays_the_tokens_it_wrote(engine, trajectories) -> None:
    """The letters y, e, s would be read back as other tokens than the model chose."""
    letters = [engine.tokenizer.encode(letter)[0] for letter in "yes"]
    assert engine.tokenizer.encode("yes") != letters
    for trajectory in trajectories:
        wrote = [i for i, trained in zip(trajectory.ids, trajectory.trained, strict=True) if trained]
        assert wrote == [*letters, engine.tokenizer.im_end_id] * 3


def test_no_context_is_cut_on_the_left(engine) -> None:
    """An episode whose next turn does not fit ends; what it has read stays in front of what it wrote."""
    whole = play(engine, environments(4), range(4), CONFIG, seed=0, longest=128)
    for longest in range(40, 128, 11):
        for short, full in zip(
            play(engine, environments(4), range(4), CONFIG, seed=0, longest=longest), whole, strict=True
        ):
            assert len(short.ids) <= longest
            assert short.ids == full.ids[: len(short.ids)]
            assert short.ending == "length" or len(short.answers) == 3


def test_episodes_are_played_side_by_side(engine, trajectories) -> None:
    assert engine.calls >= 3
    engine.calls = 0
    play(engine, environments(16), range(16), CONFIG, seed=0, longest=128)
    assert engine.calls == CONFIG.max_turns  # and not one for every episode and turn
