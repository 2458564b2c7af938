"""`minnow pretrain`: a model from random weights (or from another model) on plain text."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from minnow.config import UserError
from minnow.console import plain_console
from minnow.model.config import ModelConfig
from minnow.model.context import ContextConfig
from minnow.model.transformer import CausalLM
from minnow.model.upcycle import upcycle
from minnow.stages.language_model import LanguageModelConfig, run_language_model
from minnow.stages.rows import with_row_length
from minnow.tokenizer import Tokenizer
from minnow.training.distribution import is_first
from minnow.training.session import load_start


@dataclass(frozen=True, kw_only=True)
class Config(LanguageModelConfig, ContextConfig):
    """Train a language model on plain text. With init_from and rope_scaling: teach a model longer texts."""

    run: str = "runs/pretrain"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    tokenizer: str | None = None
    """Tokenizer folder, model folder or Hub id; with init_from, the model's own by default."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of a new model; vocab_size comes from the tokenizer, max_position_embeddings from sequence_length."""
    init_from: str | None = None
    """Continue pretraining this model (model folder, run folder or Hub id) instead of starting from random weights.
    With model.experts: turn the dense model into a mixture of experts first."""


ConfigT = TypeVar("ConfigT", bound=Config)


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    config, model, tokenizer = start(config)
    run_language_model(config, tokenizer, model, "pretrain", plain_console(stderr=True))


def start(config: ConfigT, longest: int | None = None) -> tuple[ConfigT, CausalLM, Tokenizer]:
    """The model to train, continued or new, and its tokenizer; the config comes back with the model's shape.

    longest: tokens that a teacher reads, if there is one; rows whose length was not given are no longer.
    """
    if config.model.experts is not None and not config.model.experts.router_learns:
        raise UserError(
            "--model.experts.norm_topk_prob with one expert a token makes its weight 1 always: the router would "
            "learn nothing from the text; leave the setting out"
        )
    if config.init_from is not None:
        if config.lora.rank and config.rope_scaling is not None:
            raise UserError("--rope-scaling changes the model, and an adapter is saved without it: train it whole")
        if config.lora.rank and config.model.experts is not None:
            raise UserError("--lora.rank and --model.experts exclude each other: new experts must be trained whole")
        model, tokenizer = load_start(config.init_from, config.lora, seed=config.training.seed)
        if (
            config.tokenizer
            and Tokenizer.from_pretrained(config.tokenizer).text_fingerprint != tokenizer.text_fingerprint
        ):
            raise UserError(
                f"--tokenizer {config.tokenizer} is not the one of {config.init_from}: its numbers stand for other "
                "texts than the model has learnt; leave it out"
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{config.init_from}: its tokenizer has {tokenizer.vocab_size} tokens, its model only "
                f"{model.config.vocab_size}"
            )
        if config.model.experts is not None:
            model = upcycle(model, config.model.experts, config.training.seed)
        config = with_row_length(config, longest, config.reach(model.config))
        model.config = config.extend_for(model.config, config.row_length)
        config = dataclasses.replace(config, model=model.config)
    else:
        if config.rope_scaling is not None:
            raise UserError(
                "--rope-scaling stretches the context of a trained model: name it with --init-from "
                "(a new one learns its sequence_length anyway)"
            )
        if config.lora.rank:
            raise UserError("--lora.rank needs a trained model to stand beside: give --init_from")
        if config.tokenizer is None:
            raise UserError("--tokenizer is missing: give a tokenizer folder (make one: minnow tokenizer train)")
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        tokenizer.image_format = None  # it may be a model's that looks at pictures; the new one only reads
        config = with_row_length(config, longest)
        shape = dataclasses.replace(
            config.model, vocab_size=tokenizer.vocab_size, max_position_embeddings=config.row_length
        )
        config = dataclasses.replace(config, model=shape)
        # `parallelise` gives the others the first one's weights: they need no memory for any of their own.
        with nullcontext() if is_first() else torch.device("meta"):
            model = CausalLM(shape, seed=config.training.seed)
    return config, model, tokenizer
