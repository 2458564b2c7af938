"""Pictures in the web chat, in headless Chromium: chosen, dropped and pasted; shown, sent, saved."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from minnow.data.readers import read_rows
from minnow.data.records import parse_conversation
from minnow.tokenizer.chat import Message
from minnow.tokenizer.images import Image

from ..seeing import data_url, picture, picture_file, save_seeing_model
from ..stages.stage_helpers import save_parrot_model
from .serving_helpers import Running, serving
from .test_web_chat_browser import choose, export, page, pytestmark, say, script_answers

__all__ = ["page", "pytestmark"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`page` opens this server: `sees` comes first, so that it is the chosen model."""
    folder = tmp_path_factory.mktemp("served")
    models = {"sees": save_seeing_model(folder / "sees"), "reads": save_parrot_model(folder / "reads", "小鱼")}
    with serving(models) as running:
        yield running


PUT = """([content, how]) => {
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], "a.png", { type: "image/png" }));
  const about = { dataTransfer: carried, clipboardData: carried, bubbles: true, cancelable: true };
  const event = how === "drop" ? new DragEvent("drop", about) : new ClipboardEvent("paste", about);
  document.getElementById("input").dispatchEvent(event);
  return event.defaultPrevented;
}"""


def put(page: Any, data: bytes, how: str) -> bool:
    """Drop or paste a file; whether the page took it."""
    return bool(page.evaluate(PUT, [base64.b64encode(data).decode(), how]))


def shown(count: int) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": data_url(picture(seed))}} for seed in range(count)]


def test_a_chosen_picture_is_seen_answered_kept_and_saved(page: Any, tmp_path: Path) -> None:
    page.fill("#max_tokens", "8")
    page.set_input_files("#file", [picture_file(tmp_path, 0), picture_file(tmp_path, 1)])
    page.wait_for_selector("#pictures img:nth-of-type(1)")
    assert page.locator("#pictures img").count() == 2
    say(page, "What is this?")
    assert page.locator("#pictures img").count() == 0
    assert page.locator(".user .pictures img").count() == 2
    assert page.locator("article .error").count() == 0
    assert "tokens" in page.inner_text(".stats")
    assert page.evaluate("[...document.querySelectorAll('.user img')].every((image) => image.naturalWidth === 32)")
    page.reload()
    page.wait_for_selector(".user .pictures img")  # the tab remembers it
    ((_, row),) = read_rows([str(export(page, "#json", tmp_path))])
    asked = Message("user", "What is this?", images=(Image(picture(0)), Image(picture(1))))
    assert parse_conversation(row).messages[0] == asked
    assert f"![]({data_url(picture(0))})" in export(page, "#markdown", tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted_and_sent_without_words(page: Any, how: str) -> None:
    bodies = script_answers(page, [{"content": "A fish."}])
    assert put(page, picture(0), how)
    page.wait_for_selector("#pictures img")
    page.press("#input", "Enter")
    page.wait_for_selector("text=A fish.")
    assert bodies[0]["messages"] == [{"role": "user", "content": shown(1)}]
    assert page.locator(".user .text:visible").count() == 0


def test_a_picture_can_be_taken_back_and_stays_when_the_question_is_edited(page: Any, tmp_path: Path) -> None:
    bodies = script_answers(page, [{"content": "A fish."}], [{"content": "A frog."}])
    page.set_input_files("#file", [picture_file(tmp_path, 1), picture_file(tmp_path, 0)])
    page.wait_for_selector("#pictures img")
    page.click("#pictures .remove >> nth=0")
    say(page, "one")
    page.click(".edit")
    assert page.input_value("article textarea") == "one"
    page.fill("article textarea", "two")
    page.click(".save")
    page.wait_for_selector("text=A frog.")
    for body, text in zip(bodies, ("one", "two"), strict=True):
        assert body["messages"] == [{"role": "user", "content": [*shown(1), {"type": "text", "text": text}]}]


def test_a_photograph_is_made_small_enough_to_send(page: Any, tmp_path: Path) -> None:
    bodies = script_answers(page, [{"content": "A fish."}])
    PIL.Image.effect_noise((2000, 1000), 50).save(tmp_path / "photo.png")
    page.set_input_files("#file", tmp_path / "photo.png")
    page.wait_for_selector("#pictures img")
    page.press("#input", "Enter")
    page.wait_for_selector("text=A fish.")
    url = bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (768, 384)


def test_what_is_no_picture_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.wait_for_selector("text=notes.png is no picture that can be shown.")
    assert page.locator("#pictures img").count() == 0


def test_a_model_that_only_reads_is_shown_nothing(page: Any) -> None:
    assert page.is_visible("#picture")
    choose(page, "reads")
    assert page.is_hidden("#picture")
    assert put(page, picture(0), "drop")  # the browser does not leave the page for the file
    page.wait_for_timeout(200)
    assert page.locator("#pictures img").count() == 0
    choose(page, "sees")
    page.click("#language")
    assert page.inner_text("#picture") == "图片"
