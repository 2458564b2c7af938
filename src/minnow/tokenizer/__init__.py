"""Text to token ids and back, and conversations to token ids with their loss weights."""

from minnow.tokenizer.chat import Conversation, Message, Rendered, ToolCall, render, training_examples
from minnow.tokenizer.parse import parse_assistant, parse_assistant_ids
from minnow.tokenizer.special import SPECIAL_TOKENS
from minnow.tokenizer.stream import StreamDecoder
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "Conversation",
    "Message",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "parse_assistant",
    "parse_assistant_ids",
    "render",
    "train_tokenizer",
    "training_examples",
]
