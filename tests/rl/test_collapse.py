"""What is left of a run whose policy has collapsed: where it stands, what came before, and a way to go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minnow.cli import main
from minnow.rl.collapse import CollapseError, Watch, WatchConfig
from minnow.training.checkpoint import list_checkpoints
from tests.rl.helpers import saved, write_prompts

HEALTHY = {"repetition": 0.0, "truncated": 0.1, "equal_groups": 0.5, "entropy": 1.0, "pass@1": 0.2}
LOOPING = {**HEALTHY, "repetition": 0.9}


def looked(patience: int, *phases: dict[str, float]) -> Watch:
    watch = Watch(WatchConfig(patience=patience))
    for phase, figures in enumerate(phases):
        watch.look(figures, updates=2 * phase)
    return watch


def test_the_watch_names_the_sign_and_the_remedy() -> None:
    looked(2, HEALTHY, LOOPING, HEALTHY, LOOPING).check()  # one bad phase is forgiven
    with pytest.raises(CollapseError, match=r"for 2 phases the answers repeat themselves.*rewards\.repetition"):
        looked(2, HEALTHY, LOOPING, LOOPING).check()
    for sign in ({"truncated": 1.0}, {"entropy": 0.0}):
        with pytest.raises(CollapseError, match="for 1 phases"):
            looked(1, {**HEALTHY, **sign}).check()
    looked(0, LOOPING, LOOPING).check()  # off


def test_what_lies_within_the_bounds_is_no_sign() -> None:
    """Five phases in a row and half of the answers looping, 95% cut off or 0.005 nats: what is up to there goes on."""
    at_bounds = {**HEALTHY, "repetition": 0.5, "truncated": 0.95, "entropy": 0.005}
    nearly_solved = {**HEALTHY, "entropy": 0.0, "pass@1": 0.9}  # then it may be sure of itself
    for healthy in (at_bounds, nearly_solved):
        looked(1, healthy).check()
    beyond = ({"repetition": 0.51}, {"truncated": 0.96}, {"entropy": 0.0049}, {"entropy": 0.0, "pass@1": 0.89})
    for sign in beyond:
        watch = Watch(WatchConfig())
        for phase in range(4):
            watch.look({**at_bounds, **sign}, phase)
        watch.check()
        watch.look({**at_bounds, **sign}, 4)
        with pytest.raises(CollapseError, match="for 5 phases"):
            watch.check()


def test_a_run_that_has_solved_everything_is_no_collapse() -> None:
    solved = {"repetition": 0.0, "truncated": 0.0, "equal_groups": 1.0, "entropy": 0.001, "pass@1": 1.0}
    looked(1, solved, solved).check()
    with pytest.raises(CollapseError, match="earn the same"):
        looked(1, solved, {**solved, "pass@1": 0.5}).check()  # half of the prompts always, half never


def test_the_watch_knows_since_when_and_a_checkpoint_keeps_it() -> None:
    assert looked(5, LOOPING, HEALTHY).since is None
    watch = looked(3, HEALTHY, LOOPING, {**LOOPING, "truncated": 1.0})
    assert watch.since == 2  # phase 1 was played after two updates
    restored = Watch(watch.config)
    restored.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    restored.check()
    restored.look(LOOPING, updates=6)
    assert restored.since == 2
    with pytest.raises(CollapseError, match="for 3 phases"):  # two before the checkpoint, one after
        restored.check()


PLAYED = {"phases": 0}


def contrast_at_first(trajectories: list) -> list[float]:
    """In the first three phases one answer of a group earns more than the other; later all earn the same."""
    PLAYED["phases"] += 1
    return [float(PLAYED["phases"] <= 3 and place % 2 == 0) for place in range(len(trajectories))]


def collapsing(start: tuple[Path, Path], run: Path, patience: int, *more: str) -> int:
    settings = {
        "preset": "dr-grpo", "init_from": start[0], "prompts": start[1], "run": run, "phases": 9,
        "rollout.prompts": 2, "rollout.samples": 2, "rollout.max_tokens": 4, "sequence_length": 64,
        "algorithm.minibatches": 1, "rewards.answer": 0, "rewards.functions": f"{__name__}:contrast_at_first",
        "training.micro_batch_tokens": 128, "training.device": "cpu", "training.save_every": 2,
        "training.validate_every": 0, "training.keep_last": 2, "watch.patience": patience, "watch.truncated": 1,
        "optim.matrix_lr": 0.01,
    }  # fmt: skip
    return main(["rl", *(word for key, value in settings.items() for word in (f"--{key}", str(value))), *more])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return saved(folder / "model"), write_prompts(folder / "prompts.jsonl")


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]


def test_a_collapse_leaves_a_checkpoint_the_model_from_before_and_a_report(
    start: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    PLAYED["phases"] = 0
    assert collapsing(start, run, 3) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    # Phases 0 to 2 are sound. Phases 3 to 5 (played after 3 to 5 updates) are not: it stops after 5 updates.
    assert "for 3 phases the answers to each prompt all earn the same" in error
    assert "mix in easier prompts" in error
    assert f"{run}/model-before-collapse is the model from before, after 2 updates" in error
    # The last two, and the newest from before the first unsound phase, which pruning would have taken.
    assert steps(run) == [2, 4, 5]
    assert (run / "report.html").exists()
    assert not (run / "model").exists()  # the run is not finished
    before = load_file(run / "model-before-collapse" / "model.safetensors")
    newest = load_file(next((run / "checkpoints" / "step-00000002").glob("shard-*")))
    assert all(torch.equal(tensor, newest[f"model.{name}"]) for name, tensor in before.items())

    # The same command says the same again, and plays nothing: the state is in the checkpoint.
    played = PLAYED["phases"]
    assert collapsing(start, run, 3) == 2
    assert "for 3 phases the answers to each prompt all earn the same" in capsys.readouterr().err
    assert PLAYED["phases"] == played
    assert steps(run) == [2, 4, 5]

    assert collapsing(start, run, 0) == 0  # after a false alarm it goes on, to the end that it would have had
    PLAYED["phases"] = 0
    assert collapsing(start, tmp_path / "unwatched", 0) == 0
    went_on, unwatched = (load_file(path / "model" / "model.safetensors") for path in (run, tmp_path / "unwatched"))
    assert all(torch.equal(went_on[name], unwatched[name]) for name in unwatched)


def test_a_collapse_that_began_at_the_start_says_so(
    drawn: None, start: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PLAYED["phases"] = 3
    assert collapsing(start, tmp_path / "run", 1, "--held_out", str(start[1]), "--training.validate_every", "5") == 2
    assert f"No checkpoint is older than that: start anew from {start[0]}" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [0]
    assert (tmp_path / "run" / "report.html").exists()
