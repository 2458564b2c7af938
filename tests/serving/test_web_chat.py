"""The page at `/`: what it is made of, who may have it, and the tools it may run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from minnow.config import UserError
from minnow.serving import ServingConfig, web_chat

from ..stages.stage_helpers import save_parrot_model
from .serving_helpers import Running, serving

WEB = Path(web_chat.__file__).parent / "web"


def test_the_page_and_its_files_forbid_foreign_code(running: Running) -> None:
    for path in ("/", *(f"/chat/{file.name}" for file in WEB.iterdir() if file.suffix != ".html")):
        answer = httpx.get(running.url + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy  # what the page knows can be sent nowhere else
        for never in ("base-uri", "form-action", "frame-ancestors"):  # which default-src does not speak of
            assert f"{never} 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/chat/nothing.js", "/docs", "/redoc"):  # FastAPI's own pages load scripts from elsewhere
        assert httpx.get(running.url + path).status_code == 404
    assert httpx.get(f"{running.url}/chat/..%2Fapp.py").status_code == 404


def test_no_file_names_another_host_or_writes_html() -> None:
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://\w", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\son\w+=", text), (
            file.name
        )


def test_a_key_guards_the_page_and_the_tools(tmp_path: Path) -> None:
    model = save_parrot_model(tmp_path / "m", "pond in§<|im_end|>§")
    with serving({"m": model}, ServingConfig(api_key="k")) as running:
        for path in ("/", "/chat/app.js", "/chat/tools"):
            assert httpx.get(running.url + path).status_code == 401
            assert httpx.get(running.url + path, auth=("me", "k")).status_code == 200
        body = {"name": "calculate", "arguments": '{"expression": "1+1"}'}
        assert httpx.post(f"{running.url}/chat/tool", json=body).status_code == 401


def test_tools_answer_and_tell_the_model_what_it_did_wrong(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"小鱼": {"colour": "silver"}}', encoding="utf-8")
    model = save_parrot_model(tmp_path / "m", "pond in§<|im_end|>§")
    with serving({"m": model}, ServingConfig(chat_table=str(table))) as running:

        def call(name: str, arguments: str) -> str:
            body = {"name": name, "arguments": arguments}
            return httpx.post(f"{running.url}/chat/tool", json=body).json()["content"]

        offered = httpx.get(f"{running.url}/chat/tools").json()["tools"]
        assert [tool["function"]["name"] for tool in offered] == ["calculate", "clock", "look_up"]
        assert call("calculate", '{"expression": "17 * 3"}') == "51"
        assert call("look_up", '{"subject": "小鱼", "property": "colour"}') == "silver"
        wrong = (
            ("python", "{}"),
            ("calculate", "[1]"),
            ("calculate", "{"),
            ("calculate", '{"expression": "open(1)"}'),
            ("clock", '{"\\ud83d": 1}'),  # half a surrogate pair, which has no UTF-8
        )
        for name, arguments in wrong:
            assert "error" in json.loads(call(name, arguments))


def test_a_table_that_is_none(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    for text in ("[]", '{"a": 1}', '{"a": {"b": 1}}', "{"):
        table.write_text(text)
        with pytest.raises(UserError, match="chat_table"):
            web_chat.chat_tools(str(table))
