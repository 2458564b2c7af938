"""Are rollouts as fast as the engine that plays them? Paired, round by round, on one model.

    python benchmarks/rollout_speed.py --model runs/sft-forgetful-pond --prompts pond/sums.jsonl

In each round the same prompts, drawn with the same seeds, are answered by the engine with a packed copy of the weights
(frozen), by the engine with the live model, by each of the two compiled (so `minnow bench generate` runs the one
and reinforcement the other, where there is a C++ compiler), and as rollouts: rendered, played by the last of these with
log-probabilities, parsed and rewarded. Prints tokens/s, medians over the rounds, and the rollouts' median share of
each. The first round warms up. `--samples 8` asks each prompt eight times, as GRPO does, and adds the live engine with
blocks too large for prompts to share ("live, apart"); `--tool` describes a calculator before each prompt.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from minnow.data.prompts import Prompt, read_prompts
from minnow.engine import Engine, SamplingParams
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.rl.environment import SingleTurn
from minnow.rl.rewards import RewardConfig, Rewarder
from minnow.rl.rollouts import RolloutConfig, play
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import render
from minnow.tools import CALCULATOR
from minnow.training.hardware import has_cpp_compiler

ROLLOUT = RolloutConfig(enable_thinking=True, max_tokens=96, temperature=0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="episodes side by side")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--tool", action="store_true", help="a calculator's description before each prompt")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve_model_folder(options.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    engines = {
        name: Engine(
            load_pretrained(folder).eval(),
            tokenizer,
            frozen="frozen" in name,
            compile="compiled" in name and has_cpp_compiler(),
        )
        for name in ("frozen", "live", "frozen compiled", "live compiled")
    }
    if options.samples > 1:
        model = load_pretrained(folder).eval()
        # Only full blocks are shared, and none of these is ever full before the context is.
        engines["live, apart"] = Engine(model, tokenizer, block_size=model.config.max_position_embeddings)
    rewarder = Rewarder(RewardConfig(answer_kind="number"), device=torch.device("cpu"))
    prompts = read_prompts((options.prompts,))
    if options.tool:
        prompts = [replace(p, conversation=replace(p.conversation, tools=(CALCULATOR.schema,))) for p in prompts]
    for rows in options.rows:
        rates: dict[str, list[float]] = {name: [] for name in (*engines, "rollouts")}
        for number in range(options.rounds):
            chosen = [prompts[(number * rows + row) // options.samples % len(prompts)] for row in range(rows)]
            for name, engine in engines.items():
                engine.forget_prefixes()
                rates[name].append(generated(engine, chosen, number))
            rates["rollouts"].append(played(engines["live compiled"], rewarder, chosen, number))
        warm = {name: found[1:] for name, found in rates.items()}
        told = ", ".join(f"{name} {statistics.median(found):,.0f}" for name, found in warm.items())
        shares = [f"{share(warm['rollouts'], warm[name]):.0%} of {name}" for name in engines]
        print(f"{rows} side by side, tokens/s: {told}; rollouts are {', '.join(shares)}")
        if options.samples > 1:
            print(f"live is {share(warm['live'], warm['live, apart']):.2f} times live, apart")


def share(rates: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of one's speed in the other's."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def generated(engine: Engine, prompts: Sequence[Prompt], seed: int) -> float:
    """Tokens a second of the engine alone."""
    ids = [
        render(engine.tokenizer, prompt.conversation, add_generation_prompt=True, enable_thinking=True).ids.tolist()
        for prompt in prompts
    ]
    params = [
        SamplingParams(
            temperature=ROLLOUT.temperature,
            max_tokens=ROLLOUT.max_tokens,
            seed=zlib.crc32(f"{seed}/0/{place}".encode()),  # as `play` draws them
        )
        for place in range(len(ids))
    ]
    start = time.perf_counter()
    answers = engine.generate(ids, params)
    return sum(len(answer.completions[0].ids) for answer in answers) / (time.perf_counter() - start)


def played(engine: Engine, rewarder: Rewarder, prompts: Sequence[Prompt], seed: int) -> float:
    """Tokens a second of a phase's play, rewards included."""
    start = time.perf_counter()
    engine.weights_updated()
    episodes = play(
        engine, [SingleTurn(prompt) for prompt in prompts], range(len(prompts)), ROLLOUT, seed=seed, longest=512
    )
    rewarder.score(episodes)
    return sum(episode.num_trained for episode in episodes) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
