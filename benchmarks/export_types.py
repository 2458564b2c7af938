"""What fewer bits cost: size, bits per byte and speed of each GGUF and ONNX type, as the table of docs/export.md:

    python benchmarks/export_types.py RUN --pond RUN/pond [--documents 60] [--speed]

Bits per byte of the pond's validation documents, each read from the document's start; GGUF in llama.cpp with its f16
cache, ONNX in onnxruntime. Speed is that of 128 greedy tokens of one sequence on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from llama_cpp_model import LlamaCpp
from onnx_model import OnnxModel

from minnow.export.gguf_file import GGUF_TYPES, write_gguf
from minnow.export.onnx_file import quantise, write_onnx
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.tokenizer import Tokenizer

Logits = Callable[[list[int]], np.ndarray]


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--pond", required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_model_folder(arguments.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    rows = (Path(arguments.pond) / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    texts = texts[:: max(1, len(texts) // arguments.documents)][: arguments.documents]
    documents = [[tokenizer.end_of_text_id, *tokenizer.encode(text)] for text in texts]
    size = sum(len(text.encode()) for text in texts)

    def bits_per_byte(logits: Logits) -> float:
        return sum(_bits(ids, logits(ids)) for ids in documents) / size

    print(f"{len(texts)} documents, {size:,} bytes, {sum(map(len, documents)):,} tokens\n")
    print("| type | MB | bits per byte | tokens/s |\n|---|---|---|---|", flush=True)
    reference = bits_per_byte(_minnow(folder))
    print(f"| minnow, fp32 | {_mb(folder / 'model.safetensors')} | {reference:.4f} | |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in GGUF_TYPES:
            path = Path(temporary) / f"{kind}.gguf"
            write_gguf(folder, path, kind)
            with LlamaCpp(path, cache="f16", context=512) as llama:
                bits = bits_per_byte(llama.logits)
                speed = _speed(lambda: len(llama.greedy(documents[0][:16], 128))) if arguments.speed else ""
            print(f"| GGUF {kind} | {_mb(path)} | {bits:.4f} ({bits / reference - 1:+.2%}) | {speed} |", flush=True)
        write_onnx(folder, Path(temporary) / "f32.onnx")
        quantise(Path(temporary) / "f32.onnx", Path(temporary) / "int8.onnx")
        for kind in ("f32", "int8"):
            path = Path(temporary) / f"{kind}.onnx"
            model = OnnxModel(path)
            bits = bits_per_byte(model.logits)
            speed = _speed(lambda: len(model.greedy(documents[0][:16], 128))) if arguments.speed else ""  # noqa: B023
            print(f"| ONNX {kind} | {_mb(path)} | {bits:.4f} ({bits / reference - 1:+.2%}) | {speed} |", flush=True)


def _minnow(folder: Path) -> Logits:
    model = load_pretrained(folder, dtype=torch.float32)

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
            return model.logits(hidden)[0].numpy()

    return logits


def _bits(ids: list[int], logits_TV: np.ndarray) -> float:
    logits = logits_TV[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[range(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))
    return float(-chosen.sum() / math.log(2))


def _speed(generate: Callable[[], int]) -> str:
    generate()
    start = time.perf_counter()
    count = generate()
    return f"{count / (time.perf_counter() - start):,.0f}"


def _mb(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f}"


if __name__ == "__main__":
    main()
