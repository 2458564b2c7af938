"""Rollouts from another process or machine: any OpenAI-compatible server that takes token ids and gives
log-probabilities.

Such as `minnow serve` or vLLM. The policy is trained here and played there: at the beginning of each phase its weights
are saved into a folder that both can see, and the server is asked to load them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minnow.config import UserError, refuse_unused
from minnow.engine import Completion, Completions, SamplingParams
from minnow.http import post_json
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.rl.timed_calls import check_seconds
from minnow.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RemoteEngineConfig:
    """A server that plays the policy."""

    url: str | None = None
    """Base address, such as http://127.0.0.1:8000/v1; null: the engine in this process. The key is read from
    MINNOW_ROLLOUT_KEY."""
    model: str = "policy"
    """The policy's name on the server."""
    folder: str | None = None
    """Folder, seen by both, that the weights are pushed through. Default: RUN/policy."""
    server: Literal["minnow", "vllm"] = "minnow"
    """How it is told to load the folder: at /admin/reload, or as vLLM in its developer's mode wants it."""
    parallel: int = 64
    """Requests under way at once."""
    seconds: float = 600.0
    """Longest wait for one answer."""

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise UserError(f"rollout_engine.parallel is {self.parallel}: it must be at least 1")
        check_seconds("rollout_engine.seconds", self.seconds)
        if self.url is None:
            others = ("model", "folder", "server")
            refuse_unused(self, dict.fromkeys(others, "rollout_engine.url is null"), "rollout_engine.")


class RemoteEngine:
    """`generate` and `weights_updated` of an Engine, over HTTP."""

    def __init__(self, config: RemoteEngineConfig, model: CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
        """`folder`: where the weights go, unless the config names one."""
        assert config.url is not None
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.folder = Path(config.folder or folder)
        self._base = config.url.rstrip("/")
        self._key = os.environ.get("MINNOW_ROLLOUT_KEY")

    def weights_updated(self) -> None:
        """Push the policy's weights."""
        save_pretrained(self.model, self.folder, tokenizer=self.tokenizer)
        folder, root = str(self.folder.resolve()), self._base.removesuffix("/v1")
        asked: list[tuple[str, dict[str, Any]]] = [("/admin/reload", {"model": self.config.model, "folder": folder})]
        if self.config.server == "vllm":
            reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            # The second: no new weights beside keys and values that the old ones left.
            asked = [("/collective_rpc", reload), ("/reset_prefix_cache", {})]
        for path, body in asked:
            post_json(f"{root}{path}", body, _done, key=self._key, seconds=self.config.seconds)

    def generate(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Completions]:
        """Answer every prompt, greedily or from the whole distribution, which a server's log-probabilities are of."""
        for wanted in params:
            assert wanted.temperature in (0.0, 1.0)
            assert wanted.top_p == 1
            assert not wanted.top_k
            assert not wanted.min_p
        with ThreadPoolExecutor(self.config.parallel) as pool:
            return list(pool.map(self._one, prompts, params))

    def _one(self, prompt: list[int], params: SamplingParams) -> Completions:
        body = {
            "model": self.config.model,
            "prompt": prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            # What a request leaves open, vLLM takes from the model's generation_config.json.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": params.seed,
            "logprobs": 0,
            "return_token_ids": True,
        }
        address, seconds = f"{self._base}/completions", self.config.seconds
        completion = post_json(address, body, self._completion, key=self._key, seconds=seconds)
        return Completions(prompt_ids=prompt, completions=(completion,), seed=params.seed or 0)

    def _completion(self, reply: Any) -> Completion:
        try:
            choice = reply["choices"][0]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if len(ids) != len(logprobs) or None in logprobs:
                raise KeyError("a log-probability for each token id")
            return Completion(
                ids=ids,
                text=choice["text"],
                finish_reason="length" if choice["finish_reason"] == "length" else "stop",
                logprobs=logprobs,
                raw_logprobs=logprobs,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self._base}: the reply lacks {error}; rollouts need token ids and log-probabilities "
                "(return_token_ids, logprobs)"
            ) from None


def _done(reply: Any) -> None:
    if isinstance(reply, dict) and reply.get("success") is False:
        raise LookupError("success is false")
