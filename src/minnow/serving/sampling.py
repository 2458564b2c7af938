"""A request's options as the engine's."""

from __future__ import annotations

from typing import Any

from minnow.config import UserError
from minnow.engine import SamplingParams
from minnow.serving.config import ServingConfig
from minnow.serving.errors import APIError
from minnow.serving.models import ServedModel
from minnow.serving.requests import GenerationBody


def sampling_params(
    body: GenerationBody,
    config: ServingConfig,
    model: ServedModel,
    *,
    max_tokens: int | None,
    prompts: int = 1,
    **more: Any,
) -> SamplingParams:
    """`more` are fields of `SamplingParams`. APIError 400 for what does not go together."""
    n = body.n or 1
    most = min(config.max_samples, config.max_answers)  # more would be told to come again, for ever
    if prompts * n > most:
        raise APIError(400, f"{prompts} prompts x n = {prompts * n} answers; this server gives {most}", param="n")
    limit = config.max_answer_tokens
    if limit is not None:
        max_tokens = limit if max_tokens is None else min(max_tokens, limit)
    # So near to 0 a float32 cannot divide by a temperature; the likeliest token has all the probability anyway.
    greedy = body.top_p == 0 or (body.temperature is not None and body.temperature < 1e-5)
    given: dict[str, Any] = {
        "temperature": 0.0 if greedy else body.temperature,
        "top_p": body.top_p or None,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop_token_ids": body.stop_token_ids,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
    }
    logit_bias = _logit_bias(body.logit_bias or {})
    for param, tokens in (("logit_bias", logit_bias), ("stop_token_ids", body.stop_token_ids or ())):
        highest = max(tokens, default=0)
        if highest >= model.vocab_size:
            known = f"0 to {model.vocab_size - 1}"
            raise APIError(400, f"{param}: token {highest} is not in the vocabulary, {known}", param=param)
    try:
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            top_k=max(body.top_k or 0, 0),
            n=n,
            seed=None if body.seed is None else body.seed % 2**64,
            stop=body.stop or (),
            logit_bias=logit_bias,
            max_tokens=max_tokens,
            adapter=model.adapter,
            **more,
        )
    except UserError as error:
        # Each value alone is right by now. What is left to go wrong is where the answer may end.
        raise APIError(400, str(error), param="min_tokens" if body.min_tokens else "ignore_eos") from error


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        # int() also reads "1_0", " 1" and other scripts' digits, and refuses thousands of digits.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise APIError(400, f"Invalid value for 'logit_bias': the key {key!r} is no token id", param="logit_bias")
    return {int(key): bias for key, bias in given.items()}
