"""LoRA: a frozen model learns through narrow matrices beside its linear layers.

    y = W x + s B A dropout(x)          s = alpha / rank, or alpha / sqrt(rank) with rsLoRA

Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732; DoRA: Liu et al., arXiv 2402.09353. Parameters
bear PEFT's names (`q_proj.lora_A.weight`), so that adapter.py writes PEFT's files from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.config import UserError, refuse_unused
from minnow.model.transformer import CausalLM, Linear

Quantization = Literal["none", "int8"]
"""Number format of frozen matrices in memory, see quantize.py."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside a frozen model."""

    rank: int = 0
    """Inner width of the adapters; 0: none, the whole model is trained."""
    alpha: float | None = None
    """The adapter's output is multiplied by alpha / rank. null: 2 * rank, with rslora 8."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead: large ranks then learn as fast as small ones."""
    dora: bool = False
    """Learn the length of each row of the weight apart from its direction; slower, often better at small ranks."""
    targets: tuple[str, ...] = ("*_proj",)
    """Linear layers to adapt: patterns with * and ? of names or of their ends, such as q_proj or layers.0.mlp.*"""
    quantize: Quantization = "none"
    """int8: hold the frozen model's matrices as 8-bit integers in training; a quarter of fp32's memory."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}: give 1 or more, or 0 to train the whole model")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"lora.alpha is {self.alpha}: it must be positive (at 0 an adapter would never learn)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}: it lies from 0 to below 1")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty: name at least one pattern of linear layers")
        if self.quantize != "none" and not self.rank:
            raise UserError("lora.quantize rounds a frozen model, but lora.rank is 0 and all of it is trained")
        if not self.rank:
            others = ("alpha", "dropout", "rslora", "dora", "targets")
            refuse_unused(self, dict.fromkeys(others, "lora.rank is 0 and the whole model is trained"), "lora.")

    @property
    def chosen_alpha(self) -> float:
        """`alpha`, or its default: a factor 2 on the output, with rsLoRA at rank 16 and less at greater ranks."""
        if self.alpha is not None:
            return self.alpha
        return 8.0 if self.rslora else 2.0 * self.rank

    @property
    def scaling(self) -> float:
        """Factor s on the adapter's output."""
        return self.chosen_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """What a model's adapters are: their settings, and the model that they belong to."""

    config: LoraConfig
    base: str
    """Folder or Hub id of the frozen model."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Of PEFT's files: ranks of layers whose names end as a regular expression says, where not `config.rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same of alpha."""


class LoraLinear(Linear):
    """A frozen linear layer with an adapter beside it; takes over `linear`'s own weight and bias.

    With DoRA, `lora_magnitude_vector` m [out] holds the rows' lengths, with the norm taken as a constant in the
    backward pass (2402.09353, section 4.3):

        y = m / ||W + s B A||_row * (W x + s B A dropout(x))
    """

    def __init__(self, linear: Linear, rank: int, scaling: float, *, dropout: float = 0.0, dora: bool = False) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.share(linear)
        self.scaling, self.dropout = scaling, dropout
        self.enabled = True
        device = linear.weight.device
        self.lora_A = Linear(linear.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = Linear(rank, linear.out_features, bias=False, device=device, dtype=torch.float32)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(linear.out_features, device=device)) if dora else None

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in), B zero, m the rows' lengths: the layer starts as it was. Drawn on the CPU."""
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_A.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        self.lora_A.weight.copy_(drawn)
        self.lora_B.weight.zero_()
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.matrix().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        if not self.enabled:
            return super().forward(x)
        y = self.adapt(x, self.product(x))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """What the adapter makes of y = W x [..., out], without the bias."""
        y = y + self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training))) * self.scaling
        if self.lora_magnitude_vector is not None:
            y = y * (self.lora_magnitude_vector / _row_lengths(self._direction()).detach()).to(x.dtype)
        return y

    @torch.no_grad()
    def merged(self) -> Linear:
        """The plain layer that computes the same, in the weight's own dtype. ValueError where that is int8."""
        if self.weight_scale is not None:
            raise ValueError("an adapter is merged into the unquantised weights, not into rounded ones")
        weight = self._direction()
        if self.lora_magnitude_vector is not None:
            weight = weight * (self.lora_magnitude_vector / _row_lengths(weight)).unsqueeze(1)
        linear = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return linear

    def _direction(self) -> Tensor:
        """W + s B A in float32."""
        return self.matrix() + self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


def _row_lengths(weight: Tensor) -> Tensor:
    """Not zero: a row that starts at zero has no direction, and stays zero."""
    return weight.norm(dim=1).clamp_min(1e-12)


def linear_names(model: CausalLM) -> list[str]:
    """Names of the layers of a model without adapters that can be adapted: the decoder's linear ones, not the head."""
    return [f"model.{name}" for name, module in model.model.named_modules() if isinstance(module, Linear)]


def add_lora(model: CausalLM, config: LoraConfig, *, base: str, seed: int = 0) -> None:
    """Freeze `model` and put an untrained adapter beside every linear layer that `config.targets` names.

    `base` is written into the adapter's files. UserError for a pattern that fits no layer. In a model with routed
    experts only attention takes adapters: PEFT, on transformers 5, reads the names of any MLP there as the experts'.
    """
    if model.adapter is not None:
        raise ValueError("the model has adapters already")
    has_experts = model.config.experts is not None
    names = [name for name in linear_names(model) if not (has_experts and ".mlp." in name)]
    chosen: set[str] = set()
    for pattern in config.targets:
        fits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not fits:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            reason = " (it has routed experts: only attention takes adapters)" if has_experts else ""
            raise UserError(
                f"lora.targets: {pattern!r} fits no linear layer of this model; they are called {kinds}{reason}"
            )
        chosen |= fits
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        if name in chosen:
            linear = model.get_submodule(name)
            assert isinstance(linear, Linear)
            layer = LoraLinear(linear, config.rank, config.scaling, dropout=config.dropout, dora=config.dora)
            layer.initialize(generator)
            model.set_submodule(name, layer)
    model.adapter = Adapter(config, base)


def lora_layers(model: CausalLM) -> dict[str, LoraLinear]:
    """The adapted layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge_lora(model: CausalLM) -> None:
    """Add the adapters to the weights: a plain model that computes the same, all of it trainable again."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged())
    model.adapter = None
    model.requires_grad_(True)


@contextmanager
def adapters_off(model: CausalLM) -> Iterator[None]:
    """Let `model` compute as its frozen base does: the reference model of preference training, for nothing."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
