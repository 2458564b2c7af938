"""The whole chain at a tiny setting: files, figures, resuming, and what a stopped run leaves."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import load_world
from minnow.evaluation import TaskOptions, evaluate, make_tasks
from minnow.model.config import ModelConfig
from minnow.model.pretrained import load_pretrained
from minnow.stages import chat, quickstart
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.signals import Interrupted
from minnow.training.trainer import Trainer
from tests.pictures import drawing

TINY = quickstart.Config(
    world=quickstart.WorldConfig(seed=3, creatures=6, held_out=2, mentions=3, conversations=40),
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
    with drawing():
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


def test_the_figures_are_those_of_the_models(finished: Path) -> None:
    """Bits per byte is the base model's, all else the final model's, whose card has no figure of another."""
    summary = json.loads((finished / "summary.json").read_text())
    card = json.loads((finished / "evaluation.json").read_text())
    assert card["model"] == str(finished)
    assert set(card["tasks"]) == {"pond"}
    found = {name: round(bar["value"], 4) for name, bar in card["tasks"]["pond"]["figures"].items()}
    base, tokenizer = load_pretrained(finished / "pretrain"), Tokenizer.from_pretrained(finished / "pretrain" / "model")
    (bits,) = evaluate(base, tokenizer, make_tasks("bpb", TaskOptions(pond=finished / "pond")))
    for name, bar in bits.figures.items():
        found[name] = pytest.approx(bar.value, abs=1e-3)
        (shown,) = re.findall(f"<td>bpb before sft {name}</td><td>(.*?)</td>", (finished / "report.html").read_text())
        assert float(shown) == found[name]
    kinds = ("exact_match", "exact_match_unseen_wording", "bits_per_byte")
    assert {f"{kind}/{language}": summary[kind][language] for kind in kinds for language in ("en", "zh")} == found
    assert summary["parameters"] == sum(parameter.numel() for parameter in load_pretrained(finished).parameters())


def test_each_stage_has_its_own_settings(finished: Path) -> None:
    stages = {name: yaml.safe_load((finished / name / "config.yaml").read_text()) for name in ("pretrain", "sft")}
    for stage, optim in (("pretrain", TINY.pretrain_optim), ("sft", TINY.sft_optim)):
        assert stages[stage]["optim"]["matrix_lr"] == optim.matrix_lr
        assert stages[stage]["schedule"]["warmup_steps"] == TINY.schedule.warmup_steps
        assert stages[stage]["sequence_length"] == TINY.sequence_length
    assert TINY.pretrain_optim.matrix_lr != TINY.sft_optim.matrix_lr
    assert stages["sft"]["init_from"] == str(finished / "pretrain")
    assert load_world(finished / "pond") == World.generate(3, 6, 2)


def test_the_samples_are_conversations_about_creatures_of_the_examination(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three questions in each language, and with each the model reads what was said before."""
    samples = quickstart._sample_questions(finished)
    assert [len(questions) for questions in samples] == [3, 3]
    held_out = load_world(finished / "pond").members("held_out")
    for language, questions in zip(("en", "zh"), samples, strict=True):
        assert all(any(creature.name(language) in text for creature in held_out) for text in questions)
    assert (finished / "report.html").read_text().count('<div class="turn user">') == 6
    read: list[str] = []

    class Echo:
        def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
            self.tokenizer = tokenizer

        def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
            assert params.temperature == 0
            read.append(self.tokenizer.decode(prompts[0]))
            return [SimpleNamespace(completions=[SimpleNamespace(text=f"answer {len(read)}")])]

    monkeypatch.setattr(quickstart, "Engine", Echo)
    tokenizer = Tokenizer.from_pretrained(finished / "model")
    messages = quickstart._converse(None, tokenizer, ["a?", "b?"])  # type: ignore[arg-type]
    assert [message["content"] for message in messages] == ["a?", "answer 1", "b?", "answer 2"]
    assert all(part in read[1] for part in ("a?", "answer 1", "b?"))


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
        ({"world": replace(TINY.world, seed=1)}, "world.seed: 3 there, 1 now"),
        ({"world": replace(TINY.world, mentions=4)}, "world.mentions: 3 there, 4 now"),
        ({"vocab_size": 410}, "vocab_size: 400 there, 410 now"),
    ],
)
def test_another_world_or_vocabulary_in_the_same_folder_is_refused(
    finished: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        quickstart.run(replace(TINY, run=str(finished), **change))


@pytest.mark.parametrize("minutes", [0.0, -3.0, float("nan"), float("inf")])
def test_no_time_to_spend_is_refused(minutes: float) -> None:
    with pytest.raises(UserError, match="minutes is"):
        replace(TINY, minutes=minutes)


def test_the_copied_model_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "model" / "config.json").write_text("{}")

    def dies_half_way(source: Path, target: Path, dirs_exist_ok: bool) -> None:
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
    assert f"{script} eval '{finished}' --tasks pond,bpb" in printed


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


@pytest.mark.parametrize(
    ("minutes", "speed", "steps", "tokens", "expected"),
    [
        # 7,680 tokens at 128 a second are a minute; all else takes what it always does.
        (None, 128, (6, 3), "7,680", 1.0),
        # 60 s at 2,048 tokens/s are 122,880 tokens, 16 times as many of each.
        (quickstart.OTHER_MINUTES + 1.0, 2048, (96, 48), "122,880", 1.0),
        # Less than the rest takes: still a tenth of a minute, 1.6 times as many at this speed ...
        (0.2, 2048, (10, 5), "12,800", 12_800 / 2048 / 60),
        # ... and however slow the machine, four updates of each.
        (0.2, 128, (4, 4), "6,144", 0.8),
    ],
)
def test_minutes_scale_the_training(
    tmp_path: Path, minutes: float | None, speed: int, steps: tuple[int, int], tokens: str, expected: float
) -> None:
    (tmp_path / "run").mkdir()
    sft = replace(TINY.sft, batch_tokens=512)
    config = replace(TINY, run=str(tmp_path / "run"), minutes=minutes, sft=sft)
    (tmp_path / "run" / "plan.json").write_text(json.dumps({"tokens_per_second": speed}))
    console = Console(file=io.StringIO(), width=100)
    planned = quickstart._fit_into_minutes(config, console)
    assert (planned.pretrain.steps, planned.sft.steps) == steps
    assert (planned.pretrain.device, planned.sft.device) == ("cpu", "cpu")
    shown = dict(re.findall(r"│ (.*?) +│ (.*?) +│", console.file.getvalue()))  # type: ignore[attr-defined]
    # 400 x 32 in the embedding; q and o 2 x 32 x 32, k and v 2 x 32 x 16, MLP 3 x 32 x 48, norms 3 x 32 and 2 x 16.
    assert shown["parameters"] == f"{12_800 + 2_048 + 1_024 + 4_608 + 96 + 32:,}"
    # Of those the matrices and the head, twice forwards and four times backwards, and attention to 64 tokens.
    flops = int(tokens.replace(",", "")) * 3 * (2 * (12_800 + 2_048 + 1_024 + 4_608) + 4 * 2 * 16 * 64)
    assert shown["floating-point operations"] == f"{flops:.2e}"
    assert shown["training tokens"] == tokens
    assert shown["expected time"] == f"{quickstart.OTHER_MINUTES + expected:.1f} minutes"
    assert shown["machine"].endswith(f"{speed:,} tokens/s in a probe")


def test_a_stage_without_a_number_of_updates_cannot_be_planned() -> None:
    for stage in ("pretrain", "sft"):
        with pytest.raises(UserError, match=r"pretrain.steps and sft.steps must be numbers"):
            replace(TINY, **{stage: replace(getattr(TINY, stage), steps=None)})


def test_the_clock_counts_minutes_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(quickstart, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for worked in (2.0, 4.0):
        clock = quickstart._Clock(tmp_path)
        now[0] += 120.0
        assert clock.minutes == pytest.approx(worked)
        clock.stop()
    (tmp_path / "summary.json").write_text(json.dumps({"minutes": 3.5}))
    clock = quickstart._Clock(tmp_path)
    now[0] += 120.0
    assert clock.minutes == 3.5, "a finished run's stay what they were"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_make_data", "_train", "_copy_model", "_examine"):
        monkeypatch.setattr(quickstart, name, lambda *arguments: None)
    monkeypatch.setattr(quickstart, "_fit_into_minutes", lambda config, console: config)


def test_the_plan_comes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(quickstart, "_fit_into_minutes", lambda config, console: done.append("plan") or config)
    for name in ("_make_data", "_train", "_copy_model", "_examine"):
        monkeypatch.setattr(quickstart, name, lambda *arguments, name=name: done.append(name))
    quickstart.run(replace(TINY, run=str(tmp_path / "run"), chat=False))
    assert done == ["plan", "_make_data", "_train", "_copy_model", "_examine"]


@pytest.mark.usefixtures("no_work")
def test_overwrite_starts_anew(tmp_path: Path) -> None:
    old = tmp_path / "run" / "pond" / "world.json"
    for overwrite in (False, True):
        quickstart.run(replace(TINY, run=str(tmp_path / "run"), overwrite=overwrite))
        assert not old.exists()
        old.parent.mkdir()
        old.write_text("{}")


@pytest.mark.usefixtures("no_work")
def test_the_chat_is_opened_on_a_terminal_unless_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(chat, "run", lambda config: opened.append(config.model))
    for is_terminal, wanted in ((True, True), (True, False), (False, True)):
        for stream in ("stdin", "stdout"):
            monkeypatch.setattr(sys, stream, SimpleNamespace(isatty=lambda answer=is_terminal: answer))
        quickstart.run(replace(TINY, run=str(tmp_path / "run"), chat=wanted))
    assert opened == [str(tmp_path / "run")]
