"""The slash commands of `minnow chat`."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
import typing
from typing import Any

from rich.console import Console

from minnow.config import UserError
from minnow.data.records import conversation_row
from minnow.disk import atomic_write
from minnow.engine import SamplingOptions
from minnow.json_file import json_text
from minnow.stages.chat_session import ChatSession

HELP = """\
/reset             forget what was said; the system prompt and the settings stay
/image FILE        show a picture (PNG, JPEG, WebP, GIF) before your next message; an empty line shows it alone
/system TEXT       set the system prompt; without TEXT there is none
/think on|off      let the model reason first, shown dimmed
/set               show the sampling settings
/set NAME VALUE    change one: /set temperature 0.7
/save FILE         write the conversation as a line of JSON, as `minnow sft` reads it (with pictures: `minnow vlm`)
/help              this list
/exit              leave (as Ctrl-D, or Ctrl-C at the prompt)

Ctrl-C during an answer stops the answer."""

COMMANDS = ("/reset", "/image", "/system", "/think", "/set", "/save", "/help", "/exit")


def run_command(session: ChatSession, line: str, console: Console) -> bool:
    """Obey a line that starts with a slash; False when the chat is over. UserError says what is wrong with it."""

    def say(text: str) -> None:
        console.print(text, style="dim")

    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/exit" | "/quit":
            return False
        case "/help":
            say(HELP)
        case "/reset":
            session.reset()
            say("A new conversation.")
        case "/image":
            _show(session, argument)
            say(f"Before your next message: {argument}")
        case "/system":
            session.system = argument or None
            say(f"System prompt: {argument}" if argument else "No system prompt.")
        case "/think":
            _set_thinking(session, argument)
            say(f"Reasoning is {'on' if session.thinking else 'off'}.")
        case "/set":
            if argument:
                _set_option(session, argument)
            say(_options(session))
        case "/save":
            _save(session, argument)
            say(f"Wrote {argument}.")
        case _:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            raise UserError(
                f"{command}: no such command; {f'did you mean {close[0]}?' if close else '/help lists them'}"
            )
    return True


def completions(line: str) -> list[str]:
    """What the line might become: names of commands, and of files behind those that take one."""
    command, space, path = line.partition(" ")
    if not space:
        return [known for known in COMMANDS if command and known.startswith(command)]
    if command not in ("/image", "/save"):
        return []
    found = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
    return [f"{command} {file}/" if os.path.isdir(file) else f"{command} {file}" for file in found]


def _show(session: ChatSession, file: str) -> None:
    session.engine.tokenizer.require_images()
    if not file:
        raise UserError("/image needs the path of a picture")
    session.show(file)


def _set_thinking(session: ChatSession, argument: str) -> None:
    if argument not in ("on", "off", ""):
        raise UserError(f"/think {argument}: say /think on or /think off")
    if argument:
        session.thinking = argument == "on"


def _set_option(session: ChatSession, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    types = {option.name: option for option in dataclasses.fields(SamplingOptions)}
    if name not in types:
        close = difflib.get_close_matches(name, types, n=1)
        raise UserError(f"/set {name}: no such setting; {f'did you mean {close[0]}?' if close else _options(session)}")
    kind = typing.get_type_hints(SamplingOptions)[name]
    value = value.strip()
    try:
        if value.lower() in ("null", "none") and type(None) in typing.get_args(kind):
            parsed: Any = None
        else:
            parsed = float(value) if kind is float else int(value)
    except ValueError:
        wanted = "a number" if kind is float else "a whole number"
        raise UserError(f"/set {name}: {value!r} is not {wanted}") from None
    session.params = dataclasses.replace(session.params, **{name: parsed})


def _options(session: ChatSession) -> str:
    names = [option.name for option in dataclasses.fields(SamplingOptions)]
    return ", ".join(f"{name} {getattr(session.params, name)}" for name in names)


def _save(session: ChatSession, file: str) -> None:
    if not file:
        raise UserError("/save needs a file name")
    try:
        with atomic_write(os.path.expanduser(file)) as path:  # no shell has read it
            path.write_text(json_text(conversation_row(session.conversation())) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"/save {file}: {error.strerror}") from error
