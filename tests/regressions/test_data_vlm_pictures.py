"""What the peers' vision models do to their data: MiniMind-V, VerMind-V, MiniMind2-V (their loaders, section 1d).

VerMind-V stands a picture in for "@@@...", so that an "@" somebody writes is a patch, and takes the first picture of a
row alone. All of them cut a long row at its right end, be it in the midst of a picture. MiniMind-V's rows of text show
the model a black picture.
"""

import io
import json

import PIL.Image
import pytest
import torch

from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, PreparedData, prepare
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.tokenizer.images import ImageFormat

FORMAT = ImageFormat(image_size=16, patch_size=8)
PATCHES = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(["Write to otter@river.org, please. "] * 20, 320)._tokenizer, image_format=FORMAT)


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (colour, colour, colour)).save(file, "PNG")
    return file.getvalue()


def prepared(tmp_path, tokenizer, *rows: tuple[str, list[bytes] | bytes], length: int = 128) -> PreparedData:
    """Rows as MiniMind-V has them, in the parquet file that it reads."""
    import pyarrow
    import pyarrow.parquet

    talks = [
        json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}])
        for question, _ in rows
    ]
    table = pyarrow.table({"conversations": talks, "image_bytes": [files for _, files in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    config = DataConfig(
        paths=(str(tmp_path / "rows.parquet"),), cache_dir=str(tmp_path), workers=0, validation_fraction=0
    )
    return prepare(config, tokenizer, "sft", sequence_length=length, progress=False)


def batch_of(data: PreparedData, length: int = 128):
    rows = PackedDataset(data.train, length, split_documents=False)
    return rows.batch(range(rows.num_rows))


@pytest.mark.parametrize("text", ["otter@river.org @@@@", "<|image_pad|>" * PATCHES, "<|vision_start|><|image_pad|>"])
def test_what_somebody_writes_is_never_a_patch(tmp_path, tokenizer, text):
    batch = batch_of(prepared(tmp_path, tokenizer, (f"<image>{text}", picture(90))))
    assert (batch.tokens_BT == tokenizer.image_id).sum() == PATCHES
    assert len(batch.image_places_M) == PATCHES


def test_every_picture_of_a_row_is_shown(tmp_path, tokenizer):
    colours = [10, 90, 200]
    files = [picture(colour) for colour in colours]
    batch = batch_of(prepared(tmp_path, tokenizer, ("<image>or<image>or<image>?", files)))
    assert batch.pixels_ICHW.float().mean((1, 2, 3)).tolist() == colours
    begins = batch.image_places_M.view(3, PATCHES)[:, 0]
    assert torch.equal(begins, begins.sort().values)


def test_a_row_of_text_shows_no_black_picture(tmp_path, tokenizer):
    batch = batch_of(prepared(tmp_path, tokenizer, ("Who?", picture(0)), ("And who?", picture(0))))
    assert batch.pixels_ICHW is None
    assert not (batch.tokens_BT == tokenizer.image_id).any()


def test_no_picture_is_cut(tmp_path, tokenizer):
    """Whatever the length of a row: as many image tokens as pictures have patches, or no row at all."""
    rows = ("<image>?", picture(90)), ("word " * 5 + "<image>", picture(10))
    short, long = prepared(tmp_path, tokenizer, *rows).train.lengths.tolist()
    assert long - short > 8
    for length in (short - 1, *range(long - 8, long)):  # the first token of a document is no target
        data = prepared(tmp_path, tokenizer, *rows, length=length)
        batch = batch_of(data, length)
        shown = 1 + (length == long - 1)
        assert len(batch.pixels_ICHW) == shown
        assert (batch.tokens_BT == tokenizer.image_id).sum() == PATCHES * shown
        assert data.report.long_shown == 2 - shown
