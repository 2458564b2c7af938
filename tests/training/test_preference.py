"""Preference training on packed pairs: the batch, the reference on disk, and the loss against sequences one by one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minnow.config import UserError
from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, prepare
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.lora import LoraConfig, add_lora, lora_layers
from minnow.model.transformer import CausalLM
from minnow.objectives.preference import PreferenceLossConfig
from minnow.stages import dpo
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training import reference
from minnow.training.config import TrainingConfig
from minnow.training.preference import PreferenceOptimization
from minnow.training.reference import (
    AnswerLogprobs,
    PreferenceRows,
    pair_of_another_prompt,
    reference_logprobs,
    repeated_prompts,
    row_batches,
    unrelated_batch,
    weights_fingerprint,
)
from tests.regressions.preference_helpers import write_start


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["say fish heron otter 0 1 2 3 4 5 6 7 8 9"] * 20, 320)


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> PackedDataset:
    rows = [{"prompt": f"say {i}", "chosen": f"{i} fish", "rejected": f"heron {i} otter {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0)
    return prepare(config, tokenizer, "preference", sequence_length=128, progress=False).packed(128)[0]


def make_model(tokenizer: Tokenizer, seed: int) -> CausalLM:
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = CausalLM(shape, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


def alone(model: CausalLM, dataset: PackedDataset, document: int) -> torch.Tensor:
    """Log-probability of one answer."""
    return tokens_alone(model, dataset, document).sum()


def tokens_alone(model: CausalLM, dataset: PackedDataset, document: int) -> torch.Tensor:
    """Log-probabilities of an answer's tokens, the sequence alone in a batch and the log-softmax taken whole."""
    tokens = torch.from_numpy(dataset.shards.tokens(document).astype("int64"))
    weights = torch.from_numpy(dataset.shards.weights(document))
    hidden = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], CausalAttention())
    logprobs = F.log_softmax(model.logits(hidden)[0], dim=-1)
    return logprobs.gather(1, tokens[1:, None]).squeeze(1)[weights[1:] > 0]


def ask(model: CausalLM, dataset: PackedDataset, folder: Path, key: str = "data") -> AnswerLogprobs:
    batches = row_batches(dataset, dataset.num_rows, 2)
    return reference_logprobs(model, batches, dataset.shards.num_documents, folder / "r", key)


def test_packed_pairs_give_the_loss_and_gradient_of_sequences_one_by_one(
    tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path
) -> None:
    policy, start = make_model(tokenizer, 1), make_model(tokenizer, 2)
    rows = PreferenceRows(dataset, ask(start, dataset, tmp_path))
    objective = PreferenceOptimization(PreferenceLossConfig(beta=0.2))
    batch = rows.batch(range(rows.num_rows))
    output = objective(policy, batch)
    output.loss_sum.backward()
    packed = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    losses, right = [], 0.0
    for pair in range(12):
        with torch.no_grad():
            before = alone(start, dataset, 2 * pair) - alone(start, dataset, 2 * pair + 1)
        margin = alone(policy, dataset, 2 * pair) - alone(policy, dataset, 2 * pair + 1) - before
        right += float(margin.detach() > 0)
        losses.append(-F.logsigmoid(0.2 * margin))
    torch.stack(losses).sum().backward()
    assert objective.count(batch) == 12
    torch.testing.assert_close(output.loss_sum, torch.stack(losses).sum(), rtol=1e-5, atol=1e-5)
    assert float(output.metrics["accuracy"]) == right
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path) -> None:
    policy = make_model(tokenizer, 1)
    start = make_model(tokenizer, 2)
    rows = PreferenceRows(dataset, ask(start, dataset, tmp_path))
    objective = PreferenceOptimization(PreferenceLossConfig(beta=0.2, length_alpha=0.5))
    whole = objective(policy, rows.batch(range(rows.num_rows)))
    parts = [objective(policy, rows.batch([row])) for row in range(rows.num_rows)]
    assert len(parts) > 1
    for name, value in {"loss": whole.loss_sum, **whole.metrics}.items():
        summed = sum(part.loss_sum if name == "loss" else part.metrics[name] for part in parts)
        torch.testing.assert_close(value, summed, rtol=1e-5, atol=1e-6, msg=name)


def test_a_model_of_the_same_weights_and_other_rotary_frequencies_is_asked_itself(
    tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path
) -> None:
    """What the first had said was taken for its own."""
    model = make_model(tokenizer, 2)
    ask(model, dataset, tmp_path)
    model.config = dataclasses.replace(model.config, rope_theta=100.0)
    with torch.no_grad():
        expected = tokens_alone(model, dataset, 0)
    torch.testing.assert_close(ask(model, dataset, tmp_path).of([0]), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_is_asked_once(
    tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tokenizer, 1)
    first = ask(model, dataset, tmp_path)
    asked: list[int] = []
    really_ask = reference._ask
    monkeypatch.setattr(reference, "_ask", lambda *arguments: asked.append(1) or really_ask(*arguments))
    again = ask(model, dataset, tmp_path)
    assert not asked, "it lies on disk"
    assert torch.equal(first.logprobs_N, again.logprobs_N)
    with torch.no_grad():
        model.head_weight[3] += 0.1
    ask(model, dataset, tmp_path)
    assert len(asked) == 1, "another model is another reference"
    ask(model, dataset, tmp_path, "other data")
    assert len(asked) == 2, "and so are other data"
    model.compute_dtype = torch.bfloat16
    ask(model, dataset, tmp_path, "other data")
    assert len(asked) == 3, "and another precision"


def test_a_fingerprint_is_of_names_types_and_shapes_too() -> None:
    """The same bytes under another name, in another shape or as other numbers are another model."""
    numbers = torch.arange(8.0)
    found = [
        weights_fingerprint(torch.nn.ParameterDict({name: torch.nn.Parameter(tensor, requires_grad=False)}))
        for name, tensor in (
            ("a", numbers.view(2, 4)),
            ("a", numbers.view(2, 4).clone()),
            ("b", numbers.view(2, 4)),
            ("a", numbers.view(4, 2)),
            ("a", numbers.view(torch.int32).view(2, 4)),
        )
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_the_reference_drops_nothing(tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path) -> None:
    """Dropout is of training: what the reference says is what the model says without."""
    model = make_model(tokenizer, 1)
    add_lora(model, LoraConfig(rank=4, dropout=0.5), base="")
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(generator=torch.Generator().manual_seed(3))
    said = ask(model.train(), dataset, tmp_path).logprobs_N
    assert model.training
    with torch.no_grad():
        expected = torch.cat([tokens_alone(model.eval(), dataset, document) for document in range(24)])
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)


def test_an_unrelated_answer_is_cut_at_the_sequence_length(dataset: PackedDataset) -> None:
    whole = unrelated_batch(dataset, range(12))
    length = int(whole.cu_seqlens.diff().min()) - 2
    cut = unrelated_batch(SimpleNamespace(shards=dataset.shards, sequence_length=length), range(12))  # type: ignore
    assert cut.cu_seqlens.diff().tolist() == [length] * 12
    for name in ("tokens_BT", "targets_BT", "weights_BT", "positions_BT"):
        pieces = torch.tensor_split(getattr(whole, name)[0], whole.cu_seqlens[1:-1].long())
        assert torch.equal(getattr(cut, name)[0], torch.cat([piece[:length] for piece in pieces])), name


def test_training_starts_at_log_two_without_drift(tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path) -> None:
    model = make_model(tokenizer, 1)
    rows = PreferenceRows(dataset, ask(model, dataset, tmp_path))
    batch = rows.batch([1, 0])
    output = PreferenceOptimization(PreferenceLossConfig())(model, batch)
    assert float(output.loss_sum.detach()) == pytest.approx(batch.num_answers / 2 * math.log(2), rel=1e-5)
    assert float(output.metrics["drift"]) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        PreferenceLossConfig(beta=0.2),
        PreferenceLossConfig(beta=0.2, average=True),
        PreferenceLossConfig(beta=0.2, length_alpha=0.3),
        PreferenceLossConfig(name="hinge", beta=0.2),
        PreferenceLossConfig(name="robust", beta=0.2, label_smoothing=0.1),
        PreferenceLossConfig(name="ipo", beta=0.2),
        PreferenceLossConfig(name="simpo", beta=2.0),
        PreferenceLossConfig(name="orpo", beta=0.1),
        PreferenceLossConfig(name="kto", beta=0.2),
    ],
    ids=lambda loss: f"{loss.name}-{loss.average}-{loss.length_alpha}",
)
def test_the_figures_are_those_of_answers_one_by_one(
    loss: PreferenceLossConfig, tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path
) -> None:
    policy, start = make_model(tokenizer, 1), make_model(tokenizer, 2)
    rows = PreferenceRows(dataset, ask(start, dataset, tmp_path) if loss.needs_reference else None)
    objective = PreferenceOptimization(loss, kl=0.25)
    with torch.no_grad():
        found = objective(policy, rows.batch(range(rows.num_rows))).metrics
    # Each pair on its own. Reward: beta x (log-probability - the reference's, where there is one), tokens beyond the
    # other answer's length times length_alpha, divided by the tokens where the loss counts per token.
    expected = dict.fromkeys(found, 0.0)
    for pair in range(12):
        rewards, likelihoods, drifts, lengths = [], [], [], []
        with torch.no_grad():
            ours = [tokens_alone(policy, dataset, 2 * pair + side) for side in (0, 1)]
            theirs = [tokens_alone(start, dataset, 2 * pair + side) for side in (0, 1)]
        for a, b in zip(ours, theirs, strict=True):
            ratio = a - b if loss.needs_reference else a
            shared = min(map(len, ours))
            reward = loss.chosen_beta * (ratio[:shared].sum() + loss.length_alpha * ratio[shared:].sum())
            rewards.append(float(reward) / (len(a) if loss.average or loss.name in ("ipo", "simpo", "orpo") else 1))
            likelihoods.append(float(a.sum()))
            drifts.append(float((a - b).square().mean()) / 2)
            lengths.append(len(a))
        expected["accuracy"] += rewards[0] > rewards[1]
        expected["likelihood_accuracy"] += likelihoods[0] > likelihoods[1]
        expected["margin"] += rewards[0] - rewards[1]
        expected["chosen_reward"] += rewards[0]
        expected["rejected_reward"] += rewards[1]
        expected["chosen_tokens"] += lengths[0]
        expected["rejected_tokens"] += lengths[1]
        if loss.needs_reference:
            expected["drift"] += sum(drifts) / 2
        if loss.name == "kto":
            expected["reference_point"] += 0.25
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < expected["accuracy"] < 12, "or a constant would do"


def test_the_share_of_repeated_prompts(dataset: PackedDataset) -> None:
    """Of each pair: the prompt once, over the positions of both conversations."""
    repeated = positions = 0
    for pair in range(12):
        weights = [dataset.shards.weights(2 * pair + side).tolist() for side in (0, 1)]
        repeated += next(place for place, weight in enumerate(weights[1]) if weight)
        positions += sum(len(answer) - 1 for answer in weights)
    assert repeated_prompts(dataset.shards, 1000) == pytest.approx(repeated / positions)
    assert 0 < repeated_prompts(dataset.shards, 1) < 0.5


def test_equal_rewards_are_half_a_win() -> None:
    """Three pairs: a win, a tie, a loss."""
    sums_A = torch.tensor([-1.0, -2.0, -3.0, -3.0, -4.0, -1.0])
    objective = PreferenceOptimization(PreferenceLossConfig(name="simpo"))
    assert float(objective._metrics(sums_A, torch.zeros(6), torch.ones(6))["accuracy"]) == 1.5


def test_kto_never_takes_an_answer_to_the_same_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Several pairs of a prompt in a row, the last ones sharing the first one's, one answer with reasoning."""
    prompts = ["say 1", "say 1", "say 2", "say 3", "say 3", "say 3", "say 1", "say 1"]
    rows = [{"prompt": p, "chosen": f"{i} fish", "rejected": f"{i} otter"} for i, p in enumerate(prompts)]
    message = {"role": "assistant", "content": "1 fish", "reasoning_content": "say 1"}
    rows[1] |= {"chosen": [message], "rejected": [{**message, "content": "1 otter"}]}  # its prompt has no think block
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0)
    dataset = prepare(config, tokenizer, "preference", sequence_length=128, progress=False).packed(128)[0]
    assert [pair_of_another_prompt(dataset.shards, pair) for pair in range(8)] == [2, 2, 3, 6, 6, 6, 2, 2]
    batch = unrelated_batch(dataset, range(8))
    pieces = torch.tensor_split(batch.tokens_BT[0], batch.cu_seqlens[1:-1].long())
    for pair, (piece, other) in enumerate(zip(pieces, [2, 2, 3, 6, 6, 6, 2, 2], strict=True)):
        text = tokenizer.decode(piece)
        assert prompts[pair] in text
        assert f"{other} fish" in text


def test_kto_refuses_data_with_one_prompt_before_any_work(tmp_path: Path) -> None:
    write_start(tmp_path, pairs=1)
    row = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(row + row.replace('"no"', '"maybe"'))
    config = dpo.Config(
        run=str(tmp_path / "run"),
        init_from=str(tmp_path / "start"),
        data=DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0),
        sequence_length=64,
        loss=PreferenceLossConfig(name="kto"),
        training=TrainingConfig(steps=1, batch_tokens=64, device="cpu", precision="fp32", compile="off"),
    )
    with pytest.raises(UserError, match="one prompt"):
        dpo.run(config)
    assert not (tmp_path / "run").exists()


def test_kto_measures_its_reference_point_on_the_whole_batch(
    tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path
) -> None:
    policy, start = make_model(tokenizer, 1), make_model(tokenizer, 2)
    every_pair = [unrelated_batch(dataset, range(12))]
    unrelated = reference_logprobs(start, every_pair, 12, tmp_path / "r", "unrelated")
    rows = PreferenceRows(dataset, ask(start, dataset, tmp_path), unrelated)

    texts = [tokenizer.decode(dataset.shards.tokens(document)) for document in range(24)]
    pieces = torch.tensor_split(every_pair[0].tokens_BT[0], every_pair[0].cu_seqlens[1:-1].long())
    for pair, piece in enumerate(pieces):
        prompt, answer = texts[2 * pair].rpartition("</think>")[0], texts[2 * ((pair + 1) % 12)]
        expected = prompt + "</think>" + answer.rpartition("</think>")[2].removesuffix("<|endoftext|>")
        assert tokenizer.decode(piece) == expected

    moved = 0.0
    with torch.no_grad():
        for piece, weights in zip(
            pieces,
            torch.tensor_split(every_pair[0].weights_BT[0], every_pair[0].cu_seqlens[1:-1].long()),
            strict=True,
        ):
            for model, sign in ((policy, 1), (start, -1)):
                hidden = model(piece[None], torch.arange(len(piece))[None], CausalAttention())
                logprobs = F.log_softmax(model.logits(hidden)[0], dim=-1)[:-1].gather(1, piece[1:, None]).squeeze(1)
                moved += sign * float((logprobs * weights[:-1]).sum())

    swapped = -1 if moved < 0 else 1  # the reference point is never below zero: look from the other model then
    if swapped < 0:
        unrelated = reference_logprobs(policy, every_pair, 12, tmp_path / "r", "unrelated")
        rows = PreferenceRows(dataset, ask(policy, dataset, tmp_path), unrelated)
        policy = start
    objective = PreferenceOptimization(PreferenceLossConfig(name="kto"))
    parts = [rows.batch([row]) for row in range(rows.num_rows)]
    objective.look_ahead(policy, parts)
    assert objective.kl == pytest.approx(swapped * moved / 12, rel=1e-4)
    cut = sum(objective(policy, part).loss_sum for part in parts)
    objective.look_ahead(policy, [rows.batch(range(rows.num_rows))])
    whole = objective(policy, rows.batch(range(rows.num_rows))).loss_sum
    torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-6)


def test_ktos_reference_point_is_never_below_zero(tokenizer: Tokenizer, dataset: PackedDataset, tmp_path: Path) -> None:
    """Seen from each of two models the other has moved as far the other way."""
    models, found = [make_model(tokenizer, seed) for seed in (1, 2)], []
    for number, (policy, start) in enumerate((models, models[::-1])):
        unrelated = reference_logprobs(
            start, [unrelated_batch(dataset, range(12))], 12, tmp_path, f"unrelated-{number}"
        )
        rows = PreferenceRows(dataset, ask(start, dataset, tmp_path), unrelated)
        objective = PreferenceOptimization(PreferenceLossConfig(name="kto"))
        objective.look_ahead(policy, [rows.batch(range(rows.num_rows))])
        found.append(objective.kl)
    assert min(found) == 0
    assert max(found) > 0.1
