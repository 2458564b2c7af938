"""Dense and MoE models in vLLM's CPU build: the same greedy tokens. `make test-vllm` makes its environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import vllm_model
from export_models import ARCHITECTURES, reference_greedy, reference_logits, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not vllm_model.PYTHON, reason="MINNOW_VLLM names no Python with vLLM: make test-vllm"),
]

IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60]
# vLLM's CPU attention takes heads of 32, 64, ... only.
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.mark.parametrize("name", ["qwen3", "qwen3 moe", "glm4 moe"])
def test_greedy(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, **SHAPE, **ARCHITECTURES[name])
    ((ids, logprobs),) = vllm_model.vllm_greedy(folder, [IDS], 24)
    assert ids == reference_greedy(folder, IDS, 24)
    logits = reference_logits(folder, [*IDS, *ids])[len(IDS) - 1 : -1].astype(np.float64)
    expected = logits[range(24), ids] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-3)
