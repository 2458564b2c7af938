"""Whole runs of `minnow rl` on a tiny model: every preset climbs, resumes bit for bit, says what is wrong."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minnow.cli import PRESETS, main
from minnow.model.pretrained import save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.rl.phases import Phases
from minnow.rl.value_tracker import ValueTracker
from tests.rl.helpers import saved, tiny, write_prompts

PRESET_NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))
SMALL = {
    "rollout.prompts": 4,
    "rollout.max_tokens": 6,
    "sequence_length": 64,
    "training.micro_batch_tokens": 128,
    "training.device": "cpu",
    "training.precision": "fp32",
    "training.save_every": 0,
    "training.validate_every": 0,
    "watch.patience": 0,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return saved(folder / "model"), write_prompts(folder / "prompts.jsonl")


def even_ids(trajectories):
    """A dense reward that a tiny model can climb: the share of even token ids among those it wrote."""
    shares = []
    for trajectory in trajectories:
        wrote = [i for i, trained in zip(trajectory.ids, trajectory.trained, strict=True) if trained]
        shares.append(sum(i % 2 == 0 for i in wrote) / len(wrote))
    return shares


def rl(start, run, *more):
    model, prompts = start
    words = ["rl", "--init_from", str(model), "--prompts", str(prompts), "--run", str(run)]
    small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return main([*words, *small, *more])


def figures(run, key):
    return [json.loads(line)[key] for line in (run / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_preset_runs_and_climbs(start, tmp_path, preset):
    samples = "1" if preset in ("ppo", "spo", "reinforce++") else "4"
    prompts = "16" if samples == "1" else "4"
    rewards = ["--rewards.answer", "0", "--rewards.functions", f"{__name__}:even_ids"]
    critic = ["--algorithm.critic.learning_rate", "0.003"] if preset == "ppo" else []
    code = rl(
        start, tmp_path / "run", "--preset", preset, *rewards, "--phases", "16", "--optim.matrix_lr", "0.02",
        "--rollout.samples", samples, "--rollout.prompts", prompts, *critic,
    )  # fmt: skip
    assert code == 0
    rewards_seen = figures(tmp_path / "run", "reward")
    assert sum(rewards_seen[-5:]) / 5 > sum(rewards_seen[:5]) / 5 + 0.1, rewards_seen
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert max(figures(tmp_path / "run", "sampler_mismatch_max")) < 1e-4


@pytest.mark.parametrize("preset", ["grpo", "ppo", "spo", "grpo with a curriculum"])
def test_a_resumed_run_equals_an_uninterrupted_one(start, tmp_path, preset, monkeypatch):
    preset, curriculum, _ = preset.partition(" with a curriculum")
    more = ["--preset", preset, "--rewards.functions", f"{__name__}:even_ids", "--phases", "4", "--rollout.samples"]
    more += ["1" if preset != "grpo" else "4", "--rollout.prompts", "8", "--algorithm.minibatches", "2"]
    more += ["--algorithm.curriculum", "true", "--rollout.prompts", "4"] if curriculum else []
    more += ["--training.save_every", "1", "--optim.matrix_lr", "0.001"]
    assert rl(start, tmp_path / "whole", *more) == 0

    from minnow.training.trainer import Trainer

    original, stop_at = Trainer.train_step, 5

    def stopping(self):
        if self.state.step == stop_at:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    assert rl(start, tmp_path / "cut", *more) == 130
    monkeypatch.setattr(Trainer, "train_step", original)
    assert rl(start, tmp_path / "cut", *more) == 0
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert figures(tmp_path / "whole", "reward") == figures(tmp_path / "cut", "reward")


@pytest.mark.parametrize("preset", ["grpo", "ppo"])
def test_an_update_beyond_the_bound_is_left_out(start, tmp_path, preset, monkeypatch):
    """The weights stay where they are, to the bit, until the next phase asks the policy anew."""
    from minnow.training.trainer import Trainer

    original, moved = Trainer.train_step, []

    def watched(self):
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        figures = original(self)
        stepped = any(not torch.equal(tensor, before[name]) for name, tensor in self.model.state_dict().items())
        moved.append((figures["kl_old"], stepped))
        return figures

    monkeypatch.setattr(Trainer, "train_step", watched)
    more = ["--preset", preset, "--rollout.samples", "4", "--phases", "3", "--optim.matrix_lr", "0.003"]
    more += ["--rewards.functions", f"{__name__}:even_ids", "--algorithm.epochs", "4", "--algorithm.minibatches", "1"]
    assert rl(start, tmp_path / "free", *more) == 0
    free, moved[:] = list(moved), []
    assert all(step for _, step in free)
    bound = sorted(kl for kl, _ in free)[6]  # the middle of what an unbounded run does
    assert rl(start, tmp_path / "bound", *more, "--algorithm.target_kl", str(bound)) == 0
    assert [step for _, step in moved] == [kl <= bound for kl, _ in moved]
    assert [kl for kl, _ in moved[::4]] == pytest.approx([0, 0, 0], abs=1e-9)  # a phase's first update is made
    assert 3 <= sum(step for _, step in moved) < 12


def test_a_reward_model_must_read_as_long_rows_as_the_policy(start, tmp_path, capsys):
    """Hours later a long answer ended the run in words."""
    model, tokenizer = tiny()
    shape = replace(model.config, max_position_embeddings=40)
    save_pretrained(RewardModel(shape, seed=1), tmp_path / "judge", tokenizer=tokenizer)
    more = ["--rewards.reward_model", str(tmp_path / "judge"), "--phases", "1"]
    assert rl(start, tmp_path / "run", *more) == 2
    assert "judge reads at most 40 tokens; give 40 or less" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_files_that_no_checkpoint_holds_may_not_change_under_a_run(tmp_path, capsys, monkeypatch):
    from minnow.training.trainer import Trainer

    start = saved(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl")
    held_out = write_prompts(tmp_path / "held-out.jsonl", 2)
    model, tokenizer = tiny()
    save_pretrained(RewardModel(model.config, seed=1), tmp_path / "judge", tokenizer=tokenizer)
    more = ["--rewards.functions", f"{__name__}:even_ids", "--phases", "4", "--training.save_every", "1"]
    more += ["--held_out", str(held_out), "--rewards.reward_model", str(tmp_path / "judge")]
    original = Trainer.train_step

    def stopping(self):
        if self.state.step == 2:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        assert rl(start, tmp_path / "run", *more) == 130
    for file, what in (
        (start[1], "on other prompts"),
        (held_out, "on other prompts"),
        (start[0] / "model.safetensors", "other weights of its start"),
        (tmp_path / "judge" / "model.safetensors", "other weights of its reward_model"),
    ):
        kept = file.read_bytes()
        if file.suffix == ".jsonl":
            file.write_bytes(kept.replace(b'"prompt": "', b'"prompt": "x', 1))
        else:
            weights = load_file(file)
            weights["model.embed_tokens.weight"][5, 0] += 0.01
            save_file(weights, file, metadata={"format": "pt"})
        assert kept != file.read_bytes()
        assert rl(start, tmp_path / "run", *more) == 2
        assert what in " ".join(capsys.readouterr().err.split())
        file.write_bytes(kept)
    assert rl(start, tmp_path / "run", *more) == 0


def test_spo_knows_every_prompt_before_its_first_phase_if_told_to(start, tmp_path, monkeypatch):
    calls = []
    original_seed, original_update = ValueTracker.seed, ValueTracker.update

    def seed(self, prompt, rewards):
        calls.append((prompt, len(rewards)))
        original_seed(self, prompt, rewards)

    def update(self, prompts, rewards, drift):
        calls.append("update")
        assert calls[:8] == [(n, 5) for n in range(8)]
        if calls.count("update") == 1:
            worth = self.alpha_P + self.beta_P
            assert worth == pytest.approx([8.0] * 8)  # 1 / (1 - 0.875) observations
            assert len(set(self.alpha_P)) > 1
        original_update(self, prompts, rewards, drift)

    monkeypatch.setattr(ValueTracker, "seed", seed)
    monkeypatch.setattr(ValueTracker, "update", update)
    more = ["--preset", "spo", "--rewards.answer", "0", "--rewards.functions", f"{__name__}:even_ids", "--phases", "2"]
    more += ["--rollout.prompts", "3", "--algorithm.tracker_answers", "5"]  # 8 prompts, in threes
    assert rl(start, tmp_path / "run", *more) == 0
    assert calls[8:] == ["update", "update"]


def right_on_even_prompts(trajectories):
    """Prompts "say 0", "say 2" ... are always right, "say 1" half of the time, the others never."""
    numbers = [int(t.environment.prompt.reference) for t in trajectories]
    return [float(n % 2 == 0 or (n == 1 and place % 2 == 0)) for place, n in enumerate(numbers)]


def test_a_curriculum_asks_what_is_open(start, tmp_path, monkeypatch):
    weights = []
    original = ValueTracker.sampling_weights
    monkeypatch.setattr(ValueTracker, "sampling_weights", lambda self: weights.append(original(self)) or weights[-1])
    more = ["--preset", "grpo", "--phases", "12", "--rollout.samples", "4", "--algorithm.curriculum", "true"]
    more += ["--rewards.answer", "0", "--rewards.functions", f"{__name__}:right_on_even_prompts"]
    assert rl(start, tmp_path / "run", *more) == 0
    assert len(set(weights[0])) == 1  # nothing is known yet
    assert weights[-1].argmax() == 1
    assert weights[-1][1] > 1.5 * max(weights[-1][n] for n in range(8) if n != 1)


def test_lora_uses_itself_without_adapters_as_reference(start, tmp_path):
    more = ["--preset", "grpo", "--lora.rank", "2", "--phases", "2", "--rewards.functions", f"{__name__}:even_ids"]
    assert rl(start, tmp_path / "run", *more, "--rollout.samples", "4", "--optim.matrix_lr", "0.01") == 0
    drift = figures(tmp_path / "run", "kl_to_reference")
    assert abs(drift[0]) < 1e-6  # nothing learnt yet: B4, a reference in another precision would differ
    assert drift[1] != 0


def test_adapters_keep_a_new_models_rate_where_none_is_given(start, tmp_path):
    """As in every stage; the help says so."""
    more = ["--preset", "spo", "--rewards.functions", f"{__name__}:even_ids", "--optim.matrix_lr", "null"]
    more += ["--phases", "1", "--algorithm.minibatches", "1", "--schedule.warmup_steps", "0"]
    for rank, rate in ((0, 0.0004), (2, 0.002)):
        assert rl(start, tmp_path / f"{rank}", *more, "--lora.rank", str(rank)) == 0
        (line,) = map(json.loads, (tmp_path / f"{rank}" / "metrics.jsonl").read_text().splitlines())
        assert line["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("preset", ["ppo", "spo"])
def test_one_answer_a_prompt_is_no_want_of_contrast(start, tmp_path, preset):
    more = ["--preset", preset, "--rollout.prompts", "8", "--watch.patience", "2", "--phases", "4"]
    more += ["--algorithm.epochs", "1", "--watch.truncated", "1"]
    more += ["--algorithm.critic.warmup_phases", "1"] if preset == "ppo" else []
    dense = ["--rewards.functions", f"{__name__}:even_ids"]
    assert rl(start, tmp_path / "run", *more, *dense) == 0  # a group of one has no contrast of its own
    assert set(figures(tmp_path / "run", "equal_groups")) == {0.0}
    assert rl(start, tmp_path / "same", *more) == 2  # no answer is ever right
    assert set(figures(tmp_path / "same", "equal_groups")) == {1.0}


def test_a_run_practises_with_and_without_thinking(start, tmp_path, capsys):
    """A phase asks all eight prompts: always the same share of them, as at validations."""
    more = ["--preset", "grpo", "--rollout.samples", "2", "--rollout.prompts", "8", "--phases", "2"]
    more += ["--rollout.enable_thinking", "true", "--rollout.thinking_share", "0.5", "--held_out", str(start[1])]
    assert rl(start, tmp_path / "run", *more, "--training.validate_every", "4") == 0
    share = int(re.search(r"(\d) of 8 prompts are reasoned about", capsys.readouterr().err)[1]) / 8
    assert 0 < share < 1
    assert figures(tmp_path / "run", "thinking") == [share] * 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out/thinking"] for line in lines if "held_out/reward" in line] == [share] * 2


def test_a_critic_that_reads_other_words_is_refused(start, tmp_path, capsys):
    """Of the same size, it valued noise without a word; smaller, it ended the run in a traceback."""
    from minnow.tokenizer import train_tokenizer

    model, tokenizer = tiny()
    save_pretrained(model, tmp_path / "other", tokenizer=train_tokenizer(["fish swim in the pond"] * 50, 320))
    save_pretrained(RewardModel(model.config), tmp_path / "short", tokenizer=tokenizer)
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32}))
    for folder, told in (("other", "has another tokenizer than the policy"), ("short", "reads at most 32 tokens")):
        critic = ["--algorithm.critic.init_from", str(tmp_path / folder)]
        assert rl(start, tmp_path / "run", "--preset", "ppo", *critic) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(start, tmp_path, capsys):
    """One long row of real data must not end a run before it begins, nor be cut."""
    prompts = tmp_path / "p.jsonl"
    long, short = {"prompt": "say 1 " * 40, "answer": "1"}, {"prompt": "say 1", "answer": "1"}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [long, *[short] * 6, long]))
    more = ["--preset", "grpo", "--held_out", str(prompts), "--phases", "1", "--rollout.prompts", "6"]
    assert rl((start[0], prompts), tmp_path / "run", *more) == 0
    said = capsys.readouterr().err
    assert "2 of 8 prompts are too long and left out" in said
    assert "2 of 8 held_out are too long and left out" in said
    assert "say 1 say 1" not in (tmp_path / "run" / "rollouts.jsonl").read_text()


def test_what_a_user_gets_wrong(start, tmp_path, capsys):
    assert rl(start, tmp_path / "a", "--preset", "grop") == 2
    assert "there are" in capsys.readouterr().err
    assert rl(start, tmp_path / "b", "--preset", "grpo", "--rollout.samples", "1") == 2
    assert "at least 2" in capsys.readouterr().err
    assert rl(start, tmp_path / "b", "--preset", "grpo", "--rollout.samples", "2", "--rollout.max_tokens", "60") == 2
    assert "sequence_length 64 has room for prompts of 4 tokens" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_held_out_prompts_are_asked_before_the_first_update_and_drawn_from(start, tmp_path, capsys):
    """Several draws a prompt, though SPO practises with one: pass@1 would be all there is."""
    _, prompts = start
    more = ["--preset", "spo", "--phases", "2", "--held_out", str(prompts), "--held_out_samples", "5"]
    more += ["--training.validate_every", "2", "--rewards.answer", "0", "--rewards.functions", f"{__name__}:even_ids"]
    assert rl(start, tmp_path / "run", *more) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "held_out/reward" in line]
    assert [line["step"] for line in asked] == [0, 2, 4]
    for line in asked:
        assert 0 < line["held_out/pass@1"] < line["held_out/pass@5"] <= 1
    shares = re.search(r"time: (\d+)% playing, (\d+)% judging, (\d+)% scoring, (\d+)% up", capsys.readouterr().err)
    assert 98 <= sum(map(int, shares.groups())) <= 102
    assert rl(start, tmp_path / "other", "--preset", "spo", "--held_out_samples", "2") == 2
    assert "needs held_out" in capsys.readouterr().err


def test_held_out_prompts_are_asked_greedily(start, tmp_path):
    _, prompts = start
    more = ["--preset", "grpo", "--rollout.samples", "2", "--phases", "1", "--held_out", str(prompts)]
    assert rl(start, tmp_path / "run", *more, "--rewards.length", "1", "--rewards.longest", "1") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out/answer" in line for line in lines)
    first = next(line for line in lines if "held_out/reward" in line)
    assert first["held_out/length"] <= 1 < first["held_out/tokens"]  # the reward called so, and the tokens
    assert not any("held_out/pass@1" in line for line in lines)


def test_kl_to_the_reference_is_measured_without_a_coefficient_if_asked(start, tmp_path):
    """DAPO has no KL term: its reference is only looked at, and changes nothing of what is learnt."""
    more = ["--preset", "dapo", "--rollout.samples", "4", "--phases", "3", "--optim.matrix_lr", "0.01"]
    more += ["--rewards.functions", f"{__name__}:even_ids"]
    assert rl(start, tmp_path / "without", *more) == 0
    assert rl(start, tmp_path / "with", *more, "--algorithm.measure_kl", "true") == 0
    assert "kl_to_reference" not in json.loads((tmp_path / "without" / "rollouts.jsonl").read_text().splitlines()[0])
    drift = figures(tmp_path / "with", "kl_to_reference")
    assert drift[0] == 0
    assert drift[2] != 0
    without, measured = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("without", "with"))
    assert all(torch.equal(without[key], measured[key]) for key in without)
    assert "kl_reference" not in (tmp_path / "with" / "metrics.jsonl").read_text()  # it is no part of the loss


def test_rollouts_are_told_to_trackers_and_shown_by_watch(start, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    more = ["--preset", "ppo", "--rollout.samples", "1", "--phases", "2", "--algorithm.epochs", "1"]
    more += ["--algorithm.minibatches", "2", "--algorithm.critic.warmup_phases", "1", "--track", "tensorboard"]
    assert rl(start, run, *more) == 0
    # A phase is two updates. The warm-up (phase -1) and phase 0 are played before the first, phase 1 before the third.
    assert list(zip(figures(run, "step"), figures(run, "updates"), strict=True)) == [(-1, 0), (0, 0), (1, 2)]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [(point.step, point.value) for point in events.Scalars("rollouts/reward")]
    assert [step for step, _ in shown] == [0, 0, 2]
    assert [value for _, value in shown] == pytest.approx(figures(run, "reward"), rel=1e-6)
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4]
    capsys.readouterr()
    assert main(["watch", str(run), "--once"]) == 0
    text = capsys.readouterr().out
    assert "finished" in text
    assert "reward of the rollouts" in text
    assert "phase 1" in text


def test_prompts_without_answers_are_refused_where_nothing_else_is_rewarded(start, tmp_path, capsys):
    """Every answer would earn 0, silently."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "say 1", "solutoin": "1"}\n' * 8)
    assert rl((start[0], prompts), tmp_path / "run", "--preset", "grpo") == 2
    assert "of the prompts no prompt has an answer" in capsys.readouterr().err
    assert rl(start, tmp_path / "run", "--preset", "grpo", "--held_out", str(prompts)) == 2
    assert "of the held_out no prompt has an answer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert rl((start[0], prompts), tmp_path / "run", "--preset", "grpo", "--rewards.format", "1", "--phases", "1") == 0
    assert "8 of 8 prompts have no answer: theirs earn 0 by rewards.answer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts", "held_out"])
@pytest.mark.parametrize(
    ("settings", "answer", "schema", "told"),
    [
        (["--rewards.answer_kind", "number"], [3, 4], {}, "is a list"),
        (["--rewards.answer_kind", "number"], "none", {}, "holds no number"),
        (["--rewards.answer_kind", "maths"], [3, 4], {}, "is a list"),
        ([], {"target": 42}, {}, "is an object"),
        (["--rewards.json_schema", "1"], "1", {"$ref": "http://127.0.0.1:9/x"}, "refer to its own parts only"),
        (["--rewards.json_schema", "1"], "1", None, "needs a `schema` object in every row"),
    ],
)
def test_a_run_does_not_come_upon_a_row_that_cannot_be_judged(
    start, tmp_path, capsys, settings, answer, schema, told, name
):
    """One row of many ended it when its turn came, and whenever it was to go on from there."""
    good, bad = {"prompt": "say 1", "answer": "1", "schema": {}}, {"prompt": "a", "answer": answer, "schema": schema}
    files = {"prompts": [good] * 20, "held_out": [good], name: [*[good] * 20, bad]}
    for file, rows in files.items():
        (tmp_path / file).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--preset", "grpo", "--held_out", str(tmp_path / "held_out.jsonl"), *settings]
    assert rl((start[0], tmp_path / "prompts.jsonl"), tmp_path / "run", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_sampled_episode_is_one_of_this_processs_own():
    """Episodes of other processes come without their environment: to look into it ended DAPO's runs on several."""
    own = SimpleNamespace(
        environment=SimpleNamespace(prompt=SimpleNamespace(reference="4")), ids=[1], reward=1.0, rewards={"answer": 1.0}
    )
    phases = SimpleNamespace(engine=SimpleNamespace(tokenizer=SimpleNamespace(decode=str)))
    shown = Phases._sample(phases, [SimpleNamespace(environment=None), own])["sample"]
    assert shown == {"text": "[1]", "reward": 1.0, "rewards": {"answer": 1.0}, "reference": "4"}
    assert Phases._sample(phases, [SimpleNamespace(environment=None)]) == {}
