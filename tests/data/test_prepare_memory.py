"""Memory of prepare stays flat: hundreds of MB in, and what it needs does not grow with them."""

import json
import os
import subprocess
import sys
import textwrap

import large_corpus
import pytest

MEGABYTES = 300
PROGRAM = textwrap.dedent("""
    import resource, sys
    from minnow.data.prepare import DataConfig, prepare
    from minnow.tokenizer.tokenizer import Tokenizer
    tokenizer = Tokenizer.from_pretrained(sys.argv[1])
    def peak(who):
        return resource.getrusage(who).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)  # MiB
    before = peak(resource.RUSAGE_SELF)
    config = DataConfig(paths=(sys.argv[2],), cache_dir=sys.argv[3], workers=2)
    prepare(config, tokenizer, "pretrain", sequence_length=1024, progress=False)
    # the processes: ours, and twice the larger worker, whose own interpreter counts as memory here
    print(before, peak(resource.RUSAGE_SELF), 2 * peak(resource.RUSAGE_CHILDREN))
""")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": "The otter lives in the river and eats fish. 苍鹭是灰色的。" * 60}, ensure_ascii=False)
    with open(path, "w") as file:
        for i in range(MEGABYTES * 1_000_000 // len(line.encode())):
            file.write(line.replace("otter", f"otter {i}", 1) + "\n")
    # by way of a shell: a direct child starts with the peak of this process, and its own would not show
    command = [
        "sh",
        "-c",
        '"$0" "$@"; exit $?',
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "tokenizer"),
        str(path),
        str(tmp_path / "cache"),
    ]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, ours, workers = (float(value) for value in out.split())
    print(f"before {before:.0f}, ours {ours:.0f}, workers {workers:.0f} MiB")
    assert ours - before + workers < 700


READ = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    import large_corpus
    from minnow.data import lots
    lots.LOT_BYTES = lots.SHARD_BYTES = 1 << 20
    large_corpus.SKIP = 4
    os.cpu_count = lambda: 1
    print(large_corpus.read(Path(sys.argv[1]))["main"])
""")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_of_reading_does_not_grow_with_the_data(tmp_path, tokenizer, monkeypatch):
    """Both sizes have more windows (here of 16 MB of text) than are open at a time. Short documents: an index or a
    packing of all of them at once, or pages that stay mapped, would each cost more than is allowed."""
    monkeypatch.setattr(large_corpus, "MEDIAN_BYTES", 100)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = []
    for megabytes in (40, 160):
        large_corpus.write_corpus(tmp_path / "corpus", megabytes * 1_000_000)
        # by way of a shell: see above
        command = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", READ, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        found.append(float(out.split()[-1]))
    print("peak MiB", found)
    assert found[1] - found[0] < 60
