"""`minnow distill generate`: a teacher answers prompts; what it says becomes an SFT file, whatever its architecture."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.openai_form import tool_name
from minnow.data.prompts import parse_prompt
from minnow.data.readers import parse_row, read_parsed
from minnow.data.records import canonical, conversation_row, parse_conversation
from minnow.data.values import RowError
from minnow.disk import lock, told_when_full
from minnow.json_file import json_text
from minnow.stages.teacher import Answer, TeacherConfig, ask
from minnow.tokenizer.chat import Conversation, Message
from minnow.tokenizer.special import SPECIAL_TOKENS


@dataclass(frozen=True, kw_only=True)
class Config(TeacherConfig):
    """Let a teacher answer prompts and keep its answers, thoughts and calls as conversations to fine-tune on."""

    prompts: tuple[str, ...]
    """Prompts or conversations (files, folders, globs, Hub data sets); the teacher gives a new last answer to each."""
    out: str
    """File to write, JSON lines of {"messages"} with {"tools"}; what it already answers is not asked again."""
    must_match: str | None = None
    """Regular expression that the whole visible content of an answer must match to be kept; a turn that only calls
    tools has an empty one."""
    max_rows: int | None = None
    """Answer at most this many prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"--max_rows is {self.max_rows}, but must be at least 1")
        try:
            re.compile(self.must_match or "")
        except re.error as error:
            raise UserError(f"--must_match {self.must_match!r} is no regular expression: {error}") from None


def run(config: Config) -> None:
    """Ask, check and append; stopped and started again, it goes on where it was."""
    console = plain_console(stderr=True)
    out = Path(config.out)
    asked = list(_prompts(config))
    counts: Counter[str] = Counter()
    with told_when_full(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as file:
            try:
                lock(file)
            except BlockingIOError:
                raise UserError(
                    f"--out {out} is being written by another process: wait for it, or name another"
                ) from None
            answered = _answered(out)
            prompts = [prompt for prompt in asked if _key(prompt) not in answered]
            for prompt, answer in ask(config, prompts) if prompts else ():
                problem = check(answer, prompt.tools, config.must_match)
                counts[problem or "kept"] += 1
                if problem is None and answer.message is not None:
                    row = conversation_row(Conversation((*prompt.messages, answer.message), prompt.tools))
                    file.write(json_text(row) + "\n")
                    file.flush()
    shown = ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "nothing left to ask"
    console.print(f"{len(prompts)} prompts: {shown}; {config.out}")


def check(answer: Answer, tools: Sequence[Mapping[str, Any]] = (), must_match: str | None = None) -> str | None:
    """Say what is wrong with an answer as something to learn from; None if nothing is."""
    message = answer.message
    if answer.ending == "length":
        return "cut at max_tokens"
    if answer.ending == "context":
        return "too long for the teacher's context"
    if answer.ending not in ("stop", "tool_calls"):
        return f"ended by {answer.ending}"
    if message is None:
        return "malformed"
    if not message.content and not message.tool_calls:
        return "empty"
    if any(token in text for token in SPECIAL_TOKENS for text in _texts(message)):
        return "with control tokens"
    if not {call.name for call in message.tool_calls} <= {tool_name(tool) for tool in tools}:
        return "calling an unknown tool"
    if must_match is not None and re.fullmatch(must_match, message.content, re.DOTALL) is None:
        return "not matching must_match"
    return None


def _texts(message: Message) -> list[str]:
    calls = [json.dumps([call.name, call.arguments], ensure_ascii=False) for call in message.tool_calls]
    return [message.content, message.reasoning_content or "", *calls]


def _prompts(config: Config) -> Iterator[Conversation]:
    """What is asked, each prompt once."""
    seen: set[str] = set()
    for _, asked in read_parsed(config.prompts, parse_prompt):
        prompt = asked.conversation
        if _key(prompt) not in seen:
            seen.add(_key(prompt))
            yield prompt
        if len(seen) == config.max_rows:
            return


def _key(prompt: Conversation) -> str:
    """Of all that is sent and written: messages with thoughts and calls, tools."""
    return hashlib.blake2b(canonical(prompt), digest_size=16).hexdigest()


def _answered(out: Path) -> set[str]:
    """Prompts that the file answers; a last line that a kill cut short is taken off."""
    whole, keys = 0, set()
    with open(out, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                conversation = parse_conversation(parse_row(line))
            except RowError as error:
                raise UserError(f"{out}:{number}: not written by this command ({error}): give another --out") from None
            keys.add(_key(Conversation(conversation.messages[:-1], conversation.tools)))
    os.truncate(out, whole)
    return keys
