"""`minnow tokenizer train` and `minnow tokenizer inspect`."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizer_helpers import CORPUS, small_tokenizer

from minnow.config import UserError
from minnow.stages import tokenizer_inspect, tokenizer_train
from minnow.tokenizer import Tokenizer


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_train_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", CORPUS)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    tokenizer_train.run(tokenizer_train.Config(data=(str(data),), out=str(out), vocab_size=400, json=str(figures)))
    assert "400 tokens from 20 texts" in capsys.readouterr().out
    assert json.loads(figures.read_text())["vocab_size"] == 400
    tokenizer = Tokenizer.from_pretrained(out)
    text = "fish 鱻\n\x1b[2J"
    tokenizer_inspect.run(tokenizer_inspect.Config(model=str(out), text=text, data=(str(data),), json=str(figures)))
    printed = capsys.readouterr().out
    assert "<E9>|<B1>|<BB>|↵\n" in printed
    assert "\x1b" not in printed  # a text cannot command the terminal
    assert " ".join(map(str, tokenizer.encode(text))) in printed
    report = json.loads(figures.read_text())
    total = sum(len(t.encode()) for t in CORPUS)
    assert report["texts"][str(data)]["bytes"] == total
    assert report["texts"][str(data)]["tokens"] == sum(len(tokenizer.encode(t)) for t in CORPUS)
    assert set(report["texts"]) == {"English", "Chinese", "code", "numbers", str(data)}


def test_a_tokenizer_is_not_lost_unasked(tmp_path: Path) -> None:
    data, out = write(tmp_path / "a.jsonl", CORPUS), tmp_path / "out"
    config = tokenizer_train.Config(data=(str(data),), out=str(out), vocab_size=400)
    tokenizer_train.run(config)
    smaller = replace(config, vocab_size=300)
    with pytest.raises(UserError, match="there is a tokenizer; .*--overwrite true"):
        tokenizer_train.run(smaller)
    assert Tokenizer.from_pretrained(out).vocab_size == 400
    tokenizer_train.run(replace(smaller, overwrite=True))
    assert Tokenizer.from_pretrained(out).vocab_size == 300
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="there is a model"):
        tokenizer_train.run(replace(config, overwrite=True))


def test_files_take_turns(tmp_path: Path) -> None:
    """Learning stops at max_megabytes, with a share of every file."""
    write(tmp_path / "a.jsonl", ["aaab " * 100] * 50)
    write(tmp_path / "b.jsonl", ["缺缺少 " * 100] * 2)
    tokenizer_train.run(
        tokenizer_train.Config(data=(str(tmp_path),), out=str(tmp_path / "out"), vocab_size=300, max_megabytes=0.005)
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.encode("aaab")) == 1
    assert len(tokenizer.encode("缺缺少")) == 1


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A thousand shards of a data set stopped it with "Too many open files"."""
    for number in range(400):
        write(tmp_path / "data" / f"{number:04}.jsonl", [f"only in {number:04} " * 3, "the same " * 3])
    config = tokenizer_train.Config(data=(str(tmp_path / "data"),), out=str(tmp_path / "out"), vocab_size=300)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        tokenizer_train.run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    texts = list(tokenizer_train._in_turn((str(tmp_path / "data"),)))
    assert len(texts) == len({*texts}) + 399 == 800
    assert texts[:3] == ["only in 0000 " * 3, "only in 0004 " * 3, "only in 0008 " * 3]  # 100 groups of 4 files


def test_a_small_text_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", ["abab"] * 3)
    tokenizer_train.run(tokenizer_train.Config(data=(str(data),), out=str(tmp_path / "out"), vocab_size=6400))
    assert "below the 6,400 asked for" in capsys.readouterr().out


def test_numbers_that_make_no_sense_are_refused() -> None:
    """A negative frequency and a negative number of rows ended in errors of the libraries below."""
    for settings in ({"max_megabytes": -1.0}, {"max_megabytes": float("nan")}, {"min_frequency": 0}):
        with pytest.raises(UserError, match="--max_megabytes must be positive and --min_frequency at least 1"):
            tokenizer_train.Config(data=("a",), out="b", **settings)
    with pytest.raises(UserError, match="--max_rows is -1"):
        tokenizer_inspect.Config(model="a", max_rows=-1)


def test_a_weight_is_refused_where_it_would_mean_nothing(tmp_path: Path) -> None:
    """It was left unread: every file has its share."""
    data = write(tmp_path / "a.jsonl", ["a text"])
    with pytest.raises(UserError, match="a.jsonl: a weight .* leave it out here"):
        tokenizer_train.run(tokenizer_train.Config(data=(f"{data}@2",), out=str(tmp_path / "out"), vocab_size=300))


def test_no_text_is_an_error(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match="no text"):
        tokenizer_train.run(tokenizer_train.Config(data=(str(data),), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_without_a_text_samples_are_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    tokenizer_inspect.run(tokenizer_inspect.Config(model=str(tmp_path)))
    assert "heron" in capsys.readouterr().out.replace("|", "")


def test_colour_changes_with_every_token() -> None:
    ids = small_tokenizer().encode("The small fish")
    split = tokenizer_inspect.coloured_split(small_tokenizer(), ids)
    assert split.plain == "The small fish"
    assert len({span.style for span in split.spans}) == min(4, len(ids))
