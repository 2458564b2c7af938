"""The product whose weight gradient is multiplied the other way round: the same sums, and only where it pays."""

from __future__ import annotations

import pytest
import torch

from minnow.model.tall_linear import pays, tall_linear
from minnow.model.transformer import Linear
from minnow.training.hardware import has_cpp_compiler


def test_gradients_are_those_of_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(tall_linear, (x, weight))
    assert torch.autograd.gradcheck(lambda x: tall_linear(x, weight.detach()), (x,))
    torch.testing.assert_close(tall_linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_takes_it_in_training_alone(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    taken = []

    def noting(x: torch.Tensor, weight: torch.Tensor) -> bool:
        answer = pays(x, weight)
        taken.append(answer)
        return answer

    monkeypatch.setattr("minnow.model.transformer.pays", noting)
    torch.manual_seed(0)
    layer = Linear(8, 16, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    x = torch.randn(5, 8).bfloat16().requires_grad_()
    upstream = torch.randn(5, 16).bfloat16()
    plain = layer(x)
    expected = torch.autograd.grad(plain, [x, *layer.parameters()], upstream)
    compiled = torch.compile(layer, backend="aot_eager")
    output = compiled(x)
    gradients = torch.autograd.grad(output, [x, *layer.parameters()], upstream)
    torch.testing.assert_close(output, plain, rtol=0.01, atol=0.02)
    torch.testing.assert_close(gradients, expected, rtol=0.01, atol=0.02)
    assert gradients[1].dtype == torch.float32
    with torch.no_grad():
        compiled(x)
    assert taken == [False, True, False]
    assert not pays(x, torch.empty(12, 8)), "not twice as many rows"
