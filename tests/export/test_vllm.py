"""Dense and MoE models in vLLM's CPU build: the same greedy tokens. `make test-vllm` makes its environment."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_model
from export_models import (
    ARCHITECTURES,
    noise_pictures,
    reference_greedy,
    reference_logits,
    seeing_model,
    seen_greedy,
    tiny_model,
)

from minnow.engine import Engine, SamplingParams
from minnow.evaluation.pond import PondTask, find_world
from minnow.evaluation.registry import TaskOptions
from minnow.tokenizer import render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not vllm_model.PYTHON, reason="MINNOW_VLLM names no Python with vLLM: make test-vllm"),
]

IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60]
# vLLM's CPU attention takes heads of 32, 64, ... only.
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.mark.parametrize("name", ["qwen3", "qwen3 moe", "glm4 moe"])
def test_greedy(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, **SHAPE, **ARCHITECTURES[name])
    ((ids, logprobs),) = vllm_model.vllm_greedy(folder, [IDS], 24)
    assert ids == reference_greedy(folder, IDS, 24)
    logits = reference_logits(folder, [*IDS, *ids])[len(IDS) - 1 : -1].astype(np.float64)
    expected = logits[range(24), ids] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pictures(tied: bool, tmp_path: Path) -> None:
    """vLLM's own template, processor and tower on a folder that looks at pictures, stretched ones too."""
    folder = seeing_model(tmp_path, tie_word_embeddings=tied)
    pictures = noise_pictures(tmp_path, 3, (50, 40))
    theirs = vllm_model.vllm_sees(folder, pictures, "What is this?", 12)
    for picture, (ids, logprobs) in zip(pictures, theirs, strict=True):
        expected, expected_logprobs = seen_greedy(folder, picture, "What is this?", 12)
        assert ids == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-3)
    assert len({round(logprobs[0], 2) for _, logprobs in theirs}) > 1  # what is shown matters


@pytest.mark.skipif("MINNOW_POND_MODEL" not in os.environ, reason="MINNOW_POND_MODEL: a run of minnow quickstart")
def test_the_pond(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that chats answers held-out questions with the same tokens as here."""
    folder = Path(os.environ["MINNOW_POND_MODEL"]) / "model"
    engine = Engine.from_pretrained(folder, dtype=torch.float32)
    task = PondTask(find_world(TaskOptions(model_folder=folder)))
    rows = random.Random(0).sample(list(task.rows()), 100)
    prompts = [render(engine.tokenizer, task.prompt(row), add_generation_prompt=True).ids.tolist() for row in rows]
    ours = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
    theirs = vllm_model.vllm_greedy(folder, prompts, 24)
    ends = {engine.tokenizer.im_end_id, engine.tokenizer.end_of_text_id}
    same = []
    for mine, (ids, _) in zip(ours, theirs, strict=True):
        answer = list(mine.completions[0].ids)
        length = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
        same.append(answer[:length] == ids[:length])
    with capsys.disabled():
        print(f"\nthe pond in vLLM: {sum(same)} of {len(same)} answers have minnow's tokens")
    assert all(same)
