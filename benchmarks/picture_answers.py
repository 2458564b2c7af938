"""Held-out pictures of the pond with a model's answers, as an SVG: the first ones, not chosen ones.

minnow eval runs/vlm-pond --tasks pictures --pond pond --rows answers.jsonl
python benchmarks/picture_answers.py --rows answers.jsonl --pond pond --out docs/vision.svg
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from pathlib import Path
from typing import Any

COLUMNS, ROWS = 4, 2
WIDTH, HEIGHT, EDGE = 250, 268, 160
ASPECTS = ("count", "colour", "kind", "place", "size")


def answers_by_picture(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By picture, then by figure ("count/en"): the row of the model's answer."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("answerer") == "model" and row["figure"].split("/")[0] in ASPECTS:
            found.setdefault(row["picture"], {})[row["figure"]] = row
    return dict(sorted(found.items()))


def panel(number: int, picture: bytes, rows: list[dict[str, Any]]) -> str:
    """One picture with a question in each language below it; a wrong answer is red and struck out."""
    x, y = number % COLUMNS * WIDTH, number // COLUMNS * HEIGHT
    data = base64.b64encode(picture).decode()
    parts = [
        f'<image x="{x + (WIDTH - EDGE) / 2}" y="{y + 12}" width="{EDGE}" height="{EDGE}" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{data}"/>'
    ]
    for line, row in enumerate(rows):
        top = y + EDGE + 34 + 42 * line
        style = "" if row["value"] else ' fill="#c0392b" text-decoration="line-through"'
        question, answer = html.escape(row["prompt"]), html.escape(row["answer"])
        parts.append(f'<text x="{x + WIDTH / 2}" y="{top}" fill="#555">{question}</text>')
        parts.append(f'<text x="{x + WIDTH / 2}" y="{top + 18}" font-weight="bold"{style}>{answer}</text>')
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="what minnow eval --rows wrote")
    parser.add_argument("--pond", type=Path, required=True, help="the pond with its pictures")
    parser.add_argument("--out", type=Path, required=True, help="SVG to write")
    options = parser.parse_args()
    panels = []
    for number, (name, rows) in enumerate(list(answers_by_picture(options.rows).items())[: COLUMNS * ROWS]):
        # A question of another kind under every next picture, and of two kinds in the two languages.
        asked = [
            rows[f"{ASPECTS[(number + 2 * i) % len(ASPECTS)]}/{language}"] for i, language in enumerate(["en", "zh"])
        ]
        panels.append(panel(number, (options.pond / name).read_bytes(), asked))
    size = f'width="{WIDTH * COLUMNS}" height="{HEIGHT * ROWS}"'
    style = 'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle"'
    body = "\n".join(panels)
    options.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect {size} fill="white"/>\n{body}\n</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
