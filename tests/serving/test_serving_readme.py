"""README's round trip with the `openai` client, run as it stands, in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..stages.stage_helpers import save_parrot_model
from .serving_helpers import serving

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/serving.md"])
def test_the_client_shown(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_parrot_model(tmp_path / "runs/quickstart/model", "小鱼 swims§<|im_end|>§")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "openai" in block)
    address = "http://127.0.0.1:8000"
    assert address in block
    assert block.count('model="quickstart"') == 1
    with serving({"quickstart": folder}) as running:
        # greedily: now and then a sampled parrot says something else
        exec(block.replace(address, running.url).replace('model="quickstart"', 'model="quickstart", temperature=0'), {})
    assert "小鱼" in capsys.readouterr().out
