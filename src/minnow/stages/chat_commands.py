"""The slash commands of `minnow chat`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from typing import Any

from rich.console import Console

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.engine import SamplingOptions
from minnow.json_file import json_text
from minnow.stages.chat_session import ChatSession

HELP = """\
/reset             forget what was said; the system prompt and the settings stay
/system TEXT       set the system prompt; without TEXT there is none
/think on|off      let the model reason first, shown dimmed
/set               show the sampling settings
/set NAME VALUE    change one: /set temperature 0.7
/save FILE         write the conversation as a line of JSON, as `minnow sft` reads it
/help              this list
/exit              leave (as Ctrl-D, or Ctrl-C at the prompt)

Ctrl-C during an answer stops the answer."""

COMMANDS = ("/reset", "/system", "/think", "/set", "/save", "/help", "/exit")


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
    messages = [
        {"role": m.role, "content": m.content}
        | ({"reasoning_content": m.reasoning_content} if m.reasoning_content else {})
        for m in session.conversation().messages
    ]
    try:
        with atomic_write(os.path.expanduser(file)) as path:  # no shell has read it
            path.write_text(json_text({"messages": messages}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"/save {file}: {error.strerror}") from error
