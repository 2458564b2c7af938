"""The model card: README.md of a model folder, from what the run logged, with the Hub's metadata.

Nothing in it is typed by hand, and nothing is claimed that no file of the run says.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from minnow import __version__
from minnow.data.files import without_query
from minnow.disk import atomic_write
from minnow.hub import is_hub_id
from minnow.model.reward_model import is_classification
from minnow.report.lineage import Run, lineage, origin, read_rollouts, run_of, seconds_in_updates
from minnow.report.plots import figures_of, save_figure
from minnow.tokenizer.bytelevel import valid_unicode

MARK = "<!-- minnow wrote this card from the run's log and rewrites it; delete this line to keep changes of yours. -->"
CARD = "README.md"
_CURVES = "curves.png"
_PLACES = ("run", "init_from", "tokenizer", "teacher", "pond", "prompts", "held_out", "reward_model", "folder", "url")
"""Settings that name a file, a folder or an address, with or without a slash in it."""
_JUDGE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

judge = AutoModelForSequenceClassification.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
conversation = [{{"role": "user", "content": "Hello!"}}, {{"role": "assistant", "content": "Good day to you."}}]
text = tokenizer.apply_chat_template(conversation, tokenize=False)
print(judge(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits)"""

_LOOK = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{where}")
processor = AutoProcessor.from_pretrained("{where}")
picture = {{"type": "image", "path": "picture.png"}}
conversation = [{{"role": "user", "content": [picture, {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""


def write_model_card(folder: Path, *, repo: str | None = None) -> Path | None:
    """Write `folder/README.md` and, of a model that was trained here, its curves; None for a card of somebody else's.

    folder: of the model; of one that no run wrote, nothing is said of where it came from. repo: OWNER/NAME on the
    Hub, where it is going.
    Evaluation results come from `evaluation.json` in the run folder (`minnow eval RUN --json RUN/evaluation.json`).
    """
    path = folder / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return None
    here = folder.resolve()
    trained = origin(here)
    run = run_of(trained)
    # A run's log goes on beyond a model from before its collapse, and its figures are the later ones.
    runs = lineage(run) if run is not None and trained.name == "model" else []
    results = _results(here.parent / "evaluation.json") if runs and trained == here else {}
    name = repo.rpartition("/")[2] if repo else (here.parent.name if here.name == "model" else here.name)
    if runs:
        last = runs[-1]
        save_figure(figures_of(last.records, read_rollouts(last.folder), last.folder.name)[0], folder / _CURVES)
    text = "\n\n".join(
        [
            f"---\n{_metadata(folder, name, runs, results, ours=run is not None)}\n---",
            f"# {name}",
            MARK,
            _summary(folder, runs, ours=run is not None),
            *_use(folder, repo, name),
            *_training(runs),
            *_evaluation(results),
        ]
    )
    with atomic_write(path) as temporary:
        temporary.write_text(valid_unicode(text) + "\n", encoding="utf-8")  # data may have a name that is no UTF-8
    return path


def _metadata(folder: Path, name: str, runs: Sequence[Run], results: dict[str, Any], *, ours: bool) -> str:
    """YAML that the Hub reads. ours: minnow is known to have saved the model."""
    config = _config(folder)
    started = runs[0].init_from if runs else None
    figures = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=figure,
            metric_name=f"{figure} ({content['unit']})",
            metric_value=round(bar["value"], 4),
        )
        for task, content in results.items()
        for figure, bar in content["figures"].items()
    ]
    data = ModelCardData(
        model_name=name,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag=_pipeline(folder),
        tags=[*(["minnow"] if ours else []), *([config["model_type"]] if "model_type" in config else [])] or None,
        base_model=started if started and _from_hub(started) else None,
        datasets=sorted({name for run in runs for name, hub in _data(run) if hub}) or None,
        eval_results=figures or None,
    )
    return str(data.to_yaml())


def _summary(folder: Path, runs: Sequence[Run], *, ours: bool) -> str:
    config = _config(folder)
    vision = config.get("vision_config")
    learnt = runs if config else runs[-1:]  # an adapter's folder holds none of what it stands beside
    tokens = sum(run.last("tokens") or 0 for run in learnt)
    start = learnt[0].init_from if learnt else None
    kind = "reward model" if _is_reward_model(folder) else "vision-language model" if vision else "language model"
    text = f"A {kind} ({config['architectures'][0]})" if config else f"An adapter of a {kind}"
    if runs:
        text += f", trained on {tokens:,} tokens with minnow {__version__}"
        text += f", starting from {_public(start)}" if start else ", from scratch"
    elif ours:
        text += f", saved by minnow {__version__}"
    if not config:
        return f"{text}."
    reads = config["text_config"] if vision else config
    text += (
        f": {reads['num_hidden_layers']} layers of width {reads['hidden_size']}, "
        f"{reads['num_attention_heads']} query and {reads['num_key_value_heads']} key heads, "
        f"a vocabulary of {reads['vocab_size']:,}, a context of {reads['max_position_embeddings']:,} tokens."
    )
    return f"{text} {_looks_at(vision)}" if vision else text


def _looks_at(vision: dict[str, Any]) -> str:
    """What becomes of a picture, by the tower's part of config.json."""
    size, patch = vision["image_size"], vision["patch_size"]
    return (
        f"It looks at pictures of {size} x {size} pixels, to which every picture is stretched, in patches of {patch} x "
        f"{patch}, through a SigLIP tower of {vision['num_hidden_layers']} layers of width {vision['hidden_size']}: a "
        f"picture takes {(size // patch) ** 2:,} tokens."
    )


def _use(folder: Path, repo: str | None, name: str) -> list[str]:
    """Commands that run the model, from the Hub or in its folder."""
    where = repo or "."
    heading = "## Use" if repo else "## Use\n\nIn this folder:"
    judges = _is_reward_model(folder)
    if not (folder / "config.json").is_file():
        try_it = (
            f"minnow eval MODEL --judge {where} --tasks judge --pairs PAIRS.jsonl" if judges else f"minnow chat {where}"
        )
        return [heading, f"```\n{try_it}\nminnow merge-lora {where} --out merged\n```"]
    if judges:
        return [
            heading,
            f"```python\n{_JUDGE.format(where=where)}\n```",
            f"```\nminnow eval MODEL --judge {where} --tasks judge --pairs PAIRS.jsonl\n```",
        ]
    if "vision_config" in _config(folder):
        look = f"vllm serve {where}\n\nminnow chat {where}"
        return [heading, f"```python\n{_LOOK.format(where=where)}\n```", f"```\n{look}\n```"]
    chat = (folder / "chat_template.jinja").is_file()
    ask = (
        'text = [{"role": "user", "content": "Hello!"}]\n'
        'ids = tokenizer.apply_chat_template(text, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if chat
        else 'ids = tokenizer("Once upon a time", return_tensors="pt")'
    )
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n'
        f"{ask}\n"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))"
    )
    name = shlex.quote(name)
    shell = (
        f"vllm serve {where}\n\n"
        f"minnow export {where} --to gguf --type q8_0 --out {name}.gguf\n"
        f"llama-server -m {name}.gguf\n\n"
        f"minnow export {where} --to ollama --type q8_0 --out {name}-ollama\n"
        f"ollama create {name} -f {name}-ollama/Modelfile && ollama run {name}\n\n"
        f"minnow {'chat' if chat else 'generate'} {where}"
    )
    return [heading, f"```python\n{python}\n```", f"```\n{shell}\n```"]


def _pipeline(folder: Path) -> str:
    """The Hub's name for what the model does."""
    if _is_reward_model(folder):
        return "text-classification"
    return "image-text-to-text" if "vision_config" in _config(folder) else "text-generation"


def _is_reward_model(folder: Path) -> bool:
    """Also of an adapter."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    return is_classification(_config(folder))


def _training(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    rows = [_stage(run) for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [run.folder.name for run in runs]
    table = _table(["", *names], [[c, *(row.get(c, "") for row in rows)] for c in columns])
    recipes = [
        f"<details><summary>{run.folder.name}: the settings</summary>\n\n```yaml\n{_recipe(run)}```\n\n</details>"
        for run in runs
    ]
    return ["## Training", table, f"![Curves of {names[-1]}]({_CURVES})", *recipes]


def _stage(run: Run) -> dict[str, str]:
    """One row of the table of runs."""
    training = run.config.get("training", {})
    optim = run.config.get("optim", {})
    rollout = run.config.get("rollout", {})
    teacher = run.config.get("teacher")
    rows = {
        "data": ", ".join(name for name, _ in _data(run)),
        "teacher": _public(teacher) if teacher else "",
        "updates": f"{run.last('step') or 0:,}",
        "tokens": f"{run.last('tokens') or 0:,}",
        # Where the model plays, what it wrote is what it learns from.
        "rollouts": f"{rollout['prompts']:,} prompts x {rollout['samples']:,}" if rollout else "",
        "tokens an update": f"{training['batch_tokens']:,}" if "batch_tokens" in training and not rollout else "",
        "sequence length": f"{run.config['sequence_length']:,}" if "sequence_length" in run.config else "",
        "optimizer": str(optim.get("optimizer", "")),
        "machine": ", ".join(str(training[key]) for key in ("device", "precision") if key in training),
        "minutes": f"{seconds_in_updates(run.records) / 60:.1f}",
        "training loss": _number(run.last("loss")),
        "held-out loss": _number(run.last("validation_loss")),
        "held-out bits per byte": _number(run.last("bits_per_byte")),
        "held-out accuracy": _number(run.last("validation_accuracy")),
        "held-out reward": _number(run.last("held_out/reward")),
    }
    return {key: value for key, value in rows.items() if value}


def _evaluation(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    rows = []
    for task, content in results.items():
        for figure, bar in content["figures"].items():
            interval = f"{bar['low']:.4f} to {bar['high']:.4f}"
            rows.append([task, figure, content["unit"], f"{bar['value']:.4f}", interval, f"{bar['rows']:,}"])
    return ["## Evaluation", _table(["task", "figure", "unit", "value", "95% interval", "rows"], rows)]


def _results(path: Path) -> dict[str, Any]:
    """The tasks of a file that `minnow eval --json` wrote; none where the model was rounded or stretched for them."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {} if content.get("changed") else dict(content.get("tasks", {}))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _data(run: Run) -> list[tuple[str, bool]]:
    """(name, whether it is a data set on the Hub) of what a run learnt from: data, or prompts to answer."""
    paths = (run.config.get("data") or {}).get("paths") or []
    return [_source(written) for written in [*paths, *(run.config.get("prompts") or [])]]


def _source(written: str) -> tuple[str, bool]:
    path = re.sub(r"@[\d.]+$", "", written)
    name = path.removeprefix("hub:")
    repository = name.partition(":")[0]
    if is_hub_id(repository) and (name != path or (not Path(path).suffix and not Path(path).exists())):
        return repository, True
    # Folders of this machine are nobody's business, and the query of a web address may hold a key.
    return Path(without_query(path)).name, False


def _from_hub(model: str) -> bool:
    return is_hub_id(model) and isinstance(try_to_load_from_cache(model, "config.json"), str)


def _public(model: str) -> str:
    return model if _from_hub(model) else Path(model).name


def _recipe(run: Run) -> str:
    """The settings that make the recipe, as YAML; files, folders and addresses left out, at any depth."""
    config = {key: value for key, value in run.config.items() if key != "data" and value is not None}
    sections_last = dict(sorted(config.items(), key=lambda item: isinstance(item[1], dict)))
    return str(yaml.safe_dump(_without_places(sections_last), sort_keys=False, allow_unicode=True))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if not _is_place(item, key)}
    return [item for item in value if not _is_place(item)] if isinstance(value, list) else value


def _is_place(value: Any, setting: str = "") -> bool:
    """Whether a value may be a file, a folder or an address: its setting tells, or a slash. The Hub's are none."""
    if isinstance(value, list):
        return setting in _PLACES
    return isinstance(value, str) and (setting in _PLACES or "/" in value or "\\" in value) and not _from_hub(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
