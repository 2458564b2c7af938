"""The engine: prompts in, answers out. One for chat, evaluation and, later, the server and rollouts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from collections.abc import Sequence as Listing
from pathlib import Path

import torch

from minnow.config import UserError
from minnow.engine.batch import Batch
from minnow.engine.cache import KVCache
from minnow.engine.outputs import Completions, Delta
from minnow.engine.sampling import SamplingParams
from minnow.engine.sequence import Request, Sequence
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer

Prompt = str | Listing[int]
"""Token ids, taken as they are, or a text, taken as the start of a document: the end-of-text token, then
the text."""


class Engine:
    """Generates with the model itself, not a copy: what it samples is what training sees.

    max_rows: most sequences decoded at once. prefill_tokens: prompt tokens read in one forward pass (a
    longer prompt goes alone). cache_bytes: memory for keys and values, which bounds the rows too; None
    takes half of the GPU's free memory or a quarter of the machine's.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 256,
        prefill_tokens: int = 8192,
        cache_bytes: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._cache_bytes = cache_bytes
        self._weights_version = 0

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Engine:
        """Load MODEL (a model folder, a run folder or a Hub id) and its tokenizer; dtype None keeps what is stored."""
        folder = resolve_model_folder(model)
        return cls(load_pretrained(folder, dtype=dtype, device=device), Tokenizer.from_pretrained(folder))

    def generate(
        self, prompts: Listing[Prompt], params: SamplingParams | Listing[SamplingParams] | None = None
    ) -> list[Completions]:
        """Answer every prompt; one `SamplingParams` for all, or one for each. In the order of the prompts.

        UserError when a prompt is empty or leaves no room in the model's context.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Listing) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} sampling parameters: give one, or one for each")
        requests = [self._request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        sequences = [self._sequences(request) for request in requests]
        for _ in self._run([sequence for samples in sequences for sequence in samples]):
            pass
        return [
            Completions(
                prompt_ids=request.prompt_ids,
                completions=tuple(sequence.completion() for sequence in samples),
                seed=request.seed,
            )
            for request, samples in zip(requests, sequences, strict=True)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Answer one prompt token by token; with `n` > 1 the samples' deltas take turns. Close it to abort.

        Raises as `generate` does, at the call and not at the first delta.
        """
        return self._run(self._sequences(self._request(prompt, params or SamplingParams())))

    def weights_updated(self) -> None:
        """To be called after the model's weights change: what was computed with the old ones is dropped.

        Answers under way are read again with the new weights and go on from where they are.
        """
        self._weights_version += 1

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt as the model will read it."""
        if isinstance(prompt, str):
            return [self.tokenizer.end_of_text_id, *self.tokenizer.encode(prompt)]
        return [int(token) for token in prompt]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.prompt_ids(prompt)
        context = self.model.config.max_position_embeddings
        if not ids:
            raise UserError("the prompt has no tokens: give at least one")
        if len(ids) >= context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the model's context is {context} tokens, prompt and "
                "answer together: shorten the prompt"
            )
        room = context - len(ids)
        ends = {self.tokenizer.end_of_text_id}
        if self.tokenizer.has_chat_tokens:
            ends.add(self.tokenizer.im_end_id)
        vocab_size = self.model.config.vocab_size
        for name, tokens in (
            ("the prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            wrong = [token for token in tokens if not 0 <= token < vocab_size]
            if wrong:
                raise UserError(f"{name} holds token {wrong[0]}, but the model's vocabulary is 0 to {vocab_size - 1}")
        return Request(
            prompt_ids=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else ends),
        )

    def _sequences(self, request: Request) -> list[Sequence]:
        return [Sequence(request, index, self.tokenizer) for index in range(request.params.n)]

    def _run(self, sequences: list[Sequence]) -> Generator[Delta, None, None]:
        """Run the sequences to their end, with a cache of their own."""
        if not sequences:
            return
        length = max(len(s.request.prompt_ids) + s.request.max_tokens for s in sequences)
        config, dtype, device = self.model.config, self.model.compute_dtype, self.model.head_weight.device
        fitting = self._memory(device) // (KVCache.bytes_per_token(config, dtype) * length)
        slots = max(1, min(len(sequences), self._max_rows, fitting))
        batch = Batch(self.model, KVCache(config, slots, length, dtype, device), sequences, self._prefill_tokens)
        version = self._weights_version
        while not batch.done:
            if version != self._weights_version:
                batch.recompute()
                version = self._weights_version
            for _, delta in batch.step():
                yield delta

    def _memory(self, device: torch.device) -> int:
        if self._cache_bytes is not None:
            return self._cache_bytes
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 2
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
