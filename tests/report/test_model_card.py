"""The model card: what it says comes from the run's files, and nothing in it names the machine."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from minnow.model.config import ModelConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.report.lineage import lineage
from minnow.report.model_card import _PLACES, MARK, write_model_card
from minnow.report.run_report import write_report
from minnow.tokenizer import train_tokenizer


def a_run(folder: Path, *, data: str, **config: Any) -> Path:
    """A finished run with a log of two updates and a validation."""
    tokenizer = train_tokenizer(["the fish swims in the pond"], 288)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CausalLM(ModelConfig(vocab_size=288, num_key_value_heads=1, head_dim=16, **shape))
    model.model.norm.weight.data.fill_(len(folder.name))  # no two runs end with the same weights
    save_pretrained(model, folder / "model", tokenizer)
    settings = {
        "run": str(folder),
        "data": {"paths": [data], "cache_dir": "/secret/cache"},
        "sequence_length": 128,
        "training": {"batch_tokens": 4096, "device": "cpu", "precision": "fp32", "seed": 7},
        "optim": {"optimizer": "muon", "matrix_lr": 0.02},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    step = {"tokens_per_second": 10.0, "seconds": 30.0, "lr": 0.1, "grad_norm": 1.0, "mfu": 0.1, "memory_gb": 1.0}
    records = [
        {"step": 1, "loss": 5.0, "tokens": 4000, **step},
        {"step": 2, "loss": 4.0, "tokens": 8096, **step},
        {"step": 2, "validation_loss": 4.25, "bits_per_byte": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def test_a_run_and_the_one_before_it(drawn: None, tmp_path: Path) -> None:
    pretrained = a_run(tmp_path / "base", data="/secret/texts/poems.jsonl")
    run = a_run(tmp_path / "tuned", data="trl-lib/Capybara:default@2", init_from=str(pretrained))
    bar = {"value": 0.98765, "low": 0.9, "high": 0.995, "rows": 540}
    tasks = {"pond": {"unit": "share", "seconds": 1.0, "figures": {"exact_match/en": bar}}}
    (run / "evaluation.json").write_text(json.dumps({"model": "x", "tasks": tasks}), encoding="utf-8")
    path = write_model_card(run / "model")
    assert path is not None
    text = path.read_text(encoding="utf-8")

    card = ModelCard(text)  # the Hub's own parser
    assert card.data.to_dict()["library_name"] == "transformers"
    assert card.data.tags == ["minnow", "qwen3"]
    assert card.data.datasets == ["trl-lib/Capybara"]
    assert card.data.base_model is None  # the base is on no hub
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("pond", "exact_match/en", 0.9877)

    assert "trained on 16,192 tokens" in text  # two runs of 8,096
    assert "from scratch" in text
    assert "|  | base | tuned |" in text
    assert "| data | poems.jsonl | trl-lib/Capybara |" in text
    assert "| tokens an update | 4,096 | 4,096 |" in text
    assert "| minutes | 1.0 | 1.0 |" in text  # 2 updates of 30 seconds
    assert "| training loss | 4.0000 | 4.0000 |" in text
    assert "| held-out loss | 4.2500 | 4.2500 |" in text
    assert "| held-out bits per byte | 1.5000 | 1.5000 |" in text
    assert "| pond | exact_match/en | share | 0.9877 | 0.9000 to 0.9950 | 540 |" in text
    assert "matrix_lr: 0.02" in text
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert (run / "model" / "curves.png").stat().st_size > 1000
    for program in (
        "AutoModelForCausalLM",
        "vllm serve .",
        "llama-server -m tuned.gguf",
        "ollama run tuned",
        "minnow chat .",
    ):
        assert program in text


def test_figures_of_a_rounded_model_are_not_those_of_the_model(tmp_path: Path) -> None:
    """What `minnow eval --quantize int8` had written was claimed of the weights in the folder."""
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    bar = {"value": 0.5, "low": 0.4, "high": 0.6, "rows": 540}
    content = {"model": "x", "tasks": {"pond": {"unit": "share", "seconds": 1.0, "figures": {"exact_match/en": bar}}}}
    for changed, shown in (("", True), ("int8", False)):
        (run / "evaluation.json").write_text(json.dumps(content | {"changed": changed}), encoding="utf-8")
        text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
        assert ("exact_match/en" in text) == shown


def test_under_patience_the_figures_are_those_of_the_model_that_was_kept(tmp_path: Path) -> None:
    """The last ones are of weights that nobody has: the card called the model worse and longer trained than it is."""
    training = {"batch_tokens": 4096, "patience": 2}
    run = a_run(tmp_path / "tuned", data="x.jsonl", training=training)
    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    better = json.dumps({"step": 1, "validation_loss": 3.5, "bits_per_byte": 1.25})
    as_good = json.dumps({"step": 2, "validation_loss": 3.5, "bits_per_byte": 1.3})
    log.write_text("\n".join([lines[0], better, lines[1], as_good, lines[2]]) + "\n", encoding="utf-8")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "trained on 4,000 tokens" in text
    for row in ("updates | 1", "tokens | 4,000", "training loss | 5.0000", "held-out loss | 3.5000"):
        assert f"| {row} |" in text
    assert "| held-out bits per byte | 1.2500 |" in text
    assert "| minutes | 1.0 |" in text, "of all that was done"


def test_updates_without_a_line_took_time_too(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    records = [{"step": step, "loss": 4.0, "tokens": 9, "seconds": 30.0} for step in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    assert "| minutes | 10.0 |" in write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]


def test_the_shape_is_that_of_the_configuration(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    path = run / "model" / "config.json"
    sizes = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 12345, "max_position_embeddings": 2048}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    assert (
        "3 layers of width 96, 4 query and 2 key heads, a vocabulary of 12,345, a context of 2,048 tokens."
        in write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    )


def test_the_hub_model_that_it_started_from_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Hub's own field too, if the Hub's client has it: a folder may look like OWNER/NAME."""
    run = a_run(tmp_path / "tuned", data="x.jsonl", init_from="somebody/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    card = write_model_card(run / "model")
    assert card is not None
    assert ModelCard(card.read_text(encoding="utf-8")).data.base_model is None
    cached = tmp_path / "hub" / "models--somebody--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    shutil.copytree(run / "model", cached / "snapshots" / "0123abc")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert ModelCard(text).data.base_model == "somebody/small"
    assert "starting from somebody/small" in text


def test_the_recipe_names_no_place_of_this_machine_at_any_depth(tmp_path: Path) -> None:
    """The reward model's folder, the critic's and the server of the rollouts stood in the card that goes to the Hub."""
    run = a_run(
        tmp_path / "practised",
        data="prompts.jsonl",
        rewards={"reward_model": "/secret/judge", "format": 0.5, "functions": ["mine:marks@0.5", "/secret/f.py:marks"]},
        algorithm={"advantage": "gae", "critic": {"init_from": "../secret/critic", "lr": 0.01}},
        rollout_engine={"url": "http://secret.local:8000/v1", "server": "minnow"},
    )
    path = write_model_card(run / "model")
    assert path is not None
    text = path.read_text(encoding="utf-8")
    assert "secret" not in text
    for kept in ("format: 0.5", "mine:marks@0.5", "advantage: gae", "lr: 0.01", "server: minnow"):
        assert kept in text
    # Without a slash too, as they are written where a command stands beside them.
    run = a_run(
        tmp_path / "beside",
        data="x.jsonl",
        rope_scaling="yarn",
        tokenizer="secret",
        pond="secret",
        held_out=["secret.jsonl"],
        rewards={"reward_model": "secret", "answer_kind": "number"},
        algorithm={"critic": {"init_from": "secret"}},
        rollout_engine={"url": "secret", "folder": "secret"},
    )
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "secret" not in text
    assert "rope_scaling: yarn" in text  # a setting of the recipe, though it stands in no section
    assert "answer_kind: number" in text


STAGES = ("pretrain", "sft", "lora", "dpo", "reward", "distill", "distill_on_policy", "rl")


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_that_may_hold_any_text_is_known_to_the_card(stage: str) -> None:
    """A new one is a place, or it is none: a path without a slash looks like any other word."""
    no_places = {"environment", "targets", "functions", "instruction", "model"}

    def free_text(config: type) -> set[str]:
        names = set()
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            parts = [hints[field.name], *typing.get_args(hints[field.name])]
            names |= {name for part in parts if dataclasses.is_dataclass(part) for name in free_text(part)}
            names |= {field.name} if str in parts else set()
        return names

    config = importlib.import_module(f"minnow.stages.{stage}").Config
    in_data = {"paths", "validation_paths", "cache_dir"}  # the card leaves the whole section out
    assert free_text(config) - in_data <= {*_PLACES, *no_places}


def test_every_stage_tells_what_it_learnt_from(tmp_path: Path) -> None:
    """A distilled model's teacher and the prompts of one that practised were left out, and the latter's updates were
    said to be of `training.batch_tokens`, which nothing there reads."""
    base = a_run(tmp_path / "base", data="texts.jsonl")
    taught = a_run(tmp_path / "taught", data="talk.jsonl", init_from=str(base), teacher="/secret/wise", kind="sft")
    text = write_model_card(taught / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "| teacher |  | wise |" in text
    assert "kind: sft" in text
    practised = a_run(
        tmp_path / "practised",
        data="",
        init_from=str(taught),
        prompts=["/secret/sums.jsonl"],
        environment="question",
        rollout={"prompts": 16, "samples": 8},
    )
    settings = yaml.safe_load((practised / "config.yaml").read_text(encoding="utf-8"))
    del settings["data"]
    (practised / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with (practised / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "held_out/reward": 0.625, "validation_accuracy": 0.75}\n')
    text = write_model_card(practised / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "| data | texts.jsonl | talk.jsonl | sums.jsonl |" in text
    assert "| rollouts |  |  | 16 prompts x 8 |" in text
    assert "| tokens an update | 4,096 | 4,096 |  |" in text
    assert "| held-out reward |  |  | 0.6250 |" in text
    assert "| held-out accuracy |  |  | 0.7500 |" in text
    assert "environment: question" in text
    assert "secret" not in text


def test_an_adapter_is_not_what_it_stands_beside(tmp_path: Path) -> None:
    """Its card said "from scratch", and counted the tokens that the base had learnt from."""
    base = a_run(tmp_path / "base", data="texts.jsonl")
    run = a_run(tmp_path / "adapter", data="talk.jsonl", init_from=str(base))
    (run / "model" / "config.json").unlink()
    (run / "model" / "adapter_config.json").write_text("{}")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "An adapter of a language model, trained on 8,096 tokens with minnow" in text
    assert ", starting from base." in text
    assert "|  | base | adapter |" in text


def test_data_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """The model was trained, and then its card could not be written."""
    path = write_model_card(a_run(tmp_path / "read", data="a\udcff.jsonl") / "model")
    assert path is not None
    assert "a\ufffd.jsonl" in path.read_text(encoding="utf-8")


def test_runs_that_took_turns_end_somewhere(tmp_path: Path) -> None:
    """Each was started from the other and overwritten: the card of the one trained last was an endless recursion."""
    a_run(tmp_path / "one", data="a.jsonl", init_from=str(tmp_path / "three"))
    a_run(tmp_path / "three", data="a.jsonl", init_from=str(tmp_path / "one"))
    assert [run.folder.name for run in lineage(tmp_path / "one")] == ["three", "one"]
    assert write_model_card(tmp_path / "one" / "model") is not None


def test_folders_of_this_machine_are_named_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that it started from, and of data with a weight; a folder is no data set of the Hub."""
    run = a_run(tmp_path / "tuned", data="/secret/poems.jsonl@0.5", init_from="/secret/models/small")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "starting from small: 1 layers" in text
    assert "| data | poems.jsonl |" in text
    assert "secret" not in text
    run = a_run(tmp_path / "other", data="poems/old")
    (tmp_path / "poems" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert ModelCard(text).data.datasets is None
    assert "| data | old |" in text


@pytest.mark.parametrize("name", ["../base", "runs/小鱼", "runs/a--b", "runs/-1"])
def test_folders_that_read_like_a_hub_id_but_for_the_hubs_rules(name: str, tmp_path: Path) -> None:
    """The Hub's client raised an error of its own, and the run ended in it after its last step."""
    run = a_run(tmp_path / "tuned", data=name, init_from=name, run=name, cleaned=name)
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert f"starting from {Path(name).name}: 1 layers" in text
    assert ModelCard(text).data.datasets is None
    assert name not in text


def test_a_data_set_of_the_hub_is_one_however_it_is_written(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="hub:somebody/fish.v2:deep:train@2")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert ModelCard(text).data.datasets == ["somebody/fish.v2"]


def test_the_commands_of_a_name_with_a_blank_can_be_typed(tmp_path: Path) -> None:
    run = a_run(tmp_path / "my run", data="x.jsonl")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "# my run\n" in text
    assert "--type q8_0 --out 'my run'.gguf\n" in text
    assert "ollama create 'my run' -f 'my run'-ollama/Modelfile" in text


def test_the_query_of_a_web_address_stays_at_home(tmp_path: Path) -> None:
    """Of a signed address it is a key, and the card is published."""
    run = a_run(tmp_path / "tuned", data="https://texts.example/poems.jsonl.gz?X-Amz-Signature=secret@2")
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "| data | poems.jsonl.gz |" in text
    assert "secret" not in text


def test_on_the_hub_commands_name_the_repository(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    write_model_card(run / "model", repo="somebody/fish")
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve somebody/fish" in text
    assert "# fish" in text


def test_a_report_brings_the_card_of_a_finished_model_up_to_date(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    write_report(run)
    assert "trained on 8,096 tokens" in (run / "model" / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(run / "model")
    write_report(run)
    assert not (run / "model").exists(), "a run that is still going has no card"


def test_a_run_that_names_itself_as_its_start_ends_there(tmp_path: Path) -> None:
    """As one that was started from a model which its own then replaced."""
    run = a_run(tmp_path / "tuned", data="x.jsonl", init_from=str(tmp_path / "tuned" / "model"))
    assert "|  | tuned |\n" in write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    path = run / "model" / "README.md"
    write_model_card(run / "model")
    path.write_text(path.read_text(encoding="utf-8").replace(MARK, "") + "My words.", encoding="utf-8")
    assert write_model_card(run / "model") is None
    assert "My words." in path.read_text(encoding="utf-8")


def test_a_model_without_a_run_claims_nothing_of_its_training(tmp_path: Path) -> None:
    run = a_run(tmp_path / "tuned", data="x.jsonl")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "## Training" not in text
    assert "scratch" not in text
    assert "by minnow" not in text  # nothing says so any more


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "merged", "model"])
def test_a_model_beside_a_run_has_no_part_in_it(name: str, tmp_path: Path) -> None:
    """The newest run among its neighbours was taken for its own, with tokens, table and curves."""
    stranger = a_run(tmp_path / "poems", data="poems.jsonl")
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": {"pond": {"figures": {}}}}), encoding="utf-8")
    model = load_pretrained(stranger)
    model.model.norm.weight.data.fill_(2.0)  # of the same shape all the same
    save_pretrained(model, tmp_path / name)
    text = write_model_card(tmp_path / name).read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "A language model (Qwen3ForCausalLM): 1 layers of width 16" in text
    for claim in ("trained on", "scratch", "saved by", "poems", "## Training", "## Evaluation"):
        assert claim not in text
    assert ModelCard(text).data.tags == ["qwen3"]
    assert not (tmp_path / name / "curves.png").exists()


def test_a_run_of_several_stages_has_the_model_of_one(tmp_path: Path) -> None:
    """A quickstart's model is a copy of its last stage's; what was made in its folder later is another model's."""
    run = tmp_path / "quickstart"
    a_run(run / "pretrain", data="texts.jsonl")
    a_run(run / "sft", data="talk.jsonl", init_from=str(run / "pretrain"))
    shutil.copytree(run / "sft" / "model", run / "model")
    a_run(run / "later", data="pairs.jsonl", init_from=str(run / "sft"))
    text = write_model_card(run / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "# quickstart" in text
    assert "|  | pretrain | sft |\n" in text
    for start in (run, run / "model"):
        tuned = a_run(tmp_path / f"tuned-from-{start.name}", data="more.jsonl", init_from=str(start))
        text = write_model_card(tuned / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
        assert f"|  | pretrain | sft | {tuned.name} |\n" in text


def test_a_model_from_before_a_collapse_is_not_what_the_log_ends_with(tmp_path: Path) -> None:
    run = a_run(tmp_path / "rl", data="x.jsonl")
    shutil.copytree(run / "model", run / "model-before-collapse")
    text = write_model_card(run / "model-before-collapse").read_text(encoding="utf-8")  # type: ignore[union-attr]
    assert "saved by minnow" in text
    assert "## Training" not in text


def test_runs_that_were_moved_together_find_each_other(tmp_path: Path) -> None:
    """By what the earlier one says of where it was made: a neighbour with the name of a Hub model is not that model."""
    a_run(tmp_path / "there" / "base", data="x.jsonl")
    a_run(tmp_path / "there" / "tuned", data="x.jsonl", init_from=str(tmp_path / "there" / "base" / "model"))
    a_run(tmp_path / "there" / "other", data="x.jsonl", init_from="somebody/base")
    (tmp_path / "there").rename(tmp_path / "here")
    for name, heads in (("tuned", "|  | base | tuned |"), ("other", "|  | other |")):
        text = write_model_card(tmp_path / "here" / name / "model").read_text(encoding="utf-8")  # type: ignore[union-attr]
        assert heads in text


def test_a_reward_model_judges_and_does_not_chat(tmp_path: Path) -> None:
    """Of a whole model and of an adapter: as transformers loads it, and the Hub's own word for it."""
    run = a_run(tmp_path / "judge", data="pairs.jsonl")
    config = json.loads((run / "model" / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (run / "model" / "config.json").write_text(json.dumps(config))
    write_model_card(run / "model")
    (run / "model" / "config.json").unlink()
    whole = (run / "model" / "README.md").read_text(encoding="utf-8")
    (run / "model" / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS"}))
    write_model_card(run / "model")
    adapter = (run / "model" / "README.md").read_text(encoding="utf-8")
    for text in (whole, adapter):
        assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-classification"
        assert "minnow eval MODEL --judge . --tasks judge --pairs PAIRS.jsonl" in text  # without a pond, too
        assert "minnow chat" not in text
        assert "ollama" not in text
        assert "language model" not in text
    assert "A reward model (Qwen3ForSequenceClassification)" in whole
    assert 'AutoModelForSequenceClassification.from_pretrained(".")' in whole
    assert '{"role": "user"' in whole
    assert "An adapter of a reward model" in adapter
