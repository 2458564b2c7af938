"""Training on data that is still being prepared: it starts early, waits in words, and sees the same batches again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minnow.config import UserError
from minnow.data import lots, windows
from minnow.data import prepare as prepare_module
from minnow.data.background import Background
from minnow.data.job import find_job
from minnow.data.journal import Part
from minnow.data.preparation import Preparation, prepare_part, prepare_streaming
from minnow.data.prepare import DataConfig, prepare, stream
from minnow.data.shards import Shards
from minnow.data.windows import GrowingShards
from minnow.model.config import ModelConfig
from minnow.stages import pretrain
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training import trainer
from minnow.training.config import TrainingConfig
from minnow.training.objective import PackedBatches, StreamedBatches
from minnow.training.signals import Interrupted

TEXTS = [f"The {colour} fish number {i} swims in the pond." for i in range(100) for colour in ("red", "blue")]


class Thread:
    """In the place of the background process, in this one: it sees what the tests have changed."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, kind: Any, sequence_length: int) -> None:
        def work() -> None:
            try:
                prepare_streaming(find_job(config, tokenizer, kind, sequence_length))
            except (UserError, Killed):
                self.code = 2

        self.code = 0
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def ended_badly(self) -> str | None:
        return "the process that prepares the data ended" if self.code else None

    def close(self) -> None:
        self.thread.join(timeout=60)


class Killed(BaseException):
    """A process that ends leaves no word."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 12 shards in windows of two."""
    monkeypatch.setattr(lots, "BATCH_BYTES", 500)
    monkeypatch.setattr(lots, "LOT_BYTES", 1000)
    monkeypatch.setattr(windows, "WINDOW_SHARDS", 2)
    monkeypatch.setattr(windows, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(trainer, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(prepare_module, "Background", Thread)


@pytest.fixture
def config(tmp_path: Path) -> pretrain.Config:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path / "tokenizer")
    return pretrain.Config(
        run=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        data=DataConfig(
            paths=(str(tmp_path / "texts.jsonl"),),
            cache_dir=str(tmp_path / "cache"),
            workers=0,
            validation_fraction=0.1,
        ),
        stream=True,
        model=ModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        ),
        sequence_length=32,
        training=TrainingConfig(steps=16, batch_tokens=128, device="cpu", log_every=1, save_every=4),
    )


def losses(run: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def slow_preparation(monkeypatch: pytest.MonkeyPatch, after: int) -> threading.Event:
    """From shard `after` on, shards are closed only once the event is set."""
    go_on, closed, close = threading.Event(), [0], Preparation._close_shard

    def close_later(self: Preparation, *arguments: Any) -> None:
        closed[0] += 1
        if closed[0] > after:
            assert go_on.wait(30)
        close(self, *arguments)

    monkeypatch.setattr(Preparation, "_close_shard", close_later)
    return go_on


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, do: Any) -> None:
    read = PackedBatches.micro_batches

    def micro_batches(self: Any, step: int, share: Any) -> Any:
        if step == wanted:
            do()
        return read(self, step, share)

    monkeypatch.setattr(PackedBatches, "micro_batches", micro_batches)


def test_training_starts_before_the_data_is_ready_and_is_the_same_later(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        go_on = slow_preparation(patch, after=3)
        at_step(patch, 1, go_on.set)  # were the data needed whole, this step would never come
        pretrain.run(config)
    early = losses(config.run)
    assert [step for step, _ in early] == list(range(1, 17))
    again = replace(config, run=config.run + "-again")
    pretrain.run(again)
    assert losses(again.run) == early
    assert "waiting for prepared data: 0 of the next 2 shards are there" in capsys.readouterr().err


def test_a_run_that_breaks_off_goes_on_with_the_same_batches(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, run=config.run + "-whole", data=replace(config.data, cache_dir=config.data.cache_dir + "2"))
    pretrain.run(whole)

    def fall_over() -> None:
        go_on.set()
        raise Killed

    with monkeypatch.context() as patch:
        go_on = slow_preparation(patch, after=7)  # at step 6 some shards are there
        at_step(patch, 6, fall_over)
        with pytest.raises(Killed):
            pretrain.run(config)
    assert [step for step, _ in losses(config.run)] == list(range(1, 7))
    pretrain.run(config)
    assert losses(config.run) == losses(whole.run)


def test_a_damaged_shard_is_named_when_its_window_is_opened(config: pretrain.Config) -> None:
    """Only data that was prepared as a whole was verified; a stream trained on whatever the disk had made of it."""
    pretrain.run(config)
    prepared = next(path.parent for path in Path(config.data.cache_dir).glob("*/train"))
    shard = sorted((prepared / "train").glob("*.tokens"))[3]  # of the second window
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = replace(config, run=config.run + "-again")
    with pytest.raises(UserError, match=f"{shard}: content does not match its checksum"):
        pretrain.run(again)
    assert losses(again.run), "the first window is whole"
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard}: missing"):
        pretrain.run(again)


def test_a_bad_row_far_behind_ends_the_training_in_words(config: pretrain.Config) -> None:
    (path,) = config.data.paths
    with open(path, "a") as file:
        file.write('{"text": 3}\n')
    config = replace(config, training=replace(config.training, steps=100, save_every=0))  # to the end of the data
    with pytest.raises(
        UserError, match=r"^the preparation of the data has failed: .*texts\.jsonl:201: `text` must be text"
    ):
        pretrain.run(config)


def test_data_that_change_meanwhile_end_the_training_in_words(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word went with the folder, and the training said that memory did not suffice."""
    (path,) = config.data.paths
    closed, close = [0], Preparation._close_shard

    def close_and_change(self: Preparation, *arguments: Any) -> None:
        closed[0] += 1
        if closed[0] == 6:
            with open(path, "a") as file:
                file.write('{"text": "One more."}\n')
        close(self, *arguments)

    monkeypatch.setattr(Preparation, "_close_shard", close_and_change)
    config = replace(config, training=replace(config.training, steps=100, save_every=0))  # to the end of the data
    with pytest.raises(UserError, match=r"^the preparation of the data has failed: .*texts\.jsonl: the data changed"):
        pretrain.run(config)


def test_a_preparation_that_ends_without_a_word_is_told(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = [0], Preparation._close_shard

    def close_or_die(self: Preparation, *arguments: Any) -> None:
        closed[0] += 1
        if closed[0] == 6:
            raise Killed
        close(self, *arguments)

    monkeypatch.setattr(Preparation, "_close_shard", close_or_die)
    with pytest.raises(UserError, match="the process that prepares the data ended"):
        pretrain.run(config)
    assert losses(config.run), "it trained on what was there"


def test_a_step_waits_for_the_last_of_its_rows() -> None:
    """Steps of 4 rows: of step 3 that is row 15. Waiting for less, the step itself would wait, and hear no signal."""
    asked: list[int] = []
    rows: Any = SimpleNamespace(lacking=asked.append)
    StreamedBatches(rows, seed=0, rows_per_batch=4, rows_per_micro_batch=2, written=rows).lacking(3)
    assert asked == [15]


def test_a_signal_stops_a_run_that_waits_for_data(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, waits = slow_preparation(monkeypatch, after=3), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        if len(waits) == 4:  # nobody listens
            go_on.set()

    def close(self: Thread) -> None:
        go_on.set()
        self.thread.join(timeout=60)

    monkeypatch.setattr(Thread, "close", close)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(sleep=sleep, perf_counter=time.perf_counter))
    with pytest.raises(Interrupted) as caught:
        pretrain.run(config)
    assert caught.value.code == 143
    assert len(waits) == 1
    done = len(losses(config.run))
    assert f"stopped at step {done};" in caught.value.message
    assert (Path(config.run) / "checkpoints" / f"step-{done:08d}" / "complete.json").exists()


def growing(config: pretrain.Config) -> tuple[GrowingShards, list[str]]:
    said: list[str] = []
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    streamed = stream(config.data, tokenizer, "pretrain", sequence_length=32, leads=False, say=said.append)
    return streamed.shards, said


def test_what_is_waited_for(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    reader, _ = growing(config)
    assert reader.lacking(0) == "waiting for prepared data: 0 of the next 2 shards are there"
    go_on = slow_preparation(monkeypatch, after=5)
    worker = Thread(config.data, tokenizer, "pretrain", 32)
    while reader.lacking(1) is not None:
        time.sleep(0.005)
    assert reader.lacking(0) is None
    while "1 of the next 2" not in (reader.lacking(2) or ""):
        time.sleep(0.005)
    assert reader.lacking(3) == "waiting for prepared data: 0 of the next 2 shards are there"
    names = [reader.window(number, "train")._names for number in range(2)]  # type: ignore[union-attr]
    go_on.set()
    worker.close()
    later, said = growing(config)
    assert [later.window(number, "train")._names for number in range(2)] == names  # type: ignore[union-attr]
    assert later.lacking(1000) is None
    assert later.window(1000, "train") is None
    assert said == []


def test_waiting_is_said_once(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, said = growing(config)
    answers = iter(["for one", "for one", "for another", None])
    monkeypatch.setattr(reader, "lacking", lambda number: next(answers))
    assert reader.window(0, "train") is None
    assert said == ["for one", "for another"]


def test_what_was_prepared_is_read_in_windows(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides, all of it, numbered as in the folder; every byte is checked once, not once an epoch."""
    prepare(
        config.data, Tokenizer.from_pretrained(str(config.tokenizer)), "pretrain", sequence_length=32, progress=False
    )
    reader, _ = growing(config)
    verified: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(Shards, "verify", lambda shards: verified.append((shards.folder.name, shards._names)))
    for side in ("train", "validation"):
        whole, number, seen = Shards.open(reader.job.folder / side), 0, 0
        while (window := reader.window(number, side)) is not None:
            assert window._names == whole._names[2 * number : 2 * number + 2]
            documents = np.arange(window.num_documents)
            assert window.numbers(documents).tolist() == (seen + documents).tolist()
            assert all(np.array_equal(window.tokens(i), whole.tokens(seen + i)) for i in documents.tolist())
            number, seen = number + 1, seen + window.num_documents
        assert (number, seen) == ((whole.num_shards + 1) // 2, whole.num_documents)
        assert [names for folder, names in verified if folder == side] == [
            whole._names[first : first + 2] for first in range(0, whole.num_shards, 2)
        ]
        assert reader.window(0, side) is not None
    assert len(verified) == 2 * number, "the second look at a window reads it no more"


def test_conversations_keep_their_weights(config: pretrain.Config, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "fish?"}, {"role": "assistant", "content": text}]} for text in TEXTS
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    prepare(config.data, tokenizer, "sft", sequence_length=64, progress=False)
    window = stream(config.data, tokenizer, "sft", sequence_length=64, leads=False).shards.window(0, "train")
    assert window is not None
    assert set(window.weights(0).tolist()) == {0.0, 1.0}, "the question is read, the answer is learnt"


def test_parts_elsewhere_are_waited_for(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    prepare_part(config.data, tokenizer, "pretrain", Part(1, 2), sequence_length=32, progress=False)
    reader, _ = growing(config)
    assert reader.lacking(0) == "waiting for prepared data: 1 of the next 2 shards are there, the next is of part 2/2"
    monkeypatch.setattr(windows, "WINDOW_SHARDS", 1)
    assert reader.lacking(0) is None


def test_steps_are_asked_for(config: pretrain.Config) -> None:
    with pytest.raises(UserError, match=r"--stream needs --training\.steps"):
        pretrain.run(replace(config, training=replace(config.training, steps=None)))
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    with pytest.raises(UserError, match="pairs are read as a whole"):
        stream(config.data, tokenizer, "preference", sequence_length=32)


@pytest.fixture
def real_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process does not see what a test has changed here."""
    monkeypatch.undo()


@pytest.mark.usefixtures("real_lots")
def test_the_background_process(config: pretrain.Config, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer))
    process = Background(config.data, tokenizer, "pretrain", 32)
    try:
        assert process._process.wait(timeout=200) == 0
        assert process.ended_badly() is None
    finally:
        process.close()
    there = prepare(config.data, tokenizer, "pretrain", sequence_length=32, progress=False)
    assert there.train.num_documents + there.validation.num_documents == len(TEXTS)
    (tmp_path / "texts.jsonl").write_text('{"text": 3}\n')
    process = Background(config.data, tokenizer, "pretrain", 32)
    process._process.kill()
    process._process.wait()
    assert "ended (exit code -9)" in str(process.ended_badly())
    process.close()
