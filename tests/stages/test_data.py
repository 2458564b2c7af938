"""data prepare and data inspect: the figures, the histogram, and the sample with its loss mask."""

import json
import re

import numpy as np
import pytest
from rich.console import Console

from minnow.cli import main
from minnow.data.summary import length_histogram, median_of
from minnow.stages.data_inspect import render_sample
from minnow.tokenizer.train import train_tokenizer


@pytest.fixture
def words(tmp_path):
    """Arguments for a tiny tokenizer and a file of conversations."""
    tokenizer = train_tokenizer(["where does the otter live? in the river. 水獭住在河里。"] * 20, 340)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"where? {i}"},
                {"role": "assistant", "content": "水獭住在[red]河里。"},
            ]
        }
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        f"--data.paths={tmp_path / 'chats.jsonl'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--tokenizer={tmp_path / 'tokenizer'}",
        "--kind=sft",
        f"--json={tmp_path / 'figures.json'}",
    ]


def test_prepare_prints_figures(words, tmp_path, capsys):
    assert main(["data", "prepare", *words]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["rows"] == figures["train"]["documents"] + figures["validation"]["documents"] == 20
    assert f"{figures['train']['tokens']:,}" in out
    assert figures["folder"] in out.replace("\n", "")
    assert 0 < figures["train"]["fill"] <= 1


def test_inspect_shows_lengths_and_the_loss_mask(words, tmp_path, capsys):
    assert main(["data", "inspect", *words, "--sample=1"]) == 0
    out = capsys.readouterr().out
    assert "Tokens per training document" in out
    assert "█" in out
    # without colours, brackets: the answer with its end is supervised, the question and the empty think block are not
    assert "</think>\n\n«水獭住在[red]河里。<|im_end|>»\n" in out
    assert "<|im_start|>user\nwhere? " in out
    assert sum(count for _, _, count in json.loads((tmp_path / "figures.json").read_text())["histogram"]) >= 18
    assert main(["data", "inspect", *words, "--sample=999"]) == 2
    assert "--sample 999: there are" in capsys.readouterr().err
    assert main(["data", "inspect", *words, "--sample_tokens=0"]) == 2
    assert "--sample_tokens is 0, but must be at least 1" in capsys.readouterr().err


def test_the_mask_is_in_colour_on_a_terminal(words, tmp_path):
    from minnow.data.prepare import DataConfig, prepare
    from minnow.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    config = DataConfig(paths=(str(tmp_path / "chats.jsonl"),), cache_dir=str(tmp_path / "cache"))
    data = prepare(config, tokenizer, "sft", sequence_length=64, progress=False)
    console = Console(force_terminal=True, color_system="standard")
    text = render_sample(console, data.train, tokenizer, 0, 600)
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert green == ["水獭住在[red]河里。<|im_end|>"]
    assert render_sample(console, data.train, tokenizer, 0, 5).plain.endswith("more tokens")


def test_a_row_that_would_command_the_terminal_is_shown_and_not_obeyed(words, tmp_path, capsys):
    """Data from elsewhere could set the window's title, or hide what stands before it."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\x1b]0;owned\x07\x9b2J"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(row)] * 20))
    assert main(["data", "inspect", *words]) == 0
    assert "«\\x1b]0;owned\\x07\\x9b2J<|im_end|>»" in capsys.readouterr().out


def test_histogram_by_hand():
    assert length_histogram(np.array([1, 2, 3, 4, 5, 8, 9])) == [(1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 1)]
    assert length_histogram(np.array([], dtype=np.int64)) == []


def test_median_by_hand():
    assert median_of({1: 1, 4: 1}) == 2.5
    assert median_of({9: 1, 3: 2}) == 3
    assert median_of({3: 2, 9: 2}) == 6
    assert median_of({}) == 0


@pytest.fixture
def seen(tmp_path):
    """Arguments for a model that looks at pictures and rows that show some, in colours of their own."""
    import PIL.Image

    from minnow.model.config import ModelConfig
    from minnow.model.pretrained import save_pretrained
    from minnow.model.vision_language import VisionLanguageModel
    from minnow.model.vision_tower import VisionConfig

    tokenizer = train_tokenizer(["where does the otter live? in the river."] * 20, 320)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **sizes
    )
    model = VisionLanguageModel(text, VisionConfig(image_size=16, patch_size=8, **sizes), 0)
    tokenizer.image_format = model.image_format
    save_pretrained(model, tmp_path / "model", tokenizer)
    rows = []
    for i in range(8):
        PIL.Image.new("RGB", (9, 9), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        parts = [{"type": "text", "text": "where?"}, {"type": "image", "image": f"{i}.png"}]
        rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "river"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        f"--data.paths={tmp_path / 'rows.jsonl'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.validation_fraction=0",
        f"--tokenizer={tmp_path / 'model'}",
        "--kind=sft",
        f"--json={tmp_path / 'figures.json'}",
    ]


def test_pictures_are_counted_and_shown_in_their_places(seen, tmp_path, capsys):
    assert main(["data", "prepare", *seen]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pictures, 4 tokens each +8 +0\n", out)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["train"]["pictures"], figures["picture_tokens"], figures["long_shown"]) == (8, 4, 0)
    assert main(["data", "inspect", *seen, "--sample=3"]) == 0
    out = capsys.readouterr().out
    assert "user\nwhere?[4 image tokens]<|im_end|>" in out
    assert "picture 1: from token " in out
    assert "<|image_pad|>" not in out


def test_data_without_pictures_say_nothing_of_them(words, tmp_path, capsys):
    assert main(["data", "inspect", *words]) == 0
    out = capsys.readouterr().out
    assert "pictures, " not in out
    assert "picture 1" not in out
    assert json.loads((tmp_path / "figures.json").read_text())["picture_tokens"] is None
