"""The objective of preference training: one of `objectives.preference`'s losses on packed pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minnow.model.transformer import CausalLM
from minnow.objectives.preference import PreferenceLossConfig, answer_sums, length_weights, preference_loss
from minnow.training.distribution import sum_over_ranks
from minnow.training.objective import ObjectiveOutput
from minnow.training.reference import PreferenceBatch, target_logprobs


@dataclass
class PreferenceOptimization:
    """A preference loss, summed over pairs and counted in pairs."""

    loss: PreferenceLossConfig
    kl: float = 0.0
    """kto's reference point of the global batch at hand."""

    def count(self, batch: PreferenceBatch) -> float:
        """Pairs."""
        return batch.num_answers / 2

    @torch.no_grad()
    def look_ahead(self, model: CausalLM, batches: Sequence[PreferenceBatch]) -> None:
        """For kto: measure how far the model has moved from the reference on unrelated answers, in nats an answer.

        An estimate of KL(model, reference) from the prompts of the whole global batch, each with the better answer to
        another one (arXiv 2402.01306, section 4.1), so that it does not depend on the cut into micro-batches.
        """
        if self.loss.name != "kto":
            return
        device = next(model.parameters()).device
        moved = pairs = 0.0
        for batch in batches:
            assert batch.unrelated is not None
            assert batch.unrelated_reference_N is not None
            logprobs_N = target_logprobs(model, batch.unrelated.to(device))
            moved += float((logprobs_N - batch.unrelated_reference_N.to(device)).sum())
            pairs += self.count(batch)
        moved, pairs = sum_over_ranks([moved, pairs])
        self.kl = max(0.0, moved / pairs)

    def __call__(self, model: CausalLM, batch: PreferenceBatch) -> ObjectiveOutput:
        """Return the sum of the pairs' losses, and what the pairs look like to the model."""
        logprobs_N = target_logprobs(model, batch)
        num_answers, answer_N = batch.num_answers, batch.answer_N
        weights_N = length_weights(answer_N, num_answers, self.loss.length_alpha)
        plain_A = answer_sums(logprobs_N, answer_N, num_answers)
        logprobs_A = answer_sums(weights_N * logprobs_N, answer_N, num_answers)
        reference_A = answer_sums(weights_N * batch.reference_N, answer_N, num_answers)
        lengths_A = torch.bincount(answer_N, minlength=num_answers)
        kl = logprobs_A.new_tensor(self.kl)
        losses_P = preference_loss(self.loss, logprobs_A, reference_A, lengths_A, plain_A, kl)
        with torch.no_grad():
            metrics = self._metrics(logprobs_A, reference_A, lengths_A)
            metrics["likelihood_accuracy"] = wins(plain_A.view(-1, 2))
            if self.loss.name == "kto":
                metrics["reference_point"] = kl * num_answers / 2
            if self.loss.needs_reference:
                squares_A = answer_sums((logprobs_N - batch.reference_N).square(), answer_N, num_answers)
                metrics["drift"] = (squares_A / lengths_A / 2).view(-1, 2).mean(1).sum()
        return ObjectiveOutput(losses_P.sum(), metrics)

    def _metrics(self, logprobs_A: Tensor, reference_A: Tensor, lengths_A: Tensor) -> dict[str, Tensor]:
        """Sums over pairs.

        accuracy: the chosen answer has the greater reward, beta x its log-ratio to the reference (its log-probability
        without one), per token or length-weighted as in the loss; equal ones count a half. likelihood_accuracy: the
        model would rather say the chosen answer, both summed over all tokens as the task `preference` does. margin,
        chosen_reward, rejected_reward: rewards in nats. drift, where there is a reference: half the squared log-ratio
        per token, which for small changes is the Kullback-Leibler divergence between the two models on these answers
        (the k2 estimate of http://joschu.net/blog/kl-approx.html). reference_point: kto's, in nats per answer.
        """
        scale_A = lengths_A if self.loss.averages else torch.ones_like(lengths_A)
        rewards_P2 = (self.loss.chosen_beta * (logprobs_A - reference_A) / scale_A).view(-1, 2)
        chosen_P, rejected_P = rewards_P2.unbind(1)
        tokens_P2 = lengths_A.float().view(-1, 2)
        return {
            "accuracy": wins(rewards_P2),
            "margin": (chosen_P - rejected_P).sum(),
            "chosen_reward": chosen_P.sum(),
            "rejected_reward": rejected_P.sum(),
            "chosen_tokens": tokens_P2[:, 0].sum(),
            "rejected_tokens": tokens_P2[:, 1].sum(),
        }


def wins(scores_P2: Tensor) -> Tensor:
    """How many pairs have the greater score first: [P, 2] -> 0-D; equal ones are half a win."""
    return (0.5 + 0.5 * (scores_P2[:, 0] - scores_P2[:, 1]).sign()).sum()
