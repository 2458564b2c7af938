"""Pictures in chat requests: OpenAI's parts with data: URLs, and nothing else."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import PIL.Image
import pytest

from minnow.engine import Engine, SamplingParams
from minnow.serving import ServingConfig
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.images import Image, ImageFormat

from ..seeing import data_url, picture, save_seeing_model
from ..stages.stage_helpers import save_random_model
from .serving_helpers import Running, serving

SAMPLING = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    models = {"sees": save_seeing_model(folder / "sees"), "reads": save_random_model(folder / "reads", context=256)}
    with serving(models) as running:
        yield running


def part(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def asked(*parts: dict[str, Any] | str) -> list[Any]:
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return [{"role": "user", "content": content}]


def expected(running: Running, text: str, *images: Image, folder: Path | None = None) -> tuple[list[int], str]:
    """The prompt's ids, and what an engine of its own says to it."""
    engine = Engine.from_pretrained(folder or running.app.state.minnow.models.get("sees").folder)
    message = Message("user", text, images=images)
    prompt = render(engine.tokenizer, Conversation((message,)), add_generation_prompt=True)
    (output,) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    return output.prompt_ids, output.completions[0].text


def test_openais_client_shows_pictures_in_their_places(running: Running) -> None:
    shown = [Image(picture(0), 0), Image(picture(1), 8)]
    ids, text = expected(running, "What is this?", *shown)
    messages = asked(part(data_url(picture(0)), detail="high"), "What is ", part(data_url(picture(1))), "this?")
    answer = running.client().chat.completions.create(model="sees", messages=messages, **SAMPLING)
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    others = asked(part(data_url(picture(1))), "What is ", part(data_url(picture(0))), "this?")
    other = running.client().chat.completions.create(model="sees", messages=others, **SAMPLING)
    assert other.choices[0].message.content != text


def test_a_stream_is_the_same_answer(running: Running) -> None:
    ids, text = expected(running, "And this?", Image(picture(2)))
    stream = running.client().chat.completions.create(
        model="sees",
        messages=asked(part(data_url(picture(2))), "And this?"),
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLING,
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.prompt_tokens == len(ids)


def test_the_same_picture_is_found_in_the_cache_and_another_is_not(running: Running) -> None:
    def cached(seed: int) -> int:
        messages = asked(part(data_url(picture(seed))), "What swims in the pond, little minnow?")
        answer = running.client().chat.completions.create(model="sees", messages=messages, **SAMPLING)
        return answer.usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr, return-value]

    assert cached(7) < 16 <= cached(7)  # a block has 16 tokens, and the picture stands in the first
    assert cached(8) < 16


@pytest.mark.parametrize(
    ("kind", "media"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/GIF")]
)
def test_the_usual_kinds(running: Running, kind: str, media: str) -> None:
    _, text = expected(running, "", Image(picture(3, kind)))
    messages = asked(part(data_url(picture(3, kind), media)))
    answer = running.client().chat.completions.create(model="sees", messages=messages, **SAMPLING)
    assert answer.choices[0].message.content == text


FETCHED = "fetches nothing and reads no files"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/a.png", FETCHED),
        ("https://example.org/a.png", FETCHED),
        ("file:///etc/passwd", FETCHED),
        ("/etc/passwd", FETCHED),
        ("", FETCHED),
        (" " + data_url(picture(0)), FETCHED),
        (data_url(picture(0), "image/svg+xml"), FETCHED),
        (data_url(picture(0), "text/plain"), FETCHED),
        (data_url(picture(0)).replace(";base64", ""), FETCHED),
        ("data:image/png;base64,", "not a picture that can be read"),
        ("data:image/png;base64,####", "no base64"),
        ("data:image/png;base64,é", "no base64"),
        (data_url(picture(0))[:-6], "no base64"),
        (data_url(b"no picture"), "not a picture that can be read"),
        (data_url(picture(0)[:60]), "not a picture that can be read"),
    ],
)
def test_anything_else_is_a_400_in_words(running: Running, url: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        running.client().chat.completions.create(model="sees", messages=asked("What?", part(url)), **SAMPLING)
    assert caught.value.param == "messages"
    assert running.engines["sees"].in_flight == 0


def test_a_model_that_only_reads_says_so(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="`reads` reads text only") as caught:
        running.client().chat.completions.create(model="reads", messages=asked(part(data_url(picture(0)))))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_pictures(running: Running, role: str) -> None:
    messages = [{"role": role, "content": [part(data_url(picture(0)))]}, *asked("hi")]
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content\.0"):
        running.client().chat.completions.create(model="sees", messages=messages)  # type: ignore[arg-type]


def test_pictures_of_a_request_are_bounded(running: Running) -> None:
    url = data_url(picture(0))
    ask = {"model": "sees", "max_tokens": 1}
    client = running.client()
    assert client.chat.completions.create(**ask, messages=asked(*[part(url)] * 16)).usage is not None
    with pytest.raises(openai.BadRequestError, match="17 pictures; at most 16"):
        client.chat.completions.create(**ask, messages=[*asked(*[part(url)] * 9), *asked(*[part(url)] * 8)])


def test_a_picture_that_is_huge_is_refused(running: Running) -> None:
    file = io.BytesIO()
    PIL.Image.new("1", (9000, 8000)).save(file, "PNG")
    assert len(file.getvalue()) < 10_000
    answer = post(running, part(data_url(file.getvalue())))
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert said == "Invalid value for 'messages': a picture of 9000 x 8000 pixels: at most 67,108,864 are read"


def test_what_is_no_picture_is_told_without_an_address_in_memory(running: Running) -> None:
    said = post(running, part(data_url(b"no picture"))).json()["error"]["message"]
    assert said == "Invalid value for 'messages': not a picture that can be read (PNG, JPEG, WEBP, GIF, BMP)"


def test_a_pictures_tokens_among_the_ids_of_a_text_completion_are_refused(running: Running) -> None:
    image_id = running.engines["sees"].engine.tokenizer.image_id
    with pytest.raises(openai.BadRequestError, match="image tokens"):
        running.client().completions.create(model="sees", prompt=[50, *[image_id] * 4, 60])
    running.client().completions.create(model="reads", prompt=[50, *[image_id] * 4, 60], max_tokens=1)  # like others
    running.client().completions.create(model="sees", prompt=[50, image_id, 60], max_tokens=1)  # an answer, sent back


def test_the_list_of_models_says_who_sees(running: Running) -> None:
    cards = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert {card["id"]: card["architecture"]["input_modalities"] for card in cards} == {
        "sees": ["text", "image"],
        "reads": ["text"],
    }


@contextmanager
def held_in_decoding(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[httpx.Response]]:
    """Within it a picture is being decoded; the answer to who showed it is there afterwards."""
    began, go_on = threading.Event(), threading.Event()
    pixels = ImageFormat.pixels

    def held(image_format: ImageFormat, data: bytes) -> Any:
        began.set()
        assert go_on.wait(60)
        return pixels(image_format, data)

    monkeypatch.setattr(ImageFormat, "pixels", held)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(running, part(data_url(picture(0))))))
    asking.start()
    try:
        assert began.wait(60)
        yield answers
    finally:
        go_on.set()
        asking.join()


def post(running: Running, *parts: dict[str, Any] | str) -> httpx.Response:
    ask = {"model": "sees", "messages": asked(*parts), "max_tokens": 1}
    return httpx.post(f"{running.url}/v1/chat/completions", json=ask, timeout=60)


def test_the_loop_answers_while_a_picture_is_decoded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_in_decoding(running, monkeypatch) as answers:
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert post(running, "hi").status_code == 200
    assert answers[0].status_code == 200


def test_pictures_that_wait_to_be_decoded_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"sees": save_seeing_model(tmp_path)}, ServingConfig(max_answers=1)) as running:
        with held_in_decoding(running, monkeypatch) as answers:
            assert post(running, part(data_url(picture(1)))).status_code == 429
        assert answers[0].status_code == 200
        assert post(running, part(data_url(picture(1)))).status_code == 200
        assert running.engines["sees"].in_flight == 0


def test_other_weights_take_their_place_only_with_the_same_eyes(tmp_path: Path) -> None:
    folders = {width: save_seeing_model(tmp_path / str(width), seed=width, tower_width=width) for width in (16, 24)}
    other = save_seeing_model(tmp_path / "other", seed=1)
    with serving({"sees": folders[16]}, ServingConfig(api_key="k")) as running:
        client = running.client(api_key="k")

        def said() -> str | None:
            ask = asked(part(data_url(picture(0))), "What?")
            return client.chat.completions.create(model="sees", messages=ask, **SAMPLING).choices[0].message.content

        def put(folder: Path) -> httpx.Response:
            key = {"Authorization": "Bearer k"}
            return httpx.post(
                f"{running.url}/admin/reload", json={"model": "sees", "folder": str(folder)}, headers=key, timeout=60
            )

        before = said()
        refused = put(folders[24])
        assert refused.status_code == 400
        assert "vision tower differs" in refused.json()["error"]["message"]
        assert said() == before
        assert put(other).status_code == 200
        after = said()
        assert after == expected(running, "What?", Image(picture(0)), folder=other)[1] != before
