"""Dense and MoE models in vLLM's CPU build: the same greedy tokens. `make test-vllm` makes its environment."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
import vllm_model
from export_models import ARCHITECTURES, reference_greedy, reference_logits, tiny_model
from tests.model.model_helpers import randomized
from tests.tokenizer.tokenizer_helpers import small_tokenizer

from minnow.engine import Engine, SamplingParams
from minnow.evaluation.pond import PondTask, find_world
from minnow.evaluation.registry import TaskOptions
from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer import Conversation, Message, Tokenizer, render
from minnow.tokenizer.images import Image

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
    """vLLM's own template, processor and tower, on a folder that looks at pictures."""
    text = ModelConfig(**SHAPE, vocab_size=512, intermediate_size=128, num_hidden_layers=2, tie_word_embeddings=tied)
    vision = VisionConfig(image_size=32, patch_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    model = randomized(VisionLanguageModel(text, vision, small_tokenizer().special_ids["<|image_pad|>"]))
    assert isinstance(model, VisionLanguageModel)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(small_tokenizer().definition)))
    tokenizer.image_format = model.image_format
    save_pretrained(model, tmp_path / "m", tokenizer)
    pictures = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(pictures):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        PIL.Image.fromarray(noise).save(path)
    theirs = vllm_model.vllm_sees(tmp_path / "m", pictures, "What is this?", 12)
    asked = [Message("user", "What is this?", images=(Image(path.read_bytes()),)) for path in pictures]
    prompts = [render(tokenizer, Conversation((each,)), add_generation_prompt=True) for each in asked]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=True)
    for ours, (ids, logprobs) in zip(Engine(model, tokenizer).generate(prompts, params), theirs, strict=True):
        assert list(ours.completions[0].ids) == ids
        np.testing.assert_allclose(ours.completions[0].raw_logprobs, logprobs, atol=1e-3)
    assert len({tuple(ids) for ids, _ in theirs}) > 1  # the pictures matter


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
