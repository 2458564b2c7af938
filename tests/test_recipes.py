"""Every recipe parses, has the shape it names, and trains at a tiny setting."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from minnow.config import parse_config
from minnow.model.presets import preset

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SIZES = ("5m", "26m", "64m", "104m", "1.7b")


def load(recipe: Path, *words: str) -> Any:
    stage = importlib.import_module(f"minnow.stages.{recipe.stem.partition('-')[0]}")
    return parse_config(stage.Config, ["--config", str(recipe), *words], program=recipe.name)


def needed(recipe: Path) -> list[str]:
    """What a recipe leaves to its user."""
    return [] if recipe.stem == "quickstart" else ["--data.paths", "data.jsonl"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_parses(recipe: Path) -> None:
    load(recipe, *needed(recipe))


def test_every_size_has_both_recipes() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert {f"{stage}-{size}" for stage in ("pretrain", "sft") for size in SIZES} <= names


@pytest.mark.parametrize("size", SIZES)
def test_the_shape_is_the_preset(size: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == f"pretrain-{size}")
    model = load(recipe, *needed(recipe)).model
    # the trained length belongs to the run, not to the shape
    length = preset(size).max_position_embeddings
    assert dataclasses.replace(model, max_position_embeddings=length) == preset(size)


@pytest.mark.parametrize("size", SIZES)
def test_sft_starts_from_what_pretraining_leaves(size: str) -> None:
    folder = RECIPES[0].parent
    pretrain, sft = folder / f"pretrain-{size}.yaml", folder / f"sft-{size}.yaml"
    assert load(sft, *needed(sft)).init_from == load(pretrain, *needed(pretrain)).run
