"""On-policy distillation: which answers are drawn, and the loss and gradients on them beside a loop in float64."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minnow.data.batches import Batch, Share
from minnow.data.prompts import Prompt
from minnow.engine import Engine
from minnow.model.attention import CausalAttention
from minnow.model.pretrained import load_pretrained
from minnow.objectives.distillation import DistillationLossConfig
from minnow.rl.environment import Reply, SingleTurn
from minnow.rl.on_policy import Agreement, OnPolicyBatches, Student
from minnow.rl.rollouts import RolloutConfig
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, Message
from minnow.training.distillation import Distillation
from minnow.training.metrics_log import MetricsLog
from tests.rl.helpers import saved

PROMPTS = [Prompt(Conversation((Message("user", f"say {number}"),))) for number in range(5)]
SIZES = {"prompts": 3, "samples": 2, "max_tokens": 10}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.from_pretrained(saved(folder / "student", seed=1))
    student, teacher = load_pretrained(folder / "student"), load_pretrained(saved(folder / "teacher", seed=2))
    # Sharper than at the start, and fonder of ending: some answers stop by themselves, some are cut off.
    with torch.no_grad():
        for model in (student, teacher):
            model.head_weight.mul_(3)
            model.head_weight[tokenizer.im_end_id].mul_(4)
    return student, teacher.requires_grad_(False), tokenizer


def make_student(model, tokenizer, rows_per_micro_batch=2, **rollout):
    return Student(Engine(model, tokenizer), SingleTurn, RolloutConfig(**(SIZES | rollout)), 64, rows_per_micro_batch)


def source(student, tmp_path, share=1.0, data=None, total_steps=200):
    log = MetricsLog(tmp_path / "answers.jsonl")
    return OnPolicyBatches(student, PROMPTS, share=share, data=data, seed=3, total_steps=total_steps, log=log)


def documents(batches):
    """(ids read, targets, which of them are supervised) of every answer in some batches."""
    found = []
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for start, end in pairwise(borders):
            if not batch.filler_BT.flatten()[start]:
                piece = (batch.tokens_BT, batch.targets_BT, batch.weights_BT)
                found.append(tuple(tensor.flatten()[start:end].tolist() for tensor in piece))
    return sorted(found)


def naive_divergence(student_V, teacher_V, name, beta):
    """One position, from the definitions; a differentiable float64 number."""
    q, p = F.softmax(student_V, 0), F.softmax(teacher_V, 0)
    if name == "forward":
        return (p * (p / q).log()).sum()
    if name == "reverse":
        return (q * (q / p).log()).sum()
    mixture = beta * p + (1 - beta) * q
    return beta * (p * (p / mixture).log()).sum() + (1 - beta) * (q * (q / mixture).log()).sum()


def naive_loss(student, teacher, answers, config):
    """Answer by answer, each read alone: the mean over the tokens that the student wrote."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for answer in answers:
        ids = torch.tensor([answer.ids[:-1]])
        positions = torch.arange(ids.shape[1])[None]
        logits = [
            F.linear(model(ids, positions, CausalAttention()), model.head_weight)[0] for model in (student, teacher)
        ]
        for t, wrote in enumerate(answer.trained[1:]):
            if wrote:
                student_V, teacher_V = (each[t] / config.temperature for each in logits)
                total = total + config.temperature**2 * naive_divergence(
                    student_V, teacher_V, config.divergence, config.jsd_beta
                )
                count += 1
    return total / count


def doubled(model):
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.double().compute_dtype = torch.float64
    return twin


@pytest.mark.parametrize(
    ("divergence", "beta", "temperature"),
    [("forward", 0.5, 1.0), ("reverse", 0.5, 1.0), ("jsd", 0.3, 2.0)],
)
def test_a_steps_loss_and_gradients_beside_a_naive_loop(models, tmp_path, divergence, beta, temperature):
    student, teacher, tokenizer = models
    config = DistillationLossConfig(alpha=0.0, temperature=temperature, divergence=divergence, jsd_beta=beta)
    objective = Distillation(config, teacher, tokenizer.vocab_size)
    writer = make_student(student, tokenizer)
    answers = []
    really_answer = Student.answer
    writer_source = source(writer, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "answer", lambda *given: answers.extend(really_answer(*given)) or answers)
        batches = writer_source.micro_batches(0, Share())
    assert len(answers) == 6
    assert len(batches) > 1
    count = sum(objective.count(batch) for batch in batches)
    loss = sum(objective(student, batch).loss_sum for batch in batches) / count
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    twin = doubled(student)
    expected = naive_loss(twin, doubled(teacher), answers, config)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    naive_gradients = torch.autograd.grad(expected, list(twin.parameters()))
    for (name, _), gradient in zip(twin.named_parameters(), naive_gradients, strict=True):
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-3, atol=1e-5)


def test_the_ends_of_beta_are_the_two_kl_divergences(models, tmp_path):
    """JSD / beta goes to KL(teacher, student) as beta goes to 0, JSD / (1 - beta) to KL(student, teacher) at 1."""
    student, teacher, tokenizer = models
    batches = source(make_student(student, tokenizer), tmp_path).micro_batches(0, Share())

    def divergence(**loss):
        config = DistillationLossConfig(alpha=0.0, temperature=3.0, **loss)  # softer: the limits are nearer
        objective = Distillation(config, teacher, tokenizer.vocab_size)
        with torch.no_grad():
            return sum(float(objective(student, batch).loss_sum) for batch in batches)

    forward, reverse = divergence(divergence="forward"), divergence(divergence="reverse")
    assert forward != pytest.approx(reverse, rel=0.01)
    assert divergence(divergence="jsd", jsd_beta=1e-3) / 1e-3 == pytest.approx(forward, rel=0.005)
    assert divergence(divergence="jsd", jsd_beta=1 - 1e-3) / 1e-3 == pytest.approx(reverse, rel=0.005)


def test_every_token_that_the_student_wrote_and_no_other_is_learnt(models, tmp_path):
    student, _, tokenizer = models
    writer = make_student(student, tokenizer, prompts=5, samples=4)
    answers = writer.answer(PROMPTS, range(20), seed=0)
    endings = {answer.ending for answer in answers}
    assert endings == {"stop", "length"}, "the test wants both"
    by_ids = {tuple(answer.ids): answer for answer in answers}
    read = documents(writer.rows(answers))
    assert len(read) == 20
    for tokens, targets, weights in read:
        answer = by_ids[(*tokens, targets[-1])]  # the targets are the next tokens, to the last one
        assert targets[:-1] == tokens[1:]
        assert weights == [float(wrote) for wrote in answer.trained[1:]]
        assert weights[-1] == 1
        assert sum(weights) == answer.num_trained
        if answer.ending == "stop":
            assert targets[-1] in (tokenizer.im_end_id, tokenizer.end_of_text_id)
        else:
            assert answer.num_trained == SIZES["max_tokens"]


class Insistent(SingleTurn):
    """Asks once more after every answer."""

    def step(self, answer):
        return Reply((Message("user", "and then"),))


def test_what_others_say_between_the_turns_is_read_but_not_learnt(models):
    student, _, tokenizer = models
    rollout = RolloutConfig(**(SIZES | {"max_turns": 2}))
    writer = Student(Engine(student, tokenizer), Insistent, rollout, 128, 2)
    answers = writer.answer(PROMPTS, range(10), seed=0)
    two_turns = [answer for answer in answers if len(answer.answers) == 2]
    assert two_turns
    assert all(False in answer.trained[answer.trained.index(True) :] for answer in two_turns)
    expected = [[float(wrote) for wrote in answer.trained[1:]] for answer in answers]
    assert sorted(weights for _, _, weights in documents(writer.rows(answers))) == sorted(expected)


def test_two_processes_learn_from_what_one_would(models, tmp_path):
    """Together their answers are those of one process, and so are the sums that the Trainer adds up."""
    student, teacher, tokenizer = models
    objective = Distillation(DistillationLossConfig(alpha=0.0), teacher, tokenizer.vocab_size)

    def of(*shares):
        batches = [
            batch
            for share in shares
            for batch in source(make_student(student, tokenizer), tmp_path).micro_batches(4, share)
        ]
        with torch.no_grad():
            sums = [float(objective(student, batch).loss_sum) for batch in batches]
        return documents(batches), sum(sums), sum(objective.count(batch) for batch in batches)

    read, loss, count = of(Share())
    halves_read, halves_loss, halves_count = of(Share(0, 2), Share(1, 2))
    assert halves_read == read
    assert (halves_loss, halves_count) == (pytest.approx(loss, rel=1e-5), count)


def test_steps_draw_other_prompts_and_the_weights_of_the_moment(models, tmp_path):
    student, _, tokenizer = models
    twin = type(student)(student.config)
    twin.load_state_dict(student.state_dict())
    twin.train()
    batches = source(make_student(twin, tokenizer), tmp_path)
    first = documents(batches.micro_batches(0, Share()))
    assert twin.training, "what follows is an update"
    assert documents(batches.micro_batches(0, Share())) == first
    assert documents(batches.micro_batches(1, Share())) != first
    alone = source(make_student(twin, tokenizer, prompts=1, samples=1), tmp_path)
    alone.prompts = PROMPTS[:1]  # the same prompt at the same place: the random numbers are the step's
    assert documents(alone.micro_batches(0, Share())) != documents(alone.micro_batches(1, Share()))
    with torch.no_grad():
        twin.head_weight.neg_()
    assert documents(batches.micro_batches(0, Share())) != first


class Numbers:
    """Data whose batch for step n is the number n."""

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        return [step]  # type: ignore[list-item]


def test_lambda_mixes_in_updates_on_data(models, tmp_path):
    """A share of 0.3 on own answers, to each prompt in turn; the others read the data in order, leaving nothing out."""
    student, _, tokenizer = models
    asked: list[Prompt] = []
    writer = replace(
        make_student(student, tokenizer, prompts=1, samples=1),
        make_environment=lambda prompt: asked.append(prompt) or SingleTurn(prompt),
    )
    batches = source(writer, tmp_path, 0.3, Numbers())
    assert batches.own.mean() == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 200))
    from_data = [batches.micro_batches(step, Share())[0] for step in np.flatnonzero(~batches.own)[:30]]
    assert from_data == list(range(30))
    for own in np.flatnonzero(batches.own)[:5].tolist():
        assert isinstance(batches.micro_batches(own, Share())[0], Batch)
    assert sorted(map(PROMPTS.index, asked)) == [0, 1, 2, 3, 4]
    longer = source(batches.student, tmp_path, 0.3, Numbers(), total_steps=500)
    assert (longer.own[:200] == batches.own).all()


def test_the_log_goes_back_to_where_the_run_does(models, tmp_path):
    student, _, tokenizer = models
    first = source(make_student(student, tokenizer), tmp_path)
    for step in range(4):
        first.micro_batches(step, Share())
    source(make_student(student, tokenizer), tmp_path).micro_batches(2, Share())
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert 0 <= lines[0]["truncated"] <= 1
    assert 0 < lines[0]["length"] <= 10
    assert "say" in lines[0]["sample"]


def test_agreement_is_the_mean_divergence_over_the_students_tokens(models):
    student, teacher, tokenizer = models
    config = DistillationLossConfig(alpha=0.0, temperature=1.0, divergence="reverse")
    writer = make_student(student, tokenizer)
    found = Agreement(writer, PROMPTS, Distillation(config, teacher, tokenizer.vocab_size))(student)
    answers = writer.answer(PROMPTS, range(10), seed=0)
    with torch.no_grad():
        expected = naive_loss(doubled(student), doubled(teacher), answers, config)
    assert found["held_out/divergence"] == pytest.approx(float(expected), rel=1e-5)
    assert found["held_out/length"] == pytest.approx(np.mean([answer.num_trained for answer in answers]))
    assert found["held_out/truncated"] == pytest.approx(np.mean([answer.ending == "length" for answer in answers]))
    student.train()
