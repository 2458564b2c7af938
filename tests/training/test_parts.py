"""The Trainer's parts on their own: loss scale, signals, metrics, validation, machine."""

from __future__ import annotations

import errno
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minnow.config import UserError
from minnow.data.batches import Share
from minnow.model.quantize import quantize
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import DistillationLossConfig
from minnow.training import parallel, session
from minnow.training.checkpoint import random_state, set_random_state
from minnow.training.config import TrainingConfig
from minnow.training.distillation import Distillation
from minnow.training.hardware import _cpu_matmul_peak, _matmul_peak, choose_device, choose_precision, matmul_peak
from minnow.training.lock import FolderLock
from minnow.training.loss_scale import LossScale
from minnow.training.metrics_log import LogFollower, MetricsLog
from minnow.training.objective import LanguageModeling
from minnow.training.parallel import choose_parallel
from minnow.training.run_folder import RunFolder
from minnow.training.session import COMPILE_PAYS_AFTER_SECONDS, Machine
from minnow.training.signals import Interrupted, stop_requests
from minnow.training.speed import batch_flops
from minnow.training.validation import validate
from tests.without_float64 import WithoutFloat64

from .helpers import SHAPE, RandomSource, make_trainer, masked_batch, started_by


def test_loss_scale_halves_on_overflow_and_doubles_after_a_calm_stretch() -> None:
    scale = LossScale(torch.float16)
    assert scale.scale == 32768
    scale.update(overflow=True)
    assert scale.scale == 16384
    for _ in range(LossScale.growth_interval):
        scale.update(overflow=False)
    assert scale.scale == 32768
    restored = LossScale(torch.float16)
    restored.load_state_dict(scale.state_dict())
    assert vars(restored) == vars(scale)


def test_an_overflow_begins_the_calm_stretch_anew() -> None:
    scale = LossScale(torch.float16)
    for overflow in (*[False] * (LossScale.growth_interval - 1), True, False):
        scale.update(overflow=overflow)
    assert scale.scale == 16384


def test_loss_scale_is_one_where_it_is_not_needed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype)
        scale.update(overflow=True)
        assert scale.scale == 1.0


def test_fp16_steps_match_fp32_ones(tmp_path: Path) -> None:
    """The scale must cancel out: same losses up to fp16 rounding, and the same gradient norm."""
    single = make_trainer(tmp_path / "fp32", steps=5)
    half = make_trainer(tmp_path / "fp16", steps=5)
    half.model.compute_dtype = torch.float16
    half.loss_scale = LossScale(torch.float16)
    for _ in range(5):
        expected, got = single.train_step(), half.train_step()
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-2)


def test_fp16_overflow_skips_the_step_for_all_optimizers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=5)
    trainer.model.compute_dtype = torch.float16
    trainer.loss_scale = LossScale(torch.float16)
    trainer.loss_scale.scale = 2.0**40
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.train_step()
    assert trainer.loss_scale.scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_give_the_conventional_exit_code(tmp_path: Path, number: int, code: int) -> None:
    class Signalling(RandomSource):
        def micro_batches(self, step: int, share: Share) -> list:
            if step == 5:
                os.kill(os.getpid(), number)
            return super().micro_batches(step, share)

    trainer = make_trainer(tmp_path)
    trainer.source = Signalling()
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    assert caught.value.code == code
    again = make_trainer(tmp_path)
    again.resume()
    assert again.state.step == 6, "the step in which the signal came is finished and saved"
    again.fit()
    straight = make_trainer(tmp_path / "straight")
    straight.fit()
    for left, right in zip(again.parameters, straight.parameters, strict=True):
        assert torch.equal(left, right)


def test_a_second_ctrl_c_does_not_wait() -> None:
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_metrics_log_survives_a_cut_line_and_rewinds(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1.5})
    log.append({"step": 3, "validation_loss": math.nan})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert log.read()[-1] == {"step": 3, "validation_loss": None}
    log.rewind(3)
    assert log.read() == [{"step": s, "loss": 1.5} for s in (1, 2, 3)]
    log.rewind(2)
    assert [r["step"] for r in log.read()] == [1, 2]


def test_a_log_of_what_a_model_said_has_a_line_for_each_record(tmp_path: Path) -> None:
    """Some signs end a line of text and not one of a file: what stood behind such a sample was lost at a rewind."""
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    records = [{"step": step, "sample": "one\u2028two\x85three\r\n池"} for step in (1, 2)]
    for record in records:
        log.append(record)
    assert log.read() == records
    with open(log.path, "ab") as file:
        file.write('{"step": 3, "sample": "池'.encode()[:-1])  # cut within a character
    assert log.read() == records


def test_a_follower_reads_what_is_added_and_begins_again_after_a_rewind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    follower = LogFollower(log.path)
    assert follower.read() == []
    log.append({"step": 1, "loss": 1.5})
    assert (follower.read(), follower.from_start) == ([{"step": 1, "loss": 1.5}], True)
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')  # half a line is no line yet
    assert (follower.read(), follower.from_start) == ([], False)
    with open(log.path, "a") as file:
        file.write('ss": 0.5}\n')
    assert (follower.read(), follower.from_start) == ([{"step": 2, "loss": 0.5}], False)
    log.rewind(1)
    log.append({"step": 2, "loss": 0.25})  # as long as before: only the file is another
    log.append({"step": 3, "loss": 0.125})
    assert ([r["loss"] for r in follower.read()], follower.from_start) == ([1.5, 0.25, 0.125], True)
    assert (follower.read(), follower.from_start) == ([], False)
    log.path.unlink()
    assert (follower.read(), follower.from_start) == ([], True), "what was read before is gone"
    log.append({"step": 1, "loss": 1.5})
    assert ([r["step"] for r in follower.read()], follower.from_start) == ([1], True)


def test_a_folder_that_cannot_be_locked_is_in_nobodys_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    FolderLock(tmp_path).take()


def test_overwriting_a_run_leaves_alone_what_it_links_to(tmp_path: Path) -> None:
    """It ended in the middle, with config.yaml gone perhaps, and then the folder was no run any more."""
    run, elsewhere = tmp_path / "run", tmp_path / "large disk"
    for folder in (run, elsewhere):
        folder.mkdir()
    (run / "config.yaml").touch()
    (elsewhere / "kept").touch()
    (run / "checkpoints").symlink_to(elsewhere)
    RunFolder(run).clear("config.yaml")
    assert not list(run.iterdir())
    assert (elsewhere / "kept").exists()


def test_random_numbers_of_apples_gpus_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on one draws from its own generator: a resumed run with dropout was another run."""
    there = [torch.arange(8, dtype=torch.uint8)]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: there[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: there.append(state))
    set_random_state(random_state())
    assert torch.equal(there[0], there[1])


def test_a_run_on_the_cpu_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read a GPU's generator begins to use the GPU, half a gigabyte of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("the GPU was asked"))
    assert set(random_state()) == {"cpu"}


def test_validation_needs_no_float64_of_the_device(tmp_path: Path) -> None:
    """Apple's GPUs have none: training on one ended at its first validation."""
    trainer, batches, token_bytes = make_trainer(tmp_path), [masked_batch(7)], np.ones(64, np.int32)
    expected = validate(trainer.model, batches, token_bytes, torch.device("cpu"))
    with WithoutFloat64():
        assert validate(trainer.model, batches, token_bytes, torch.device("cpu")) == expected


def test_validation_equals_a_naive_loop(tmp_path: Path) -> None:
    """The weights weigh in the loss; bits per byte count every supervised token as one."""
    trainer = make_trainer(tmp_path)
    batch = masked_batch(7)
    batch = replace(batch, weights_BT=batch.weights_BT * torch.linspace(0.2, 1.0, 32))
    token_bytes = torch.tensor([i % 4 for i in range(64)], dtype=torch.int32)  # ids 0, 4, 8 ... stand for no text
    result = validate(trainer.model, [batch], token_bytes.numpy(), torch.device("cpu"))
    nats = weight = text_nats = text_bytes = 0.0
    from minnow.model.attention import CausalAttention

    with torch.no_grad():
        logits = trainer.model.logits(trainer.model(batch.tokens_BT, batch.positions_BT, CausalAttention()))
    for row in range(8):
        for place in range(32):
            w, target = float(batch.weights_BT[row, place]), int(batch.targets_BT[row, place])
            nll = -float(F.log_softmax(logits[row, place].double(), -1)[target])
            nats, weight = nats + w * nll, weight + w
            if w and target % 4:
                text_nats, text_bytes = text_nats + nll, text_bytes + target % 4
    assert result.loss == pytest.approx(nats / weight, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(text_nats / text_bytes / math.log(2), rel=1e-6)


def test_a_target_counts_as_much_as_its_weight_says() -> None:
    """Two batches that share out the weights of a third have its loss and its count together."""
    batch = masked_batch(7)
    share_BT = torch.rand(batch.weights_BT.shape, generator=torch.Generator().manual_seed(0))
    parts = [replace(batch, weights_BT=batch.weights_BT * share) for share in (share_BT, 1 - share_BT)]
    teacher = CausalLM(SHAPE, seed=2)
    for objective in (LanguageModeling(), Distillation(DistillationLossConfig(), teacher, SHAPE.vocab_size)):
        one, other, whole = (float(objective(CausalLM(SHAPE), each).loss_sum.detach()) for each in (*parts, batch))
        assert one + other == pytest.approx(whole, rel=1e-5)
        assert sum(map(objective.count, parts)) == pytest.approx(float(batch.weights_BT.sum()), rel=1e-5)


def test_choosing_device_and_precision() -> None:
    cpu = choose_device("cpu")
    assert choose_precision("fp16", cpu) == torch.float16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            choose_device("cuda")
    assert matmul_peak(cpu, torch.float32) > 1e9


def test_auto_slices_a_model_whose_training_needs_half_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight, gradient and two averages of 4 bytes each; over several hosts a sliced copy on each."""
    model = CausalLM(SHAPE)
    needed = 16 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(parallel, "world_size", lambda: 4)

    def chosen(memory: int, processes_here: int) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        monkeypatch.setattr(parallel, "local_world_size", lambda: processes_here)
        return choose_parallel("auto", model, torch.device("cuda"))

    assert [chosen(2 * needed + 2, here) for here in (4, 2)] == ["ddp", "ddp"]
    assert [chosen(2 * needed, here) for here in (4, 2)] == ["fsdp", "hsdp"]
    assert choose_parallel("auto", model, torch.device("cpu")) == "ddp"
    assert choose_parallel("hsdp", model, torch.device("cpu")) == "hsdp"
    with pytest.raises(UserError, match="--device mps: one process can use it"):
        choose_parallel("auto", model, torch.device("mps"))
    quantize(model)
    assert chosen(2 * needed, 4) == "ddp", "int8 weights are not sliced"
    with pytest.raises(UserError, match="--training.parallel hsdp: int8 weights are not sliced"):
        choose_parallel("hsdp", model, torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("clip_norm", -1.0),
        ("clip_norm", float("nan")),
        ("patience", -1),
        ("validate_every", -1),
        ("save_every", -1),
        ("restarts", -1),
        ("z_loss", -1e-4),
        ("validation_tokens", 0),
        ("batch_tokens", 0),
        ("log_every", 0),
        ("keep_last", 0),
        ("nproc", 0),
        ("stall_seconds", -1.0),
        ("steps", 0),
        ("epochs", math.inf),
        ("epochs", math.nan),
    ],
)
def test_settings_that_would_silently_spoil_a_run_are_refused(name: str, value: float) -> None:
    """A clip_norm of -1 turned every gradient round; patience -1 stopped at the first validation."""
    with pytest.raises(UserError, match=rf"training\.{name} is {value}: "):
        TrainingConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="patience is 3, but with training.validate_every 0"):
        TrainingConfig(patience=3, validate_every=0)
    TrainingConfig(clip_norm=0.0, patience=0, validate_every=0, save_every=0, z_loss=0.0, validation_tokens=1)
    TrainingConfig(batch_tokens=1, log_every=1, keep_last=1, nproc=1, stall_seconds=0.0, steps=1)


def test_no_z_loss_is_not_the_default_z_loss() -> None:
    assert TrainingConfig().chosen_z_loss == 1e-4
    assert TrainingConfig(z_loss=0.0).chosen_z_loss == 0.0


def test_the_peak_of_a_cpu_that_emulates_a_format_does_not_take_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    clock = [0.0]

    def slow(a: torch.Tensor, b: torch.Tensor) -> None:
        sizes.append(len(a))
        clock[0] += 2 * len(a) ** 3 / 2e8  # 0.2 GFLOP/s: 2048 takes 86 seconds

    monkeypatch.setattr("minnow.training.hardware.torch.mm", slow)
    monkeypatch.setattr("minnow.training.hardware.time.perf_counter", lambda: clock[0])
    assert _cpu_matmul_peak(torch.float16) == pytest.approx(2e8)
    assert set(sizes) == {256}
    assert clock[0] < 1.5


def test_measuring_the_peak_draws_nothing_that_dropout_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured after a resume has put the generator back, and once a process."""
    monkeypatch.setattr("minnow.training.hardware.LARGEST_CPU_PRODUCT", 256)
    _matmul_peak.cache_clear()
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32) > 0
    _matmul_peak.cache_clear()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_may_go_on_compiled_or_not(tmp_path: Path) -> None:
    """`auto` measures the machine: which it was must not bind the rest of a run, nor a default that has changed."""

    @dataclass(frozen=True)
    class Config:
        training: TrainingConfig

    before, now = (Config(TrainingConfig(steps=1, compile=compiled)) for compiled in ("off", "auto"))
    folder = RunFolder(tmp_path / "run")
    folder.open(before, overwrite=False)
    folder.open(now, overwrite=False)
    with pytest.raises(UserError, match="training.seed: 0 there, 1 now"):
        folder.open(Config(TrainingConfig(steps=1, seed=1)), overwrite=False)


def test_overwrite_is_for_the_first_start_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts the same words again when a process has died: they deleted what was to be continued."""

    @dataclass(frozen=True)
    class Config:
        training: TrainingConfig

    folder = RunFolder(tmp_path / "run")

    def open_for(start: int, *launchers: str) -> bool:
        """Whether what was trained before is still there."""
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        files = [started_by(monkeypatch, launcher, start) for launcher in launchers]
        monkeypatch.setattr(
            "minnow.training.distribution.gather", lambda mine: [mine.replace(files[-1], f) for f in files]
        )
        folder.open(Config(TrainingConfig()), overwrite=True)
        return (folder.path / "checkpoints").exists()

    folder.open(Config(TrainingConfig()), overwrite=False)
    assert not open_for(1, "a"), "the first start died before it came here: an older run is still to be deleted"
    assert open_for(2, "a")
    assert not open_for(0, "b"), "somebody typed it anew"
    # Two hosts. torchrun counts no restart where one was lost silently and the other only makes room for the next.
    assert not open_for(0, "c", "d")
    assert open_for(0, "c", "e")
    assert open_for(0, "f", "e")
    assert not open_for(0, "c", "d"), "the same words typed on both"


def test_the_operations_of_a_micro_batch_by_hand() -> None:
    """Pieces of 3 and 5 tokens: their queries see 1 + 2 + 3 and 1 + ... + 5 keys, none of the other piece's."""
    model = CausalLM(SHAPE)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert SHAPE.tie_word_embeddings  # then the head is among them, and the embedding costs nothing
    attention = SHAPE.num_hidden_layers * 4 * SHAPE.num_attention_heads * SHAPE.head_dim * (6 + 15)
    batch = SimpleNamespace(cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32), pixels_ICHW=None)
    assert batch_flops(model, batch) == pytest.approx(3 * (2 * matrices * 8 + attention))
    # Beside adapters the matrices have no gradient: the utilisation of such a run was up to half as much again.
    model.requires_grad_(False)
    assert batch_flops(model, batch) == pytest.approx(2 * 2 * matrices * 8 + 3 * attention)


@pytest.mark.parametrize(
    ("setting", "device", "compiler", "seconds", "expected", "said"),
    [
        ("auto", "cpu", True, COMPILE_PAYS_AFTER_SECONDS * 1.1, True, 0),
        ("auto", "cpu", True, COMPILE_PAYS_AFTER_SECONDS * 0.9, False, 0),
        ("on", "cpu", True, 1.0, True, 0),
        ("off", "cpu", True, 1e9, False, 0),
        ("on", "mps", True, 1e9, False, 0),
        ("auto", "cpu", False, 1e9, False, 1),
        ("on", "cpu", False, 1e9, False, 1),
        ("off", "cpu", False, 1e9, False, 0),
        ("on", "cuda", False, 1.0, True, 0),  # its kernels need none
    ],
)
def test_what_is_compiled(
    setting: str,
    device: str,
    compiler: bool,
    seconds: float,
    expected: bool,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is long enough, where there is a compiler; without one a note says so, and the run goes on."""
    monkeypatch.setattr(session, "has_cpp_compiler", lambda: compiler)
    monkeypatch.setattr(session, "matmul_peak", lambda *machine: 1e9)
    notes: list[str] = []
    config = TrainingConfig(compile=setting)  # type: ignore[arg-type]
    operations = seconds * 1e9 * session.ASSUMED_FLOP_UTILISATION
    machine = Machine(torch.device(device), torch.float32)
    assert machine.compiles(config, operations, notes.append) == expected
    assert ["no C++ compiler found" in note for note in notes] == [True] * said
