"""From raw rows to token arrays: what the worker processes do. Imports neither torch nor the readers of big formats."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from minnow.data.long_conversations import Piece, cut_conversation
from minnow.data.pairs import PreferencePair, parse_preference
from minnow.data.picture_files import State
from minnow.data.pictures import Pictures
from minnow.data.progress import NUM_SHOWN
from minnow.data.readers import Raw, parse_row
from minnow.data.records import Document, canonical, parse_conversation, parse_document
from minnow.data.shards import token_dtype
from minnow.data.values import RowError
from minnow.tokenizer.chat import Conversation, training_examples
from minnow.tokenizer.images import ImageFormat
from minnow.tokenizer.tokenizer import Tokenizer

Example = Document | Conversation | PreferencePair
Kind = Literal["pretrain", "sft", "preference"]
Side = Literal["split", "train", "validation"]


def documents_per_example(kind: Kind) -> int:
    """How many documents that follow one another belong together: the two answers of a pair."""
    return 2 if kind == "preference" else 1


@dataclass(frozen=True)
class RawBatch:
    """Rows as they were read, and the place of what becomes of them."""

    entry: int
    """Which of the given paths they come from."""
    lot: int
    shard: int
    """Shard of the lot."""
    place: float
    """Where in the path the shard lies, see `Lot.place`."""
    rows: list[tuple[int, int, Raw]]
    """(span of the lot, number in it, row)."""
    folders: tuple[str | None, ...]
    """For each span of the lot: the folder that paths of pictures are relative to, see `Source.folder`."""
    closes: bool
    """Whether the shard ends with this batch."""
    last: bool
    """Whether the lot does."""


@dataclass(frozen=True)
class EncodeOptions:
    """All that decides what becomes of a row, besides the tokenizer."""

    kind: Kind
    sequence_length: int
    weights: tuple[float, ...]
    """Weight of each path in the mixture."""
    sides: tuple[Side, ...]
    """For each path: split by hash, or all to one side."""
    image_format: ImageFormat | None = None
    """How the model looks at pictures; None for one that only reads."""
    tag_weight: float = 1.0
    """Loss weight of the tags of an assistant's turn."""
    threshold: int = 0
    """A document whose 64-bit hash lies below this is validation."""


@dataclass
class Checked:
    """What one look at rows found, without tokenising."""

    counts: Counter[str] = field(default_factory=Counter)
    """rows, bad_rows, documents, text_bytes."""
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    """(span, number, what is wrong) of the first bad rows."""
    lowest: int = (1 << 64) - 1
    highest: int = 0
    """Extremes of the split hashes."""
    picture_files: dict[str, State] = field(default_factory=dict)
    """Files that pictures were read from, see `remember`."""


@dataclass
class Encoded(Checked):
    """Rows as tokens; document i is `lengths[i]` of them. Counts cuts as well."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    weights: np.ndarray | None = None
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    text_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    images: list[bytes] = field(default_factory=list)
    """The pictures' files, in the order of the tokens."""
    image_places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Where in `tokens` each picture's first image token stands."""
    copies: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    is_validation: np.ndarray = field(default_factory=lambda: np.empty(0, bool))


def check(batch: RawBatch, options: EncodeOptions) -> Checked:
    """Parse every row and say what is wrong with which, and how the split hashes lie.

    Pictures in files of their own are looked for and not read: that is half of the work of encoding.
    """
    found = Checked()
    for _ in _examples(batch, options, found, "find"):
        pass
    return found


def encode(batch: RawBatch, options: EncodeOptions, tokenizer: Tokenizer, *, num_threads: int) -> Encoded:
    """Tokenise every good row, texts in `num_threads` threads. A row with a picture that does not decode is bad."""
    found = Encoded()
    kept = list(_examples(batch, options, found, "read"))
    if options.kind == "pretrain":
        _encode_documents(found, [example for example, _, _ in kept], tokenizer, num_threads)  # type: ignore[misc]
        repeats = np.ones(len(kept), np.int64)
    elif options.kind == "sft":
        conversations: list[Conversation] = [example for example, _, _ in kept]  # type: ignore[misc]
        repeats = _encode_conversations(found, conversations, tokenizer, options)
    else:
        pairs: list[PreferencePair] = [example for example, _, _ in kept]  # type: ignore[misc]
        repeats = _encode_pairs(found, pairs, tokenizer, options.sequence_length)
    found.copies = np.repeat(np.array([copies for _, copies, _ in kept], np.int64), repeats)
    found.is_validation = np.repeat(np.array([side for _, _, side in kept], bool), repeats)
    return found


def _parse(kind: Kind, row: Mapping[str, Any], pictures: Pictures) -> Example:
    if kind == "sft":
        return parse_conversation(row, pictures)
    return parse_document(row) if kind == "pretrain" else parse_preference(row)


def _examples(
    batch: RawBatch, options: EncodeOptions, found: Checked, use: Literal["find", "read"]
) -> Iterator[tuple[Example, int, bool]]:
    """Yield (example, copies, is validation) of the good rows that the mixture takes; note the bad ones."""
    looks = options.image_format is not None
    pictures = [
        Pictures(folder, use if looks else "refuse", options.image_format, found.picture_files)
        for folder in batch.folders
    ]
    weight, side = options.weights[batch.entry], options.sides[batch.entry]
    for span, number, raw in batch.rows:
        found.counts["rows"] += 1
        try:
            example = _parse(options.kind, parse_row(raw), pictures[span])
        except RowError as error:
            found.counts["bad_rows"] += 1
            if len(found.bad) < NUM_SHOWN:
                found.bad.append((span, number, str(error)))
            continue
        content = example.canonical() if isinstance(example, PreferencePair) else canonical(example)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        split_hash, mixture_hash = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:]))
        copies = int(weight) + (mixture_hash < (weight % 1) * 2**64)
        if not copies:
            continue
        is_validation = side == "validation" or (side == "split" and split_hash < options.threshold)
        if side == "split":
            found.lowest, found.highest = min(found.lowest, split_hash), max(found.highest, split_hash)
        found.counts["documents"] += 1
        found.counts["text_bytes"] += len(content)
        yield example, 1 if is_validation else copies, is_validation


def _encode_documents(found: Encoded, documents: list[Document], tokenizer: Tokenizer, num_threads: int) -> None:
    texts = [document.text for document in documents]
    tokens = array("I")  # takes a list of ids three times faster than numpy does
    lengths = []
    for ids in tokenizer.encode_batch(texts, num_threads=num_threads):
        tokens.append(tokenizer.start_id)
        tokens.fromlist(ids)
        tokens.append(tokenizer.end_of_text_id)
        lengths.append(len(ids) + 2)
    found.tokens = np.array(tokens, token_dtype(tokenizer.vocab_size))
    found.lengths = np.array(lengths, np.int64)
    found.text_bytes = np.array([len(text.encode()) for text in texts], np.int64)


def _encode_conversations(
    found: Encoded, conversations: list[Conversation], tokenizer: Tokenizer, options: EncodeOptions
) -> np.ndarray:
    """Returns how many documents each conversation became."""
    pieces_of_all: list[Piece] = []
    repeats = []
    sequence_length = options.sequence_length
    for conversation in conversations:
        num_pieces = 0
        for rendered in training_examples(tokenizer, conversation, tag_weight=options.tag_weight):
            if rendered.images and len(rendered.ids) > sequence_length + 1:
                found.counts["long_shown"] += 1  # a cut could part an answer from the picture that it speaks of
                continue
            found.images += rendered.images
            pieces, long_turns = cut_conversation(rendered, sequence_length)
            if len(rendered.ids) > sequence_length + 1:
                found.counts["cut_conversations"] += 1
                found.counts["cut_pieces"] += len(pieces)
                found.counts["long_turns"] += long_turns
                found.counts["long_systems"] += int(rendered.turn_starts[0]) > sequence_length
            pieces_of_all += pieces
            num_pieces += len(pieces)
        repeats.append(num_pieces)
    _store(found, pieces_of_all, tokenizer)
    if options.image_format is not None:
        found.image_places = np.flatnonzero(found.tokens == tokenizer.image_id)[:: options.image_format.num_tokens]
        assert len(found.image_places) == len(found.images)
    return np.array(repeats, np.int64)


def _encode_pairs(
    found: Encoded, pairs: list[PreferencePair], tokenizer: Tokenizer, sequence_length: int
) -> np.ndarray:
    """Two documents a pair, chosen and rejected, or none where they do not fit a row; returns how many each became.

    Each ends in an end-of-text token that is never an input: so the last position of a piece has read the whole
    conversation, which is where a reward model looks.
    """
    answers: list[Piece] = []
    repeats = []
    for pair in pairs:
        both = pair.render(tokenizer)
        fits = sum(len(rendered.ids) for rendered in both) <= sequence_length
        found.counts["long_pairs"] += not fits
        repeats.append(2 * fits)
        if fits:
            for rendered in both:
                answers.append((np.append(rendered.ids, tokenizer.end_of_text_id), np.append(rendered.weights, 0.0)))
    _store(found, answers, tokenizer)
    return np.array(repeats, np.int64)


def _store(found: Encoded, pieces: Sequence[Piece], tokenizer: Tokenizer) -> None:
    """Lay weighted documents one after the other."""
    token_bytes = _token_bytes(tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    found.tokens = np.concatenate([np.empty(0, dtype), *(ids for ids, _ in pieces)]).astype(dtype)
    found.weights = np.concatenate([np.empty(0, np.float16), *(weights for _, weights in pieces)]).astype(np.float16)
    found.lengths = np.array([len(ids) for ids, _ in pieces], np.int64)
    supervised_bytes = [token_bytes[ids[1:]][weights[1:] > 0].sum() for ids, weights in pieces]
    found.text_bytes = np.array(supervised_bytes, np.int64)


_bytes_of: dict[str, np.ndarray] = {}


def _token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """`Tokenizer.token_bytes`, built once a process."""
    if tokenizer.fingerprint not in _bytes_of:
        _bytes_of[tokenizer.fingerprint] = tokenizer.token_bytes()
    return _bytes_of[tokenizer.fingerprint]
