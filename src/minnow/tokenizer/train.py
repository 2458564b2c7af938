"""Byte-level BPE training (Sennrich et al. 2016, on bytes as Radford et al. 2019)."""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minnow.config import UserError
from minnow.tokenizer.bytelevel import QWEN2_PATTERN, valid_unicode
from minnow.tokenizer.special import NUM_SPECIAL, SPECIAL_TOKENS, VISIBLE_TOKENS
from minnow.tokenizer.tokenizer import Tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, progress: bool = False
) -> Tokenizer:
    """Learn merges from `texts` until the vocabulary has `vocab_size` tokens, special tokens and bytes
    included.

    No normaliser and no unknown token: all 256 bytes are in the alphabet, so every text comes back as it was.
    The vocabulary stays smaller where no pair is left that occurs `min_frequency` times. The same texts in
    any order give the same tokenizer. Raises `UserError` for a `vocab_size` that cannot hold the bytes and
    the special tokens.
    """
    smallest = NUM_SPECIAL + 256
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}, but {NUM_SPECIAL} special tokens and 256 bytes need {smallest}: "
            f"ask for more (6400 is a good size for two languages)"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=progress,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((valid_unicode(text) for text in texts), trainer)

    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE_TOKENS
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)))
