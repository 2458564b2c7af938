"""`minnow generate` on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from minnow.config import UserError
from minnow.stages import serve
from minnow.stages.generate import Config, run

from .stage_helpers import save_parrot_model, save_random_model


def test_continues_the_text_as_the_start_of_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_parrot_model(tmp_path / "model", "小鱼 swims§<|endoftext|>§")
    out = tmp_path / "out.json"
    run(Config(model=str(model), prompt="xyz", temperature=0.0, json=str(out), device="cpu"))
    captured = capsys.readouterr()
    assert captured.out == "xyz小鱼 swims\n"
    assert "tokens/s" in captured.err
    assert "小鱼" in out.read_text(encoding="utf-8")  # to be read by people too
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["prompt"] == "xyz"
    assert result["completions"][0]["text"] == "小鱼 swims"
    assert result["completions"][0]["finish_reason"] == "stop"
    assert result["tokens"] == len(result["completions"][0]["ids"])
    assert result["tokens_per_second"] > 0


def test_a_prompt_that_utf8_cannot_hold_is_in_the_file_as_it_came(tmp_path: Path) -> None:
    """A byte that is no UTF-8 comes from the command line as half of a surrogate pair."""
    model = save_parrot_model(tmp_path / "model", "小鱼 swims§<|endoftext|>§")
    out = tmp_path / "out.json"
    run(Config(model=str(model), prompt="x\udcffy", temperature=0.0, json=str(out), device="cpu"))
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "x\udcffy"


def test_reads_the_prompt_from_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_parrot_model(tmp_path / "model", "鱼§<|endoftext|>§")
    monkeypatch.setattr("sys.stdin", io.StringIO("xy"))
    run(Config(model=str(model), temperature=0.0, device="cpu"))
    assert capsys.readouterr().out == "xy鱼\n"


def test_several_samples_and_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_random_model(tmp_path / "model")
    results = []
    for name in ("a.json", "b.json"):
        run(
            Config(
                model=str(model),
                prompt="the",
                n=3,
                seed=1,
                max_tokens=8,
                ignore_eos=True,
                json=str(tmp_path / name),
                device="cpu",
            )
        )
        results.append(json.loads((tmp_path / name).read_text(encoding="utf-8"))["completions"])
    assert results[0] == results[1]
    assert len({tuple(completion["ids"]) for completion in results[0]}) == 3
    assert [completion["finish_reason"] for completion in results[0]] == ["length"] * 3
    lines = capsys.readouterr().out.splitlines()
    for number in (1, 2, 3):
        (first, _) = [n for n, line in enumerate(lines) if f" {number} of 3 " in line]
        assert lines[first + 1].startswith("the")  # the text that is continued


def test_a_stop_string_ends_the_text(tmp_path: Path) -> None:
    model = save_parrot_model(tmp_path / "model", "小鱼 swims§<|endoftext|>§")
    out = tmp_path / "out.json"
    run(Config(model=str(model), prompt="xyz", stop=("swims",), temperature=0.0, json=str(out), device="cpu"))
    (completion,) = json.loads(out.read_text(encoding="utf-8"))["completions"]
    assert (completion["text"], completion["finish_reason"]) == ("小鱼 ", "stop")


def test_the_speed_is_tokens_in_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_random_model(tmp_path / "model")
    clock = iter((10.0, 14.0))
    monkeypatch.setattr("minnow.stages.generate.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    out = tmp_path / "out.json"
    run(Config(model=str(model), prompt="the", max_tokens=8, ignore_eos=True, json=str(out), device="cpu"))
    assert json.loads(out.read_text(encoding="utf-8"))["tokens_per_second"] == 2.0


def test_nothing_is_waited_for_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read what is typed until Ctrl-D, without a word of that."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="no text to continue"):
        run(Config(model="unread", device="cpu"))


def test_a_stretched_context_takes_longer_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_random_model(tmp_path / "model", context=16)
    asked = {"model": str(model), "prompt": "the pond " * 12, "max_tokens": 4, "ignore_eos": True, "device": "cpu"}
    with pytest.raises(UserError, match="the model's context is 16 tokens"):
        run(Config(**asked))
    for kind in ("yarn", "linear", "ntk"):
        out = tmp_path / f"{kind}.json"
        run(Config(**asked, rope_scaling=kind, factor=8, json=str(out)))
        assert json.loads(out.read_text())["tokens"] == 4
    capsys.readouterr()
    with pytest.raises(UserError, match="--factor 8 needs --rope-scaling"):
        run(Config(**asked, factor=8))


def test_terminal_commands_in_the_text_are_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_parrot_model(tmp_path / "model", "\x1b]0;q\x07§<|endoftext|>§")
    run(Config(model=str(model), prompt="p\x1b[2J", temperature=0.0, device="cpu"))
    assert capsys.readouterr().out == "p[2J]0;q\n"


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", context=16)
    with pytest.raises(UserError, match="top_p"):
        Config(model=str(model), prompt="x", top_p=2.0)
    with pytest.raises(UserError, match="context is 16"):
        run(Config(model=str(model), prompt="~" * 100, device="cpu"))
    with pytest.raises(UserError, match="nowhere"):
        run(Config(model=str(tmp_path / "nowhere"), prompt="x", device="cpu"))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_of_the_memory_that_is_none_is_refused(share: float) -> None:
    """0 was taken for "not given", and the others as they were."""
    with pytest.raises(UserError, match="--memory_share is .*: it is a part of the memory, above 0 and up to 1"):
        Config(model="m", prompt="a", memory_share=share)
    with pytest.raises(UserError, match="--memory_share"):
        serve.Config(models=("m",), memory_share=share)
