"""`minnow lora`, `merge-lora`, and an adapter wherever a model is asked for."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minnow import cli
from minnow.engine import Engine
from minnow.export.hub import FILES
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained, load_with_adapter, save_pretrained
from minnow.report.lineage import MERGED_FROM, lineage
from minnow.report.model_card import write_model_card
from minnow.tokenizer import Tokenizer
from minnow.training.metrics_log import MetricsLog
from minnow.training.signals import Interrupted
from minnow.training.trainer import Trainer

from .stage_helpers import save_random_model

SETTINGS = (
    "--training.device cpu --training.precision fp32 --training.compile off --training.steps 6 --training.save_every 2"
    " --training.validate_every 3 --sequence_length 64 --training.batch_tokens 256 --training.micro_batch_tokens 128"
    " --lora.rank 4 --lora.dropout 0.1"
)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    rows = [
        [{"role": "user", "content": f"Who is number {i}?"}, {"role": "assistant", "content": f"Fish {i}."}]
        for i in range(60)
    ]
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in rows)
    (tmp_path / "data.jsonl").write_text(text)
    save_random_model(tmp_path / "base")
    model = load_pretrained(tmp_path / "base")
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # they start at zero, and the model says nothing
            torch.nn.init.normal_(parameter, std=0.1)
    save_pretrained(model, tmp_path / "base", Tokenizer.from_pretrained(tmp_path / "base"))
    return tmp_path


def train(start: Path, run: str, *words: str, command: str = "lora") -> Path:
    data = ["--data.paths", str(start / "data.jsonl"), "--data.cache_dir", str(start / "cache")]
    target = ["--init_from", str(start / "base"), "--run", str(start / run)]
    assert cli.main([command, *SETTINGS.split(), *data, *target, *words]) == 0
    return start / run


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_holds_only_adapters(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (start / "base/model.safetensors").read_bytes()
    run = train(start, "run")
    assert "parameters in adapters beside" in capsys.readouterr().err
    assert (start / "base/model.safetensors").read_bytes() == before
    weights = load_file(run / "model/adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    checkpoint = run / "checkpoints/step-00000006"
    kept = {name: t for file in checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
    assert all("lora_" in name for name in kept)
    assert sum(name.startswith("model.") for name in kept) == len(weights)
    assert any(name.startswith("optimizer.") for name in kept)
    assert not list(run.rglob("model.safetensors"))
    assert json.loads((run / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(start / "base")


def test_resumes_bit_for_bit(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(start, "whole")
    step = Trainer.train_step

    def stop_at_four(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == 4:
            raise Interrupted(15, "stopped")
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stop_at_four)
    with pytest.raises(SystemExit):
        train(start, "cut")
    monkeypatch.undo()
    cut = train(start, "cut")
    assert same(whole / "model/adapter_model.safetensors", cut / "model/adapter_model.safetensors")
    losses = [[row.get("loss") for row in MetricsLog(run / "metrics.jsonl").read()] for run in (whole, cut)]
    assert losses[0] == losses[1]


def test_another_base_under_a_run_is_refused(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints hold adapters only: the rest of the run would have trained them on another model."""
    step = Trainer.train_step

    def stop_at_four(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == 4:
            raise Interrupted(15, "stopped")
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at_four)
        with pytest.raises(SystemExit):
            train(start, "cut")
    kept = (start / "base/model.safetensors").read_bytes()
    model = load_pretrained(start / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] += 0.01
    save_pretrained(model, start / "base", Tokenizer.from_pretrained(start / "base"))
    with pytest.raises(AssertionError):  # exit code 2
        train(start, "cut")
    assert "cut was started with other weights of its base" in " ".join(capsys.readouterr().err.split())
    (start / "base/model.safetensors").write_bytes(kept)
    train(start, "cut")


def test_a_merged_models_card_names_the_run_of_its_adapter(start: Path) -> None:
    run = train(start, "run")
    assert cli.main(["merge-lora", str(run), "--out", str(start / "merged")]) == 0
    card = write_model_card(start / "merged")
    assert card is not None
    text = card.read_text(encoding="utf-8")
    assert "# merged" in text
    assert "run: the settings" in text
    assert "rank:" in text
    assert str(start) not in text, "a card names nothing of this machine"
    assert not any(fnmatch(MERGED_FROM, pattern) for pattern in FILES), "nor does what is published"
    (start / "next").mkdir()
    (start / "next/config.yaml").write_text(f"init_from: {start / 'merged'}\n", encoding="utf-8")
    (start / "next/metrics.jsonl").touch()
    assert [each.folder.name for each in lineage(start / "next")] == ["run", "next"]


def test_an_adapter_stands_for_a_model(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(start, "run")
    assert cli.main(["merge-lora", str(run), "--out", str(start / "merged")]) == 0
    tokens_BT = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(20).expand(2, -1)

    def logits(model):
        model.eval()
        return model.logits(model(tokens_BT, positions_BT, CausalAttention()))

    expected = logits(load_with_adapter(run))
    for folder in (run, run / "model", start / "merged"):
        torch.testing.assert_close(logits(load_pretrained(folder)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(load_pretrained(start / "base")), expected, atol=1e-4)
    assert (start / "merged/config.json").exists()
    assert Tokenizer.from_pretrained(start / "merged").vocab_size == Tokenizer.from_pretrained(run).vocab_size
    assert Engine.from_pretrained(run).generate([[5, 6, 7]])
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--prompt", "fish", "--max_tokens", "2"]) == 0
    # a whole fine-tuning may start from it, and another adapter only once it is merged
    assert train(start, "second", "--lora.rank", "0", "--lora.dropout", "0", "--init_from", str(run), command="sft")
    assert (start / "second/model/model.safetensors").exists()
    words = ["--run", str(start / "third"), "--init_from", str(run), "--data.paths", str(start / "data.jsonl")]
    assert cli.main(["lora", *words]) == 2
    assert "is an adapter, and another goes onto whole models only: merge it first" in capsys.readouterr().err


def test_another_place_of_the_base(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(start, "run")
    (start / "base").rename(start / "moved")
    assert cli.main(["merge-lora", str(run), "--out", str(start / "merged")]) == 2
    assert "is an adapter, and its base cannot be had" in capsys.readouterr().err
    assert cli.main(["merge-lora", str(run), "--out", str(start / "merged"), "--base", str(start / "moved")]) == 0
    assert cli.main(["merge-lora", str(run), "--out", str(start / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_merged_model_has_its_adapters_tokenizer_or_else_its_bases(start: Path) -> None:
    """PEFT's folders have none; the place of the base that the adapter names may be gone."""
    run = train(start, "run")
    (start / "base").rename(start / "moved")
    template = run / "model/chat_template.jinja"
    template.write_text(template.read_text() + "{# taught #}")
    assert cli.main(["merge-lora", str(run), "--out", str(start / "own"), "--base", str(start / "moved")]) == 0
    assert (start / "own/chat_template.jinja").read_text() == template.read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run / "model" / name).unlink()
    assert cli.main(["merge-lora", str(run), "--out", str(start / "bases"), "--base", str(start / "moved")]) == 0
    assert (start / "bases/tokenizer.json").read_text() == (start / "moved/tokenizer.json").read_text()


@pytest.mark.parametrize("command", ["sft", "pretrain"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_stage_takes_it(start: Path, command: str, optimizer: str) -> None:
    if command == "pretrain":
        (start / "data.jsonl").write_text("".join(json.dumps({"text": f"Fish {i} swims."}) + "\n" for i in range(200)))
    run = train(start, "run", "--optim.optimizer", optimizer, "--lora.dora", "true", command=command)
    assert (run / "model/adapter_model.safetensors").exists()


def test_refused(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.paths", str(start / "data.jsonl"), "--run", str(start / "run")]
    assert cli.main(["lora", "--lora.rank", "0", "--init_from", str(start / "base"), *data]) == 2
    assert "--lora.rank is 0" in capsys.readouterr().err
    assert cli.main(["pretrain", "--lora.rank", "4", "--tokenizer", str(start / "base"), *data]) == 2
    assert "needs a trained model" in capsys.readouterr().err
    assert cli.main(["merge-lora", str(start / "base"), "--out", str(start / "merged")]) == 2
    assert "a whole model, not an adapter" in capsys.readouterr().err
    assert not (start / "run").exists()
