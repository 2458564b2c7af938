"""Which prompts a phase asks: DAPO's other prompts for groups without contrast; and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from minnow.data.batches import Share
from minnow.rl import phase_scores
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.phase_rollouts import PhaseRollouts
from minnow.rl.phases import Phases
from minnow.rl.rollouts import Trajectory
from minnow.stages.rl import _where_time_went
from tests.rl.phase_helpers import Clock, Reward, phases, settings


def dapo(monkeypatch: pytest.MonkeyPatch, folder: Path, reward: Reward, **more: int) -> tuple[PhaseRollouts, list[int]]:
    """12 prompts, 4 of them with 2 answers each a phase; the sizes of the rounds."""
    algorithm = AlgorithmConfig(advantage="group", drop_equal_groups=True, **more)  # type: ignore[arg-type]
    how, _ = phases(monkeypatch, folder, settings(algorithm, prompts=4, samples=2), reward)
    rounds: list[int] = []
    original = how.rollouts._round

    def counted(*words):  # type: ignore[no-untyped-def]
        rounds.append(len(groups := original(*words)))
        return groups

    monkeypatch.setattr(how.rollouts, "_round", counted)
    return how.rollouts, rounds


def contrast_in(prompts: set[int]) -> Reward:
    """The two answers to these prompts earn 1 and 0; to all others 1 and 1."""
    return lambda number, place: 0.0 if number in prompts and place % 2 else 1.0


def test_groups_without_contrast_make_room_for_other_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rollouts, rounds = dapo(monkeypatch, tmp_path, contrast_in({1, 4, 7, 10}), max_redraws=20)
    answers = set()
    for phase in range(5):
        rounds.clear()
        trajectories, prompts, figures = rollouts.play(phase, Share())
        assert sorted(prompts) == [1, 4, 7, 10]
        assert [t.group for t in trajectories] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [t.environment.prompt.reference for t in trajectories[::2]] == prompts.tolist()
        assert [t.reward for t in trajectories] == [1, 0] * 4
        # None is asked twice: twelve are there, so many asked are so many different ones.
        assert figures["prompts"] == sum(rounds) <= 12
        assert figures["equal_groups"] == pytest.approx((sum(rounds) - 4) / sum(rounds))
        assert rounds[0] == 4
        assert len(rounds) > 1
        answers |= {tuple(t.ids) for t in trajectories}
    assert len(answers) == 5 * 8  # no round and no phase draws the random numbers of another


def test_drawing_again_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rollouts, rounds = dapo(monkeypatch, tmp_path, contrast_in({1, 4}), max_redraws=1)
    trajectories, prompts, figures = rollouts.play(0, Share())
    assert len(rounds) == 2
    assert 0 < len(prompts) <= 2  # of four: a smaller phase
    assert set(prompts) <= {1, 4}
    assert len(trajectories) == 2 * len(prompts)
    assert figures["prompts"] == sum(rounds)


def test_no_contrast_anywhere_is_a_phase_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rollouts, rounds = dapo(monkeypatch, tmp_path, contrast_in(set()), max_redraws=20)
    trajectories, prompts, figures = rollouts.play(0, Share())
    assert rounds == [4, 4, 4]  # there is nobody left to ask
    assert figures == {"prompts": 12, "equal_groups": 1.0}
    assert len(trajectories) == 2 * len(prompts) == 8


def test_without_dapo_equal_groups_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    how = settings(AlgorithmConfig(advantage="group"), prompts=12, samples=2)
    source, _ = phases(monkeypatch, tmp_path, how, contrast_in({1, 4, 7}))
    _, prompts, figures = source.rollouts.play(0, Share())
    assert sorted(prompts) == list(range(12))
    assert figures == {"prompts": 12, "equal_groups": 0.75}


@pytest.mark.parametrize(("differ", "equal"), [(False, 1.0), (True, 0.0)])
def test_single_answers_are_equal_where_all_of_the_phase_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differ: bool, equal: float
) -> None:
    """Of its own prompt each is alone; the watch ends a run in which no phase has a difference."""
    how = settings(AlgorithmConfig(advantage="batch"))
    source, _ = phases(monkeypatch, tmp_path, how, lambda number, place: float(differ and place == 0))
    assert source.rollouts.play(0, Share())[2] == {"prompts": 4, "equal_groups": equal}


def test_the_critic_is_warmed_up_on_other_prompts_than_the_first_phases_ask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, _ = phases(monkeypatch, tmp_path, settings(AlgorithmConfig(advantage="batch")), contrast_in(set()))
    for phase in (1, 2):
        before, then = (source.rollouts._choose(each, 0, 4, []).tolist() for each in (-phase, phase))
        assert before != then


def spo(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Phases, Clock]:
    algorithm = AlgorithmConfig(advantage="tracker", tracker_answers=3, minibatches=2)
    source, clock = phases(monkeypatch, folder, settings(algorithm, prompts=6), lambda number, place: float(number % 2))
    original: Callable = phase_scores.score_trajectories

    def score(*words):  # type: ignore[no-untyped-def]
        clock.does("score")
        return original(*words)

    monkeypatch.setattr(phase_scores, "score_trajectories", score)
    return source, clock


def test_time_is_counted_where_it_is_spent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, clock = spo(monkeypatch, tmp_path)
    source.micro_batches(0, Share())
    source.micro_batches(1, Share())
    before_second = clock.now
    source.micro_batches(2, Share())
    first, second = map(json.loads, (tmp_path / "rollouts.jsonl").read_text().splitlines())
    # 12 prompts in sixes, then the phase: three times played (3 s) and judged (2 s), once scored (5 s).
    assert (first["seconds_playing"], first["seconds_judging"], first["seconds_scoring"]) == (9, 6, 5)
    # The second is scored once more where a prompt comes again: how far has the policy moved on its last answer?
    assert (second["seconds_playing"], second["seconds_judging"], second["seconds_scoring"]) == (3, 2, 10)
    assert "seconds_teaching" not in first
    assert before_second == 9 + 6 + 5
    assert clock.now == before_second + 15  # nothing is counted twice and nothing left out


@pytest.mark.parametrize("log_every", [1, 2])
def test_the_rest_of_an_update_is_updating(tmp_path: Path, log_every: int) -> None:
    """Two phases of two updates, 2 s each beside the phase that the first of them waits for."""
    rollouts = [
        {"step": -1, "updates": 0, "seconds_playing": 4, "seconds_judging": 1, "seconds_teaching": 3},
        {"step": 0, "updates": 0, "seconds_playing": 5, "seconds_judging": 1, "seconds_scoring": 2},
        {"step": 1, "updates": 2, "seconds_playing": 5, "seconds_judging": 1, "seconds_scoring": 2},
    ]
    updates = [{"step": step, "seconds": 2 + waited} for step, waited in ((1, 16), (2, 0), (3, 8), (4, 0))]
    updates.append({"step": 4, "held_out/reward": 1.0})
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rollouts))
    kept = [line for line in updates if line["step"] % log_every == 0]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    # 14 s playing, 3 judging, 4 scoring, 3 teaching, 4 x 2 updating: 32 s
    assert _where_time_went(tmp_path) == (
        "time: 44% playing, 9% judging, 12% scoring, 9% teaching the critic, 25% updating"
    )


def lose(monkeypatch: pytest.MonkeyPatch, source: Phases, samples: int) -> None:
    """The second answer to odd prompts is left out, and every one to prompt 4."""
    score = source.rollouts.rewarder.score

    def judge(items: Sequence[Trajectory]) -> None:
        score(items)
        for place, item in enumerate(items):
            number = item.environment.prompt.reference
            if number == 4 or (number % 2 and place % samples == 1):
                item.left_out = "judge"

    monkeypatch.setattr(source.rollouts.rewarder, "score", judge)


def test_spo_starts_a_prompt_from_the_answers_that_were_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig(advantage="tracker", tracker_answers=3)
    source, _ = phases(monkeypatch, tmp_path, settings(algorithm, prompts=6), lambda number, place: 1.0, prompts=6)
    lose(monkeypatch, source, 3)
    source.rollouts.seed_tracker(3, Share())
    assert source.tracker is not None
    three, two, none = 8 * 3.5 / 4, 8 * 2.5 / 3, 0.5  # 8 (n0 + 1/2) / (n0 + 1)
    assert source.tracker.alpha_P == pytest.approx([three, two, three, two, none, two])


def test_a_curriculum_remembers_what_was_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    how = settings(AlgorithmConfig(advantage="group", curriculum=True), prompts=6, samples=2)
    source, _ = phases(monkeypatch, tmp_path, how, lambda number, place: 1.0, prompts=6)
    lose(monkeypatch, source, 2)
    source.rollouts.play(0, Share())
    assert source.tracker is not None
    both, one, none = 0.96 * (0.96 * 0.5 + 1) + 1, 0.96 * 0.5 + 1, 0.5
    assert source.tracker.alpha_P == pytest.approx([both, one, both, one, none, one])


@pytest.mark.parametrize("asked", [[], [0, 5]], ids=["a first round", "two were asked already"])
@pytest.mark.parametrize(
    "algorithm",
    [AlgorithmConfig(advantage="tracker"), AlgorithmConfig(advantage="group", curriculum=True)],
    ids=["spo", "a curriculum"],
)
def test_what_is_open_is_asked_oftener(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, algorithm: AlgorithmConfig, asked: list[int]
) -> None:
    """One prompt of twelve is right half of the time, the others are always or never: in 4000 phases each is asked as
    often as its weight says."""
    source, _ = phases(monkeypatch, tmp_path, settings(algorithm), lambda number, place: 1.0)
    tracker = source.tracker
    assert tracker is not None
    for number in range(12):
        tracker.seed(number, np.array([1.0, 0.0] * 4) if number == 7 else np.full(8, float(number % 2)))
    weights = tracker.sampling_weights()
    weights[asked] = 0.0
    shares = weights / weights.sum()
    drawn = [int(n) for phase in range(4000) for n in source.rollouts._choose(phase, len(asked), 1, asked)]
    assert len(drawn) == 4000
    counts, expected = np.bincount(drawn, minlength=12), 4000 * shares
    deviations = np.sqrt(expected * (1 - shares))
    assert expected[7] - 5 * deviations[7] > 4000 / (12 - len(asked))  # more than were all asked alike
    assert (np.abs(counts - expected) <= 5 * deviations).all(), (counts, expected)
