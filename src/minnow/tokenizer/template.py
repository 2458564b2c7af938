"""Chat templates: minnow's own, a model folder's, and whether the two say the same.

minnow renders every conversation by its own template (`minnow.tokenizer.chat`). A model that was taught another form
would be trained, judged or asked in a language that it does not speak, and nothing would fail: so the two are compared.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from minnow.json_file import read_json

_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
_ASK, _ANSWER = {"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Answer."}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}

PROBES: dict[str, dict[str, Any]] = {
    "a question": {"messages": [_ASK], "add_generation_prompt": True, "enable_thinking": False},
    "a question to think about": {"messages": [_ASK], "add_generation_prompt": True, "enable_thinking": True},
    "an answer": {"messages": [_ASK, _ANSWER]},
    "a system message": {"messages": [{"role": "system", "content": "Rule."}, _ASK, _ANSWER]},
    "several turns": {"messages": [_ASK, _ANSWER, _ASK], "add_generation_prompt": True, "enable_thinking": False},
    "thoughts": {"messages": [_ASK, {**_ANSWER, "reasoning_content": "Thought."}]},
    "tools": {"messages": [_ASK, _CALLING, {"role": "tool", "content": "3"}, _ANSWER], "tools": [_TOOL]},
}
"""What templates are compared by, each under what it is about."""


@cache
def chat_template() -> str:
    """minnow's chat template (Jinja)."""
    return (resources.files("minnow.tokenizer") / "chat_template.jinja").read_text(encoding="utf-8")


def folder_template(folder: Path) -> str | None:
    """The chat template (Jinja) of a model folder; None for one without."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template if isinstance(template, str) else None


def differences(template: str) -> list[str]:
    """Names of the `PROBES` that `template` renders otherwise than minnow's does, or not at all."""
    if template == chat_template():
        return []
    return [about for about, probe in PROBES.items() if _render(template, probe) != _render(chat_template(), probe)]


def _render(template: str, probe: dict[str, Any]) -> str | None:
    """As transformers renders it, in a sandbox; None where the template refuses or is none."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(template).render(bos_token="<s>", eos_token="<|im_end|>", **probe)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError):
        return None
