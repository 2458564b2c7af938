"""Decoding in bf16 on a CPU goes through the C++ kernel, on the engine's own window, and says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import random_prompts, tiny_model, tiny_tokenizer

from minnow.engine import Engine, SamplingParams
from minnow.engine import attention as engine_attention
from minnow.engine import cache as engine_cache
from minnow.model import cpp, cpu_attention


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probabilities_are_those_of_torchs_attention(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    kernel = cpu_attention.kernel()
    if kernel is None:  # a processor for which torch has no products of blocks
        kernel = cpp.load_cpp(Path(cpu_attention.__file__).with_suffix(".cpp"), "PLAIN_PRODUCTS")
    if kernel is None:
        pytest.skip("no C++ compiler")
    calls = []

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(len(tensors[0]))
        return cpu_attention.cpu_decode_attention(*tensors)

    monkeypatch.setattr(engine_attention, "cpu_decode_attention", counted)
    monkeypatch.setattr(cpu_attention, "kernel", lambda: kernel)
    prompts = random_prompts(6, 3)
    params = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True, logprobs=True)

    def answers(fast: bool) -> list[Any]:
        monkeypatch.setattr(engine_cache, "cpu_multiplies_bf16_faster", lambda: fast)
        model = tiny_model(3, head_dim=16).to(torch.bfloat16)
        model.compute_dtype = torch.bfloat16
        outputs = Engine(model, tiny_tokenizer(), frozen=frozen).generate(prompts, params)
        return [output.completions[0] for output in outputs]

    by_torch = answers(fast=False)
    assert not calls
    by_kernel = answers(fast=True)
    assert max(calls) == len(prompts)
    compared = 0
    for ours, theirs in zip(by_kernel, by_torch, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=True)) if a != b), len(ours.ids))
        compared += same
        torch.testing.assert_close(ours.raw_logprobs[:same], theirs.raw_logprobs[:same], rtol=0, atol=0.06)
    assert compared > 75, "nearly all of it: a tie or two may go the other way"
