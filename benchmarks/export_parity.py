"""How far exported models are from minnow, architecture by target, as the table of docs/export.md:

    python benchmarks/export_parity.py [--targets transformers,llama.cpp,onnx,vllm] [--only NAME,...]

Random weights, 20 tokens; the largest difference of a logit (vLLM: of a chosen token's log-probability) in fp32 with an
fp32 cache. "=" after it: 24 greedy tokens are the same, each target with its own cache.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from export_models import ARCHITECTURES, reference_greedy, reference_logits, tiny_model

from minnow.export.gguf_file import write_gguf
from minnow.export.onnx_file import write_onnx

IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60, 61, 62, 63, 5, 5, 8, 200, 201, 202]
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
ENDS = (0, 2)


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="transformers,llama.cpp,onnx")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    names = arguments.only.split(",") if arguments.only else list(ARCHITECTURES)
    torch.set_num_threads(1)
    print(f"| architecture | {' | '.join(targets)} |\n|{'---|' * (len(targets) + 1)}", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = tiny_model(Path(temporary), **SHAPE, **ARCHITECTURES[name])
            expected, greedy = reference_logits(folder, IDS), reference_greedy(folder, IDS, 24)
            cells = [TARGETS[target](folder, expected, greedy) for target in targets]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _cell(difference: float, greedy: list[int], expected: list[int]) -> str:
    same = greedy == expected[: len(greedy)] and (len(greedy) == len(expected) or greedy[-1] in ENDS)
    return f"{difference:.1e} {'=' if same else 'differs'}"


def in_transformers(folder: Path, expected: np.ndarray, greedy: list[int]) -> str:
    """The folder as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([IDS])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        # The mask is said: a first token that is also the filler would be taken for filler.
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        found = found[0, len(IDS) :].tolist()
    return _cell(abs(logits - expected).max(), found, greedy)


def in_llama_cpp(folder: Path, expected: np.ndarray, greedy: list[int]) -> str:
    """An f32 GGUF file."""
    from llama_cpp_model import LlamaCpp

    path = folder.parent / "x.gguf"
    write_gguf(folder, path, "f32")
    with LlamaCpp(path, cache="f32", context=64) as llama:
        return _cell(abs(llama.logits(IDS) - expected).max(), llama.greedy(IDS, 24), greedy)


def in_onnx(folder: Path, expected: np.ndarray, greedy: list[int]) -> str:
    """An fp32 graph in onnxruntime."""
    from onnx_model import OnnxModel

    path = folder.parent / "x.onnx"
    write_onnx(folder, path)
    model = OnnxModel(path)
    return _cell(abs(model.logits(IDS) - expected).max(), model.greedy(IDS, 24), greedy)


def in_vllm(folder: Path, expected: np.ndarray, greedy: list[int]) -> str:
    """The folder as it is, in vLLM's CPU build."""
    from vllm_model import vllm_greedy

    ((ids, logprobs),) = vllm_greedy(folder, [IDS], 24)
    logits = reference_logits(folder, [*IDS, *ids])[len(IDS) - 1 : -1].astype(np.float64)
    chosen = logits[range(len(ids)), ids] - np.log(np.exp(logits).sum(-1))
    return _cell(abs(chosen - logprobs).max(), ids, greedy)


TARGETS: dict[str, Callable[[Path, np.ndarray, list[int]], str]] = {
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
    "onnx": in_onnx,
    "vllm": in_vllm,
}

if __name__ == "__main__":
    main()
