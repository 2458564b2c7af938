"""Log-probabilities as OpenAI writes them, from the model's own distribution (before temperature and filters)."""

from __future__ import annotations

from minnow.engine import Delta
from minnow.serving.responses import TokenLogprob
from minnow.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity (and for what is no number), which JSON has not."""


def token_logprob(tokenizer: Tokenizer, delta: Delta) -> TokenLogprob | None:
    """The entry of a delta's token; None where log-probabilities were not asked for."""
    if delta.raw_logprob is None:
        return None
    likeliest = delta.top_logprobs or ()
    return {
        "token": token_text(tokenizer, delta.id),
        "logprob": finite(delta.raw_logprob),
        "bytes": list(_token_bytes(tokenizer, delta.id)),
        "top_logprobs": [
            {
                "token": token_text(tokenizer, token),
                "logprob": finite(logprob),
                "bytes": list(_token_bytes(tokenizer, token)),
            }
            for token, logprob in likeliest
        ],
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; a part of a character reads `bytes:\\xe5\\xb0`."""
    own = _token_bytes(tokenizer, token)
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def finite(logprob: float) -> float:
    """A number that JSON can write."""
    return logprob if logprob > _LOWEST else _LOWEST


def _token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    if token >= tokenizer.vocab_size:  # a model's vocabulary may be padded beyond the tokenizer's
        return b""
    return tokenizer.byte_strings[token] or tokenizer.decode([token]).encode()
