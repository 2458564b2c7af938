"""Environments that hang, are slow, or break: the run goes on or says why not, and nothing false is learnt."""

import itertools
import json
import logging
import re
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest

from minnow.config import UserError, parse_config
from minnow.data.prompts import Prompt
from minnow.engine import Engine
from minnow.rl.advantages import PhaseScores, advantages_of
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.environment import Reply, SingleTurn
from minnow.rl.environment_calls import make
from minnow.rl.left_out import left_out_figures, settle
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutConfig, Trajectory, play
from minnow.stages import practice
from minnow.stages.rl import Config
from minnow.tokenizer.chat import Conversation, Message
from minnow.training.run_folder import RunFolder
from tests.rl.helpers import saved, tiny, write_prompts
from tests.rl.test_phases import figures, rl
from tests.rl.test_rollouts import prompts

CONFIG = RolloutConfig(max_tokens=8, max_turns=2, environment_seconds=0.5, environment_threads=4)


class EveryTurnEnds(Engine):
    """An untrained model hardly ever ends its turn, and a cut-off one is not heard."""

    def generate(self, prompts, params, **options):
        end = self.tokenizer.im_end_id
        return [
            replace(
                answers,
                completions=tuple(
                    replace(c, ids=[*c.ids[:-1], end], finish_reason="stop") for c in answers.completions
                ),
            )
            for answers in super().generate(prompts, params, **options)
        ]


@pytest.fixture(scope="module")
def engine():
    return EveryTurnEnds(*tiny())


@dataclass
class Moody:
    """Hangs in the call that is named, and is else a world of two turns."""

    prompt: Prompt
    hangs_in: str = ""
    steps: int = 0

    def reset(self):
        self._maybe_hang("reset")
        return self.prompt.conversation

    def step(self, answer):
        self.steps += 1
        self._maybe_hang(f"step {self.steps}")
        return Reply((Message("tool", "so"),), done=self.steps == 2, reward=0.5)

    def _maybe_hang(self, call):
        if call == self.hangs_in:
            threading.Event().wait()  # for ever: whoever waits for it never ends


def test_an_episode_that_hangs_is_left_out_and_the_others_are_what_they_were(engine, caplog):
    calm = [Moody(p) for p in prompts(12)]
    moody = [Moody(p, {2: "reset", 5: "step 1", 7: "step 2"}.get(n, "")) for n, p in enumerate(prompts(12))]
    expected = play(engine, calm, range(12), CONFIG, seed=0, longest=128)
    assert all((t.ending, t.reward) == ("stop", 1.0) for t in expected)
    with caplog.at_level(logging.WARNING):
        found = play(engine, moody, range(12), CONFIG, seed=0, longest=128)
    assert [n for n, t in enumerate(found) if t.left_out == "environment"] == [2, 5, 7]
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        if n in (2, 5, 7):
            assert a.ending == "timeout"
            assert a.num_trained == sum(a.trained) == len(a.sampler_logprobs) > 0  # it can be scored like any other
        else:
            assert (a.ids, a.trained, a.reward, a.ending) == (b.ids, b.trained, b.reward, b.ending)
    assert re.search(r"3 of 12 episodes ended because.*environment_seconds \(0.5\).*'say 2'", caplog.text)


class Meet(SingleTurn):
    """Steps that wait for each other: one after the other they would wait for ever."""

    barrier = threading.Barrier(4)

    def step(self, answer):
        Meet.barrier.wait(30)
        return Reply(done=True, reward=1.0)


def test_steps_of_different_episodes_run_side_by_side(engine):
    config = replace(CONFIG, environment_seconds=60)
    played = play(engine, [Meet(p) for p in prompts(4)], range(4), config, seed=0, longest=128)
    assert [t.reward for t in played] == [1.0] * 4


def test_a_timeout_of_the_environment_s_own_is_one_too(engine):
    class Waits(SingleTurn):
        def step(self, answer):
            raise TimeoutError("the service did not answer")

    played = play(engine, [Waits(p) for p in prompts(4)], range(4), CONFIG, seed=0, longest=128)
    assert all(t.left_out == "environment" for t in played)


class Broken(SingleTurn):
    reply = None

    def step(self, answer):
        if self.reply == "raise":
            return 1 / 0
        return self.reply


@pytest.mark.parametrize(
    ("reply", "sign"),
    [
        ("raise", r"environment Broken failed in step for the prompt 'say.*ZeroDivisionError.*test_environment_limits"),
        (None, "step returned NoneType, not a Reply"),
        (Reply(done=True, reward=float("nan")), "the reward nan: it must be a finite number"),
        (Reply(done=True, reward=None), "the reward None: it must be a finite number"),
        (Reply(), "without a message and without `done`"),
    ],
)
def test_a_broken_environment_is_named_with_its_prompt(engine, monkeypatch, reply, sign):
    monkeypatch.setattr(Broken, "reply", reply)
    with pytest.raises(UserError, match=sign):
        play(engine, [Broken(p) for p in prompts(2)], range(2), CONFIG, seed=0, longest=128)


def test_an_environment_that_cannot_be_made_is_named():
    def hangs(prompt):
        threading.Event().wait(30)

    with pytest.raises(UserError, match=r"'say 0': making it took more than rollout.environment_seconds \(0.2\)"):
        make(hangs, prompts(1)[0], seconds=0.2)
    with pytest.raises(UserError, match=r"could not be made for the prompt 'say 0': ZeroDivisionError"):
        make(lambda prompt: 1 / 0, prompts(1)[0], seconds=60)
    assert make(SingleTurn, prompts(1)[0], seconds=60).prompt == prompts(1)[0]


# --- what a left-out episode does to the others -----------------------------------------------------------------------


def judged(rewards, samples, left_out=()):
    """Episodes with these rewards, one trained token each."""
    return [
        Trajectory(
            SingleTurn(prompts(1)[0]),
            n // samples,
            [1, 2],
            [False, True],
            [-0.5],
            [Message("assistant", "4")],
            "timeout" if n in left_out else "stop",
            reward=0.0 if n in left_out else reward,
            rewards={} if n in left_out else {"answer": reward},
            left_out="environment" if n in left_out else None,
        )
        for n, reward in enumerate(rewards)
    ]


def test_a_left_out_episode_counts_as_the_mean_of_its_group_s_others():
    episodes = judged([1, 0, 9, 1, 0.1, 9, 0.1, 0.1, 9, 9, 9, 9], 4, left_out=(2, 5, 8, 9, 10, 11))
    settle(episodes, 4, 12)
    assert episodes[2].reward == pytest.approx(2 / 3)
    assert len({t.reward for t in episodes[4:8]}) == 1  # no contrast is made up, not in the last digit
    assert episodes[8].reward == pytest.approx((1 + 0 + 1 + 0.3) / 6)  # nothing of its group: the mean of all
    assert all(t.rewards == {"answer": t.reward} for t in episodes)
    assert left_out_figures(episodes) == {"environment_timeouts": 6.0, "answer_timeouts": 0.0, "judge_failures": 0.0}


@pytest.mark.parametrize("advantage", ["group", "group_centred", "leave_one_out", "batch", "tracker", "gae"])
def test_the_advantages_of_the_others_are_those_they_have_without_it(advantage):
    """Groups of 3 of which the middle one is lost, against groups of 2 without it."""
    algorithm = AlgorithmConfig(advantage=advantage)
    with_it = judged([1, 9, 0, 0.25, 9, 0.5], 3, left_out=(1, 4))
    settle(with_it, 3, 6)
    without = judged([1, 0, 0.25, 0.5], 2)

    def advantages(episodes):
        zeros = [np.zeros(1, np.float32)] * len(episodes)
        scores = PhaseScores(old=zeros, ref=None, penalties=zeros, values=zeros)
        return np.concatenate(advantages_of(algorithm, episodes, scores, np.full(len(episodes), 0.5))[0])

    found = advantages(with_it)
    assert found[[1, 4]].tolist() == [0, 0]
    np.testing.assert_allclose(found[[0, 2, 3, 5]], advantages(without), rtol=1e-6)


def test_a_group_of_which_one_is_left_has_no_advantage():
    for advantage in ("group", "group_centred", "leave_one_out"):
        episodes = judged([1, 9, 9], 3, left_out=(1, 2))
        settle(episodes, 3, 100)
        scores = PhaseScores(old=[], ref=None, penalties=[np.zeros(1, np.float32)] * 3)
        got = advantages_of(AlgorithmConfig(advantage=advantage), episodes, scores, None)[0]
        assert np.concatenate(got).tolist() == [0, 0, 0]


def test_nearly_all_left_out_ends_the_run_with_what_to_change():
    lost = judged([9] * 10, 2, left_out=range(9))
    with pytest.raises(UserError, match=r"9 of 10 episodes were left out.*rollout.environment_seconds.*raise"):
        settle(lost, 2, 20)
    settle(lost, 2, 21)  # a few drawn again are no sign
    settle(judged([9] * 10, 2, left_out=range(8)), 2, 10)


def test_rewards_judge_nothing_of_it():
    episodes = judged([0, 0, 0], 1, left_out=(1,))
    Rewarder(RewardConfig(functions=(f"{__name__}:strict",))).score(episodes)
    assert episodes[1].rewards == {}
    assert episodes[0].rewards[f"{__name__}:strict"] == 2.0


def strict(trajectories):
    assert all(t.left_out is None for t in trajectories)
    return [2.0] * len(trajectories)


# --- whole runs -------------------------------------------------------------------------------------------------------


class HangsAtThree(SingleTurn):
    def step(self, answer):
        if self.prompt.reference == "3":
            threading.Event().wait(20)
        return Reply(done=True, reward=0.1)


class HangsAlways(SingleTurn):
    def step(self, answer):
        threading.Event().wait(20)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return saved(folder / "model"), write_prompts(folder / "prompts.jsonl", 4)


MORE = ["--preset", "grpo", "--phases", "2", "--rollout.samples", "4", "--rollout.max_turns", "2"]
MORE += ["--rollout.environment_seconds", "0.4", "--rewards.functions", "tests.rl.test_phases:even_ids"]
PATIENT = ["--rollout.environment_seconds", "60"]
"""Where nothing hangs: a loaded machine may be slower than the above."""


@pytest.fixture
def turns_end(monkeypatch):
    monkeypatch.setattr("minnow.rl.rollouts.Engine", EveryTurnEnds)


@pytest.mark.usefixtures("turns_end")
def test_a_run_goes_on_without_what_hangs(start, tmp_path):
    words = [*MORE, "--rollout.environment_seconds", "2", "--environment", f"{__name__}:HangsAtThree"]
    assert rl(start, tmp_path / "run", *words) == 0
    assert figures(tmp_path / "run", "environment_timeouts") == [4.0, 4.0]


@pytest.mark.usefixtures("turns_end")
def test_a_run_in_which_all_hangs_stops_in_words(start, tmp_path, capsys):
    assert rl(start, tmp_path / "run", *MORE, "--environment", f"{__name__}:HangsAlways") == 2
    assert "stopped: 16 of 16 episodes were left out" in capsys.readouterr().err


class NeverOpens(SingleTurn):
    def reset(self):
        threading.Event().wait(20)


def test_a_world_that_never_opens_is_refused_before_any_work(start, tmp_path, capsys):
    assert rl(start, tmp_path / "run", *MORE, "--environment", f"{__name__}:NeverOpens") == 2
    assert "none of 4 was reset within rollout.environment_seconds (0.4)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class OpensSometimes(SingleTurn):
    def reset(self):
        if self.prompt.reference == "never":
            threading.Event().wait(5)
        return self.prompt.conversation


def practice_of(folder, references, monkeypatch):
    _, tokenizer = tiny()
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": "say it", "answer": answer}) + "\n" for answer in references))
    config = practice.PracticeConfig(
        prompts=(str(file),), environment=f"{__name__}:OpensSometimes", sequence_length=64, rollout=CONFIG
    )
    monkeypatch.setattr(practice, "CHECKED_AT_ONCE", 2)
    return practice.read_practice(config, tokenizer, print).prompts


def test_the_last_prompt_alone_may_be_slow_to_open(tmp_path, monkeypatch):
    """Environments are opened so many at once; one prompt that was left for the last round is not all of them."""
    assert len(practice_of(tmp_path, ["1", "2", "3", "4", "never"], monkeypatch)) == 5


def test_all_processes_practise_on_the_prompts_that_the_first_found_to_fit(tmp_path, monkeypatch):
    """An environment whose openings differ from one reset to the next, or come late, may be too long for one alone."""
    monkeypatch.setattr(practice, "from_first", lambda places: [place for place in places if place != 1])
    assert [p.reference for p in practice_of(tmp_path, ["1", "2", "3"], monkeypatch)] == ["1", "3"]


class OpensLate(SingleTurn):
    """Its opening is longer than what was checked before the run."""

    opened = 0

    def reset(self):
        OpensLate.opened += 1
        text = "say it" if OpensLate.opened <= 4 else "say it " * 40
        return Conversation((Message("user", text),))


def test_an_opening_that_has_grown_beyond_a_row_is_named(start, tmp_path, capsys):
    assert rl(start, tmp_path / "run", *MORE, "--environment", f"{__name__}:OpensLate", *PATIENT) == 2
    assert re.search(
        r"environment for the prompt 'say \d' opens with \d+ tokens.*does not fit", capsys.readouterr().err
    )


def test_what_a_stopped_run_advises_to_raise_may_be_raised(tmp_path):
    """A run that a hanging function had ended could not go on: it was "a run with another configuration"."""
    words = ["--init_from", "m", "--prompts", "p", "--run", str(tmp_path / "run")]

    def start(*more):
        folder = RunFolder(tmp_path / "run")
        folder.open(parse_config(Config, [*words, *more], program="minnow rl"), overwrite=False)
        folder.lock.release()

    start("--rewards.judge.url", "http://127.0.0.1:8000/v1")
    judge = ("--rewards.judge.url", "http://127.0.0.1:8001/v1")
    for setting, value in {
        "rewards.functions_seconds": "900",
        "rewards.maths_seconds": "9",
        "rewards.judge.seconds": "90",
        "rollout.environment_seconds": "90",
        "rollout.environment_threads": "1",
        "rollout_engine.url": "http://127.0.0.1:8001/v1",
        "rollout_engine.seconds": "900",
    }.items():
        start(*judge, f"--{setting}", value)
    with pytest.raises(UserError, match="another configuration"):
        start(*judge, "--rollout.temperature", "0.5")


@pytest.mark.parametrize("judges", list(itertools.permutations(([], ["--rewards.judge.url", "http://127.0.0.1:1/v1"]))))
def test_a_judge_more_or_less_is_another_run(judges, tmp_path):
    """Its address is what calls it: a run that went on with one for the first time was rewarded otherwise."""
    words = ["--init_from", "m", "--prompts", "p", "--run", str(tmp_path / "run")]
    before, now = (parse_config(Config, [*words, *judge], program="minnow rl") for judge in judges)
    folder = RunFolder(tmp_path / "run")
    folder.open(before, overwrite=False)
    with pytest.raises(UserError, match=r"another configuration \(rewards.judge.url"):
        folder.open(now, overwrite=False)
    folder.lock.release()
