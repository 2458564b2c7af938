"""JSON over HTTP to a model server, with patience for busy ones."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from minnow.config import UserError

ATTEMPTS = 4


def post_json(url: str, body: dict[str, Any], *, key: str, seconds: float) -> Any:
    """The JSON reply. Busy (429) and broken (5xx, no connection) servers are asked again with a growing pause.

    UserError when it stays so, or at once for any other refusal.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, HTTPException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{url} could not be asked ({problem})")
