"""minnow: small language models from scratch, in plain PyTorch."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `minnow --help` imports this package too, and must not wait for torch.
    if name == "load":
        from importlib import import_module

        return import_module("minnow.api").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
