"""`Tokenizer`: text <-> token ids, over a `tokenizers` tokenizer and tiktoken's core.

Text is only ever text: `<|im_end|>` written in a document or by a user becomes ordinary bytes. Control tokens
come from structure alone (document borders, `minnow.tokenizer.chat.render`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from minnow.config import UserError
from minnow.tokenizer import fast, files, template
from minnow.tokenizer.bytelevel import is_control, token_byte_strings, valid_unicode
from minnow.tokenizer.images import ImageFormat
from minnow.tokenizer.roles import Roles
from minnow.tokenizer.special import CHAT_TOKENS, IM_END, IM_START, IMAGE

_STARTS = ("", "a", " ", "\n")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; build one with `from_pretrained` or
    `minnow.tokenizer.train.train_tokenizer`.

    `roles` name the tokens that begin, end and fill; `chat_template` is the one it came with, which is
    saved with it: by default minnow's, where the tokens for it are there. `image_format` is what the model beside it
    looks at, None where it only reads. Raises `UserError` where the vocabulary
    lacks an end of text, or where the text of a control token could not be told from the token itself.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        roles: Roles | None = None,
        chat_template: str | None = None,
        image_format: ImageFormat | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._definition = json.loads(tokenizer.to_str())
        added = self._definition["added_tokens"]
        self.special_ids: dict[str, int] = {t["content"]: t["id"] for t in added if is_control(t)}
        """Id of every control token, by its text."""
        self.hidden_tokens = frozenset(t["content"] for t in added if t["special"])
        """Control tokens that `skip_special_tokens` leaves out of decoded text."""
        self.roles = roles or Roles()
        if self.roles.end_of_text not in self.special_ids:
            raise UserError(
                f"the tokenizer has no {self.roles.end_of_text!r} among its special tokens to end a document with"
            )
        if self.has_chat_tokens:  # then we write turns, and those end so
            self.roles = replace(self.roles, eos=IM_END)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """Largest id + 1: special and reserved tokens included."""
        self.image_format = image_format
        """How pictures are put to the model; None for one that only reads."""
        self.chat_template = chat_template or (template.chat_template() if self.has_chat_tokens else None)
        """What other programs render conversations by (Jinja); minnow always renders by its own template."""

        # Text goes through a tokenizer that does not know the control tokens, so it cannot write one.
        ordinary = self._definition | {
            "added_tokens": [token for token in added if not is_control(token)],
            "post_processor": None,
        }
        self._ordinary = tokenizers.Tokenizer.from_str(json.dumps(ordinary))
        self._core = fast.build(self._definition)
        # Behind other text too: at a text's start some tokenizers set a blank, which a first merge may take.
        forged = [t for t, i in self.special_ids.items() if any(i in self.encode(start + t) for start in _STARTS)]
        if forged:
            raise UserError(
                f"the tokenizer reads the text {forged[0]!r} as that control token: any text could forge it"
            )

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> Tokenizer:
        """Load from a model or tokenizer folder, a run folder (its `model/`), or a Hugging Face Hub id."""
        return cls(*files.load(folder_or_hub_id))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where there is a chat template, chat_template.jinja.

        With an `image_format` also preprocessor_config.json and processor_config.json.
        """
        files.save(Path(folder), self._tokenizer, self.roles, self.chat_template, self.image_format)

    @property
    def definition(self) -> dict[str, Any]:
        """The parsed tokenizer.json."""
        return self._definition

    @property
    def end_of_text_id(self) -> int:
        """Id that stands after every document."""
        return self.special_ids[self.roles.end_of_text]

    @property
    def start_id(self) -> int:
        """Id that stands before every document: BOS where the tokenizer puts one before a text, else end of text."""
        return self.special_ids[self.roles.bos] if self.roles.adds_bos else self.end_of_text_id

    @property
    def bos_id(self) -> int:
        """Id of `bos_token`, which need not be put before a text."""
        return self.special_ids[self.roles.bos]

    @property
    def eos_id(self) -> int:
        """Id of `eos_token`: the end of a turn where the model writes turns."""
        return self.special_ids[self.roles.eos]

    @property
    def pad_id(self) -> int:
        """Id of filler."""
        return self.special_ids[self.roles.pad]

    @property
    def stop_ids(self) -> list[int]:
        """Ids with which a turn or a document ends, the more usual one first."""
        return list(dict.fromkeys([self.eos_id, self.end_of_text_id]))

    @property
    def im_start_id(self) -> int:
        """Id that opens a turn. Raises `UserError` without chat tokens."""
        self.require_chat_tokens()
        return self.special_ids[IM_START]

    @property
    def im_end_id(self) -> int:
        """Id that ends a turn. Raises `UserError` without chat tokens."""
        self.require_chat_tokens()
        return self.special_ids[IM_END]

    @property
    def foreign_template(self) -> str | None:
        """What the chat template writes otherwise than minnow does, as a phrase; None where they agree."""
        found = template.differences(self.chat_template) if self.chat_template is not None else []
        return f"another chat template than minnow's (it writes {', '.join(found)} otherwise)" if found else None

    @property
    def has_chat_tokens(self) -> bool:
        """Whether the chat template can be rendered."""
        return all(token in self.special_ids for token in CHAT_TOKENS)

    def require_chat_tokens(self) -> None:
        """Raise `UserError` that names the chat tokens this tokenizer lacks."""
        missing = [token for token in CHAT_TOKENS if token not in self.special_ids]
        if missing:
            raise UserError(
                f"this tokenizer cannot chat: its special tokens lack {', '.join(missing)}; "
                "use one made by `minnow tokenizer train`, or one that has them"
            )

    @property
    def image_id(self) -> int:
        """Id that stands for a patch of a picture. Raises `UserError` where pictures cannot be shown."""
        self.require_images()
        return self.special_ids[IMAGE]

    def require_images(self) -> ImageFormat:
        """How pictures are put to the model. Raises `UserError` for one that only reads."""
        if self.image_format is None:
            raise UserError("the model reads text only, and was shown a picture: `minnow vlm` teaches a model to see")
        if IMAGE not in self.special_ids:
            raise UserError(f"this tokenizer cannot show pictures: its special tokens lack {IMAGE}")
        return self.image_format

    def require_chat_template(self, whose: str) -> None:
        """Raise `UserError` where minnow does not write conversations as WHOSE model was taught them."""
        self.require_chat_tokens()
        if (foreign := self.foreign_template) is not None:
            raise UserError(
                f"{whose} came with {foreign}: it would read conversations in a form that it was not taught. Teach it "
                f"minnow's first: minnow sft --init_from {whose} --replace_chat_template true --data.paths ..."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added; control-token text inside becomes ordinary bytes.

        Half a surrogate pair, which has no UTF-8, is read as U+FFFD.
        """
        if self._core is not None and fast.can_encode(text):
            return self._core.encode_ordinary(text)
        try:
            return list(self._ordinary.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            return list(self._ordinary.encode(valid_unicode(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 2) -> list[list[int]]:
        """`encode` of every text, in `num_threads` threads."""
        if self._core is not None:
            if all(map(fast.can_encode, texts)):
                return fast.encode_batch(self._core, texts, num_threads)
            return [self.encode(text) for text in texts]
        try:
            encodings = self._ordinary.encode_batch(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            texts = [valid_unicode(text) for text in texts]
            encodings = self._ordinary.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 show as U+FFFD.

        `skip_special_tokens` leaves out the tokens that tokenizer.json marks special; `<think>`,
        `<tool_call>` and their kind are not and stay.
        """
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))

    @cached_property
    def byte_strings(self) -> list[bytes]:
        """Bytes that each id adds to a text; b"" for control tokens."""
        return token_byte_strings(self._definition, self.vocab_size)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each token stands for: int32 [vocab_size]; 0 for control tokens."""
        return np.array([len(string) for string in self.byte_strings], dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides ids and rendering: vocabulary, merges, pre-tokenizer, chat template, and how
        pictures are put to the model."""
        if self.image_format is None:
            return self.text_fingerprint
        decisive = [self.text_fingerprint, self.image_format.image_size, self.image_format.patch_size]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    @cached_property
    def text_fingerprint(self) -> str:
        """The same without pictures: two models whose ids stand for the same texts share it, whatever they look at."""
        decisive = self._definition | {
            "begin_and_end": [self.start_id, self.end_of_text_id],
            "chat_template": template.chat_template(),  # what renders, whatever the folder's own says
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
