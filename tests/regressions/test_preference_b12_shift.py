"""B12: a peer's DPO paired the logits at position t with the token at t, so it scored p(x_t | x_<=t). From a file of
pairs to the numbers in the loss, every token of an answer is scored by what stands before it, first and last too."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.regressions.preference_helpers import wake, write_start

from minnow.data.prepare import DataConfig, prepare
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained
from minnow.tokenizer import Tokenizer
from minnow.training.reference import PreferenceRows, target_logprobs


def test_every_token_of_an_answer_is_scored_by_what_stands_before_it(tmp_path: Path) -> None:
    write_start(tmp_path, pairs=6)
    model, tokenizer = wake(load_pretrained(tmp_path / "start")), Tokenizer.from_pretrained(tmp_path / "start")
    data = DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0)
    prepared = prepare(data, tokenizer, "preference", sequence_length=128, progress=False)
    rows = PreferenceRows(prepared.packed(128)[0], None)
    batch = rows.batch(range(rows.num_rows))
    with torch.no_grad():
        found = target_logprobs(model, batch).split(torch.bincount(batch.answer_N).tolist())
    for document, scores in zip([d for row in batch.document_ids for d in row], found, strict=True):
        ids = prepared.train.tokens(document).tolist()
        answer = [*tokenizer.encode("no" if document % 2 else "yes"), tokenizer.im_end_id]
        first = max(place for place in range(len(ids)) if ids[place : place + len(answer)] == answer)
        expected = []
        for place, token in enumerate(answer, first):
            before = torch.tensor([ids[:place]])
            with torch.no_grad():
                hidden = model(before, torch.arange(place)[None], CausalAttention())
                expected.append(float(model.logits(hidden)[0, -1].log_softmax(0)[token]))
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)
