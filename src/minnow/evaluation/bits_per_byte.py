"""The task `bpb`: bits per byte, how well the model predicts text, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minnow.config import UserError
from minnow.data.pictures import TEXT_ONLY
from minnow.data.pond.write import validation_documents
from minnow.data.readers import read_texts, said_texts
from minnow.engine.hidden import packed_hidden
from minnow.evaluation.pond import find_world
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, labels, register
from minnow.evaluation.statistics import Interval, bootstrap_ratio
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs
from minnow.tokenizer.bytelevel import valid_unicode

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Text:
    """A document and the name of the figure it counts for."""

    text: str
    label: str


class BitsPerByteTask(Task[Text]):
    """Nats of a text's tokens / (ln 2 x its UTF-8 bytes), summed over documents; one figure per label."""

    name = "bpb"
    unit = "bits per byte"

    def __init__(self, texts: Sequence[Text], sequence_length: int | None = None) -> None:
        """`sequence_length`: longest piece the model sees at once; None takes the model's longest context."""
        # Half a surrogate pair has no UTF-8: what the tokenizer reads in its place has its bytes counted.
        self._rows = [Text(valid_unicode(text.text), text.label) for text in texts if text.text]
        self._sequence_length = sequence_length

    def rows(self) -> Sequence[Text]:
        """The documents; empty ones have no bits to count."""
        return self._rows

    def figure(self, row: Text) -> str:
        """`bits_per_byte/LABEL`: a language or a file."""
        return f"bits_per_byte/{row.label}"

    def score_rows(self, subject: Subject, rows: Sequence[Text]) -> list[Score]:
        """Bits and bytes of each document."""
        tokenizer = subject.tokenizer
        documents = tokenizer.encode_batch([row.text for row in rows])
        length = self._sequence_length or subject.model.config.max_position_embeddings
        nats = document_nats(subject.model, documents, tokenizer.start_id, length)
        return [
            Score(value / math.log(2), float(len(row.text.encode())), {"text": row.text[:200]})
            for row, value in zip(rows, nats, strict=True)
        ]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Bootstrap over documents."""
        return bootstrap_ratio([score.value for score in scores], [score.weight for score in scores])


def document_nats(
    model: CausalLM, documents: Sequence[Sequence[int]], start_id: int, sequence_length: int
) -> list[float]:
    """Negative log-likelihood of each document's tokens, in nats; read as `token_nats` does."""
    return [nats.sum().item() for nats in token_nats(model, documents, start_id, sequence_length)]


@torch.no_grad()
def token_nats(
    model: CausalLM,
    documents: Sequence[Sequence[int]],
    start_id: int,
    sequence_length: int,
    *,
    allow_beyond_trained_length: bool = False,
) -> list[Tensor]:
    """Negative log-likelihood of every token of each document, in nats: float64 [tokens] on the CPU.

    A document is read as in pretraining: start_id (end of text, or BOS), then the text. The end-of-text token
    after it stands for no byte and is not counted. A document of more than `sequence_length` tokens is cut; each
    further piece begins with the token before it, at position 0, so every token is predicted exactly once.
    """
    device = model.head_weight.device
    pieces: list[list[Tensor]] = [[] for _ in documents]
    was_training = model.training
    model.eval()
    for batch in _batches(documents, sequence_length, BATCH_TOKENS):
        inputs = [
            [documents[index][start - 1] if start else start_id, *documents[index][start : stop - 1]]
            for index, start, stop in batch
        ]
        targets = [token for index, start, stop in batch for token in documents[index][start:stop]]
        hidden_ND = packed_hidden(model, inputs, allow_beyond_trained_length=allow_beyond_trained_length)
        logprobs_N = token_logprobs(hidden_ND, model.head_weight, torch.tensor(targets, device=device))
        for (index, _, _), piece in zip(batch, logprobs_N.split([len(row) for row in inputs]), strict=True):
            pieces[index].append(-piece.cpu().double())  # in this order: Apple's GPUs have no float64
    model.train(was_training)
    return [torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64) for parts in pieces]


Piece = tuple[int, int, int]
"""(document, first token, token after the last)."""


def _batches(documents: Sequence[Sequence[int]], sequence_length: int, batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces of at most `sequence_length` tokens, side by side up to `batch_tokens`."""
    batch: list[Piece] = []
    filled = 0
    for index, document in enumerate(documents):
        for start in range(0, len(document), sequence_length):
            stop = min(start + sequence_length, len(document))
            if batch and filled + stop - start > batch_tokens:
                yield batch
                batch, filled = [], 0
            batch.append((index, start, stop))
            filled += stop - start
    if batch:
        yield batch


@register("bpb")
def make(options: TaskOptions) -> Task[Text]:
    """The given text files, labelled by file; without any, the pond's validation documents, labelled by language."""
    if options.texts:
        texts: list[Text] = []
        for path, label in zip(options.texts, labels(options.texts), strict=True):
            of_path = [Text(text, label) for text in read_texts((path,), said_texts, TEXT_ONLY)]
            if not of_path:
                raise UserError(f"{path}: there is not one text to examine; leave it out of --text")
            texts += of_path
        return BitsPerByteTask(texts)
    return BitsPerByteTask(
        [Text(document.text, document.language) for document in validation_documents(find_world(options))]
    )
