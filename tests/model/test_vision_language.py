"""A model that looks at pictures, against transformers' LlavaForConditionalGeneration with a SigLIP tower."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minnow.config import UserError
from minnow.model.attention import PackedAttention
from minnow.model.config import ModelConfig
from minnow.model.pretrained import load_pretrained, load_vision_tower, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import ImagePixels, VisionLanguageModel
from minnow.model.vision_tower import VisionConfig

IMAGE_ID = 5
LLAMA = {"qk_norm": False, "tie_word_embeddings": False}
QWEN2 = {"qk_norm": False, "attention_bias": True}


def small_model(seed: int = 0, **shape: bool) -> VisionLanguageModel:
    text = ModelConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        **shape,
    )
    vision = VisionConfig(
        image_size=24, patch_size=8, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3
    )
    model = VisionLanguageModel(text, vision, IMAGE_ID, seed=seed)
    with torch.no_grad():  # nothing is at zero, so that nothing is left out unseen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def shown(images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [1, T] in which so many pictures of 9 patches stand among text, and their pixels."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 90, (images + 1, 5), generator=generator)
    parts = [text[0]]
    for after in text[1:]:
        parts += [torch.full((9,), IMAGE_ID), after]
    return torch.cat(parts)[None], torch.randint(0, 256, (images, 3, 24, 24), dtype=torch.uint8, generator=generator)


def logits(model: CausalLM, ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
    attention = PackedAttention(torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.device)
    positions = torch.arange(ids.shape[1])[None]
    if pixels is None:
        return model.logits(model(ids, positions, attention))
    places = (ids.flatten() == IMAGE_ID).nonzero().squeeze(1)
    return model.logits(model(ids, positions, attention, images=ImagePixels(pixels, places)))


@pytest.mark.parametrize("shape", [{}, LLAMA, QWEN2], ids=["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("images", [1, 3])
def test_transformers_reads_a_saved_model_and_computes_the_same(tmp_path: Path, shape: dict, images: int) -> None:
    model = small_model(**shape)
    save_pretrained(model, tmp_path / "m")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "m").eval()
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    ids, pixels = shown(images)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=(pixels.float() / 255 - 0.5) / 0.5).logits
        torch.testing.assert_close(logits(model, ids, pixels), expected, atol=1e-4, rtol=1e-4)
        assert (logits(model, ids, pixels.flip(-1)) - expected).abs().max() > 1e-3  # what is shown matters


@pytest.mark.parametrize("shape", [{}, LLAMA, QWEN2], ids=["qwen3", "llama", "qwen2"])
def test_a_model_of_transformers_is_read_and_computes_the_same(tmp_path: Path, shape: dict) -> None:
    save_pretrained(small_model(1, **shape), tmp_path / "ours")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / "model.safetensors")
    model = load_pretrained(tmp_path / "theirs")
    assert isinstance(model, VisionLanguageModel)
    assert "language_model.model.norm.weight" in names  # the layout that ours is tested to read
    ids, pixels = shown(2)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=(pixels.float() / 255 - 0.5) / 0.5).logits
        torch.testing.assert_close(logits(model, ids, pixels), expected, atol=1e-4, rtol=1e-4)


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    model = small_model()
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert isinstance(again, VisionLanguageModel)
    assert again.vision == model.vision
    assert again.image_token_id == IMAGE_ID
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tower_of_siglip_is_taken_over(tmp_path: Path) -> None:
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    shape = vision | {"image_size": 24, "patch_size": 8}
    text = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    config = transformers.SiglipConfig(vision_config=shape, text_config=text)
    siglip = transformers.SiglipModel(config).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    found, tower = load_vision_tower(tmp_path / "siglip")
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        outputs = siglip.vision_model(pixels, output_hidden_states=True)
        torch.testing.assert_close(tower(pixels), outputs.hidden_states[-2], atol=1e-5, rtol=1e-5)
    assert found == VisionConfig(**shape)


def test_a_tower_that_learnt_from_pictures_prepared_otherwise_is_refused(tmp_path: Path) -> None:
    """Its pixels would go from 0 to 1, say, where it has learnt from -1 to 1: it would see, and badly."""
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.SiglipVisionConfig(**shape, image_size=24, patch_size=8)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    prepared = {"do_convert_rgb": None, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    prepared |= {"resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 24, "width": 24}}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(prepared))
    load_vision_tower(tmp_path)
    for change in ({"image_std": [0.25] * 3}, {"do_normalize": False}, {"resample": 2}):
        file.write_text(json.dumps(prepared | change))
        with pytest.raises(UserError, match=f"pictures with {next(iter(change))} .* not supported"):
            load_vision_tower(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-2, -3]}, "only one layer"),
        ({"vision_feature_layer": -1}, "a layer before the last"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ({"vision_config": {"model_type": "siglip_vision_model", "hidden_act": "relu"}}, "hidden_act"),
        ({"text_config": None}, "text_config"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(tmp_path: Path, changes: dict, said: str) -> None:
    save_pretrained(small_model(), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=said) as caught:
        load_pretrained(tmp_path / "m")
    assert "config.json" in str(caught.value)


def test_a_missing_weight_of_the_tower_is_named(tmp_path: Path) -> None:
    save_pretrained(small_model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    del weights["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing vision_tower\.vision_model\.encoder\.layers\.0\.mlp\.fc1\.weight"):
        load_pretrained(tmp_path / "m")


def test_without_pictures_it_computes_what_its_language_model_does() -> None:
    model = small_model()
    bare = CausalLM(model.config)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("model.", "lm_head."))})
    ids = torch.randint(10, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model, ids, None), logits(bare, ids, None), rtol=0, atol=0)


def test_taking_over_a_language_model_keeps_its_weights() -> None:
    bare = CausalLM(small_model().config, seed=3)
    seeing = VisionLanguageModel.from_language_model(bare, small_model().vision, IMAGE_ID, seed=1)
    assert seeing.head_weight is bare.head_weight
    assert all(torch.isfinite(parameter).all() and not parameter.is_meta for parameter in seeing.parameters())
    ids, pixels = shown(1)
    assert torch.isfinite(logits(seeing, ids, pixels)).all()


@pytest.mark.parametrize(
    ("trained", "learns"),
    [
        ("projector", {"multi_modal_projector"}),
        ("language", {"multi_modal_projector", "model"}),
        ("all", {"multi_modal_projector", "model", "vision_tower"}),
        (None, {"model"}),
    ],
)
def test_what_is_chosen_learns_and_nothing_else(trained: str | None, learns: set[str]) -> None:
    model = small_model()
    model.train_only(trained)  # type: ignore[arg-type]
    ids, pixels = shown(2)
    logits(model, ids, pixels).logsumexp(-1).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name.split(".")[0] for name in moved} == learns
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        moved == asked
    )  # nothing waits in vain for a gradient: the layers behind the one that is looked at are frozen


def test_a_batch_without_pictures_leaves_a_gradient_of_zero_where_one_is_waited_for() -> None:
    model = small_model()
    model.train_only("all")
    ids = torch.randint(10, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    logits(model, ids, None).logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert all(float(g.abs().max()) == 0 for name, g in grads.items() if name.split(".")[0] != "model")  # type: ignore[union-attr]


def test_a_place_weighs_as_much_as_what_stands_there_at_the_start() -> None:
    """With places of a tenth of that, a tower that learnt to name colours was still at chance about places."""
    tower = VisionLanguageModel(small_model().config, VisionConfig(), IMAGE_ID).vision_tower.vision_model
    pixels = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches, places = (
        part.detach() for part in (tower.embeddings.patch_embedding(pixels), tower.embeddings.position_embedding.weight)
    )
    assert float(patches.std() / places.std()) == pytest.approx(1, rel=0.1)
