"""What rounding a model's weights costs, told without any text at hand."""

from __future__ import annotations

import math
from pathlib import Path

from minnow.engine import Engine, SamplingParams
from minnow.evaluation.bits_per_byte import document_nats
from minnow.model.pretrained import load_pretrained
from minnow.model.quantize import saving

SAMPLES, SAMPLE_TOKENS = 16, 64


def quantization_note(folder: str | Path, quantized: Engine) -> str:
    """For a person: what the model in `folder`, loaded as int8 into `quantized`, saves and costs. Loads it once more.

    The cost is the bits per byte that `quantized` needs more than the original for text which the original writes at
    temperature 1: an estimate of KL(original || quantized), from about a thousand tokens.
    """
    model, tokenizer = quantized.model, quantized.tokenizer
    original = load_pretrained(folder, dtype=model.compute_dtype, device=model.head_weight.device)
    (written,) = Engine(original, tokenizer).generate(
        [[tokenizer.start_id]], SamplingParams(n=SAMPLES, max_tokens=SAMPLE_TOKENS, temperature=1.0, seed=0)
    )
    stops = {tokenizer.end_of_text_id, tokenizer.eos_id}
    texts = [[token for token in sample.ids if token not in stops] for sample in written.completions]
    size = sum(len(tokenizer.decode(text).encode()) for text in texts)
    if not size:
        return f"{saving(model)}; what it costs is unknown, the model writes no text by itself"
    before, after = (
        sum(document_nats(judge, texts, tokenizer.start_id, original.config.max_position_embeddings))
        for judge in (original, model)
    )
    return f"{saving(model)}; {(after - before) / math.log(2) / size:+.4f} bits per byte on text that it writes itself"
