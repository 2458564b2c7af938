"""Every parameter of the installed `openai` client: it works, has no effect, or is refused by name."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import openai
import pytest
from openai.types.shared import ReasoningEffort
from pydantic import BaseModel, ValidationError

from minnow.engine import SamplingParams
from minnow.serving import ServingConfig
from minnow.serving.requests import ChatBody, CompletionBody, EmbeddingBody
from minnow.serving.sampling import sampling_params

from .serving_helpers import Running

ASK: list[Any] = [{"role": "user", "content": "你好"}]
NOT_PARAMETERS = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
# What the client can ask for and this server cannot do, with the reason it gives.
REFUSED: dict[str, tuple[Any, str]] = {
    "audio": ({"format": "wav", "voice": "alloy"}, "answers with text only"),
    "functions": ([{"name": "f"}], "use tools"),
    "web_search_options": ({}, "does not search the web"),
    "suffix": ("the end", "not supported"),
    "dimensions": (8, "not supported"),
}
# What makes no difference here: the answer is the one without it.
WITHOUT_EFFECT: dict[str, Any] = {
    "function_call": "none",
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "user": "u",
    "verbosity": "low",
}


@pytest.mark.parametrize(
    ("create", "body"),
    [
        (openai.resources.chat.Completions.create, ChatBody),
        (openai.resources.Completions.create, CompletionBody),
        (openai.resources.Embeddings.create, EmbeddingBody),
    ],
)
def test_every_parameter_of_the_client_is_known(create: Any, body: type[BaseModel]) -> None:
    parameters = set(inspect.signature(create).parameters) - NOT_PARAMETERS
    assert parameters <= set(body.model_fields)
    for name in parameters & set(REFUSED):
        value, reason = REFUSED[name]
        with pytest.raises(ValidationError, match=reason):
            body.model_validate({"model": "m", name: value})
    required = {"model": "m", "messages": ASK} if body is ChatBody else {"model": "m", "prompt": "x", "input": "x"}
    given = {name: value for name, value in required.items() if name in body.model_fields}
    body.model_validate(given | dict.fromkeys(parameters - set(given)))  # null asks for nothing


def test_what_has_no_effect_and_what_is_refused(client: openai.OpenAI) -> None:
    plain: dict[str, Any] = {"model": "noise", "messages": ASK, "seed": 1, "max_tokens": 5}
    switches = {"skip_special_tokens": True, "add_generation_prompt": True}  # vLLM's
    answer = client.chat.completions.create(**plain, **WITHOUT_EFFECT, extra_body=switches)
    assert answer.choices == client.chat.completions.create(**plain).choices
    others = {
        "function_call": ({"name": "f"}, "use tool_choice"),
        "modalities": (["text", "audio"], "Input should be 'text'"),
        "moderation": ({"model": "m", "policy": {"input": {"mode": "block"}}}, "moderates nothing"),
        "skip_special_tokens": (False, "never part of a text"),
        "add_generation_prompt": (False, "always a new message"),
    }
    for name in ("audio", "functions", "web_search_options"):
        others[name] = REFUSED[name]
    for name, (value, reason) in others.items():
        with pytest.raises(openai.BadRequestError, match=reason) as raised:
            client.chat.completions.create(**plain, extra_body={name: value})
        assert raised.value.param == name


def test_an_empty_suffix_asks_for_nothing(client: openai.OpenAI) -> None:
    plain: dict[str, Any] = {"model": "noise", "prompt": "x", "seed": 1, "max_tokens": 5}
    choices = client.completions.create(**plain).choices
    assert client.completions.create(**plain, suffix="").choices == choices
    assert client.completions.create(**plain, suffix=None).choices == choices
    with pytest.raises(openai.BadRequestError, match="not supported") as raised:
        client.completions.create(**plain, suffix=" the end")
    assert raised.value.param == "suffix"


def test_every_sampling_option_reaches_the_engine(running: Running) -> None:
    model = running.app.state.minnow.models.get("noise")
    options = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": 0.4, "n": 2, "stop": ["a", "b"], "stop_token_ids": [7],
        "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    for create, required in ((ChatBody, {"messages": ASK}), (CompletionBody, {"prompt": "x"})):
        body = create.model_validate({"model": "noise", **required, **options, "seed": -1, "logit_bias": {"9": 1.5}})
        expected = SamplingParams(**options, seed=2**64 - 1, logit_bias={9: 1.5}, max_tokens=6)
        assert sampling_params(body, ServingConfig(), model, max_tokens=6) == expected
        silent = create.model_validate({"model": "noise", **required})
        assert sampling_params(silent, ServingConfig(), model, max_tokens=None) == SamplingParams(max_tokens=None)


def test_top_p_0_takes_the_likeliest_token(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "noise", "messages": ASK, "max_tokens": 12}
    likeliest = client.chat.completions.create(**options, temperature=0).choices
    for top_p in (0, 5e-324):
        assert client.chat.completions.create(**options, top_p=top_p).choices == likeliest


def test_every_effort_of_the_client_is_known() -> None:
    (efforts, _) = get_args(ReasoningEffort)
    for effort in get_args(efforts):
        body = ChatBody.model_validate({"model": "m", "messages": ASK, "reasoning_effort": effort})
        assert body.thinking is (effort != "none")
