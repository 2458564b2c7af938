"""The rows that the handbook shows are read, as the kind that it says, and it names all keys that readers know."""

import base64
import json
import re
from pathlib import Path

import pytest

from minnow.data.pairs import SIDES, parse_preference
from minnow.data.pictures import Pictures
from minnow.data.prompts import ASKED_KEYS, REFERENCE_KEYS, parse_prompt
from minnow.data.records import (
    _ROLES,
    CONVERSATION_KEYS,
    OTHER_KEYS,
    TEXT_KEYS,
    parse_conversation,
    parse_document,
)
from minnow.tokenizer.images import ImageFormat

DOCS = Path(__file__).parents[2] / "docs"
PARSERS = {
    "text": parse_document,
    "conversation": parse_conversation,
    "preference": parse_preference,
    "prompt": parse_prompt,
}
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
_, *PARTS = re.split(rf"^\*\*({'|'.join(PARSERS)})\*\*", PAGE, flags=re.MULTILINE)
EXAMPLES = [
    (kind, line)
    for kind, part in zip(PARTS[::2], PARTS[1::2], strict=True)
    for line in re.findall(r"```json\n(.*?)```", part, re.DOTALL)[0].splitlines()
]
PICTURES = re.findall(r"### Pictures.*?```json\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()
KEYS = [*TEXT_KEYS, *CONVERSATION_KEYS, *OTHER_KEYS, *SIDES, *ASKED_KEYS, *REFERENCE_KEYS, *_ROLES]


@pytest.mark.parametrize(("kind", "line"), EXAMPLES)
def test_example_rows_are_read(kind, line):
    PARSERS[kind](json.loads(line))


@pytest.mark.parametrize("line", PICTURES)
def test_example_rows_show_their_pictures(line, tmp_path):
    (tmp_path / "pictures").mkdir()
    dot = base64.b64decode(json.loads(PICTURES[5])["image_bytes"])
    for name in ("otter", "owl"):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(dot)
    pictures = Pictures(str(tmp_path), image_format=ImageFormat(16, 8))  # they decode
    first, *_ = parse_conversation(json.loads(line), pictures).messages
    assert [image.data for image in first.images] == [dot] * max(line.count("otter.png") + line.count("owl.png"), 1)
    assert "<image>" not in first.content


@pytest.mark.parametrize("page", ["tools.md", "reasoning.md"])
def test_example_conversations_of_other_pages_are_read(page):
    blocks = re.findall(r"```json\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_conversation(json.loads(block))


def test_every_kind_has_examples():
    assert {kind for kind, _ in EXAMPLES} == set(PARSERS)
    assert PAGE.count("```json") == len(PARSERS) + 1


@pytest.mark.parametrize("key", KEYS)
def test_every_key_and_role_is_named(key):
    assert f"`{key}`" in PAGE
