"""Training on pictures: against a naive loop with transformers' LlavaForConditionalGeneration, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minnow.data.prepare import DataConfig, prepare
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import DistillationLossConfig
from minnow.optim import OptimConfig, build_optimizers
from minnow.training.distillation import Distillation
from minnow.training.memory import hold_in_memory
from minnow.training.objective import LanguageModeling
from minnow.training.speed import batch_flops, picture_flops
from minnow.training.validation import validate
from tests.training.seeing import COLOURS, PictureRows, asked, mixed, picture, seeing, shade, write_rows

THEIRS = {"model.": "model.language_model.", "vision_tower.": "model.vision_tower."}
THEIRS |= {"multi_modal_projector.": "model.multi_modal_projector."}


def their_name(name: str) -> str:
    """The name of a parameter of ours in transformers 5's model."""
    prefix = next(prefix for prefix in THEIRS if name.startswith(prefix))
    return THEIRS[prefix] + name.removeprefix(prefix).removeprefix("vision_model.")


def naive_loss(theirs: transformers.PreTrainedModel, rows: PictureRows) -> torch.Tensor:
    """Conversation by conversation, without packing: weighted nats over the sum of the weights."""
    total, weight = torch.zeros(()), 0.0
    for example in rows.examples:
        pixels = None
        if example.images:
            shown = np.stack([rows.tokenizer.image_format.pixels(data) for data in example.images])  # type: ignore[union-attr]
            pixels = (torch.from_numpy(shown).float() / 255 - 0.5) / 0.5
        ids = torch.from_numpy(example.ids).long()
        logits = theirs(input_ids=ids[None, :-1], pixel_values=pixels).logits[0]
        weights = torch.from_numpy(example.weights[1:])
        total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum()
        weight += float(weights.sum())
    return total / weight


@pytest.mark.parametrize("gradient_checkpointing", ["off", "selective", "full"])
@pytest.mark.parametrize("at_once", [6, 4, 1])
def test_loss_and_gradients_are_those_of_a_naive_loop_with_transformers(
    tmp_path: Path, at_once: int, gradient_checkpointing: str
) -> None:
    model, tokenizer = seeing()
    rows = PictureRows(tokenizer, mixed(6))
    save_pretrained(model, tmp_path / "m", tokenizer)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32)
    expected = naive_loss(theirs, rows)
    expected.backward()
    model.train_only("all")
    model.gradient_checkpointing = gradient_checkpointing  # type: ignore[assignment]
    objective = LanguageModeling()
    batches = [rows.batch(range(start, min(start + at_once, 6))) for start in range(0, 6, at_once)]
    count = sum(objective.count(batch) for batch in batches)
    loss = 0.0
    for batch in batches:  # some of one row alone have no picture
        part = objective(model, batch.to("cpu")).loss_sum / count
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        other = gradients[their_name(name)]
        if not parameter.requires_grad:
            assert other.grad is None or not other.grad.any(), f"{name} does nothing"
            continue
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_rows_of_the_data_are_the_same_conversations(tmp_path: Path) -> None:
    """Several conversations a row, tiled by the data's own packing, against one conversation a row."""
    model, tokenizer = seeing()
    alone = PictureRows(tokenizer, mixed(12))
    file = write_rows(tmp_path / "rows.jsonl", mixed(12))
    config = DataConfig(paths=(str(file),), cache_dir=str(tmp_path), validation_fraction=0.0)
    packed, _ = prepare(config, tokenizer, "sft", sequence_length=192).packed(192, 0)
    assert packed.num_rows <= 4
    objective = LanguageModeling()
    sums = []
    for rows in (alone, packed):
        batch = rows.batch(range(rows.num_rows)).to("cpu")
        assert batch.pixels_ICHW is not None
        assert len(batch.pixels_ICHW) == 12
        with torch.no_grad():
            sums.append((float(objective(model, batch).loss_sum), objective.count(batch)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_a_validation_sees_the_pictures() -> None:
    model, tokenizer = seeing()
    rows = PictureRows(tokenizer, mixed(6))
    batch = rows.batch(range(6))
    found = validate(model, [rows.batch([i]) for i in range(6)], tokenizer.token_bytes(), torch.device("cpu"))
    with torch.no_grad():
        expected = LanguageModeling()(model, batch.to("cpu")).loss_sum / LanguageModeling().count(batch)
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)
    assert batch.pixels_ICHW is not None
    black = replace(batch, pixels_ICHW=torch.zeros_like(batch.pixels_ICHW))
    blind = validate(model, [black], tokenizer.token_bytes(), torch.device("cpu"))
    assert abs(blind.loss - found.loss) > 1e-4


def test_a_teacher_sees_what_its_student_sees() -> None:
    """A student that is its teacher has nothing to learn from it; one whose teacher sees other pictures has."""
    model, tokenizer = seeing()
    teacher, _ = seeing()
    batch = PictureRows(tokenizer, mixed(6)).batch(range(6)).to("cpu")
    assert batch.pixels_ICHW is not None
    objective = Distillation(DistillationLossConfig(), teacher, tokenizer.vocab_size)
    with torch.no_grad():
        assert float(objective(model, batch).metrics["divergence"]) == pytest.approx(0, abs=1e-4)
        teacher.multi_modal_projector.linear_2.bias.add_(1)  # an image token shown without its picture keeps quiet here
        assert float(objective(model, batch).metrics["divergence"]) > 1e-2


def test_a_model_learns_to_name_the_colour_of_shades_it_has_not_seen() -> None:
    """From random weights, three words for three colours; shades are drawn anew for the examination."""
    model, tokenizer = seeing()
    generator = np.random.default_rng(0)
    names = [name for name in COLOURS for _ in range(8)]
    rows = PictureRows(tokenizer, [asked(picture(shade(name, generator)), answer=name) for name in names])
    model.train_only("all")
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=2048)
    objective = LanguageModeling()
    batch = rows.batch(range(len(names))).to("cpu")
    for _ in range(40):
        (objective(model, batch).loss_sum / objective.count(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    held_out = [name for name in COLOURS for _ in range(10)]
    right = 0
    for name in held_out:
        shown = picture(shade(name, generator))
        with torch.no_grad():
            losses = {
                word: objective(model, PictureRows(tokenizer, [asked(shown, answer=word)]).batch([0]).to("cpu"))
                for word in COLOURS
            }
        right += min(losses, key=lambda word: float(losses[word].loss_sum)) == name
    assert right >= 28, f"{right} of 30"  # chance: 10


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", ["projector", "language"])
def test_what_is_frozen_is_saved_as_it_came_whatever_is_computed_in(train: str, precision: torch.dtype) -> None:
    model, tokenizer = seeing()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train_only(train)  # type: ignore[arg-type]
    hold_in_memory(model, precision)
    model.compute_dtype = precision
    batch = PictureRows(tokenizer, mixed(3)).batch(range(3)).to("cpu")
    LanguageModeling()(model, batch).loss_sum.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any(name.startswith("vision_tower.") for name in frozen)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_the_projector_that_is_new_has_a_new_models_rates() -> None:
    model, _ = seeing()
    model.train_only("language")
    config = OptimConfig()
    optimizers = build_optimizers(
        model, config, tokens_per_batch=2048, trained=True, fresh=("multi_modal_projector.", "vision_tower.")
    )
    rates = {
        name: group["base_lr"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    new, trained = config.learning_rates(2048, trained=False), config.learning_rates(2048, trained=True)
    assert rates["multi_modal_projector.linear_1.weight"] == new[1]
    assert rates["multi_modal_projector.linear_1.bias"] == new[2]
    assert rates["model.layers.0.self_attn.q_proj.weight"] == trained[0]
    assert rates["model.embed_tokens.weight"] == trained[1]
    assert rates["model.norm.weight"] == trained[2]
    assert not any(name.startswith("vision_tower.") for name in rates)
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_operations_of_a_picture_are_those_that_torch_counts() -> None:
    model, tokenizer = seeing()
    rows = PictureRows(tokenizer, mixed(3))
    batch = rows.batch(range(3)).to("cpu")
    assert batch.pixels_ICHW is not None
    model.train_only(None)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model.embed_images(batch.pixels_ICHW)
    assert len(batch.pixels_ICHW) * picture_flops(model) == counted.get_total_flops()  # forward alone
    without = replace(batch, pixels_ICHW=None, image_places_M=None)
    assert batch_flops(model, batch) - batch_flops(model, without) == pytest.approx(3 * picture_flops(model))
    figures = {}
    for train in (None, "projector", "language", "all"):
        model.train_only(train)  # type: ignore[arg-type]
        figures[train] = picture_flops(model)
    assert figures[None] < figures["projector"] == figures["language"] < figures["all"] == 3 * figures[None]


def test_a_model_without_eyes_is_not_given_pictures_unseen() -> None:
    model, tokenizer = seeing()
    batch = PictureRows(tokenizer, mixed(3)).batch(range(3))
    with pytest.raises(AssertionError, match="only reads"):
        LanguageModeling()(CausalLM(model.config), batch)
