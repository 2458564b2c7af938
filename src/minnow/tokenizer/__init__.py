"""Text to token ids and back, and conversations to token ids with their loss weights."""

from minnow.tokenizer.special import SPECIAL_TOKENS
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "train_tokenizer"]
