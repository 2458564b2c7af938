"""Which CPUs compute in bf16 by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minnow.cpu import cpu_multiplies_bf16_faster
from minnow.optim.newton_schulz import fast_dtype
from minnow.training.hardware import choose_precision


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),  # a host that hides AMX
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_bf16_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], faster: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_multiplies_bf16_faster() is faster
    expected = torch.bfloat16 if faster else torch.float32
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert fast_dtype(torch.zeros(2, 2)) == expected


@pytest.mark.parametrize("amx", [True, False])
def test_an_older_torch_tells_of_amx_only(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert cpu_multiplies_bf16_faster() is amx
