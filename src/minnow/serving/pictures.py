"""Pictures that clients send: within the request, as data: URLs. The server fetches nothing and reads no file."""

from __future__ import annotations

import base64
import re

from minnow.serving.errors import APIError

MAX_PICTURES = 16
"""Most pictures of a request: a small file may take two seconds to decode."""

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)


def picture_data(url: str, where: str) -> bytes:
    """The file in a data: URL; whether it is a picture shows when it is decoded. APIError 400 for any other address."""
    header = _DATA_URL.match(url)
    if header is None:
        reason = (
            "this server fetches nothing and reads no files: send the picture itself, as data:image/png;base64,... "
            "(or image/jpeg, image/webp, image/gif)"
        )
        raise APIError(400, f"Invalid value for '{where}': {reason}", param="messages")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except ValueError as error:  # also of characters that are not ASCII, which is no binascii.Error
        raise APIError(
            400, f"Invalid value for '{where}': what follows the comma is no base64", param="messages"
        ) from error
