"""Several adapters on one base, chosen token by token: what serves many fine-tunings with the memory of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from minnow.model.lora import LoraLinear
from minnow.model.transformer import CausalLM, Linear


class AdapterChoice:
    """Which adapter each token of the next forward pass goes through; none, where nobody chooses."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.places: dict[str, Tensor] = {}
        """By adapter: the places of its tokens among all tokens of the pass, int64."""

    @contextmanager
    def of(self, spans: Sequence[tuple[str | None, int]], device: torch.device) -> Iterator[None]:
        """Choose for a pass whose tokens, flattened, are `spans`, one after another: (adapter or None, tokens)."""
        starts = accumulate((count for _, count in spans), initial=0)
        places: dict[str, list[Tensor]] = {}
        for (name, count), start in zip(spans, starts, strict=False):
            if name is not None:
                places.setdefault(name, []).append(torch.arange(start, start + count))
        self.places = {name: torch.cat(parts).to(device) for name, parts in places.items()}
        try:
            yield
        finally:
            self.places = {}


class SwitchedLinear(Linear):
    """A linear layer, and for each adapter that has one a `LoraLinear` around the same weight.

    The adapters are no submodules: the model's own parameters, their names and what is saved stay the base's.
    """

    def __init__(self, linear: Linear, choice: AdapterChoice) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.share(linear)
        self.adapters: dict[str, LoraLinear] = {}  # nn.Module does not look for modules in a dict
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], each token through its adapter."""
        y = self.product(x)
        x_ND, y_NO = x.flatten(0, -2), y.flatten(0, -2)
        for name, places in self.choice.places.items():
            if name in self.adapters:
                y_NO = y_NO.index_copy(0, places, self.adapters[name].adapt(x_ND[places], y_NO[places]))
        y = y_NO.view(y.shape)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def put_adapter(model: CausalLM, choice: AdapterChoice, name: str, layers: Mapping[str, LoraLinear]) -> None:
    """Let tokens of `model` choose the adapter `name`, which takes the place of an earlier one of that name.

    layers: what `adapter.read_adapter` gave for this model. Nothing changes for tokens that do not choose it.
    """
    for module in model.modules():
        if isinstance(module, SwitchedLinear):
            module.adapters.pop(name, None)
    for layer, adapted in layers.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, Linear)
        if not isinstance(linear, SwitchedLinear):
            linear = SwitchedLinear(linear, choice)
            model.set_submodule(layer, linear)
        linear.adapters[name] = adapted.eval()
    choice.names.add(name)
