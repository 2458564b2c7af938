"""Generated requests, valid and not, against the served OpenAPI description: the server never fails."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from minnow.serving import ServingConfig

from ..seeing import data_url, picture, save_seeing_model
from .serving_helpers import serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PICTURE = data_url(picture(0))
KEY = {"Authorization": "Bearer k"}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Every endpoint with its methods."""
    folder = save_seeing_model(tmp_path_factory.mktemp("served") / "m", context=512)
    config = ServingConfig(api_key="k", max_answer_tokens=8, max_samples=200)
    with serving({"m": folder}, config) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=KEY)
        yield [found.ok() for found in schema.get_all_operations()]


def test_the_handbook_names_every_endpoint_and_limit(operations: list[Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for operation in operations:
        path = operation.path.replace("{name}", "NAME")
        assert f"`{operation.method.upper()} {path}`" in page
    for limit in dataclasses.fields(ServingConfig):
        assert f"--{limit.name}" in page


def try_out(operations: list[Any], cases: int, *, derandomize: bool) -> None:
    settings = hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for operation in operations:
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if operation.body else (GenerationMode.POSITIVE,)
        for mode in modes:
            statuses = statuses_of(operation, mode, settings)
            if mode is GenerationMode.POSITIVE and operation.path.startswith("/v1") and operation.body:
                assert statuses[200], f"{operation.label}: no generated request was answered: {statuses}"


def statuses_of(operation: Any, mode: GenerationMode, settings: hypothesis.settings) -> Counter[int]:
    """How often each status came."""
    statuses: Counter[int] = Counter()

    @settings
    @hypothesis.given(operation.as_strategy(generation_mode=mode), st.booleans())
    def run(case: Any, named: bool) -> None:
        # Requests for models that are not there end early: most name the one that is, and show pictures that are some.
        if named and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = with_pictures(with_integers(case.body)) | {"model": "m"}
        answer = case.call(headers=KEY)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    run()
    return statuses


def with_integers(value: Any) -> Any:
    """1.0, a whole number to JSON schema, as 1: the server takes whole numbers strictly."""
    if isinstance(value, dict):
        return {key: with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def with_pictures(value: Any) -> Any:
    """A picture in the place of every text that should be a picture's address."""
    if isinstance(value, list):
        return [with_pictures(item) for item in value]
    if not isinstance(value, dict):
        return value
    shows = isinstance(value.get("url"), str)
    return {key: PICTURE if shows and key == "url" else with_pictures(item) for key, item in value.items()}


def test_a_few_cases_of_every_endpoint(operations: list[Any]) -> None:
    assert len(operations) == 10
    try_out(operations, 40, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_cases(operations: list[Any]) -> None:
    try_out(operations, 500, derandomize=False)
