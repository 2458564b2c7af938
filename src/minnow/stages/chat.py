"""`minnow chat`: talk with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from minnow.config import UserError
from minnow.console import plain_console, printable
from minnow.stages.chat_commands import completions, run_command
from minnow.stages.chat_session import Answer, ChatSession
from minnow.stages.terminal import TalkingConfig


@dataclass(frozen=True, kw_only=True)
class Config(TalkingConfig):
    """Talk with a model that has learnt to chat. /help in the chat lists its commands."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int | None = 512
    system: str | None = None
    """System prompt."""
    think: bool = False
    """Let the model reason before it answers; the reasoning is shown dimmed."""


def run(config: Config) -> None:
    """Chat until /exit, the end of the input or Ctrl-C at the prompt."""
    engine = config.load_engine()
    session = ChatSession(engine, config.sampling_params(), system=config.system, thinking=config.think)
    console = plain_console()
    if sys.stdin.isatty():
        looks = "" if engine.tokenizer.image_format is None else "It looks at pictures: /image FILE. "
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        console.print(
            f"{config.model}: {parameters / 1e6:.1f}M parameters, context {session.context} tokens. "
            f"{looks}/help lists commands, Ctrl-C stops an answer, /exit leaves.",
            style="dim",
        )
    talk(session, console)


def talk(session: ChatSession, console: Console) -> None:
    """The loop: read a line, obey or answer it."""
    # A second Ctrl-C while the first is still being handled lands here too: leaving is always polite.
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        for line in read_lines(colour=console.color_system is not None and not console.no_color):
            try:
                if line.startswith("/"):
                    if not run_command(session, line, console):
                        return
                elif line or session.pictures:
                    show_answer(session, line, console)
            except UserError as error:
                console.print(str(error), style="red")
    if sys.stdin.isatty():
        console.print("\nBye.", style="dim")


def read_lines(*, colour: bool) -> Iterator[str]:
    """The user's lines, stripped: edited with readline in a terminal, else standard input's."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()
        return
    prompt = "you> "
    try:
        import readline  # editing, history and wide characters in input()
    except ImportError:
        pass
    else:
        readline.set_completer_delims("")  # paths may have blanks
        readline.set_completer(_complete)
        # macOS has libedit under this name, and its words for it.
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        if colour:
            prompt = "\001\033[1;36m\002you>\001\033[0m\002 "  # \001 and \002: characters of no width, for readline
    while True:
        yield input(prompt).strip()


def _complete(line: str, number: int) -> str | None:
    """What readline asks for, one by one, when Tab is pressed."""
    return dict(enumerate(completions(line))).get(number)


def show_answer(session: ChatSession, text: str, console: Console) -> None:
    """Stream the answer to `text`; Ctrl-C ends it early and keeps what was said."""
    answer = session.ask(text)
    if answer.forgotten:
        console.print(
            f"(the context of {session.context} tokens is full: the oldest {answer.forgotten} "
            f"turn{'s are' if answer.forgotten > 1 else ' is'} no longer read)",
            style="dim",
        )
    try:
        _stream(answer, console)
    except KeyboardInterrupt:
        answer.stop()
        console.print(" (stopped)", style="dim", end="")
    if answer.finish_reason == "length":
        context_full = answer.num_tokens == session.context
        reason = "the context is full: /reset" if context_full else "max_tokens reached: /set max_tokens N"
        console.print(f" ({reason})", style="dim", end="")
    console.print("\n")


def _stream(answer: Answer, console: Console) -> None:
    console.print("minnow>", style="bold green", end=" ")
    was_reasoning = False
    for piece in answer:
        if was_reasoning and not piece.reasoning:
            console.print("\n")
        was_reasoning = piece.reasoning
        text = Text(printable(piece.text), "dim italic" if piece.reasoning else "")
        console.print(text, end="", soft_wrap=True)
