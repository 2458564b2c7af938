"""What only a CUDA device can show; skipped without one. `make test-gpu` runs these."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minnow.data.batches import Batch, Share
from minnow.engine import Engine, SamplingParams
from minnow.engine.graphs import CudaGraphs, Recordings
from minnow.engine.runner import Runner
from minnow.model.attention import PackedAttention, flash_attention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import linear_cross_entropy
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.tokenizer.train import train_tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.hardware import choose_precision, matmul_peak, precision_name
from minnow.training.micro_batch import find_micro_batch
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch
from minnow.training.session import Machine
from minnow.training.trainer import Trainer
from minnow.transfer import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()


def cuda() -> torch.device:
    return torch.device("cuda")


def half() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


# --- Attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_attention_is_causal_attention_within_documents(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    if flash_attention(cuda(), dtype, head_dim) is None:
        pytest.skip("this device or this torch has no varlen attention")
    lengths = [1, 7, 128, 33, 65, 22]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(1, 256, n, head_dim, device="cuda", dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    for x in (q, k, v):
        x.requires_grad_()
    out = PackedAttention(borders, cuda())(0, q, k, v)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = [[x[:, a:b].transpose(1, 2) for x in exact] for a, b in pairwise(borders.tolist())]
    expected = torch.cat(
        [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True).transpose(1, 2) for part in parts], 1
    )
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    assert relative(out, expected) < 1e-2
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert relative(found, right) < 2e-2


def test_heads_that_flash_attention_does_not_take_fall_back() -> None:
    assert flash_attention(cuda(), torch.float32, 64) is None
    assert flash_attention(cuda(), torch.bfloat16, 20) is None
    borders = torch.tensor([0, 5, 16], dtype=torch.int32)
    q, k, v = (torch.randn(1, 16, 2, 20, device="cuda", dtype=torch.float16) for _ in range(3))
    assert relative(PackedAttention(borders, cuda())(0, q, k, v), PackedAttention(borders)(0, *(
        x.float().cpu() for x in (q, k, v)
    ))) < 1e-2  # fmt: skip


# --- Training -------------------------------------------------------------------------------------


class Batches:
    """The same batch in every step."""

    def __init__(self, batch: Batch, pieces: int = 2) -> None:
        self.batch, self.pieces = batch, pieces

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        return [self.batch] * self.pieces


def make_trainer(
    folder: Path, precision: str, compile: str = "off", shape: ModelConfig = SHAPE, **more: object
) -> Trainer:
    config = TrainingConfig(device="cuda", precision=precision, compile=compile, **more)  # type: ignore[arg-type]
    model = Machine.choose(config).place(CausalLM(shape, seed=1), config, 0.0, lambda text: None)
    return Trainer(
        config,
        folder=folder,
        title="test",
        model=model,
        optimizers=build_optimizers(model, OptimConfig(), tokens_per_batch=512),
        schedule=ScheduleConfig(warmup_steps=2),
        objective=LanguageModeling(z_loss=1e-4),
        source=Batches(random_batch(shape.vocab_size, 8, 64)),
        total_steps=30,
    )


def reference_losses(steps: int) -> list[float]:
    model = CausalLM(SHAPE, seed=1)
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    trainer: Trainer = Trainer(
        TrainingConfig(device="cpu", precision="fp32"), folder=Path("unused"), title="test", model=model,
        optimizers=optimizers, schedule=ScheduleConfig(warmup_steps=2), objective=LanguageModeling(z_loss=1e-4),
        source=Batches(random_batch(SHAPE.vocab_size, 8, 64)), total_steps=30,
    )  # fmt: skip
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize(
    ("precision", "compile", "bar"),
    [("fp32", "off", 1e-3), ("bf16", "off", 2e-2), ("bf16", "on", 2e-2), ("fp16", "off", 2e-2), ("tf32", "off", 1e-2)],
)
def test_training_steps_are_those_of_the_cpu(
    precision: str, compile: str, bar: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision in ("bf16", "tf32") and half() != torch.bfloat16:
        pytest.skip("not on this device")
    monkeypatch.chdir(tmp_path)
    expected = reference_losses(6)
    trainer = make_trainer(tmp_path, precision, compile)
    found = [trainer.train_step()["loss"] for _ in range(6)]
    assert found == pytest.approx(expected, rel=bar)
    assert found[-1] < found[0]


def test_the_fp16_scaler_halves_on_overflow_and_the_weights_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "fp16")
    trainer.loss_scale.scale = 2.0**40  # every gradient overflows
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert trainer.loss_scale.scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    while trainer.loss_scale.scale > 2.0**16:
        trainer.train_step()
    trainer.train_step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_adamw_is_fused_and_its_state_is_on_the_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "fp32")
    trainer.train_step()
    adamw = next(o for o in trainer.optimizers if isinstance(o, torch.optim.AdamW))
    assert all(group["fused"] for group in adamw.param_groups)
    assert all(value.is_cuda for state in adamw.state.values() for value in state.values())


def test_nothing_in_a_micro_batch_waits_for_the_device(tmp_path: Path) -> None:
    """A wait stops the host from launching ahead. The loss and the norm are read once a step, after the last one."""
    trainer = make_trainer(tmp_path, "bf16" if half() == torch.bfloat16 else "fp16")
    trainer.train_step()
    batch = trainer.source.micro_batches(0, Share())[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = trainer.objective(trainer.model, batch.to(cuda()))
        output.loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_of_a_gpus_size_give_the_loss_of_small_ones(compiled: bool) -> None:
    hidden, head = torch.randn(700, 64, device="cuda"), torch.randn(512, 64, device="cuda")
    targets, weights = torch.randint(512, (700,), device="cuda"), torch.rand(700, device="cuda")
    results = []
    for chunk in (None, 64):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, weights, z_loss=1e-3, chunk_size=chunk, compiled=compiled)
        loss.loss_sum.backward()
        results.append((loss.loss_sum.detach(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-4


def test_tf32_is_said_in_one_place() -> None:
    if half() != torch.bfloat16:
        pytest.skip("no TF32 on this device")
    assert choose_precision("fp32", cuda()) == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32
    exact = matmul_peak(cuda(), torch.float32)
    assert choose_precision("tf32", cuda()) == torch.float32
    assert precision_name(torch.float32) == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32
    assert matmul_peak(cuda(), torch.float32) > 2 * exact


def test_a_pinned_copy_arrives_whole() -> None:
    numbers = torch.arange(1_000_000)
    copies = [to_device(numbers + i, cuda()) for i in range(20)]  # each page-locked copy is let go at once
    assert all(torch.equal(copy.cpu(), numbers + i) for i, copy in enumerate(copies))


# --- Memory ---------------------------------------------------------------------------------------


class RandomRows:
    window_rows: tuple[int, ...] = (64,)

    def batch(self, row_indices: object) -> Batch:
        return random_batch(SHAPE.vocab_size, len(row_indices), 256)  # type: ignore[arg-type]


def test_the_largest_micro_batch_fits_and_a_much_larger_one_does_not(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "bf16" if half() == torch.bfloat16 else "fp16")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    limit = used + 2**30
    torch.cuda.set_per_process_memory_fraction(limit / total)
    free = torch.cuda.mem_get_info
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**30, free()[1]))
            arguments = (trainer.model, trainer.optimizers, trainer.objective, RandomRows(), 4096, cuda())
            found = find_micro_batch(*arguments)
        assert 1 < found < 4096
        trainer.source = Batches(RandomRows().batch(range(found)))
        trainer.train_step()
        trainer.source = Batches(RandomRows().batch(range(4 * found)))
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train_step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- Decoding -------------------------------------------------------------------------------------


def answers(model: CausalLM, *, recorded: bool, frozen: bool, temperature: float = 0.0) -> list[list[int]]:
    engine = Engine(model, train_tokenizer(["minnow"] * 3, 288), frozen=frozen, memory_share=0.05, max_rows=13)
    if not recorded:
        engine._parts().runner._recordings = Recordings(None)
    prompts = torch.randint(3, 512, (9, 20), generator=torch.Generator().manual_seed(3)).tolist()
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=10 + 9 * i, ignore_eos=True) for i in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that could not be recorded warns
        return [
            output.completions[0].ids for output in engine.generate([p[: 3 + i] for i, p in enumerate(prompts)], params)
        ]


def loud_model() -> CausalLM:
    """No two tokens nearly alike, so that rounding decides nothing."""
    model = CausalLM(SHAPE, seed=4).to("cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_decoding_gives_the_tokens_of_plain_decoding(frozen: bool, temperature: float) -> None:
    model = loud_model()
    plain = answers(model, recorded=False, frozen=frozen, temperature=temperature)
    assert answers(model, recorded=True, frozen=frozen, temperature=temperature) == plain
    cpu = answers(copy.deepcopy(model).cpu(), recorded=False, frozen=frozen, temperature=temperature)
    assert plain == cpu, "float32 on the device and on the CPU differ"


def test_decoding_in_half_precision_is_recorded_too() -> None:
    model = loud_model()
    model.compute_dtype = half()
    plain = answers(model, recorded=False, frozen=True)
    found = answers(model, recorded=True, frozen=True)
    same = sum(a == b for a, b in zip(found, plain, strict=True))
    assert same >= 8, "padding to a recorded size may turn a tie, not more"


def test_new_weights_are_seen_by_recorded_steps() -> None:
    model, other = loud_model(), loud_model()
    engine = Engine(model, train_tokenizer(["minnow"] * 3, 288), memory_share=0.05)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.generate([[5, 6, 7]], params)
    with torch.no_grad():
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.copy_(b.neg() if b.ndim > 1 else b)
    engine.weights_updated()
    fresh = Engine(copy.deepcopy(model), train_tokenizer(["minnow"] * 3, 288), memory_share=0.05)
    assert engine.generate([[5, 6, 7]], params)[0].completions[0].ids == (
        fresh.generate([[5, 6, 7]], params)[0].completions[0].ids
    )


def test_a_function_that_waits_is_refused_before_it_is_recorded() -> None:
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        CudaGraphs()(lambda: x * x.sum().item())
    torch.randn(3, device="cuda")  # the generator still works
    replay, result = CudaGraphs()(lambda: x * 2)
    x.fill_(3.0)
    replay()
    assert result.tolist() == [6.0] * 4


def test_recordings_share_their_memory() -> None:
    model = loud_model()
    engine = Engine(model, train_tokenizer(["minnow"] * 3, 288), memory_share=0.05, frozen=True)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for rows in (16, 1, 8, 4, 2):
        engine.generate([[5 + row] for row in range(rows)], params)
    runner = engine._parts().runner
    assert len(runner._recordings._recorded) >= 5
    if isinstance(runner, Runner):
        assert runner._inputs_B3.is_cuda


def test_the_window_of_a_long_context_keeps_within_its_share() -> None:
    shape = replace(SHAPE, max_position_embeddings=32_768)
    model = CausalLM(shape, seed=1).to("cuda")
    torch.cuda.empty_cache()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    Engine(model, train_tokenizer(["minnow"] * 3, 288), memory_share=0.1)._parts()
    assert torch.cuda.memory_allocated() - before < 0.15 * free
