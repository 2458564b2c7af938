"""B11: a peer gave one border a row, so what shared a row attended to each other. In packed pairs neither the other
answer nor another pair changes what an answer is worth, forward or backward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tests.regressions.preference_helpers import wake, write_start

from minnow.data.prepare import DataConfig, PreparedData, prepare
from minnow.model.pretrained import load_pretrained
from minnow.model.transformer import CausalLM
from minnow.objectives.preference import PreferenceLossConfig
from minnow.tokenizer import Tokenizer
from minnow.training.preference import PreferenceOptimization
from minnow.training.reference import PreferenceRows, target_logprobs


def start(tmp_path: Path) -> tuple[CausalLM, PreparedData]:
    write_start(tmp_path, pairs=6)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "start")
    data = DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0)
    prepared = prepare(data, tokenizer, "preference", sequence_length=64, progress=False)
    return wake(load_pretrained(tmp_path / "start")), prepared


def test_answers_do_not_see_each_other(tmp_path: Path) -> None:
    model, prepared = start(tmp_path)
    batch = PreferenceRows(prepared.packed(192)[0], None).batch([0])
    assert batch.num_answers >= 4, "or there is nobody to see"
    borders = batch.cu_seqlens.tolist()
    with torch.no_grad():
        before = target_logprobs(model, batch)
        for changed in range(batch.num_answers):
            tokens_BT = batch.tokens_BT.clone()
            tokens_BT[0, borders[changed] : borders[changed + 1]] += 1
            after = target_logprobs(model, replace(batch, tokens_BT=tokens_BT))
            own = batch.answer_N == changed
            assert not torch.equal(after[own], before[own])
            torch.testing.assert_close(after[~own], before[~own], rtol=0, atol=1e-6)


def test_a_pairs_gradient_is_its_own(tmp_path: Path) -> None:
    model, prepared = start(tmp_path)
    objective = PreferenceOptimization(PreferenceLossConfig(name="simpo", beta=2.0))
    found = []
    for length in (192, 64):  # several pairs a row, and one
        rows = PreferenceRows(prepared.packed(length)[0], None)
        model.zero_grad()
        objective(model, rows.batch(range(rows.num_rows))).loss_sum.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((rows.num_rows, gradients))
    (few, packed), (many, alone) = found
    assert few < many == 6
    assert packed
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-6)
