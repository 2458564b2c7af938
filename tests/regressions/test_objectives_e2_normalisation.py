"""E2: peers average each micro-batch and then the averages, which weighs a token by how few share its
micro-batch."""

import pytest
import torch

from minnow.objectives import linear_cross_entropy


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 4, 8])
def test_micro_batches_of_uneven_masks_give_the_gradient_of_the_whole(rows_per_micro_batch):
    """1 x 8 == 2 x 4 == 4 x 2 == 8 x 1 by sum / count, with rows of 0 to 11 supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, length, hidden, vocab = 8, 12, 6, 9
    hidden_BTD = torch.randn(rows, length, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).requires_grad_()
    targets_BT = torch.randint(vocab, (rows, length), generator=generator)
    supervised_B = torch.tensor([11, 0, 1, 7, 3, 10, 2, 5])
    weights_BT = (torch.arange(length) < supervised_B[:, None]).double()
    weights_BT[3] *= 0.5  # weights need not be 0 or 1

    # The definition, over all logits: sum of weighted losses / sum of weights.
    logits = hidden_BTD.flatten(0, 1) @ weight_VD.T
    nll = torch.nn.functional.cross_entropy(logits, targets_BT.flatten(), reduction="none")
    whole = (nll * weights_BT.flatten()).sum() / weights_BT.sum()
    expected = torch.autograd.grad(whole, (hidden_BTD, weight_VD))

    count = weights_BT.sum()  # known before the first backward
    total = 0.0
    for start in range(0, rows, rows_per_micro_batch):
        micro = slice(start, start + rows_per_micro_batch)
        loss_sum = linear_cross_entropy(
            hidden_BTD[micro].flatten(0, 1),
            weight_VD,
            targets_BT[micro].flatten(),
            weights_BT[micro].flatten(),
            chunk_size=5,
        ).loss_sum
        (loss_sum / count).backward()
        total += loss_sum.item() / count.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(hidden_BTD.grad, expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight_VD.grad, expected[1], rtol=1e-11, atol=1e-13)
