"""`minnow bench generate`: tokens a second of minnow's engine and of transformers' `generate`, side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from minnow.config import UserError
from minnow.console import plain_console
from minnow.disk import atomic_write
from minnow.engine import Engine, SamplingParams
from minnow.model.config import ModelConfig
from minnow.model.hf_config import to_hf_config
from minnow.model.size import active_parameter_count
from minnow.model.transformer import CausalLM
from minnow.stages.bench_train import time_in_turns
from minnow.tokenizer.train import train_tokenizer
from minnow.training.hardware import (
    DeviceName,
    Precision,
    choose_device,
    choose_precision,
    has_cpp_compiler,
    synchronize,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time greedy generation from random weights, prompts and answers of fixed length; the contestants take turns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; by default the 26M shape."""
    streams: tuple[int, ...] = (1, 32)
    """How many prompts are answered at once."""
    prompt_tokens: int = 64
    """Tokens in a prompt."""
    new_tokens: tuple[int, ...] = (256, 128)
    """Tokens in an answer, one number for each of `streams`."""
    rounds: int = 5
    """Timed runs of each contestant; they take turns, so that a slow minute hits all alike."""
    compile: bool = True
    """Compile minnow's decode step, and let transformers compile its own (minutes, which are not timed); off without a
    C++ compiler."""
    device: DeviceName = "auto"
    """auto takes CUDA, else MPS, else the CPU."""
    precision: Precision = "auto"
    """Number format of both contestants; auto is bf16 where the hardware is faster in it."""
    json: str | None = None
    """Write the figures to this file as well."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.prompt_tokens, *self.streams, *self.new_tokens) < 1:
            raise UserError("--rounds, --streams, --prompt_tokens and --new_tokens must be at least 1")


Generate = Callable[[list[list[int]], int], None]
"""Continue prompts by so many tokens."""


def run(config: Config) -> None:
    """Print tokens/s, ratios, and how near one stream comes to reading the weights as fast as memory gives them."""
    console = plain_console()
    if len(config.new_tokens) != len(config.streams):
        raise UserError(f"--new_tokens has {len(config.new_tokens)} numbers for {len(config.streams)} --streams")
    longest = config.prompt_tokens + max(config.new_tokens)
    shape = replace(config.model, max_position_embeddings=max(config.model.max_position_embeddings, longest))
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    compiles = config.compile and (device.type == "cuda" or (device.type == "cpu" and has_cpp_compiler()))
    # On CUDA the engine records its steps, and a step with routers is none to compile.
    compiled = compiles and device.type == "cpu" and shape.experts is None
    model = CausalLM(shape).to(device, dtype)
    model.compute_dtype = dtype
    contestants = {"minnow": minnow_generate(model, compiled), "transformers": transformers_generate(model)}
    if compiles:
        contestants["transformers_compiled"] = transformers_generate(model, compiled=True)
    speeds: dict[str, dict[str, float]] = {name: {} for name in contestants}
    columns = ("at once", "contestant", "tokens/s", "slowest to fastest", "minnow is")
    table = Table(*columns, caption=f"medians of {config.rounds} rounds, in turns")
    for streams, new_tokens in zip(config.streams, config.new_tokens, strict=True):
        prompts = torch.randint(3, shape.vocab_size, (streams, config.prompt_tokens)).tolist()
        for name, generate in contestants.items():
            with console.status(f"warming up {name}, {streams} at once"):
                generate(prompts, new_tokens)  # whole: a static cache is as long as the answer, and compiled for that
        steps = {name: partial(generate, prompts, new_tokens) for name, generate in contestants.items()}
        seconds = time_in_turns(steps, config.rounds, device, console)
        tokens = streams * new_tokens
        for name, times in seconds.items():
            speeds[name][str(streams)] = tokens / statistics.median(times)
        for name, times in seconds.items():
            ratio = speeds["minnow"][str(streams)] / speeds[name][str(streams)]
            table.add_row(
                str(streams),
                name,
                f"{speeds[name][str(streams)]:,.0f}",
                f"{tokens / max(times):,.0f} to {tokens / min(times):,.0f}",
                f"{ratio:.2f}x" if name != "minnow" else "",
            )
    console.print(table)
    figures: dict[str, Any] = {
        **speeds,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }
    if "1" in speeds["minnow"]:
        size = weight_bytes(model)
        bound = 1 / read_seconds(size, device)
        figures["bandwidth_share"] = speeds["minnow"]["1"] / bound
        console.print(
            f"A token reads {size / 1e6:.0f} MB of weights; memory gives that {bound:,.0f} times a second: one stream "
            f"runs at {figures['bandwidth_share']:.0%} of the bound. {figures['dtype']} on {device.type}, "
            f"threads: {figures['threads']}.",
        )
    if config.json is not None:
        with atomic_write(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def minnow_generate(model: CausalLM, compiled: bool) -> Generate:
    """The engine as `minnow serve` runs it: frozen, compiled where that is possible. Nothing is found in its cache."""
    tokenizer = train_tokenizer(["minnow"] * 3, 288)
    engine = Engine(model, tokenizer, frozen=True, compile=compiled)

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        engine.forget_prefixes()
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True))
        assert all(len(output.completions[0].ids) == new_tokens for output in outputs)

    return generate


def transformers_generate(model: CausalLM, *, compiled: bool = False) -> Generate:
    """transformers' class with the same weights, as its documentation runs it: SDPA, greedy, its dynamic cache; or for
    speed a static one, and the decode step compiled."""
    from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

    weight = model.head_weight
    settings = to_hf_config(model.config, weight.dtype, {})
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    theirs = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=weight.dtype)
    theirs.load_state_dict(model.state_dict(), strict=False)  # a tied head is theirs to tie
    theirs.tie_weights()
    theirs = theirs.to(weight.device).eval()
    cache: dict[str, Any] = {}
    if compiled:
        how = CompileConfig(dynamic=False)  # code for each size, none for all of them
        how._compile_all_devices = True  # type: ignore[assignment]  # CPUs too
        cache = {"cache_implementation": "static", "compile_config": how}

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        prompts_BT = torch.tensor(prompts, device=weight.device)
        with torch.no_grad():
            answers = theirs.generate(
                prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                **cache,
            )
        assert answers.shape[1] == prompts_BT.shape[1] + new_tokens

    return generate


def weight_bytes(model: CausalLM) -> int:
    """Bytes of weights that one token reads: all but the experts it is not sent to, and an untied embedding, of which
    it reads one row."""
    embedding = model.model.embed_tokens.weight
    left_out = 0 if model.lm_head is None else embedding.numel()
    return (active_parameter_count(model.config) - left_out) * embedding.element_size()


def read_seconds(size: int, device: torch.device) -> float:
    """Fastest of some readings of `size` bytes, again and again as a decoding model reads its weights."""
    memory = torch.zeros(size // 4, device=device)
    fastest = float("inf")
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        memory.sum()
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
