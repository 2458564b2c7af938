"""B15: the served model had another name than the README's client asked for (404), and the server dropped its flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minnow.config import parse_config
from minnow.stages.serve import Config, name_models

ROOT = Path(__file__).parents[2]


def test_the_readmes_client_asks_for_the_name_that_its_command_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        command = re.search(r"^minnow serve (.*)$", text, re.MULTILINE)
        asked = re.search(r'^    model="(.*)",$', text, re.MULTILINE)
        assert command is not None
        assert asked is not None
        config = parse_config(Config, [*command[1].split(), "--max_samples", "3"], program="minnow serve")
        assert config.max_samples == 3
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / config.models[0] / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
        assert list(name_models(config.models)) == [asked[1]]
