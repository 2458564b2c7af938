"""The bars of preference training and of the reward model, on the pond.

    minnow data pond --out pond
    python benchmarks/pond_preferences.py --model runs/quickstart --pond pond --work runs/preference-bars

From a fine-tuned pond model (the quickstart leaves one), by `recipes/dpo-pond.yaml` and `recipes/reward-pond.yaml`: DPO
must take the share of held-out pairs whose better answer is the likelier one from about a half to 95%, and leave the
answers to held-out questions within two points; a reward model must judge 90% of the held-out pairs right. Prints each
figure with its 95% interval before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minnow.config import parse_config
from minnow.stages import dpo, reward
from minnow.stages import eval as evaluation

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pond", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--max_rows", type=int, default=None)
    options = parser.parse_args()
    work, pond = Path(options.work), Path(options.pond)
    for stage, name in ((dpo, "dpo"), (reward, "reward")):
        words = f"--config {RECIPES}/{name}-pond.yaml --init_from {options.model} --run {work}/{name} --overwrite true"
        words += f" --data.paths {pond}/preference.jsonl --data.validation_paths {pond}/preference_held_out.jsonl"
        stage.run(parse_config(stage.Config, words.split(), program=name))
    before, after = (figures(model, options, work) for model in (options.model, str(work / "dpo")))
    for name in before:
        print(f"{name:<40} {shown(before[name])}  ->  {shown(after[name])}")
    lines = [json.loads(line) for line in (work / "reward" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["validation_accuracy"] for line in lines if "validation_accuracy" in line][-1]
    print(f"{'reward model, held-out pairs':<40} {accuracy:.1%}, {work}/reward/reliability.png")


def figures(model: str, options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    file = work / "figures.json"
    evaluation.run(
        evaluation.Config(
            model=model,
            tasks=("preference", "pond"),
            pond=options.pond,
            max_rows=options.max_rows,
            json=str(file),
        )
    )
    tasks = json.loads(file.read_text())["tasks"]
    return {name: bar for task in tasks.values() for name, bar in task["figures"].items()}


def shown(bar: dict[str, float]) -> str:
    return f"{bar['value']:.1%} ({bar['low']:.1%} to {bar['high']:.1%}, {bar['rows']:.0f} rows)"


if __name__ == "__main__":
    main()
