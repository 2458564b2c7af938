"""The task `judge`: a reward model gives marks to the model's answers; and how far it can be trusted with pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn

from minnow.config import UserError
from minnow.data.openai_form import openai_messages, openai_tools
from minnow.engine.hidden import packed_hidden
from minnow.engine.sampling import SamplingParams
from minnow.evaluation.preference import LabelledPair, PairTask, groups, in_pairs, labelled_pairs, shown, win
from minnow.evaluation.registry import Score, Subject, Task, TaskOptions, register
from minnow.evaluation.statistics import Interval, bootstrap_ratio
from minnow.evaluation.turns import ask
from minnow.model.adapter import is_adapter
from minnow.model.pretrained import is_reward_model, load_reward_model, resolve_model_folder
from minnow.model.reward_model import RewardModel
from minnow.tokenizer.chat import Conversation, render
from minnow.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 256
BATCH_ROWS = 16
"""Conversations that a model of transformers reads at once, at most."""
BATCH_TOKENS = 16_384
"""Tokens of these, padding included; a longer conversation is read alone."""


class Judge(Protocol):
    """Gives a conversation one number: the greater, the better its last answer."""

    @property
    def model(self) -> nn.Module:
        """What judges."""
        ...

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """Judge each conversation."""
        ...


class RewardModelJudge:
    """A reward model with our decoder, read in packed batches."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward at each conversation's last token. UserError for one that is longer than the model's context."""
        rewards: list[float] = []
        for group in groups(conversations):
            texts = [render(self.tokenizer, conversation).ids.tolist() for conversation in group]
            longest, context = max(map(len, texts)), self.model.config.max_position_embeddings
            if longest > context:
                raise UserError(
                    f"the reward model reads {context} tokens at most, and a conversation to judge has {longest}: take "
                    "one of a longer context, or shorter prompts and answers"
                )
            hidden_ND = packed_hidden(self.model, texts)
            last = torch.tensor([len(text) for text in texts], device=hidden_ND.device).cumsum(0) - 1
            rewards += self.model.rewards(hidden_ND[last]).tolist()
        return rewards


class TransformersJudge:
    """Any sequence-classification model with one label that transformers can load, no code of its own run."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.folder = folder
        try:
            # Left out, it lets transformers ask at the terminal whether the folder's own code may run.
            model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: transformers cannot load it as a reward model: {error}") from error
        self.model = model.to(device).eval()  # not above: a device without room is another matter
        if self.model.config.num_labels != 1:
            raise UserError(f"{folder}: it gives {self.model.config.num_labels} numbers, a reward model gives one")
        if self.tokenizer.chat_template is None:
            raise UserError(f"{folder}: its tokenizer has no chat template, so it cannot read conversations")

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """The model's only logit.

        In padded batches, but one at a time where a text holds the padding token itself (often the end of a turn):
        transformers takes the last token that is not padding for a text's last. So too where there is no such token;
        old configurations say -1 then.
        """
        texts = [self.tokenizer(self._rendered(c), add_special_tokens=False)["input_ids"] for c in conversations]
        padding = self.model.config.get_text_config().pad_token_id
        alone = padding is None or padding < 0 or any(padding in text for text in texts)
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # rows of like length together
        rewards = [0.0] * len(texts)
        while order:
            fitting = 1 if alone else min(BATCH_ROWS, BATCH_TOKENS // max(1, len(texts[order[-1]])))
            rows = order[-max(1, fitting) :]
            del order[-len(rows) :]
            lengths = torch.tensor([len(texts[n]) for n in rows])
            ids_BT = torch.full((len(rows), int(lengths.max())), 0 if alone else padding)
            for row, n in zip(ids_BT, rows, strict=True):
                row[: len(texts[n])] = torch.tensor(texts[n])
            mask_BT = (torch.arange(ids_BT.shape[1]) < lengths[:, None]).long()
            device = self.model.device
            logits_B1 = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
            for n, reward in zip(rows, logits_B1[:, 0].tolist(), strict=True):
                rewards[n] = reward
        return rewards

    def _rendered(self, conversation: Conversation) -> str:
        """By the model's own template, which is given all that was said: thoughts, calls and tools too."""
        messages = openai_messages(conversation.messages, arguments_as_text=False)
        tools: Any = openai_tools(conversation.tools) or None
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except TemplateError as error:
            raise UserError(f"{self.folder}: its chat template refuses a conversation: {error}") from error


def load_judge(model: str | Path, device: torch.device) -> Judge:
    """The reward model in a folder, a run folder or on the Hub; read by us where the decoder is ours."""
    folder = resolve_model_folder(model)
    if not is_reward_model(folder):
        raise UserError(f"--judge {model}: not a sequence-classification model (minnow reward trains one)")
    try:
        reward_model = load_reward_model(folder, device=device)
        tokenizer = Tokenizer.from_pretrained(folder)
        tokenizer.require_chat_template(str(model))
    except UserError:  # another decoder or template than ours
        if is_adapter(folder):
            raise
        return TransformersJudge(folder, device)
    return RewardModelJudge(reward_model, tokenizer)


class JudgeAccuracy(PairTask):
    """Share of pairs that the judge itself gets right: how far the figures below it can be trusted."""

    name = "judge_accuracy"

    def __init__(self, pairs: Sequence[LabelledPair], judge: Judge) -> None:
        super().__init__(pairs)
        self.judge = judge

    def score_rows(self, subject: Subject, rows: Sequence[LabelledPair]) -> list[Score]:
        """Judge both answers of each pair."""
        both = [
            Conversation((*row.pair.prompt, *answer), row.pair.tools)
            for row in rows
            for answer in (row.pair.chosen, row.pair.rejected)
        ]
        return [
            Score(win(chosen, rejected), details=shown(row) | {"chosen_reward": chosen, "rejected_reward": rejected})
            for row, (chosen, rejected) in zip(rows, in_pairs(self.judge(both)), strict=True)
        ]


class JudgedAnswers(PairTask):
    """Mean reward of the model's own answers to the pairs' prompts, in the judge's unit."""

    name = "judged_reward"
    unit = "reward"

    def __init__(self, pairs: Sequence[LabelledPair], judge: Judge) -> None:
        super().__init__(pairs)
        self.judge = judge

    def score_rows(self, subject: Subject, rows: Sequence[LabelledPair]) -> list[Score]:
        """Let the model answer greedily, and judge."""
        asked = [Conversation(row.pair.prompt, row.pair.tools) for row in rows]
        answers = ask(subject, asked, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
        rewards = self.judge(
            [
                Conversation((*row.pair.prompt, answer), row.pair.tools)
                for row, answer in zip(rows, answers, strict=True)
            ]
        )
        return [
            Score(
                reward, details=shown(row) | {"answer": answer.content, "calls": [vars(c) for c in answer.tool_calls]}
            )
            for row, answer, reward in zip(rows, answers, rewards, strict=True)
        ]

    def error_bar(self, scores: Sequence[Score]) -> Interval:
        """Bootstrap over prompts."""
        return bootstrap_ratio([score.value for score in scores], [1.0] * len(scores))


@register("judge")
def make(options: TaskOptions) -> list[Task[Any]]:
    """The judge's own accuracy on the pairs, then its marks for the model's answers to their prompts."""
    if options.judge is None:
        raise UserError("--tasks judge: say which reward model judges, with --judge")
    device = torch.device("cpu") if options.subject is None else options.subject.model.head_weight.device
    judge = load_judge(options.judge, device)
    pairs = labelled_pairs(options)
    return [JudgeAccuracy(pairs, judge), JudgedAnswers(pairs, judge)]
