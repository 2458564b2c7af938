"""Rows that show pictures, in every form; and what is wrong with those that cannot be read."""

import base64
import re

import pytest
from picture_helpers import FORMAT, png

from minnow.data.pictures import TEXT_ALONE, TEXT_ONLY, Pictures, data_url
from minnow.data.readers import read_texts, said_texts
from minnow.data.records import canonical, conversation_row, parse_conversation, parse_document, parse_message
from minnow.data.values import RowError
from minnow.tokenizer.images import Image

OTTER, OWL = png(1), png(2)
ANSWER = {"role": "assistant", "content": "An otter."}
URL = data_url(OTTER)


def asked(content, **row):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **row}


def part(value, kind="image"):
    return {"type": kind, kind: value}


TEXT = {"type": "text", "text": "Who is this?"}
ONE = {  # all of them: the otter, and then the question
    "a part with a path": asked([part("otter.png"), TEXT]),
    "a part with a data URL": asked([part(URL), TEXT]),
    "a part of parquet's": asked([{"type": "image", "image": "otter.png", "text": None}, {**TEXT, "image": None}]),
    "OpenAI's": asked([part({"url": URL}, "image_url"), TEXT]),
    "OpenAI's with a path": asked([part({"url": "otter.png"}, "image_url"), TEXT]),
    "OpenAI's, without the object": asked([part("otter.png", "image_url"), TEXT]),
    "LLaVA's": {
        "id": "1",
        "image": "otter.png",
        "conversations": [{"from": "human", "value": "<image>Who is this?"}, {"from": "gpt", "value": "An otter."}],
    },
    "a list of one": asked("<image>Who is this?", images=["otter.png"]),
    "MiniMind-V's": asked("<image>Who is this?", image_bytes=OTTER),
    "MiniMind-V's, a list": asked("<image>Who is this?", image_bytes=[OTTER]),
    "MiniMind-V's, in JSON": asked("<image>Who is this?", image_bytes=base64.b64encode(OTTER).decode()),
    "of datasets": asked("<image>Who is this?", image={"bytes": OTTER, "path": "elsewhere.png"}),
    "of datasets, by path": asked("<image>Who is this?", images=[{"bytes": None, "path": "otter.png"}]),
    "TRL's": asked([{"type": "image"}, TEXT], images=["otter.png"]),
    "columns that others fill": asked([part("otter.png"), TEXT], image=None, images=[], image_bytes=None),
    "Alpaca's": {"instruction": "<image>Who is this?", "output": "An otter.", "image": "otter.png"},
}


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "otter.png").write_bytes(OTTER)
    (tmp_path / "owl.png").write_bytes(OWL)
    return Pictures(str(tmp_path), image_format=FORMAT)


@pytest.mark.parametrize("name", ONE)
def test_every_form_is_the_same_conversation(name, pictures):
    conversation = parse_conversation(ONE[name], pictures)
    user, answer = conversation.messages
    assert (user.content, user.images) == ("Who is this?", (Image(OTTER, 0),))
    assert (answer.content, answer.images) == ("An otter.", ())
    assert canonical(conversation) == canonical(parse_conversation(ONE["a part with a path"], pictures))


def test_pictures_stand_where_their_markers_stand(pictures):
    row = asked("a<image>b<image>", images=["otter.png", "owl.png"])
    row["messages"] += [{"role": "user", "content": "<image>\nAnd?"}, ANSWER]
    row["images"].append("otter.png")
    first, _, second, _ = parse_conversation(row, pictures).messages
    assert (first.content, first.images) == ("ab", (Image(OTTER, 1), Image(OWL, 2)))
    assert (second.content, second.images) == ("\nAnd?", (Image(OTTER, 0),))


def test_a_caption_answers_a_picture_shown_without_a_word(pictures):
    user, answer = parse_conversation({"image": "owl.png", "caption": "An owl."}, pictures).messages
    assert (user.content, user.images) == ("", (Image(OWL, 0),))
    assert (answer.role, answer.content) == ("assistant", "An owl.")


def test_a_path_is_relative_to_the_folder_of_its_file(pictures, tmp_path, monkeypatch):
    deeper = tmp_path / "rows"
    deeper.mkdir()
    for path in ("../otter.png", str(tmp_path / "otter.png")):  # one's own data may lie anywhere
        message = parse_conversation(asked([part(path)]), Pictures(str(deeper))).messages[0]
        assert message.images == (Image(OTTER),)
    monkeypatch.chdir(tmp_path)
    item = {"role": "user", "content": [part("otter.png")]}
    assert parse_message(item, 1).images == (Image(OTTER),)


def test_a_row_becomes_itself_again(pictures):
    row = asked([{"type": "text", "text": "a"}, part("otter.png"), part("owl.png"), {"type": "text", "text": "b"}])
    conversation = parse_conversation(row, pictures)
    written = conversation_row(conversation)
    assert parse_conversation(written, Pictures(folder=None)) == conversation
    assert [each["type"] for each in written["messages"][0]["content"]] == ["text", "image", "image", "text"]
    assert written["messages"][0]["content"][1]["image"].startswith("data:image/png;base64,")


def test_the_same_question_about_two_pictures_is_two_documents(pictures):
    one, other = (
        canonical(parse_conversation(asked([part(name), TEXT]), pictures)) for name in ("otter.png", "owl.png")
    )
    assert one != other
    behind = canonical(parse_conversation(asked([TEXT, part("otter.png")]), pictures))
    assert behind != one
    assert canonical(parse_conversation(asked("Who is this?"), pictures)) not in (one, other, behind)


def test_looking_for_files_does_not_read_them(pictures, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"broken")
    find = Pictures(str(tmp_path), "find", FORMAT)
    message = parse_conversation(asked([part("broken.png")]), find).messages[0]
    assert message.images == (Image(b""),)
    with pytest.raises(RowError, match="there is no such file"):
        parse_conversation(asked([part("gone.png")]), find)


BAD = {
    "gone": (asked([part("gone.png")]), "`content` of message 1 shows FOLDER/gone.png, and there is no such file"),
    "a folder": (asked([part("deep")]), "FOLDER/deep, and there is no such file"),
    "broken": (asked([part("broken.png")]), "FOLDER/broken.png: not a picture that can be read (PNG, JPEG"),
    "broken bytes": (asked("<image>", image_bytes=b"x"), "a picture of `content` of message 1: not a picture that can"),
    "web": (asked([part("https://a.org/otter.png")]), "https://a.org/otter.png: pictures are not downloaded"),
    "no base64": (asked([part("data:image/png,abc")]), "is a `data:` URL without base64"),
    "bad base64": (asked([part("data:image/png;base64,a*c=")]), "is no base64"),
    "bad column": (asked("<image>", image_bytes="a*c="), "is no base64"),
    "base64 as a path": (asked("<image>", image=base64.b64encode(bytes(900)).decode()), "which cannot be read"),
    "a null in it": (asked([part("a\0b")]), "there is no such file"),
    "no value": (asked([{"type": "image"}]), "must be a path or a `data:` URL, it is null"),
    "a number": (asked([part(7)]), "must be a path or a `data:` URL, it is a number"),
    "sound": (asked([part("a.wav", "audio")]), "has a part that is neither text nor a picture"),
    "fewer markers": (
        asked("<image>", images=["otter.png", "owl.png"]),
        "`images` has 2 pictures, and the users' texts ",
    ),
    "more markers": (asked("<image><image>", image="otter.png"), "`image` has 1 picture, and the users' texts have 2 "),
    "no marker": (asked("Who?", image="otter.png"), "`image` has 1 picture, and the users' texts have 0 times <image>"),
    "two columns": (asked("<image>", image="otter.png", image_bytes=OTTER), "both in `image` and in `image_bytes`"),
    "the assistant's": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [part("otter.png")]}]},
        "`content` of message 2 has a part that is not text",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"broken")
    (tmp_path / "deep").mkdir()
    row, message = BAD[name]
    with pytest.raises(RowError) as error:
        parse_conversation(row, pictures)
    assert message.replace("FOLDER", str(tmp_path)) in str(error.value)
    assert len(str(error.value)) < 400


def test_rows_from_elsewhere_have_no_folder():
    with pytest.raises(
        RowError, match="these rows lie in no folder here: give the file's content itself|`image_bytes`"
    ):
        parse_conversation(asked([part("otter.png")]), Pictures(folder=None))
    assert parse_conversation(asked("<image>", image_bytes=OTTER), Pictures(folder=None)).messages[0].images


def test_who_only_reads_refuses_pictures_and_not_the_rows_around_them(tmp_path):
    for row in (ONE["LLaVA's"], ONE["MiniMind-V's"], ONE["TRL's"], {"image": "otter.png", "caption": "An owl."}):
        with pytest.raises(RowError, match="message 1 shows a picture, and only text is read here: `minnow vlm`"):
            parse_conversation(row, TEXT_ONLY)
    for beside in ({"image_bytes": OTTER}, {"image": "cover.png"}, {"image": "cover.png", "images": ["cover.png"]}):
        padded = asked("Who lives in the river?", **beside)
        for pictures in (TEXT_ONLY, TEXT_ALONE):
            assert parse_conversation(padded, pictures).messages[0].content == "Who lives in the river?"
    for beside in ({"image_bytes": OTTER}, {"image": "debian:12"}, {"images": ["avatar.png"]}, {"image": False}):
        for reader in (TEXT_ONLY, TEXT_ALONE):
            (user, _) = parse_conversation(asked("Who lives in the river?", **beside), reader).messages
            assert (user.content, user.images) == ("Who lives in the river?", ())


def test_a_marker_in_a_row_without_pictures_is_text(pictures):
    assert (
        parse_conversation(asked("What is <image> in HTML?"), pictures).messages[0].content
        == "What is <image> in HTML?"
    )
    row = asked("<image>", image="otter.png")
    row["messages"][1] = {"role": "assistant", "content": "Write <image>."}  # nobody but users shows pictures
    assert parse_conversation(row, pictures).messages[1].content == "Write <image>."


def test_texts_are_read_without_the_pictures(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"image": "gone.png", "messages": [{"role": "user", "content": "<image>Who?"}, '
        '{"role": "assistant", "content": "I."}]}\n'
        '{"image": "gone.png", "caption": "An owl."}\n'
    )
    assert list(read_texts([str(tmp_path / "a.jsonl")])) == ["Who?", "I.", "An owl."]
    assert TEXT_ALONE.use == "skip"
    with pytest.raises(Exception, match=re.escape("a.jsonl:1: `content` of message 1 shows a picture")):
        list(read_texts([str(tmp_path / "a.jsonl")], said_texts, TEXT_ONLY))


def test_a_caption_is_no_text_to_pretrain_on():
    with pytest.raises(RowError, match="it looks like a conversation, .* for `minnow vlm` if it has pictures"):
        parse_document({"image": "otter.png", "caption": "An otter."})
