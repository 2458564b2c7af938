"""A real llama.cpp beside minnow: ids, logits, greedy continuations, the pond's questions.

`make llama-cpp` builds it; MINNOW_POND_MODEL names the folder of a `minnow quickstart` for the last of them.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import llama_cpp_model
import numpy as np
import pytest
import tokenizers
from export_models import (
    ARCHITECTURES,
    CORPUS,
    MIXED,
    mean_divergence,
    noise_pictures,
    reference_greedy,
    reference_logits,
    seeing_model,
    seen_greedy,
    small_tokenizer,
    tiny_model,
)
from llama_cpp_model import LlamaCpp
from test_gguf import BYTES, GPT2, split
from tokenizers import decoders, models, pre_tokenizers, trainers

from minnow.evaluation.pond import PondTask, find_world
from minnow.evaluation.registry import TaskOptions
from minnow.export.gguf_file import write_gguf
from minnow.export.gguf_tokenizer import LLAMA3_PATTERN
from minnow.tokenizer import Tokenizer, render
from minnow.tokenizer.special import SPECIAL_TOKENS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not llama_cpp_model.PROBE.exists(), reason="no llama.cpp built: make llama-cpp"),
]

IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60, 61, 62, 63, 5, 5, 8, 200, 201, 202]


def random_texts(count: int) -> list[str]:
    """Letters, digits, spaces, line ends and Chinese often, and all of Unicode."""
    pools = [
        list("abcXYZ 'sStremdvlLD\n\r\t  .,!?()[]{}0123456789"),
        list("鱼在池塘里游，。！你好吗"),
        list("👩‍🎉🇫🇷\u200d\ufe0f😀"),
        [chr(c) for c in range(0x20, 0x3000)],
        [chr(c) for c in range(0x3000, 0x110000) if not 0xD800 <= c < 0xE000],
    ]
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        pool = rng.choice(pools)
        mix = (rng.choice(rng.choice(pools) if rng.random() < 0.3 else pool) for _ in range(rng.randint(1, 30)))
        texts.append("".join(mix))
    return texts


def foreign(*parts: object, ignore_merges: bool = False) -> Tokenizer:
    """A tokenizer with another split before the merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, "123 4567 89 12345 it's 'LL\n\n"], trainer)
    return Tokenizer(tokenizer)


TOKENIZERS = {
    "qwen2": small_tokenizer,
    "gpt-2": lambda: foreign(GPT2),
    "smollm": lambda: foreign(pre_tokenizers.Digits(individual_digits=True), GPT2),
    "llama-bpe": lambda: foreign(split(LLAMA3_PATTERN), BYTES, ignore_merges=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    folder = tiny_model(tmp_path, tokenizer=tokenizer)
    write_gguf(folder, tmp_path / "x.gguf", "f32")
    texts = [MIXED, *CORPUS[:3], *random_texts(3000)]
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        different = [text for text in texts if llama.tokenize(text) != tokenizer.encode(text)]
    assert not different, (len(different), different[:5])


def test_control_tokens(tmp_path: Path) -> None:
    """A rendered conversation gives the ids that minnow builds; text that spells a hidden control token stays text."""
    tokenizer = small_tokenizer()
    write_gguf(tiny_model(tmp_path), tmp_path / "x.gguf", "f32")
    chat = "<|im_start|>user\nWho lives here? 鱼<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        ids = llama.tokenize(chat, special=True)
        assert tokenizer.decode(ids) == chat
        assert [i for i in ids if i < 12] == [tokenizer.special_ids[t] for t in CHAT_IN_ORDER]
        assert llama.tokenize("<|im_end|>") == tokenizer.encode("<|im_end|>")


CHAT_IN_ORDER = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_greedy(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, **ARCHITECTURES[name])
    write_gguf(folder, tmp_path / "x.gguf", "f32")
    with LlamaCpp(tmp_path / "x.gguf", cache="f32", context=64) as llama:
        np.testing.assert_allclose(llama.logits(IDS), reference_logits(folder, IDS), atol=1e-3)
        found = llama.greedy(IDS, 24)
    expected = reference_greedy(folder, IDS, 24)
    assert found == expected[: len(found)]
    assert len(found) == 24 or found[-1] in (0, 2)  # it stops at an end token


def test_f16(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    write_gguf(folder, tmp_path / "x.gguf", "f16")
    with LlamaCpp(tmp_path / "x.gguf", cache="f16", context=64) as llama:
        assert mean_divergence(reference_logits(folder, IDS), llama.logits(IDS)) < 1e-3


@pytest.mark.skipif("MINNOW_POND_MODEL" not in os.environ, reason="MINNOW_POND_MODEL: a run of minnow quickstart")
@pytest.mark.timeout(3600)
def test_the_pond(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bar: q8_0 answers within 2 points of the unquantised file; q4_0 is told, not judged."""
    folder = Path(os.environ["MINNOW_POND_MODEL"]) / "model"
    tokenizer = Tokenizer.from_pretrained(folder)
    task = PondTask(find_world(TaskOptions(model_folder=folder)))
    rows = random.Random(0).sample([row for row in task.rows() if row.wording == "trained"], 400)
    prompts = [render(tokenizer, task.prompt(row), add_generation_prompt=True).ids.tolist() for row in rows]
    right = {}
    for kind in ("bf16", "q8_0", "q4_0"):
        write_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        with LlamaCpp(tmp_path / f"{kind}.gguf", cache="f16") as llama:
            answers = [tokenizer.decode(llama.greedy(ids, 32), skip_special_tokens=True) for ids in prompts]
        scores = [task.score(row, answer).value for row, answer in zip(rows, answers, strict=True)]
        right[kind] = sum(scores) / len(scores)
    with capsys.disabled():
        print(f"\nthe pond in llama.cpp, {len(rows)} held-out questions: {right}")
    assert right["q8_0"] >= right["bf16"] - 0.02


def test_pictures(tmp_path: Path) -> None:
    """llama.cpp's server with the two files of a model that looks at pictures: its own template, tower and projector.

    The pictures have the tower's size: others it pads where we stretch.
    """
    folder = seeing_model(tmp_path, tie_word_embeddings=False)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert written.mmproj is not None
    answers = set()
    with llama_cpp_model.llama_server(written.path, written.mmproj) as address:
        for picture in noise_pictures(tmp_path, 3):
            expected, _ = seen_greedy(folder, picture, "What is this?", 8)
            assert llama_cpp_model.llama_sees(address, picture, "What is this?", 8) == expected
            answers.add(tuple(expected))
    assert len(answers) > 1  # what is shown matters
