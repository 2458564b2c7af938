"""Rewards and environments of the user's own, by their place in Python."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from minnow.config import UserError
from minnow.rl.timed_calls import where


def load_object(path: str, setting: str) -> Any:
    """What stands at MODULE:NAME; UserError, naming the setting, where there is nothing."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # a file beside the user, which the command `minnow` would not find
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"{setting} {path!r}: {error}; write MODULE:NAME of something that Python can import") from None
    except Exception as error:
        raise UserError(f"{setting} {path!r} cannot be imported: {where(error)}") from error
