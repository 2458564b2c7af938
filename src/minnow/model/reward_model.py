"""A decoder that gives a conversation one number: transformers' `...ForSequenceClassification` with a single label."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.model.init import InitConfig
from minnow.model.transformer import CausalLM, Linear

CLASSIFICATION, LANGUAGE_MODEL = "ForSequenceClassification", "ForCausalLM"


class RewardModel(CausalLM):
    """The decoder of a language model with a head [1, D] that reads the last token, instead of the vocabulary's.

    The head starts at zero: before training every conversation is worth the same.
    """

    def __init__(self, config: ModelConfig, init: InitConfig | None = None, seed: int = 0) -> None:
        super().__init__(dataclasses.replace(config, tie_word_embeddings=True), init, seed)  # tied: no second head
        self.score = Linear(config.hidden_size, 1, bias=False)
        with torch.no_grad():
            self.score.weight.zero_()

    @classmethod
    def from_language_model(cls, model: CausalLM) -> RewardModel:
        """Put a fresh head on the decoder of `model`, which is taken over with its adapters, not copied."""
        with torch.device("meta"):
            reward_model = cls(model.config)
        reward_model.model = model.model
        reward_model.score.weight = torch.nn.Parameter(torch.zeros(1, model.config.hidden_size))
        reward_model.compute_dtype = model.compute_dtype
        reward_model.adapter = model.adapter
        return reward_model

    def rewards(self, hidden_ND: Tensor) -> Tensor:
        """Rewards from the hidden states of last tokens: [N, D] -> float32 [N]."""
        return F.linear(hidden_ND, self.score.weight.to(hidden_ND.dtype)).squeeze(1).float()


def is_classification(content: dict[str, Any]) -> bool:
    """Whether a config.json is of a sequence-classification model."""
    return (content.get("architectures") or [""])[0].endswith(CLASSIFICATION)


def classification_config(content: dict[str, Any]) -> dict[str, Any]:
    """Turn the config.json of a language model into that of the reward model with its decoder.

    UserError for a class that transformers has no sequence classification of.
    """
    (name,) = content["architectures"]
    if name == "Glm4MoeForCausalLM":
        raise UserError(
            "transformers has no sequence-classification class for Glm4Moe: train a reward model of another"
        )
    return content | {
        "architectures": [name.replace(LANGUAGE_MODEL, CLASSIFICATION)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
    }
