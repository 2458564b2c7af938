"""Pictures in a conversation, against transformers' LlavaProcessor: the same ids and the same pixels."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import transformers
from tests.tokenizer.tokenizer_helpers import small_tokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from minnow.config import UserError
from minnow.tokenizer import Conversation, Message, Tokenizer, render
from minnow.tokenizer.chat import training_examples
from minnow.tokenizer.images import Image, ImageFormat, processor_files

FORMAT = ImageFormat(image_size=24, patch_size=8)


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    channels = len(mode)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return PIL.Image.fromarray(noise.squeeze() if channels == 1 else noise, mode=mode)


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(small_tokenizer()._tokenizer, image_format=FORMAT)
    return tokenizer


def asked(*images: Image, text: str = "What is this?") -> Conversation:
    return Conversation((Message("user", text, images=images), Message("assistant", "A fish.")))


def test_a_picture_is_a_token_for_each_patch(tokenizer: Tokenizer) -> None:
    data = encoded(picture())
    rendered = render(tokenizer, asked(Image(data, 5)))
    ids = rendered.ids.tolist()
    place = ids.index(tokenizer.image_id)
    assert ids[place : place + 9] == [tokenizer.image_id] * 9
    assert ids.count(tokenizer.image_id) == 9
    assert rendered.images == (data,)
    assert not rendered.weights[place : place + 9].any()
    assert tokenizer.decode(ids[:place]).endswith("user\nWhat ")
    assert tokenizer.decode(ids[place + 9 :]).startswith("is this?")


@pytest.mark.parametrize("offsets", [(0,), (13,), (0, 0), (5, 13), (0, 5, 5)])
def test_ids_and_pixels_are_those_of_transformers_processor(
    tokenizer: Tokenizer, tmp_path: Path, offsets: tuple[int, ...]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    processor = transformers.LlavaProcessor(
        SiglipImageProcessorPil.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        chat_template=(tmp_path / "chat_template.jinja").read_text(),
        **{k: v for k, v in processor_files(FORMAT)["processor_config.json"].items() if k != "processor_class"},
    )
    pictures = [picture(seed) for seed in range(len(offsets))]
    text = "What is this?"
    parts, written = [], 0
    for offset in offsets:
        if offset > written:
            parts.append({"type": "text", "text": text[written:offset]})
        parts.append({"type": "image"})
        written = offset
    parts.append({"type": "text", "text": text[written:]})
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    theirs = processor(text=prompt, images=pictures, return_tensors="np")
    images = tuple(Image(encoded(each), offset) for each, offset in zip(pictures, offsets, strict=True))
    rendered = render(tokenizer, Conversation((Message("user", text, images=images),)), add_generation_prompt=True)
    assert rendered.ids.tolist() == theirs["input_ids"][0].tolist()
    ours = np.stack([FORMAT.pixels(data) for data in rendered.images])
    np.testing.assert_allclose((ours / 255.0 - 0.5) / 0.5, theirs["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_any_kind_of_picture_becomes_three_colours_as_the_processor_makes_them(mode: str) -> None:
    image = picture().convert(mode)
    ours = FORMAT.pixels(encoded(image))
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    theirs = processor(images=PIL.Image.open(io.BytesIO(encoded(image))), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose((ours / 255.0 - 0.5) / 0.5, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_usual_files_are_read(kind: str) -> None:
    assert FORMAT.pixels(encoded(picture(), kind)).shape == (3, 24, 24)


@pytest.mark.parametrize("orientation", range(9))
def test_a_photograph_is_seen_as_it_was_held(orientation: int) -> None:
    """Telephones store it lying and say so in EXIF; transformers' load_image, and browsers, set it upright."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation  # 0 means nothing
    file = io.BytesIO()
    picture().save(file, "PNG", exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(file.getvalue())))
    ours = FORMAT.pixels(file.getvalue()).astype(int)
    # Not quite the same: the two passes of a resize round in between.
    assert abs(ours - FORMAT.pixels(encoded(upright))).mean() < 1
    assert (abs(ours - FORMAT.pixels(encoded(picture()))).mean() > 10) == (orientation > 1)


def test_a_picture_with_broken_exif_is_a_picture() -> None:
    file = io.BytesIO()
    picture().save(file, "PNG", exif=b"Exif\0\0no tiff")
    np.testing.assert_array_equal(FORMAT.pixels(file.getvalue()), FORMAT.pixels(encoded(picture())))


def test_greys_of_16_bits_are_greys() -> None:
    """Pillow's `convert` makes all of them white but the darkest 256."""
    grey = np.arange(30 * 40).reshape(30, 40) % 256
    fine = PIL.Image.fromarray((grey * 256 + 200).astype(np.uint16))
    plain = PIL.Image.fromarray(grey.astype(np.uint8))
    np.testing.assert_array_equal(FORMAT.pixels(encoded(fine)), FORMAT.pixels(encoded(plain)))


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(picture())[:60], encoded(picture(), "TIFF")])
def test_what_is_no_picture_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(UserError, match="not a picture that can be read") as caught:
        FORMAT.pixels(data)
    assert "object at" not in str(caught.value)


def test_a_picture_too_large_to_unpack_is_refused_before_it_is() -> None:
    with pytest.raises(UserError, match="pixels"):
        FORMAT.pixels(encoded(PIL.Image.new("1", (9000, 9000))))


def test_words_that_spell_image_tokens_are_words(tokenizer: Tokenizer) -> None:
    rendered = render(tokenizer, asked(text="<|vision_start|><|image_pad|><|vision_end|><image>"))
    assert tokenizer.image_id not in rendered.ids
    assert rendered.images == ()


def test_a_model_that_only_reads_says_so() -> None:
    with pytest.raises(UserError, match="reads text only"):
        render(small_tokenizer(), asked(Image(encoded(picture()))))


def test_only_users_show_pictures() -> None:
    with pytest.raises(UserError, match="only users show pictures"):
        Message("assistant", "Look.", images=(Image(b""),))


def test_an_example_a_turn_has_the_pictures_before_it(tokenizer: Tokenizer) -> None:
    """Reasoning before the last user message splits a conversation: pictures go with the messages that show them."""
    first, second = encoded(picture(1)), encoded(picture(2))
    conversation = Conversation(
        (
            Message("user", "One?", images=(Image(first),)),
            Message("assistant", "Fish.", "It has fins."),
            Message("user", "Two?", images=(Image(second),)),
            Message("assistant", "Frog."),
        )
    )
    assert [each.images for each in training_examples(tokenizer, conversation)] == [(first,), (first, second)]


def test_what_a_model_looks_at_is_part_of_what_its_data_is_cached_by(tokenizer: Tokenizer) -> None:
    other = Tokenizer(small_tokenizer()._tokenizer, image_format=ImageFormat(32, 8))
    assert len({small_tokenizer().fingerprint, tokenizer.fingerprint, other.fingerprint}) == 3


def test_a_palette_that_is_transparent_in_parts_is_no_warning_for_each_picture() -> None:
    """Seen on 1,702 real icons, of which most have one."""
    indexed = picture().convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    indexed.save(file, "PNG", transparency=bytes(range(0, 256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = FORMAT.pixels(file.getvalue())
    np.testing.assert_array_equal(pixels, FORMAT.pixels(encoded(indexed.convert("RGB"))))


def test_what_the_base_looks_at_is_known_beside_an_adapter(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """There is no config.json in such a folder."""
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).image_format == FORMAT
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match="patch_size"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("nested", [False, True], ids=["own file", "transformers 5"])
@pytest.mark.parametrize(
    "change", [{"image_mean": [0.48, 0.45, 0.4]}, {"resample": 2}, {"do_pad": True}, {"do_center_crop": True}]
)
def test_pictures_that_are_prepared_otherwise_are_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, change: dict, nested: bool
) -> None:
    tokenizer.save_pretrained(tmp_path)
    vision = {"image_size": 24, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": vision}))
    own, all_of_it = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    assert Tokenizer.from_pretrained(tmp_path).image_format == FORMAT
    prepared = json.loads(own.read_text()) | change
    if nested:
        own.unlink()
        all_of_it.write_text(json.dumps(json.loads(all_of_it.read_text()) | {"image_processor": prepared}))
    else:
        own.write_text(json.dumps(prepared))
    with pytest.raises(UserError, match=next(iter(change))):
        Tokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_of_another_kind_of_model_with_pictures_is_read_as_one_that_only_reads(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": {"depth": 32}}))
    assert Tokenizer.from_pretrained(tmp_path).image_format is None
