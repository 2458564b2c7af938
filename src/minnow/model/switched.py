"""Several adapters on one base, chosen token by token: what serves many fine-tunings with the memory of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.model.adapter import read_adapter
from minnow.model.lora import LoraLinear, linear_names
from minnow.model.transformer import CausalLM, Linear


class AdapterChoice:
    """Which adapter each token of the next forward pass goes through; none, where nobody chooses."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
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

    def __init__(self, linear: Linear, adapters: Mapping[str, LoraLinear], choice: AdapterChoice) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.share(linear)
        self._others = (dict(adapters), choice)  # in a tuple, where nn.Module does not look for modules

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], each token through its adapter."""
        adapters, choice = self._others
        y = self.product(x)
        x_ND, y_NO = x.flatten(0, -2), y.flatten(0, -2)
        for name, places in choice.places.items():
            if name in adapters:
                y_NO = y_NO.index_copy(0, places, adapters[name].adapt(x_ND[places], y_NO[places]))
        y = y_NO.view(y.shape)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def add_switched(model: CausalLM, adapters: Mapping[str, Path]) -> AdapterChoice:
    """Put the adapters of some folders onto `model`, their base, by name; nothing changes until one is chosen.

    UserError for one that does not fit the model, and for a model that has adapters already.
    """
    if model.adapter is not None or len(linear_names(model)) == 0:
        raise UserError("adapters stand beside a plain model: merge the one it has (minnow merge-lora)")
    choice = AdapterChoice(list(adapters))
    layers: dict[str, dict[str, LoraLinear]] = {}
    for name, folder in adapters.items():
        for layer, adapted in read_adapter(model, folder).items():
            layers.setdefault(layer, {})[name] = adapted.eval()
    for layer, by_name in layers.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, Linear)
        model.set_submodule(layer, SwitchedLinear(linear, by_name, choice))
    return choice
