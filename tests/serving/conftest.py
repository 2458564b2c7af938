"""One server for the tests that do not change it: a model that says what it is told, and a random one."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from ..stages.stage_helpers import save_parrot_model, save_random_model
from .serving_helpers import Running, serving


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`parrot` says "小鱼 swims", `thinker` thinks first, `noise` is random with a context of 256, `wide` of 4096."""
    folder = tmp_path_factory.mktemp("served")
    models = {
        "parrot": save_parrot_model(folder / "parrot", "小鱼 swims§<|im_end|>§"),
        "thinker": save_parrot_model(folder / "thinker", "hm 小§</think>§yes§<|im_end|>§"),
        "noise": save_random_model(folder / "noise", context=256),
        "wide": save_random_model(folder / "wide", context=4096),
    }
    with serving(models) as running:
        yield running


@pytest.fixture(scope="session")
def client(running: Running) -> openai.OpenAI:
    return running.client()
