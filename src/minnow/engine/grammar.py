"""Answers that obey a grammar: JSON schemas, regular expressions and tool calls, through llguidance.

A grammar is text in llguidance's form of Lark: `%json` holds a JSON schema, `<[8]>` is the token 8. The functions
here write the usual ones. JSON is written as the chat template writes it, with one blank after a comma and a colon
and none elsewhere: so models are trained, and a weak one cannot fill its context with blanks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minnow.config import UserError
from minnow.tokenizer.special import END_TOOL_CALL, TOOL_CALL
from minnow.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: Mapping[str, Any] | None = None) -> str:
    """JSON that obeys a JSON schema; without one, any JSON object."""
    return f"start: %json {schema_text(schema or {'type': 'object'})}\n"


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression (Rust's syntax, no look-around) matches as a whole."""
    # The grammar writes it between slashes. What a backslash stands before is escaped already.
    escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL)
    return f"start: TEXT\nTEXT: /{escaped}/\n"


def tool_call_grammar(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """One call of one of the tools or more, as the chat template writes them (`call_rules`)."""
    return 'start: call ("\\n" call)*\n' + call_rules(tokenizer, tools)


def call_rules(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """The rule `call` and what it needs: a call of one of the tools.

    tools: {"name": ..., "parameters": JSON schema of the arguments} each. UserError where the tokenizer cannot chat.
    """
    tokenizer.require_chat_tokens()
    begin, end = (f"<[{tokenizer.special_ids[mark]}]>" for mark in (TOOL_CALL, END_TOOL_CALL))
    names = " | ".join(f"tool_{number}" for number in range(len(tools)))
    lines = [f'call: {begin} "\\n" ({names}) "\\n" {end}']
    for number, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool["name"], ensure_ascii=False)}, "arguments": ')
        lines.append(f'tool_{number}: {head} %json {schema_text(tool.get("parameters") or {"type": "object"})} "}}"')
    return "\n".join(lines) + "\n"


def schema_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a grammar holds it behind `%json`, with how the JSON is written."""
    return json.dumps({**schema, "x-guidance": _WRITING})


class GrammarError(UserError):
    """llguidance gives an answer's grammar up: too large, or nothing can follow."""


class Grammars:
    """Compiles grammars for one tokenizer. UserError where llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError as error:
            raise UserError("constrained answers need llguidance: pip install 'minnow[serve]'") from error
        self._make = llguidance.LLMatcher
        self._vocab_size, self.end_ids = vocab_size, list(end_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, end_ids[0])), n_vocab=vocab_size, eos_token=list(end_ids)
        )

    def constraint(self, grammar: str) -> Constraint:
        """The state before the first token. UserError where the grammar is not valid or too large (GrammarError)."""
        constraint = Constraint(self._make(self._tokenizer, grammar))
        # Some grammars llguidance finds too large only when it follows them: it takes one token now, on a copy. Without
        # torch: any thread may come here, and one that computes with it slows the engine's down (see minnow.cpu).
        trial = constraint.copy()
        begins_V = trial.allowed_array(self._vocab_size)
        begins_V[self.end_ids] = False
        trial.accept(int(begins_V.argmax()) if begins_V.any() else self.end_ids[0])
        return constraint


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def copy(self) -> Constraint:
        """The same state, to go its own way."""
        return Constraint(self._matcher.deep_copy())

    def allowed(self, vocab_size: int, device: torch.device) -> Tensor:
        """Tokens that may come next: bool [V]. The end tokens are among them where the answer may end.

        Where llguidance gives the grammar up, only these: `accept` says so then.
        """
        return torch.from_numpy(self.allowed_array(vocab_size)).to(device)

    def allowed_array(self, vocab_size: int) -> NDArray[np.bool_]:
        """The same without torch."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little", count=vocab_size).astype(bool)

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which was allowed. Raises GrammarError."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[0]  # the whole grammar stands below
            raise GrammarError(f"the answer's grammar (or JSON schema) cannot be followed: {shorten(reason, 300)}")

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        names = {index: name.encode() for name, index in tokenizer.special_ids.items()}
        self.tokens = [names.get(index, string) for index, string in enumerate(tokenizer.byte_strings)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)
