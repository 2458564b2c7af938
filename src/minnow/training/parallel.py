"""One model on several processes: DDP keeps a copy on each, FSDP2 a slice on each, HSDP a sliced copy on each host.

All three leave the model the object it was, with its names and methods: an objective cannot go around them by
mistake. Gradients are summed, not averaged, as the Trainer has already divided by the count of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from minnow.config import UserError
from minnow.model.moe import MoE
from minnow.model.quantize import is_quantized
from minnow.model.transformer import CausalLM
from minnow.training.config import Parallel
from minnow.training.distribution import is_first, local_world_size, world_size

# Weight, gradient and two averages, in fp32: what a copy of the model costs before the first activation.
_BYTES_A_PARAMETER = 16
_SHARE_OF_MEMORY = 0.5


def parallelise(model: CausalLM, mode: Parallel, device: torch.device, timeout: timedelta | None = None) -> None:
    """Put `model` on `device`, over all processes of the run, in place; its compute dtype is already chosen.

    The weights are the first process's: the others may come with `meta` parameters, that is without memory. From then
    on a process whose message takes longer than `timeout` (None: torch's own) ends in an error. Not before: one may
    come later than another, or take longer to make or read its model, than an update takes.
    """
    if world_size() == 1:
        model.to(device)
        return
    mode = choose_parallel(mode, model, device)
    groups = [dist.group.WORLD]
    if mode == "ddp":
        _replicate(model, device)
    else:
        mesh = _mesh(mode, device)
        _shard(model, mesh, device)
        groups += mesh.get_all_groups()
    if timeout is not None:
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def choose_parallel(mode: Parallel, model: CausalLM, device: torch.device) -> Literal["ddp", "fsdp", "hsdp"]:
    """Resolve `auto`: ddp while half of a device's memory holds the training state, else slices of it.

    UserError where several processes cannot train `model` so.
    """
    if device.type == "mps":
        raise UserError("--device mps: one process can use it, not several; give --nproc 1 or --device cpu")
    if is_quantized(model):
        if mode not in ("auto", "ddp"):
            raise UserError(
                f"--training.parallel {mode}: int8 weights are not sliced; give ddp, or --lora.quantize none"
            )
        return "ddp"
    if mode != "auto":
        return mode
    if device.type != "cuda":
        return "ddp"
    state = _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
    if state < _SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory:
        return "ddp"
    return "fsdp" if local_world_size() == world_size() else "hsdp"


def require_parallel(mode: Parallel, model: CausalLM, device: torch.device) -> None:
    """UserError, before any work, where the processes of this run cannot train `model` together."""
    if world_size() > 1:
        choose_parallel(mode, model, device)


def sync_gradients(model: CausalLM, last: bool) -> None:
    """Say before a micro-batch's backward pass whether it is the last: only then do gradients travel."""
    if world_size() > 1:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of a model that is no part of the Trainer's over all processes; a missing one counts as
    zeros."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def _replicate(model: CausalLM, device: torch.device) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    model.to(device)
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    replicate(model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    model.register_comm_hook(None, lambda _, bucket: _sum_bucket(bucket))  # type: ignore[operator]


def _sum_bucket(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over all processes, where DDP's own hook would take the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _shard(model: CausalLM, mesh: DeviceMesh, device: torch.device) -> None:
    """Slice every layer, and the rest (embedding, norm, head: tied weights stay together) as one group.

    Weights are gathered in the compute dtype, those of routers in fp32. Layers stay whole between the forward and the
    backward pass (ZeRO-2): at sizes up to 2B the weights are the smaller part, and each is gathered once a micro-batch
    instead of twice.
    """
    weights = model.state_dict() if is_first() else {}
    model.to("meta")
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": False}
    in_compute_dtype = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype,
        reduce_dtype=torch.promote_types(model.compute_dtype, torch.float32),
        cast_forward_inputs=False,
    )
    as_held = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):  # a router is read in fp32 whatever it is: rounding would change its choices
            fully_shard(layer.mlp.gate, mp_policy=as_held, **options)
        fully_shard(layer, mp_policy=in_compute_dtype, **options)
    fully_shard(model, mp_policy=in_compute_dtype, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _mesh(mode: Literal["fsdp", "hsdp"], device: torch.device) -> DeviceMesh:
    if mode == "fsdp":
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    hosts, here = divmod(world_size(), local_world_size())[0], local_world_size()
    return init_device_mesh(device.type, (hosts, here), mesh_dim_names=("replicate", "shard"))
