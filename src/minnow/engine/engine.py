"""The engine: prompts in, answers out. One for chat, evaluation, the server and rollouts."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Listing
from pathlib import Path
from typing import Any

import torch

from minnow.config import UserError
from minnow.engine.adapters import Adapters
from minnow.engine.compiled import CompiledDecode
from minnow.engine.grammar import Constraint, Grammars
from minnow.engine.looking import look
from minnow.engine.outputs import Completions, Delta
from minnow.engine.packed import PackedModel, can_pack
from minnow.engine.parts import MAX_ROWS, Parts, make_parts, shared_memory
from minnow.engine.prompt import Prompt, ReadyPrompt, prompt_ids, ready_prompt
from minnow.engine.runner import Decoder, Runner
from minnow.engine.sampler import Sampler
from minnow.engine.sampling import SamplingParams
from minnow.engine.sequence import Request, Sequence
from minnow.model.context import AS_TRAINED, ContextConfig
from minnow.model.lora import Quantization
from minnow.model.pretrained import resolve_model_folder
from minnow.model.quantize import load_quantized
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer


class Engine:
    """Generates with the model itself, not a copy, unless told otherwise: what it samples is what training sees.

    max_rows: most sequences decoded at once. max_step_tokens: most tokens in one forward pass; longer prompts
    are read in pieces. block_size: tokens in a block of the cache; None takes 16, or 256 where flash attention reads
    the blocks (CUDA, half precision). cache_bytes: memory for keys and values, which bounds the rows too; None takes
    memory_share, by default 0.5, of the GPU's free memory, or 0.25 of the machine's (a container's, where that has
    less).
    frozen: run a packed copy of the weights, for speed where they do not change; `weights_updated` has it made
    anew. compile: compile the step in which every row decodes; takes a C++ compiler and, at its first use, up to a
    minute. It works on a packed copy too: a frozen one's weights become constants of the step; else `weights_updated`
    renews them in place, in the dtype of the computation, and nothing is compiled again.
    adapters: folders of adapters by name, one of which a request may choose (`SamplingParams.adapter`); the model
    is run as it is then, never packed.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        max_rows: int = MAX_ROWS,
        max_step_tokens: int = 8192,
        block_size: int | None = None,
        cache_bytes: int | None = None,
        memory_share: float | None = None,
        frozen: bool = False,
        compile: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._block_size = block_size
        self._cache_bytes, self._memory_share = cache_bytes, memory_share
        self._frozen, self._compile = frozen, compile
        self.adapters = Adapters(model, tokenizer, adapters or {})
        """Call `weights_updated` after one of them changes."""
        self._running: Decoder | None = None
        self._made: Parts | None = None
        self._made_grammars: Grammars | None = None
        self._sampler = Sampler()
        self._next_id = 0
        self._requests: dict[int, Request] = {}
        self._mail: dict[int, deque[Delta | UserError]] = {}
        self._unclaimed: list[tuple[int, Delta | UserError]] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: Quantization = "none",
        context: ContextConfig = AS_TRAINED,
        **settings: Any,
    ) -> Engine:
        """Load MODEL (a model folder, a run folder or a Hub id) and its tokenizer; dtype None keeps what is stored.

        quantize: int8 rounds the matrices of the layers as they are loaded. context: how far to stretch the model's.
        settings: those of the engine itself.
        """
        folder = resolve_model_folder(model)
        tokenizer = Tokenizer.from_pretrained(folder)
        loaded = load_quantized(folder, quantize, dtype=dtype, device=device)
        loaded.config = context.extend(loaded.config)
        return cls(loaded, tokenizer, **settings)

    def generate(
        self, prompts: Listing[Prompt], params: SamplingParams | Listing[SamplingParams] | None = None
    ) -> list[Completions]:
        """Answer every prompt; one `SamplingParams` for all, or one for each. In the order of the prompts.

        UserError when a prompt is empty or leaves no room in the model's context, when a picture cannot be read or does
        not belong to the prompt's image tokens, or a grammar cannot be followed.
        """
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Listing) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} sampling parameters: give one, or one for each")
        requests = [self._request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        try:
            for request in requests:
                self._submit(request)
                self._mail[request.id] = deque(maxlen=0)
            while not all(request.finished for request in requests):
                self._deliver()
        finally:
            for request in requests:
                self.abort(request.id)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [
            Completions(
                prompt_ids=request.prompt_ids,
                completions=tuple(sequence.completion() for sequence in request.samples),
                seed=request.seed,
                prompt_logprobs=request.prompt_logprobs,
            )
            for request in requests
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Answer one prompt token by token; with `n` > 1 the samples' deltas take turns. Close it to abort.

        Raises as `generate` does: at the call and not at the first delta, unless a grammar fails further on.
        """
        return self._stream(self._request(prompt, params or SamplingParams()))

    def add(
        self,
        prompt: Prompt | ReadyPrompt,
        params: SamplingParams | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Put a request into the waiting line; its id, with which `step` marks its deltas.

        prompt: also what `ready` makes of one. constraint: what `constraint` makes of `params`, where that has been
        done already. UserError as in `generate`; nothing is added then.
        """
        return self._submit(self._request(prompt, params or SamplingParams(), constraint)).id

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """The grammar of `params`, compiled; any thread may do it. It may take a second. UserError as in `generate`."""
        return None if params.grammar is None else self._grammars.constraint(params.grammar)

    def step(self) -> list[tuple[int, Delta | UserError]]:
        """One forward pass over what waits and lives; (request id, delta) for every token that came of it.

        May be empty. A request's last delta bears its `usage`; after it the id is forgotten. In place of a delta stands
        the error that ended a request, whose grammar could not be followed further; the others go on.
        """
        self._deliver()
        deltas, self._unclaimed = self._unclaimed, []
        return deltas

    def abort(self, request_id: int) -> None:
        """Forget a request: no delta of it comes after this. Nothing happens where it has its end already."""
        self._mail.pop(request_id, None)
        self._unclaimed = [(id, outcome) for id, outcome in self._unclaimed if id != request_id]
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._parts().scheduler.remove(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to hand out."""
        return bool(self._requests or self._unclaimed)

    def weights_updated(self) -> None:
        """To be called after the model's weights change: what was computed with the old ones is dropped.

        Answers under way are read again with the new weights and go on from where they are, to where these end.
        """
        for request in self._requests.values():
            request.end_ids = self._ends_of(request.params)
            request.seen.clear()
        if self._made is not None:
            self._made.scheduler.forget()
            self._made.runner.forget()
        if isinstance(self._running, PackedModel) and not self._frozen:
            self._running.renew(self.model)
        else:
            self._running = None

    def forget_prefixes(self) -> None:
        """Let no later prompt find what earlier ones left in the cache."""
        self._parts().scheduler.blocks.forget_contents()

    def ready(self, prompt: Prompt) -> ReadyPrompt:
        """The prompt as the model will read it; any thread may do it. A long text, or pictures, take a while.

        UserError for pictures as in `generate`.
        """
        return ready_prompt(self.model, self.tokenizer, prompt)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt."""
        return prompt_ids(self.tokenizer, prompt)

    def require_possible(self, ids: Listing[int], params: SamplingParams) -> None:
        """UserError where a prompt of these tokens can have no such answer; whether the grammar can be followed is not
        looked at, which costs more."""
        context = self.model.config.max_position_embeddings
        if not ids:
            raise UserError("the prompt has no tokens: give at least one")
        # The one token that is drawn behind a prompt which is read for its own sake is not read.
        if len(ids) > context - (params.prompt_logprobs is None):
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the model's context is {context} tokens, prompt and "
                "answer together: shorten the prompt"
            )
        self.adapters.require(params.adapter)
        vocab_size = self.model.config.vocab_size
        for name, tokens in (
            ("the prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            wrong = [token for token in tokens if not 0 <= token < vocab_size]
            if wrong:
                raise UserError(f"{name} holds token {wrong[0]}, but the model's vocabulary is 0 to {vocab_size - 1}")
        if params.min_tokens and len(self._ends_of(params)) >= vocab_size:
            raise UserError("min_tokens bars the tokens that end an answer, which are all there are here")

    def _request(
        self, prompt: Prompt | ReadyPrompt, params: SamplingParams, constraint: Constraint | None = None
    ) -> Request:
        ready = prompt if isinstance(prompt, ReadyPrompt) else self.ready(prompt)
        ids = ready.ids
        self.require_possible(ids, params)
        room = self.model.config.max_position_embeddings - len(ids)
        self._next_id += 1
        request = Request(
            id=self._next_id,
            prompt_ids=ids,
            images=ready.images,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_ids=self._ends_of(params),
        )
        constraint = constraint or self.constraint(params)
        request.samples.extend(
            Sequence(request, index, self.tokenizer, constraint and constraint.copy()) for index in range(params.n)
        )
        return request

    @property
    def _end_ids(self) -> list[int]:
        """Tokens with which a turn or a document ends, the more usual one first."""
        return list(dict.fromkeys([*self.tokenizer.stop_ids, *self.model.stop_ids]))

    def _ends_of(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer to such a request."""
        return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self._end_ids)

    @property
    def _grammars(self) -> Grammars:
        end_ids = self._end_ids
        if self._made_grammars is None or self._made_grammars.end_ids != end_ids:
            self._made_grammars = Grammars(self.tokenizer, self.model.config.vocab_size, end_ids)
        return self._made_grammars

    def _submit(self, request: Request) -> Request:
        self._parts().scheduler.add(request)  # first: the memory for the cache may not be had
        self._requests[request.id] = request
        return request

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        mail = self._mail[self._submit(request).id] = deque[Delta | UserError]()
        try:
            while mail or not request.finished:
                if not mail:
                    self._deliver()
                while mail:
                    outcome = mail.popleft()
                    if isinstance(outcome, UserError):
                        raise outcome
                    yield outcome
        finally:
            self.abort(request.id)

    def _deliver(self) -> None:
        """Take a step. Deltas of requests that somebody streams go to their mail, the others wait for `step`."""
        if not self._requests:
            return
        for request, outcome in self._step():
            if request.id in self._mail:
                self._mail[request.id].append(outcome)
            else:
                self._unclaimed.append((request.id, outcome))
            if isinstance(outcome, UserError) or outcome.usage is not None:
                del self._requests[request.id]
                request.seen.clear()  # `generate` keeps the request until the last one has its end

    @torch.no_grad()  # not inference_mode: the live training module may cache what it makes here
    def _step(self) -> list[tuple[Request, Delta | UserError]]:
        scheduler, runner = self._parts()
        plan = scheduler.schedule()
        look(self.model, plan.chunks)
        read, logits_RV = runner.run(self._decoder(), plan)
        for chunk in plan.chunks:
            scheduler.computed(chunk)
        if not read:  # only pieces of prompts
            return []
        # Samples that share a prompt share the logits after it.
        rows = [(row, place) for place, sequence in enumerate(read) for row in scheduler.fork(sequence)]
        if len(rows) > len(read):
            logits_RV = logits_RV[torch.tensor([place for _, place in rows], device=logits_RV.device)]
        sequences = [row for row, _ in rows]
        sampled = self._sampler(logits_RV, sequences)
        outcomes: list[tuple[Request, Delta | UserError]] = []
        for place, (sequence, token) in enumerate(zip(sequences, sampled.ids, strict=True)):
            request = sequence.request
            if request.error is not None:  # a sample before this one ended it
                continue
            try:
                outcomes.append((request, sequence.append(token, *sampled.logprobs_of(place, sequence.params))))
            except UserError as error:
                request.error = error
                outcomes.append((request, error))
                scheduler.remove(request)
                continue
            if sequence.finish_reason is not None:
                scheduler.finish(sequence)
        return outcomes

    def _decoder(self) -> Decoder:
        """What runs: the model itself, or a packed copy of it for an engine that is frozen or compiles."""
        if self._running is None:
            runner = self._parts().runner
            compiles = self._compile and isinstance(runner, Runner) and self._can_compile
            packs = (self._frozen or compiles) and can_pack(self.model)
            self._running = PackedModel(self.model) if packs else self.model
            if compiles and isinstance(runner, Runner) and runner.compiled is None:
                constant = self._frozen and packs
                runner.compiled = CompiledDecode(self._running, runner.cache, runner.window, constant_weights=constant)
                if isinstance(self._running, PackedModel) and constant and self.model.head_weight.device.type == "cpu":
                    self._running.compile_between_products()  # for prompts
        return self._running

    @property
    def _can_compile(self) -> bool:
        """Whether a step is one function of tensors: routers and a choice of adapters look at their data."""
        return self.model.config.experts is None and not self.adapters.names

    def _parts(self) -> Parts:
        """Scheduler and runner, made when first needed: until then the model may change its device."""
        if self._made is None:
            self._made = make_parts(
                self.model,
                self._memory(),
                max_rows=self._max_rows,
                max_step_tokens=self._max_step_tokens,
                block_size=self._block_size,
            )
            self._made.runner.adapters = self.adapters.choice if self.adapters.names else None
        return self._made

    def _memory(self) -> int:
        """Bytes for keys and values."""
        if self._cache_bytes is not None:
            return self._cache_bytes
        return shared_memory(self.model.head_weight.device, self._memory_share)
