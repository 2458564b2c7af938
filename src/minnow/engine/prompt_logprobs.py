"""How likely a model finds the tokens of the prompts that it reads."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minnow.engine.sampler import likeliest_tokens
from minnow.engine.scheduler import Chunk
from minnow.objectives.lm import chunk_tokens
from minnow.transfer import to_device

if TYPE_CHECKING:
    from minnow.engine.runner import Decoder


def note_prompt_logprobs(model: Decoder, hidden_ND: Tensor, chunks: Listing[Chunk]) -> None:
    """Note the log-probabilities of prompt tokens for the requests among the chunks that ask for them.

    hidden_ND: of the chunks' tokens, one chunk after the other. A prompt's logits are never held all at once.
    """
    for chunk, hidden_TD in zip(chunks, hidden_ND.split([chunk.count for chunk in chunks]), strict=True):
        request = chunk.sequence.request
        noted = request.prompt_logprobs
        if noted is None:
            continue
        # A token's hidden state tells how likely the next one is. What is read again after a preemption is noted.
        first, end = len(noted.logprobs), min(chunk.start + chunk.count + 1, len(request.prompt_ids))
        if first >= end:
            continue
        targets_T = to_device(torch.tensor(request.prompt_ids[first:end]), hidden_ND.device)
        hidden_TD = hidden_TD[first - 1 - chunk.start : end - 1 - chunk.start]
        size = chunk_tokens(hidden_ND.device, model.config.vocab_size)
        for part_CD, targets_C in zip(hidden_TD.split(size), targets_T.split(size), strict=True):
            logprobs_CV = torch.log_softmax(model.logits(part_CD), -1)
            noted.logprobs.extend(logprobs_CV.gather(1, targets_C[:, None])[:, 0].tolist())
            if noted.top_logprobs is not None:
                noted.top_logprobs.extend(likeliest_tokens(logprobs_CV, request.params.prompt_logprobs or 0))
