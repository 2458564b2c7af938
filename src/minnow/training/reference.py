# ruff: noqa: N815 (fields carry their shape)
"""Log-probabilities of the answers under the model that a preference run starts from: computed once, kept on disk.

The reference of DPO and its kin is the model as it is before the first update, so it is asked before training, and no
second model is in memory during it. What is kept is one number per answer token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minnow.config import atomic_write
from minnow.data.batches import Batch, PackedDataset
from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Rows of whole pairs: pieces are answers with their prompts, chosen and rejected in turn."""

    answer_N: Tensor
    """int64, ascending: the answer that each supervised target belongs to, counted through the batch."""
    reference_N: Tensor
    """float32: log-probability of each supervised target under the reference model; zeros without one."""

    @property
    def num_answers(self) -> int:
        """Answers: two a pair."""
        return sum(map(len, self.document_ids))


@dataclass(frozen=True)
class PreferenceRows:
    """Packed pairs as batches with their reference log-probabilities."""

    dataset: PackedDataset
    reference: AnswerLogprobs | None
    """None for a loss that needs none."""

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.dataset.num_rows

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> PreferenceBatch:
        """Read rows, in the order given."""
        batch = self.dataset.batch(row_indices)
        answer_N = answer_of_targets(batch)
        reference_N = torch.zeros(len(answer_N))
        if self.reference is not None:
            reference_N = self.reference.of(document for row in batch.document_ids for document in row)
        return PreferenceBatch(**vars(batch), answer_N=answer_N, reference_N=reference_N)


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probability of every supervised token of every document, document after document."""

    logprobs_N: Tensor
    """float32."""
    offsets: Tensor
    """int64 [documents + 1]: document d has offsets[d] .. offsets[d + 1]."""

    def of(self, documents: Iterator[int]) -> Tensor:
        """Return the values of `documents`, one after the other."""
        return torch.cat([self.logprobs_N[self.offsets[d] : self.offsets[d + 1]] for d in documents])


def answer_of_targets(batch: Batch) -> Tensor:
    """Count the pieces of a batch, filler left out, and say for each supervised target to which it belongs: int64."""
    targets = batch.weights_BT.flatten().nonzero().squeeze(1)
    borders = batch.cu_seqlens.long()
    is_document = ~batch.filler_BT.flatten()[borders[:-1]]
    piece = torch.searchsorted(borders[1:], targets, right=True)
    return (is_document.cumsum(0) - 1)[piece]


def target_logprobs(model: CausalLM, batch: Batch) -> Tensor:
    """Log-probability of every supervised target of a batch on the model's device, float32 [N], in order."""
    hidden_BTD = model(batch.tokens_BT, batch.positions_BT, PackedAttention(batch.cu_seqlens, batch.tokens_BT.device))
    supervised_BT = batch.weights_BT > 0
    return token_logprobs(hidden_BTD[supervised_BT], model.head_weight, batch.targets_BT[supervised_BT])


def reference_logprobs(
    model: CausalLM, dataset: PackedDataset, cache: Path, data_key: str, *, rows_at_once: int
) -> AnswerLogprobs:
    """Ask `model` about every answer of `dataset`, or read what it said the last time.

    cache: folder of the files; a file's name is a hash of the model's weights and dtype and of `data_key`, which stands
    for the documents. rows_at_once: rows that go through the model together.
    """
    name = hashlib.sha256(json.dumps([weights_fingerprint(model), str(model.compute_dtype), data_key]).encode())
    file = cache / f"reference-{name.hexdigest()[:20]}.safetensors"
    if file.exists():
        found = load_file(file)
        return AnswerLogprobs(found["logprobs"], found["offsets"])
    logprobs = _ask(model, dataset, rows_at_once)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        save_file({"logprobs": logprobs.logprobs_N, "offsets": logprobs.offsets}, temporary)
    return logprobs


@torch.no_grad()
def _ask(model: CausalLM, dataset: PackedDataset, rows_at_once: int) -> AnswerLogprobs:
    device = model.head_weight.device
    by_document: list[Tensor] = [torch.empty(0)] * dataset.shards.num_documents
    was_training = model.training
    model.eval()
    for start in range(0, dataset.num_rows, rows_at_once):
        batch = dataset.batch(range(start, min(start + rows_at_once, dataset.num_rows)))
        documents = [document for row in batch.document_ids for document in row]
        lengths = torch.bincount(answer_of_targets(batch), minlength=len(documents)).tolist()
        values_N = target_logprobs(model, batch.to(device)).float().cpu()
        for document, values in zip(documents, values_N.split(lengths), strict=True):
            by_document[document] = values
    model.train(was_training)
    lengths_D = torch.tensor([0, *map(len, by_document)])
    return AnswerLogprobs(torch.cat([torch.empty(0), *by_document]), lengths_D.cumsum(0))


def weights_fingerprint(model: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a model's parameters and buffers; hex."""
    digest = hashlib.blake2b(digest_size=20)
    state: dict[str, Any] = model.state_dict()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
