"""The command line: a table of commands, each a module of `minnow.stages` with `Config` and `run(config)`.

A command's module is imported only when it is called, so `minnow --help` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minnow import __version__
from minnow.config import UserError, parse_config
from minnow.console import escaped, tolerate_any_text
from minnow.settings import nearest


@dataclass(frozen=True)
class Command:
    """Where a command lives and what it does, in one line."""

    module: str
    help: str
    preset: str | None = None
    """The preset in `minnow/rl/presets` that this command stands for; "" lets `--preset NAME` choose."""


PRESETS = Path(__file__).parent / "rl" / "presets"

COMMANDS: dict[str, Command] = {
    "quickstart": Command("quickstart", "raw text to a chatting model on this machine, offline, in minutes"),
    "data pond": Command("data_pond", "write the small closed world that tests and the quickstart learn from"),
    "data inspect": Command("data_inspect", "show rows, tokens, lengths and a sample with its loss mask"),
    "data prepare": Command("data_prepare", "tokenise data into shards ahead of training, on one machine or many"),
    "data clean": Command("data_clean", "remove duplicates, other languages and pieces of evaluation sets from data"),
    "tokenizer train": Command("tokenizer_train", "train a byte-level BPE tokenizer on your text"),
    "tokenizer inspect": Command("tokenizer_inspect", "bytes per token by language, the split of a text"),
    "pretrain": Command("pretrain", "train a base model from scratch"),
    "sft": Command("sft", "teach a base model to follow conversations"),
    "vlm": Command("vlm", "give a language model a vision tower, and teach it to talk about pictures"),
    "lora": Command("lora", "sft of small adapters beside a frozen model"),
    "merge-lora": Command("merge_lora", "an adapter and its model as one plain model"),
    "rl": Command(
        "rl", "let a model practise and reinforce what earns reward (--preset grpo, ppo, spo, ...)", preset=""
    ),
    "grpo": Command("rl", "rl with GRPO's preset: groups of answers to each prompt", preset="grpo"),
    "ppo": Command("rl", "rl with PPO's preset: a critic values every token", preset="ppo"),
    "spo": Command("rl", "rl with SPO's preset: one answer a prompt, values remembered", preset="spo"),
    "dpo": Command("dpo", "teach a model which of two answers is the better one (DPO and its kin)"),
    "reward": Command("reward", "make a model that judges answers from one that writes them"),
    "distill": Command("distill", "train a student beside a teacher with the same tokenizer"),
    "distill on-policy": Command("distill_on_policy", "train a student on its own answers, as its teacher sees them"),
    "distill generate": Command("distill_generate", "write an SFT file of a teacher's answers"),
    "generate": Command("generate", "continue a text"),
    "chat": Command("chat", "talk with a model in the terminal"),
    "serve": Command("serve", "models behind OpenAI's API, streaming, many clients at once, and a web chat"),
    "eval": Command("eval", "score a model on tasks, with error bars"),
    "export": Command("export", "a model for llama.cpp, ollama or ONNX runtimes, or onto the Hugging Face Hub"),
    "watch": Command("watch", "follow a run in the terminal: progress, curves, speed, whether it is alive"),
    "report": Command("report", "write a run's report: curves, settings, samples"),
    "plan": Command("plan", "parameters, FLOPs, memory and time of a configuration; starts nothing"),
    "plan rl": Command("plan_rl", "memory of a reinforcement run, part by part; starts nothing", preset=""),
    "bench generate": Command("bench_generate", "generation speed beside transformers.generate, one stream and many"),
    "bench train": Command("bench_train", "training speed beside transformers' own model, same shape and batch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code.

    0 done; 2 something the user can mend, told in one line on stderr; 130 interrupted. A trainer that gets a
    SIGTERM exits 143 by itself, once it has saved.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    tolerate_any_text()
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = _extra_with(error.name)
        if extra is None:
            raise
        print(f"error: {error.name} is not installed; pip install 'minnow[{extra}]' brings it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as in `minnow --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path that is missing, a file where a folder should be, a full disk
        if error.strerror is None:  # a library's own, not the system's: its traceback says more
            raise
        named = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {named}{error.strerror}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_table(COMMANDS))
        return 0
    if words[0] in ("-V", "--version"):
        print(f"minnow {__version__}")
        return 0
    name = _command_name(words)
    if name is None:
        group = {key: command for key, command in COMMANDS.items() if key.startswith(f"{words[0]} ")}
        if group and (len(words) == 1 or words[1] in ("-h", "--help")):
            print(_table(group))
            return 0
        raise UserError(_unknown(words, group))
    stage = importlib.import_module(f"minnow.stages.{COMMANDS[name].module}")
    config = parse_config(stage.Config, with_preset(name, words[len(name.split()) :]), program=f"minnow {name}")

    def work() -> None:
        try:
            stage.run(config)
        except (MemoryError, RuntimeError) as error:
            from minnow.stages.advice import advised  # late: it imports torch

            with advised(f"minnow {name} was at work", config):
                raise error

    if hasattr(config, "run") and hasattr(config, "training"):  # it trains: in one process or in several
        from minnow.training.launch import run_stage

        return run_stage(work, words, config.training)
    work()
    return 0


def with_preset(name: str, arguments: list[str]) -> list[str]:
    """Put the preset's file, if the command has one, before the user's settings, which win over it."""
    preset = COMMANDS[name].preset
    if preset is None:
        return arguments
    for place, word in enumerate(arguments):
        if word == "--preset" or word.startswith("--preset="):
            _, equals, value = word.partition("=")
            taken = arguments[place + 1 : place + 2] if not equals else [value]
            arguments = arguments[:place] + arguments[place + (1 if equals else 2) :]
            preset = taken[0] if taken else ""
            break
    else:
        if not preset:
            return arguments
    known = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if preset not in known:
        raise UserError(f"--preset {preset!r}: there is no such preset; there are {', '.join(known)}")
    return ["--config", str(known[preset]), *arguments]


def _extra_with(module: str | None) -> str | None:
    """The optional part of minnow that brings a module, as the package's metadata say; None if there is none."""
    distribution = (module or "").partition(".")[0].replace("_", "-")
    for requirement in importlib.metadata.requires("minnow") or ():
        found = re.fullmatch(r"([\w-]+).*; extra == ['\"](\w+)['\"]", requirement)
        if found and found[1] == distribution and found[2] != "dev":
            return found[2]
    return None


def _command_name(words: list[str]) -> str | None:
    for name in (" ".join(words[:2]), words[0]):
        if name in COMMANDS:
            return name
    return None


def _unknown(words: list[str], group: dict[str, Command]) -> str:
    typed = " ".join(words[:2]) if group else words[0]
    close = nearest(typed, group or COMMANDS) or nearest(" ".join(words[:2]), COMMANDS)
    hint = f"did you mean minnow {close}?" if close else "minnow --help lists the commands"
    return f"minnow {typed}: no such command; {hint}"


def _table(commands: dict[str, Command]) -> str:
    width = max(map(len, COMMANDS)) + 3
    lines = ["usage: minnow COMMAND [--config FILE] [--key value ...]", ""]
    lines += [f"  {name:<{width}}{command.help}" for name, command in commands.items()]
    lines += ["", "minnow COMMAND --help lists a command's settings with their defaults."]
    lines += ["MODEL is a model folder, a run folder (its final model) or a Hugging Face Hub id."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
