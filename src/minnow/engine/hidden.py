"""What a model makes of texts that it only reads: pooled hidden states, and how likely it finds each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM


@torch.no_grad()
def hidden_states(model: CausalLM, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, D] for each text, after the final norm; all texts are read in one pass, each within itself."""
    device = model.head_weight.device
    lengths = [len(text) for text in texts]
    tokens_N = torch.tensor([token for text in texts for token in text], device=device)
    positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    hidden_BND = model(tokens_N[None], positions_N[None], PackedAttention(borders, device))
    return list(hidden_BND[0].split(lengths))


def mean_hidden(model: CausalLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors fp32 [N, D] on the CPU: the mean of the final hidden states over a text's tokens."""
    means_ND = torch.stack([hidden_TD.float().mean(0) for hidden_TD in hidden_states(model, texts)])
    return torch.nn.functional.normalize(means_ND, dim=-1).cpu()


@torch.no_grad()
def token_logprobs(model: CausalLM, ids: Sequence[int]) -> Tensor:
    """log p(ids[t] | ids[:t]) for t from 1 on: fp32 [T - 1] on the CPU."""
    (hidden_TD,) = hidden_states(model, [ids])
    logprobs_TV = torch.log_softmax(model.logits(hidden_TD[:-1]), -1)
    targets_T = torch.tensor(ids[1:], device=logprobs_TV.device)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0].cpu()
