"""What several processes cannot train together is told before data are prepared and a run folder is made."""

import json

import pytest

from minnow.cli import main
from minnow.training import parallel
from tests.rl.helpers import saved, write_prompts


@pytest.mark.parametrize("stage", ["lora", "grpo"])
def test_int8_weights_in_slices(stage, tmp_path, capsys, monkeypatch):
    """The run folder was there already, with the setting that the advice would have changed."""
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    talk = {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}]}
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 8)
    told = {
        "lora": ["--data.paths", str(tmp_path / "talks.jsonl"), "--data.cache_dir", str(tmp_path / "cache")],
        "grpo": ["--prompts", str(write_prompts(tmp_path / "prompts.jsonl"))],
    }[stage]
    words = ["--init_from", str(saved(tmp_path / "start")), "--run", str(tmp_path / "run"), "--sequence_length", "64"]
    words += ["--lora.rank", "2", "--lora.quantize", "int8", "--batch_tokens", "64"][: None if stage == "lora" else 4]
    assert main([stage, *words, *told, "--training.parallel", "fsdp", "--device", "cpu"]) == 2
    assert "--training.parallel fsdp: int8 weights are not sliced; give ddp" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
