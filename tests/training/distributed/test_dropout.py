"""Dropout on several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .processes import run_processes
from .stages import write_world


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_each_process_draws_its_own_masks_and_draws_them_again_after_a_resume(tmp_path: Path, mode: str) -> None:
    """All drew the same ones: the rows of a global batch were had no more masks than those of one process."""
    write_world(tmp_path)
    run_processes("tests.training.distributed.dropout", str(tmp_path), str(tmp_path / "out"), mode, world_size=2)
    one, other = (json.loads((tmp_path / "out" / f"masks-{rank}.json").read_text()) for rank in (0, 1))
    assert len(one) == len(other) > 0
    assert all(mine != yours for mine, yours in zip(one, other, strict=True))
    third = len(one) // 3  # of two updates; of the last third they are the same two as of the second
    for masks in (one, other):
        assert masks[:third] != masks[third : 2 * third] == masks[2 * third :]
    whole, resumed = (
        load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("whole", "run/model")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
