"""A model that was taught another form of conversation than minnow's is not taken for one of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minnow.config import UserError
from minnow.data.prepare import DataConfig
from minnow.evaluation.judge import TransformersJudge, load_judge
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.stages import chat, distill, distill_generate, distill_on_policy, dpo, pretrain, reward, rl, sft
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.template import chat_template
from minnow.training.config import TrainingConfig
from tests.stages.stage_helpers import save_random_model
from tests.tokenizer.tokenizer_helpers import CHATML

TRAINING = TrainingConfig(steps=1, batch_tokens=256, micro_batch_tokens=256, device="cpu", compile="off")
PRACTICE = TrainingConfig(micro_batch_tokens=256, device="cpu", compile="off")
TALK = {"messages": [{"role": "user", "content": "fish"}, {"role": "assistant", "content": "pond"}]}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model whose template is another one."""
    save_random_model(tmp_path / "foreign")
    (tmp_path / "foreign" / "chat_template.jinja").write_text(CHATML)
    return tmp_path / "foreign"


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    rows = [TALK, {"prompt": "fish", "chosen": "pond", "rejected": "sea"}]
    for name, row in zip(("talks", "pairs"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return DataConfig(paths=(str(tmp_path / "talks.jsonl"),), cache_dir=str(tmp_path / "cache"))


def _stages(foreign: Path, ours: Path, run: str, data: DataConfig) -> dict[str, Callable[[], None]]:
    start, shared = str(foreign), {"run": run, "training": TRAINING, "sequence_length": 128}
    learning = shared | {"data": data}
    practising = shared | {"prompts": data.paths, "training": PRACTICE}
    distilling = learning | {"optim": distill.Config(teacher="", data=data).optim}
    return {
        "sft": lambda: sft.run(sft.Config(init_from=start, **learning)),
        "dpo": lambda: dpo.run(dpo.Config(init_from=start, **learning)),
        "reward": lambda: reward.run(reward.Config(init_from=start, **learning)),
        "rl": lambda: rl.run(rl.Config(init_from=start, **practising)),
        "distill": lambda: distill.run(distill.Config(init_from=start, teacher=str(ours), **distilling)),
        "a distilling teacher": lambda: distill.run(distill.Config(init_from=str(ours), teacher=start, **distilling)),
        "on-policy": lambda: distill_on_policy.run(
            distill_on_policy.Config(init_from=start, teacher=str(ours), **practising)
        ),
        "an on-policy teacher": lambda: distill_on_policy.run(
            distill_on_policy.Config(init_from=str(ours), teacher=start, **practising)
        ),
    }


@pytest.mark.parametrize("stage", list(_stages(Path(), Path(), "", DataConfig(paths=("",)))))
def test_stages_on_conversations_refuse_it_before_any_work(
    foreign: Path, data: DataConfig, tmp_path: Path, stage: str
) -> None:
    ours = save_random_model(tmp_path / "ours")
    with pytest.raises(UserError, match="foreign came with another chat template .*--replace_chat_template true"):
        _stages(foreign, ours, str(tmp_path / "run"), data)[stage]()
    assert not (tmp_path / "run").exists()


def test_fine_tuning_can_teach_ours(foreign: Path, data: DataConfig, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    config = sft.Config(init_from=str(foreign), run=run, training=TRAINING, sequence_length=128, data=data)
    sft.run(sft.Config(**(vars(config) | {"replace_chat_template": True})))
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == chat_template()
    assert Tokenizer.from_pretrained(run).foreign_template is None


def test_reading_more_texts_keeps_it(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "the little minnow swims " * 20}) + "\n")
    data = DataConfig(paths=(str(tmp_path / "texts.jsonl"),), cache_dir=str(tmp_path / "cache"), validation_fraction=0)
    run = str(tmp_path / "run")
    pretrain.run(pretrain.Config(init_from=str(foreign), run=run, training=TRAINING, sequence_length=128, data=data))
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == CHATML


def test_a_judge_with_another_template_is_asked_in_its_own(foreign: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(foreign)
    save_pretrained(RewardModel.from_language_model(load_pretrained(foreign)), tmp_path / "judge", tokenizer)
    assert isinstance(load_judge(tmp_path / "judge", torch.device("cpu")), TransformersJudge)


def test_a_teacher_with_another_template_is_asked_elsewhere(foreign: Path, data: DataConfig, tmp_path: Path) -> None:
    config = distill_generate.Config(model=str(foreign), prompts=data.paths, out=str(tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="came with another chat template .* give its --endpoint"):
        distill_generate.run(config)


def test_a_talker_hears_of_it(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.Config(model=str(foreign)).load_engine()
    assert "came with another chat template than minnow's" in " ".join(capsys.readouterr().err.split())
