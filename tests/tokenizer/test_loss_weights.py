"""What carries loss, and that a trained turn stands behind exactly the prompt it is served behind."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from tokenizer_helpers import conversations, small_tokenizer
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from minnow.config import UserError
from minnow.tokenizer import SPECIAL_TOKENS, Conversation, Message, Rendered, Tokenizer, ToolCall, render
from minnow.tokenizer.bytelevel import GPT2_PATTERN
from minnow.tokenizer.chat import training_examples, written_texts


def shown(example: Rendered) -> str:
    """The rendered text, what carries loss between [ ]."""
    text = ""
    pairs = zip(example.ids.tolist(), example.weights.tolist(), strict=True)
    for weight, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = small_tokenizer().decode([index for index, _ in run])
        text += f"[{part}]" if weight == 1.0 else part
    return text


def conversation(*messages: Message) -> Conversation:
    return Conversation(messages)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, reasoning: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", text, reasoning, calls)


HEAD = "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def test_an_answer_and_its_end_carry_loss_and_an_empty_think_block_does_not() -> None:
    example = render(small_tokenizer(), conversation(Message("system", "Be kind."), user("hi"), assistant("ho")))
    assert shown(example) == (
        f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{HEAD}{EMPTY}[ho<|im_end|>]\n"
    )


def test_reasoning_carries_loss_with_its_think_block() -> None:
    example = render(small_tokenizer(), conversation(user("hi"), assistant("\n ho", "\n hm \n")))
    assert shown(example) == f"<|im_start|>user\nhi<|im_end|>\n{HEAD}[<think>\nhm\n</think>\n\nho<|im_end|>]\n"


def test_tool_calls_carry_loss_and_results_do_not() -> None:
    call = ToolCall("weather", {"city": "北京"})
    messages = (user("hi"), assistant("", None, call, call), Message("tool", "3"), Message("tool", "4"), assistant("5"))
    tool_call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert shown(render(small_tokenizer(), Conversation(messages))) == (
        f"<|im_start|>user\nhi<|im_end|>\n{HEAD}{EMPTY}[{tool_call}\n{tool_call}<|im_end|>]\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        f"{HEAD}{EMPTY}[5<|im_end|>]\n"
    )


def test_reasoning_in_several_turns_is_one_example_a_user_turn() -> None:
    row = conversation(user("a"), assistant("b", "x"), user("c"), assistant("d"), user("e"), assistant("f", "y"))
    a, c, e = (f"<|im_start|>user\n{text}<|im_end|>\n" for text in "ace")
    assert [shown(example) for example in training_examples(small_tokenizer(), row)] == [
        f"{a}{HEAD}[<think>\nx\n</think>\n\nb<|im_end|>]\n",
        f"{a}{HEAD}{EMPTY}b<|im_end|>\n{c}{HEAD}{EMPTY}[d<|im_end|>]\n",
        f"{a}{HEAD}{EMPTY}b<|im_end|>\n{c}{HEAD}{EMPTY}d<|im_end|>\n{e}{HEAD}[<think>\ny\n</think>\n\nf<|im_end|>]\n",
    ]


def test_an_answer_of_weight_0_is_context_without_loss() -> None:
    bad = Message("assistant", "b", weight=0.0)
    (example,) = training_examples(small_tokenizer(), conversation(user("a"), bad, user("c"), assistant("d")))
    assert shown(example) == (
        f"<|im_start|>user\na<|im_end|>\n{HEAD}{EMPTY}b<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n{HEAD}{EMPTY}[d<|im_end|>]\n"
    )
    thinking = conversation(user("a"), assistant("b", "x"), user("c"), bad, user("e"), assistant("f", "y"))
    examples = [shown(example) for example in training_examples(small_tokenizer(), thinking)]
    assert [example.count("[") for example in examples] == [1, 1], "none of the turn that nothing is learnt from"
    assert examples[0].endswith("b<|im_end|>]\n")


def test_reasoning_in_the_last_turn_only_is_one_example() -> None:
    row = conversation(
        user("a"), assistant("b"), user("c"), assistant("d", "x"), Message("tool", "t"), assistant("e", "y")
    )
    (example,) = training_examples(small_tokenizer(), row)
    assert shown(example).count("[") == 3
    assert "x\n</think>" in shown(example)


def test_a_tokenizer_learns_from_all_that_is_written() -> None:
    """Thoughts, contents, calls and tools, the template's words around them, and no control token."""
    tool = {"type": "function", "function": {"name": "weather"}}
    said = assistant("It is", "hm", ToolCall("weather", {"city": "北京"}))
    texts = list(written_texts(Conversation((user("hi"), said, Message("tool", "3")), (tool,))))
    called = '{"name": "weather", "arguments": {"city": "北京"}}\n'
    assert texts[-5:] == ["hi", "hm", "It is", called, "3"]
    described = "".join(texts[:-5])
    assert '{"type": "function", "function": {"name": "weather"}}' in described
    assert described.startswith("# Tools")
    assert not any(token in text for token in SPECIAL_TOKENS for text in texts)


def test_turn_starts_are_the_user_turns() -> None:
    row = conversation(Message("system", "s"), user("a"), assistant("b"), Message("tool", "t"), user("c"))
    example = render(small_tokenizer(), row)
    starts = [small_tokenizer().decode(example.ids[start:])[:18] for start in example.turn_starts]
    assert starts == ["<|im_start|>user\na", "<|im_start|>user\nc"]


def assert_served_as_trained(tokenizer: Tokenizer, row: Conversation) -> None:
    """For every assistant turn that carries loss: prompt ids are a prefix, and loss begins where the prompt
    ends."""
    seen = 0
    for example in training_examples(tokenizer, row):
        ids, weights = example.ids.tolist(), example.weights
        turns = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
        for i in turns:
            reasoning = bool((row.messages[i].reasoning_content or "").strip())
            before = Conversation(row.messages[:i], row.tools)
            prompt = render(tokenizer, before, add_generation_prompt=True, enable_thinking=reasoning).ids.tolist()
            if ids[: len(prompt)] != prompt or len(prompt) >= len(ids) or weights[len(prompt)] == 0:
                continue
            seen += 1
            end = ids.index(tokenizer.im_end_id, len(prompt))
            assert weights[len(prompt) : end + 1].all()
            assert weights[end + 1] == 0  # the newline after the turn
    assert seen == sum(message.role == "assistant" for message in row.messages)


@settings(max_examples=200, deadline=None)
@given(row=conversations)
def test_every_turn_is_trained_once_in_the_form_it_is_served(row: Conversation) -> None:
    assert_served_as_trained(small_tokenizer(), row)


def gpt2_shaped(special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """GPT-2's pre-tokenizer, which joins a prompt's last newlines with what follows; merges of newlines."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special_tokens), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a \n\n\n\n b \n\n hello  hello\n\n"] * 9, trainer)
    return Tokenizer(tokenizer)


@settings(max_examples=50, deadline=None)
@given(row=conversations)
def test_served_as_trained_with_another_pre_tokenizer(row: Conversation) -> None:
    assert_served_as_trained(gpt2_shaped_once, row)


gpt2_shaped_once = gpt2_shaped()


def test_a_tokenizer_without_chat_tokens_names_them() -> None:
    tokenizer = gpt2_shaped(("<|endoftext|>", "<|im_start|>", "<think>"))
    assert not tokenizer.has_chat_tokens
    with pytest.raises(UserError, match="lack <|im_end|>, </think>, <tool_call>".replace("|", r"\|")):
        render(tokenizer, conversation(user("hi")))


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UserError, match="'developer'"):
        Message("developer", "hi")
