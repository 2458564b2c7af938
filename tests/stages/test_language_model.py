"""What pretraining and fine-tuning refuse, and what they keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minnow.cli import main
from minnow.config import UserError
from minnow.data.prepare import DataConfig
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.stages import distill, pretrain, sft
from minnow.stages.language_model import num_held_out_rows, total_steps
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.lock import FolderLock
from minnow.training.run_folder import RunFolder
from minnow.training.validation import LanguageModelValidation

from .stage_helpers import save_random_model

TEXTS = [f"The {colour} fish number {i} swims in the pond." for i in range(60) for colour in ("red", "blue")]


@pytest.fixture
def config(tmp_path: Path) -> pretrain.Config:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path / "tokenizer")
    return pretrain.Config(
        run=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        data=DataConfig(paths=(str(tmp_path / "texts.jsonl"),), cache_dir=str(tmp_path / "cache")),
        model=ModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        ),
        sequence_length=64,
        training=TrainingConfig(steps=4, batch_tokens=256, device="cpu", validate_every=2),
    )


def test_the_run_folder_says_what_really_ran(config: pretrain.Config) -> None:
    pretrain.run(config)
    run = Path(config.run)
    text = (run / "config.yaml").read_text()
    assert "precision: fp32" in text or "precision: bf16" in text
    assert "vocab_size: 320" in text
    assert "max_position_embeddings: 64" in text, "no length that was never trained may be advertised (E8)"
    assert {"metrics.jsonl", "checkpoints", "model", "report.html"} <= {path.name for path in run.iterdir()}
    saved = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= saved


def test_what_is_trained_already_learns_at_a_fifth_of_the_rate(config: pretrain.Config) -> None:
    """`minnow sft`, `distill` and continued pretraining had a new model's rates where none was given, five times those
    of the recipes: enough to lose much of what the model knew."""
    talk = {"messages": [{"role": "user", "content": "Who swims?"}, {"role": "assistant", "content": "The red fish."}]}
    talks = Path(config.run).parent / "talks.jsonl"
    talks.write_text(f"{json.dumps(talk)}\n" * 40)
    once = replace(config.training, steps=1, validate_every=0)
    pretrain.run(replace(config, training=once))
    further = {"init_from": config.run, "sequence_length": 64, "training": once}
    taught = further | {"data": replace(config.data, paths=(str(talks),))}
    rates = {"new": _peak(config.run)}
    for name, stage, settings in (
        ("pretrain", pretrain, further | {"data": config.data}),
        ("sft", sft, taught),
        ("adapters", sft, taught | {"lora": LoraConfig(rank=2)}),
    ):
        stage.run(stage.Config(run=f"{config.run}-{name}", **settings))
        rates[name] = _peak(f"{config.run}-{name}")
    distill.run(distill.Config(run=f"{config.run}-distill", teacher=config.run, **taught))
    rates["distill"] = _peak(f"{config.run}-distill")
    assert rates == pytest.approx({"new": 0.01, "pretrain": 0.002, "sft": 0.002, "adapters": 0.01, "distill": 0.002})


def _peak(run: str) -> float:
    """The rate of the only update: a run of one has no warm-up."""
    return float(json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[0])["lr"])


def test_the_best_model_is_what_patience_leaves(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def worse_and_worse(_: object, model: torch.nn.Module) -> dict[str, float]:
        seen.append(next(model.parameters()).detach().float().clone())
        return {"validation_loss": float(len(seen)), "bits_per_byte": 1.0}

    monkeypatch.setattr(LanguageModelValidation, "__call__", worse_and_worse)
    pretrain.run(replace(config, training=replace(config.training, steps=40, validate_every=1, patience=2)))
    assert len(seen) == 3
    saved = next(load_pretrained(Path(config.run) / "model").parameters()).float()
    assert torch.equal(saved, seen[0])
    assert not torch.equal(saved, seen[-1])


def test_patience_without_anything_to_validate_on_is_refused(config: pretrain.Config) -> None:
    """It was left unread, and the last weights passed for the best."""
    data = replace(config.data, validation_fraction=0.0)
    with pytest.raises(UserError, match="patience is 2, but nothing is held out"):
        pretrain.run(replace(config, data=data, training=replace(config.training, patience=2)))
    assert not Path(config.run).exists()


def test_an_epoch_ends_with_the_last_row_and_validation_where_it_may(config: pretrain.Config) -> None:
    rows: Any = SimpleNamespace(num_rows=10, window_rows=[3, 3])
    # 10 rows are two batches of 4 and a part.
    assert [total_steps(TrainingConfig(epochs=epochs), rows, 4) for epochs in (0.1, 1, 2)] == [1, 3, 5]
    assert total_steps(TrainingConfig(epochs=2, steps=7), rows, 4) == 7
    for tokens, expected in ((1, 1), (4 * 64, 4), (100 * 64, 6)):
        training = replace(config.training, validation_tokens=tokens)
        assert num_held_out_rows(rows, replace(config, training=training)) == expected


def test_a_run_folder_in_brackets_is_no_markup(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    run = f"{config.run}/[new]/[/x]"
    pretrain.run(replace(config, run=run, training=replace(config.training, steps=1)))
    assert f"model written to {run}/model\n" in capsys.readouterr().err


def test_another_configuration_is_refused_by_key(config: pretrain.Config) -> None:
    pretrain.run(config)
    with pytest.raises(UserError, match=r"training\.clip_norm: 1\.0 there, 2\.0 now"):
        pretrain.run(replace(config, training=replace(config.training, clip_norm=2.0)))


def test_a_handful_of_updates_is_told(config: pretrain.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A few hundred rows are a batch or two of the default size, and the model ends as it began."""
    rows = replace(config, training=replace(config.training, steps=None, batch_tokens=4096))
    pretrain.run(rows)
    told = " ".join(capsys.readouterr().err.split())
    assert "note: the data make 1 update, too few to learn much: a smaller --training.batch_tokens or more" in told
    pretrain.run(replace(config, run=f"{config.run}-asked"))
    assert "too few" not in capsys.readouterr().err, "who asks for steps knows how many"


def test_the_folder_is_locked_until_the_model_is_in_it(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def save(*words, **named) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(UserError, match="in use"):
            FolderLock(Path(config.run)).take()
        tried.append(save_pretrained(*words, **named))

    monkeypatch.setattr("minnow.training.session.save_pretrained", save)
    pretrain.run(config)
    assert tried
    FolderLock(Path(config.run)).take()


def test_only_the_first_process_draws_weights(config: pretrain.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(parameter.is_meta for parameter in pretrain.start(config)[1].parameters())
    monkeypatch.setattr("minnow.stages.pretrain.is_first", lambda: False)
    assert all(parameter.is_meta for parameter in pretrain.start(config)[1].parameters())


def test_what_a_message_tells_to_change_may_be_changed(config: pretrain.Config) -> None:
    """Room on a disk, fewer workers, another number of processes: with these a stopped run goes on."""
    pretrain.run(config)
    training = replace(config.training, keep_last=1, save_every=3, log_every=2, nproc=2, parallel="fsdp", restarts=1)
    training = replace(training, resume=2, stall_seconds=0.0, profile=True, track=("tensorboard",))
    pretrain.run(replace(config, training=training, data=replace(config.data, workers=1)))


def test_it_says_from_where_a_run_goes_on_and_why_not_from_later(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    pretrain.run(config)
    run = Path(config.run)
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == ["step-00000002", "step-00000004"]
    (run / "model" / "config.json").unlink()  # as if the run had been stopped
    (checkpoints[1] / "state.json").unlink()
    pretrain.run(config)
    said = capsys.readouterr().err
    assert "not resumed from step-00000004: state.json is missing\n" in said
    assert f"continuing {run} from step 2\n" in said
    (run / "model" / "config.json").unlink()
    for folder in checkpoints:
        (folder / "complete.json").unlink()
    pretrain.run(config)
    said = capsys.readouterr().err
    assert said.count(": unfinished: ") == 2
    assert "no whole checkpoint is left: starting anew\n" in said


def test_data_that_changed_under_a_run_is_refused(config: pretrain.Config) -> None:
    pretrain.run(config)
    run = Path(config.run)
    (run / "model" / "config.json").unlink()  # as if the run had been stopped
    with open(config.data.paths[0], "a") as file:
        file.write(json.dumps({"text": "a new document"}) + "\n")
    with pytest.raises(UserError, match="other data"):
        pretrain.run(config)


def test_a_run_does_not_learn_from_a_damaged_shard(config: pretrain.Config, tmp_path: Path) -> None:
    pretrain.run(config)
    (shard,) = Path(config.data.cache_dir).glob("*/train/00000-000.tokens")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"train/00000-000\.tokens: content does not match its checksum; delete"):
        pretrain.run(replace(config, run=str(other)))
    assert not (other / "metrics.jsonl").exists()


def test_a_model_that_a_kill_left_half_written_does_not_stay(config: pretrain.Config) -> None:
    """It goes at the start already: the run needs the room."""
    left_over = Path(config.run) / ".model.0a1b2c3d.tmp"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").write_bytes(b"half")
    left_over.with_suffix(".lock").touch()
    run = RunFolder(config.run)
    run.open(config, overwrite=False)
    run.lock.release()
    assert not [path.name for path in Path(config.run).iterdir() if path.name.startswith(".model.")]


def test_overwrite_deletes_runs_only(config: pretrain.Config, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no run"):
        pretrain.run(replace(config, run=str(precious), overwrite=True))
    assert (precious / "thesis.txt").exists()
    pretrain.run(config)
    pretrain.run(replace(config, overwrite=True, training=replace(config.training, clip_norm=2.0)))


def test_batch_that_is_no_multiple_of_the_row(config: pretrain.Config) -> None:
    with pytest.raises(UserError, match=r"batch_tokens \(100\) must be a multiple of sequence_length \(64\)"):
        pretrain.run(replace(config, training=replace(config.training, batch_tokens=100)))
    assert not Path(config.run).exists(), "a mistake must not occupy the run folder"


def test_tokenizer_is_asked_for(config: pretrain.Config) -> None:
    with pytest.raises(UserError, match="minnow tokenizer train"):
        pretrain.run(replace(config, tokenizer=None))


def test_another_tokenizer_than_the_models_own_is_refused(config: pretrain.Config, tmp_path: Path) -> None:
    """As many tokens, but other ones: the model would read nonsense and nothing would say so."""
    pretrain.run(config)
    size = Tokenizer.from_pretrained(config.run).vocab_size
    other = train_tokenizer(["zebras quickly jump over vexing hedges"] * 200 + ["黑熊吃蜂蜜"] * 200, size)
    other.save_pretrained(tmp_path / "other")
    again = replace(config, run=str(tmp_path / "again"), init_from=config.run)
    with pytest.raises(UserError, match="not the one of"):
        pretrain.run(replace(again, tokenizer=str(tmp_path / "other")))
    pretrain.run(replace(again, tokenizer=config.tokenizer))


def test_new_experts_are_not_trained_by_adapters(config: pretrain.Config, tmp_path: Path) -> None:
    """Upcycling made a plain model of one with adapters, and of int8 weights nonsense."""
    pretrain.run(config)
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    shape = replace(config.model, experts=experts)
    both = replace(config, run=str(tmp_path / "b"), init_from=config.run, model=shape, lora=LoraConfig(rank=4))
    with pytest.raises(UserError, match="exclude each other"):
        pretrain.run(both)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_of_a_dense_model_are_chosen_by_what_the_text_teaches(
    config: pretrain.Config, tmp_path: Path, scoring: str
) -> None:
    """B1 by another way: a new mixture with one expert a token of weight 1 was refused, one made of a dense model was
    trained, with a router that learnt nothing from the text."""
    pretrain.run(config)
    experts = ExpertsConfig(
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=True,
        moe_intermediate_size=32,
        scoring=scoring,
        n_shared_experts=int(scoring == "sigmoid"),
    )
    shape = replace(config.model, experts=experts)
    for start in (None, config.run):
        with pytest.raises(UserError, match="the router would learn nothing from the text"):
            pretrain.run(replace(config, run=str(tmp_path / "moe"), init_from=start, model=shape))


def test_a_mixture_from_elsewhere_whose_router_cannot_learn_is_told(
    config: pretrain.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B1 came with minimind's own mixture: it was trained on without a word."""
    for norm in (True, False):
        experts = ExpertsConfig(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, norm_topk_prob=norm)
        tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
        shape = replace(config.model, experts=experts, vocab_size=tokenizer.vocab_size)
        save_pretrained(CausalLM(shape), tmp_path / f"theirs-{norm}", tokenizer)
        start = str(tmp_path / f"theirs-{norm}")
        once = replace(config.training, steps=1, validate_every=0)
        pretrain.run(replace(config, run=f"{config.run}-{norm}", init_from=start, tokenizer=None, training=once))
        said = " ".join(capsys.readouterr().err.split())
        assert ("the routers learn nothing from the text" in said) == norm


def test_a_context_is_stretched_in_training(config: pretrain.Config, tmp_path: Path) -> None:
    pretrain.run(config)
    longer = replace(
        config,
        run=str(tmp_path / "longer"),
        init_from=config.run,
        tokenizer=None,
        rope_scaling="yarn",
        sequence_length=160,
        training=replace(config.training, batch_tokens=320),
    )
    pretrain.run(longer)
    content = json.loads((tmp_path / "longer" / "model" / "config.json").read_text())
    assert content["max_position_embeddings"] == 160
    rope = content["rope_parameters"]
    # The factor is the sequence length's: 160 / 64.
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.5, 64)
    assert "factor: 2.5" in (tmp_path / "longer" / "config.yaml").read_text()
    with pytest.raises(UserError, match="cannot be stretched twice"):
        pretrain.run(replace(longer, run=str(tmp_path / "again"), init_from=longer.run, sequence_length=320))


def test_stretching_is_for_trained_models_and_long_enough(config: pretrain.Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name it with --init-from"):
        pretrain.run(replace(config, rope_scaling="yarn"))
    pretrain.run(config)
    more = replace(config, run=str(tmp_path / "more"), init_from=config.run, sequence_length=128)
    with pytest.raises(UserError, match="--rope-scaling yarn"):
        pretrain.run(more)
    with pytest.raises(UserError, match=r"--sequence-length 128: .* at most 96 tokens"):
        pretrain.run(replace(more, rope_scaling="ntk", factor=1.5))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_from_elsewhere_is_trained_on_and_goes_back(
    config: pretrain.Config, tmp_path: Path, kind: str
) -> None:
    """As transformers saves it, in shards, with biases where the class has them."""
    shape = {
        "vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96,
    }  # fmt: skip
    if kind != "qwen2":
        shape |= {"attention_bias": True, "head_dim": 16}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    Tokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "theirs")
    pretrain.run(replace(config, init_from=str(tmp_path / "theirs"), tokenizer=None))
    back = AutoModelForCausalLM.from_pretrained(Path(config.run) / "model")
    assert type(back) is type(theirs)
    moved = {name for name, weight in back.state_dict().items() if not torch.equal(weight, theirs.state_dict()[name])}
    assert moved == theirs.state_dict().keys()
    tokens = torch.arange(40)[None]
    ours = load_pretrained(config.run)
    with torch.no_grad():
        logits = ours.logits(ours(tokens, tokens, CausalAttention()))
        torch.testing.assert_close(logits, back(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_batch_size_rule_is_used_in_training(config: pretrain.Config) -> None:
    """`optim.reference_batch_tokens` reached the plan only; training with it ended in an AssertionError."""
    optim = OptimConfig(optimizer="adamw", matrix_lr=0.002, reference_batch_tokens=1024)
    schedule = ScheduleConfig(shape="constant", warmup_steps=0)
    training = replace(config.training, steps=1, validate_every=0)
    pretrain.run(replace(config, optim=optim, schedule=schedule, training=training))
    lines = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    # sqrt(256 / 1024) = 1 / 2.
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.001])


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "distill", "grpo", "distill on-policy"])
def test_rows_longer_than_the_model_reads_are_refused_with_what_to_do(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It advised `--rope-scaling`, which only `pretrain` has."""
    model = str(save_random_model(tmp_path / "m", context=128))
    data = tmp_path / "d.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a", "answer": "b"}\n')
    words = {
        "distill": ["--teacher", model, "--data.paths", str(data)],
        "distill on-policy": ["--init_from", model, "--teacher", model, "--prompts", str(prompts)],
        "grpo": ["--init_from", model, "--prompts", str(prompts)],
    }.get(stage, ["--init_from", model, "--data.paths", str(data)])
    run = ["--run", str(tmp_path / "run"), "--sequence_length", "256", "--training.device", "cpu"]
    assert main([*stage.split(), *words, *run]) == 2
    said = capsys.readouterr().err
    assert "--sequence-length 256: " in said
    assert "at most 128 tokens; give 128 or less" in said
    assert "minnow pretrain --init-from MODEL --rope-scaling yarn" in said


def test_a_run_that_was_killed_before_its_report_gets_it(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model was there, so the run passed for finished, and had neither report nor card for good."""

    def killed(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minnow.report.run_report.write_model_card", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config)
    monkeypatch.undo()
    run = Path(config.run)
    report = (run / "report.html").stat().st_mtime_ns  # as one that `minnow report` wrote half-way
    weights = (run / "model" / "model.safetensors").stat().st_mtime_ns
    pretrain.run(config)
    assert (run / "report.html").stat().st_mtime_ns > report
    assert (run / "model" / "README.md").exists()
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == weights
    report = (run / "report.html").stat().st_mtime_ns
    pretrain.run(config)
    assert (run / "report.html").stat().st_mtime_ns == report, "a finished run is left alone"
