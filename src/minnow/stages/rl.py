"""`minnow rl`: let a model practise, reward it, and make what earned more likelier. PPO, GRPO, SPO ... are presets."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from minnow.config import UserError, refuse_unused
from minnow.console import plain_console
from minnow.data.prompts import Prompt
from minnow.model.config import ModelConfig
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import (
    is_reward_model,
    load_pretrained,
    load_reward_model,
    read_config,
    resolve_model_folder,
    save_pretrained,
)
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.run_report import write_report
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.collapse import CollapseError, Watch, WatchConfig
from minnow.rl.critic import Critic
from minnow.rl.experience import PolicyBatch, PolicyObjective
from minnow.rl.gathered_engine import GatheredEngine, as_computed
from minnow.rl.held_out import HeldOut
from minnow.rl.phase_experience import PhaseSettings
from minnow.rl.phases import Phases
from minnow.rl.remote_engine import RemoteEngine, RemoteEngineConfig
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutEngine, live_engine
from minnow.stages.language_model import conclude_finished
from minnow.stages.practice import Practice, PracticeConfig, longest_batch, practice_flops, practice_rows, read_practice
from minnow.stages.rows import with_row_length
from minnow.tokenizer import Tokenizer
from minnow.training.config import NO_Z_LOSS, TrainingConfig
from minnow.training.distribution import is_first, world_size
from minnow.training.metrics_log import METRICS, ROLLOUTS, MetricsLog
from minnow.training.parallel import choose_parallel, require_parallel
from minnow.training.run_folder import RunFolder
from minnow.training.session import Machine, load_chat_start, train, with_machine
from minnow.training.trainer import Trainer

ModelT = TypeVar("ModelT", bound=CausalLM)

WORK = {
    "playing": "playing",
    "judging": "judging",
    "scoring": "scoring",
    "teaching": "teaching the critic",
    "updating": "updating",
}
"""What the time of an update goes to: its names in rollouts.jsonl, and as they are printed."""
NOT_OF_RL = {
    "training.steps": "a run has `phases`, each of algorithm.epochs x algorithm.minibatches updates",
    "training.epochs": "a run has `phases`, each of algorithm.epochs passes over its answers",
    "training.batch_tokens": "a phase is rollout.prompts x rollout.samples answers, in algorithm.minibatches parts",
    "training.patience": "it counts validation losses, of which there are none; watch.patience ends a collapsed run",
    "training.validation_tokens": "a validation asks all `held_out` prompts",
}


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
    held_out_samples: int = 0
    """At validations also draw this many answers to each held-out prompt, as in rollouts, for held_out/pass@1 and
    held_out/pass@N; 0 asks greedily only. Independent of rollout.samples."""
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
            micro_batch_tokens=8192, validate_every=20, save_every=20, stall_seconds=1800.0
        )
    )
    """The training loop, without steps, epochs, batch_tokens and validation_tokens (see phases, rollout, held_out)."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(optimizer="adamw", matrix_lr=1e-5, weight_decay=0.0, betas=(0.9, 0.99))
    )
    """The policy's optimizer."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="constant", warmup_steps=5))
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if self.phases < 1:
            raise UserError(f"phases is {self.phases}: it must be at least 1")
        if self.lora.dropout:
            raise UserError(
                f"lora.dropout is {self.lora.dropout}: an update compares the policy with itself as it played, and "
                "would take what is dropped for a step away from it; leave it out"
            )
        if self.held_out_samples < 0:
            raise UserError(f"held_out_samples is {self.held_out_samples}: it must be 0 or more")
        if self.held_out_samples and not self.held_out:
            raise UserError("held_out_samples needs held_out: files with the prompts to ask")
        if self.rollout_engine.url is not None and (self.rollout.temperature, self.rollout.top_p) != (1, 1):
            raise UserError(
                "rollout_engine.url: a server gives log-probabilities of the unchanged distribution, and answers are "
                f"drawn at temperature {self.rollout.temperature:g} and top_p {self.rollout.top_p:g}: use "
                "rollout.temperature 1 and rollout.top_p 1"
            )
        refuse_unused(self, NO_Z_LOSS | NOT_OF_RL)


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    console = plain_console(stderr=True)
    machine = Machine.choose(config.training)
    config = with_machine(config, machine)
    config.algorithm.check_samples(config.rollout.samples)
    model, tokenizer = load_chat_start(config.init_from, config.lora, seed=config.training.seed)
    require_parallel(config.training.parallel, model, machine.device)
    config = with_row_length(config, *longest_texts(config, model.config))
    model.config.check_training_rows(config.row_length)
    rows_per_micro_batch = practice_rows(config.training, config.row_length)
    _check_critic(config, tokenizer)
    practice = read_practice(config, tokenizer, console.print)
    if config.rollout_engine.url is not None and world_size() > 1:
        raise UserError("rollout_engine.url: one process pushes weights to a server; leave out --nproc and torchrun")
    longest = config.rollout.max_tokens * config.rollout.max_turns
    rewards = config.rewards
    if config.environment == "guess":  # it pays for the number itself: the last turn is a call, and says nothing
        rewards = replace(rewards, answer=0.0)
    rewarder = Rewarder(rewards, max_tokens=longest, device=machine.device)
    if isinstance(rewarder.reward_model, RewardModel):  # what another library reads has its own bounds
        shape = rewarder.reward_model.config
        shape.check_training_rows(config.row_length, whose=f"the reward model {rewards.reward_model}")
    rewarder.check([*practice.prompts, *practice.held_out])
    _look_for_references(practice, rewarder, console)

    folder = RunFolder(config.run)
    folder.open(config, overwrite=config.overwrite)
    if folder.finished:
        conclude_finished(folder, console)
        return
    folder.claim_prompts([*practice.prompts, *practice.held_out])
    if rewarder.reward_model is not None:
        folder.claim_model("reward_model", rewarder.reward_model)
    if not config.lora.rank:  # with adapters, their base is claimed
        folder.claim_model("start", model)  # it is the reference that the policy is held to
    steps = config.phases * config.algorithm.updates_per_phase
    console.print(_summary(config, practice.prompts, steps, machine))
    replica = _replica(config, model, machine)
    machine.place(model, config.training, total_flops(config, model.config), lambda text: console.print(text))
    engine = _engine(config, model, replica, tokenizer)
    source = Phases(
        PhaseSettings(
            algorithm=config.algorithm,
            rollout=config.rollout,
            sequence_length=config.row_length,
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
        optimizers=build_optimizers(
            model,
            config.optim,
            tokens_per_batch=longest_batch(config.rollout, config.algorithm.minibatches),
            trained=not config.lora.rank,
        ),
        schedule=config.schedule,
        objective=PolicyObjective(
            config.algorithm.loss,
            config.rollout.temperature,
            constant_length=longest,
            target_kl=config.algorithm.target_kl,
        ),
        source=source,
        total_steps=steps,
        evaluations=[_held_out(config, engine, practice, rewarder)] if practice.held_out else [],
    )
    try:
        train(trainer, folder, tokenizer, console)
    except CollapseError as collapse:
        way_back = _way_back(config, trainer, source, folder, tokenizer)
        _conclude(folder, console)
        raise CollapseError(f"{collapse}. {way_back}") from None
    _conclude(folder, console)


def total_flops(config: Config, shape: ModelConfig) -> float:
    """Of all updates of a run."""
    answers = config.phases * config.rollout.prompts * config.rollout.samples * config.algorithm.epochs
    return practice_flops(config.rollout, answers, shape)


def _conclude(folder: RunFolder, console: Console) -> None:
    if is_first() and (folder.path / METRICS).exists():
        console.print(_where_time_went(folder.path))
        write_report(folder.path)


def _way_back(
    config: Config, trainer: Trainer[PolicyBatch], source: Phases, folder: RunFolder, tokenizer: Tokenizer
) -> str:
    """Write the last model from before the collapse, if a checkpoint holds one; say where to go from here."""
    go_on = "To go on all the same, run the same command again with --watch.patience 0"
    before = trainer.load_before(source.doubted_since or 0)
    if before is None:
        return f"No checkpoint is older than that: start anew from {config.init_from}. {go_on}"
    kept = folder.path / "model-before-collapse"
    save_pretrained(trainer.model, kept, tokenizer=tokenizer)
    return f"{kept} is the model from before, after {before} updates: start again from it. {go_on}"


def _where_time_went(folder: Path) -> str:
    """Shares of the updates' time, rollouts included; validations and checkpoints are not counted."""
    updates = [record for record in MetricsLog(folder / METRICS).read() if "seconds" in record]
    phases = MetricsLog(folder / ROLLOUTS).read()
    shares = {name: sum(phase.get(f"seconds_{name}", 0.0) for phase in phases) for name in WORK}
    in_phases: dict[int, float] = {}  # seconds of a phase, by the update that waited for it
    for phase in phases:
        seconds = sum(phase.get(f"seconds_{name}", 0.0) for name in WORK)
        in_phases[phase["updates"]] = in_phases.get(phase["updates"], 0.0) + seconds
    if updates:  # of every `log_every`-th update; the others took as long
        alone = [update["seconds"] - in_phases.get(update["step"] - 1, 0.0) for update in updates]
        shares["updating"] = sum(alone) / len(alone) * updates[-1]["step"]
    total = sum(shares.values())
    return "time: " + ", ".join(f"{seconds / total:.0%} {WORK[name]}" for name, seconds in shares.items() if seconds)


def _look_for_references(practice: Practice, rewarder: Rewarder, console: Console) -> None:
    """Say how many prompts have no answer to compare with: each of theirs earns 0 by the reward `answer`.

    UserError where nothing but right answers counts and no prompt has one.
    """
    if "answer" not in rewarder.names:
        return
    only = set(rewarder.names) <= {"answer", "environment"}
    for name, prompts in (("prompts", practice.prompts), ("held_out", practice.held_out)):
        without = sum(prompt.reference is None for prompt in prompts)
        if only and without and without == len(prompts):
            raise UserError(
                f"rewards.answer has a weight, but of the {name} no prompt has an answer to compare with: name the "
                "column `answer`, or set rewards.answer 0 and reward something else"
            )
        if without:
            console.print(f"{without:,} of {len(prompts):,} {name} have no answer: theirs earn 0 by rewards.answer")


def _held_out(config: Config, engine: RolloutEngine, practice: Practice, rewarder: Rewarder) -> HeldOut:
    return HeldOut(
        engine,
        practice.held_out,
        practice.make_environment,
        rewarder,
        config.rollout,
        longest=config.row_length,
        samples=config.held_out_samples,
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


def longest_texts(config: Config, policy: ModelConfig) -> list[int]:
    """Tokens that each model reads at once that is to read a whole episode: the policy, a critic, a reward model."""
    limits = [policy.max_position_embeddings]
    if config.algorithm.critic.init_from is not None:
        limits.append(read_config(critic_folder(config)).max_position_embeddings)
    if config.rewards.reward_model is not None:
        with suppress(UserError):  # one that another library reads has its own bounds
            limits.append(read_config(resolve_model_folder(config.rewards.reward_model)).max_position_embeddings)
    return limits


def critic_folder(config: Config) -> Path:
    """Where PPO's critic starts from."""
    return resolve_model_folder(config.algorithm.critic.init_from or config.init_from)


def _check_critic(config: Config, tokenizer: Tokenizer) -> None:
    """UserError for a critic that cannot read what the policy writes."""
    if config.algorithm.critic.init_from is None:
        return
    folder, named = critic_folder(config), f"algorithm.critic.init_from {config.algorithm.critic.init_from}"
    if Tokenizer.from_pretrained(folder).text_fingerprint != tokenizer.text_fingerprint:
        raise UserError(f"{named} has another tokenizer than the policy, and would read other words than it writes")
    read_config(folder).check_training_rows(config.row_length, whose=f"the critic {folder}")


def _critic(config: Config, machine: Machine) -> Critic | None:
    if config.algorithm.advantage != "gae":
        return None
    folder = critic_folder(config)
    if is_reward_model(folder):
        model = load_reward_model(folder)
    else:
        model = RewardModel.from_language_model(load_pretrained(folder))
    model.gradient_checkpointing = config.training.gradient_checkpointing
    return Critic(_alone(model, machine), config.algorithm.critic)


def _alone(model: ModelT, machine: Machine) -> ModelT:
    """Put a model that the Trainer does not train on the device, whole on every process."""
    model.to(machine.device, torch.float32)
    model.compute_dtype = machine.dtype
    return model
