"""Does memory stay flat when the data grows? Synthetic corpora of several sizes, prepared and trained on.

    python benchmarks/large_corpus.py --gigabytes 1 3 10 --work /tmp/large_corpus

The text is drawn from a seed: 50,000 made-up words at Zipf's frequencies, documents of log-normal length, 2 kB in the
median. Each size is (1) streamed: a model of 35,000 parameters trains 20 steps on the first rows while the rest is
being prepared; (2) prepared to the end, and trained on for 20 steps of an epoch over all of it; (3) read: every 16th
batch of that epoch, without the model. Writes results.json: seconds, and the peak of resident memory in MiB of the main
process and of the largest of those that tokenise (or of the main one when it started them, if that was more). Ends with
code 1 where the largest corpus needs over a quarter more memory than the one before it. Resident memory counts the
pages of the shards that are mapped, which the system takes back when it needs them. A window is half a gigabyte of text
and two are open, so below 1.1 GB memory still grows with the corpus.

Needs about 1.5 times the largest size on disk. Sizes are done in their order; finished ones are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NUM_WORDS = 50_000
FILE_BYTES = 250_000_000
MEDIAN_BYTES, SPREAD = 2000, 0.9
SEQUENCE_LENGTH, BATCH_TOKENS, STEPS, SKIP = 512, 8192, 20, 16
ALLOWED_GROWTH = 1.25


def words() -> list[str]:
    """Made of syllables; the frequent ones are short, as in any language."""
    rng = np.random.default_rng(0)
    syllables = [
        first + vowel
        for first in ["b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "th", "sh"]
        for vowel in "aeiou"
    ]
    count = np.minimum(1 + np.log10(np.arange(1, NUM_WORDS + 1)).astype(int), 5)
    return ["".join(syllables[i] for i in rng.integers(0, len(syllables), n)) for n in count]


def documents(seed: int, num_bytes: int) -> Iterator[str]:
    """Documents of about `num_bytes` in all."""
    rng = np.random.default_rng([1, seed])
    vocabulary = words()
    shares = 1 / np.arange(1, NUM_WORDS + 1)
    cumulative = np.cumsum(shares) / shares.sum()
    while num_bytes > 0:
        drawn = np.searchsorted(cumulative, rng.random(1 << 18)).tolist()
        place = 0
        while place < len(drawn) and num_bytes > 0:
            end = place + 1 + int(rng.lognormal(np.log(MEDIAN_BYTES / 7), SPREAD))
            text = " ".join([vocabulary[i] for i in drawn[place:end]])
            num_bytes -= len(text) + 13  # with {"text": ""} and a line end
            place = end
            yield text


def write_corpus(folder: Path, num_bytes: int) -> None:
    """Files of FILE_BYTES each, the last one shorter; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-num_bytes // FILE_BYTES)):
        size = min(FILE_BYTES, num_bytes - number * FILE_BYTES)
        path = folder / f"{number:05d}.jsonl"
        if not path.exists() or path.stat().st_size < size:
            with open(path.with_suffix(".tmp"), "w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in documents(number, size))
            path.with_suffix(".tmp").replace(path)


def peak(who: int) -> float:
    """MiB resident at most."""
    return resource.getrusage(who).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def peaks() -> dict[str, float]:
    return {"main": peak(resource.RUSAGE_SELF), "worker": peak(resource.RUSAGE_CHILDREN)}


def pretrain_config(work: Path, run: str, *, stream: bool):
    from minnow.data.prepare import DataConfig
    from minnow.model.config import ModelConfig
    from minnow.stages import pretrain
    from minnow.training.config import TrainingConfig

    return pretrain.Config(
        run=str(work / run),
        overwrite=True,
        tokenizer=str(work / "tokenizer"),
        data=DataConfig(paths=(str(work / "corpus"),), cache_dir=str(work / "cache" / run), workers=os.cpu_count()),
        stream=stream,
        sequence_length=SEQUENCE_LENGTH,
        model=ModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        ),
        training=TrainingConfig(steps=STEPS, batch_tokens=BATCH_TOKENS, device="cpu", validation_tokens=BATCH_TOKENS),
    )


def streamed(work: Path) -> dict:
    """Train on the first rows while the rest is prepared."""
    from minnow.stages import pretrain

    begin = time.time()
    pretrain.run(pretrain_config(work, "streamed", stream=True))
    return {"seconds": time.time() - begin, **peaks()}


def whole(work: Path) -> dict:
    """Prepare all of it, then train on it."""
    from minnow.data.prepare import prepare
    from minnow.stages import pretrain
    from minnow.tokenizer import Tokenizer

    begin = time.time()
    config = pretrain_config(work, "whole", stream=False)
    data = prepare(
        config.data, Tokenizer.from_pretrained(work / "tokenizer"), "pretrain", sequence_length=SEQUENCE_LENGTH
    )
    seconds, prepared = time.time() - begin, peaks()
    pretrain.run(config)
    return {
        "documents": data.train.num_documents,
        "tokens": data.train.num_tokens,
        "shards": data.train.num_shards,
        "prepare": {"seconds": seconds, **prepared},
        "train": {"seconds": time.time() - begin - seconds, **peaks()},
    }


def read(work: Path) -> dict:
    """Every SKIP-th batch of an epoch."""
    from minnow.data.order import windowed_batch_rows
    from minnow.data.prepare import prepare
    from minnow.tokenizer import Tokenizer

    begin = time.time()
    config = pretrain_config(work, "whole", stream=False)
    tokenizer = Tokenizer.from_pretrained(work / "tokenizer")
    data = prepare(config.data, tokenizer, "pretrain", sequence_length=SEQUENCE_LENGTH)
    train, _ = data.packed(SEQUENCE_LENGTH)
    rows = BATCH_TOKENS // SEQUENCE_LENGTH
    batches = train.num_rows // rows
    for step in range(0, batches, SKIP):
        train.batch(windowed_batch_rows(0, step, rows, lambda: train.window_rows))
    return {"batches": batches, "fill": train.fill, "seconds": time.time() - begin, **peaks()}


PHASES = {"streamed": streamed, "whole": whole, "read": read}


def make_tokenizer(work: Path) -> None:
    from minnow.tokenizer import train_tokenizer

    train_tokenizer(documents(0, 2_000_000), 2048).save_pretrained(work / "tokenizer")


def measure(work: Path, gigabytes: float) -> dict:
    """All phases on one size, each in a process of its own, whose peak is not another's."""
    write_corpus(work / "corpus", int(gigabytes * 1e9))
    found = {"gigabytes": gigabytes}
    for phase in PHASES:
        command = [sys.executable, __file__, "--work", str(work), "--phase", phase]
        subprocess.run(command, check=True)
        found[phase] = json.loads((work / f"{phase}.json").read_text())
        if phase != "whole":  # which is read afterwards
            shutil.rmtree(work / "cache")
    return found


def largest(result: dict) -> float:
    """MiB of the main process, the largest of all phases."""
    return max(result["streamed"]["main"], result["whole"]["train"]["main"], result["read"]["main"])


def table(results: list[dict]) -> Iterator[str]:
    yield "GB     documents  shards   prepare: s   main  worker   streamed: s   main   train: main   read: main  (MiB)"
    for result in results:
        prepared, train = result["whole"]["prepare"], result["whole"]["train"]
        yield (
            f"{result['gigabytes']:<5g} {result['whole']['documents']:>10,} {result['whole']['shards']:>7}"
            f"   {prepared['seconds']:>10.0f} {prepared['main']:>6.0f} {prepared['worker']:>7.0f}"
            f"   {result['streamed']['seconds']:>11.0f} {result['streamed']['main']:>6.0f}"
            f"   {train['main']:>11.0f}   {result['read']['main']:>10.0f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 3, 10], help="sizes of text, in 10^9 bytes")
    parser.add_argument("--work", type=Path, default=Path("large_corpus"), help="folder for everything")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.work
    if options.phase:
        (work / f"{options.phase}.json").write_text(json.dumps(PHASES[options.phase](work)))
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer" / "tokenizer.json").exists():
        make_tokenizer(work)
    results_file = work / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else []
    done = [result["gigabytes"] for result in results]
    missing = sorted(set(options.gigabytes) - set(done))
    if missing and done and missing[0] < max(done):
        parser.error(f"{work} holds a corpus of {max(done):g} GB: give another --work for {missing[0]:g} GB")
    for gigabytes in missing:
        results.append(measure(work, gigabytes))
        results_file.write_text(json.dumps(results, indent=1))
    print(*table(results), sep="\n")
    flat = len(results) < 2 or largest(results[-1]) <= ALLOWED_GROWTH * largest(results[-2])
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
