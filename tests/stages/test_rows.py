"""Rows whose length nobody gave are as long as the model reads, at most 1,024 tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from minnow import cli
from minnow.model.pretrained import read_config, save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.stages import language_model
from minnow.stages.rows import RowsConfig, with_row_length
from minnow.tokenizer import Tokenizer
from minnow.training.run_folder import RunFolder
from tests.rl.helpers import saved
from tests.training.distributed.stages import write_world

READS, TEACHER_READS = 128, 120
STAGES = {
    "pretrain": "texts",
    "sft": "talks",
    "dpo": "pairs",
    "reward": "pairs",
    "distill": "talks",
    "distill on-policy": "prompts",
    "rl": "prompts",
}


class Opened(Exception):  # noqa: N818 - it is no error
    """A run that got as far as its folder."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    saved(folder / "teacher", seed=5, max_position_embeddings=TEACHER_READS)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where the resolved configuration would be written."""

    def stop(folder: RunFolder, config: Any, *, overwrite: bool) -> None:
        raise Opened(config.sequence_length)

    monkeypatch.setattr(RunFolder, "open", stop)


def words_of(name: str, world: Path, run: Path) -> list[str]:
    words = [*name.split(), "--run", str(run), "--init_from", str(world / "start"), "--training.device", "cpu"]
    if STAGES[name] == "prompts":
        words += ["--prompts", str(world / "prompts.jsonl"), "--rollout.max_tokens", "4"]
    else:
        words += ["--data.paths", str(world / f"{STAGES[name]}.jsonl"), "--data.cache_dir", str(run.parent / "cache")]
        words += ["--training.batch_tokens", "13440"]
    return words + ["--teacher", str(world / "teacher")] * name.startswith("distill")


@pytest.mark.parametrize("name", STAGES)
def test_a_plain_command_fits_the_model(name: str, world: Path, tmp_path: Path, opened: None) -> None:
    """`minnow sft --init_from runs/quickstart` was refused: rows of 1,024 for a model that reads 512."""
    with pytest.raises(Opened, match=f"^{TEACHER_READS if name.startswith('distill') else READS}$"):
        cli.main(words_of(name, world, tmp_path / "run"))
    with pytest.raises(Opened, match="^112$"):  # what was asked for is not touched
        cli.main([*words_of(name, world, tmp_path / "run"), "--sequence_length", "112"])
    assert cli.main([*words_of(name, world, tmp_path / "run"), "--sequence_length", "192"]) == 2


@pytest.mark.parametrize(
    "judges",
    [["--rewards.reward_model"], ["--algorithm.advantage", "gae", "--algorithm.critic.init_from"]],
    ids=["reward model", "critic"],
)
def test_practice_fits_all_who_read_it(judges: list[str], world: Path, tmp_path: Path, opened: None) -> None:
    """It was refused, and told to give a number that nobody had asked for."""
    folder = tmp_path / "judge"
    shape = replace(read_config(world / "start"), max_position_embeddings=TEACHER_READS)
    save_pretrained(RewardModel(shape), folder, Tokenizer.from_pretrained(world / "start"))
    words = [*words_of("rl", world, tmp_path / "run"), *judges, str(folder)]
    with pytest.raises(Opened, match=f"^{TEACHER_READS}$"):
        cli.main(words)
    assert cli.main([*words, "--sequence_length", str(READS)]) == 2
    plans = []
    for length in ([], ["--sequence_length", str(TEACHER_READS)]):
        asked = ["plan", "rl", "--init_from", str(world / "start"), "--training.device", "cpu", *judges, str(folder)]
        assert cli.main([*asked, *length, "--json", str(tmp_path / "plan.json")]) == 0
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", STAGES)
def test_rows_of_nothing_are_refused(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 ended in a ZeroDivisionError."""
    for length in ("0", "-8"):
        assert cli.main([*words_of(name, world, tmp_path / "run"), "--sequence_length", length]) == 2
        assert f"sequence_length is {length}: it must be at least 1" in capsys.readouterr().err


def test_a_new_student_reads_what_its_teacher_does(world: Path, tmp_path: Path, opened: None) -> None:
    words = words_of("distill", world, tmp_path / "run")
    words[words.index("--init_from") : words.index("--init_from") + 2] = ["--tokenizer", str(world / "start")]
    with pytest.raises(Opened, match=f"^{TEACHER_READS}$"):
        cli.main(words)


def test_a_stretched_context_is_used(world: Path, tmp_path: Path, opened: None) -> None:
    words = [*words_of("pretrain", world, tmp_path / "run"), "--rope_scaling", "yarn"]
    with pytest.raises(Opened, match=f"^{3 * READS}$"):
        cli.main([*words, "--factor", "3"])
    words[words.index("13440")] = "1024"
    with pytest.raises(Opened, match="^1024$"):  # without a factor the rows say how far
        cli.main(words)


def test_the_run_says_and_records_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_model, "write_report", lambda folder: None)
    words = [*words_of("sft", world, tmp_path / "run"), "--training.steps", "1", "--training.compile", "off"]
    words[words.index("13440")] = "256"
    assert cli.main(words) == 0
    assert f"rows of {READS} tokens" in " ".join(capsys.readouterr().err.split())
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["sequence_length"] == READS
    assert cli.main(words) == 0, "the same command is the same run"


@pytest.mark.parametrize("command", ["prepare", "inspect"])
def test_data_of_a_model_are_prepared_as_it_reads_them(command: str, world: Path, tmp_path: Path, opened: None) -> None:
    """Conversations are cut to fit a row: with another length than training's, its preparation found nothing."""
    cache, figures = tmp_path / "cache", tmp_path / "figures.json"
    words = f"data {command} --kind sft --data.paths {world}/talks.jsonl --data.cache_dir {cache} --json {figures}"
    assert cli.main([*words.split(), "--tokenizer", str(world / "start")]) == 0
    prepared = set(cache.iterdir())
    with pytest.raises(Opened):
        cli.main(words_of("sft", world, tmp_path / "run"))
    assert set(cache.iterdir()) == prepared
    assert json.loads(figures.read_text())


def test_plans_count_those_rows(world: Path, tmp_path: Path) -> None:
    for name, figures in (("plan", ["--probe_seconds", "0"]), ("plan rl", [])):
        plans = []
        for length in ([], ["--sequence_length", str(READS)]):
            words = [*name.split(), "--init_from", str(world / "start"), "--training.device", "cpu", *length, *figures]
            assert cli.main([*words, "--json", str(tmp_path / "plan.json")]) == 0
            plans.append(json.loads((tmp_path / "plan.json").read_text()))
        assert plans[0] == plans[1]


def test_no_more_than_1024_and_no_more_than_any_model() -> None:
    assert with_row_length(RowsConfig(), 4096).row_length == 1024
    assert with_row_length(RowsConfig(), None, 512, 300).row_length == 300
    assert with_row_length(RowsConfig(sequence_length=2048), 512).row_length == 2048, "refused elsewhere, in words"
