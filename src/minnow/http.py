"""JSON over HTTP to a model server, with patience for busy ones."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar

from minnow.config import UserError

ATTEMPTS = 4

T = TypeVar("T")


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows nowhere: urllib would hand the key to whatever host is named, and ask it without the question."""

    def redirect_request(self, *_: Any) -> None:
        """Make a redirection an HTTPError."""


_OPENER = urllib.request.build_opener(_StayHere)


def post_json(
    url: str,
    body: dict[str, Any],
    read: Callable[[Any], T],
    *,
    key: str | None,
    seconds: float,
    attempts: int = ATTEMPTS,
    pause: float = 1.0,
    before: Callable[[], None] = lambda: None,
) -> T:
    """What `read` finds in the JSON reply.

    Busy (429) and broken (5xx, no connection, a reply in which `read` does not find its way) servers are asked again,
    up to `attempts` times, after `pause` seconds that double each time. `before` is called ahead of each try. An empty
    reply is None.

    UserError when it stays so, or at once for any other refusal.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        before()
        try:
            with _OPENER.open(request, timeout=seconds) as response:
                reply = json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            if 300 <= error.code < 400 and (elsewhere := error.headers["Location"]):
                problem = f"HTTP {error.code}: it sends on to {elsewhere}: name that address"
                break
            problem = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code != 429:
                break
            continue
        except (OSError, HTTPException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        try:
            return read(reply)
        except (LookupError, TypeError, AttributeError) as error:
            problem = f"it replied without an answer: {type(error).__name__} {error}"
    raise UserError(f"{url} could not be asked ({problem})")
