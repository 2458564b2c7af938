"""The web chat in headless Chromium, as a person uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minnow.data.readers import read_rows
from minnow.data.records import parse_conversation
from minnow.tokenizer.chat import Message, ToolCall

from .serving_helpers import Running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture
def page(running: Running) -> Iterator[Any]:
    """The open page; afterwards: it asked no other host and no script failed."""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(locale="en-GB")
        page.set_default_timeout(20_000)
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(running.url)
        page.wait_for_selector(".hello")
        yield page
        assert errors == []
        assert asked
        assert all(url.startswith((running.url, "data:", "blob:")) for url in asked), asked
        browser.close()


def choose(page: Any, model: str, max_tokens: str = "20") -> None:
    page.select_option("#model", model)
    page.fill("#max_tokens", max_tokens)


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    page.wait_for_selector(".assistant")
    page.wait_for_selector("body:not(.running)")


def script_answers(
    page: Any, *answers: list[dict[str, Any]] | str | None, reason: str | None = ""
) -> list[dict[str, Any]]:
    """Answer the page's requests with these deltas, in turn; the bodies it sent. A text: that error; None: nothing.
    reason: the first answer's finish_reason where it is not the usual one; None where it breaks off before."""
    bodies: list[dict[str, Any]] = []

    def fulfil(route: Any) -> None:
        deltas = answers[len(bodies)]
        bodies.append(route.request.post_data_json)
        if deltas is None:
            return
        if isinstance(deltas, str):
            route.fulfill(
                content_type="text/event-stream", body=f"data: {json.dumps({'error': {'message': deltas}})}\n\n"
            )
            return
        usual = "tool_calls" if any("tool_calls" in delta for delta in deltas) else "stop"
        finish = usual if reason == "" or len(bodies) > 1 else reason
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        if finish is not None:
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        body += "data: [DONE]\n\n" if finish is not None else ""
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfil)
    return bodies


def export(page: Any, button: str, folder: Path) -> Path:
    """The file that the button saves."""
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


CALL: list[dict[str, Any]] = [
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                     "function": {"name": "calculate", "arguments": '{"expression": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"17 * 3"}'}}]},
]  # fmt: skip


def test_a_conversation_with_two_models(page: Any) -> None:
    choose(page, "parrot")
    say(page, "你好")
    assert page.inner_text(".user .text") == "你好"
    assert page.inner_text(".assistant .text") == "小鱼 swims"
    assert "tokens/s" in page.inner_text(".stats")
    choose(page, "thinker")
    page.check("#thinking")
    say(page, "and you?")
    assert page.inner_text(".assistant:last-child .text") == "yes"
    assert page.get_attribute("details:visible", "open") is None
    assert page.text_content(".assistant:last-child .thoughts") == "hm 小"
    page.reload()
    page.wait_for_selector(".assistant:nth-child(4)")  # the tab remembers it


def test_regenerate_edit_clear_and_language(page: Any) -> None:
    choose(page, "parrot")
    say(page, "one")
    say(page, "two")
    page.click(".assistant:last-child .regenerate")
    page.wait_for_selector("body:not(.running)")
    assert page.locator("article").count() == 4
    page.click("article:first-child .edit")
    page.fill("article textarea", "three")
    page.click(".save")
    page.wait_for_selector("body:not(.running)")
    assert page.locator("article").count() == 2
    assert page.inner_text(".user .text") == "three"
    page.click("#language")
    assert page.inner_text("#send") == "发送"
    page.click("#clear")
    assert page.locator("article").count() == 0
    assert page.inner_text(".hello") == "想聊点什么？"


def test_stop_aborts_on_the_server_too(page: Any, running: Running) -> None:
    choose(page, "wide", "4000")
    tokenizer = running.engines["wide"].engine.tokenizer  # a random model stops when it likes
    never_ends = {"logit_bias": {str(stop): -100 for stop in tokenizer.stop_ids}}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | never_ends)),
    )
    page.fill("#input", "go on")
    page.press("#input", "Enter")
    page.wait_for_selector(".assistant:not(.waiting)")
    page.click("#stop")
    page.wait_for_selector("body:not(.running)")
    assert "stopped" in page.inner_text(".stats")
    page.wait_for_timeout(1000)
    assert running.engines["wide"].in_flight == 0


def test_errors_are_shown(page: Any) -> None:
    choose(page, "noise", "20")
    say(page, "long " * 400)
    assert "256" in page.inner_text(".error")


def test_what_a_model_writes_never_runs(page: Any) -> None:
    evil = (
        "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\n\n[a](javascript:window.hit=1) "
        "[b](data:text/html,x) [c](https://example.org/a)\n\n```<b>\n<script>window.hit=1</script>\n```\n**bold** `x`"
    )
    script_answers(page, [{"reasoning_content": evil}, {"content": evil}])
    say(page, evil)
    assert page.evaluate("window.hit") is None
    assert page.locator("article script, article img").count() == 0
    links = page.locator("article a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/a"]
    assert "noopener" in links.get_attribute("rel")
    assert page.inner_text(".assistant strong") == "bold"
    assert page.text_content(".assistant .code code") == "<script>window.hit=1</script>"
    # The second wall: even where markup got in, no script of the page's own would run.
    page.evaluate("document.body.innerHTML += `<img src=x onerror='window.hit=1'>`")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None


def test_tools_run_in_a_loop(page: Any, tmp_path: Path) -> None:
    bodies = script_answers(page, CALL, [{"content": "It is 51."}])
    page.check("#tools")
    say(page, "17 * 3?")
    assert page.inner_text(".tool") == "51"
    assert page.inner_text(".assistant:last-child .text") == "It is 51."
    assert [tool["function"]["name"] for tool in bodies[0]["tools"]] == ["calculate", "clock"]
    assert bodies[1]["messages"][-1] == {"role": "tool", "tool_call_id": "call_1", "content": "51"}
    saved = json.loads(export(page, "#json", tmp_path).read_text(encoding="utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_a_call_without_a_result_is_not_kept(page: Any, how: str) -> None:
    """The server refuses a conversation with one, so that every further question failed."""
    bodies = script_answers(page, CALL, [{"content": "Hello."}])
    called = []

    def tool(route: Any) -> None:
        called.append(route)
        if how == "failed":
            route.fulfill(status=500, json={"error": {"message": "the tool is broken"}})

    page.route("**/chat/tool", tool)  # stopped: it never answers
    page.check("#tools")
    page.fill("#input", "17 * 3?")
    page.press("#input", "Enter")
    if how == "stopped":
        page.wait_for_timeout(500)
        page.click("#stop")
    page.wait_for_selector("body:not(.running)")
    assert called
    assert page.locator(".tool").count() == 0
    assert ("the tool is broken" in page.inner_text("article.assistant")) == (how == "failed")
    page.unroute("**/chat/tool")
    say(page, "hi")
    assert page.inner_text(".assistant:last-child .text") == "Hello."
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "user"]


def test_a_saved_conversation_is_a_row_for_sft(page: Any, tmp_path: Path) -> None:
    """With the system prompt and the tools, without what an error or a stop left empty; so are later requests."""
    bodies = script_answers(page, "no luck", None, CALL, [{"content": "It is 51."}])
    page.fill("#system", "Be brief. 简短。")
    page.check("#tools")
    say(page, "one")
    assert "no luck" in page.inner_text(".error")
    page.fill("#input", "two")
    page.press("#input", "Enter")
    page.wait_for_selector("body.running")
    page.click("#stop")
    page.wait_for_selector("body:not(.running)")
    say(page, "17 * 3?")
    assert [message["role"] for message in bodies[2]["messages"]] == ["system", "user", "user", "user"]
    page.uncheck("#tools")
    ((_, row),) = read_rows([str(export(page, "#json", tmp_path))])
    call = ToolCall("calculate", {"expression": "17 * 3"})
    read = parse_conversation(row)
    assert read.messages == (
        Message("system", "Be brief. 简短。"),
        *(Message("user", text) for text in ("one", "two", "17 * 3?")),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "51"),
        Message("assistant", "It is 51."),
    )
    assert list(read.tools) == bodies[0]["tools"]
    text = export(page, "#markdown", tmp_path).read_text(encoding="utf-8")
    assert text.startswith("## system\n\nBe brief. 简短。\n\n## user\n\none\n\n## user")
    assert "## tools\n\n- calculate: " in text


@pytest.mark.parametrize(("reason", "told"), [("length", "longest length"), (None, "connection ended")])
def test_a_call_that_is_cut_off_is_not_kept(page: Any, reason: str | None, told: str) -> None:
    """Half its arguments are no JSON: the server refused every further question."""
    bodies = script_answers(page, CALL[:1], [{"content": "Hello."}], reason=reason)
    page.check("#tools")
    say(page, "17 * 3?")
    assert told in page.inner_text(".stats")
    say(page, "hi")
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "user"]
    assert page.inner_text(".assistant:last-child .text") == "Hello."


@pytest.mark.parametrize(
    "broken",
    [
        "for (const name of ['localStorage', 'sessionStorage'])"
        "  Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});",
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
        "Storage.prototype.getItem = () => '{half';",
        "Storage.prototype.getItem = () => 'null';",
    ],
    ids=["forbidden", "full", "null"],
)
def test_the_page_works_without_storage(page: Any, broken: str) -> None:
    page.add_init_script(broken)
    page.reload()
    page.wait_for_selector(".hello")
    page.wait_for_selector("#model option", state="attached")
    choose(page, "parrot")
    say(page, "hi")
    assert page.inner_text(".assistant .text") == "小鱼 swims"
    page.click("#clear")
    page.wait_for_selector(".hello")


def test_enter_in_an_input_method_sends_nothing(page: Any) -> None:
    """Safari ends the composition before it tells of the Enter, and marks that by its code alone."""
    page.fill("#input", "nihao")
    for init in ("{key: 'Enter', isComposing: true}", "{key: 'Enter', keyCode: 229}"):
        page.evaluate(f"document.getElementById('input').dispatchEvent(new KeyboardEvent('keydown', {init}))")
    assert page.locator("article").count() == 0
    assert page.input_value("#input") == "nihao"


@pytest.mark.parametrize("clipboard", [True, False])
def test_copying_code(page: Any, clipboard: bool) -> None:
    """A colleague's browser has no navigator.clipboard: the page comes over http and from another machine."""
    if clipboard:
        page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    else:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        page.evaluate("document.addEventListener('copy', () => { window.copied = getSelection().toString(); })")
    script_answers(page, [{"content": "```python\na = 1\n  b = 2\n```"}])
    say(page, "code?")
    page.click(".copy")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("window.copied") == "a = 1\n  b = 2"


def test_what_was_opened_and_where_was_read_stay_as_they_are(page: Any) -> None:
    """The page was drawn anew at the end of each answer: the thoughts folded, and it jumped to the end."""
    long = "\n\n".join(f"line {i}" for i in range(100))
    script_answers(page, [{"reasoning_content": "hm"}, {"content": long}], [{"content": long}])
    say(page, "one")
    page.click("summary")
    page.evaluate("document.querySelector('.thoughts').before('kept')")
    page.evaluate(
        "new MutationObserver(() => { document.getElementById('scroll').scrollTop = 7; })"
        ".observe(document.body, {attributeFilter: ['class']})"
    )  # reads further up when the answer ends
    say(page, "two")
    page.wait_for_timeout(300)
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 7
    assert page.locator("details[open]").count() == 1
    assert "kept" in page.inner_text("details[open]")


def test_the_keyboard_and_a_screen_reader(page: Any) -> None:
    script_answers(page, [{"content": "one"}], None, CALL, [{"content": "It is 51."}])

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    assert page.get_attribute("#toggle", "aria-expanded") == "true"
    page.click("#toggle")
    assert page.get_attribute("#toggle", "aria-expanded") == "false"
    page.click("#toggle")
    say(page, "hi")
    page.focus(".edit")
    page.keyboard.press("Enter")
    assert page.get_attribute("article textarea", "aria-label") == "Edit"
    page.keyboard.press("Escape")
    assert focused() == "edit quiet"
    page.focus(".regenerate")
    page.keyboard.press("Enter")
    page.wait_for_selector("body.running")
    assert focused() == "stop"
    assert page.get_attribute("#messages", "aria-busy") == "true"
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.running)")
    assert focused() == "input"
    assert page.get_attribute("#messages", "aria-busy") == "false"
    page.check("#tools")
    say(page, "17 * 3?")
    labels = [article.get_attribute("aria-label") for article in page.locator("article").all()]
    assert labels == ["You", "Model", "You", "Model", "Result", "Model"]


def test_stars_without_end_do_not_stop_the_page(page: Any) -> None:
    """Drawn for every token; 16,000 of them took three seconds each time."""
    page.evaluate("import('/chat/markdown.js').then((module) => { window.markdown = module; })")
    page.wait_for_timeout(300)
    draw = (
        "(text) => { const at = performance.now(); markdown.renderMarkdown(text, {}); return performance.now() - at; }"
    )
    for text in ("*" * 16_000, "**a " * 4000, "**" * 4000 + "a" + "**" * 4000):
        assert page.evaluate(draw, text) < 1000
    script_answers(page, [{"content": "**** ***both*** **bold** *it* `a*b`"}])
    say(page, "hi")
    assert page.inner_text(".assistant .text") == "**** both bold it a*b"
    assert page.inner_text(".assistant strong em") == "both"


def test_a_question_outlives_a_reload_in_the_middle_of_its_answer(page: Any) -> None:
    script_answers(page, None, [{"content": "Hello."}])
    page.fill("#input", "hi")
    page.press("#input", "Enter")
    page.wait_for_selector("body.running")
    page.fill("#system", "Be brief.")  # what is kept then, too, is no half answer
    page.reload()
    page.wait_for_selector(".user")
    assert page.locator("article").count() == 1
    page.click(".edit")
    page.click(".save")
    page.wait_for_selector("text=Hello.")


def test_a_server_that_comes_back_with_another_model(page: Any) -> None:
    choose(page, "parrot")
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.wait_for_selector(".error")
    say(page, "hi")  # there is no model to choose yet
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "noise"}, {"id": "thinker"}]}))
    page.click(".regenerate")
    page.wait_for_selector("#model option[value=noise]", state="attached")
    page.wait_for_selector("body:not(.running)")
    page.select_option("#model", "thinker")
    page.click(".regenerate")
    page.wait_for_selector("text=yes")


def test_a_long_model_name_on_a_narrow_screen(page: Any) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "org/" + "long-name" * 9}]}))
    page.set_viewport_size({"width": 340, "height": 700})
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == 340
    assert page.get_attribute("#toggle", "aria-expanded") == "false"
