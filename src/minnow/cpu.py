"""What this processor is good at."""

from __future__ import annotations

import torch


def cpu_multiplies_bf16_faster() -> bool:
    """Whether the CPU multiplies matrices faster in bf16 than in float32.

    With AMX it does, about ten times. Having AVX-512's bf16 instructions is not enough: an Intel Xeon whose host hides
    its AMX was measured at half the speed of its float32 products. AMD's are given the benefit of the doubt.
    A table and no timing, so that a resumed run, or another process of the same one, decides the same.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch tells less
        return bool(torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16", False):
        return True
    return bool(capabilities.get("avx512_bf16", False)) and "intel" not in str(capabilities.get("cpu_name")).lower()
