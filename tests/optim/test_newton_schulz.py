"""The orthogonal factor: its singular values, both ways of computing it, and what it leaves alone."""

import math

import pytest
import torch

from minnow.optim import newton_schulz
from minnow.optim.newton_schulz import coefficients, orthogonalise


def matrices(count=3, rows=12, columns=40, smallest=-2.0, seed=0):
    """Matrices whose singular values run geometrically from 10^smallest to 1."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(count, rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(count, columns, rows, generator=generator, dtype=torch.float64))[0]
    return (left * torch.logspace(smallest, 0, rows, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize(("polynomial", "low", "high"), [("quintic", 0.65, 1.25), ("polar_express", 0.85, 1.15)])
@pytest.mark.parametrize("columns", [12, 14, 40])
@pytest.mark.parametrize("tall", [False, True])
def test_singular_values_end_near_one(polynomial, low, high, columns, tall):
    given = matrices(columns=columns)
    values = torch.linalg.svdvals(orthogonalise(given.mT if tall else given, polynomial, 5))
    assert values.min() > low
    assert values.max() < high


def test_more_polar_express_steps_converge_to_the_exact_factor():
    given = matrices(smallest=-1.0)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    # The last polynomial's fixed point is 1 up to the 1.01 margin of safety.
    torch.testing.assert_close(orthogonalise(given, "polar_express", 12), left @ right, rtol=0, atol=0.02)


@pytest.mark.parametrize("polynomial", ["quintic", "polar_express"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-3)])
def test_the_gram_form_equals_the_matrix_form(polynomial, dtype, tolerance):
    given = matrices(smallest=-4.0)
    given = given / torch.linalg.vector_norm(given, dim=(1, 2), keepdim=True)
    triples = coefficients(polynomial, 5)
    by_matrix = newton_schulz._by_matrix(given, triples)
    by_gram = newton_schulz._by_gram(given.to(dtype), triples).double()
    assert (by_gram - by_matrix).abs().max() < tolerance * by_matrix.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_one_and_zero_matrices(dtype):
    given = torch.zeros(3, 16, 64)
    given[0] = torch.outer(torch.arange(1.0, 17.0), torch.ones(64))
    given[1, 0, 0] = 1e-20
    result = orthogonalise(given.to(dtype)).float()
    assert torch.isfinite(result).all()
    assert 0.8 < torch.linalg.matrix_norm(result[0], 2) < 1.2
    assert torch.count_nonzero(result[2]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [12, 14, 40])
def test_the_transpose_gives_the_transpose(dtype, columns):
    given = matrices(columns=columns)
    wide, tall = (orthogonalise(x, dtype=dtype).double() for x in (given, given.mT.contiguous()))
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1}[dtype]
    assert (wide - tall.mT).abs().max() < tolerance


def test_scale_does_not_matter():
    given = matrices()
    scales = torch.tensor([1e4, 1.0, 1e-3], dtype=torch.float64)[:, None, None]  # each matrix by itself
    torch.testing.assert_close(orthogonalise(scales * given), orthogonalise(given), rtol=1e-9, atol=1e-10)


def test_polar_express_triples_are_minimax_on_what_is_left():
    """Each triple maps [low, high] to an interval around 1 whose two ends miss 1 by as much: it equioscillates."""
    low, high = 1e-3, 1.0
    for a, b, c in newton_schulz._POLAR_EXPRESS[:6]:
        x = torch.logspace(math.log10(low), math.log10(high), 20001, dtype=torch.float64)
        y = a * x + b * x**3 + c * x**5
        low, high = y.min().item(), y.max().item()
        assert 1 - low == pytest.approx(high - 1, rel=0.05, abs=1e-3)
