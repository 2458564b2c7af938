"""The pictures of a row: how rows name them, and where they are found.

A user's content may be a list of parts, some of them pictures; that is the form all others are brought to (`in_place`):
`<image>` in the users' texts with the pictures beside the messages, in `image`, `images` or `image_bytes`.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from minnow.config import UserError
from minnow.data.picture_files import State, state_of
from minnow.data.values import RowError, checked_text, from_json, kind_of
from minnow.tokenizer.chat import Message
from minnow.tokenizer.images import Image, ImageFormat

PICTURE_KEYS = ("image", "images", "image_bytes")
"""Where a row has the pictures that stand beside its messages."""
MARKER = "<image>"
"""What stands in the text in the place of such a picture."""

_PARTS = ("image", "image_url")
_NOTHING: tuple[Any, ...] = (None, "", b"", [])
_DATA_URL = re.compile(r"data:[^,]*?(;base64)?,(.*)", re.DOTALL)
_MEDIA = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
_SHOWN_CHARACTERS = 100  # of a path, in a message


@dataclass(frozen=True)
class Pictures:
    """What is done with the pictures that rows name."""

    folder: str | None = ""
    """What paths are relative to: the folder of the file that names them, by default the one that minnow runs in. None:
    the rows come from somewhere else (a URL, the Hub), and their paths lead nowhere here."""
    use: Literal["read", "find", "skip", "refuse"] = "read"
    """read: have them in the messages; find: the same, but files are looked for and not read (their `data` is empty);
    skip: leave them out of the messages; refuse: whoever reads these rows reads only text."""
    image_format: ImageFormat | None = None
    """What they must be fit for: each that is read is decoded once. None: they are taken as they are."""
    seen: dict[str, State] | None = None
    """Files that are read are noted here, if anywhere."""

    @property
    def looks(self) -> bool:
        """Whether messages get their pictures."""
        return self.use in ("read", "find")

    def content(self, value: Any, what: str) -> tuple[str, tuple[Image, ...]]:
        """Read a user's content, a text or a list of parts; pictures stand where they stand. Raises RowError."""
        if not isinstance(value, list):
            return checked_text(value, what), ()
        text, images = "", []
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                text += checked_text(part.get("text"), what)
            elif kind not in _PARTS:
                raise RowError(f"{what} has a part that is neither text nor a picture (of `type` text or image)")
            elif self.use == "refuse":
                raise RowError(
                    f"{what} shows a picture, and only text is read here: `minnow vlm` is for models that look"
                )
            elif self.use != "skip":
                images.append(Image(self._file(_named(part, kind), what), len(text)))
        return text, tuple(images)

    def _file(self, value: Any, what: str) -> bytes:
        """The bytes of a picture's file, which is given itself, as a `data:` URL, or by its path."""
        if isinstance(value, Mapping):  # as `datasets` stores a picture
            value = value.get("bytes") or value.get("path")
        name = f"a picture of {what}"
        if isinstance(value, bytes):
            data = value
        elif not isinstance(value, str) or not value:
            raise RowError(f"{name} must be a path or a `data:` URL, it is {kind_of(value)}")
        elif value.startswith("data:"):
            data = _from_data_url(value, name)
        else:
            name, data = self._at_path(value, what)
        if self.use == "read" and self.image_format is not None:
            try:
                self.image_format.pixels(data)
            except UserError as error:
                raise RowError(f"{name}: {error}") from None
        return data

    def _at_path(self, path: str, what: str) -> tuple[str, bytes]:
        """What to call the file, and its content."""
        shown = path if len(path) <= _SHOWN_CHARACTERS else path[:_SHOWN_CHARACTERS] + "..."
        if re.match(r"https?://", path):
            raise RowError(f"{what} shows {shown}: pictures are not downloaded; fetch it and give its path")
        if self.folder is None:
            raise RowError(
                f"{what} shows {shown} by its path, and these rows lie in no folder here: give the file's content "
                "in `image_bytes`, or download rows and pictures"
            )
        place = Path(self.folder, path)
        try:
            if not place.is_file():
                raise RowError(f"{what} shows {Path(self.folder, shown)}, and there is no such file")
            data = place.read_bytes() if self.use == "read" else b""
            if self.use == "read" and self.seen is not None:
                self.seen[os.path.abspath(place)] = state_of(place, data)
            return str(place), data
        except (OSError, ValueError) as error:  # no name at all, perhaps: a picture's base64
            if isinstance(error, RowError):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise RowError(f"{what} shows {Path(self.folder, shown)}, which cannot be read: {reason}") from None


READ, TEXT_ONLY, TEXT_ALONE = Pictures(), Pictures(use="refuse"), Pictures(use="skip")
"""For those who look, those who cannot do with pictures, and those who do not need them."""


def in_place(contents: Sequence[Any], row: Mapping[str, Any], *, looks: bool = True) -> list[Any]:
    """The users' contents of a row with the pictures that stand beside them in their places, as parts.

    A row with `image_bytes` and no place for them is text: MiniMind-V fills the column with black pictures there. So is
    any row without a place for whoever does not look. Raises RowError where there are more or fewer pictures than
    places.
    """
    places = sum(map(_places, contents))
    if not places and not looks:
        return list(contents)
    key, values = _beside(row)
    if not values or (key == "image_bytes" and not places):
        return list(contents)
    if places != len(values):
        raise RowError(
            f"`{key}` has {len(values)} picture{'s' * (len(values) != 1)}, and the users' texts have {places} times "
            f"{MARKER}, in whose place one stands"
        )
    waiting = iter(values)
    return [_filled(content, waiting) if _places(content) else content for content in contents]


def has_pictures(row: Mapping[str, Any]) -> bool:
    """Whether pictures stand beside the row's texts."""
    return any(row.get(key) not in _NOTHING for key in PICTURE_KEYS)


def content_parts(message: Message) -> list[dict[str, Any]]:
    """A message's content as parts; its pictures are `data:` URLs."""
    parts: list[dict[str, Any]] = []
    borders = [0, *(image.offset for image in message.images), len(message.content)]
    texts = [message.content[start:stop] for start, stop in pairwise(borders)]
    for text, image in zip(texts, [*message.images, None], strict=True):
        if text:
            parts.append({"type": "text", "text": text})
        if image is not None:
            parts.append({"type": "image", "image": data_url(image.data)})
    return parts


def data_url(data: bytes) -> str:
    """A picture's file as a `data:` URL."""
    media = next((media for begin, media in _MEDIA.items() if data.startswith(begin)), "*")
    return f"data:image/{media};base64,{base64.b64encode(data).decode()}"


def relocated(row: Mapping[str, Any], lead: str | None) -> dict[str, Any]:
    """The row for a JSON file in another folder, from which `lead` leads to the one that its paths are relative to.

    lead: None leaves paths as they are. Pictures that the row holds itself become `data:` URLs. What is neither (a web
    address beside a text) stays.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value
        if isinstance(value, bytes):
            return data_url(value)
        is_path = isinstance(value, str) and not re.match(r"data:|https?://", value)
        return os.path.join(lead, value) if is_path and lead is not None else value

    def part(given: Any) -> Any:
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind not in _PARTS or _is_empty(given):
            return given
        value = moved(_named(given, kind))
        return {"type": kind, kind: value if kind == "image" else {"url": value}}

    new = {key: moved(row[key]) for key in ("image", "images") if row.get(key) is not None}
    if isinstance(row.get("image_bytes"), bytes | list):
        files = row["image_bytes"] if isinstance(row["image_bytes"], list) else [row["image_bytes"]]
        new["image_bytes"] = [data_url(file) if isinstance(file, bytes) else file for file in files]
    for key in ("conversations", "messages"):
        if row.get(key) is not None:
            new[key] = [
                {**item, "content": [part(each) for each in item["content"]]}
                if isinstance(item, Mapping) and isinstance(item.get("content"), list)
                else item
                for item in from_json(row[key], f"`{key}`")
            ]
    return {**row, **new}


def _is_base64(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith("data:")


def _beside(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The key under which the row has pictures, and these, as parts may name them."""
    given = [key for key in PICTURE_KEYS if row.get(key) not in _NOTHING]
    if len(given) > 1:
        raise RowError(f"pictures both in `{given[0]}` and in `{given[1]}`")
    if not given:
        return "", []
    values = row[given[0]]
    values = values if isinstance(values, list) else [values]
    if given[0] == "image_bytes":  # JSON has no bytes: base64
        values = [f"data:;base64,{value}" if _is_base64(value) else value for value in values]
    return given[0], values


def _places(content: Any) -> int:
    """In how many places of a user's content a picture stands that the row has beside it."""
    if isinstance(content, str):
        return content.count(MARKER)
    if not isinstance(content, list):
        return 0
    return sum(_is_empty(part) for part in content)


def _is_empty(part: Any) -> bool:
    """A part that says that there is a picture, and not which: TRL's and transformers' rows."""
    return isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is None


def _filled(content: Any, waiting: Iterator[Any]) -> list[Any]:
    if isinstance(content, list):
        return [{"type": "image", "image": next(waiting)} if _is_empty(part) else part for part in content]
    first, *others = content.split(MARKER)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image", "image": next(waiting)}, {"type": "text", "text": text}]
    return parts


def _named(part: Mapping[str, Any], kind: str) -> Any:
    """What stands in a part for its picture."""
    value = part.get(kind)
    return value.get("url") if kind == "image_url" and isinstance(value, Mapping) else value


def _from_data_url(url: str, name: str) -> bytes:
    match = _DATA_URL.fullmatch(url)
    if match is None or not match[1]:
        raise RowError(f"{name} is a `data:` URL without base64: write data:image/png;base64,...")
    try:
        return base64.b64decode("".join(match[2].split()), validate=True)
    except ValueError as error:  # of characters that are not ASCII it is no binascii.Error
        raise RowError(f"{name} is no base64: {error}") from None
