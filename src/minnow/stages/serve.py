"""`minnow serve`: models behind OpenAI's API."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from minnow.config import UserError
from minnow.console import plain_console
from minnow.cpu import in_passing_thread
from minnow.engine import Engine, SamplingParams
from minnow.engine.async_engine import AsyncEngine
from minnow.engine.parts import check_memory_share, usual_memory_share
from minnow.evaluation.quantization import quantization_note
from minnow.model.adapter import base_of, is_adapter
from minnow.model.context import ContextConfig
from minnow.model.pretrained import read_config, resolve_model_folder
from minnow.model.quantize import QuantizeConfig
from minnow.serving import ServedModel, ServingConfig, create_app
from minnow.serving.connection import KEEP_ALIVE_SECONDS
from minnow.serving.security import LOOPBACK
from minnow.stages.terminal import note_foreign_template
from minnow.training.hardware import DeviceName, Precision, choose_device, choose_precision

_LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, kw_only=True)
class Config(ServingConfig, ContextConfig, QuantizeConfig):
    """Serve models over OpenAI's API: chat, completions, embeddings.

    A model is called by its folder's name (a run's by the run's); NAME=MODEL calls it otherwise. Adapters stand beside
    the model that they were trained on, by names of their own: --adapters legal=runs/legal,medical=runs/medical
    """

    models: tuple[str, ...] = field(metadata={"positional": True})
    """Model folders, run folders or Hub ids, each alone or as NAME=MODEL."""
    adapters: tuple[str, ...] = ()
    """Adapters (folders, runs or Hub ids), many on one model in memory: NAME=ADAPTER. Each goes to the served model
    that its adapter_config.json names; NAME@MODEL=ADAPTER puts it on the one served as MODEL."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every network the machine is in and needs an API key."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    insecure: bool = False
    """Listen beyond this machine without an API key all the same."""
    device: DeviceName = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Number format of weights and arithmetic; auto is bf16 where the hardware is faster in it, else fp32."""
    memory_share: float | None = None
    """Part of the memory for keys and values, 0 to 1, in equal parts for all models; by default 0.5 of a GPU's free
    memory when a model gets its first request, 0.25 of the machine's (a container's, where that has less)."""
    compile: bool = False
    """Compile the step that writes a token: faster answers, after one to three minutes more at the start; needs a C++
    compiler, and dense models without adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_memory_share(self.memory_share)


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter's folder, and the name of the served model it goes onto."""

    folder: Path
    parent: str


def run(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C, then let the answers under way finish."""
    config = replace(config, api_key=config.api_key or os.environ.get("MINNOW_API_KEY") or None)
    local = config.host in _LOCAL
    if not local and config.api_key is None and not config.insecure:
        raise UserError(
            f"--host {config.host} lets others in: set MINNOW_API_KEY (or --api_key), or --insecure true if anybody may"
        )
    named = name_models(config.models)
    _check_contexts(config, named)
    for name, folder in named.items() if config.compile else ():
        if read_config(folder).experts is not None:
            raise UserError(f"--compile: {name} is a mixture of experts, whose step is not compiled: leave it out")
    placed = place_adapters(config.adapters, named)
    if placed and config.compile:
        raise UserError("--compile takes a frozen copy of a model, and a model with --adapters is run as it is")
    listening = _listen(config.host, config.port)
    app = in_passing_thread(lambda: build_app(config, named, placed, local=local))
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"serving {', '.join([*named, *placed])} at http://{shown}:{port}/v1", flush=True)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=config.drain_seconds,
        )
    )
    asyncio.run(server.serve(sockets=[listening]))


def name_models(models: Sequence[str]) -> dict[str, Path]:
    """Name -> model folder of what the command line names. UserError for two of one name, and where nothing is."""
    named: dict[str, Path] = {}
    for given in models:
        # A folder may be called lr=0.1.
        name, equals, model = given.partition("=") if not Path(given).exists() else (given, "", "")
        folder = resolve_model_folder(model if equals else given)
        if not equals:
            path = Path(given).resolve()
            in_run = path.name == "model" and path.parent.name  # runs/NAME/model is the model of run NAME
            name = (path.parent.name if in_run else path.name) if Path(given).exists() else given
        if not name:
            raise UserError(f"{given}: a model needs a name before the =")
        if name in named:
            raise UserError(f"two models are called {name}: write OTHER_NAME={given}")
        named[name] = folder
    if not named:
        raise UserError("no model to serve: minnow serve MODEL")
    return named


def _check_contexts(config: ContextConfig, named: Mapping[str, Path]) -> None:
    """UserError with the name of a model that cannot be stretched as asked, before any is loaded."""
    for name, folder in named.items():
        try:
            config.extend(read_config(folder))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def place_adapters(adapters: Sequence[str], named: Mapping[str, Path]) -> dict[str, PlacedAdapter]:
    """Name -> adapter and its base among the models that `name_models` found.

    UserError for a name that is taken, a folder without an adapter, and a base that is not served.
    """
    placed: dict[str, PlacedAdapter] = {}
    for given in adapters:
        names, _, adapter = given.partition("=")
        name, at, parent = names.partition("@")
        if not (name and adapter):
            raise UserError(f"--adapters {given}: write NAME=ADAPTER, or NAME@MODEL=ADAPTER")
        if name in named or name in placed:
            raise UserError(f"--adapters {given}: {name} is the name of another model here: give another")
        folder = resolve_model_folder(adapter)
        if not is_adapter(folder):
            raise UserError(f"--adapters {given}: {folder} holds a whole model, which is served without --adapters")
        if at and parent not in named:
            raise UserError(f"--adapters {given}: no model is served as {parent!r}, only {', '.join(named)}")
        placed[name] = PlacedAdapter(folder, parent if at else _served_base(given, base_of(folder), named))
    return placed


def _served_base(given: str, base: str, named: Mapping[str, Path]) -> str:
    """The name of the served model that an adapter calls its base."""
    if base in named:  # a Hub id
        return base
    here = Path(base).exists() and resolve_model_folder(base).resolve()
    fits = [name for name, folder in named.items() if folder.resolve() == here]
    if not fits:
        raise UserError(
            f"--adapters {given}: its model {base} is not served, only {', '.join(named)}; "
            "if one of these is it, say so with NAME@MODEL=ADAPTER"
        )
    if len(fits) > 1:
        raise UserError(f"--adapters {given}: its model is served as {' and '.join(fits)}; choose: NAME@MODEL=ADAPTER")
    return fits[0]


def build_app(
    config: Config, named: Mapping[str, Path], placed: Mapping[str, PlacedAdapter], *, local: bool
) -> FastAPI:
    """Load the models and put the application together."""
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    share = usual_memory_share(device) if config.memory_share is None else config.memory_share
    models = []
    for name, folder in named.items():
        adapters = {key: adapter.folder for key, adapter in placed.items() if adapter.parent == name}
        engine = Engine.from_pretrained(
            folder,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            context=config,
            frozen=True,
            compile=config.compile,
            memory_share=share / len(named),
            adapters=adapters,
        )
        note_foreign_template(engine.tokenizer, name)
        if config.quantize != "none":
            plain_console(stderr=True).print(f"{name}: {quantization_note(folder, engine)}", soft_wrap=True)
        if config.compile:  # both variants, for one row and for several: now, and not while clients wait
            for rows in (1, 2):
                prompts = [[engine.tokenizer.start_id]] * rows
                engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        shared = AsyncEngine(engine, max_answers=config.max_answers)
        models.append(ServedModel(name=name, folder=folder, engine=shared, stretch=config))
        models += [ServedModel(name=key, folder=adapters[key], engine=shared, parent=name) for key in adapters]
    return create_app(models, config, hosts=LOOPBACK if local and config.api_key is None else None)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at that address, taken before the models load. UserError where it cannot be had."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port}: ports are 0 to 65535 (0: any that is free)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio leaves Nagle's algorithm on: the first token would wait 40 ms for the client's word that
    # the head of the answer has come.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen at {host} port {port} ({error.strerror}): choose another --port") from error
    listening.listen(2048)  # who comes while the models load waits instead of being refused
    return listening
