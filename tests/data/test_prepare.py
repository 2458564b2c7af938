"""prepare: the right documents on the right sides, resumed, cached, and nothing half-written."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
import time
import types
import weakref

import numpy as np
import pytest

from minnow.config import UserError
from minnow.data import lots
from minnow.data.batches import PackedDataset
from minnow.data.encoding import EncodeOptions, RawBatch
from minnow.data.preparation import Preparation
from minnow.data.prepare import DataConfig, prepare
from minnow.data.shards import Shards
from minnow.tokenizer.chat import render


def documents(n, start=0):
    names = ["otter", "heron", "水獭", "苍鹭", "newt"]
    return [f"The {names[i % 5]} number {i} lives in the river. 它吃鱼。" for i in range(start, start + n)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def write_texts(path, texts):
    return write_rows(path, [{"text": text} for text in texts])


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]}


def texts_of(shards: Shards, tokenizer):
    return [tokenizer.decode(shards.tokens(i)[1:-1]) for i in range(shards.num_documents)]


@pytest.fixture
def run(tmp_path, tokenizer):
    def run(*paths, kind="pretrain", sequence_length=64, **options):
        options = {"cache_dir": str(tmp_path / "cache"), "workers": 0, "validation_fraction": 0.1, **options}
        config = DataConfig(paths=tuple(paths), **options)
        return prepare(config, tokenizer, kind, sequence_length=sequence_length, progress=False)

    return run


def test_a_document_is_end_of_text_text_end_of_text(run, tmp_path, tokenizer):
    texts = documents(50)
    data = run(write_texts(tmp_path / "a.jsonl", texts))
    assert sorted(texts_of(data.train, tokenizer) + texts_of(data.validation, tokenizer)) == sorted(texts)
    for shards in (data.train, data.validation):
        for i in range(shards.num_documents):
            tokens = shards.tokens(i)
            assert tokens.dtype == np.uint16
            assert tokens[0] == tokens[-1] == tokenizer.end_of_text_id
            text = tokenizer.decode(tokens[1:-1])
            assert tokens[1:-1].tolist() == tokenizer.encode(text)
            assert shards.text_bytes[i] == len(text.encode()) == tokenizer.token_bytes()[tokens].sum()
    assert data.report.rows == data.report.documents == 50
    assert data.report.warnings() == []
    assert not [path.name for path in data.folder.parent.iterdir() if path.suffix in (".partial", ".lock")]
    assert not list(data.folder.rglob(".*"))
    data.train.verify()


def test_the_split_is_stable_under_reordering_and_growth(run, tmp_path, tokenizer):
    texts = documents(300)
    first = run(write_texts(tmp_path / "a.jsonl", texts))
    held_out = set(texts_of(first.validation, tokenizer))
    assert 10 <= len(held_out) <= 60  # 30 expected
    shuffled = texts + documents(100, 300)
    random.Random(0).shuffle(shuffled)
    second = run(write_texts(tmp_path / "b.jsonl", shuffled))
    assert set(texts_of(second.validation, tokenizer)) & set(texts) == held_out


def test_duplicates_fall_on_one_side(run, tmp_path, tokenizer):
    texts = documents(60) * 3
    data = run(write_texts(tmp_path / "a.jsonl", texts), validation_fraction=0.5)
    train, validation = texts_of(data.train, tokenizer), texts_of(data.validation, tokenizer)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 180


@pytest.mark.parametrize("fraction", [0.0001, 0.5])
def test_neither_side_is_empty_where_two_documents_differ(run, tmp_path, fraction):
    # Of the pairs some lie below the half together, and some above.
    for n, start in [*((n, 10 * n) for n in range(2, 8)), *((2, start) for start in range(100, 124, 2))]:
        data = run(write_texts(tmp_path / f"{start}.jsonl", documents(n, start)), validation_fraction=fraction)
        assert data.train.num_documents
        assert data.validation.num_documents
    data = run(write_texts(tmp_path / "one.jsonl", documents(1)), validation_fraction=fraction)
    assert (data.train.num_documents, data.validation.num_documents) == (1, 0)
    assert PackedDataset(data.validation, 8, split_documents=True).num_rows == 0
    data = run(write_texts(tmp_path / "one.jsonl", documents(5)), validation_fraction=0.0)
    assert (data.train.num_documents, data.validation.num_documents) == (5, 0)


def test_validation_paths_are_the_whole_validation(run, tmp_path, tokenizer, monkeypatch):
    made = []
    tokenise = Preparation._tokenise
    monkeypatch.setattr(Preparation, "_tokenise", lambda self, *rest: (made.append(1), tokenise(self, *rest))[1])
    train = write_texts(tmp_path / "a.jsonl", documents(40))
    held_out = write_texts(tmp_path / "b.jsonl", documents(5, 40))
    data = run(train, validation_paths=(held_out,), validation_fraction=1e-6)
    assert texts_of(data.train, tokenizer) == documents(40)
    assert texts_of(data.validation, tokenizer) == documents(5, 40)
    assert len(made) == 1, "no hash decides, so none is looked for that would leave neither side empty"


def test_validation_paths_without_a_document_are_refused(run, tmp_path):
    """The run went on without any validation and said nothing."""
    train = write_texts(tmp_path / "a.jsonl", documents(40))
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"/b\.jsonl: no document to validate on"):
        run(train, validation_paths=(str(tmp_path / "b.jsonl"),))


def test_weights_are_passes_over_a_source(run, tmp_path, tokenizer):
    a, b = documents(400), documents(400, 400)
    paths = write_texts(tmp_path / "a.jsonl", a) + "@2.5", write_texts(tmp_path / "b.jsonl", b) + "@0.25"
    data = run(*paths, validation_fraction=0.1)
    train = texts_of(data.train, tokenizer)
    counts = {text: train.count(text) for text in train}
    assert {counts[text] for text in a if text in counts} == {2, 3}
    assert {counts[text] for text in b if text in counts} == {1}
    thrice = sum(counts.get(text) == 3 for text in a)
    assert 140 <= thrice <= 230  # half of the 90% that train: 180 +- 10
    assert 60 <= sum(text in counts for text in b) <= 120  # a quarter of them: 90 +- 8
    validation = texts_of(data.validation, tokenizer)
    assert len(validation) == len(set(validation))  # nothing counts twice there
    # A tenth of what is taken of either: which documents a mixture takes says nothing of where they fall.
    assert 25 <= sum(text in validation for text in a) <= 55  # 40 +- 6
    assert 2 <= sum(text in validation for text in b) <= 20  # 10 +- 3
    stored = sum(shard["bytes"] for shard in _files(data.folder / "train") if shard["name"].endswith(".tokens"))
    assert stored < 2 * data.train.num_tokens  # repeats are listed, not stored
    again = run(*reversed(paths), validation_fraction=0.1)
    assert sorted(texts_of(again.train, tokenizer)) == sorted(train)


def _files(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return [{"name": name, **entry} for shard in meta["shards"] for name, entry in shard["files"].items()]


def test_conversations_become_tokens_and_weights(run, tmp_path, tokenizer):
    rows = [chat(f"Where does otter {i} live?", "In the river.") for i in range(30)]
    data = run(write_rows(tmp_path / "a.jsonl", rows), kind="sft")
    assert data.train.num_documents + data.validation.num_documents == 30
    i = 0
    tokens, weights = data.train.tokens(i), data.train.weights(i)
    assert weights.dtype == np.float32
    question = tokenizer.decode(tokens).split("user\n")[1].split("<|im_end|>")[0]
    row = next(row for row in rows if row["messages"][0]["content"] == question)
    from minnow.data.records import parse_conversation

    expected = render(tokenizer, parse_conversation(row))
    assert tokens.tolist() == expected.ids.tolist()
    assert weights.tolist() == expected.weights.tolist()
    assert data.train.text_bytes[i] == len("In the river.")


def test_a_long_conversation_is_cut_and_counted(run, tmp_path, tokenizer):
    turns = [text for i in range(12) for text in (f"Where does otter {i} live?", "In the river, in the river.")]
    rows = [chat(*turns), chat("hi", "hello")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole = run(path, kind="sft", sequence_length=2000, validation_fraction=0.0)
    cut = run(path, kind="sft", sequence_length=100, validation_fraction=0.0)
    assert whole.report.cut_conversations == 0
    assert (cut.report.cut_conversations, cut.report.long_turns) == (1, 0)
    assert cut.report.cut_pieces == cut.train.num_documents - 1 > 1
    assert cut.train.lengths.max() <= 101
    total = [sum(data.train.weights(i).sum() for i in range(data.train.num_documents)) for data in (whole, cut)]
    assert total[0] == total[1]
    assert "cut at turn borders" in cut.report.warnings()[0]
    PackedDataset(cut.train, 100, split_documents=False)
    longest = int(whole.train.lengths.max())  # whose first token is no target: it fits a row of one less
    for length, num_cut in ((longest - 1, 0), (longest - 2, 1)):
        report = run(path, kind="sft", sequence_length=length, validation_fraction=0.0).report
        assert report.cut_conversations == num_cut


def test_a_system_message_longer_than_a_row_is_told(run, tmp_path):
    row = chat("Where does the otter live?", "In the river.")
    row["messages"].insert(0, {"role": "system", "content": "Answer briefly. " * 60})
    data = run(write_rows(tmp_path / "a.jsonl", [row]), kind="sft", sequence_length=60)
    assert (data.report.long_systems, data.report.long_turns) == (1, 1)
    assert "a longer sequence_length would keep it" in data.report.warnings()[-1]
    assert data.train.text_bytes.sum() == len("In the river.")


@pytest.mark.parametrize("batch_bytes", [100, 1 << 20])
def test_bad_rows_stop_before_any_work(run, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(lots, "BATCH_BYTES", batch_bytes)  # many batches, each with few bad rows, or one with all
    rows = [{"text": f"fine {i}"} if i % 2 else {"text": i} for i in range(60)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        run(path)
    lines = str(error.value).split("\n")
    assert lines[:2] == [f"{path}:{n}: `text` must be text, it is a number" for n in (1, 3)]
    assert len(lines) == 21
    assert lines[20].startswith("30 of 60 rows are bad, the first 20 are shown: nothing was done")
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], ["hashes.json"])


def test_bad_rows_are_skipped_and_counted(run, tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": 1}, {"text": "good"}])
    data = run(path, on_bad_row="skip", validation_fraction=0.0)
    assert texts_of(data.train, tokenizer) == ["fine", "good"]
    assert data.report.skipped_rows == 1
    assert data.report.bad_rows == (f"{path}:2: `text` must be text, it is a number",)
    assert data.report.warnings() == ["1 of 3 rows are bad and were left out"]


def test_empty_sets_have_their_own_message(run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="the data set is empty, there is not one row"):
        run(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="none of the 1 rows is usable; the first: .*bad.jsonl:1: `text` is empty"):
        run(write_rows(tmp_path / "bad.jsonl", [{"text": ""}]), on_bad_row="skip")
    with pytest.raises(UserError, match="no data is given"):
        run()


def test_the_cache_follows_content_tokenizer_and_options(run, tmp_path, monkeypatch):
    path = write_texts(tmp_path / "a.jsonl", documents(20))
    first = run(path)
    made = []
    original = Preparation.run
    monkeypatch.setattr(Preparation, "run", lambda self: (made.append(1), original(self))[1])
    assert run(path).folder == first.folder
    os.rename(path, tmp_path / "renamed.jsonl")
    assert run(str(tmp_path / "renamed.jsonl")).folder == first.folder
    assert run(str(tmp_path / "renamed.jsonl"), sequence_length=128).folder == first.folder  # packing is not stored
    assert not made
    assert run(str(tmp_path / "renamed.jsonl"), validation_fraction=0.2).folder != first.folder
    text = (tmp_path / "renamed.jsonl").read_text()
    (tmp_path / "renamed.jsonl").write_text(text.replace("otter number 0", "otter number 9"))  # same size, same second
    changed = run(str(tmp_path / "renamed.jsonl"))
    assert changed.folder != first.folder
    assert len(made) == 2


def test_data_that_change_while_they_are_prepared_are_told(run, tmp_path, tokenizer, monkeypatch):
    """What was read of the new file stood under the old one's key: whoever put that back trained on the other."""
    texts, others = documents(50), documents(50, 100)
    path = write_texts(tmp_path / "a.jsonl", texts)
    work = Preparation._work

    def work_while_it_changes(preparation):
        write_texts(tmp_path / "a.jsonl", others)
        work(preparation)

    with monkeypatch.context() as patched:
        patched.setattr(Preparation, "_work", work_while_it_changes)
        with pytest.raises(UserError, match=r"a\.jsonl: the data changed while they were being prepared"):
            run(path)
    for wanted in (others, texts):
        data = run(write_texts(tmp_path / "a.jsonl", wanted))
        assert sorted(texts_of(data.train, tokenizer) + texts_of(data.validation, tokenizer)) == sorted(wanted)


def test_a_cache_that_may_only_be_read_serves_what_is_in_it(run, tmp_path, monkeypatch):
    """A copy of the data elsewhere is the same data, though nobody may note that here."""
    from minnow.data import fingerprint

    folder = run(write_texts(tmp_path / "a.jsonl", documents(20))).folder
    copy = write_texts(tmp_path / "b.jsonl", documents(20))
    os.utime(copy, (time.time() - 60, time.time() - 60))

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(fingerprint, "atomic_write", refuse)
    assert run(copy).folder == folder


def test_a_file_system_without_locks_is_no_error(run, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert run(write_texts(tmp_path / "a.jsonl", documents(20))).train.num_documents
    assert not list((tmp_path / "cache").rglob("*.lock"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")
def test_a_file_whose_name_is_no_utf8(run, tmp_path):
    """All was tokenised, and then meta.json could not hold the name."""
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    assert run(write_texts(path, documents(20))).train.num_documents
    folder = next((tmp_path / "cache").rglob("meta.json"))
    assert json.loads(folder.read_text(encoding="utf-8"))["sources"][0]["name"] == str(path)


def test_file_hashes_are_remembered(run, tmp_path, monkeypatch):
    from minnow.data import fingerprint

    path = write_texts(tmp_path / "a.jsonl", documents(20))
    os.utime(path, (time.time() - 60, time.time() - 60))
    run(path)
    monkeypatch.setattr(fingerprint, "file_sha256", lambda path: pytest.fail("hashed again"))
    run(path)


def test_a_file_that_changes_within_the_clocks_tick_is_another(run, tmp_path):
    """Of the same size, at the same time: what was hashed that soon after a change is hashed again."""
    soon = (time.time() + 3600,) * 2  # for an hour it is new, however slow this machine
    folders = []
    for start in (0, 5):
        path = write_texts(tmp_path / "a.jsonl", documents(5, start))
        os.utime(path, soon)
        folders.append((os.path.getsize(path), run(path).folder))
    assert folders[0][0] == folders[1][0]
    assert folders[0][1] != folders[1][1]


def small_shards(monkeypatch):
    monkeypatch.setattr(lots, "BATCH_BYTES", 500)
    monkeypatch.setattr(lots, "LOT_BYTES", 1000)


def contents(folder):
    """Every file but the shards' own names for files: path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_run_continues_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    path = write_texts(tmp_path / "a.jsonl", documents(200))
    whole = run(path, cache_dir=str(tmp_path / "other"))
    names = [file["name"] for file in _files(whole.folder / "train")]
    assert len(names) > 10
    checks, closed = [], []
    original = Preparation._close_shard

    def close_or_die(self, *arguments):
        if len(closed) in (2, 5) and len(checks) < 2:
            checks.append(1)
            raise KeyboardInterrupt
        closed.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Preparation, "_close_shard", close_or_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(path)
        assert not list((tmp_path / "cache").glob("*/meta.json"))
    data = run(path)
    assert contents(data.folder) == contents(whole.folder)
    assert len(closed) < 1.5 * len(list((whole.folder / "train").glob("*.tokens")))  # what was whole was kept


def test_worker_processes_give_the_same_bytes(run, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    path = write_texts(tmp_path / "a.jsonl", documents(200))
    alone = run(path)
    shared = run(path, cache_dir=str(tmp_path / "other"), workers=2)
    assert contents(alone.folder) == contents(shared.folder)
    rows = [chat(f"Where does otter {i} live?", "In the river.") for i in range(60)]
    path = write_rows(tmp_path / "b.jsonl", [*rows, {"bad": 1}])
    options = {"kind": "sft", "on_bad_row": "skip"}
    alone, shared = run(path, **options), run(path, cache_dir=str(tmp_path / "other"), workers=2, **options)
    assert contents(alone.folder) == contents(shared.folder)
    with pytest.raises(UserError, match=r"b\.jsonl:61: no `conversations`"):
        run(path, kind="sft", workers=2)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_told_and_the_run_continues(run, tmp_path, monkeypatch):
    from minnow.data.workers import Workers

    small_shards(monkeypatch)
    path = write_texts(tmp_path / "a.jsonl", documents(200))
    enter = Workers.__enter__

    def enter_and_kill(self):
        enter(self)
        self._processes[0].kill()
        return self

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "__enter__", enter_and_kill)
        with pytest.raises(UserError, match="a tokenising process ended"):
            run(path, workers=1)
    data = run(path, workers=1)
    assert data.train.num_documents + data.validation.num_documents == 200


def test_a_worker_that_is_left_alone_ends_without_a_word(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "minnow.data.workers", str(tmp_path / "tokenizer")]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    worker.stdout.close()
    rows = [(0, number, json.dumps({"text": text}).encode()) for number, text in enumerate(documents(9), 1)]
    options = EncodeOptions("pretrain", 64, weights=(1.0,), sides=("split",))
    pickle.dump(("encode", RawBatch(0, 0, 0, 0.0, rows, (None,), True, True), options), worker.stdin)
    worker.stdin.flush()
    assert worker.wait(60) == 1
    assert worker.stderr.read() == b""


def test_a_killed_run_leaves_nothing_half_written(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", documents(6000))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = textwrap.dedent(f"""
        from minnow.data import lots
        from minnow.data import prepare as p
        from minnow.tokenizer.tokenizer import Tokenizer
        lots.BATCH_BYTES, lots.LOT_BYTES = 20_000, 40_000
        config = p.DataConfig(paths=({path!r},), cache_dir={str(tmp_path / "cache")!r}, workers=1)
        data = p.prepare(config, Tokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}), "pretrain",
                         sequence_length=64, progress=False)
        print(data.train.num_documents + data.validation.num_documents)
    """)
    killed = 0
    for wait in (0.0, 0.02, 10_000):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        journal = lambda: list((tmp_path / "cache").glob("*/journal/0*.json"))  # noqa: E731
        had = len(journal())
        while process.poll() is None and len(journal()) <= had:
            time.sleep(0.002)
        time.sleep(wait if wait < 1 else 0)
        if wait < 1 and process.poll() is None:
            process.kill()
            process.wait()
            # A fast machine may have been done by then; what it left is looked at below.
            killed += not list((tmp_path / "cache").glob("pretrain-*/meta.json"))
        else:
            out, _ = process.communicate(timeout=60)
            assert out.strip() in (b"6000", b"")
    assert killed
    folder = next(path for path in (tmp_path / "cache").glob("pretrain-*") if path.is_dir())
    data = [Shards.open(folder / side) for side in ("train", "validation")]
    for shards in data:
        shards.verify()
    assert sorted(text for shards in data for text in texts_of(shards, tokenizer)) == sorted(documents(6000))


def test_hub_sets_are_streamed_into_shards(run, monkeypatch, tokenizer):
    import datasets
    import huggingface_hub

    pushed, read = iter(["abc", "abc", "def", "ghi"]), []

    def load_dataset(*arguments, revision, **settings):
        read.append(revision)
        return iter([{"text": text} for text in documents(30)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name: types.SimpleNamespace(sha=next(pushed))
    )
    data = run("org/name")
    assert set(read) == {"abc"}, "the commit that the cache is keyed by is the one that is read"
    read.clear()
    assert run("org/name").folder == data.folder
    assert read == []
    assert run("org/name").folder != data.folder
    assert set(read) == {"def"}
    assert sorted(texts_of(data.train, tokenizer) + texts_of(data.validation, tokenizer)) == sorted(documents(30))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"text": "a"}, {"body": "b"}]))
    with pytest.raises(UserError, match="hub:org/other:2: no `text`"):
        run("org/other")


def test_a_hub_set_is_never_held_whole(run, monkeypatch):
    import datasets
    import huggingface_hub

    class Row(dict):
        """Unlike a dict it can be watched."""

    alive, most = weakref.WeakValueDictionary(), []

    def stream(*arguments, **settings):
        for number, text in enumerate(documents(300)):
            row = alive[number] = Row(text=text)
            most.append(len(alive))
            yield row

    small_shards(monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: types.SimpleNamespace(sha="abc"))
    data = run("org/name")
    assert data.train.num_documents + data.validation.num_documents == 300
    assert max(most) < 30, "a batch of 500 bytes is six rows"


def test_options_out_of_range_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="validation_fraction is 0.9"):
        run(write_texts(tmp_path / "a.jsonl", documents(3)), validation_fraction=0.9)
    with pytest.raises(UserError, match="data.workers is -1: give 0 or more"):
        run(write_texts(tmp_path / "a.jsonl", documents(3)), workers=-1)
    for length in (0, -3):
        with pytest.raises(UserError, match=f"sequence_length is {length}: it must be at least 1"):
            run(write_texts(tmp_path / "a.jsonl", documents(3)), sequence_length=length)
