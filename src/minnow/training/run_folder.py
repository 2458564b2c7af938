"""`runs/NAME/`: one run a folder, continued only with what it was started with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import nn

from minnow.config import UserError, config_to_yaml
from minnow.disk import atomic_write, clear_left_overs
from minnow.model.pretrained import is_model_folder
from minnow.training.distribution import first_goes_first, from_first, is_first, mark_start, started_again
from minnow.training.lock import FILE as LOCK
from minnow.training.lock import FolderLock
from minnow.training.reference import weights_fingerprint

ConfigT = TypeVar("ConfigT")

# Settings that do not change what is learnt: a run may be continued with other ones.
MAY_CHANGE = {
    "run",
    "overwrite",
    "chat",
    "training.nproc",
    "training.parallel",
    "training.restarts",
    "training.resume",
    "training.ddp_timeout",
    # What memory suffices for. Sums differ by rounding, as with another number of processes.
    "training.micro_batch_tokens",
    "training.gradient_checkpointing",
    # Rounding too; `auto` itself measures the machine, and may decide otherwise at the next start.
    "training.compile",
    "training.track",
    "training.keep_last",
    "training.save_every",
    "training.log_every",
    "data.workers",
    "data.cache_dir",
    "training.stall_seconds",
    "training.profile",
    # How long is waited for others, where they are, how many at once: a run that they stopped goes on.
    "rewards.functions_seconds",
    "rewards.maths_seconds",
    "rewards.judge.parallel",
    "rewards.judge.seconds",
    "rollout.environment_seconds",
    "rollout.environment_threads",
    "rollout_engine.url",
    "rollout_engine.model",
    "rollout_engine.server",
    "rollout_engine.folder",
    "rollout_engine.parallel",
    "rollout_engine.seconds",
    # When a run of reinforcement is stopped: after a false alarm it goes on.
    "watch.patience",
    "watch.repetition",
    "watch.truncated",
    "watch.entropy",
}
MAY_MOVE = {"rewards.judge.url"}
"""Addresses: with another one it is the same run, with one more or one less it is not."""


class RunFolder:
    """`runs/NAME/`: opened for a new run, for one to continue, or found finished."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model_folder = self.path / "model"
        self.config_file = self.path / "config.yaml"
        self.lock = FolderLock(self.path)

    @property
    def finished(self) -> bool:
        """Whether the final model is there: it is the last thing a run writes. All processes ask together."""
        return from_first(is_model_folder(self.model_folder))

    def clear(self, made_by: str) -> None:
        """Delete the folder, if a file called `made_by` shows that it is a run: a mistyped --run costs nothing.

        Of what lies elsewhere, behind a link, only the link.
        """
        if not self.path.exists():
            return
        if any(entry.name != LOCK for entry in self.path.iterdir()) and not (self.path / made_by).exists():
            raise UserError(
                f"--overwrite: {self.path} is not empty and is no run (no {made_by} in it); give another --run"
            )
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue  # whoever holds it keeps it
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def claim_data(self, key: str) -> None:
        """Remember which prepared data the run learns from; refuse to continue it on other data."""
        self._claim(
            "data", key, "on other data (a file, the tokenizer, an option or how minnow reads rows has changed)"
        )

    def claim_prompts(self, prompts: Sequence[Any]) -> None:
        """The same of the rows that a run practises on and is examined on, dataclasses all."""
        text = json.dumps([dataclasses.asdict(prompt) for prompt in prompts], sort_keys=True, default=str)
        self._claim("prompts", hashlib.sha256(text.encode()).hexdigest(), "on other prompts (a file has changed since)")

    def claim_model(self, role: str, model: nn.Module, *, frozen: bool = False) -> None:
        """The same of weights that no checkpoint of the run holds: a teacher's, a reference's, a reward model's, an
        adapter's base (`frozen`: those of `model` that are not trained)."""
        key = weights_fingerprint(model, frozen=frozen)  # by all processes: a model in slices is put together for it
        self._claim(role, key, f"with other weights of its {role}, or another shape (the folder has changed since)")

    def _claim(self, name: str, key: str, other: str) -> None:
        with first_goes_first():
            if is_first():
                file = self.path / f"{name}.key"
                if not file.exists():
                    with atomic_write(file) as temporary:
                        temporary.write_text(key + "\n", encoding="utf-8")
                elif file.read_text(encoding="utf-8").strip() != key:
                    raise UserError(f"{self.path} was started {other}: restore it, give another --run, or --overwrite")

    def with_recorded_micro_batch(self, config: ConfigT) -> ConfigT:
        """Put the number that the run was started with in the place of `micro_batch_tokens auto`, if there is one."""
        if config.training.micro_batch_tokens != "auto":  # type: ignore[attr-defined]
            return config
        tokens = from_first(self._recorded_micro_batch())
        return with_micro_batch(config, tokens) if isinstance(tokens, int) else config

    def _recorded_micro_batch(self) -> Any:
        if not self.config_file.exists():
            return None
        return _flatten(yaml.safe_load(self.config_file.read_text(encoding="utf-8"))).get("training.micro_batch_tokens")

    def record(self, config: Any) -> None:
        """Write `config` into the open folder: what `auto` was resolved to by trying."""
        if is_first() and self.config_file.read_text(encoding="utf-8") != config_to_yaml(config):
            with atomic_write(self.config_file) as temporary:
                temporary.write_text(config_to_yaml(config), encoding="utf-8")

    def open(self, config: Any, *, overwrite: bool) -> None:
        """Create the folder with `config.yaml`, or check that what is in it belongs to the same configuration.

        How many processes share the work may change from one start to the next: the batches stay the same.
        """
        overwrite = overwrite and not started_again(self.path / "overwritten.id")
        with first_goes_first():
            if is_first():
                self._open(config, overwrite)
        if overwrite:
            mark_start(self.path / "overwritten.id")

    def _open(self, config: Any, overwrite: bool) -> None:
        self.lock.take()
        if overwrite:
            self.clear("config.yaml")
        clear_left_overs(self.model_folder)
        text = config_to_yaml(config)
        if self.config_file.exists():
            before = _flatten(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
            now = _flatten(yaml.safe_load(text))
            changed = [k for k in now | before if _is_another_run(k, before.get(k), now.get(k))]
            if changed:
                shown = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in changed[:5])
                raise UserError(
                    f"{self.path} holds a run with another configuration ({shown}): give another --run, or --overwrite"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.config_file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def with_micro_batch(config: ConfigT, tokens: int) -> ConfigT:
    """Set `training.micro_batch_tokens`."""
    training = dataclasses.replace(config.training, micro_batch_tokens=tokens)  # type: ignore[attr-defined]
    return dataclasses.replace(config, training=training)  # type: ignore[type-var]


def _is_another_run(key: str, before: Any, now: Any) -> bool:
    if key in MAY_MOVE:
        return (before is None) != (now is None)
    return bool(before != now) and key not in MAY_CHANGE


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, child in tree.items() for k, v in _flatten(child, f"{prefix}{name}.").items()}
