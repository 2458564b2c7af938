"""What a model makes of texts that it only reads: pooled hidden states, and how likely it finds each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.objectives.lm import token_logprobs


@torch.no_grad()
def packed_hidden(
    model: CausalLM, texts: Sequence[Sequence[int]], *, allow_beyond_trained_length: bool = False
) -> Tensor:
    """Hidden states [N, D] of the texts' tokens, after the final norm: read in one pass, each text within itself.

    UserError for a text longer than the model's context, unless that is allowed.
    """
    device = model.head_weight.device
    lengths = [len(text) for text in texts]
    if not allow_beyond_trained_length:  # the model itself looks on the CPU only
        model.config.check_sequence_length(max(lengths))
    tokens_N = torch.tensor([token for text in texts for token in text], device=device)
    positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    allowed = allow_beyond_trained_length
    return model(tokens_N[None], positions_N[None], attention, allow_beyond_trained_length=allowed)[0]


def mean_hidden(model: CausalLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors fp32 [N, D] on the CPU: the mean of the final hidden states over a text's tokens."""
    hidden_of_each = packed_hidden(model, texts).split([len(text) for text in texts])
    means_ND = torch.stack([hidden_TD.float().mean(0) for hidden_TD in hidden_of_each])
    return torch.nn.functional.normalize(means_ND, dim=-1).cpu()


@torch.no_grad()
def text_logprobs(model: CausalLM, ids: Sequence[int]) -> Tensor:
    """log p(ids[t] | ids[:t]) for t from 1 on: fp32 [T - 1] on the CPU. The logits are never held all at once."""
    hidden_TD = packed_hidden(model, [ids])[:-1]
    targets_T = torch.tensor(ids[1:], device=hidden_TD.device)
    return token_logprobs(hidden_TD, model.head_weight, targets_T).cpu()
