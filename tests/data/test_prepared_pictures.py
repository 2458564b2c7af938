"""Pictures from rows to batches: each reaches the model in the place where it was shown, and is never lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from picture_helpers import FORMAT, png, seeing, shown, write_pictures

from minnow.config import UserError
from minnow.data import lots, shard_writer
from minnow.data import windows as windows_module
from minnow.data.batches import Batch, PackedDataset
from minnow.data.encoding import EncodeOptions, RawBatch, check, encode
from minnow.data.journal import Part
from minnow.data.pictures import Pictures
from minnow.data.preparation import prepare_part
from minnow.data.prepare import DataConfig, prepare, stream
from minnow.data.records import parse_conversation
from minnow.data.shards import Shards
from minnow.model.attention import PackedAttention
from minnow.model.config import ModelConfig
from minnow.model.vision_language import ImagePixels, VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer import Tokenizer, render


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from minnow.tokenizer.train import train_tokenizer

    return seeing(train_tokenizer(["What is this? A creature of the river number 0123456789."] * 50, 330))


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, tokenizer):
    def run(*paths, sequence_length=96, **options):
        options = {"cache_dir": str(tmp_path / "cache"), "workers": 0, "validation_fraction": 0.3, **options}
        config = DataConfig(paths=tuple(paths), **options)
        return prepare(config, tokenizer, "sft", sequence_length=sequence_length, progress=False)

    return run


def mixed_rows(count: int) -> list[dict]:
    """Rows of no, one and two pictures, and of one in a second turn; each names its pictures in its answer."""
    rows = []
    for i in range(count):
        names = [str(i), str((i + 1) % count)][: i % 3]
        row = shown(f"Number {' '.join(names) or 'none'}.", *(f"p/{name}.png" for name in names), text=f"No {i}?")
        if i % 4 == 3:
            row["messages"] += shown(f"Then {i}.", f"p/{i}.png", text="And this?")["messages"]
        rows.append(row)
    return rows


def said(shards: Shards, tokenizer: Tokenizer) -> dict[str, list[bytes]]:
    """The text of each document without its image tokens, and the files of its pictures."""
    found: dict[str, list[bytes]] = {}
    for i in range(shards.num_documents):
        ids = shards.tokens(i)
        pictures = shards.pictures(np.array([i]))
        for number, place, _ in pictures:
            assert number == 0
            assert (ids[place : place + 4] == tokenizer.image_id).all()
        assert (ids == tokenizer.image_id).sum() == 4 * len(pictures)
        found[tokenizer.decode(ids[ids != tokenizer.image_id])] = [data for _, _, data in pictures]
    return found


def expected(rows, folder: Path, tokenizer: Tokenizer) -> dict[str, list[bytes]]:
    found = {}
    for row in rows:
        rendered = render(tokenizer, parse_conversation(row, Pictures(str(folder))))
        found[tokenizer.decode(rendered.ids[rendered.ids != tokenizer.image_id])] = list(rendered.images)
    return found


@pytest.mark.parametrize("small", [False, True])
def test_every_picture_stays_with_its_document(run, tmp_path, tokenizer, monkeypatch, small):
    if small:  # several batches a shard and several shards
        monkeypatch.setattr(lots, "BATCH_BYTES", 3 * lots.ROW_OF_PICTURES)
        monkeypatch.setattr(lots, "SHARD_BYTES", 8 * lots.ROW_OF_PICTURES)
    write_pictures(tmp_path / "p", 24)
    rows = mixed_rows(24)
    data = run(write(tmp_path / "a.jsonl", rows))
    data.verify()
    train, validation = said(data.train, tokenizer), said(data.validation, tokenizer)
    assert train | validation == expected(rows, tmp_path, tokenizer)
    assert len(train) + len(validation) == 24
    assert any(train.values())
    assert any(validation.values())
    assert data.train.image_format == FORMAT
    assert data.train.num_pictures == sum(map(len, train.values()))
    if small:
        assert data.train.num_shards > 2
        picked = said(data.train.subset([1, 2]), tokenizer)
        assert picked
        assert picked.items() <= train.items()


def test_processes_of_their_own_see_the_same(run, tmp_path, tokenizer):
    """The tokenizer reaches them by files, which must say that the model looks at pictures."""
    write_pictures(tmp_path / "p", 24)
    path = write(tmp_path / "a.jsonl", mixed_rows(24))
    alone = run(path)
    together = run(path, workers=2, cache_dir=str(tmp_path / "other"))
    for side in ("train", "validation"):
        files = sorted(each.name for each in (alone.folder / side).iterdir())
        assert files == sorted(each.name for each in (together.folder / side).iterdir())
        assert f"{files[0].split('.')[0]}.images" in files
        for name in files:
            assert (alone.folder / side / name).read_bytes() == (together.folder / side / name).read_bytes()


def test_parts_and_streams_have_the_same_pictures(run, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lots, "LOT_BYTES", 2000)
    monkeypatch.setattr(windows_module, "WINDOW_SHARDS", 2)
    write_pictures(tmp_path / "p", 24)
    path = write(tmp_path / "a.jsonl", mixed_rows(24))
    whole = run(path)
    config = DataConfig(paths=(path,), cache_dir=str(tmp_path / "parts"), workers=0, validation_fraction=0.3)
    for number in (2, 1):
        prepare_part(config, tokenizer, "sft", Part(number, 2), sequence_length=96, progress=False)
    parts = prepare(config, tokenizer, "sft", sequence_length=96, progress=False)
    assert parts.train.num_shards > 2
    assert said(parts.train, tokenizer) == said(whole.train, tokenizer)
    streamed = stream(config, tokenizer, "sft", sequence_length=96)
    found: dict[str, list[bytes]] = {}
    number = 0
    while (window := streamed.shards.window(number, "train")) is not None:
        found |= said(window, tokenizer)
        number += 1
    assert number > 1
    assert found == said(whole.train, tokenizer)


def test_data_still_being_written_show_their_pictures(tmp_path, tokenizer):
    write_pictures(tmp_path / "p", 12)
    path = write(tmp_path / "a.jsonl", mixed_rows(12))
    config = DataConfig(paths=(path,), cache_dir=str(tmp_path / "cache"), workers=0, validation_fraction=0.0)
    streamed = stream(config, tokenizer, "sft", sequence_length=96)
    try:
        window = streamed.shards.window(0, "train")
        assert said(window, tokenizer) == expected(mixed_rows(12), tmp_path, tokenizer)
    finally:
        streamed.close()


def test_a_kill_between_shards_loses_no_picture(run, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(lots, "BATCH_BYTES", 3 * lots.ROW_OF_PICTURES)
    monkeypatch.setattr(lots, "SHARD_BYTES", 8 * lots.ROW_OF_PICTURES)
    write_pictures(tmp_path / "p", 24)
    rows = mixed_rows(24)
    path = write(tmp_path / "a.jsonl", rows)
    finish, finished = shard_writer.ShardWriter.finish, []

    def killed(writer):
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(writer.name)
        return finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    data = run(path)
    data.verify()
    assert said(data.train, tokenizer) | said(data.validation, tokenizer) == expected(rows, tmp_path, tokenizer)
    assert not list(data.folder.rglob(".*"))


def test_a_picture_is_stored_once_however_often_it_is_shown(run, tmp_path, tokenizer):
    files = write_pictures(tmp_path / "p", 2)
    rows = [shown(f"Answer {i}.", f"p/{i % 2}.png") for i in range(10)]
    data = run(write(tmp_path / "a.jsonl", rows) + "@2", validation_fraction=0.0)
    assert data.train.num_documents == 20
    assert data.train.num_pictures == 10
    (images,) = (data.folder / "train").glob("*.images")
    assert images.stat().st_size == sum(map(len, files))
    rows_of_all = PackedDataset(data.train, 96, split_documents=False)
    batch = rows_of_all.batch(range(rows_of_all.num_rows))
    assert len(batch.pixels_ICHW) == 20


def test_a_damaged_picture_file_is_found(run, tmp_path):
    write_pictures(tmp_path / "p", 2)
    path = write(tmp_path / "a.jsonl", [shown("One.", "p/0.png"), shown("Two.", "p/1.png")])
    data = run(path, validation_fraction=0.0)
    (images,) = (data.folder / "train").glob("*.images")
    content = bytearray(images.read_bytes())
    content[50] ^= 1
    images.write_bytes(content)
    with pytest.raises(UserError, match=r"\.images: content does not match its checksum"):
        data.verify()
    images.unlink()
    with pytest.raises(UserError, match=r"\.images: missing"):
        run(path, validation_fraction=0.0)


def test_a_conversation_with_pictures_is_left_out_rather_than_cut(run, tmp_path, tokenizer):
    write_pictures(tmp_path / "p", 3)
    long = shown("Three.", "p/0.png", "p/1.png", "p/2.png", text="What is this? " * 4)
    length = len(render(tokenizer, parse_conversation(long, Pictures(str(tmp_path)))).ids)
    rows = [long, shown("One.", "p/0.png"), *(shown(f"None {i}. " * 40) for i in range(2))]
    path = write(tmp_path / "a.jsonl", rows)
    fits = run(path, sequence_length=length - 1, validation_fraction=0.0)  # the first token is no target
    assert fits.report.long_shown == 0
    data = run(path, sequence_length=length - 2, validation_fraction=0.0)
    assert (data.report.long_shown, data.report.cut_conversations) == (1, 2)
    assert "1 conversations with pictures are longer than a row and were left out" in data.report.warnings()[-1]
    assert data.train.num_pictures == 1
    with pytest.raises(UserError, match="no conversation with its pictures fits a row; give a longer sequence_length"):
        run(write(tmp_path / "b.jsonl", [long]), sequence_length=20)


def test_a_broken_picture_is_a_bad_row(run, tmp_path, tokenizer):
    files = write_pictures(tmp_path / "p", 3)
    (tmp_path / "p" / "1.png").write_bytes(files[1][: len(files[1]) // 2])
    rows = [shown(f"Answer {i}.", f"p/{i}.png") for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=rf"{path}:2: {tmp_path}/p/1\.png: not a picture that can be read"):
        run(path)
    data = run(path, on_bad_row="skip", validation_fraction=0.0)
    assert data.report.skipped_rows == 1
    assert sorted(pictures for (pictures,) in said(data.train, tokenizer).values()) == sorted([files[0], files[2]])
    missing = write(tmp_path / "b.jsonl", [shown("Gone.", "p/9.png"), shown("There.", "p/0.png")])
    with pytest.raises(UserError, match=rf"{missing}:1: .*p/9\.png, and there is no such file"):
        run(missing)


def test_looking_at_all_rows_first_reads_no_picture(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    names = enumerate(("broken.png", "gone.png"), 1)
    rows = [(0, number, json.dumps(shown("A.", name)).encode()) for number, name in names]
    batch = RawBatch(0, 0, 0, 0.0, rows, (str(tmp_path),), True, True)
    options = EncodeOptions("sft", 96, weights=(1.0,), sides=("train",), image_format=FORMAT)
    found = check(batch, options)
    assert [(number, "no such file" in message) for _, number, message in found.bad] == [(2, True)]


def test_rows_of_another_span_have_another_folder(tmp_path, tokenizer):
    files = [png(1), png(2)]
    rows = []
    for number, data in enumerate(files):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "same.png").write_bytes(data)
        rows.append((number, 1, json.dumps(shown("A.", "same.png")).encode()))
    folders = tuple(str(tmp_path / str(number)) for number in range(2))
    options = EncodeOptions("sft", 96, weights=(1.0,), sides=("train",), image_format=FORMAT)
    assert encode(RawBatch(0, 0, 0, 0.0, rows, folders, True, True), options, tokenizer, num_threads=1).images == files


def test_files_of_several_folders_in_one_lot(run, tmp_path, tokenizer):
    answers = {}
    for number in range(3):
        folder = tmp_path / f"set{number}"
        folder.mkdir()
        (folder / "same.png").write_bytes(png(number))
        write(folder / "rows.jsonl", [shown(f"Set {number}.", "same.png")])
        answers[f"Set {number}."] = png(number)
    data = run(str(tmp_path), validation_fraction=0.0)
    for text, (picture,) in said(data.train, tokenizer).items():
        assert picture == next(data for answer, data in answers.items() if answer in text)


def test_parquet_of_minimind_v(run, tmp_path, tokenizer):
    """Its text rows carry a black picture and no marker; several pictures are a list in another file."""
    black, otter, owl = png(0, 8), png(1), png(2)

    def talk(question, answer):
        return json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])

    one = {"conversations": [talk("<image>\nWhat?", "One."), talk("Who?", "Text.")], "image_bytes": [otter, black]}
    two = {"conversations": [talk("<image> and <image>?", "Two.")], "image_bytes": [[otter, owl]]}
    for name, table in (("one", one), ("two", two)):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    data = run(str(tmp_path / "one.parquet"), str(tmp_path / "two.parquet"), validation_fraction=0.0)
    found = said(data.train, tokenizer).items()
    for answer, pictures in (("One.", [otter]), ("Two.", [otter, owl]), ("Text.", [])):
        assert [files for text, files in found if answer in text] == [pictures]


def test_thoughts_before_the_last_question_keep_the_pictures_of_every_turn(run, tmp_path, tokenizer):
    files = write_pictures(tmp_path / "p", 2)
    row = shown("First.", "p/0.png")
    row["messages"][1]["reasoning_content"] = "Hm."
    row["messages"] += shown("Second.", "p/1.png")["messages"]
    data = run(write(tmp_path / "a.jsonl", [row]), sequence_length=200, validation_fraction=0.0)
    assert sorted(said(data.train, tokenizer).values()) == [files[:1], files]


def test_a_model_that_only_reads_is_told(run, tmp_path, tokenizer):
    write_pictures(tmp_path / "p", 1)
    path = write(tmp_path / "a.jsonl", [shown("One.", "p/0.png"), shown("Text.")])
    config = DataConfig(paths=(path,), cache_dir=str(tmp_path / "cache"), workers=0, validation_fraction=0.0)
    blind = Tokenizer(tokenizer._tokenizer)
    with pytest.raises(UserError, match=rf"{path}:1: `content` of message 1 shows a picture, and only text is read"):
        prepare(config, blind, "sft", sequence_length=96, progress=False)
    pair = {"prompt": shown("", "p/0.png")["messages"][:1], "chosen": "A.", "rejected": "B."}
    pairs = write(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(UserError, match=rf"{pairs}:1: `content` of message 1 shows a picture, and only text is read"):
        prepare(DataConfig(paths=(pairs,), cache_dir=str(tmp_path)), tokenizer, "preference", sequence_length=96)


# Batches


def model_of(tokenizer: Tokenizer) -> VisionLanguageModel:
    text = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
    )
    vision = VisionConfig(
        image_size=16, patch_size=8, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = VisionLanguageModel(text, vision, tokenizer.image_id)
    with torch.no_grad():  # some matrices start at zero, and what goes through them would not be seen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


def losses(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood times weight of every position."""
    images = None if batch.pixels_ICHW is None else ImagePixels(batch.pixels_ICHW, batch.image_places_M)
    attention = PackedAttention(batch.cu_seqlens, batch.tokens_BT.device)
    logits = model.logits(model(batch.tokens_BT, batch.positions_BT, attention, images=images))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    return nll * batch.weights_BT.flatten()


def loss_alone(model: VisionLanguageModel, row: dict, folder: Path, tokenizer: Tokenizer) -> torch.Tensor:
    """The conversation's own loss, by its rendering: nothing packed, no shards."""
    rendered = render(tokenizer, parse_conversation(row, Pictures(str(folder))))
    ids = torch.from_numpy(rendered.ids.astype(np.int64))
    places = (ids[:-1] == tokenizer.image_id).nonzero().squeeze(1)
    images = None
    if rendered.images:
        pixels = torch.from_numpy(np.stack([FORMAT.pixels(data) for data in rendered.images]))
        images = ImagePixels(pixels, places)
    attention = PackedAttention(torch.tensor([0, len(ids) - 1], dtype=torch.int32), ids.device)
    logits = model.logits(model(ids[None, :-1], torch.arange(len(ids) - 1)[None], attention, images=images))[0]
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return (nll * torch.from_numpy(rendered.weights[1:])).sum()


@torch.no_grad()
def test_packed_conversations_have_the_loss_that_they_have_alone(run, tmp_path, tokenizer):
    write_pictures(tmp_path / "p", 24)
    rows = mixed_rows(24)
    data = run(write(tmp_path / "a.jsonl", rows), sequence_length=150, validation_fraction=0.0)
    model = model_of(tokenizer)
    packed = PackedDataset(data.train, 150, split_documents=False)
    order = np.random.default_rng(0).permutation(packed.num_rows)
    batch = packed.batch(order)
    assert packed.num_rows < 20, "several conversations a row"
    assert batch.pixels_ICHW.dtype == torch.uint8
    assert batch.pixels_ICHW.shape == (data.train.num_pictures, 3, 16, 16)
    places = (batch.tokens_BT.flatten() == tokenizer.image_id).nonzero().squeeze(1)
    assert torch.equal(batch.image_places_M, places)
    together = losses(model, batch).sum()
    alone = sum(loss_alone(model, row, tmp_path, tokenizer) for row in rows)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-5)
    swapped = losses(model, Batch(**{**vars(batch), "pixels_ICHW": batch.pixels_ICHW.flip(0)})).sum()
    assert (swapped - together).abs() > 1e-2, "which picture stands where matters"


def test_a_batch_over_borders_of_windows_has_its_pictures(run, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_SHARDS", 1)
    monkeypatch.setattr(lots, "SHARD_BYTES", 8 * lots.ROW_OF_PICTURES)
    monkeypatch.setattr(lots, "BATCH_BYTES", 3 * lots.ROW_OF_PICTURES)
    write_pictures(tmp_path / "p", 24)
    data = run(write(tmp_path / "a.jsonl", mixed_rows(24)), validation_fraction=0.0)
    rows = PackedDataset(data.train, 96, split_documents=False)
    ends = np.cumsum(list(rows.window_rows))
    assert len(ends) > 2
    wanted = [int(ends[0]), 0, int(ends[1]) - 1, 1, int(ends[1])]
    together, alone = rows.batch(wanted), [rows.batch([row]) for row in wanted]
    pixels = [batch.pixels_ICHW for batch in alone if batch.pixels_ICHW is not None]
    assert torch.equal(together.pixels_ICHW, torch.cat(pixels))
    places = (together.tokens_BT.flatten() == tokenizer.image_id).nonzero().squeeze(1)
    assert torch.equal(together.image_places_M, places)


def test_a_batch_without_pictures_has_none(run, tmp_path, tokenizer):
    write_pictures(tmp_path / "p", 1)
    rows = [shown("One.", "p/0.png"), *(shown(f"Text {i}. " * 9) for i in range(6))]
    data = run(write(tmp_path / "a.jsonl", rows), validation_fraction=0.0)
    packed = PackedDataset(data.train, 96, split_documents=False)
    batches = [packed.batch([row]) for row in range(packed.num_rows)]
    with_pictures = [batch for batch in batches if batch.pixels_ICHW is not None]
    assert len(with_pictures) == 1
    assert [batch.image_places_M for batch in batches if batch.pixels_ICHW is None] == [None] * (len(batches) - 1)
    moved = with_pictures[0].to("cpu")
    assert torch.equal(moved.pixels_ICHW, with_pictures[0].pixels_ICHW)


def test_another_picture_under_the_same_name_is_noticed(run, tmp_path):
    """The rows are the same to the byte: training went on with the old pictures, and without a word."""
    first, _ = write_pictures(tmp_path / "p", 2)
    path = write(tmp_path / "a.jsonl", [shown("One.", "p/0.png"), shown("Two.", "p/1.png")])
    data = run(path, validation_fraction=0.0)
    (tmp_path / "p" / "0.png").write_bytes(first)  # written again, and the same
    assert run(path, validation_fraction=0.0).folder == data.folder
    (tmp_path / "p" / "0.png").write_bytes(png(7))
    with pytest.raises(UserError, match=rf"{tmp_path}/p/0\.png is no longer the picture .*: delete {data.folder}"):
        run(path, validation_fraction=0.0)
    shutil.rmtree(data.folder)
    found = run(path, validation_fraction=0.0).train.pictures(np.arange(2))
    assert png(7) in [file for _, _, file in found]


def test_pictures_that_change_while_they_are_prepared_are_refused(run, tmp_path, monkeypatch):
    write_pictures(tmp_path / "p", 2)
    path = write(tmp_path / "a.jsonl", [shown("One.", "p/0.png"), shown("Two.", "p/1.png")])
    finish = shard_writer.ShardWriter.finish

    def changing(writer):
        (tmp_path / "p" / "0.png").write_bytes(png(7))
        return finish(writer)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "finish", changing)
        with pytest.raises(UserError, match="the data changed while they were being prepared"):
            run(path, validation_fraction=0.0)
    found = run(path, validation_fraction=0.0).train.pictures(np.arange(2))
    assert sorted(file for _, _, file in found) == sorted([png(7), png(1)])


def test_the_originals_may_go_once_the_data_are_prepared(run, tmp_path):
    write_pictures(tmp_path / "p", 2)
    path = write(tmp_path / "a.jsonl", [shown("One.", "p/0.png"), shown("Two.", "p/1.png")])
    first = run(path, validation_fraction=0.0)
    shutil.rmtree(tmp_path / "p")
    again = run(path, validation_fraction=0.0)
    assert again.folder == first.folder
    rows = PackedDataset(again.train, 96, split_documents=False)
    assert len(rows.batch(range(rows.num_rows)).pixels_ICHW) == 2
