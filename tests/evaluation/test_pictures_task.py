"""The task `pictures`: who sees is right, who guesses is not, and the table shows both."""

from __future__ import annotations

import pytest
import torch

from minnow.config import UserError
from minnow.data.pond.picture_questions import picture_questions
from minnow.data.pond.pictures import draw
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.engine.outputs import Completion, Completions
from minnow.evaluation import TaskOptions, evaluate, make_tasks
from minnow.evaluation.pictures import PicturesTask, grey
from minnow.evaluation.registry import Subject
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Rendered
from minnow.tokenizer.images import ImageFormat
from minnow.tokenizer.train import train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "What colour is the duck? It is red. 鸭子是什么颜色的？是红色的。"
    return Tokenizer(train_tokenizer([text] * 20, 330)._tokenizer, image_format=ImageFormat(64, 32))


class Seer:
    """An engine that knows the held-out pictures by their bytes, and says the same of all others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.asked = tokenizer, 0
        asked = [q for w in ("trained", "unseen") for lang in ("en", "zh") for q in picture_questions(0, w, lang)]
        pictures = {scene: draw(scene) for scene in {q.scene for q in asked}}
        self.answers: dict[bytes, dict[str, str]] = {}
        for q in asked:
            self.answers.setdefault(pictures[q.scene], {})[q.prompt] = q.answer

    def generate(self, prompts, params) -> list[Completions]:
        assert params.temperature == 0
        self.asked += len(prompts)
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: Rendered) -> Completions:
        (picture,) = prompt.images
        text = self.tokenizer.decode(prompt.ids.tolist())
        known = self.answers.get(picture, {}).items()
        said = next((answer for question, answer in known if f"{question}<" in text), "There is one.")
        done = Completion(ids=[], text=said, finish_reason="stop", logprobs=None, raw_logprobs=None)
        return Completions(prompt_ids=prompt.ids.tolist(), completions=(done,), seed=0)


@pytest.fixture(scope="module")
def seer(tokenizer: Tokenizer) -> Seer:
    return Seer(tokenizer)


@pytest.fixture(scope="module")
def subject(tokenizer: Tokenizer) -> Subject:
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return Subject(CausalLM(config), tokenizer)


def test_who_sees_is_right_and_before_grey_as_wrong_as_who_guesses(subject: Subject, seer: Seer) -> None:
    subject.__dict__["engine"] = seer
    task = PicturesTask(seed=0)
    rows, before = task.rows(), seer.asked
    scores = task.score_rows(subject, rows)
    shares: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        shares.setdefault(row.figure, []).append(score.value)
    means = {name: sum(values) / len(values) for name, values in shares.items()}
    asked = {q for language in ("en", "zh") for q in picture_questions(0, "trained", language)}
    for language in ("en", "zh"):
        for name in ("exact_match", "exact_match_unseen_wording", "colour", "kind", "count", "place", "size"):
            assert means.pop(f"{name}/{language}") == 1, name
        one = sum(q.answer == "There is one." for q in asked if q.language == language) / 500
        assert means.pop(f"grey_picture/{language}") == pytest.approx(one)
        # (1/8 + 1/6 + 1/4 + 1/5 + 1/2) / 5
        assert means.pop(f"chance/{language}") == pytest.approx(0.24833, abs=1e-4)
        guessed = sum(q.guess == q.answer for q in asked if q.language == language) / 500
        assert means.pop(f"most_frequent/{language}") == pytest.approx(guessed)
    assert means == {}
    # Trained, unseen and grey, in two languages: nothing is asked twice for being counted twice.
    assert seer.asked - before == 3 * 2 * 500


def test_a_grey_picture_shows_nothing(tokenizer: Tokenizer) -> None:
    assert (tokenizer.image_format.pixels(grey()) == 128).all()


def test_a_part_of_the_rows_can_be_asked(subject: Subject, seer: Seer) -> None:
    subject.__dict__["engine"] = seer
    task = PicturesTask(seed=0)
    rows = [row for row in task.rows() if row.figure == "count/zh"][:5]
    assert [score.value for score in task.score_rows(subject, rows)] == [1.0] * 5


def test_the_pond_s_seed_is_the_task_s(tmp_path) -> None:
    write_pond(tmp_path / "pond", World.generate(3, 4, 2), mentions=1, conversation_count=4, pair_count=4)
    (task,) = make_tasks("pictures", TaskOptions(pond=tmp_path / "pond"))
    assert [row.question for row in task.rows()] == [row.question for row in PicturesTask(3).rows()]
    assert task.rows()[0].question != PicturesTask(0).rows()[0].question


def test_a_model_that_only_reads_is_told_so() -> None:
    tokenizer = train_tokenizer(["What colour is the duck?"] * 20, 330)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    with pytest.raises(UserError, match="reads text only"):
        evaluate(CausalLM(config), tokenizer, [PicturesTask(0)], max_rows=20)
