"""`minnow chat` with a model that looks at pictures: /image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from minnow.config import UserError
from minnow.data.records import parse_conversation
from minnow.engine import Engine, SamplingParams
from minnow.stages.chat import talk
from minnow.stages.chat_commands import completions, run_command
from minnow.stages.chat_session import ChatSession
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.images import Image

from ..seeing import picture, picture_file, save_seeing_model
from .stage_helpers import save_random_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeing_model(tmp_path_factory.mktemp("chat") / "m")


def talked(session: ChatSession, monkeypatch: pytest.MonkeyPatch, *lines: str) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    talk(session, console)
    return console.file.getvalue()


def answer_to(folder: Path, *messages: Message) -> str:
    engine = Engine.from_pretrained(folder)
    prompt = render(engine.tokenizer, Conversation(messages), add_generation_prompt=True)
    return engine.generate([prompt], PARAMS)[0].completions[0].text.strip()


def test_a_picture_stands_before_the_next_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    lines = [f"/image {picture_file(tmp_path, 0)}", f"/image {picture_file(tmp_path, 1)}", "what?", "and now?"]
    shown = talked(session, monkeypatch, *lines)
    assert f"Before your next message: {tmp_path / '0.png'}" in shown
    first, _, second, _ = session.messages
    assert first == Message("user", "what?", images=(Image(picture(0)), Image(picture(1))))
    assert second == Message("user", "and now?")
    assert session.messages[1].content == answer_to(folder, first)
    assert session.messages[3].content == answer_to(folder, *session.messages[:3])


def test_an_empty_line_shows_it_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    talked(session, monkeypatch, "", f"/image {picture_file(tmp_path, 0)}", "")
    assert session.messages[0] == Message("user", "", images=(Image(picture(0)),))
    assert len(session.messages) == 2


def test_what_was_not_sent_is_forgotten_at_a_reset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    talked(session, monkeypatch, f"/image {picture_file(tmp_path, 0)}", "/reset", "hi")
    assert session.messages[0] == Message("user", "hi")


@pytest.mark.parametrize("typed", ["{}", '"{}"', "'{}'", "backslashes"])
def test_a_file_dropped_into_the_terminal_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: str
) -> None:
    """Terminals quote what is dropped into them for a shell, each in its own way."""
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    file = str(picture_file(tmp_path, 0).rename(tmp_path / "my first fish.png"))
    typed = file.replace(" ", "\\ ") if typed == "backslashes" else typed.format(file)
    talked(session, monkeypatch, f"/image {typed}", "what?")
    assert session.messages[0].images == (Image(picture(0)),)


def test_pictures_that_do_not_fit_stay_until_a_reset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    shown = talked(session, monkeypatch, *[f"/image {picture_file(tmp_path, 0)}"] * 60, "what?")
    assert "show fewer pictures (/reset forgets them)" in shown
    assert len(session.pictures) == 60
    assert not session.messages


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image", "/image needs the path of a picture"),
        ("/image nowhere.png", "nowhere.png: No such file or directory"),
        ("/image .", r"\.: Is a directory"),
        (f"/image {__file__}", "test_chat_pictures.py: not a picture that can be read"),
    ],
)
def test_a_wrong_path_is_one_line_and_shows_nothing(folder: Path, line: str, said: str) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    with pytest.raises(UserError, match=said) as caught:
        run_command(session, line, Console(file=io.StringIO()))
    assert "\n" not in str(caught.value)
    assert not session.pictures


def test_a_model_that_only_reads_says_so(tmp_path: Path) -> None:
    session = ChatSession(Engine.from_pretrained(save_random_model(tmp_path / "m")), PARAMS)
    for line in ("/image", f"/image {picture_file(tmp_path, 0)}"):
        with pytest.raises(UserError, match="reads text only"):
            run_command(session, line, Console(file=io.StringIO()))


def test_tab_completes_commands_and_the_paths_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a fish.png", "a frog.png", "b[1].png"):
        Path(name).touch()
    Path("a folder").mkdir()
    assert completions("/im") == ["/image"]
    assert completions("/image a f") == ["/image a fish.png", "/image a folder/", "/image a frog.png"]
    assert completions("/save b[") == ["/save b[1].png"]
    assert completions("hello") == completions("") == completions("/set t") == []


def test_a_saved_conversation_keeps_its_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(Engine.from_pretrained(folder), PARAMS)
    file = tmp_path / "talk.jsonl"
    talked(session, monkeypatch, f"/image {picture_file(tmp_path, 0)}", "what?", f"/save {file}")
    assert parse_conversation(json.loads(file.read_text())).messages == tuple(session.messages)
