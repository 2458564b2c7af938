"""Tiny models of every architecture in folders, with a tokenizer that was trained on mixed text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tokenizers
import torch

from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig, RopeScaling
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import ImagePixels, VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer import Conversation, Message, Tokenizer, render, train_tokenizer
from minnow.tokenizer.images import Image
from minnow.tokenizer.special import IMAGE

CORPUS = [
    "The small fish lives in the old pond. It's blue, and it doesn't eat 12 snails.\n\nuser assistant system tool\n",
    "小鱼住在旧池塘里。它是蓝色的，不吃蜗牛。\n\n你好，请问今天天气怎么样？\n",
    "def f(x):\n    return x + 1\n\n\n    # done...\r\n\r\n",
] * 4

MIXED = (
    "Hello, it's a POND'S edge.\n\n  The 12345 fish 鱼在池塘里游，你好！ 👩‍👩‍👧 🇫🇷 e\u0301 naïve\tdef f(x):\n"
    "    return x**2 # 3.14\r\n\r\n'LL DON'T ſ\u3000 ½ ² ٣ end  "
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 untied": {"tie_word_embeddings": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "llama": {"qk_norm": False, "num_key_value_heads": 4},
    "llama with biases": {
        "qk_norm": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "llama grouped, llama3 rope": {
        "qk_norm": False,
        "rope_scaling": RopeScaling(type="llama3", factor=4.0, original_max_position_embeddings=16),
    },
    "qwen3 yarn": {
        "rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.1)
    },
    "qwen3 linear": {"rope_scaling": RopeScaling(type="linear", factor=2.0, original_max_position_embeddings=32)},
}

EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3 moe": {"experts": ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)},
    "qwen3 moe, one expert a token": {
        "experts": ExpertsConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=32)
    },
    "qwen3 moe, first layer dense": {
        "experts": ExpertsConfig(num_experts=4, moe_intermediate_size=32, first_k_dense_replace=1)
    },
    "glm4 moe": {
        "experts": ExpertsConfig(
            num_experts=4,
            moe_intermediate_size=32,
            scoring="sigmoid",
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
        ),
        "tie_word_embeddings": False,
    },
    "glm4 moe with biases, without qk norm": {
        "experts": ExpertsConfig(num_experts=4, moe_intermediate_size=32, scoring="sigmoid", n_shared_experts=1),
        "tie_word_embeddings": False,
        "qk_norm": False,
        "attention_bias": True,
    },
    "glm4 moe, groups": {
        "experts": ExpertsConfig(
            num_experts=8, moe_intermediate_size=32, scoring="sigmoid", n_shared_experts=2, n_group=4, topk_group=2
        ),
        "tie_word_embeddings": False,
    },
}
ARCHITECTURES |= EXPERTS


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 400)


def tiny_model(tmp_path: Path, *, tokenizer: Tokenizer | None = None, seed: int = 0, **changes: Any) -> Path:
    """The folder of a model with random weights: none is zero or one, so that no mistake hides."""
    tokenizer = tokenizer or small_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size + 3,  # rows that no token uses
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return _saved(CausalLM(ModelConfig(**(shape | changes))), tmp_path, tokenizer, seed)


def seeing_model(tmp_path: Path, *, tower: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The same of a model that looks at pictures of 32 x 32 pixels."""
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(small_tokenizer().definition)))
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
    text = ModelConfig(**(shape | heads | changes))
    small = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    vision = VisionConfig(**(small | (tower or {})))
    model = VisionLanguageModel(text, vision, tokenizer.special_ids[IMAGE])
    tokenizer.image_format = model.image_format
    return _saved(model, tmp_path, tokenizer, 0)


def _saved(model: CausalLM, tmp_path: Path, tokenizer: Tokenizer, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:  # the selection bias is a buffer
            low, high = (0.5, 1.5) if parameter.ndim == 1 else (-0.25, 0.25)
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
    folder = tmp_path / "run" / "model"
    save_pretrained(model, folder, tokenizer)
    return folder


def noise_pictures(folder: Path, count: int, size: tuple[int, int] = (32, 32)) -> list[Path]:
    """Files of random pixels, width x height."""
    paths = [folder / f"{seed}.png" for seed in range(count)]
    for seed, path in enumerate(paths):
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        PIL.Image.fromarray(noise).save(path)
    return paths


def seen_greedy(folder: Path, picture: Path, question: str, count: int) -> tuple[list[int], list[float]]:
    """The likeliest ids one after another behind a question about a picture, and their log-probabilities."""
    model, tokenizer = load_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    message = Message("user", question, images=(Image(picture.read_bytes()),))
    rendered = render(tokenizer, Conversation((message,)), add_generation_prompt=True)
    pixels = torch.from_numpy(tokenizer.require_images().pixels(rendered.images[0]))[None]
    ids, chosen = rendered.ids.tolist(), []
    for _ in range(count):
        tokens_T = torch.tensor(ids)
        images = ImagePixels(pixels, (tokens_T == tokenizer.image_id).nonzero().squeeze(1))
        with torch.no_grad():
            hidden = model(tokens_T[None], torch.arange(len(ids))[None], CausalAttention(), images=images)
            logprobs_V = torch.log_softmax(model.logits(hidden)[0, -1], -1)
        ids.append(int(logprobs_V.argmax()))
        chosen.append(float(logprobs_V.max()))
    return ids[-count:], chosen


def reference_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """minnow's own logits [T, V]."""
    model = load_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
        return model.logits(hidden)[0].numpy()


def reference_greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest next ids, each from the whole sequence before it."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(reference_logits(folder, ids)[-1].argmax()))
    return ids[-count:]


def mean_divergence(reference_TV: np.ndarray, other_TV: np.ndarray) -> float:
    """Mean over tokens of KL(reference || other), in nats."""
    p, q = (torch.tensor(x).double().log_softmax(-1) for x in (reference_TV, other_TV))
    return float((p.exp() * (p - q)).sum(-1).mean())
