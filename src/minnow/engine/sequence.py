"""One answer in the making."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from minnow.engine.counter_random import sample_key
from minnow.engine.outputs import Completion, Delta, FinishReason, TopLogprobs, Usage
from minnow.engine.sampling import SamplingParams
from minnow.engine.stop_strings import StopStrings
from minnow.tokenizer.stream import StreamDecoder
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Request:
    """One prompt, what is asked of it, and its samples."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    """`params.max_tokens`, or less where the context ends earlier."""
    end_ids: frozenset[int]
    """Tokens that end the answer."""
    samples: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    """Of the prompt: found in the cache."""

    @property
    def finished(self) -> bool:
        """Whether every sample has its end."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def usage(self) -> Usage:
        """What the request took so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(len(sample.ids) for sample in self.samples),
        )


class Sequence:
    """The tokens of one sample so far, and what decides its next one."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer):
        self.request = request
        request.samples.append(self)
        self.index = index
        self.params = request.params
        self.key = sample_key(request.seed, index)
        self.ids: list[int] = []
        self._prompt_set = frozenset(request.prompt_ids)
        self.counts: Counter[int] = Counter()
        self.finish_reason: FinishReason | None = None
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
        return len(self.request.prompt_ids) + len(self.ids)

    @property
    def seen_ids(self) -> frozenset[int]:
        """Every token of the prompt and the answer."""
        return self._prompt_set | self.counts.keys()

    @property
    def barred_ids(self) -> frozenset[int]:
        """Tokens that may not come next."""
        return self.request.end_ids if len(self.ids) < self.params.min_tokens else frozenset()

    def append(
        self,
        token: int,
        logprob: float | None = None,
        raw_logprob: float | None = None,
        top_logprobs: TopLogprobs | None = None,
    ) -> Delta:
        """Take the next token and say what it adds; sets `finish_reason` when it is the last one."""
        self.ids.append(token)
        self.counts[token] += 1
        may_stop = len(self.ids) >= self.params.min_tokens
        ends = token in self.request.end_ids
        # A model's vocabulary may be padded beyond the tokenizer's, with tokens that stand for nothing.
        silent = ends or token >= self._vocab_size
        text = "" if silent else self._stops.push(self._decoder.push(token), may_stop=may_stop)
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
        return Delta(
            index=self.index,
            id=token,
            text=text,
            finish_reason=self.finish_reason,
            logprob=logprob,
            raw_logprob=raw_logprob,
            top_logprobs=top_logprobs,
            usage=self.request.usage() if self.request.finished else None,
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
