"""How a model is held in memory while it is trained, and how many bytes that takes: for `minnow plan`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minnow.data.batches import Batch
from minnow.model.checkpointing import keeps_output
from minnow.model.config import ModelConfig
from minnow.model.lora import LoraConfig, add_lora, lora_layers
from minnow.model.quantize import quantize
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import Trained, VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.optim import OptimConfig, kind_of, parameter_groups
from minnow.training.config import TrainingConfig
from minnow.training.forward import hidden_states
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch, tokens_between_pictures, with_pictures


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a training step keeps; buffers that live for one operation come on top (about a third of the
    activations, measured on a CPU)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


class VisionModules(NamedTuple):
    """The tower of a model that looks at pictures, and what of the model learns (None: all but tower and projector)."""

    tower: VisionConfig
    trained: Trained | None


def of_shape(shape: ModelConfig, vision: VisionModules | None = None) -> CausalLM:
    """A new model, to be measured."""
    if vision is None:
        return CausalLM(shape)
    model = VisionLanguageModel(shape, vision.tower, 0)
    model.train_only(vision.trained)
    return model


def hold_in_memory(model: CausalLM, dtype: torch.dtype) -> None:
    """Hold what is trained in fp32. Frozen matrices need no master: they are held in the compute dtype.

    But for those that are read in fp32 whatever it is: routers, whose choices rounding would change, and int8's scales.
    And where a frozen part is saved beside a trained one (tower and projector, or the language model behind a trained
    projector), it stays as it came: rounded once a stage, it would be another model's.
    """
    if model.adapter is None and any(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return
    model.to(torch.float32)
    for name, parameter in model.named_parameters():
        is_read_in_fp32 = name.endswith("_scale") or kind_of(name, parameter) == "router"
        is_matrix = parameter.ndim > 1 and parameter.is_floating_point() and not is_read_in_fp32
        if is_matrix and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def as_trained(model: CausalLM, dtype: torch.dtype, lora: LoraConfig | None) -> CausalLM:
    """`model` as a run holds it, with fresh adapters if `lora` has a rank."""
    if lora is not None and lora.rank:
        if lora.quantize == "int8":
            quantize(model)
        add_lora(model, lora, base="")
    hold_in_memory(model, dtype)
    model.compute_dtype = dtype
    return model


def in_every_layer(lora: LoraConfig, model: CausalLM) -> LoraConfig:
    """The adapters of `model`, made with `lora`, for a model of fewer layers: patterns may name layers by number."""
    kinds = {name.partition(".layers.")[2].partition(".")[2] for name in lora_layers(model)}
    return dataclasses.replace(lora, targets=tuple(sorted(kinds))) if kinds else lora


def training_memory(
    shape: ModelConfig,
    training: TrainingConfig,
    optim: OptimConfig,
    length: int,
    dtype: torch.dtype,
    lora: LoraConfig | None = None,
    vision: VisionModules | None = None,
) -> Memory:
    """Weights, gradients and optimizer state are exact; activations are counted on two layers and scaled.

    length: positions of a row. lora: only its adapters have gradients and optimizer state, if its rank is above 0; of
    their activations as many are counted as if all layers had them where some do. vision: of a model that looks at
    pictures, which are `tokens_between_pictures` apart.
    """
    with torch.device("meta"):
        model = as_trained(of_shape(shape, vision), dtype, lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices = sum(parameter.numel() for _, parameter in parameter_groups(model)["matrix"])
    averages = 4 * matrices + 8 * (trained - matrices) if optim.optimizer == "muon" else 8 * trained
    if lora is not None:
        lora = in_every_layer(lora, model)
    copies = 0
    if dtype != torch.float32:  # every step's matrices in the compute dtype, where they are not held so
        copies = dtype.itemsize * sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if kind_of(name, parameter) == "matrix" and parameter.dtype == torch.float32
            if parameter.requires_grad or name.startswith("model.")  # a gradient passes through a frozen decoder too
        )
    return Memory(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + copies,
        gradients=4 * trained,
        optimizer=averages,
        activations=_activations(training, length, shape, dtype, lora, vision),
    )


def _activations(
    training: TrainingConfig,
    length: int,
    shape: ModelConfig,
    dtype: torch.dtype,
    lora: LoraConfig | None,
    vision: VisionModules | None,
) -> int:
    """Bytes kept for the backward pass of one micro-batch: counted by autograd's own hook on a short row."""
    probe_length = min(length, 64 if vision is None else tokens_between_pictures(vision.tower))
    counts = []
    first = 1 if shape.experts is None else shape.experts.first_k_dense_replace + 1  # count a layer with experts
    for layers in (first, first + 1):
        small = dataclasses.replace(shape, num_hidden_layers=layers, vocab_size=min(shape.vocab_size, 512))
        model = as_trained(of_shape(small, vision), dtype, lora)
        model.gradient_checkpointing = training.gradient_checkpointing
        counts.append(_saved_bytes(model, probe_length) / probe_length)
    per_layer = counts[1] - counts[0]
    tokens = training.rows_at_once(length) * length
    return round(tokens * (counts[0] + (shape.num_hidden_layers - first) * per_layer))


def _saved_bytes(model: CausalLM, length: int) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses apart

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not _is_made_of_weights(tensor, model, length):
            kept[storage.data_ptr()] = storage
        return tensor

    batch = random_batch(model.config.vocab_size, 1, length)
    if isinstance(model, VisionLanguageModel):
        batch = with_pictures(batch, model.vision)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = LanguageModeling()(model, batch)
    del output
    selectively = _selectively_kept_bytes(model, batch) if model.gradient_checkpointing == "selective" else 0
    return sum(storage.nbytes() for storage in kept.values()) + selectively


def _is_made_of_weights(tensor: torch.Tensor, model: CausalLM, length: int) -> bool:
    """A matrix in the compute dtype, or DoRA's W + s B A: as large whatever the tokens."""
    sizes = {parameter.numel() for parameter in model.parameters() if parameter.ndim == 2}
    return tensor.ndim == 2 and tensor.numel() in sizes and tensor.shape[0] != length


def _selectively_kept_bytes(model: CausalLM, batch: Batch) -> int:
    """What selective checkpointing keeps of the layers: autograd's hook does not see it."""
    kept, length = 0, batch.tokens_BT.shape[1]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal kept
            outputs = func(*args, **(kwargs or {}))
            if keeps_output(func):
                tensors = outputs if isinstance(outputs, tuple) else (outputs,)
                kept += sum(
                    tensor.nbytes
                    for tensor in tensors
                    if isinstance(tensor, torch.Tensor) and not _is_made_of_weights(tensor, model, length)
                )
            return outputs

    with torch.no_grad(), Watch():
        hidden_states(model, batch)
    return kept
