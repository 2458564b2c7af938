"""What an operator decides about a server."""

from __future__ import annotations

from dataclasses import dataclass

from minnow.config import UserError


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Limits and access."""

    api_key: str | None = None
    """Key that clients must send as `Authorization: Bearer KEY` (a browser: as the password); better given in the
    environment as MINNOW_API_KEY, where `ps` does not show it."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the server from a browser, e.g. https://chat.example.org; none by default."""
    max_answers: int = 256
    """Most answers of one model and its adapters under way or waiting at once, a request for embeddings counting as
    one; further requests get status 429."""
    max_samples: int = 64
    """Most answers that one request may ask for: prompts x n."""
    max_answer_tokens: int | None = None
    """Most tokens of one answer, whatever the request says; null leaves it to the context."""
    max_body_mib: float = 4.0
    """Largest request body in MiB; larger ones get status 413."""
    drain_seconds: int = 60
    """On SIGTERM and Ctrl-C, seconds in which the answers under way may finish."""

    chat_table: str | None = None
    """JSON file {"minnow": {"colour": "silver"}} that models may look things up in, in the web chat."""

    def __post_init__(self) -> None:
        for name in ("max_answers", "max_samples", "max_answer_tokens", "max_body_mib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}, but must be positive")
        if self.drain_seconds < 0:
            raise UserError(f"drain_seconds is {self.drain_seconds}, but must be 0 or more")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UserError("api_key must be printable ASCII, at least one character: it travels in an HTTP header")
