"""`minnow rl`: let a model practise, reward it, and make what earned more likelier. PPO, GRPO, SPO ... are presets."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import is_reward_model, load_pretrained, load_reward_model, resolve_model_folder
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.run_report import write_report
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.critic import Critic
from minnow.rl.experience import PolicyBatch, PolicyObjective
from minnow.rl.figures import Watch, WatchConfig
from minnow.rl.gathered_engine import GatheredEngine, as_computed
from minnow.rl.held_out import HeldOut
from minnow.rl.phases import Phases, PhaseSettings
from minnow.rl.remote_engine import RemoteEngine, RemoteEngineConfig
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutEngine, live_engine
from minnow.stages.practice import Practice, PracticeConfig, practice_flops, practice_rows, read_practice
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.distribution import is_first, world_size
from minnow.training.parallel import choose_parallel
from minnow.training.run_folder import METRICS, ROLLOUTS, MetricsLog
from minnow.training.session import Machine, RunFolder, load_chat_start, train, with_machine
from minnow.training.trainer import Trainer

ModelT = TypeVar("ModelT", bound=CausalLM)


@dataclass(frozen=True, kw_only=True)
class Config(PracticeConfig):
    """Train a model by reinforcement: rollouts, rewards, policy updates. `--preset` names an algorithm (or use
    `minnow ppo`, `grpo`, `spo`)."""

    run: str = "runs/rl"
    """Run folder: config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/, model/ and report.html go there."""
    overwrite: bool = False
    """Delete what is in the run folder and start anew."""
    init_from: str
    """Model to start from, which is the reference too: a fine-tuned model's folder, a run folder or a Hub id."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of the whole model; the reference is then the model without them."""
    phases: int = 100
    """Phases of rollouts; each gives algorithm.epochs x algorithm.minibatches updates."""
    rollout_engine: RemoteEngineConfig = field(default_factory=RemoteEngineConfig)
    """A server that plays the policy, instead of the engine in this process."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """What is rewarded."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """The algorithm; a preset fills this in."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When to stop because the policy has collapsed."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            micro_batch_tokens=8192, z_loss=0.0, compile="off", validate_every=20, save_every=20, stall_seconds=1800.0
        )
    )
    """The training loop; steps, epochs and batch_tokens are not used here (see phases and rollout)."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(optimizer="adamw", matrix_lr=1e-5, weight_decay=0.0, betas=(0.9, 0.99))
    )
    """The policy's optimizer."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="constant", warmup_steps=5))
    """The learning rate over time."""


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    console = Console(stderr=True)
    machine = Machine.choose(config.training)
    config = with_machine(config, machine)
    config.algorithm.check_samples(config.rollout.samples)
    model, tokenizer = load_chat_start(config.init_from, config.lora, seed=config.training.seed)
    model.config.check_sequence_length(config.sequence_length)
    rows_per_micro_batch = practice_rows(config.training, config.sequence_length)
    practice = read_practice(config, tokenizer)
    if config.rollout_engine.url is not None and world_size() > 1:
        raise UserError("rollout_engine.url: one process pushes weights to a server; leave out --nproc and torchrun")
    thinking = config.rollout.enable_thinking
    longest = config.rollout.max_tokens * config.rollout.max_turns
    rewarder = Rewarder(config.rewards, enable_thinking=thinking, max_tokens=longest, device=machine.device)
    _require_references(config, practice, rewarder)

    folder = RunFolder(config.run)
    folder.open(config, overwrite=config.overwrite)
    if folder.finished:
        console.print(f"{folder.path} is finished; --overwrite trains it again", highlight=False)
        return
    steps = config.phases * config.algorithm.updates_per_phase
    console.print(_summary(config, practice.prompts, steps, machine), highlight=False)
    answers = config.phases * config.rollout.prompts * config.rollout.samples * config.algorithm.epochs
    flops = practice_flops(config.rollout, answers, model)
    replica = _replica(config, model, machine)
    machine.place(model, config.training, flops, lambda text: console.print(text, highlight=False))
    engine = _engine(config, model, replica, tokenizer)
    source = Phases(
        PhaseSettings(
            algorithm=config.algorithm,
            rollout=config.rollout,
            sequence_length=config.sequence_length,
            rows_per_micro_batch=rows_per_micro_batch,
            seed=config.training.seed,
        ),
        engine=engine,
        reference=_reference(config, engine, machine),
        critic=_critic(config, machine),
        prompts=practice.prompts,
        make_environment=practice.make_environment,
        rewarder=rewarder,
        log=MetricsLog(folder.path / ROLLOUTS),
        watch=Watch(config.watch),
    )
    trainer: Trainer[PolicyBatch] = Trainer(
        config.training,
        folder=folder.path,
        title="rl",
        model=model,
        optimizers=build_optimizers(model, config.optim),
        schedule=config.schedule,
        objective=PolicyObjective(
            config.algorithm.loss, config.rollout.temperature, config.rollout.max_tokens * config.rollout.max_turns
        ),
        source=source,
        total_steps=steps,
        evaluations=[_held_out(config, engine, practice, rewarder)] if practice.held_out else [],
    )
    train(trainer, folder, tokenizer, console)
    if is_first():
        console.print(_where_time_went(folder.path), highlight=False)
        write_report(folder.path)


def _where_time_went(folder: Path) -> str:
    """Shares of the updates' time, rollouts included; validations and checkpoints are not counted."""
    phases, updates = MetricsLog(folder / ROLLOUTS).read(), MetricsLog(folder / METRICS).read()
    playing, scoring = (sum(phase[f"seconds_{name}"] for phase in phases) for name in ("playing", "scoring"))
    total = sum(update.get("seconds", 0.0) for update in updates)
    updating = total - playing - scoring
    shares = {"playing": playing, "scoring": scoring, "updating": updating}
    return "time: " + ", ".join(f"{seconds / total:.0%} {name}" for name, seconds in shares.items())


def _require_references(config: Config, practice: Practice, rewarder: Rewarder) -> None:
    """UserError where nothing but right answers counts and no row says what right is: every one would earn 0."""
    only = "answer" in rewarder.names and set(rewarder.names) <= {"answer", "environment"}
    if only and config.environment != "guess" and all(prompt.reference is None for prompt in practice.prompts):
        raise UserError(
            "rewards.answer has a weight, but no prompt has an answer to compare with: name the column `answer`, or "
            "set rewards.answer 0 and reward something else"
        )


def _held_out(config: Config, engine: RolloutEngine, practice: Practice, rewarder: Rewarder) -> HeldOut:
    return HeldOut(
        engine, practice.held_out, practice.make_environment, rewarder, config.rollout, config.sequence_length
    )


def _summary(config: Config, prompts: list[Prompt], steps: int, machine: Machine) -> str:
    rollout = config.rollout
    return (
        f"rl: {len(prompts):,} prompts; {config.phases} phases of {rollout.prompts} x {rollout.samples} answers, "
        f"{config.algorithm.advantage} advantage, {steps} updates; {machine.device.type}, {config.training.precision}"
    )


def _replica(config: Config, model: CausalLM, machine: Machine) -> CausalLM | None:
    """What plays where the model itself will be in slices; None where it stays whole."""
    if world_size() == 1 or choose_parallel(config.training.parallel, model, machine.device) == "ddp":
        return None
    return as_computed(copy.deepcopy(model), machine.device, machine.dtype)


def _engine(config: Config, model: CausalLM, replica: CausalLM | None, tokenizer: Tokenizer) -> RolloutEngine:
    if replica is not None:
        return GatheredEngine(model, replica, tokenizer)
    if config.rollout_engine.url is None:
        return live_engine(model, tokenizer)
    return RemoteEngine(config.rollout_engine, model, tokenizer, Path(config.run) / "policy")


def _reference(config: Config, engine: RolloutEngine, machine: Machine) -> CausalLM | None:
    """The model as it was, in the policy's own precision (another would show as a KL divergence: bug B4)."""
    if not config.algorithm.needs_reference:
        return None
    if config.lora.rank:
        return engine.model
    reference = load_pretrained(resolve_model_folder(config.init_from)).requires_grad_(False).eval()
    if isinstance(engine, GatheredEngine):
        return as_computed(reference, machine.device, machine.dtype)
    return _alone(reference, machine)


def _critic(config: Config, machine: Machine) -> Critic | None:
    if config.algorithm.advantage != "gae":
        return None
    folder = resolve_model_folder(config.algorithm.critic.init_from or config.init_from)
    if is_reward_model(folder):
        model = load_reward_model(folder)
    else:
        model = RewardModel.from_language_model(load_pretrained(folder))
    return Critic(_alone(model, machine), config.algorithm.critic)


def _alone(model: ModelT, machine: Machine) -> ModelT:
    """Put a model that the Trainer does not train on the device, whole on every process."""
    model.to(machine.device, torch.float32)
    model.compute_dtype = machine.dtype
    return model
