"""One more turn of many conversations, read back as messages."""

from __future__ import annotations

from collections.abc import Sequence

from minnow.engine.sampling import SamplingParams
from minnow.evaluation.registry import Subject
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.tokenizer.parse import parse_assistant_ids


def ask(subject: Subject, conversations: Sequence[Conversation], params: SamplingParams) -> list[Message]:
    """The model's next message in each conversation, its tool calls parsed.

    A prompt that leaves no room in the model's context gets an empty message: it was not answered.
    """
    context = subject.model.config.max_position_embeddings
    prompts = [render(subject.tokenizer, c, add_generation_prompt=True).ids.tolist() for c in conversations]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < context]
    messages = [Message("assistant", "")] * len(prompts)
    results = subject.engine.generate([prompts[i] for i in fitting], params)
    for i, result in zip(fitting, results, strict=True):
        messages[i] = parse_assistant_ids(subject.tokenizer, result.completions[0].ids)
    return messages
