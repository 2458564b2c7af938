"""Rollouts of a policy in slices (FSDP2): each process plays with a whole copy, which only reads."""

from __future__ import annotations

import torch

from minnow.engine import Engine
from minnow.model.slices import whole
from minnow.model.transformer import CausalLM
from minnow.optim import kind_of
from minnow.tokenizer import Tokenizer
from minnow.training.checkpoint import trained_tensors


class GatheredEngine(Engine):
    """An Engine around a copy of the policy in its compute dtype, brought up to date by `weights_updated`.

    Playing with the slices themselves would tie all processes to the same number of forward passes, and gather every
    layer for every token. The copy costs 2 bytes a parameter in bf16, where a replica of what is trained costs 16.
    """

    def __init__(self, policy: CausalLM, replica: CausalLM, tokenizer: Tokenizer) -> None:
        """`replica`: a copy of the policy from before it was sliced, `as_computed`."""
        super().__init__(replica, tokenizer)
        self._policy = policy

    @torch.no_grad()
    def weights_updated(self) -> None:
        """Gather what is trained, tensor by tensor. All processes call it together."""
        targets = self.model.state_dict()
        for name, tensor in trained_tensors(self._policy).items():
            targets[name].copy_(whole(tensor))
        super().weights_updated()


def as_computed(model: CausalLM, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Freeze `model` with its parameters as FSDP2 gathers them: in the compute dtype, norms too. Returns it."""
    model.requires_grad_(False).eval().to(device)
    for name, parameter in model.named_parameters():
        if kind_of(name, parameter) != "router":  # these stay fp32, and so do buffers (their biases)
            parameter.data = parameter.data.to(dtype)
    model.compute_dtype = dtype
    return model
