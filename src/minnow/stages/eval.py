"""`minnow eval`: score a model on tasks, with error bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.config import UserError
from minnow.console import plain_console
from minnow.evaluation import Subject, TaskOptions, evaluate, make_tasks
from minnow.evaluation.evaluate import show, write_results, write_rows
from minnow.evaluation.long_context import trained_length
from minnow.evaluation.registry import TASKS
from minnow.model.context import ContextConfig
from minnow.model.pretrained import resolve_model_folder
from minnow.model.quantize import QuantizeConfig, load_quantized, saving
from minnow.report.long_context import long_context_figure
from minnow.report.plots import save_figure
from minnow.stages.terminal import note_foreign_template
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.training.hardware import DeviceName, choose_device

READ_BY = {
    "text": ("bpb", "long-context"),
    "pairs": ("preference", "judge"),
    "choices": ("choices",),
    "shots": ("choices",),
    "shots_from": ("choices",),
    "against": ("wins",),
    "context": ("long-context",),
    "plot": ("long-context",),
}
"""Options that only some tasks read, and these tasks."""


@dataclass(frozen=True, kw_only=True)
class Config(ContextConfig, QuantizeConfig):
    """Score a model on tasks and print each figure with its 95% interval."""

    model: str = field(metadata={"positional": True})
    """Model folder, run folder or Hub id."""
    tasks: tuple[str, ...] | None = None
    """What to examine, by default pond and bpb, or only bpb where there is a --text and no --pond: pond (held-out
    questions, exact match), bpb (bits per byte), long-context (bits per byte by position and hidden facts, beyond the
    trained length), pictures (what the pond's held-out pictures show), arithmetic (with thinking on and off), identity
    (an adapter's persona), tools (function calls), preference (is the better answer of a pair the likelier one), judge
    (the marks that --judge gives), wins (against the model of --against, by the pond's truth), choices (questions of
    public benchmarks, answered by the likeliest choice)."""
    pond: str | None = None
    """Pond folder that the model was trained on; by default the one beside the model or in its run folder."""
    text: tuple[str, ...] = ()
    """Texts for bpb (one figure per file or folder) and long-context: jsonl, parquet, txt; by default the pond's."""
    pairs: tuple[str, ...] = ()
    """Preference pairs for preference and judge, one figure per file; by default held-out ones of the pond."""
    choices: tuple[str, ...] = ()
    """Questions for choices, one figure per file (jsonl, json, parquet) or Hub data set: rows as ARC, HellaSwag, PIQA,
    WinoGrande, MMLU, MMLU-Pro, RACE, C-Eval, CMMLU, AGIEval and llm-foundry write them, or texts to complete as
    LAMBADA's."""
    shots: int = 0
    """Solved questions in front of each question of choices: the first ones of its file, itself left out."""
    shots_from: str | None = None
    """File whose first questions are shown solved, in place of the examined file's own; for --shots."""
    judge: str | None = None
    """Reward model that judges the model's answers: a folder of minnow reward, or any with one label that transformers
    loads. It adds the task judge."""
    against: str | None = None
    """Model that wins compares with: a model folder, run folder or Hub id."""
    context: int | None = None
    """Tokens of the texts of long-context; by default 4 times the trained length."""
    plot: str | None = None
    """File (.svg or .png) for the curves of long-context."""
    max_rows: int | None = None
    """Examine at most this many rows of each task."""
    device: DeviceName = "auto"
    """Where to run; auto takes a GPU where there is one."""
    json: str | None = None
    """File for the figures as JSON."""
    rows: str | None = None
    """File for every row with the model's answer and its score, as JSON lines."""


def run(config: Config) -> None:
    """Examine, print a table, write the files asked for."""
    if config.tasks == ():
        raise UserError("--tasks is empty: name at least one task")
    if config.max_rows is not None and config.max_rows < 1:
        raise UserError(f"--max_rows {config.max_rows}: give 1 or more, or leave it out for all rows")
    if config.shots < 0:
        raise UserError(f"--shots {config.shots}: give 0 or more")
    if config.shots_from is not None and not config.shots:
        raise UserError("--shots_from is read only with --shots: say how many of its questions to show")
    names = config.tasks or (("bpb",) if config.text and config.pond is None else ("pond", "bpb"))
    if config.judge is not None and "judge" not in names:
        names = (*names, "judge")
    # What a task of somebody's own reads is not known here.
    ours = all(name in TASKS and TASKS[name].__module__.startswith("minnow.") for name in names)
    for option, tasks_that_read in READ_BY.items() if ours else ():
        if getattr(config, option) != getattr(Config, option) and not set(tasks_that_read) & set(names):
            raise UserError(f"--{option} is read only by {', '.join(tasks_that_read)}: name one of them among --tasks")
    folder = resolve_model_folder(config.model)
    model = load_quantized(folder, config.quantize, device=choose_device(config.device))
    model.config = config.extend(model.config)
    tokenizer = Tokenizer.from_pretrained(folder)
    note_foreign_template(tokenizer, config.model)
    if config.quantize != "none":
        plain_console(stderr=True).print(saving(model))
    options = TaskOptions(
        model_folder=folder,
        subject=Subject(model, tokenizer),
        pond=None if config.pond is None else Path(config.pond),
        texts=config.text,
        pairs=config.pairs,
        choices=config.choices,
        shots=config.shots,
        shots_from=config.shots_from,
        judge=config.judge,
        against=config.against,
        context=config.context,
    )
    tasks = [task for name in names for task in make_tasks(name, options)]
    results = evaluate(model, tokenizer, tasks, max_rows=config.max_rows)
    show(results, plain_console())
    if config.json is not None:
        changes = [config.quantize if config.quantize != "none" else None, config.rope_scaling]
        write_results(config.json, config.model, results, changed=", ".join(filter(None, changes)))
    if config.rows is not None:
        write_rows(config.rows, results)
    if config.plot is not None:
        figures = {result.task: result.to_dict()["figures"] for result in results}
        save_figure(
            long_context_figure(
                figures["long-context"], figures.get("hidden-fact", {}), trained_length(model.config), config.model
            ),
            Path(config.plot),
        )
