"""The commands that README, handbook and recipes show exist and have those settings; the quick ones are run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minnow import cli
from minnow.config import parse_config
from minnow.stages import eval as evaluation

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").glob("*.yaml")),
]


def commands(page: Path) -> Iterator[str]:
    """Lines that start with `minnow` in code blocks (in a recipe: in its opening comment), continuations joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [text]
    if page.suffix == ".md":
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
    for block in blocks:
        for line in block.splitlines():
            line = line.lstrip("# ") if page.suffix == ".yaml" else line
            if line.startswith("minnow "):
                yield line


SHOWN = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def split(command: str) -> tuple[str, list[str]]:
    """The name in the table and the words after it."""
    words = shlex.split(command, comments=True)[1:]
    name = " ".join(words[:2]) if " ".join(words[:2]) in cli.COMMANDS else words[0]
    assert name in cli.COMMANDS, f"no such command: {command}"
    return name, words[len(name.split()) :]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_shown_commands_have_those_settings(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, words = split(command)
    if "..." in words or not words:
        return
    module = f"minnow.stages.{cli.COMMANDS[name].module}"
    config_class = importlib.import_module(module).Config
    with contextlib.suppress(SystemExit):  # --help and --print_config stop after printing
        parse_config(config_class, cli.with_preset(name, words), program=f"minnow {name}")


def test_both_readmes_show_the_same_commands_and_list_them_all() -> None:
    english, chinese = (ROOT / name for name in ("README.md", "README.zh.md"))
    assert list(commands(english)) == list(commands(chinese))
    table = [f"| `minnow {name}` | {command.help} |" for name, command in cli.COMMANDS.items()]
    listed = [line for line in english.read_text(encoding="utf-8").splitlines() if line.startswith("| `minnow")]
    assert listed == table
    chinese_names = re.findall(r"^\| `minnow (.*?)`", chinese.read_text(encoding="utf-8"), re.MULTILINE)
    assert chinese_names == list(cli.COMMANDS)


def test_readme_starts_with_the_two_commands() -> None:
    for name in ("README.md", "README.zh.md"):
        block = re.search(r"```\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        assert block is not None
        assert block[1] == "make quickstart\nmake test\n"


def test_links_lead_somewhere() -> None:
    broken = []
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or (heading and heading not in headings(target)):
                broken.append(f"{page.name}: {link}")
    assert not broken


def headings(page: Path) -> set[str]:
    """What GitHub calls a page's headings in links: lower case, no punctuation, hyphens for blanks."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


EVALUATIONS = [
    (page, command) for page, command in SHOWN if command.startswith("minnow eval ") and "MODEL" not in command
]


@pytest.mark.parametrize(("page", "command"), EVALUATIONS)
def test_shown_evaluations_find_their_rows(page: str, command: str) -> None:
    """The quickstart's model alone has a pond beside it; for others a task gets its rows or a pond."""
    name, words = split(command)
    config = parse_config(evaluation.Config, words, program=f"minnow {name}")
    tasks = {*config.tasks, *(["judge"] if config.judge else [])}
    given = {"bpb": config.text, "long-context": config.text, "preference": config.pairs, "judge": config.pairs}
    assert config.pond or config.model == "runs/quickstart" or all(given.get(task) for task in tasks)


def test_from_your_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's section of that name, run as it stands on a handful of rows, with the model made tiny."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From your own text")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of tokenised data lies below it
    shutil.copytree(ROOT / "recipes", "recipes")
    _write("texts/a.jsonl", [{"text": f"Fish {i} swims in the pond. 第{i}条鱼在池塘里游。"} for i in range(300)])
    ask = [{"role": "user", "content": "Who swims?"}, {"role": "assistant", "content": "Fish 3 swims."}]
    _write("conversations/a.jsonl", [{"messages": ask, "id": i} for i in range(40)])
    for command in block[1].splitlines():
        name, words = split(command)
        if name == "chat":
            continue  # tests/stages/test_chat.py talks
        assert cli.main([*name.split(), *words, *TINY.get(name, [])]) == 0, command
    assert (tmp_path / "runs/sft-5m/model/model.safetensors").exists()


TRAINING = "--training.device cpu --training.precision fp32 --training.compile off --training.steps 2"
BATCH = "--sequence_length 128 --training.batch_tokens 512 --training.micro_batch_tokens 256"
SHAPE = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 2"
    " --model.num_attention_heads 2 --model.num_key_value_heads 1 --model.head_dim 16"
)
TINY = {
    "tokenizer train": ["--vocab_size", "320"],
    "plan": f"{TRAINING} {BATCH} {SHAPE} --probe_seconds 0.1".split(),
    "pretrain": f"{TRAINING} {BATCH} {SHAPE}".split(),
    "sft": f"{TRAINING} {BATCH}".split(),
}


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
