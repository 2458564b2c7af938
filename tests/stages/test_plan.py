from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from minnow import cli
from minnow.config import UserError, config_to_yaml, parse_config
from minnow.console import plain_console
from minnow.data.batches import Batch
from minnow.data.prepare import DataConfig
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig, Quantization, lora_layers
from minnow.model.pretrained import save_pretrained
from minnow.model.quantize import is_quantized
from minnow.model.size import training_flops_per_picture, training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import Trained, VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.optim import OptimConfig, build_optimizers
from minnow.settings import settings_of
from minnow.stages import lora, pretrain, sft, vlm
from minnow.stages import plan as plan_module
from minnow.stages.plan import Config, Plan, _duration, in_bytes, make_plan
from minnow.training.config import TrainingConfig
from minnow.training.memory import as_trained
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch, with_pictures
from tests.stages.stage_helpers import tiny_tokenizer

SHAPE = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
TRAINING = TrainingConfig(device="cpu", precision="fp32", batch_tokens=512, micro_batch_tokens=128, steps=10)


def plan(**changes: object) -> Plan:
    settings = {"data": DataConfig(), "model": SHAPE, "training": TRAINING, "sequence_length": 64, "probe_seconds": 0.0}
    return make_plan(Config(**{**settings, **changes}))  # type: ignore[arg-type]


def test_parameters_and_flops_by_hand() -> None:
    # layer: q 32x32 + o 32x32 + k, v 2 x 32x16 = 3072; MLP 3 x 32x64 = 6144; norms 2 x 32 + q, k norm 2 x 16 = 96
    # model: 3 x 9312 + embedding 300 x 32 = 9600 + final norm 32
    figures = plan()
    assert figures.parameters == figures.active_parameters == 3 * (3072 + 6144 + 96) + 9600 + 32
    # matrices and head: 2 x (3 x 9216 + 9600); attention 3 layers x 4 x 2 heads x 16 x mean context 32.5; all x 3
    assert figures.flops_per_token == 3 * (2 * (3 * 9216 + 9600) + 3 * 4 * 2 * 16 * 32.5)
    assert (figures.tokens, figures.steps) == (10 * 512, 10)
    assert figures.flops == figures.tokens * figures.flops_per_token


def test_tokens_come_from_what_is_known() -> None:
    assert plan(tokens=1000).tokens == 1000
    assert plan(tokens=1000).steps == 2
    free = TrainingConfig(device="cpu", precision="fp32", batch_tokens=512, micro_batch_tokens=128)
    assert plan(training=free).tokens == 20 * plan().parameters
    twice_and_a_half = TrainingConfig(**{**vars(free), "epochs": 2.5})
    assert plan(tokens=1000, training=twice_and_a_half).tokens == 2500


def test_a_number_of_tokens_is_at_least_one() -> None:
    with pytest.raises(UserError, match="--tokens is 0"):
        plan(tokens=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weights_and_optimizer_state_are_exact(optimizer: str) -> None:
    optim = OptimConfig(optimizer=optimizer)  # type: ignore[arg-type]
    figures = plan(optim=optim)
    model = CausalLM(SHAPE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers = build_optimizers(model, optim, tokens_per_batch=512)
    held = 0
    for one in optimizers:
        one.step()
        tensors = [t for state in one.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held += sum(tensor.nbytes for tensor in tensors if tensor.ndim > 0)  # step counters are 0-D
    assert figures.memory.optimizer == held
    assert figures.memory.weights == figures.memory.gradients == 4 * figures.parameters


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(rank=2),
        LoraConfig(rank=2, targets=("q_proj", "v_proj")),
        LoraConfig(rank=2, dropout=0.1),
        LoraConfig(rank=2, dora=True),
        LoraConfig(rank=2, quantize="int8"),
    ],
)
def test_activations_are_about_what_autograd_keeps(lora: LoraConfig) -> None:
    """Frozen layers keep no input, dropout keeps one for each adapter: they were counted as if all were trained."""
    kept: dict[int, torch.UntypedStorage] = {}
    model = as_trained(CausalLM(SHAPE), torch.float32, lora)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LanguageModeling()(model, random_batch(SHAPE.vocab_size, 2, 64))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert plan(lora=lora).memory.activations == pytest.approx(measured, rel=0.1)


def test_adapters_may_be_of_a_layer_that_activations_are_not_counted_on() -> None:
    """They are counted on two layers: a plan for the third was refused, as a pattern that fits none."""
    everywhere, third = (
        plan(lora=LoraConfig(rank=2, targets=(target,))).memory for target in ("up_proj", "layers.2.mlp.up_proj")
    )
    assert third.gradients == everywhere.gradients / 3
    assert third.activations == everywhere.activations


@pytest.mark.parametrize(("peak", "layers"), [(1e9, 3), (1e3, 1)])
def test_adapters_may_be_of_a_layer_that_is_not_probed(
    peak: float, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = probe(monkeypatch, peak, lora=LoraConfig(rank=2, targets=("layers.2.mlp.up_proj",)))
    assert model.config.num_hidden_layers == layers
    assert list(lora_layers(model)) == [f"model.layers.{layers - 1}.mlp.up_proj"]


def test_checkpointing_needs_less() -> None:
    off, selective, full = (
        plan(training=TrainingConfig(**{**vars(TRAINING), "gradient_checkpointing": mode})).memory.activations
        for mode in ("off", "selective", "full")
    )
    assert full < 0.5 * off
    assert full < selective < 0.7 * off


def test_what_dora_makes_of_the_weights_is_no_activation() -> None:
    """B A of each matrix, which selective checkpointing keeps, was counted for each 64 tokens."""
    selective = TrainingConfig(**{**vars(TRAINING), "gradient_checkpointing": "selective"})
    shape = dataclasses.replace(SHAPE, intermediate_size=80)  # no side is as long as the row that is looked at
    plain, dora = (
        plan(model=shape, training=selective, lora=LoraConfig(rank=2, dora=dora)).memory.activations
        for dora in (False, True)
    )
    assert dora == plain


def test_the_probe_gives_a_time() -> None:
    figures = plan(probe_seconds=0.05)
    assert figures.speed is not None
    assert figures.speed.tokens_per_second > 0
    assert figures.seconds is not None
    assert figures.seconds > figures.tokens / figures.speed.tokens_per_second


def test_a_probe_of_fewer_layers_is_scaled_to_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers are too many for a slow machine: one is measured."""
    probed: list[CausalLM] = []

    def speed(model: CausalLM, batch: Batch, **settings: float) -> float:
        probed.append(model)
        return 1000.0

    monkeypatch.setattr(plan_module, "matmul_peak", lambda *settings: 1e3)
    monkeypatch.setattr(plan_module, "tokens_per_second", speed)
    monkeypatch.setattr(plan_module, "_update_seconds", lambda *settings: 0.5)
    figures = plan(model=dataclasses.replace(SHAPE, num_hidden_layers=4), probe_seconds=1.0)
    assert [model.config.num_hidden_layers for model in probed] == [1]
    # Weights that a token meets: 9216 a layer, 9600 in the head; attention costs as much as 2 x 2 x 16 x 32.5 = 2080.
    # Parameters: 9312 a layer, 9600 in the embedding, 32 in the last norm.
    assert figures.speed is not None
    assert figures.speed.tokens_per_second == pytest.approx(1000 * (9600 + 11296) / (9600 + 4 * 11296))
    assert figures.speed.optimizer_seconds == pytest.approx(0.5 * (9632 + 4 * 9312) / (9632 + 9312))
    # 5120 tokens at that pace, and ten updates.
    expected = 5120 / figures.speed.tokens_per_second + 10 * figures.speed.optimizer_seconds
    assert figures.seconds == pytest.approx(expected)


EXPERTS = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def test_of_a_mixture_only_what_works_on_a_token_is_active() -> None:
    """Of four experts of 3 x 32 x 16 weights in each of three layers two are idle."""
    figures = plan(model=dataclasses.replace(SHAPE, experts=EXPERTS))
    assert figures.parameters - figures.active_parameters == 3 * 2 * 3 * 32 * 16


def probe(monkeypatch: pytest.MonkeyPatch, peak: float, **changes: object) -> tuple[CausalLM, tuple[int, ...]]:
    """The model that is measured on a machine of `peak` FLOP/s, and the shape of its batch."""
    probed: list[tuple[CausalLM, tuple[int, ...]]] = []

    def speed(model: CausalLM, batch: Batch, **settings: float) -> float:
        probed.append((model, tuple(batch.tokens_BT.shape)))
        return 1000.0

    monkeypatch.setattr(plan_module, "matmul_peak", lambda *settings: peak)
    monkeypatch.setattr(plan_module, "tokens_per_second", speed)
    monkeypatch.setattr(plan_module, "_update_seconds", lambda *settings: 0.5)
    plan(probe_seconds=1.0, **changes)
    return probed[0]


def test_the_probe_takes_a_step_as_the_run_would_in_the_seconds_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second for a step, at a tenth of the peak, is time for 3.5 rows of the 8 here."""
    more = {"micro_batch_tokens": 512, "precision": "bf16", "gradient_checkpointing": "full"}
    training = TrainingConfig(**{**vars(TRAINING), **more})
    affordable = 3.5 * 64 * plan().flops_per_token
    model, shape = probe(monkeypatch, affordable * 4 / 0.1, training=training)
    assert shape == (3, 64)
    assert model.config.num_hidden_layers == 3
    assert model.config.max_position_embeddings == 64
    assert (model.compute_dtype, model.gradient_checkpointing) == (torch.bfloat16, "full")


def test_a_probe_of_a_mixture_keeps_a_layer_with_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first two layers are dense: they alone would be another model."""
    experts = dataclasses.replace(EXPERTS, first_k_dense_replace=2)
    model, _ = probe(monkeypatch, 1e3, model=dataclasses.replace(SHAPE, num_hidden_layers=4, experts=experts))
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_adapters_beside_a_frozen_model_are_probed_as_such(
    quantize: Quantization, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan told FLOPs and speed of training the whole model, half as much again as the run tells."""
    save_pretrained(CausalLM(SHAPE), tmp_path / "model")
    adapters = {"model": ModelConfig(), "init_from": str(tmp_path / "model")}
    adapters |= {"lora": LoraConfig(rank=2, quantize=quantize)}
    assert plan(**adapters).flops_per_token == training_flops_per_token(SHAPE, 32.5, frozen=True)
    model, _ = probe(monkeypatch, 1e9, **adapters)
    assert {name.rpartition(".")[0][-6:] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert is_quantized(model) == (quantize == "int8")
    monkeypatch.undo()
    assert plan_module._update_seconds(model, OptimConfig(optimizer="adamw"), 512) > 0


def test_the_first_update_only_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 9.0, 10.0, 11.0, 20.0, 21.0, 30.0, 33.0))
    monkeypatch.setattr(plan_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert plan_module._update_seconds(CausalLM(SHAPE), OptimConfig(), 512) == 1.0


def test_the_share_of_the_peak_is_that_of_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    """5120 tokens at 512 a second are 10 seconds; at the peak they would be 2.5."""
    figures = plan()
    speed = plan_module.Speed(tokens_per_second=512.0, optimizer_seconds=0.0)
    figures = dataclasses.replace(figures, speed=speed, matmul_peak=figures.flops / 2.5)
    plan_module._print(figures, plain_console())
    shown = " ".join(capsys.readouterr().out.split())
    assert "the run would use 25%" in shown
    assert "about 10 seconds" in shown


def test_bf16_keeps_a_copy_of_the_matrices() -> None:
    bf16 = TrainingConfig(**{**vars(TRAINING), "precision": "bf16"})
    memory = plan(training=bf16).memory
    assert memory.weights - plan().memory.weights == 2 * 3 * 9216
    assert memory.gradients == plan().memory.gradients


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_230_000, "1.23 MB"),
        (999_000_000, "999 MB"),
        (999_999, "1 MB"),
        (2.5e13, "25 TB"),
    ],
)
def test_sizes_in_words(size: float, shown: str) -> None:
    assert in_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (59.6, "60 seconds"),
        (119, "119 seconds"),
        (120, "2.0 minutes"),
        (7199, "120.0 minutes"),
        (7200, "2.0 hours"),
        (86_400, "24.0 hours"),
        (172_800, "2.0 days"),
    ],
)
def test_times_in_words(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown


def test_init_from_gives_the_shape(tmp_path: Path) -> None:
    save_pretrained(CausalLM(SHAPE), tmp_path / "model")
    assert plan(model=ModelConfig(), init_from=str(tmp_path / "model")).parameters == plan().parameters


def test_adapters_and_new_experts_are_planned_as_they_will_be_trained(tmp_path: Path) -> None:
    """The plan was that of the whole dense model."""
    save_pretrained(CausalLM(SHAPE), tmp_path / "model")
    start = {"model": ModelConfig(), "init_from": str(tmp_path / "model")}
    trained = 3 * 2 * 2 * (32 + 32) + 3 * 2 * 2 * (32 + 16)  # of 3 layers: q and o, k and v; A and B of rank 2
    memory = plan(**start, lora=LoraConfig(rank=2, targets=("q_proj", "k_proj", "v_proj", "o_proj"))).memory
    assert memory.gradients == 4 * trained
    assert memory.weights == plan(**start).memory.weights + 4 * trained
    experts = ExpertsConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=64)
    more = 3 * (2 * 3 * 32 * 64 + 3 * 32)  # of 3 layers: two more MLPs and a router
    assert plan(**start | {"model": ModelConfig(experts=experts)}).parameters == plan(**start).parameters + more


def test_the_tokenizer_gives_the_vocabulary(tmp_path: Path) -> None:
    """The plan counted model.vocab_size, which pretrain replaces by the tokenizer's."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    more = (tokenizer.vocab_size - SHAPE.vocab_size) * SHAPE.hidden_size
    assert more != 0
    assert plan(tokenizer=str(tmp_path)).parameters == plan().parameters + more


def test_a_stretched_context_can_be_planned(tmp_path: Path) -> None:
    save_pretrained(CausalLM(SHAPE), tmp_path / "model")
    trained = SHAPE.max_position_embeddings
    more = {"init_from": str(tmp_path / "model"), "sequence_length": 2 * trained, "probe_seconds": 0.01}
    more["training"] = TrainingConfig(**{**vars(TRAINING), "batch_tokens": 4 * trained})
    with pytest.raises(UserError, match="--rope-scaling yarn"):
        plan(**more)
    assert plan(**more, rope_scaling="yarn").speed is not None


def test_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    words = f"--config {root}/recipes/pretrain-26m.yaml --probe_seconds 0 --json {tmp_path}/plan.json"
    assert cli.main(["plan", *words.split()]) == 0
    assert "25,830,912" in capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["parameters"] == figures["active_parameters"] == 25_830_912
    assert figures["memory"]["total"] > 12 * figures["parameters"]
    assert figures["seconds"] is None


def test_it_starts_nothing_and_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe included: afterwards there is the file that was asked for, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of tokenised data lies below it
    shape = "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 1 --model.vocab_size 300"
    words = f"{shape} --sequence_length 64 --batch_tokens 512 --device cpu --compile off --paths nowhere.jsonl"
    assert cli.main(["plan", *words.split(), "--probe_seconds", "0.05", "--json", "plan.json"]) == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["plan.json"]
    assert json.loads(Path("plan.json").read_text())["seconds"] > 0


def test_takes_sft_recipes_and_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    config = parse_config(Config, ["--config", f"{root}/recipes/sft-5m.yaml"], program="minnow plan")
    assert config.init_from == "runs/pretrain-5m"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--config", f"{root}/recipes/sft-5m.yaml"]) == 2
    error = capsys.readouterr().err
    assert "runs/pretrain-5m" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("stage", [pretrain, sft, lora])
def test_it_takes_the_settings_of_the_commands(stage: ModuleType) -> None:
    """An SFT file with replace_chat_template was refused, whose cost its --help promises to tell."""
    assert {setting.key for setting in settings_of(stage.Config)} <= {setting.key for setting in settings_of(Config)}


TOWER = VisionConfig(
    image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
)


@pytest.fixture
def reads(tmp_path: Path) -> str:
    save_pretrained(CausalLM(SHAPE), tmp_path / "reads")
    return str(tmp_path / "reads")


@pytest.fixture
def sees(tmp_path: Path) -> str:
    save_pretrained(VisionLanguageModel(SHAPE, TOWER, 5), tmp_path / "sees")
    return str(tmp_path / "sees")


@pytest.mark.parametrize("train", ["projector", "language", "all"])
def test_weights_and_state_of_a_model_that_looks_at_pictures_are_exact(train: Trained, sees: str) -> None:
    figures = plan(init_from=sees, train=train)
    model = VisionLanguageModel(SHAPE, TOWER, 5)
    model.train_only(train)
    assert figures.parameters == sum(parameter.numel() for parameter in model.model.parameters())
    sizes = (sum(parameter.numel() for parameter in part.parameters()) for part in model.vision_modules)
    of_tower, of_projector = sizes
    assert (figures.tower_parameters, figures.projector_parameters) == (of_tower, of_projector)
    assert figures.picture_tokens == 16
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    held = 0
    for one in build_optimizers(model, OptimConfig(), tokens_per_batch=512):
        one.step()
        tensors = [t for state in one.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held += sum(tensor.nbytes for tensor in tensors if tensor.ndim > 0)
    assert figures.memory.optimizer == held
    assert figures.memory.gradients == 4 * sum(parameter.numel() for parameter in trained)
    assert figures.memory.weights == 4 * (figures.parameters + of_tower + of_projector)


@pytest.mark.parametrize("train", ["projector", "language", "all"])
def test_activations_with_pictures_are_about_what_autograd_keeps(train: Trained, sees: str) -> None:
    kept: dict[int, torch.UntypedStorage] = {}
    model = VisionLanguageModel(SHAPE, TOWER, 5)
    model.train_only(train)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LanguageModeling()(model, with_pictures(random_batch(SHAPE.vocab_size, 2, 64), TOWER))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert plan(init_from=sees, train=train).memory.activations == pytest.approx(measured, rel=0.1)


def test_a_picture_costs_its_operations_beside_its_tokens(sees: str, reads: str) -> None:
    text = plan(init_from=reads).flops_per_token
    one = training_flops_per_picture(TOWER, 32, tower=False, projector=True)
    assert plan(init_from=sees, train="language").flops_per_token == pytest.approx(text + one / 64)
    assert plan(init_from=sees).flops_per_token < plan(init_from=sees, train="language").flops_per_token
    assert plan(init_from=reads, tower=TOWER).flops_per_token > text + one / 64
    assert plan(init_from=sees, train="projector").flops_per_token < text


def test_the_probe_looks_at_pictures(reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def listening(model: CausalLM, batch: Batch, *, seconds: float) -> float:
        shown.append(batch.pixels_ICHW)
        return 1000.0

    monkeypatch.setattr(plan_module, "tokens_per_second", listening)
    for settings in ({"tower": TOWER}, {}):
        plan(init_from=reads, probe_seconds=0.1, **settings)
    assert shown[0] is not None
    assert tuple(shown[0].shape[1:]) == (3, 16, 16)
    assert shown[1] is None


def test_a_configuration_of_vlm_is_planned(reads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--init_from", reads, "--tower.image_size", "32", "--sequence_length", "64", "--training.device", "cpu"]
    file = tmp_path / "vlm.yaml"
    file.write_text(config_to_yaml(parse_config(vlm.Config, words, program="minnow vlm")))
    assert cli.main(["plan", "--config", str(file), "--probe_seconds", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in the tower" in said
    assert "a picture takes 4 tokens" in said


@pytest.mark.parametrize(
    ("start", "settings", "said"),
    [
        ("sees", {"tower": TOWER}, "has a vision tower already"),
        ("reads", {"train": "language"}, "leaves the new tower as it was drawn"),
        (None, {"train": "all"}, "give --init_from"),
        ("reads", {"tower": VisionConfig(image_size=256)}, "a picture takes 256 tokens, and a row has 64"),
    ],
)
def test_a_plan_refuses_what_vlm_refuses(
    start: str | None, settings: dict[str, object], said: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=said):
        plan(init_from=start and request.getfixturevalue(start), **settings)


def test_rows_of_texts_may_be_shorter_than_a_picture(sees: str) -> None:
    assert plan(init_from=sees, sequence_length=8).memory.activations > 0
