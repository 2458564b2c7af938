"""Cleaning rows with pictures: the kept ones still find them, and what is alike is so in what it shows, too."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from picture_helpers import png, shown, write_pictures

from minnow.config import UserError
from minnow.data.clean import CleanOptions, clean
from minnow.data.pictures import Pictures
from minnow.data.readers import read_rows
from minnow.data.records import parse_conversation


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kept(out):
    """What the kept rows show and say, read as they are to be trained on."""
    folder = out / "kept"
    for _, row in read_rows([str(folder)]):
        user, answer = parse_conversation(row, Pictures(str(folder))).messages
        yield [image.data for image in user.images], user.content, answer.content


def test_kept_rows_find_their_pictures_from_where_they_lie_now(tmp_path):
    data = tmp_path / "data"
    first, second, third = write_pictures(data / "p", 3)
    llava = {
        "image": "p/1.png",
        "conversations": [{"from": "human", "value": "<image>B"}, {"from": "gpt", "value": "b"}],
    }
    openai = shown("d", text="D")
    openai["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": "p/1.png"}})
    as_json = {"messages": json.dumps(shown("e", "p/2.png", text="E")["messages"])}
    several = {
        "images": ["p/0.png", str(data / "p" / "2.png")],
        "messages": shown("f", text="<image>F<image>")["messages"],
    }
    several["messages"][0]["content"] = "<image>F<image>"
    rows = [shown("a", "p/0.png", text="A"), llava, {"image": "p/2.png", "caption": "c"}, openai, as_json, several]
    clean([write(data / "a.jsonl", rows)], tmp_path / "deep" / "out", CleanOptions(), progress=False)
    assert list(kept(tmp_path / "deep" / "out")) == [
        ([first], "A", "a"),
        ([second], "B", "b"),
        ([third], "", "c"),
        ([second], "D", "d"),
        ([third], "E", "e"),
        ([first, third], "F", "f"),
    ]


def test_rows_without_pictures_are_the_same_bytes(tmp_path):
    line = '{"messages":  [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "a.jsonl").write_text(line)
    clean([str(tmp_path / "a.jsonl")], tmp_path / "out", CleanOptions(), progress=False)
    assert (tmp_path / "out" / "kept" / "a.jsonl").read_text() == line


def test_what_stands_beside_a_text_and_is_no_file_stays(tmp_path):
    rows = [{"text": "A", "image": "https://there/a.png"}, {"text": "B", "image": {"url": "https://there/b.png"}}]
    clean([write(tmp_path / "a.jsonl", rows)], tmp_path / "out", CleanOptions(), progress=False)
    assert [row for _, row in read_rows([str(tmp_path / "out" / "kept")])] == rows


def test_pictures_of_parquet_are_kept_in_json(tmp_path):
    otter, owl, black = png(1), png(2), png(3, 8)

    def talk(question, answer):
        return json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])

    table = {
        "conversations": [talk("<image>A", "a"), talk("B", "b"), talk("<image>C<image>", "c")],
        "image_bytes": [[otter], [black], [otter, owl]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    struct = {"conversations": [talk("<image>D", "d")], "image": [{"bytes": owl, "path": "gone.png"}]}
    pyarrow.parquet.write_table(pyarrow.table(struct), tmp_path / "b.parquet")
    clean([str(tmp_path / f"{name}.parquet") for name in "ab"], tmp_path / "out", CleanOptions(), progress=False)
    assert list(kept(tmp_path / "out")) == [
        ([otter], "A", "a"),
        ([], "B", "b"),
        ([otter, owl], "C", "c"),
        ([owl], "D", "d"),
    ]


def test_the_same_words_about_other_pictures_are_no_copies(tmp_path):
    """Of a thousand questions for the colour, most have the same words."""
    write_pictures(tmp_path / "p", 2)
    answer = "The animal in the picture is brown and it swims in the river."
    rows = [shown(answer, f"p/{i}.png", text="What colour is the animal that you see here, please?") for i in (0, 1, 0)]
    report = clean([write(tmp_path / "a.jsonl", rows)], tmp_path / "out", CleanOptions(), progress=False)
    assert report["kept"] == 2
    assert report["removed"]["exact_duplicate"]["example"]["line"] == 3


def test_a_picture_that_is_not_there_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [shown("a", "p/0.png")])
    with pytest.raises(UserError, match=rf"{path}:1: .*/p/0\.png, and there is no such file"):
        clean([path], tmp_path / "out", CleanOptions(), progress=False)
