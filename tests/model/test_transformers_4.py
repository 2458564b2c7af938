"""What we save reads the same in transformers 4, whose configuration has other keys. It is fetched for the test."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import row_logits, tiny_model

from minnow.model.config import RopeScaling
from minnow.model.context import extend_context
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import save_pretrained

PACKAGES = ("transformers==4.57.1", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
SHAPES = {
    "qwen3": {},
    "qwen3 with biases": {"attention_bias": True, "attention_output_bias": True},
    "qwen2": {"qk_norm": False, "attention_bias": True, "head_dim": 12},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "llama with biases": {
        "qk_norm": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True,
    },
    "qwen3 moe": {"experts": ExpertsConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1,
    )},
    "glm4 moe": {"experts": ExpertsConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, scoring="sigmoid", n_shared_experts=1,
    )},
}  # fmt: skip
READ = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
logits = {}
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        logits[folder] = model(torch.load(folder + "/tokens.pt")).logits.tolist()
print(json.dumps(logits))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("transformers 4 could not be fetched")
    return folder


@pytest.mark.slow
def test_every_class_and_scaling(transformers_4, tmp_path):
    expected = {}
    for name, shape in SHAPES.items():
        for kind in ("none", "yarn", "linear", "ntk", "llama3"):
            model = tiny_model(1, max_position_embeddings=16, **shape)
            if kind == "llama3":
                scaling = RopeScaling(type="llama3", factor=4.0, original_max_position_embeddings=16)
                model.config = dataclasses.replace(model.config, rope_scaling=scaling, max_position_embeddings=64)
            elif kind != "none":
                model.config = extend_context(model.config, kind, 4)
            folder = tmp_path / f"{name} {kind}"
            save_pretrained(model, folder)
            tokens = torch.arange(model.config.max_position_embeddings)[None] * 7 % 97
            torch.save(tokens, folder / "tokens.pt")
            with torch.no_grad():
                expected[str(folder)] = row_logits(model, tokens)
    environment = os.environ | {"PYTHONPATH": str(transformers_4)}
    done = subprocess.run([sys.executable, "-c", READ, *expected], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for folder, logits in expected.items():
        torch.testing.assert_close(logits, torch.tensor(theirs[folder]), atol=1e-4, rtol=1e-4, msg=folder)
    assert "Unrecognized" not in done.stderr
