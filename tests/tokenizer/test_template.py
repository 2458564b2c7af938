"""A model folder's own chat template is kept, and told apart from minnow's by what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tokenizer.tokenizer_helpers import CHATML
from tokenizer_helpers import small_tokenizer
from transformers import AutoTokenizer

from minnow.config import UserError
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.template import PROBES, chat_template, differences


def test_templates_are_compared_by_what_they_write() -> None:
    assert differences(chat_template()) == []
    assert differences("{#- The same, in other words. #}" + chat_template()) == []
    assert differences(CHATML) == list(PROBES)
    begins = "{{- bos_token }}" + chat_template()
    assert differences(begins) == list(PROBES), "minnow starts no conversation with a token of its own"
    silent = chat_template().replace("reasoning and loop.index0 > ns.last_user", "false")
    assert differences(silent) == ["thoughts"]
    assert differences("{{ raise_exception('no tools') if tools }}" + chat_template()) == ["tools"]
    assert differences("{% if %}") == list(PROBES)
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    assert differences(endless) == list(PROBES)


@pytest.mark.parametrize("where", ["file", "config", "named"])
def test_a_folder_keeps_its_template(tmp_path: Path, where: str) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    else:
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        config["chat_template"] = CHATML if where == "config" else named
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == CHATML
    with pytest.raises(UserError, match="came with another chat template than minnow's"):
        tokenizer.require_chat_template("model")
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == CHATML
    small_tokenizer().require_chat_template("model")
