"""How good was a response, or a token, compared with what was to be expected: the advantage."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-4  # TRL's; a group of equal rewards has advantage 0 either way


def group_advantages(rewards_GK: Tensor, *, scale: bool) -> Tensor:
    """Reward minus the mean of its group, over the group's standard deviation if `scale`; [G, K].

    A group is the K answers to one prompt. With `scale` it is GRPO (arXiv 2402.03300, section 4.1.2; the unbiased
    deviation, 1e-4 added), without it Dr. GRPO (arXiv 2503.20783), which does not favour prompts that are nearly
    always or nearly never solved.
    """
    rewards_GK = rewards_GK - rewards_GK[:, :1]  # the mean of equal rewards is then exactly theirs
    centred_GK = rewards_GK - rewards_GK.mean(dim=1, keepdim=True)
    if not scale or rewards_GK.shape[1] == 1:
        return centred_GK
    return centred_GK / (rewards_GK.std(dim=1, keepdim=True) + _EPS)


def leave_one_out_advantages(rewards_GK: Tensor) -> Tensor:
    """Reward minus the mean of the *other* answers' rewards: RLOO (arXiv 2402.14740, eq. 8); [G, K], K at least 2."""
    rewards_GK = rewards_GK - rewards_GK[:, :1]  # as above
    K = rewards_GK.shape[1]
    others_GK = (rewards_GK.sum(dim=1, keepdim=True) - rewards_GK) / (K - 1)
    return rewards_GK - others_GK


def whiten(values_N: Tensor) -> Tensor:
    """Scale to mean 0 and unit variance over the whole batch; [N].

    The biased variance with 1e-8 added. A batch without variance comes out as zeros, not as NaN.
    """
    values_N = values_N - values_N[:1]  # as above
    return (values_N - values_N.mean()) * torch.rsqrt(values_N.var(unbiased=False) + 1e-8)


def generalized_advantages(
    rewards_SL: Tensor, values_SL: Tensor, lengths_S: Tensor, bootstrap_S: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of PPO's critic, each [S, L] (0 beyond a response's length). arXiv 1506.02438, eq. 16:

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lambda A_{t+1}      return_t = A_t + V_t

    rewards_SL, values_SL: one row a response, padded on the right to L; what lies beyond `lengths_S` is not read.
    bootstrap_S: the value after the last token: 0 where the response ended by itself, the critic's estimate where it
    was cut off (an answer that ran out of room is not worth nothing).
    """
    L = rewards_SL.shape[1]
    advantages_SL = torch.zeros_like(rewards_SL)
    following_S = torch.zeros_like(bootstrap_S)  # A_{t+1}, 0 beyond the last token
    for t in range(L - 1, -1, -1):
        inside_S = lengths_S > t
        last_S = lengths_S == t + 1
        next_value_S = torch.where(last_S, bootstrap_S, values_SL[:, t + 1] if t + 1 < L else bootstrap_S)
        delta_S = rewards_SL[:, t] + gamma * next_value_S - values_SL[:, t]
        following_S = torch.where(inside_S, delta_S + gamma * lam * following_S, torch.zeros_like(delta_S))
        advantages_SL[:, t] = following_S
    inside_SL = torch.arange(L, device=lengths_S.device) < lengths_S.unsqueeze(1)
    returns_SL = torch.where(inside_SL, advantages_SL + values_SL, torch.zeros_like(values_SL))
    return advantages_SL, returns_SL
