import io
import json

import pytest
import torch
from rich.console import Console

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.engine.outputs import Completion, Completions
from minnow.evaluation import TaskOptions, evaluate, make_tasks
from minnow.evaluation.evaluate import show, write_results, write_rows
from minnow.evaluation.pond import PondTask, find_world
from minnow.evaluation.registry import Subject
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=5, creatures=6, held_out=2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What does Bolko eat? Bolko eats snails. 波科吃什么？"] * 20, vocab_size=330)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    return CausalLM(config)


class Oracle:
    """An engine that finds the question in the prompt and answers right, but in Chinese only."""

    def __init__(self, tokenizer, task):
        self.tokenizer = tokenizer
        self.answers = {row.prompt: row.answer for row in task.rows() if row.language == "zh"}

    def generate(self, prompts, params):
        assert params.temperature == 0
        texts = [self.tokenizer.decode(prompt.ids.tolist()) for prompt in prompts]
        return [
            Completions(
                prompt_ids=prompt.ids.tolist(),
                completions=(
                    Completion(
                        ids=[],
                        text=next((a for q, a in self.answers.items() if q in text), "I do not know."),
                        finish_reason="stop",
                        logprobs=None,
                        raw_logprobs=None,
                    ),
                ),
                seed=0,
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def test_right_answers_count_and_wrong_ones_do_not(world, model, tokenizer):
    task = PondTask(world)
    subject = Subject(model, tokenizer)
    subject.__dict__["engine"] = Oracle(tokenizer, task)
    rows = task.rows()
    assert len(rows) == 2 * 9 * 2 * 2
    scores = task.score_rows(subject, rows)
    for row, score in zip(rows, scores, strict=True):
        assert score.value == (row.language == "zh")
        assert score.details["expected"] == row.answer
        assert score.details["answer"] == (row.answer if row.language == "zh" else "I do not know.")


def test_a_figure_for_each_kind_of_wording_and_language(world):
    task = PondTask(world)
    for row in task.rows():
        assert (row.wording == "unseen") == task.figure(row).startswith("exact_match_unseen_wording/")
        assert task.figure(row).endswith(f"/{row.language}")


def test_an_answer_has_the_length_that_the_task_gives_it(world, model, tokenizer):
    class Counts:
        def generate(self, prompts, params):
            assert (params.max_tokens, params.temperature) == (PondTask.max_tokens, 0.0)
            done = Completion(ids=[], text="", finish_reason="length", logprobs=None, raw_logprobs=None)
            return [Completions(prompt_ids=prompt.ids.tolist(), completions=(done,), seed=0) for prompt in prompts]

    task, subject = PondTask(world), Subject(model, tokenizer)
    subject.__dict__["engine"] = Counts()
    assert len(task.score_rows(subject, task.rows()[:3])) == 3


def test_an_untrained_model_scores_nothing_and_the_files_say_so(world, model, tokenizer, tmp_path):
    results = evaluate(model, tokenizer, [PondTask(world)], max_rows=20)
    (result,) = results
    assert sum(result.counts.values()) == len(result.rows) == 20
    assert all(bar.value == 0 and bar.high > 0 for bar in result.figures.values())
    assert set(result.figures) <= {
        f"{name}/{language}" for name in ("exact_match", "exact_match_unseen_wording") for language in ("en", "zh")
    }
    write_results(tmp_path / "r.json", "toy", results)
    write_rows(tmp_path / "rows.jsonl", results)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["tasks"]["pond"]["figures"].keys() == result.figures.keys()
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {"prompt", "answer", "expected", "figure", "value"} <= row.keys()
    console = Console(record=True, width=100, file=io.StringIO())
    show(results, console)
    assert "0.0%" in console.export_text()


def test_the_pond_is_found_beside_the_model_or_named(world, tmp_path):
    write_pond(tmp_path / "run" / "pond", world, mentions=5, conversation_count=5)
    (tmp_path / "run" / "model").mkdir()
    assert find_world(TaskOptions(model_folder=tmp_path / "run" / "model")) == world
    assert find_world(TaskOptions(pond=tmp_path / "run" / "pond")) == world
    other = World.generate(seed=6, creatures=4, held_out=1)
    write_pond(tmp_path / "other", other, mentions=1, conversation_count=1)
    beside = tmp_path / "run" / "model"
    assert find_world(TaskOptions(model_folder=beside, pond=tmp_path / "other")) == other, "what is named goes first"
    with pytest.raises(UserError, match="--pond DIR .*--tasks bpb --text FILE"):
        find_world(TaskOptions(model_folder=tmp_path))


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(UserError, match="no such task; there are arithmetic, bpb, .*long-context, .*pond"):
        make_tasks("arithmetics", TaskOptions())
