"""`minnow bench generate` on a tiny shape: both contestants run, and the file has the promised form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from minnow import cli
from minnow.config import UserError
from minnow.engine.sequence import Sequence
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.transformer import CausalLM
from minnow.stages import bench_generate, bench_train

SHAPE = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 2 --model.num_attention_heads 2"
    " --model.num_key_value_heads 1 --model.head_dim 16 --model.vocab_size 320"
)
SPEED = "--device cpu --precision fp32 --compile false --rounds 1 --prompt_tokens 5"
TINY = [*SHAPE.split(), *SPEED.split()]


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--streams", "[1, 3]", "--new_tokens", "[6, 4]"]
    assert cli.main(["bench", "generate", *TINY, *sizes, "--json", str(file)]) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    for contestant in ("minnow", "transformers"):
        assert set(figures[contestant]) == {"1", "3"}
        assert all(speed > 0 for speed in figures[contestant].values())
    assert figures["bandwidth_share"] > 0
    assert "of the bound" in capsys.readouterr().out


def test_figures_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"minnow": [0.125, 0.25, 1.0], "transformers": [4.0, 0.5, 1.0]}
    monkeypatch.setattr(bench_generate, "time_in_turns", lambda *settings: times)
    monkeypatch.setattr(bench_generate, "minnow_generate", lambda *settings: lambda prompts, new_tokens: None)
    monkeypatch.setattr(bench_generate, "transformers_generate", lambda *settings: lambda prompts, new_tokens: None)
    monkeypatch.setattr(bench_generate, "read_seconds", lambda *settings: 1 / 96)
    file = tmp_path / "figures.json"
    sizes = ["--streams", "[1, 3]", "--new_tokens", "[6, 4]"]
    assert cli.main(["bench", "generate", *TINY, *sizes, "--json", str(file)]) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    # Tokens that were generated, the prompts' not among them: 1 x 6 and 3 x 4, in the median of 0.25 and 1 s.
    assert figures["minnow"] == {"1": 24.0, "3": 48.0}
    assert figures["transformers"] == {"1": 6.0, "3": 12.0}
    assert figures["bandwidth_share"] == pytest.approx(0.25)  # 24 tokens a second, where memory gives 96
    shown = capsys.readouterr().out
    assert shown.count("4.00x") == 2
    assert "one stream runs at 25% of the bound" in " ".join(shown.split())


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_all_weights_but_an_untied_embedding(tied: bool) -> None:
    """A tied one is read whole, as the head."""
    shape = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    # A layer: q, o 2 x 32x32 + k, v 2 x 32x16 + MLP 3 x 32x64, norms 2 x 32 + 2 x 16; the last norm; one head.
    assert bench_generate.weight_bytes(CausalLM(shape).to(torch.bfloat16)) == 2 * (2 * (9216 + 96) + 32 + 320 * 32)


def test_a_token_reads_the_experts_that_it_is_sent_to_and_no_others() -> None:
    shape = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        experts=ExpertsConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16),
    )
    # A layer: q, o 2 x 32x32 + k, v 2 x 32x16 + router 8x32 + two experts of 3 x 32x16, norms 96.
    layer = 2048 + 1024 + 256 + 2 * 1536 + 96
    assert bench_generate.weight_bytes(CausalLM(shape)) == 4 * (2 * layer + 32 + 320 * 32)


def test_beside_the_compiled_engine_stands_a_compiled_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its turn with answers of the whole length first: its cache is as long, and compiled for that."""
    asked = []

    def contestant(name: str, compiled: bool) -> bench_generate.Generate:
        return lambda prompts, new_tokens: asked.append((name, compiled, len(prompts), new_tokens))

    monkeypatch.setattr(bench_generate, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(bench_generate, "minnow_generate", lambda model, compiled: contestant("minnow", compiled))
    monkeypatch.setattr(
        bench_generate, "transformers_generate", lambda model, compiled=False: contestant("transformers", compiled)
    )
    file, sizes = tmp_path / "figures.json", ["--streams", "[3]", "--new_tokens", "[6]"]
    assert cli.main(["bench", "generate", *TINY, *sizes, "--compile", "true", "--json", str(file)]) == 0
    turns = [("minnow", True, 3, 6), ("transformers", False, 3, 6), ("transformers", True, 3, 6)]
    assert asked == turns * 2  # to warm up, and in the only round
    assert {"minnow", "transformers", "transformers_compiled"} <= set(json.loads(file.read_text()))


def test_a_mixture_is_not_said_to_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def note(model: CausalLM, compiled: bool) -> bench_generate.Generate:
        made.append(compiled)
        return lambda prompts, new_tokens: None

    monkeypatch.setattr(bench_generate, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(bench_generate, "minnow_generate", note)
    monkeypatch.setattr(bench_generate, "transformers_generate", lambda *_, **options: lambda prompts, tokens: None)
    file, experts = tmp_path / "figures.json", ["--model.experts.moe_intermediate_size", "16"]
    sizes = ["--streams", "[3]", "--new_tokens", "[6]", "--compile", "true"]
    assert cli.main(["bench", "generate", *TINY, *experts, *sizes, "--json", str(file)]) == 0
    assert made == [False]
    assert json.loads(file.read_text())["compiled"] is False


def test_the_compiled_rival_has_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, caches = [], []
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(options["dynamic"]) or step)
    make = StaticCache.__init__
    monkeypatch.setattr(
        StaticCache, "__init__", lambda self, *a, **k: caches.append(k["max_cache_len"]) or make(self, *a, **k)
    )
    shape = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    model = CausalLM(shape)
    bench_generate.transformers_generate(model)([[5, 6, 7]], 4)
    assert not compiled
    assert not caches
    bench_generate.transformers_generate(model, compiled=True)([[5, 6, 7]], 4)
    assert compiled == [False]
    assert caches == [3 + 4 - 1]  # what the last token adds is never read


def test_no_run_finds_the_prompts_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    note = Sequence.note_cached
    monkeypatch.setattr(Sequence, "note_cached", lambda self, tokens: found.append(tokens) or note(self, tokens))
    shape = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    generate = bench_generate.minnow_generate(CausalLM(shape), compiled=False)
    for _ in range(2):
        generate([list(range(3, 300))], 2)
    assert found == [0, 0]


def test_lengths_must_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "generate", *TINY, "--streams", "[1]"]) == 2
    assert "2 numbers for 1 --streams" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--rounds 0", "--streams 0 --new_tokens 4", "--streams 1 --new_tokens 0"])
def test_numbers_that_time_nothing_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "generate", *TINY, *wrong.split()]) == 2
    assert "must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="--rounds, --rows and --sequence_length must be at least 1"):
        bench_train.Config(rounds=0)
