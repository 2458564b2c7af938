"""`minnow quickstart`: raw text to a chatting model, offline, in minutes.

Nothing here is special to the quickstart: it calls the stages a user would call, one after the other, and each
leaves its own run folder inside `runs/quickstart`. What is finished is not done again, so a run that was stopped
continues where it was.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minnow.config import UserError, refuse_unused
from minnow.console import plain_console, printable, program
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.data.prepare import DataConfig
from minnow.data.readers import read_texts
from minnow.disk import atomic_write, new_folder_beside
from minnow.engine.engine import Engine
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.evaluate import TaskResult, evaluate, show, write_results, write_rows
from minnow.evaluation.registry import TaskOptions, make_tasks
from minnow.model.config import ModelConfig
from minnow.model.pretrained import load_pretrained
from minnow.model.size import parameter_count, training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.report.run_report import write_report
from minnow.stages import pretrain, sft
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.training.config import TrainingConfig
from minnow.training.hardware import DeviceName, precision_name
from minnow.training.probe import random_batch, tokens_per_second
from minnow.training.run_folder import RunFolder
from minnow.training.session import Machine

# Generating the pond, the tokenizer, the evaluation and the report take about this long beside the training.
OTHER_MINUTES = 0.8


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The embedded world (docs/pond.md)."""

    seed: int = 0
    """Another seed is another world: other names, other facts."""
    creatures: int = 150
    """Creatures in the world; each has nine facts."""
    held_out: int = 60
    """Creatures about which no training text asks anything; they are the examination."""
    mentions: int = 280
    """How often each fact is stated in the pretraining text, both languages together."""
    conversations: int = 12_000
    """Conversations for fine-tuning, about the other creatures."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make a small bilingual model from nothing: pond, tokenizer, pretraining, fine-tuning, examination, report."""

    run: str = "runs/quickstart"
    """Run folder; the final model is in its model/ folder."""
    overwrite: bool = False
    """Delete what is in the run folder and start anew."""
    minutes: float | None = None
    """Time to spend, in minutes; by default the whole recipe. Training is cut or stretched by a measured probe."""
    device: DeviceName = "auto"
    """auto takes CUDA, else MPS, else the CPU."""
    chat: bool = True
    """On a terminal, open the chat at the end."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The embedded world."""
    vocab_size: int = 1700
    """Tokens in the vocabulary."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    """Shape of the model."""
    sequence_length: int = 512
    """Tokens in a packed row."""
    pretrain: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=420, batch_tokens=8_192, validate_every=70, save_every=70, validation_tokens=16_384
        )
    )
    """The pretraining loop."""
    pretrain_optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer of pretraining."""
    sft: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=50, batch_tokens=8_192, validate_every=25, save_every=25, validation_tokens=16_384
        )
    )
    """The fine-tuning loop."""
    sft_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(matrix_lr=0.003, embedding_lr=0.0012, norm_lr=0.0015)
    )
    """The optimizer of fine-tuning."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_steps=10))
    """The learning rate over time, in both."""

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UserError(f"minutes is {self.minutes}: give the time to spend, more than 0")
        _steps(self.pretrain)
        _steps(self.sft)
        unused = dict.fromkeys(("nproc", "restarts", "parallel"), "the quickstart trains in this one process")
        unused["epochs"] = "the plan is made from steps"
        for section in ("pretrain", "sft"):
            refuse_unused(self, {f"{section}.{key}": owner for key, owner in unused.items()})


def run(config: Config) -> None:
    """Do it all, and say at the end how well it went and what to type next."""
    console = plain_console(stderr=True)
    run_folder = RunFolder(config.run)
    run_folder.open(config, overwrite=config.overwrite)
    clock = _Clock(run_folder.path)
    try:
        config = _fit_into_minutes(config, console)
        _make_data(config, run_folder.path, console)
        _train(config, run_folder.path)
        _copy_model(run_folder.path)
        _examine(config, run_folder.path, clock, console)
    finally:
        clock.stop()
        run_folder.lock.release()
    if config.chat and sys.stdin.isatty() and sys.stdout.isatty():
        from minnow.stages import chat

        chat.run(chat.Config(model=config.run))


def _make_data(config: Config, folder: Path, console: Console) -> None:
    """The pond and the tokenizer, each unless it is there; the file looked for is the last one written."""
    if not (folder / "pond" / "world.json").exists():
        w = config.world
        world = World.generate(w.seed, w.creatures, w.held_out)
        rows = write_pond(folder / "pond", world, mentions=w.mentions, conversation_count=w.conversations)
        shown = ", ".join(f"{count:,} in {name}" for name, count in rows.items())
        console.print(f"pond: rows {shown}")
    if not (folder / "tokenizer" / "chat_template.jinja").exists():
        texts = read_texts([str(folder / "pond" / "pretrain.jsonl"), str(folder / "pond" / "sft.jsonl")])
        train_tokenizer(texts, config.vocab_size).save_pretrained(folder / "tokenizer")


def _train(config: Config, folder: Path) -> None:
    """Pretraining, then fine-tuning: the same two stages a user would call."""
    pretrain.run(
        pretrain.Config(
            run=str(folder / "pretrain"),
            tokenizer=str(folder / "tokenizer"),
            data=DataConfig(paths=(str(folder / "pond" / "pretrain.jsonl"),), cache_dir=str(folder / "cache")),
            model=config.model,
            sequence_length=config.sequence_length,
            training=config.pretrain,
            optim=config.pretrain_optim,
            schedule=config.schedule,
        )
    )
    sft.run(
        sft.Config(
            run=str(folder / "sft"),
            init_from=str(folder / "pretrain"),
            data=DataConfig(paths=(str(folder / "pond" / "sft.jsonl"),), cache_dir=str(folder / "cache")),
            sequence_length=config.sequence_length,
            training=config.sft,
            optim=config.sft_optim,
            schedule=config.schedule,
        )
    )


def _copy_model(folder: Path) -> None:
    """The fine-tuned model as the run's own; under its final name only when it is whole."""
    if (folder / "model").exists():
        return
    with new_folder_beside(folder / "model") as temporary:
        shutil.copytree(folder / "sft" / "model", temporary, dirs_exist_ok=True)
        os.replace(temporary, folder / "model")


def _fit_into_minutes(config: Config, console: Console) -> Config:
    """Print the plan; with `--minutes`, scale the number of updates to what a probe says this machine can do."""
    shape = replace(config.model, vocab_size=config.vocab_size, max_position_embeddings=config.sequence_length)
    training = replace(config.pretrain, device=config.device)
    machine = Machine.choose(training)
    kept = Path(config.run) / "plan.json"
    if kept.exists():
        speed = json.loads(kept.read_text(encoding="utf-8"))["tokens_per_second"]
    else:
        # Pieces of about the length of the pond's documents: attention is a fair share of the work.
        batch = random_batch(config.vocab_size, rows=max(1, 8192 // 128), sequence_length=128)
        probe_model = machine.place(CausalLM(shape), replace(training, compile="off"), 0.0, lambda text: None)
        speed = tokens_per_second(probe_model, batch)
        with atomic_write(kept) as temporary:
            temporary.write_text(json.dumps({"tokens_per_second": speed}), encoding="utf-8")
    pretrain_steps, sft_steps = _steps(config.pretrain), _steps(config.sft)
    tokens = pretrain_steps * config.pretrain.batch_tokens + sft_steps * config.sft.batch_tokens
    minutes = tokens / speed / 60 + OTHER_MINUTES
    if config.minutes is not None:
        scale = max(config.minutes - OTHER_MINUTES, 0.1) / (minutes - OTHER_MINUTES)
        pretrain_steps, sft_steps = max(4, round(pretrain_steps * scale)), max(4, round(sft_steps * scale))
        tokens = pretrain_steps * config.pretrain.batch_tokens + sft_steps * config.sft.batch_tokens
        minutes = tokens / speed / 60 + OTHER_MINUTES
    plan = Table(title="plan", show_header=False, title_justify="left")
    plan.add_row("parameters", f"{parameter_count(shape):,}")
    plan.add_row("training tokens", f"{tokens:,}")
    plan.add_row("floating-point operations", f"{tokens * training_flops_per_token(shape, 64):.2e}")
    plan.add_row("machine", f"{machine.device.type}, {precision_name(machine.dtype)}, {speed:,.0f} tokens/s in a probe")
    plan.add_row("expected time", f"{minutes:.1f} minutes")
    console.print(plan)
    return replace(
        config,
        pretrain=replace(config.pretrain, device=config.device, steps=pretrain_steps),
        sft=replace(config.sft, device=config.device, steps=sft_steps),
    )


def _steps(training: TrainingConfig) -> int:
    if training.steps is None:
        raise UserError("quickstart: pretrain.steps and sft.steps must be numbers; the plan is made from them")
    return training.steps


def _examine(config: Config, folder: Path, clock: _Clock, console: Console) -> None:
    """Held-out questions and bits per byte, a sample conversation in each language, report.html, summary.json."""
    machine = Machine.choose(config.sft)
    model = load_pretrained(folder / "model", device=machine.device)
    base = load_pretrained(folder / "pretrain" / "model", device=machine.device)
    model.compute_dtype = base.compute_dtype = machine.dtype
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    options = TaskOptions(model_folder=folder / "model")
    # Bits per byte is a figure of the base model: fine-tuning teaches it to answer, not to continue text.
    results = evaluate(model, tokenizer, make_tasks("pond", options))
    write_results(folder / "evaluation.json", config.run, results)  # for the model's card: the base's stay out
    results += [replace(r, task="bpb before sft") for r in evaluate(base, tokenizer, make_tasks("bpb", options))]
    write_rows(folder / "answers.jsonl", results)
    conversations = [_converse(model, tokenizer, questions) for questions in _sample_questions(folder)]
    summary = _summary(results, clock, parameter_count(model.config), _tokens_seen(folder))
    figures = {f"{task.task} {name}": f"{bar.value:.4f}" for task in results for name, bar in task.figures.items()}
    report = write_report(folder, title="minnow quickstart", figures=figures, conversations=conversations)
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results, console)
    for messages in conversations:
        console.print()
        for message in messages:
            colour = "cyan" if message["role"] == "user" else "green"
            console.print(f"{message['role']:>9}  ", style=colour, end="")
            console.print(printable(message["content"]))
    console.print(f"\n{summary['minutes']:.1f} minutes. The report is {report}. Next:")
    minnow, run, base_run = program(), shlex.quote(config.run), shlex.quote(str(folder / "pretrain"))
    for command in (
        f"chat {run}",
        f"generate {base_run} --prompt 'The pond'",
        f"eval {run} --tasks pond,bpb",
    ):
        console.print(f"  {minnow} {command}", soft_wrap=True)  # a broken line could not be copied


def _sample_questions(folder: Path) -> list[list[str]]:
    """Three questions in each language about a creature that no training question named."""
    rows = [json.loads(line) for line in (folder / "pond" / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = []
    for language in ("en", "zh"):
        chosen = [r for r in rows if (r["split"], r["wording"], r["language"]) == ("held_out", "trained", language)]
        samples.append([row["prompt"] for row in chosen[:3]])
    return samples


def _converse(model: CausalLM, tokenizer: Tokenizer, questions: list[str]) -> list[dict[str, str]]:
    engine = Engine(model, tokenizer)
    messages: list[Message] = []
    for question in questions:
        messages.append(Message("user", question))
        prompt = render(tokenizer, Conversation(tuple(messages)), add_generation_prompt=True).ids.tolist()
        (answer,) = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=64))
        messages.append(Message("assistant", answer.completions[0].text))
    return [{"role": message.role, "content": message.content} for message in messages]


def _tokens_seen(folder: Path) -> int:
    total = 0
    for stage in ("pretrain", "sft"):
        lines = (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        total += max(json.loads(line).get("tokens", 0) for line in lines)
    return total


def _summary(results: list[TaskResult], clock: _Clock, parameters: int, tokens: int) -> dict[str, object]:
    summary: dict[str, object] = {"minutes": round(clock.minutes, 2), "parameters": parameters, "tokens": tokens}
    for result in results:
        for name, bar in result.figures.items():
            kind, language = name.split("/")
            summary.setdefault(kind, {})[language] = round(bar.value, 4)  # type: ignore[index]
    return summary


class _Clock:
    """Minutes worked on this run, over all the times it was started; a finished run's stay what they were."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "clock.json"
        self.finished = (folder / "summary.json").exists()
        kept = folder / "summary.json" if self.finished else self.path
        self.before = json.loads(kept.read_text(encoding="utf-8"))["minutes"] if kept.exists() else 0.0
        self.start = time.monotonic()

    @property
    def minutes(self) -> float:
        now = 0.0 if self.finished else (time.monotonic() - self.start) / 60
        return float(self.before + now)

    def stop(self) -> None:
        """Keep the time so far."""
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps({"minutes": self.minutes}), encoding="utf-8")
