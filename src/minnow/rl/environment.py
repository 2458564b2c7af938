"""What the model acts in: a question asked once, or a world that answers its tool calls over several turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from minnow.data.prompts import Prompt
from minnow.tokenizer.chat import Conversation, Message


@dataclass(frozen=True)
class Reply:
    """What the environment says to the assistant's turn."""

    messages: tuple[Message, ...] = ()
    """Tool results (or a user's turn) for the model to read next; not used when `done`."""
    done: bool = False
    """The episode is over."""
    reward: float = 0.0
    """Earned by this turn."""


class Environment(Protocol):
    """One episode. `reset` once, then `step` with each assistant turn until done.

    Deterministic given its own seed, so that a run can be repeated. Each call is made in a thread, beside those of
    other episodes, and may take `rollout.environment_seconds`; what takes longer, or raises TimeoutError, ends the
    episode, which is left out of the update. A tool that fails says so in its result; any other exception stops the
    run.
    """

    prompt: Prompt
    """What was asked, and the right answer if there is one."""

    def reset(self) -> Conversation:
        """Return the opening: messages up to the model's turn, and the tools it may call."""
        ...

    def step(self, answer: Message) -> Reply:
        """React to the assistant's turn."""
        ...


@dataclass
class SingleTurn:
    """A prompt and one answer: the environment of plain question answering. Rewards judge the answer."""

    prompt: Prompt

    def reset(self) -> Conversation:
        """Return the prompt's conversation."""
        return self.prompt.conversation

    def step(self, answer: Message) -> Reply:
        """End the episode."""
        return Reply(done=True)
