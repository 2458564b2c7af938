"""The orthogonal factor of many matrices at once, by an odd polynomial iteration: the heart of Muon."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from minnow.cpu import cpu_multiplies_bf16_faster

Polynomial = Literal["polar_express", "quintic"]

# x -> a x + b x^3 + c x^5 on every singular value. One triple for all steps: Keller Jordan, "Muon" (2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)

# One triple per step, each the minimax choice for the interval which the steps before it leave: Amsel,
# Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), for singular values from 1e-3 to 1. Later
# steps repeat the last.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
# The paper's margin: x is read as x / 1.01, so that rounding which pushes a singular value above 1 cannot
# diverge.
_SAFETY = 1.01

# From this ratio of sides on, iterating on the small Gram matrix takes fewer multiplications (see
# `_by_gram`).
_GRAM_FROM_RATIO = 1.5


def coefficients(polynomial: Polynomial, steps: int) -> list[tuple[float, float, float]]:
    """Give the triples (a, b, c) of the steps, in order."""
    if polynomial == "quintic":
        return [_QUINTIC] * steps
    triples = [_POLAR_EXPRESS[min(step, len(_POLAR_EXPRESS) - 1)] for step in range(steps)]
    return [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in triples]


def orthogonalise(
    matrices_BMN: Tensor,
    polynomial: Polynomial = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace each matrix U S V^T of [B, M, N] by about U V^T: singular values end near 1, a zero matrix stays zero.

    The iteration runs in `dtype` (float64, float32 or bfloat16; None: as given), in which the result comes. "quintic"
    leaves singular values in about [0.7, 1.2], "polar_express" in [0.87, 1.13].
    """
    # The Frobenius norm bounds the largest singular value.
    norm_B11 = torch.linalg.vector_norm(matrices_BMN, dim=(1, 2), keepdim=True)
    x_BMN = (matrices_BMN / norm_B11.clamp(min=1e-7)).to(dtype or matrices_BMN.dtype)
    triples = coefficients(polynomial, steps)
    shorter, longer = sorted(x_BMN.shape[1:])
    # In bfloat16 the rounding of the Gram matrix alone is as large as its small eigenvalues: keep to x itself there.
    if longer >= _GRAM_FROM_RATIO * shorter and x_BMN.dtype != torch.bfloat16:
        return _by_gram(x_BMN, triples)
    return _by_matrix(x_BMN, triples)


# A tall x takes its Gram matrix, and every polynomial of it, on the other side: x (a I + b R + c R^2) with R = x^T x is
# the same polynomial of x. So nothing is transposed in memory, and R has the shorter side.


def _gram(x_BMN: Tensor) -> Tensor:
    tall = x_BMN.shape[1] > x_BMN.shape[2]
    return torch.bmm(x_BMN.mT, x_BMN) if tall else torch.bmm(x_BMN, x_BMN.mT)


def _by_matrix(x_BMN: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Iterate on x itself: x <- (a I + b R + c R^2) x with R = x x^T."""
    tall = x_BMN.shape[1] > x_BMN.shape[2]
    for a, b, c in triples:
        gram_BSS = _gram(x_BMN)
        polynomial_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        factors = (x_BMN, polynomial_BSS) if tall else (polynomial_BSS, x_BMN)
        x_BMN = torch.baddbmm(x_BMN, *factors, beta=a)
    return x_BMN


def _by_gram(x_BMN: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Do the same on matrices of the shorter side only.

    R <- P R P and Q <- P Q with P = a I + b R + c R^2, and x <- Q x at the end.

    All P are polynomials of the first R and commute, so this is `_by_matrix` in exact arithmetic. With k steps and
    r = longer / shorter side it takes 4r + 8k - 6 units of shorter^3 instead of k(4r + 2): 45 instead of 65 at the
    feed-forward's r = 2.75 with k = 5. In float32 it differs from float64 by about 5e-4 of the largest element, a
    twentieth of what bfloat16 (in which Muon usually runs) loses.
    """
    gram_BSS = _gram(x_BMN)
    product_BSS: Tensor | None = None
    for step, (a, b, c) in enumerate(triples):
        polynomial_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        polynomial_BSS.diagonal(dim1=-2, dim2=-1).add_(a)
        product_BSS = polynomial_BSS if product_BSS is None else torch.bmm(polynomial_BSS, product_BSS)
        if step + 1 < len(triples):
            gram_BSS = torch.bmm(torch.bmm(polynomial_BSS, gram_BSS), polynomial_BSS)
    assert product_BSS is not None
    tall = x_BMN.shape[1] > x_BMN.shape[2]
    return torch.bmm(x_BMN, product_BSS) if tall else torch.bmm(product_BSS, x_BMN)


def fast_dtype(parameter: Tensor) -> torch.dtype:
    """Choose the iteration's dtype: bfloat16 where the hardware multiplies it faster, else the parameter's.

    It depends on the hardware only, so that a resumed run repeats itself bit by bit.
    """
    if parameter.dtype == torch.float64:
        return torch.float64
    if parameter.device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16_faster() else torch.float32
