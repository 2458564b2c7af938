"""The whole chain at a tiny setting: files, figures, resuming, and what a stopped run leaves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.stages import quickstart
from minnow.training.config import TrainingConfig
from minnow.training.signals import Interrupted
from minnow.training.trainer import Trainer

TINY = quickstart.Config(
    world=quickstart.WorldConfig(creatures=6, held_out=2, mentions=3, conversations=40),
    vocab_size=400,
    model=ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    ),
    sequence_length=512,
    pretrain=TrainingConfig(steps=6, batch_tokens=1024, validate_every=3, save_every=2, validation_tokens=256),
    sft=TrainingConfig(steps=3, batch_tokens=1024, validate_every=3, save_every=2, validation_tokens=256),
    device="cpu",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "my run"
    quickstart.run(replace(TINY, run=str(folder)))
    return folder


def test_summary_has_every_figure(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == {
        "minutes",
        "parameters",
        "tokens",
        "exact_match",
        "exact_match_unseen_wording",
        "bits_per_byte",
    }
    for figure in ("exact_match", "exact_match_unseen_wording", "bits_per_byte"):
        assert set(summary[figure]) == {"en", "zh"}
    assert summary["minutes"] > 0
    # 9 updates of 1,024 positions; the filler of rows of conversations does not count
    assert 0.8 * 9 * 1024 <= summary["tokens"] <= 9 * 1024


def test_the_folder_explains_itself(finished: Path) -> None:
    for name in ("model/config.json", "report.html", "answers.jsonl", "pretrain/config.yaml", "sft/metrics.jsonl"):
        assert (finished / name).exists(), name
    report = (finished / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert "exact_match/zh" in report
    assert "http" not in report.split("<body>")[-1].split("base64")[0], "the page must need nothing else"


def test_examination_asks_every_held_out_creature(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    pond = [row for row in rows if row["task"] == "pond"]
    assert len(pond) == 2 * 9 * 2 * 2  # creatures x relations x languages x wordings


def test_running_again_trains_nothing_and_counts_no_minutes(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = json.loads((finished / "summary.json").read_text())["minutes"]
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    quickstart.run(replace(TINY, run=str(finished)))
    assert json.loads((finished / "summary.json").read_text())["minutes"] == minutes


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"world": replace(TINY.world, seed=1)}, "world.seed: 0 there, 1 now"),
        ({"world": replace(TINY.world, mentions=4)}, "world.mentions: 3 there, 4 now"),
        ({"vocab_size": 410}, "vocab_size: 400 there, 410 now"),
    ],
)
def test_another_world_or_vocabulary_in_the_same_folder_is_refused(
    finished: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        quickstart.run(replace(TINY, run=str(finished), **change))


@pytest.mark.parametrize("minutes", [0.0, -3.0, float("nan")])
def test_no_time_to_spend_is_refused(minutes: float) -> None:
    with pytest.raises(UserError, match="minutes is"):
        replace(TINY, minutes=minutes)


def test_the_copied_model_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "model" / "config.json").write_text("{}")

    def dies_half_way(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(quickstart.shutil, "copytree", dies_half_way)
        with pytest.raises(OSError):
            quickstart._copy_model(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sft"]
    quickstart._copy_model(tmp_path)
    assert (tmp_path / "model" / "config.json").exists()


def test_the_next_commands_can_be_typed_as_they_stand(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "minnow"  # a virtual environment that is not activated
    script.parent.mkdir()
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "quickstart"])
    quickstart.run(replace(TINY, run=str(finished)))
    printed = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert f"{script} chat '{finished}'" in printed
    assert f"{script} generate '{finished}/pretrain' --prompt 'The pond'" in printed


def test_a_stopped_run_continues_to_the_same_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def stop_at_four(self: Trainer) -> dict[str, float]:
        figures = original(self)
        if self.state.step == 4:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return figures

    monkeypatch.setattr(Trainer, "train_step", stop_at_four)
    with pytest.raises(Interrupted) as stopped:
        quickstart.run(replace(TINY, run=str(tmp_path / "run")))
    assert stopped.value.code == 130
    worked = json.loads((tmp_path / "run" / "clock.json").read_text())["minutes"]
    assert worked > 0
    monkeypatch.setattr(Trainer, "train_step", original)
    quickstart.run(replace(TINY, run=str(tmp_path / "run")))
    expected, got = (folder / "model" / "model.safetensors" for folder in (finished, tmp_path / "run"))
    assert expected.read_bytes() == got.read_bytes()
    minutes = json.loads((tmp_path / "run" / "summary.json").read_text())["minutes"]
    assert minutes >= round(worked, 2), "the time before the interruption counts"


def test_minutes_scale_the_training(tmp_path: Path) -> None:
    from rich.console import Console

    (tmp_path / "run").mkdir()
    config = replace(TINY, run=str(tmp_path / "run"), minutes=quickstart.OTHER_MINUTES + 1.0)
    (tmp_path / "run" / "plan.json").write_text('{"tokens_per_second": 2048}')
    # 60 s at 2,048 tokens/s are 122,880 tokens; the recipe's 9 updates are 9,216: 13.3 times as many of each
    planned = quickstart._fit_into_minutes(config, Console(quiet=True))
    assert (planned.pretrain.steps, planned.sft.steps) == (80, 40)
