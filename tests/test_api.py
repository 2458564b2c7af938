"""`minnow.load`: README's lines as they stand, and each method against the plain way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minnow
from minnow.api import Model
from minnow.config import UserError
from minnow.engine import SamplingParams
from minnow.engine.grammar import regex_grammar
from minnow.engine.sampler import Sampled
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.lora import LoraConfig, add_lora, lora_layers
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer.chat import Conversation, Message, ToolCall, render
from minnow.tokenizer.images import Image
from minnow.tokenizer.train import train_tokenizer

from .seeing import data_url, picture, picture_file, save_seeing_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(["the little minnow swims in the pond. 小鱼在池塘里游泳。"] * 10, 320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    model = CausalLM(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    where = tmp_path_factory.mktemp("api") / "runs/quickstart"
    save_pretrained(model, where / "model", tokenizer)
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return minnow.load(folder, device="cpu", precision="fp32")


def test_readme(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [re.findall(r"```python\n(import minnow.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
              for name in ("README.md", "README.zh.md")]  # fmt: skip
    assert blocks[0] == blocks[1]
    (block,) = blocks[0]
    monkeypatch.chdir(folder.parents[1])
    # random weights may end an answer at once: one chance in some hundreds, were the seed drawn
    monkeypatch.setattr("minnow.engine.engine.secrets.randbits", lambda bits: 1)
    exec(compile(block, "README.md", "exec"), {})  # our own text
    assert capsys.readouterr().out


def test_the_package_alone_does_not_load_torch() -> None:
    code = "import sys, minnow; assert 'torch' not in sys.modules; minnow.load; assert 'torch' in sys.modules"
    # What only several processes or pictures need costs a second of imports each.
    stages = ("chat", "serve", "generate", "eval", "export")
    code += f"; import minnow.report.run_report, {', '.join(f'minnow.stages.{stage}' for stage in stages)}"
    code += "; assert not {'torch.distributed.tensor', 'torch.distributed.fsdp', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="lood"):
        minnow.lood  # noqa: B018


def test_functions_may_come_without_their_wrapper(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was taught tools has read them in it, whatever its rows had."""
    read: list[Conversation] = []
    short = Conversation((Message("user", "fish?"),))  # the description of tools does not fit the context
    monkeypatch.setattr("minnow.api.render", lambda t, c, **options: read.append(c) or render(t, short, **options))
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
    for tool in (function, {"type": "function", "function": function}):
        model.chat("fish?", tools=[tool], max_tokens=1)
    assert read[0].tools == read[1].tools == ({"type": "function", "function": function},)


def test_a_tool_without_a_name_is_refused(model: Model) -> None:
    """The model read of a function with nothing in it."""
    for tool in ({"type": "code_interpreter"}, {"type": "function", "function": {"parameters": {}}}, {"name": ""}):
        with pytest.raises(UserError, match="tool 2 of `tools` has no `name`"):
            model.chat("fish?", tools=[{"name": "look_up"}, tool], max_tokens=1)


def test_chat_is_the_engine_on_the_rendered_messages(model: Model) -> None:
    barred = dict.fromkeys(range(3, 32), -100.0)  # control tokens, which random weights would say
    options = {"temperature": 0.0, "max_tokens": 30, "logit_bias": barred}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "鱼?"}]
    for thinking in (False, True):
        conversation = Conversation(tuple(Message(**m) for m in messages))
        prompt = render(model.tokenizer, conversation, add_generation_prompt=True, enable_thinking=thinking).ids
        text = model.engine.generate([prompt.tolist()], SamplingParams(**options))[0].completions[0].text
        answer = model.chat(messages, thinking=thinking, **options)
        assert answer == (Message("assistant", "", text.strip()) if thinking else Message("assistant", text.lstrip()))
    assert model.chat("鱼?", **options) == model.chat(messages[1:], **options)


CALL = '§<tool_call>§\n{"name": "add", "arguments": {"a": [1, 2], "b": "鱼"}}\n§</tool_call>§'
CALLS = (ToolCall("add", {"a": [1, 2], "b": "鱼"}),)
ODD = 'Hm\n§<tool_call>§{"name": "add", "arguments": {"a":§</tool_call>§\n or 1'


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("I am a small fish.", {"stop": "small"}, Message("assistant", "I am a ")),
        ("I am a small fish.", {"stop": "small", "thinking": True}, Message("assistant", "", "I am a")),
        ("hm\n§</think>§\n\n a drum. ", {"thinking": True}, Message("assistant", "a drum. ", "hm")),
        ("hm§</think>§a small fish", {"thinking": True, "stop": "small"}, Message("assistant", "a ", "hm")),
        (" \n小鱼 ", {}, Message("assistant", "小鱼 ")),
        ("a§</think>§b", {}, Message("assistant", "a</think>b")),
        ("a </think> b <tool_call>", {}, Message("assistant", "a </think> b <tool_call>")),
        (f"Look:\n{CALL}", {}, Message("assistant", "Look:", tool_calls=CALLS)),
        (f"{CALL}\n{CALL}", {}, Message("assistant", "", tool_calls=CALLS * 2)),
        (ODD, {}, Message("assistant", ODD.replace("§", ""))),
        (CALL.removesuffix("\n§</tool_call>§"), {}, Message("assistant", CALL.replace("§", "")[:-13])),
    ],
)
def test_a_stream_joined_is_the_content(
    model: Model, monkeypatch: pytest.MonkeyPatch, script: str, options: dict[str, Any], expected: Message
) -> None:
    ids = [
        index
        for i, part in enumerate(script.split("§"))
        for index in ([model.tokenizer.special_ids[part]] if i % 2 else model.tokenizer.encode(part))
    ]
    ids.append(model.tokenizer.im_end_id)

    def say(logits: torch.Tensor, rows: list[Any]) -> Sampled:
        return Sampled([ids[len(row.ids)] for row in rows], None, None, None)

    monkeypatch.setattr(model.engine, "_sampler", say)
    options = options | {"max_tokens": None}
    assert model.chat("q", **options) == expected
    assert "".join(model.chat("q", stream=True, **options)) == expected.content


def test_streaming_what_random_weights_say(model: Model) -> None:
    for seed in range(8):
        options = {"seed": seed, "max_tokens": 40, "thinking": seed % 2 == 1}
        assert "".join(model.chat("Who?", stream=True, **options)) == model.chat("Who?", **options).content
    options = {"seed": 3, "max_tokens": 40}
    assert "".join(model.generate("the", stream=True, **options)) == model.generate("the", **options)


def test_several_texts_at_once(model: Model) -> None:
    options = {"temperature": 0.0, "max_tokens": 10}
    prompts = ["the", "小鱼", ""]
    assert model.generate(prompts, **options) == [model.generate(prompt, **options) for prompt in prompts]
    with pytest.raises(UserError, match="one text"):
        model.generate(prompts, stream=True)


def test_logprobs(model: Model) -> None:
    live, tokenizer = model.engine.model, model.tokenizer
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("the pond"), *tokenizer.encode(" 小鱼")]
    with torch.no_grad():
        hidden = live(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
        full = live.logits(hidden)[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    got = model.logprobs(" 小鱼", prompt="the pond")
    assert [item.id for item in got] == tokenizer.encode(" 小鱼")
    assert [item.logprob for item in got] == pytest.approx(full[-len(got) :].tolist(), abs=1e-5)
    assert "".join(item.text for item in model.logprobs("the pond")) == "the pond"
    assert model.logprobs("") == []


def test_embed(model: Model) -> None:
    live, tokenizer = model.engine.model, model.tokenizer
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("the pond")]
    with torch.no_grad():
        hidden = live(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())[0]
    expected = hidden.mean(0) / hidden.mean(0).norm()
    torch.testing.assert_close(model.embed("the pond"), expected, atol=1e-5, rtol=0)
    both = model.embed(["the pond", "a much longer text about fish"])
    torch.testing.assert_close(both[0], expected, atol=1e-5, rtol=0)
    assert both.shape == (2, 32)
    assert model.embed([]).shape == (0, 32)


def test_bad_input_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        minnow.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no messages"):
        model.chat([])
    for stream in (False, True):
        with pytest.raises(UserError, match="n is 2"):
            model.chat("q", n=2, stream=stream)
        with pytest.raises(UserError, match="n is 2"):
            model.generate("q", n=2, stream=stream)
    for stream in (False, True):
        # Unrefused, all of the answer is taken for thoughts, and what a stop string cut off is let through.
        with pytest.raises(UserError, match="grammar would begin in the thoughts"):
            model.chat("q", grammar=regex_grammar("[ab]{3}"), thinking=True, stream=stream)
        with pytest.raises(UserError, match="skip_special_tokens=False"):
            model.chat("q", skip_special_tokens=False, stream=stream)
    assert re.fullmatch("[ab]{3}", model.chat("q", grammar=regex_grammar("[ab]{3}")).content)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x", temprature=1.0)


def test_adapters_beside_the_model(folder: Path, model: Model, tmp_path: Path) -> None:
    """Each method with `adapter` is the merged model's, and without it the base's."""
    adapted = load_pretrained(folder)
    add_lora(adapted, LoraConfig(rank=4), base=str(folder.resolve()))
    with torch.no_grad():
        for layer in lora_layers(adapted).values():
            layer.lora_B.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    save_pretrained(adapted, tmp_path / "own", model.tokenizer)
    both = minnow.load(folder, device="cpu", precision="fp32", adapters={"own": tmp_path / "own"})
    merged = minnow.load(tmp_path / "own", device="cpu", precision="fp32")
    greedy = {"temperature": 0.0, "max_tokens": 12}
    for name, alone in (("own", merged), (None, model)):
        assert both.generate("the pond", adapter=name, **greedy) == alone.generate("the pond", **greedy)
        assert both.chat("the pond", adapter=name, **greedy) == alone.chat("the pond", **greedy)
        torch.testing.assert_close(both.embed(["the pond", "鱼"], adapter=name), alone.embed(["the pond", "鱼"]))
        found, expected = both.logprobs("swims", prompt="it", adapter=name), alone.logprobs("swims", prompt="it")
        assert [item.logprob for item in found] == pytest.approx([item.logprob for item in expected], abs=1e-4)
    assert not torch.allclose(model.embed("the pond"), merged.embed("the pond"), atol=1e-2)
    with pytest.raises(UserError, match="no adapter 'other' here; there are: own"):
        both.embed("the pond", adapter="other")


def test_a_picture_is_a_path_or_bytes_or_a_data_url(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees = minnow.load(save_seeing_model(tmp_path / "m"), device="cpu", precision="fp32")
    options = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    picture_file(tmp_path, 0)
    monkeypatch.chdir(tmp_path)

    def said(seeing: Model, shown: object) -> str:
        content = [{"type": "image", "image": shown}, {"type": "text", "text": "What is this?"}]
        return seeing.chat([{"role": "user", "content": content}], **options).content

    asked = Conversation((Message("user", "What is this?", images=(Image(picture(0)),)),))
    prompt = render(sees.tokenizer, asked, add_generation_prompt=True)
    expected = sees.engine.generate([prompt], SamplingParams(**options))[0].completions[0].text.lstrip()
    for shown in ("0.png", str(tmp_path / "0.png"), picture(0), data_url(picture(0))):
        assert said(sees, shown) == expected
    assert said(sees, picture(1)) != expected
    for shown, wrong in (
        ("nowhere.png", "nowhere.png, and there is no such file"),
        ("https://example.org/a.png", "pictures are not downloaded"),
        (b"no picture", "not a picture that can be read"),
        ("data:image/png;base64,é", "is no base64"),
        (5, "must be a path or a `data:` URL"),
    ):
        with pytest.raises(UserError, match=wrong):
            said(sees, shown)
    with pytest.raises(UserError, match="reads text only"):
        said(model, picture(0))
