# ruff: noqa: N815 (fields carry their shape)
"""Log-probabilities of the answers under the model that a preference run starts from: computed once, kept on disk.

The reference of DPO and its kin is the model as it is before the first update, so it is asked before training, and no
second model is in memory during it. What is kept is one number per answer token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minnow.config import UserError
from minnow.data.batches import Batch, PackedDataset
from minnow.data.shards import Shards
from minnow.disk import atomic_write, opened_to_others
from minnow.model.slices import examined, is_sliced
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs
from minnow.training.distribution import from_first, is_first
from minnow.training.forward import hidden_states
from minnow.training.objective import Rows


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Rows of whole pairs: pieces are answers with their prompts, chosen and rejected in turn."""

    answer_N: Tensor
    """int64, ascending: the answer that each supervised target belongs to, counted through the batch."""
    reference_N: Tensor
    """float32: log-probability of each supervised target under the reference model; zeros without one."""
    unrelated: Batch | None = None
    """kto: each pair's prompt with the better answer to another prompt, see `unrelated_batch`."""
    unrelated_reference_N: Tensor | None = None
    """float32: log-probability of the unrelated answers' tokens under the reference model."""

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
    unrelated_reference: AnswerLogprobs | None = None
    """By pair, for the loss (kto) that asks for unrelated answers too."""

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self.dataset.num_rows

    @property
    def window_rows(self) -> Iterator[int]:
        """Rows of each window."""
        return self.dataset.window_rows

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> PreferenceBatch:
        """Read rows, in the order given."""
        batch = self.dataset.batch(row_indices)
        answer_N = answer_of_targets(batch)
        reference_N = torch.zeros(len(answer_N))
        if self.reference is not None:
            reference_N = self.reference.of(documents_of(batch))
        if self.unrelated_reference is None:
            return PreferenceBatch(**vars(batch), answer_N=answer_N, reference_N=reference_N)
        unrelated = unrelated_batch(self.dataset, [document // 2 for document in documents_of(batch)[::2]])
        return PreferenceBatch(
            **vars(batch),
            answer_N=answer_N,
            reference_N=reference_N,
            unrelated=unrelated,
            unrelated_reference_N=self.unrelated_reference.of(documents_of(unrelated)),
        )


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probability of every supervised token of every document, document after document."""

    logprobs_N: Tensor
    """float32."""
    offsets: Tensor
    """int64 [documents + 1]: document d has offsets[d] .. offsets[d + 1]."""

    def of(self, documents: Sequence[int]) -> Tensor:
        """Return the values of `documents`, one after the other."""
        return torch.cat([self.logprobs_N[self.offsets[d] : self.offsets[d + 1]] for d in documents])


def documents_of(batch: Batch) -> list[int]:
    """Return the documents of a batch in order."""
    return [document for row in batch.document_ids for document in row]


def unrelated_batch(dataset: PackedDataset, pairs: Sequence[int]) -> Batch:
    """Give each pair's prompt the better answer to the next other prompt in the data: one row, a piece a pair.

    Its `document_ids` are the pairs. What exceeds the sequence length is cut off.
    """
    shards = dataset.shards
    ids, weights = [], []
    for pair in pairs:
        other = 2 * pair_of_another_prompt(shards, pair)
        prompt = prompt_of(shards, 2 * pair)
        first = len(prompt_of(shards, other))
        length = dataset.sequence_length + 1
        ids.append(np.concatenate([prompt, shards.tokens(other, first)])[:length].astype(np.int64))
        weights.append(np.concatenate([np.zeros(len(prompt), np.float32), shards.weights(other, first)])[:length])
    lengths = np.array([len(part) - 1 for part in ids])
    row_weights = np.concatenate([part[1:] for part in weights])
    return Batch(
        tokens_BT=torch.from_numpy(np.concatenate([part[:-1] for part in ids]))[None],
        targets_BT=torch.from_numpy(np.concatenate([part[1:] for part in ids]))[None],
        weights_BT=torch.from_numpy(row_weights)[None],
        positions_BT=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seqlens=torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)),
        filler_BT=torch.zeros(1, int(lengths.sum()), dtype=torch.bool),
        document_ids=(tuple(pairs),),
    )


def pair_of_another_prompt(shards: Shards, pair: int) -> int:
    """The first pair after `pair`, after the last the first one, whose prompt is another. UserError without one.

    An answer with reasoning has a shorter prompt than one without, by the empty think block: where one prompt begins
    with the other, they count as the same.
    """
    prompt, num_pairs = prompt_of(shards, 2 * pair), shards.num_documents // 2
    for step in range(1, num_pairs):
        other = (pair + step) % num_pairs
        theirs = prompt_of(shards, 2 * other)
        shared = min(len(prompt), len(theirs))
        if not np.array_equal(prompt[:shared], theirs[:shared]):
            return other
    raise UserError(
        "loss.name kto compares with answers to other prompts, but all pairs of the training or of the held-out split "
        "have one prompt: give more data, or a data.validation_fraction that leaves both more than one (or 0)"
    )


def prompt_of(shards: Shards, document: int) -> np.ndarray:
    """Tokens before the first supervised one."""
    return shards.tokens(document, 0, int((shards.weights(document) > 0).argmax()))


def repeated_prompts(shards: Shards, num_pairs: int) -> float:
    """Share of the positions of the first `num_pairs` pairs at which a prompt is read again, for the second answer."""
    documents = range(min(2 * num_pairs, shards.num_documents))
    repeated = sum(len(prompt_of(shards, document)) for document in documents[1::2])
    return repeated / int((shards.lengths[: len(documents)] - 1).sum())


def row_batches(rows: Rows[Batch], num_rows: int, rows_at_once: int) -> Iterator[Batch]:
    """Read the first `num_rows` rows in order, `rows_at_once` at a time."""
    for start in range(0, num_rows, rows_at_once):
        yield rows.batch(range(start, min(start + rows_at_once, num_rows)))


def answer_of_targets(batch: Batch) -> Tensor:
    """Count the pieces of a batch, filler left out, and say for each supervised target to which it belongs: int64."""
    targets = batch.weights_BT.flatten().nonzero().squeeze(1)
    borders = batch.cu_seqlens.long()
    is_document = ~batch.filler_BT.flatten()[borders[:-1]]
    piece = torch.searchsorted(borders[1:], targets, right=True)
    return (is_document.cumsum(0) - 1)[piece]


def target_logprobs(model: CausalLM, batch: Batch) -> Tensor:
    """Log-probability of every supervised target of a batch on the model's device, float32 [N], in order."""
    hidden_BTD = hidden_states(model, batch)
    supervised_BT = batch.weights_BT > 0
    return token_logprobs(hidden_BTD[supervised_BT], model.head_weight, batch.targets_BT[supervised_BT])


def reference_logprobs(
    model: CausalLM, batches: Iterable[Batch], num_documents: int, cache: Path, data_key: str
) -> AnswerLogprobs:
    """Ask `model` about every supervised target of `batches`, or read what it said the last time.

    cache: folder of the files; a file's name is a hash of the model (`weights_fingerprint`), its dtype and `data_key`,
    which stands for the batches. In a run of several processes each asks for itself: the model may be in slices, which
    only all together can use.
    """
    name = hashlib.sha256(json.dumps([weights_fingerprint(model), str(model.compute_dtype), data_key]).encode())
    file = cache / f"reference-{name.hexdigest()[:20]}.safetensors"
    if from_first(file.exists()):
        found = load_file(file)
        return AnswerLogprobs(found["logprobs"], found["offsets"])
    logprobs = _ask(model, batches, num_documents)
    if is_first():
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            save_file({"logprobs": logprobs.logprobs_N, "offsets": logprobs.offsets}, temporary)
            opened_to_others(temporary)
    return logprobs


def _ask(model: CausalLM, batches: Iterable[Batch], num_documents: int) -> AnswerLogprobs:
    device = next(model.parameters()).device
    by_document: list[Tensor] = [torch.empty(0)] * num_documents
    with examined(model):
        for batch in batches:
            documents = documents_of(batch)
            lengths = torch.bincount(answer_of_targets(batch), minlength=len(documents)).tolist()
            values_N = target_logprobs(model, batch.to(device)).float().cpu()
            for document, values in zip(documents, values_N.split(lengths), strict=True):
                by_document[document] = values
    lengths_D = torch.tensor([0, *map(len, by_document)])
    return AnswerLogprobs(torch.cat([torch.empty(0), *by_document]), lengths_D.cumsum(0))


def weights_fingerprint(model: nn.Module, *, frozen: bool = False) -> str:
    """Hash the names, types, shapes and bytes of a model's parameters and buffers; hex.

    Of a model of ours its configuration too, which decides what weights of one shape compute: rotary frequencies, how
    experts are chosen. `frozen`: only of the parameters that are not trained.
    """
    config = repr(model.config) if isinstance(model, CausalLM) else ""
    digest = hashlib.blake2b(config.encode(), digest_size=20)
    state: dict[str, Any] = model.state_dict()
    if frozen:
        state = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if is_sliced(tensor):
            tensor = tensor.full_tensor()
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
