"""The sections of the GPU check (gpu.py): each yields rows of the table, one as soon as it is known."""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minnow.data.batches import Batch, Share
from minnow.engine import Engine, SamplingParams
from minnow.engine.cache import bytes_per_token
from minnow.model.attention import CausalAttention, PackedAttention
from minnow.model.config import ModelConfig
from minnow.model.presets import preset
from minnow.model.pretrained import save_pretrained
from minnow.model.size import parameter_count
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.out_of_memory import is_out_of_memory
from minnow.tokenizer.train import train_tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.hardware import device_name, matmul_peak, peak_memory_bytes, synchronize
from minnow.training.micro_batch import find_micro_batch
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch
from minnow.training.session import Machine
from minnow.training.trainer import Trainer

ONE_BILLION = ModelConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
MFU_BARS = {"26m": 0.28, "104m": 0.40}
RECIPE_TOKENS, RECIPE_SECONDS = 330_000_000, 8 * 60


@dataclass(frozen=True)
class Options:
    device: torch.device
    tiny: bool = False
    full: bool = False
    traceback: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What training and decoding compute in."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def precision(self) -> Any:
        return "fp32" if self.dtype == torch.float32 else "bf16"

    def shapes(self, *names: str) -> dict[str, ModelConfig]:
        """The presets of these names for rows of 1024 tokens; with `tiny` one small shape instead of all."""
        if self.tiny:
            return {"tiny": TINY}
        shapes = {name: ONE_BILLION if name == "1b" else preset(name) for name in names}
        return {name: replace(shape, max_position_embeddings=1024) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    shown: str
    figure: float | None = None
    unit: str = ""
    good: bool | None = None
    """Whether a bar is met; None for a figure without one."""


# --- Machine --------------------------------------------------------------------------------------


def machine(options: Options) -> Iterator[Row]:
    yield Row("machine", "device", f"{device_name(options.device)}, torch {torch.__version__}")
    peak = matmul_peak(options.device, options.dtype)
    yield Row("machine", f"{options.precision} product peak", f"{peak / 1e12:.2f} TFLOP/s", peak, "FLOP/s")
    bandwidth = copy_bandwidth(options)
    yield Row("machine", "copy, read and written", f"{bandwidth / 1e9:,.0f} GB/s", bandwidth, "B/s")


def copy_bandwidth(options: Options) -> float:
    """Bytes read and written a second, the fastest of five copies."""
    source = torch.ones(2**31 if options.device.type == "cuda" else 2**26, dtype=torch.uint8, device=options.device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        synchronize(options.device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(options.device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


# --- Correctness ----------------------------------------------------------------------------------


def correctness(options: Options) -> Iterator[Row]:
    """Against float32 on the CPU, which the tests compare with transformers."""
    (shape,) = options.shapes("26m").values()
    shape = replace(shape, num_hidden_layers=2)
    reference = CausalLM(shape, seed=1)
    batch = documents_batch(shape.vocab_size, rows=2, length=64 if options.tiny else 512)
    expected = logits_loss_gradients(reference, batch)
    for dtype, bars in ((torch.float32, (1e-4, 1e-5, 1e-3)), (torch.bfloat16, (3e-2, 5e-3, 6e-2))):
        model = copy.deepcopy(reference).to(options.device)
        model.compute_dtype = dtype
        found = logits_loss_gradients(model, batch.to(options.device))
        name = str(dtype).removeprefix("torch.")
        for what, bar, a, b in zip(("logits", "loss", "gradients"), bars, found, expected, strict=True):
            yield compared(f"{name} {what}, device against CPU", distance(a, b), bar)
        packed, single = found[1:], alone(model, batch, options.device)
        bars = (1e-5, 1e-4) if dtype == torch.float32 else (2e-3, 3e-2)
        for what, bar, a, b in zip(("loss", "gradients"), bars, packed, single, strict=True):
            yield compared(f"{name} {what}, packed against alone", distance(a, b), bar)
    yield from engine_rows(reference, options)


def compared(what: str, error: float, bar: float) -> Row:
    return Row("correctness", what, f"{error:.1e} relative (bar {bar:.0e})", error, "", error <= bar)


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, L2 norms in float64."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def documents_batch(vocab_size: int, rows: int, length: int) -> Batch:
    """Rows of random tokens, each cut into documents of random lengths."""
    batch, random = random_batch(vocab_size, rows, length, seed=3), np.random.default_rng(5)
    cuts = [row * length + np.sort(random.choice(np.arange(1, length), 4, replace=False)) for row in range(rows)]
    borders = np.concatenate([[0], *(np.append(cut, (row + 1) * length) for row, cut in enumerate(cuts))])
    positions = np.concatenate([np.arange(n) for n in np.diff(borders)])
    return replace(
        batch,
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        positions_BT=torch.from_numpy(positions).view(rows, length),
    )


def logits_loss_gradients(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        attention = PackedAttention(batch.cu_seqlens, batch.tokens_BT.device)
        logits = model.logits(model(batch.tokens_BT, batch.positions_BT, attention))
    loss = LanguageModeling()(model, batch).loss_sum
    loss.backward()
    return logits, loss.detach(), take_gradients(model)


def alone(model: CausalLM, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and gradients where each document is a row of its own."""
    total = torch.zeros((), device=device)
    borders = batch.cu_seqlens.tolist()
    for start, end in pairwise(borders):
        piece = random_batch(model.config.vocab_size, 1, end - start)
        tokens, targets = (x.flatten()[start:end][None] for x in (batch.tokens_BT, batch.targets_BT))
        loss = LanguageModeling()(model, replace(piece, tokens_BT=tokens, targets_BT=targets).to(device)).loss_sum
        loss.backward()
        total += loss.detach()
    return total, take_gradients(model)


def take_gradients(model: CausalLM) -> Tensor:
    gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradients


def engine_rows(reference: CausalLM, options: Options) -> Iterator[Row]:
    model = copy.deepcopy(reference).to(options.device)
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights: no two tokens are equally likely
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    prompts = torch.randint(3, model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(7)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    ours = greedy(model, prompts, params)
    theirs = transformers_greedy(model, prompts, 24, options.device)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    yield Row("correctness", "fp32 greedy answers as transformers'", f"{same} of 4", same, "", same == 4)
    model.compute_dtype = torch.bfloat16
    gaps = []
    for prompt, answer in zip(prompts, greedy(model, prompts, params), strict=True):
        tokens = torch.tensor([prompt + answer], device=options.device)
        positions = torch.arange(tokens.shape[1], device=options.device)[None]
        with torch.no_grad():
            logits = model.logits(model(tokens, positions, CausalAttention()))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        gaps.append((logits.amax(-1) - chosen) / logits.std(-1))
    worst = float(torch.cat(gaps).max())
    shown = f"{worst:.2f} sigma at most (bar 0.1)"
    yield Row("correctness", "bf16 answers below the likeliest", shown, worst, "", worst < 0.1)


def greedy(model: CausalLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    engine = Engine(model, train_tokenizer(["minnow"] * 3, 288))
    return [output.completions[0].ids for output in engine.generate(prompts, params)]


def transformers_greedy(
    model: CausalLM, prompts: list[list[int]], new_tokens: int, device: torch.device
) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).to(device)
    ids = torch.tensor(prompts, device=device)
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    seen = torch.ones_like(ids)
    out = theirs.generate(ids, attention_mask=seen, do_sample=False, eos_token_id=None, pad_token_id=0, **lengths)
    return out[:, ids.shape[1] :].tolist()


# --- Training -------------------------------------------------------------------------------------


@dataclass
class FullRows:
    """The same full rows of random tokens in every step, cut into micro-batches."""

    parts: list[Batch]

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        return self.parts


def training(options: Options) -> Iterator[Row]:
    """Steps as a run takes them, optimizer and clipping included, on full rows of one document."""
    for name, shape in options.shapes("26m", "64m", "104m", "1b").items():
        trainer = make_trainer(shape, options)
        for compiled in (False, True):
            if compiled and options.tiny:
                continue  # takes a minute, and the same code
            if compiled:
                trainer.model.compile_backbone()
            rows = fit(trainer, options)
            seconds, figures = timed_steps(trainer, options, warm=3, steps=6)
            memory = peak_memory_bytes(options.device)
            label = f"{name} {'compiled' if compiled else 'eager'}"
            speed = figures["tokens"] / seconds
            mfu = figures["flops"] / seconds / matmul_peak(options.device, options.dtype)
            bar = MFU_BARS.get(name) if compiled and options.device.type == "cuda" else None
            yield Row("training", f"{label}, tokens/s", f"{speed:,.0f}", speed, "tokens/s")
            shown = f"{mfu:.1%}" + (f" (bar {bar:.0%})" if bar else "")
            yield Row("training", f"{label}, MFU", shown, mfu, "", None if bar is None else mfu >= bar)
            yield Row("training", f"{label}, peak memory", f"{memory / 1e9:.1f} GB, {rows} rows at once", memory, "B")
        del trainer
        gc.collect()
        torch._dynamo.reset()


def fit(trainer: Trainer, options: Options) -> int:
    """Give `trainer` global batches of 65,536 tokens, in the largest micro-batches that a first step survives; their
    rows."""
    rows, length = (4, 32) if options.tiny else (64, 1024)
    at_once = rows
    while True:
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        vocab_size = trainer.model.config.vocab_size
        trainer.source = FullRows([random_batch(vocab_size, at_once, length, seed=i) for i in range(rows // at_once)])
        try:
            trainer.train_step()
            return at_once
        except RuntimeError as error:
            if not is_out_of_memory(error) or at_once == 1:
                raise
        at_once //= 2
        trainer.model.zero_grad(set_to_none=True)
        torch._dynamo.reset()  # a second size would be compiled for sizes of all kinds, which is slower code
        gc.collect()


def make_trainer(shape: ModelConfig, options: Options, *, compiled: bool = False) -> Trainer:
    """A trainer without rows to learn from yet."""
    config = TrainingConfig(
        device=options.device.type, precision=options.precision, compile="on" if compiled else "off", z_loss=0.0
    )  # type: ignore[arg-type]
    model = Machine.choose(config).place(CausalLM(shape, seed=1), config, 0.0, lambda text: None)
    return Trainer(
        config,
        folder=Path(tempfile.mkdtemp(prefix="minnow-gpu-")),
        title="gpu",
        model=model,
        optimizers=build_optimizers(model, OptimConfig(), tokens_per_batch=65_536),
        schedule=ScheduleConfig(),
        objective=LanguageModeling(),
        source=FullRows([]),
        total_steps=1000,
    )


def timed_steps(trainer: Trainer, options: Options, *, warm: int, steps: int) -> tuple[float, dict[str, float]]:
    """Median seconds of a step, and the last step's figures with its tokens."""
    warm, steps = (1, 2) if options.tiny else (warm, steps)
    seconds = []
    for _ in range(warm + steps):
        before = trainer.state.tokens
        synchronize(options.device)
        start = time.perf_counter()
        figures = trainer.train_step()
        synchronize(options.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm:]), figures | {"tokens": trainer.state.tokens - before}


# --- Memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomRows:
    """Rows of random tokens for the search for the largest micro-batch."""

    vocab_size: int
    length: int
    window_rows: tuple[int, ...] = (4096,)

    def batch(self, row_indices: Any) -> Batch:
        return random_batch(self.vocab_size, len(row_indices), self.length)


def memory(options: Options) -> Iterator[Row]:
    """What `--training.micro_batch_tokens auto` finds, and that a step of that size then fits, compiled or not."""
    if options.device.type != "cuda":
        yield Row("memory", "largest micro-batch", "looked for on CUDA only")
        return
    for name, shape in options.shapes("26m", "1b").items():
        trainer = make_trainer(shape, options)
        rows = RandomRows(shape.vocab_size, 1024)
        start = time.perf_counter()
        objective = LanguageModeling()
        found = find_micro_batch(trainer.model, trainer.optimizers, objective, rows, 512, options.device)
        seconds = time.perf_counter() - start
        shown = f"{found * 1024:,} tokens, found in {seconds:.0f} s"
        yield Row("memory", f"{name}, most at once", shown, found * 1024, "tokens")
        trainer.source = FullRows([rows.batch(range(found))] * 2)
        torch.cuda.reset_peak_memory_stats()
        trainer.train_step()
        share = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
        yield Row("memory", f"{name}, a step of it", f"{share:.0%} of the memory", share, "", share < 1.0)
        del trainer
        gc.collect()
        torch.cuda.empty_cache()


# --- Decoding -------------------------------------------------------------------------------------


def decoding(options: Options) -> Iterator[Row]:
    """Tokens a second after the prompts, of the frozen engine as `minnow serve` runs it; steps recorded on CUDA."""
    bandwidth = copy_bandwidth(options)
    prompt, new = (8, 6) if options.tiny else (64, 192)
    for name, shape in options.shapes("26m", "104m", "1b").items():
        model = CausalLM(shape).to(options.device, options.dtype)
        model.compute_dtype = options.dtype
        weights = parameter_count(shape) * options.dtype.itemsize
        for streams in (1, 2) if options.tiny else (1, 32, 256):
            engine = Engine(model, train_tokenizer(["minnow"] * 3, 288), frozen=True)
            seconds = decode_seconds(engine, shape.vocab_size, streams, prompt, new, options)
            speed = streams * new / seconds
            cache = streams * (prompt + new / 2) * bytes_per_token(shape, options.dtype)
            share = (weights + cache) * new / seconds / bandwidth
            shown = f"{speed:,.0f} tokens/s, {share:.0%} of the bandwidth"
            yield Row("decoding", f"{name}, {streams} at once", shown, speed, "tokens/s")
            yield Row("decoding", f"{name}, {streams} at once, bandwidth", f"{share:.1%}", share)
            del engine
            gc.collect()


def decode_seconds(engine: Engine, vocab_size: int, streams: int, prompt: int, new: int, options: Options) -> float:
    """Time of `new` tokens after the first: the difference of two runs, so that reading the prompts goes out."""

    def run(tokens: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(3, vocab_size, (streams, prompt), generator=generator).tolist()
        synchronize(options.device)
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
        synchronize(options.device)
        return time.perf_counter() - start

    run(new + 1, 0)  # records the steps
    return max(1e-9, min(run(new + 1, seed) for seed in (1, 2)) - min(run(1, seed) for seed in (3, 4)))


# --- Recipe ---------------------------------------------------------------------------------------


def recipe(options: Options) -> Iterator[Row]:
    """minimind's pretraining, 0.33 B tokens through 64M parameters, in packed rows of 1024 tokens."""
    (shape,) = options.shapes("64m").values()
    trainer = make_trainer(shape, options, compiled=not options.tiny)
    fit(trainer, options)
    seconds, figures = timed_steps(trainer, options, warm=5, steps=20)
    steps = -(-RECIPE_TOKENS // int(figures["tokens"]))
    whole = steps * seconds
    good = whole < RECIPE_SECONDS if options.device.type == "cuda" else None
    shown = f"{whole / 60:.1f} minutes (bar {RECIPE_SECONDS / 60:.0f})"
    yield Row("recipe", "0.33 B tokens, extrapolated from 20 steps", shown, whole, "s", good)
    if options.full:
        start = time.perf_counter()
        for _ in range(3 if options.tiny else steps):
            trainer.train_step()
        synchronize(options.device)
        whole = time.perf_counter() - start
        good = whole < RECIPE_SECONDS if options.device.type == "cuda" else None
        yield Row("recipe", "0.33 B tokens, all trained", f"{whole / 60:.1f} minutes", whole, "s", good)
