"""An exported ONNX graph run in onnxruntime: what the tests and the parity table compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


class OnnxModel:
    """The graph of `minnow export --to onnx` with its cache, on one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._caches = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        self._past: list[np.ndarray] = []
        self._mask = np.zeros((0, 0), np.int64)

    def start(self, mask: np.ndarray) -> None:
        """Forget everything; `mask` int64 [B, T] says which tokens of the first step are no padding."""
        self._mask = np.zeros((len(mask), 0), np.int64)
        self._past = [np.zeros((len(mask), i.shape[1], 0, i.shape[3]), np.float32) for i in self._caches]

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [B, T, V] of the new tokens `ids` int64 [B, T] behind what came before."""
        mask = np.ones_like(ids) if mask is None else mask
        if not self._past:
            self.start(mask)
        self._mask = np.concatenate((self._mask, mask), axis=1)
        positions = np.maximum(self._mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        inputs |= {i.name: past for i, past in zip(self._caches, self._past, strict=True)}
        logits, *self._past = self._session.run(None, inputs)
        return logits

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [T, V] of one sequence, in one step from an empty cache."""
        self._past = []
        return self.step(np.array([ids]))[0]

    def greedy(self, ids: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
        """The likeliest next ids one after another with the cache, at most `count`, an end included."""
        found = [int(self.logits(ids)[-1].argmax())]
        while len(found) < count and found[-1] not in ends:
            found.append(int(self.step(np.array([found[-1:]]))[0, -1].argmax()))
        return found
