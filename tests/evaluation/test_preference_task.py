"""The task `preference`: which pairs, what is added up of an answer, and what counts as a win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.stages.stage_helpers import save_lively_model
from tests.without_float64 import WithoutFloat64

from minnow.config import UserError
from minnow.data.pairs import parse_preference
from minnow.data.pond.stories import PHRASEBOOKS
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.evaluation import Subject, TaskOptions, make_tasks
from minnow.evaluation.preference import LabelledPair, PreferenceTask, win
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained
from minnow.tokenizer import Tokenizer


def test_a_better_answer_wins_a_worse_one_loses_and_equal_ones_share() -> None:
    assert (win(2.0, 1.0), win(1.0, 2.0), win(1.0, 1.0)) == (1.0, 0.0, 0.5)


@torch.no_grad()
def test_an_answer_is_as_likely_as_its_own_tokens_together(tmp_path: Path) -> None:
    """Straight from the definition, one conversation at a time; what the user says does not count."""
    save_lively_model(tmp_path, context=256)
    subject = Subject(load_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path))
    answers = [("swims " * (n + 1), "the pond") for n in range(3)]
    answers += [(rejected, chosen) for chosen, rejected in answers]
    pairs = [parse_preference({"prompt": "pond?", "chosen": chosen, "rejected": bad}) for chosen, bad in answers]
    rows = [LabelledPair(pair, "pairs") for pair in pairs]
    values = set()
    for pair, score in zip(pairs, PreferenceTask(rows).score_rows(subject, rows), strict=True):
        expected = []
        for rendered in pair.render(subject.tokenizer):
            ids = torch.from_numpy(rendered.ids).long()[None]
            hidden = subject.model(ids, torch.arange(ids.shape[1])[None], CausalAttention())
            logprobs = subject.model.logits(hidden)[0].double().log_softmax(-1)
            learnt = [place for place in range(1, ids.shape[1]) if rendered.weights[place]]
            expected.append(sum(float(logprobs[place - 1, ids[0, place]]) for place in learnt))
        assert (score.details["chosen_nats"], score.details["rejected_nats"]) == pytest.approx(
            tuple(expected), rel=1e-4
        )
        assert score.value == (expected[0] > expected[1])
        values.add(score.value)
    assert values == {0.0, 1.0}, "or a constant would do"
    with WithoutFloat64():
        PreferenceTask(rows).score_rows(subject, rows)


def test_the_pond_s_pairs_are_held_out_and_named_by_kind_and_language(tmp_path: Path) -> None:
    world = World.generate(creatures=8, held_out=3)
    write_pond(tmp_path / "pond", world, mentions=1, conversation_count=4, pair_count=4)
    (task,) = make_tasks("preference", TaskOptions(pond=tmp_path / "pond"))
    rows = task.rows()
    assert len(rows) == 1000
    kinds = [f"{kind}/{language}" for kind in ("known", "visitor") for language in ("en", "zh")]
    assert {task.figure(row) for row in rows} == {f"preference/{kind}" for kind in kinds}
    trained = [name for creature in world.members("training") for name in (creature.en, creature.zh)]
    for row in rows:
        assert not any(name in row.pair.prompt[0].content for name in trained)
        kind, language = row.label.split("/")
        assert (row.pair.chosen[0].content == PHRASEBOOKS[language].ignorance) == (kind == "visitor")


def test_a_broken_pair_is_named_with_its_place(tmp_path: Path) -> None:
    good, broken = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl.*2.*no `chosen` with a `rejected`"):
        make_tasks("preference", TaskOptions(pairs=(str(tmp_path / "pairs.jsonl"),)))
