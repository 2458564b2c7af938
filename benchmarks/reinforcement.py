"""The bar of reinforcement on sums: GRPO, PPO and SPO from one model that forgets to carry, three seeds each.

    minnow data pond --out pond
    minnow sft --config recipes/sft-forgetful-pond.yaml --init_from runs/quickstart
    python benchmarks/reinforcement.py --model runs/sft-forgetful-pond --pond pond --work runs/rl-bars

Each run follows `recipes/rl-sums-pond.yaml`. Before and after, every model is examined: held-out sums with thinking on
(500 prompts, greedily), the pond's held-out questions, bits per byte of the pond's validation texts, and repetition in
what it wrote. Prints a table, writes `summary.json` and the curves `curves.svg` into the work folder. A run that is
finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minnow.evaluation.statistics import mean_and_standard_error
from minnow.report.plots import save_figure
from minnow.rl.text_rewards import repetition_reward

RECIPES = Path(__file__).parents[1] / "recipes"
SHOWN = ("sums", "questions/en", "questions/zh", "bits_per_byte/en", "bits_per_byte/zh", "repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pond", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--presets", default="grpo,ppo,spo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("settings", nargs="*", help="more settings for every run, such as --phases=2 (after --)")
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    runs = [(preset, seed) for seed in range(options.seeds) for preset in options.presets.split(",")]
    start = examine(options.model, options.pond, work / "start")
    with ThreadPoolExecutor(options.parallel) as pool:
        after = list(pool.map(lambda run: practise(options, work, *run), runs))
    # The run's own first validation is the start by the same 500 prompts.
    start["sums"] = held_out_curve(work / f"{runs[0][0]}-0")[0][1]
    results = [{"preset": preset, "seed": seed, **figures} for (preset, seed), figures in zip(runs, after, strict=True)]
    (work / "summary.json").write_text(json.dumps({"start": start, "runs": results}, indent=2) + "\n")
    print(table(start, results))
    draw({f"{preset}-{seed}": held_out_curve(work / f"{preset}-{seed}") for preset, seed in runs}, work / "curves.svg")


def practise(options: argparse.Namespace, work: Path, preset: str, seed: int) -> dict[str, float]:
    """One run, and what its model can do then."""
    run = work / f"{preset}-{seed}"
    critic = ["--algorithm.critic.warmup_phases", "1"] if preset == "ppo" else []
    minnow(
        preset, "--config", str(RECIPES / "rl-sums-pond.yaml"), "--init_from", options.model, "--run", str(run),
        "--prompts", f"{options.pond}/sums.jsonl", "--held_out", f"{options.pond}/sums_held_out.jsonl",
        "--training.seed", str(seed), *critic, *options.settings,
    )  # fmt: skip
    return examine(str(run), options.pond, work / f"{preset}-{seed}") | {"sums": held_out_curve(run)[-1][1]}


def examine(model: str, pond: str, out: Path) -> dict[str, float]:
    """Questions, bits per byte, and repetition in the answers to questions and in the sums with thinking on.

    With thinking off the start was never taught a sum: what it writes there is noise before and after.
    """
    figures_file, rows_file = out.with_suffix(".figures.json"), out.with_suffix(".rows.jsonl")
    if not figures_file.exists():
        minnow(
            "eval", model, "--tasks", "pond,bpb,arithmetic", "--pond", pond,
            "--json", str(figures_file), "--rows", str(rows_file),
        )  # fmt: skip
    tasks = json.loads(figures_file.read_text())["tasks"]
    rows = [row for row in map(json.loads, rows_file.open()) if row.get("thinking") is not False]
    wrote = [row.get(part) or "" for row in rows for part in ("answer", "reasoning")]
    return {
        **{f"questions/{code}": tasks["pond"]["figures"][f"exact_match/{code}"]["value"] for code in ("en", "zh")},
        **{name: bar["value"] for name, bar in tasks["bpb"]["figures"].items()},
        "repetition": sum(-repetition_reward(text) for text in wrote) / len(wrote),
    }


def minnow(*words: str) -> None:
    command = [sys.executable, "-m", "minnow", *words]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def held_out_curve(run: Path) -> list[tuple[int, float]]:
    """(update, share of the held-out sums that are right), from the run's metrics."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["held_out/answer"]) for r in records if "held_out/answer" in r]


def table(start: dict[str, float], results: Sequence[dict[str, Any]]) -> str:
    """A row for the start, one for each run, and the mean gain of each preset with its standard error."""
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    lines += [f"| {label} | " + " | ".join(shown(name, figures[name]) for name in SHOWN) + " |" for label, figures in [
        ("start", start), *((f"{r['preset']}, seed {r['seed']}", r) for r in results)
    ]]  # fmt: skip
    for preset in dict.fromkeys(r["preset"] for r in results):
        gains = [100 * (r["sums"] - start["sums"]) for r in results if r["preset"] == preset]
        mean, error = mean_and_standard_error(gains)
        lines.append(f"\n{preset}: {mean:+.1f} points (standard error {error:.1f}, {len(gains)} seeds)")
    return "\n".join(lines)


def shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name.startswith(("sums", "questions")) else f"{value:.4f}"


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Held-out sums over the updates, a colour a preset."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    presets = list(dict.fromkeys(name.rpartition("-")[0] for name in curves))
    for name, points in curves.items():
        preset, _, seed = name.rpartition("-")
        axes.plot(*zip(*points, strict=True), color=f"C{presets.index(preset)}", label=preset if seed == "0" else None)
    axes.set(xlabel="updates", ylabel="held-out sums right", ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
