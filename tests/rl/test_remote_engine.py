"""Rollouts from our own server equal those of the engine in this process, and follow its weights."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import vllm_model

from minnow.cli import main
from minnow.config import UserError
from minnow.engine import Engine, SamplingParams
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained
from minnow.rl.remote_engine import RemoteEngine, RemoteEngineConfig
from minnow.serving import ServingConfig
from minnow.tokenizer import Tokenizer
from tests.rl.helpers import saved, write_prompts
from tests.serving.serving_helpers import serving


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setenv("MINNOW_ROLLOUT_KEY", "k")
    folder = saved(tmp_path / "start")
    with serving({"policy": folder}, ServingConfig(api_key="k")) as running:
        yield folder, running


def test_the_same_seeds_give_the_same_answers_and_weights_are_pushed(remote, tmp_path):
    folder, running = remote
    model, tokenizer = load_pretrained(folder), Tokenizer.from_pretrained(folder)
    engine = RemoteEngine(RemoteEngineConfig(url=f"{running.url}/v1"), model, tokenizer, tmp_path / "policy")
    local = Engine(model, tokenizer)
    prompts = [[5, 6, 7], [8, 9], [10] * 20]
    params = [SamplingParams(max_tokens=8, seed=n, logprobs=True) for n in range(3)]

    def check():
        for here, there in zip(local.generate(prompts, params), engine.generate(prompts, params), strict=True):
            (mine,), (theirs,) = here.completions, there.completions
            assert theirs.ids == mine.ids
            assert theirs.finish_reason == mine.finish_reason
            assert theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-5)

    check()
    before = [c.completions[0].ids for c in engine.generate(prompts, params)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.weights_updated()
    local.weights_updated()
    check()
    assert before != [c.completions[0].ids for c in engine.generate(prompts, params)]


def test_a_run_with_a_server(remote, tmp_path):
    folder, running = remote
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    words = (
        f"grpo --init_from {folder} --prompts {prompts} --run {tmp_path}/run --phases 2 --rollout.prompts 2 "
        f"--rollout.samples 2 --rollout.max_tokens 6 --sequence_length 64 --training.micro_batch_tokens 128 "
        f"--rollout_engine.url {running.url}/v1 --rewards.functions tests.rl.helpers:any_reward --optim.matrix_lr 0.01 "
        "--training.device cpu --training.precision fp32"
    )
    assert main(words.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["sampler_mismatch_max"] < 1e-4 for line in lines)  # the second phase played the new weights
    assert_another_policy(tmp_path / "run" / "policy", folder)


@pytest.mark.parametrize("kept", [False, True])
def test_vllm_loads_the_folder_and_drops_what_old_weights_left(kept, tmp_path, monkeypatch):
    asked = []

    def post(url, body, read, *, key, seconds):
        asked.append((url, body))
        return read(None if "rpc" in url else {"success": not kept})

    monkeypatch.setattr("minnow.rl.remote_engine.post_json", post)
    folder = saved(tmp_path / "start")
    config = RemoteEngineConfig(url="http://127.0.0.1:9/v1/", server="vllm", folder=str(tmp_path / "policy"))
    engine = RemoteEngine(config, load_pretrained(folder), Tokenizer.from_pretrained(folder), tmp_path / "other")
    with pytest.raises(LookupError) if kept else nullcontext():  # post_json makes a UserError of it
        engine.weights_updated()
    load = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "policy")}}
    assert asked == [
        ("http://127.0.0.1:9/collective_rpc", load),
        ("http://127.0.0.1:9/reset_prefix_cache", {}),
    ]
    assert (tmp_path / "policy" / "model.safetensors").is_file()


def test_no_default_of_a_served_model_cuts_the_policy(tmp_path, monkeypatch):
    """vLLM takes what a request leaves open from generation_config.json: Qwen3's, kept in every push, has top_k 20."""
    asked = []

    def post(url, body, read, *, key, seconds):
        asked.append(body)
        choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "text": "", "finish_reason": "stop"}
        return read({"choices": [choice]})

    monkeypatch.setattr("minnow.rl.remote_engine.post_json", post)
    folder = saved(tmp_path / "start")
    config = RemoteEngineConfig(url="http://127.0.0.1:9/v1")
    engine = RemoteEngine(config, load_pretrained(folder), Tokenizer.from_pretrained(folder), tmp_path / "policy")
    engine.generate([[5, 6]], [SamplingParams(max_tokens=1, logprobs=True)])
    (body,) = asked
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: body.get(name) for name in whole} == whole


def test_an_engine_without_requests_or_time_is_refused():
    for wrong in ({"parallel": 0}, {"seconds": 0.0}):
        with pytest.raises(UserError, match=f"rollout_engine.{next(iter(wrong))} is 0"):
            RemoteEngineConfig(**wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not vllm_model.PYTHON, reason="MINNOW_VLLM names no Python with vLLM: make test-vllm")
@pytest.mark.parametrize(
    "tied",
    [
        False,
        # It packs the tied head once, and reloads only the embeddings whose memory that was packed from.
        pytest.param(True, marks=pytest.mark.xfail(strict=True, reason="vLLM 0.32's CPU build keeps a tied head")),
    ],
)
def test_a_run_with_vllm(tied, tmp_path):
    """Its log-probabilities are those of the trainer, before and after an update."""
    # vLLM's CPU attention takes heads of 32, 64, ... only.
    folder = saved(tmp_path / "start", head_dim=32, tie_word_embeddings=tied)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    with vllm_model.serving(folder, "policy", length=64) as url:
        words = (
            f"grpo --init_from {folder} --prompts {prompts} --run {tmp_path}/run --phases 3 --rollout.prompts 2 "
            f"--rollout.samples 4 --rollout.max_tokens 6 --sequence_length 64 --training.micro_batch_tokens 128 "
            f"--rollout_engine.url {url}/v1 --rollout_engine.server vllm "
            "--rewards.functions tests.rl.helpers:any_reward --optim.matrix_lr 0.01 "
            "--training.device cpu --training.precision fp32"
        )
        assert main(words.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["sampler_mismatch_max"] < 1e-3 for line in lines)
    assert_another_policy(tmp_path / "run" / "policy", folder)


def assert_another_policy(pushed, start):
    """Its log-probabilities are so far from the start's that a server which kept that would show as a mismatch."""
    found = []
    for folder in (pushed, start):
        model, tokens = load_pretrained(folder), torch.arange(5, 25)[None]
        with torch.no_grad():
            hidden = model(tokens, torch.arange(20)[None], CausalAttention())
            found.append(model.logits(hidden).log_softmax(-1))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("minnow.http.time", SimpleNamespace(sleep=lambda seconds: None))
    folder = saved(tmp_path / "start")
    config = RemoteEngineConfig(url="http://127.0.0.1:9/v1")
    engine = RemoteEngine(config, load_pretrained(folder), Tokenizer.from_pretrained(folder), tmp_path / "policy")
    with pytest.raises(UserError, match="could not be asked"):
        engine.weights_updated()


def test_sampling_that_a_server_does_not_describe_is_refused_before_any_work(tmp_path, capsys):
    """It was said by the first phase, when the run had its folder and the server new weights."""
    folder, prompts = saved(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl")
    words = f"--init_from {folder} --prompts {prompts} --run {tmp_path}/run --rollout_engine.url http://127.0.0.1:9/v1"
    for setting in ("--rollout.temperature 0.7", "--rollout.top_p 0.9"):
        assert main(["grpo", *words.split(), *setting.split()]) == 2
        assert "use rollout.temperature 1 and rollout.top_p 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
