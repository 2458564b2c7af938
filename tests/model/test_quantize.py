"""int8 weights: the rounding, the product and its gradient, and a model whose matrices are rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import row_logits, tiny_model
from torch import Tensor

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig
from minnow.model.int8 import from_int8, int8_linear, to_int8
from minnow.model.lora import LoraConfig, add_lora, lora_layers, merge_lora
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.quantize import is_quantized, load_quantized, quantize, saving, unquantized_bytes, weight_bytes
from minnow.model.transformer import CausalLM

TOKENS_BT = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))
EXPERTS = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SHAPES = {
    "qwen3": {},
    "qwen2": {"attention_bias": True, "qk_norm": False, "head_dim": 12},
    "untied": {"tie_word_embeddings": False},
    "moe": {"experts": EXPERTS},
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def restored(model: CausalLM) -> CausalLM:
    """A dense fp32 model that holds what the int8 weights of `model` stand for."""
    dense = CausalLM(model.config)
    state = model.state_dict()
    weights = {}
    for name, tensor in state.items():
        scale = state.get(f"{name}_scale")
        if not name.endswith("_scale"):
            weights[name] = tensor if scale is None else tensor.double().mul(scale.double().unsqueeze(-1)).float()
    dense.load_state_dict(weights)
    return dense


def test_by_hand() -> None:
    """Row 1: the largest is 2.54, so a step is 0.02; 0.331 / 0.02 = 16.55 rounds to 17. A row of zeros stays zero."""
    weight, scale = to_int8(torch.tensor([[2.54, -1.26, 0.331], [0.0, 0.0, 0.0]]))
    assert weight.tolist() == [[127, -63, 17], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([0.02, 1.0]))
    torch.testing.assert_close(from_int8(weight, scale)[0], torch.tensor([2.54, -1.26, 0.34]))


def test_the_error_is_at_most_half_a_step() -> None:
    weight = randn(64, 96)
    rounded, scale = to_int8(weight)
    assert rounded.dtype == torch.int8
    assert rounded.abs().amax(1).eq(127).all()
    assert ((from_int8(rounded, scale) - weight).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)], ids=str)
def test_product_and_gradient_are_the_dense_ones(rows: tuple[int, ...]) -> None:
    weight, scale = to_int8(randn(24, 40))
    dense = weight.double() * scale.double()[:, None]
    x = randn(*rows, 40, seed=1).requires_grad_()
    y = int8_linear(x, weight, scale)
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
    grad = randn(*rows, 24, seed=2)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(int8_linear(x, weight, scale), y, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_its_own_arithmetic(dtype: torch.dtype) -> None:
    """float16 ends at 65504, and here a sum of x times whole numbers reaches 5 * 127 * 512."""
    weight, scale = to_int8(torch.full((2, 512), 0.25))
    y = int8_linear(torch.full((3, 512), 5.0, dtype=dtype), weight, scale)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), torch.full((3, 2), 5 * 0.25 * 512), rtol=1e-2, atol=0)


def test_nothing_but_int8_is_kept_for_the_backward_pass() -> None:
    weight, scale = to_int8(randn(24, 40))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        int8_linear(randn(3, 40).requires_grad_(), weight, scale)
    assert {(tuple(t.shape), t.dtype) for t in kept} == {((24, 40), torch.int8), ((24,), torch.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype) -> None:
    """One row goes another way when compiled."""
    weight, scale = to_int8(randn(24, 40))
    compiled = torch.compile(int8_linear, fullgraph=True)
    for rows in (1, 4):
        x = randn(rows, 40, seed=1).to(dtype)
        expected = (x.double() @ (weight.double() * scale.double()[:, None]).T).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(compiled(x, weight, scale), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_model_is_the_dense_model_of_the_rounded_weights(shape: dict) -> None:
    plain, model = tiny_model(**shape), tiny_model(**shape)
    quantize(model)
    assert is_quantized(model)
    assert not is_quantized(plain)
    dense = restored(model)
    assert dense.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(row_logits(model, TOKENS_BT), row_logits(dense, TOKENS_BT), rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        rounded = name.endswith("_proj.weight") or "experts." in name
        assert name.endswith("_scale") or (parameter.dtype == torch.int8) == rounded, name
        assert not parameter.requires_grad


def test_bytes() -> None:
    """A layer of the tiny shape has 64*48 + 2 * 32*48 + 48*64 + 3 * 80*48 = 20,736 weights in 64 + 32 + 32 + 48 + 80 +
    80 + 48 = 384 rows; what stays are 97*48 of the embedding and norms of 3 * (2*48 + 2*16) + 48."""
    plain, model = tiny_model(), tiny_model()
    quantize(model)
    kept = 4 * (97 * 48 + 3 * (2 * 48 + 2 * 16) + 48)
    assert weight_bytes(plain) == kept + 4 * 3 * 20_736
    assert weight_bytes(model) == kept + 3 * (20_736 + 4 * 384)
    assert unquantized_bytes(model) == weight_bytes(plain)
    assert saving(model) == "int8: weights 0.1 MB against 0.3 MB"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_rounds_what_is_stored(tmp_path: Path, dtype: torch.dtype | None) -> None:
    save_pretrained(tiny_model(), tmp_path / "model")
    expected = tiny_model()
    quantize(expected)
    loaded = load_quantized(tmp_path / "model", "int8", dtype=dtype)
    assert loaded.compute_dtype == (dtype or torch.float32)
    for name, tensor in expected.state_dict().items():
        found = loaded.state_dict()[name]
        keeps = tensor.dtype == torch.int8 or name.endswith("_scale")
        assert found.dtype == (tensor.dtype if keeps else loaded.compute_dtype)
        torch.testing.assert_close(found, tensor.to(found.dtype), rtol=0, atol=0)
    assert not is_quantized(load_quantized(tmp_path / "model", "none"))


def test_the_saving_is_beside_the_precision_that_it_would_have_had(tmp_path: Path) -> None:
    """Against bf16 int8 halves the layers' weights, and does not quarter them."""
    save_pretrained(tiny_model(), tmp_path / "model")
    rounded = load_quantized(tmp_path / "model", "int8", dtype=torch.bfloat16)
    assert unquantized_bytes(rounded) == weight_bytes(load_pretrained(tmp_path / "model", dtype=torch.bfloat16))


def test_an_adapter_whose_base_has_moved_is_loaded_onto_the_one_given(tmp_path: Path) -> None:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=4), base=str(tmp_path / "gone"))
    save_pretrained(model, tmp_path / "adapter")
    save_pretrained(tiny_model(), tmp_path / "base")
    assert is_quantized(load_quantized(tmp_path / "adapter", "int8", base=tmp_path / "base"))
    with pytest.raises(UserError, match="gone"):
        load_quantized(tmp_path / "adapter", "int8")


# --- Under adapters ---------------------------------------------------------------------------------------------------

KINDS = {"plain": {}, "dora": {"dora": True}, "some": {"targets": ("q_proj", "layers.1.*_proj")}}


def with_adapters(model: CausalLM, **settings) -> CausalLM:
    add_lora(model, LoraConfig(**({"rank": 4} | settings)), base="base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator))
    return model


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adapters_learn_as_on_the_dense_model(shape: dict, settings: dict) -> None:
    """Forward pass, and the gradient of every adapter weight, against the restored weights in fp32."""
    model = tiny_model(**shape)
    quantize(model)
    dense = with_adapters(restored(model), **settings)
    with_adapters(model, **settings)
    ours, theirs = row_logits(model, TOKENS_BT), row_logits(dense, TOKENS_BT)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours.tanh().sum().backward()
    theirs.tanh().sum().backward()
    gradients = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing(mode: str) -> None:
    gradients = []
    for checkpointing in ("off", mode):
        model = tiny_model()
        quantize(model)
        with_adapters(model).gradient_checkpointing = checkpointing
        row_logits(model, TOKENS_BT).tanh().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_only_adapters_are_saved_and_merged_into_unrounded_weights(tmp_path: Path) -> None:
    save_pretrained(tiny_model(), tmp_path / "base")
    model = tiny_model()
    quantize(model)
    add_lora(model, LoraConfig(rank=4, quantize="int8"), base=str(tmp_path / "base"))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    with pytest.raises(ValueError, match="unquantised"):
        merge_lora(model)
    save_pretrained(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merged, base = load_pretrained(tmp_path / "adapter"), tiny_model()
    for name, layer in lora_layers(model).items():
        expected = base.get_submodule(name).weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=1e-5, atol=1e-6)


def test_int8_without_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="lora.rank is 0"):
        LoraConfig(quantize="int8")
