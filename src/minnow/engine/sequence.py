"""A request, and its answers in the making."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from torch import Tensor

from minnow.config import UserError
from minnow.engine.counter_random import sample_key
from minnow.engine.grammar import Constraint
from minnow.engine.outputs import Completion, Delta, FinishReason, PromptLogprobs, TopLogprobs, Usage
from minnow.engine.penalties import Penalties
from minnow.engine.prompt import PromptImages
from minnow.engine.sampling import SamplingParams
from minnow.engine.stop_strings import StopStrings
from minnow.tokenizer.stream import StreamDecoder
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True, eq=False)
class Request:
    """One prompt, what is asked of it, and its samples."""

    id: int
    prompt_ids: list[int]
    images: PromptImages | None = None
    """The prompt's pictures."""
    params: SamplingParams
    seed: int
    max_tokens: int
    """`params.max_tokens`, or less where the context ends earlier."""
    end_ids: frozenset[int]
    """Tokens that end the answer."""
    seen: dict[int, Tensor] = field(default_factory=dict)
    """What the model made of the pictures that it has looked at: [patches, D] by the picture's number."""
    samples: list[Sequence] = field(default_factory=list)
    error: UserError | None = None
    """Why it ended without all of its answers."""
    cached_tokens: int | None = None
    """Of the prompt: found in the cache when it was first read."""
    prompt_logprobs: PromptLogprobs | None = field(init=False)
    """Those of the prompt's first tokens, as far as it has been read; None if not asked for."""

    def __post_init__(self) -> None:
        self.forget_prompt_logprobs()

    def forget_prompt_logprobs(self) -> None:
        """Begin to note them, anew where the prompt is read anew."""
        count = self.params.prompt_logprobs
        none = PromptLogprobs(logprobs=[None], top_logprobs=[None] if count else None)
        self.prompt_logprobs = None if count is None else none

    @property
    def finished(self) -> bool:
        """Whether every sample has its end, or the request failed."""
        return self.error is not None or all(sample.finish_reason is not None for sample in self.samples)

    def usage(self) -> Usage:
        """What the request took so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=sum(len(sample.ids) for sample in self.samples),
        )


class Sequence:
    """The tokens of one sample so far, what decides its next one, and where it stands in the cache."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, constraint: Constraint | None = None):
        self.request = request
        self.index = index
        self.params = request.params
        self.first_parent = b"" if request.params.adapter is None else request.params.adapter.encode() + b"\0"
        """What the keys of cached blocks start from: an adapter's keys and values are not the model's own."""
        self.order = (request.id, index)
        """Age: the smaller came first."""
        self.key = sample_key(request.seed, index)
        self.ids: list[int] = []
        """The answer."""
        self.tokens = list(request.prompt_ids)
        """Prompt and answer together."""
        self.penalties: Penalties | None = None
        self.constraint = constraint
        self.finish_reason: FinishReason | None = None

        self.blocks: list[int] = []
        """The block table: block i holds tokens i * block_size and on."""
        self.block_keys: list[bytes] = []
        """Of the full blocks among them."""
        self.computed = 0
        """Tokens whose keys and values are in the cache."""

        self._vocab_size = tokenizer.vocab_size
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=self.params.skip_special_tokens)
        self._stops = StopStrings(self.params.stop)
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._raw_logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []

    @property
    def num_tokens(self) -> int:
        """Prompt and answer together."""
        return len(self.tokens)

    def content(self, start: int, end: int) -> bytes:
        """What tokens `start` to `end` stand for: their ids, and the pictures whose image tokens are among them."""
        ids, images = array("q", self.tokens[start:end]).tobytes(), self.request.images
        if images is None:
            return ids
        return ids + b"".join(images.digests[seen.picture] for seen in images.between(start, end))

    @property
    def skippable(self) -> int:
        """Tokens at its beginning that need not be computed if the cache holds them.

        The last token is always computed: its logits are what a step is for. So is one that tells how likely the next
        token of the prompt is, as long as that is to be noted.
        """
        noted = self.request.prompt_logprobs
        if noted is None or len(noted.logprobs) == len(self.request.prompt_ids):
            return self.num_tokens - 1
        return len(noted.logprobs) - 1

    def take_followers(self) -> list[Sequence]:
        """The request's other samples, once: when its first sample has read the prompt."""
        return self.request.samples[1:] if self.index == 0 and not self.ids else []

    def note_cached(self, tokens: int) -> None:
        """The prompt was found in the cache up to there; what counts is the first reading."""
        if self.request.cached_tokens is None:
            self.request.cached_tokens = tokens

    def append(
        self,
        token: int,
        logprob: float | None = None,
        raw_logprob: float | None = None,
        top_logprobs: TopLogprobs | None = None,
    ) -> Delta:
        """Take the next token and say what it adds; sets `finish_reason` when it is the last one.

        UserError where the grammar cannot be followed further; nothing is added then.
        """
        if self.constraint is not None:
            self.constraint.accept(token)
        self.ids.append(token)
        self.tokens.append(token)
        may_stop = len(self.ids) >= self.params.min_tokens
        ends = token in self.request.end_ids
        # A model's vocabulary may be padded beyond the tokenizer's, with tokens that stand for nothing.
        silent = ends or token >= self._vocab_size
        text = "" if silent else self._stops.push(self._decoder.push(token), may_stop=may_stop)
        if self.constraint is not None:
            ends = ends or self.constraint.complete
        if ends or self._stops.found:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stops.finish()  # half a character, if any, stays out
        self._texts.append(text)
        if logprob is not None and raw_logprob is not None:
            self._logprobs.append(logprob)
            self._raw_logprobs.append(raw_logprob)
        if top_logprobs is not None:
            self._top_logprobs.append(top_logprobs)
        first = self.index == 0 and len(self.ids) == 1
        return Delta(
            index=self.index,
            id=token,
            text=text,
            finish_reason=self.finish_reason,
            logprob=logprob,
            raw_logprob=raw_logprob,
            top_logprobs=top_logprobs,
            prompt_logprobs=self.request.prompt_logprobs if first else None,
            cached_tokens=self.request.cached_tokens if first else None,
            usage=self.request.usage() if self.finish_reason is not None and self.request.finished else None,
        )

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        return Completion(
            ids=self.ids,
            text="".join(self._texts),
            finish_reason=self.finish_reason,
            logprobs=self._logprobs if self.params.logprobs else None,
            raw_logprobs=self._raw_logprobs if self.params.logprobs else None,
            top_logprobs=self._top_logprobs if self.params.top_logprobs else None,
        )
