"""Train in bf16 in slices and note what the forward passes read: `python -m tests.training.distributed.precision`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minnow.model.experts_config import ExpertsConfig
from minnow.model.moe import Router
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM, Linear
from minnow.training.distribution import process_group
from minnow.training.parallel import parallelise

from ..helpers import SHAPE, RandomSource, make_trainer


def main(mode: str) -> None:
    """Two updates; the second one's forward passes must read the masters as the first one left them."""
    shape = replace(SHAPE, experts=ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    model = CausalLM(shape, seed=1)
    model.compute_dtype = torch.bfloat16
    parallelise(model, mode, torch.device("cpu"))  # type: ignore[arg-type]
    read: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Router | Linear):

            def note(module: nn.Module, arguments: object, name: str = name) -> None:
                read[name] = module.weight.detach().clone()  # type: ignore[operator]

            module.register_forward_pre_hook(note)
    trainer = make_trainer(Path(tempfile.mkdtemp()), model=model, source=RandomSource(2))
    trainer.train_step()
    masters = {name: whole(model.get_parameter(f"{name}.weight")).detach().clone() for name in read}
    trainer.train_step()
    routers = [name for name in read if name.endswith("mlp.gate")]
    assert len(routers) == shape.num_hidden_layers
    for name, master in masters.items():
        assert master.dtype == torch.float32
        wanted = master if name in routers else master.bfloat16()
        assert read[name].dtype == wanted.dtype, f"{name} was gathered in {read[name].dtype}"
        assert torch.equal(read[name], wanted), name
    assert all(not torch.equal(masters[name], masters[name].bfloat16().float()) for name in routers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(sys.argv[1])
