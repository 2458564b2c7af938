"""One answer in the making."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from minnow.engine.counter_random import sample_key
from minnow.engine.outputs import Completion, Delta, FinishReason
from minnow.engine.sampling import SamplingParams
from minnow.engine.stop_strings import StopStrings
from minnow.tokenizer.stream import StreamDecoder
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what is asked of it."""

    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    """`params.max_tokens`, or less where the context ends earlier."""
    end_ids: frozenset[int]
    """Tokens that end the answer."""


class Sequence:
    """The tokens of one sample so far, and what decides its next one."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer):
        self.request = request
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

    def append(self, token: int, logprob: float | None, raw_logprob: float | None) -> Delta:
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
        return Delta(
            index=self.index,
            id=token,
            text=text,
            finish_reason=self.finish_reason,
            logprob=logprob,
            raw_logprob=raw_logprob,
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
        )
