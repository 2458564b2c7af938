"""Text from token ids as they come, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from minnow.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes a stream of ids without ever giving half a character.

    A Chinese character may be spread over three tokens: its bytes are held back until the last of them.
    Everything given so far, with `finish()`, is what `Tokenizer.decode` gives for the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._strings = tokenizer.byte_strings
        self._control = {
            index: "" if skip_special_tokens and token in tokenizer.hidden_tokens else token
            for token, index in tokenizer.special_ids.items()
        }
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Add one id or several; the text that is now complete."""
        text = ""
        for index in (ids,) if isinstance(ids, int) else ids:
            if index in self._control:
                text += self._decoder.decode(b"", final=True) + self._control[index]
            else:
                text += self._decoder.decode(self._strings[index])
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for half a character. The decoder can then be used again."""
        return self._decoder.decode(b"", final=True)
