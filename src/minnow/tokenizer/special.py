"""The special tokens and their ids, which are their positions in `SPECIAL_TOKENS`.

The end of a document (`<|endoftext|>`, also the padding) is not a chat marker: a model learns that a text
ends apart from that a turn ends. The order never changes, so a model keeps its ids for life; new control
tokens take the place of a reserved one.
"""

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE = "<|image_pad|>"
THINK = "<think>"
END_THINK = "</think>"
TOOL_CALL = "<tool_call>"
END_TOOL_CALL = "</tool_call>"
TOOL_RESPONSE = "<tool_response>"
END_TOOL_RESPONSE = "</tool_response>"

CHAT_TOKENS: tuple[str, ...] = (
    IM_START,
    IM_END,
    THINK,
    END_THINK,
    TOOL_CALL,
    END_TOOL_CALL,
    TOOL_RESPONSE,
    END_TOOL_RESPONSE,
)
"""What the chat template writes: a tokenizer without one of them cannot chat."""

VISIBLE_TOKENS: frozenset[str] = frozenset(CHAT_TOKENS[2:])
"""Control tokens that stay in text decoded with `skip_special_tokens`: servers find reasoning and calls by
them."""

NUM_SPECIAL = 32
_NAMED = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE, *CHAT_TOKENS[2:])
SPECIAL_TOKENS: tuple[str, ...] = _NAMED + tuple(f"<|reserved_{i}|>" for i in range(NUM_SPECIAL - len(_NAMED)))
"""Every special token of a tokenizer that minnow trains; a token's id is its position."""
