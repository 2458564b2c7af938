"""Work in parts: the same bytes as from one process, whoever does what in which order, and however often it dies."""

import json
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from minnow.config import UserError
from minnow.data import lots
from minnow.data.job import find_job
from minnow.data.journal import Journal, Part
from minnow.data.preparation import Preparation, prepare_part
from minnow.data.prepare import DataConfig, prepare


def texts(n, name="otter"):
    return [f"The {name} number {i} lives in the river. 它吃鱼。" for i in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def contents(folder):
    """Every file: path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def small_lots(monkeypatch):
    monkeypatch.setattr(lots, "BATCH_BYTES", 500)
    monkeypatch.setattr(lots, "LOT_BYTES", 1000)


class Folder:
    """Prepares the same data in several cache folders."""

    def __init__(self, tmp_path, tokenizer, *paths, **options):
        options = {"workers": 0, "validation_fraction": 0.1, **options}
        self.tmp_path, self.tokenizer, self.paths, self.options = tmp_path, tokenizer, paths, options

    def config(self, cache):
        return DataConfig(paths=self.paths, cache_dir=str(self.tmp_path / cache), **self.options)

    def whole(self, cache):
        return prepare(self.config(cache), self.tokenizer, "pretrain", sequence_length=64, progress=False)

    def part(self, cache, number, of):
        part = Part(number, of)
        return prepare_part(self.config(cache), self.tokenizer, "pretrain", part, sequence_length=64, progress=False)


@pytest.fixture
def folder(tmp_path, tokenizer, small_lots):
    first = write(tmp_path / "a.jsonl", [*texts(100), 3, *texts(50, "newt")])
    second = write(tmp_path / "b.jsonl", texts(80, "heron"))
    held_out = write(tmp_path / "c.jsonl", texts(20, "toad"))
    return Folder(tmp_path, tokenizer, first + "@1.5", second, validation_paths=(held_out,), on_bad_row="skip")


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2], [2, 3, 1]])
def test_parts_in_any_order_give_the_bytes_of_one_process(folder, order):
    alone = folder.whole("alone")
    said = [folder.part("parts", number, 3) for number in order]
    assert f"of which {min(order[1:])}/3, {max(order[1:])}/3 are not done" in said[0]
    assert f"of which {order[2]}/3 are not done" in said[1]
    assert said[2] is None
    together = folder.whole("parts")
    assert contents(together.folder) == contents(alone.folder)
    assert together.report.bad_rows == (
        f"{folder.paths[0].removesuffix('@1.5')}:101: `text` must be text, it is a number",
    )
    assert not list((folder.tmp_path / "parts").glob("*.lock"))


def test_a_part_that_breaks_off_goes_on_where_it_was(folder, monkeypatch):
    alone = folder.whole("alone")
    folder.part("parts", 1, 2)
    closed = []
    close = Preparation._close_shard

    def close_or_die(self, *arguments):
        closed.append(1)
        if len(closed) in (3, 6):
            raise KeyboardInterrupt
        close(self, *arguments)

    monkeypatch.setattr(Preparation, "_close_shard", close_or_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            folder.part("parts", 2, 2)
    assert folder.part("parts", 2, 2) is None
    others = len(list((alone.folder / "train").glob("*.tokens"))) // 2
    assert len(closed) <= others + 3  # a shard that was not closed is made again, no other
    assert contents(folder.whole("parts").folder) == contents(alone.folder)


def test_who_asks_too_early_is_told_which_parts_are_missing(folder):
    folder.part("parts", 2, 4)
    with pytest.raises(
        UserError, match=r"in 4 parts, of which 1/4, 3/4, 4/4 are not done: run `minnow data prepare --p"
    ):
        folder.whole("parts")
    with pytest.raises(
        UserError, match=r"in 4 parts: go on with them \(--part I/4\), or delete .*/parts/pretrain-\w+ to"
    ):
        folder.part("parts", 1, 3)
    for text in ("0/4", "5/4", "2", "a/b", "-1/4"):
        with pytest.raises(UserError, match="give the number of this part and of all parts, such as 2/8"):
            Part.parse(text)
    assert Part.parse("2/8") == Part(2, 8)


def test_parts_of_little_data_split_it_as_one_process_does(tmp_path, tokenizer, small_lots):
    """Of few documents none may have a hash low enough for validation; then the lowest one is moved there."""
    for n in range(2, 7):
        path = write(tmp_path / f"{n}.jsonl", texts(10 * n)[-n:])
        data = Folder(tmp_path, tokenizer, path, validation_fraction=0.001)
        alone = data.whole("alone")
        assert (alone.train.num_documents, alone.validation.num_documents) == (n - 1, 1)
        for number in (2, 1):
            data.part("parts", number, 2)
        assert contents(data.whole("parts").folder) == contents(alone.folder)


def test_a_bad_row_ends_its_part_alone(tmp_path, tokenizer, small_lots):
    path = write(tmp_path / "a.jsonl", [*texts(40), 3])
    data = Folder(tmp_path, tokenizer, path)
    ended = []
    for number in (1, 2, 3):
        try:
            data.part("parts", number, 3)
        except UserError as error:
            ended.append(str(error))
    assert len(ended) == 1
    assert ended[0].startswith(f"{path}:41: `text` must be text, it is a number\n1 of ")
    assert len(list((tmp_path / "parts").glob("*/journal/0*.json"))) > 0


def test_a_part_that_is_tried_again_has_not_failed(tmp_path):
    (tmp_path / "journal").mkdir()
    journal = Journal(tmp_path, [], threshold=0)
    with pytest.raises(UserError), journal.failures(Part(1, 2)):
        raise UserError("a.jsonl:3: bad")
    with journal.failures(Part(2, 2)):
        assert journal.failure() == "a.jsonl:3: bad"  # who waits for all parts reads it
    with journal.failures(Part(1, 2)):
        assert journal.failure() is None


@pytest.mark.timeout(600)
def test_processes_that_share_a_folder_and_one_is_killed(tmp_path, tokenizer):
    data = Folder(tmp_path, tokenizer, write(tmp_path / "a.jsonl", texts(2500)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = textwrap.dedent(f"""
        import sys
        from minnow.data import lots
        from minnow.data.job import DataConfig
        from minnow.data.journal import Part
        from minnow.data.preparation import prepare_part
        from minnow.tokenizer.tokenizer import Tokenizer
        lots.BATCH_BYTES, lots.LOT_BYTES = 10_000, 20_000
        tokenizer = Tokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
        config = DataConfig(paths={data.paths!r}, cache_dir={str(tmp_path / "parts")!r}, **{data.options!r})
        part = Part.parse(sys.argv[1])
        print(prepare_part(config, tokenizer, "pretrain", part, sequence_length=64, progress=False))
    """)

    def start(number):
        command = [sys.executable, "-c", program, f"{number}/2"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first, second = start(1), start(2)
    while second.poll() is None and not list((tmp_path / "parts").glob("*/journal/0*.json")):
        time.sleep(0.002)
    second.kill()
    out, _ = first.communicate(timeout=200)
    second.communicate()
    assert first.returncode == 0
    assert "of which 2/2 are not done" in out
    third = start(2)
    out, _ = third.communicate(timeout=200)
    assert third.returncode == 0
    assert out == "None\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lots, "BATCH_BYTES", 10_000)
        patch.setattr(lots, "LOT_BYTES", 20_000)
        alone = data.whole("alone")
    (together,) = (path for path in (tmp_path / "parts").glob("pretrain-*") if path.is_dir())
    assert contents(together) == contents(alone.folder)


def test_processes_that_only_prepare_load_no_torch():
    """It would take more memory than the tokenizing."""
    program = "import sys, minnow.data.background, minnow.data.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_one_at_a_time_closes_the_data_however_many_wait(tmp_path, tokenizer):
    """The lock's file is removed by its holder: who waited for that one must not go in beside who made a new one."""
    data = Folder(tmp_path, tokenizer, write(tmp_path / "a.jsonl", texts(3)))
    job = find_job(data.config("parts"), tokenizer, "pretrain", 64)
    inside, most, start = [0], [0], threading.Barrier(8)

    def go_in():
        start.wait()
        for _ in range(40):
            with job.lock():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=go_in) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert not list((tmp_path / "parts").glob("*.lock"))
