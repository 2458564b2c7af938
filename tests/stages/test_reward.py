"""Reward models: learnt from pairs, read by transformers, read from transformers, used as judges."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from minnow import cli
from minnow.config import UserError
from minnow.data.pairs import PreferencePair
from minnow.data.prepare import DataConfig, prepare
from minnow.engine import Engine, SamplingParams
from minnow.evaluation.judge import JudgeAccuracy, JudgedAnswers, RewardModelJudge, TransformersJudge, load_judge
from minnow.evaluation.preference import LabelledPair
from minnow.evaluation.registry import Subject, TaskOptions, make_tasks
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.init import InitConfig
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import load_pretrained, load_reward_model, save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.objectives.reward import bradley_terry_loss
from minnow.optim import OptimConfig
from minnow.report.reliability import expected_calibration_error, reliability
from minnow.stages import eval as eval_stage
from minnow.stages import reward
from minnow.tokenizer import Conversation, Message, Tokenizer, ToolCall, train_tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.reward import RewardLossConfig, RewardModeling, reward_margins
from tests.stages.stage_helpers import save_parrot_model, save_random_model

CPU = torch.device("cpu")
TALKS = [
    Conversation((Message("user", f"fish {i}"), Message("assistant", answer)))
    for i in range(5)
    for answer in ("yes gladly", "no")
]


def shape(**changes: object) -> ModelConfig:
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
    }
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["yes no gladly maybe fish 0123456789"] * 20, 320)


def train(
    tmp_path: Path, tokenizer: Tokenizer, lora: LoraConfig, loss: RewardLossConfig | None = None, steps: int = 20
) -> Path:
    """The run folder of a reward model that was taught to like "yes gladly"."""
    # A fresh decoder's layers add nothing: its last token has read nothing, and a head at zero could not move it.
    start = CausalLM(shape(), InitConfig(zero_output_projections=False))
    save_pretrained(start, tmp_path / "start", tokenizer)
    rows = [{"prompt": f"fish {i}", "chosen": "yes gladly", "rejected": "no"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.run(
        reward.Config(
            run=str(tmp_path / "run"),
            init_from=str(tmp_path / "start"),
            data=DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.2),
            sequence_length=128,
            training=TrainingConfig(steps=steps, batch_tokens=512, device="cpu", precision="fp32", compile="off"),
            optim=OptimConfig(optimizer="adamw", matrix_lr=1e-3, embedding_lr=3e-3),
            lora=lora,
            loss=loss or RewardLossConfig(),
        )
    )
    return tmp_path / "run"


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return train(tmp_path, tokenizer, LoraConfig())


def test_a_run_learns_and_transformers_reads_the_same_rewards(drawn: None, trained: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForSequenceClassification

    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the head starts at zero"
    assert lines[-1]["validation_accuracy"] == 1.0
    assert (trained / "reliability.png").stat().st_size > 1000
    theirs = AutoModelForSequenceClassification.from_pretrained(trained / "model").eval()
    assert type(theirs).__name__ == "Qwen3ForSequenceClassification"
    judge = load_judge(trained, CPU)
    assert isinstance(judge, RewardModelJudge)
    rewards = judge(TALKS)
    assert their_rewards(theirs, trained / "model") == pytest.approx(rewards, abs=1e-4)
    assert min(rewards[::2]) > max(rewards[1::2])
    assert TransformersJudge(trained / "model", CPU)(TALKS) == pytest.approx(rewards, abs=1e-4)


def test_a_picture_that_a_kill_prevented_is_made_by_the_next_call(
    drawn: None, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was finished by then, and said so for ever."""
    picture = train(tmp_path, tokenizer, LoraConfig()) / "reliability.png"
    found = re.findall(r"expected calibration error [\d.]+%", " ".join(capsys.readouterr().err.split()))
    picture.unlink()
    train(tmp_path, tokenizer, LoraConfig())
    error = " ".join(capsys.readouterr().err.split())
    assert found
    assert "is finished" in error
    assert re.findall(r"expected calibration error [\d.]+%", error) == found
    assert picture.stat().st_size > 1000
    train(tmp_path, tokenizer, LoraConfig())
    assert "calibration" not in capsys.readouterr().err


def test_a_run_learns_by_the_loss_that_it_was_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A margin shows at once, while the head is zero: -log sigmoid(-m). What keeps rewards around zero shows later."""
    losses = {}
    for name, loss in {
        "default": RewardLossConfig(),
        "margin": RewardLossConfig(margin=0.7),
        "centred": RewardLossConfig(centering=10.0),
    }.items():
        (tmp_path / name).mkdir()
        run = train(tmp_path / name, tokenizer, LoraConfig(), loss, steps=4)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["loss"] for record in records if "loss" in record]
        validated = next(record for record in records if "validation_loss" in record)
        losses[f"{name}, held out"] = [validated["validation_loss"]]
    assert losses["margin"][0] == pytest.approx(math.log(1 + math.exp(0.7)), rel=1e-4)
    assert losses["centred"][0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses["centred"][-1] > losses["default"][-1] + 0.01
    assert losses["margin, held out"][0] > losses["default, held out"][0] + 0.1


def test_what_the_card_shows_gives_the_judge_s_reward(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (trained / "model" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(trained / "model")
    exec(code, {})
    said = float(re.search(r"tensor\(\[\[(\S+?)\]\]", capsys.readouterr().out)[1])  # type: ignore[index]
    talk = Conversation((Message("user", "Hello!"), Message("assistant", "Good day to you.")))
    assert load_judge(trained, CPU)([talk]) == pytest.approx([said], abs=1e-3)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"qk_norm": False, "attention_bias": True}])
def test_what_transformers_writes_is_read(tmp_path: Path, tokenizer: Tokenizer, changes: dict) -> None:
    """Qwen3, Llama and Qwen2 classifiers with a head of their own, written by transformers."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    save_pretrained(RewardModel(shape(**changes)), tmp_path / "ours", tokenizer)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "ours")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    judge = load_judge(tmp_path / "theirs", CPU)
    assert isinstance(judge, RewardModelJudge)
    expected = TransformersJudge(tmp_path / "theirs", CPU)(TALKS)
    assert max(map(abs, expected)) > 1e-3
    assert judge(TALKS * 4) == pytest.approx(expected * 4, abs=1e-4), "more than are read at once"


def test_a_reward_model_is_not_taken_for_a_language_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_pretrained(RewardModel(shape()), tmp_path / "judge", tokenizer)
    save_pretrained(CausalLM(shape()), tmp_path / "writer", tokenizer)
    with pytest.raises(UserError, match="a reward model, which writes nothing"):
        load_pretrained(tmp_path / "judge")
    with pytest.raises(UserError, match="not a reward model"):
        load_reward_model(tmp_path / "writer")
    with pytest.raises(UserError, match="--judge"):
        load_judge(tmp_path / "writer", CPU)


def their_rewards(theirs: torch.nn.Module, tokenizer_folder: Path) -> list[float]:
    """What transformers' model says of each of TALKS."""
    from transformers import AutoTokenizer

    their_tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rewards = []
    for talk in TALKS:
        messages = [{"role": m.role, "content": m.content} for m in talk.messages]
        text = their_tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            inputs = their_tokenizer(text, add_special_tokens=False, return_tensors="pt")
            rewards.append(float(theirs(**inputs).logits))
    return rewards


@pytest.mark.parametrize("settings", [{}, {"dora": True, "rslora": True, "alpha": 3.0, "dropout": 0.1}])
def test_adapters_and_a_head_on_a_frozen_model(tmp_path: Path, tokenizer: Tokenizer, settings: dict) -> None:
    """PEFT loads them onto the base, a judge reads them, and merged they are a plain reward model."""
    import peft
    from transformers import AutoModelForSequenceClassification

    run = train(tmp_path, tokenizer, LoraConfig(rank=4, **settings))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation_accuracy"] == 1.0
    weights = load_file(run / "model/adapter_model.safetensors")
    assert [name for name in weights if "lora_" not in name] == ["base_model.model.score.weight"]
    assert not list(run.rglob("model.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, run / "model").eval()
    judge = load_judge(run, CPU)
    assert isinstance(judge, RewardModelJudge)
    rewards = judge(TALKS)
    assert max(rewards) - min(rewards) > 0.1
    assert their_rewards(theirs, run / "model") == pytest.approx(rewards, abs=1e-5)
    assert cli.main(["merge-lora", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert their_rewards(merged, tmp_path / "merged") == pytest.approx(rewards, abs=1e-5)
    assert load_judge(tmp_path / "merged", CPU)(TALKS) == pytest.approx(rewards, abs=1e-5)


def test_pefts_reward_adapter_is_read_and_stands_for_no_writer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    save_pretrained(CausalLM(shape(), InitConfig(zero_output_projections=False)), tmp_path / "base", tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = peft.LoraConfig(r=4, lora_alpha=3, task_type="SEQ_CLS", target_modules="all-linear")
    theirs = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    judge = load_judge(tmp_path / "adapter", CPU)
    assert judge(TALKS) == pytest.approx(their_rewards(theirs, tmp_path / "base"), abs=1e-5)
    with pytest.raises(UserError, match="a reward model, which writes nothing"):
        load_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="a reward model's adapter, which writes nothing"):
        Engine.from_pretrained(tmp_path / "base", adapters={"judge": tmp_path / "adapter"})
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="its base cannot be had"):
        load_judge(tmp_path / "adapter", CPU)


def test_eval_with_a_judge(trained: Path, tmp_path: Path) -> None:
    eval_stage.run(
        eval_stage.Config(
            model=str(tmp_path / "start"),
            tasks=("preference",),
            pairs=(str(tmp_path / "pairs.jsonl"),),
            judge=str(trained),
            device="cpu",
            max_rows=6,
            json=str(tmp_path / "figures.json"),
        )
    )
    tasks = json.loads((tmp_path / "figures.json").read_text())["tasks"]
    assert tasks["judge_accuracy"]["figures"]["judge_accuracy/pairs.jsonl"]["value"] == 1.0
    assert 0 <= tasks["preference"]["figures"]["preference/pairs.jsonl"]["value"] <= 1
    assert tasks["judged_reward"]["figures"]["judged_reward/pairs.jsonl"]["rows"] == 6
    assert (tasks["judge_accuracy"]["unit"], tasks["judged_reward"]["unit"]) == ("share", "reward")
    with pytest.raises(UserError, match="--tasks judge: say which reward model judges, with --judge"):
        make_tasks("judge", TaskOptions())


SHOWS_ALL = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{{ m.role }}:{{ m.reasoning_content or '' }}|{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.id }} {{ call.function.name }} {{ call.function.arguments.a }})"
    "{% endfor %}{{ m.tool_call_id or '' }};{% endfor %}"
)


def test_a_judge_of_transformers_reads_many_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Rows of different lengths, as one by one; and one by one where padding could be taken for text."""
    save_pretrained(RewardModel(shape(), InitConfig(zero_output_projections=False)), tmp_path / "judge", tokenizer)
    judge = TransformersJudge(tmp_path / "judge", CPU)
    with torch.no_grad():
        judge.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    talks = [Conversation((Message("user", "fish " * (n % 7)), Message("assistant", f"yes {n}"))) for n in range(20)]
    rows: list[int] = []
    judge.model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    expected = [judge([talk])[0] for talk in talks]
    rows.clear()
    assert judge(talks) == pytest.approx(expected, abs=1e-5)
    assert rows == [16, 4]
    for padding in (tokenizer.im_end_id, None):
        judge.model.config.pad_token_id = padding
        rows.clear()
        assert judge(talks) == pytest.approx(expected, abs=1e-5)
        assert rows == [1] * 20
    first = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.im_start_id)])
    judge.tokenizer.backend_tokenizer.post_processor = first
    assert judge(talks) == pytest.approx(expected, abs=1e-5), "the template has said what a text begins with"


def test_a_judge_of_transformers_reads_fewer_long_ones_at_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(RewardModel(shape()), tmp_path / "judge", tokenizer)
    judge = TransformersJudge(tmp_path / "judge", CPU)
    rows: list[tuple[int, ...]] = []
    judge.model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    talks = [
        Conversation((Message("user", "x" * 5 * n), Message("assistant", "yes"))) for n in (3, 8, 1, 6, 2, 7, 5, 4)
    ]
    for most, sizes in ((100, {1, 2}), (20, {1})):  # none is as short as 20
        monkeypatch.setattr("minnow.evaluation.judge.BATCH_TOKENS", most)
        rows.clear()
        judge(talks)
        assert sum(size for size, _ in rows) == 8
        assert all(size == 1 or size * length <= most for size, length in rows)
        assert {size for size, _ in rows} >= sizes


@pytest.mark.parametrize("family", ["Gemma3", "Llama"])
def test_where_a_judge_s_padding_stands(tmp_path: Path, tokenizer: Tokenizer, family: str) -> None:
    """Gemma 3 has it in the configuration of its text part; -1 is none, as old Llamas say."""
    import transformers

    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    if family == "Gemma3":
        sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.Gemma3ForSequenceClassification(
            transformers.Gemma3Config(
                text_config=transformers.Gemma3TextConfig(**sizes, pad_token_id=0),
                vision_config=transformers.SiglipVisionConfig(**sight, image_size=28, patch_size=14),
                mm_tokens_per_image=4,
                num_labels=1,
            )
        )
    else:
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, num_labels=1))
        model.config.pad_token_id = -1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = TransformersJudge(tmp_path, CPU)
    talks = [Conversation((Message("user", "fish " * n), Message("assistant", "yes"))) for n in range(1, 4)]
    assert judge(talks) == pytest.approx([judge([talk])[0] for talk in talks], abs=1e-5)


def test_a_judge_of_transformers_reads_thoughts_calls_and_tools(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_pretrained(RewardModel(shape(), InitConfig(zero_output_projections=False)), tmp_path / "judge", tokenizer)
    (tmp_path / "judge" / "chat_template.jinja").write_text(SHOWS_ALL)
    judge = TransformersJudge(tmp_path / "judge", CPU)
    with torch.no_grad():
        judge.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    call = Message("assistant", "", "hm", (ToolCall("look", {"a": "fish"}),))
    last = Message("assistant", "yes", "seen")
    talk = Conversation((Message("user", "fish?"), call, Message("tool", "9"), last), ({"name": "look"},))
    text = "[look]user:|fish?;assistant:hm|(call00000 look fish);tool:|9call00000;assistant:seen|yes;"
    with torch.no_grad():
        expected = float(judge.model(torch.tensor([tokenizer.encode(text)])).logits)
    assert judge([talk]) == pytest.approx([expected], abs=1e-5)
    with pytest.raises(UserError, match="judge: its chat template refuses a conversation: no system message"):
        judge([Conversation((Message("system", "s"), *talk.messages))])
    judge.tokenizer.chat_template = "{{ 'no tools' if tools is none else tools }}"
    assert judge._rendered(TALKS[0]) == "no tools", "many a template asks just so"


def test_a_judged_answer_keeps_its_call(tmp_path: Path) -> None:
    text = '{"name":"look"}'
    writer_tokenizer = train_tokenizer([text, "swims"] * 20, 340)
    script = f"swims§<tool_call>§{text}§</tool_call>§§<|im_end|>§"
    folder = save_parrot_model(tmp_path / "writer", script, tokenizer=writer_tokenizer)
    judged: list[Conversation] = []

    def judge(conversations: Sequence[Conversation]) -> list[float]:
        judged.extend(conversations)
        return [0.5] * len(conversations)

    tools = ({"name": "look"},)
    asked = (Message("user", "fish?"),)
    pair = PreferencePair(asked, (Message("assistant", "yes"),), (Message("assistant", "no"),), tools)
    row = LabelledPair(pair, "pairs")
    (score,) = JudgedAnswers([row], judge).score_rows(Subject(load_pretrained(folder), writer_tokenizer), [row])
    assert judged == [Conversation((*asked, Message("assistant", "swims", None, (ToolCall("look", {}),))), tools)]
    assert (score.value, score.details["answer"]) == (0.5, "swims")


def test_a_judge_reads_both_answers_of_a_pair_with_its_tools() -> None:
    tools = ({"name": "look"},)
    asked = (Message("user", "fish?"),)
    pair = PreferencePair(asked, (Message("assistant", "yes"),), (Message("assistant", "no"),), tools)
    row = LabelledPair(pair, "pairs")

    def judge(conversations: Sequence[Conversation]) -> list[float]:
        assert conversations == [Conversation((*asked, *answer), tools) for answer in (pair.chosen, pair.rejected)]
        return [2.0, 3.0]

    (score,) = JudgeAccuracy([row], judge).score_rows(SimpleNamespace(), [row])  # type: ignore[arg-type]
    assert score.value == 0.0
    assert (score.details["chosen_reward"], score.details["rejected_reward"]) == (2.0, 3.0)


def test_answers_to_be_judged_are_the_likeliest_ones_and_long_enough() -> None:
    """A judge marks whole answers: many are longer than a sentence."""
    asked: list[SamplingParams] = []
    read: list[str] = []

    def generate(prompts: Sequence[list[int]], params: SamplingParams) -> list[SimpleNamespace]:
        asked.append(params)
        read.extend(map(tokenizer.decode, prompts))
        return [SimpleNamespace(completions=(SimpleNamespace(ids=[]),)) for _ in prompts]

    both = (Message("assistant", "yes"),), (Message("assistant", "no"),)
    pair = PreferencePair((Message("user", "fish?"),), *both, ({"name": "look"},))
    row = LabelledPair(pair, "pairs")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=1024))
    tokenizer = train_tokenizer(["yes no"] * 20, 320)
    subject = SimpleNamespace(model=model, tokenizer=tokenizer, engine=SimpleNamespace(generate=generate))
    task = JudgedAnswers([row], lambda conversations: [0.5] * len(conversations))
    assert [score.value for score in task.score_rows(subject, [row])] == [0.5]  # type: ignore[arg-type]
    assert [(params.temperature, params.max_tokens) for params in asked] == [(0.0, 256)]
    assert "look" in read[0], "with the tools that both answers of the pair had"


def test_a_conversation_too_long_for_the_judge_is_told_as_the_judge_s(tmp_path: Path) -> None:
    """Else it reads as the examined or trained model's, and the advice is about that one's options."""
    folder = save_random_model(tmp_path / "m", context=64)
    reward_model = RewardModel.from_language_model(load_pretrained(folder))
    judge = RewardModelJudge(reward_model, Tokenizer.from_pretrained(folder))
    short, long = (Conversation((Message("user", text), Message("assistant", "yes"))) for text in ("a", "a" * 90))
    assert judge([short]) == [0.0]
    with pytest.raises(UserError, match=r"the reward model reads 64 tokens at most, .* to judge has 1\d\d:"):
        judge([short, long])


def test_none_of_a_judge_s_own_code_is_run(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where somebody at the terminal would have said yes: nobody is asked."""
    code = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    code += "from transformers import LlamaConfig as Config, LlamaForSequenceClassification as Model\n"
    map_ = {"AutoConfig": "whale.Config", "AutoModelForSequenceClassification": "whale.Model"}
    content = {"architectures": ["WhaleForSequenceClassification"], "model_type": "whale", "auto_map": map_}
    (tmp_path / "whale.py").write_text(code)
    (tmp_path / "config.json").write_text(json.dumps(content))
    tokenizer.save_pretrained(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match="transformers cannot load it as a reward model"):
        load_judge(tmp_path, CPU)
    assert not asked
    assert not list(tmp_path.rglob("ran"))


def test_a_classifier_of_several_labels_is_no_judge(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its first number says nothing of how good an answer is."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, num_labels=2, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it gives 2 numbers, a reward model gives one"):
        load_judge(tmp_path, CPU)


def test_a_judge_works_where_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, torch.device]] = []
    monkeypatch.setattr("minnow.evaluation.judge.load_judge", lambda *asked: loaded.append(asked))
    monkeypatch.setattr("minnow.evaluation.judge.labelled_pairs", lambda options: [])
    subject = SimpleNamespace(model=SimpleNamespace(head_weight=torch.empty(1, device="meta")))
    for of in (subject, None):
        tasks = make_tasks("judge", TaskOptions(judge="whale", subject=of))  # type: ignore[arg-type]
        assert [task.name for task in tasks] == ["judge_accuracy", "judged_reward"]
    assert loaded == [("whale", torch.device("meta")), ("whale", CPU)]


def test_a_judge_that_cannot_be_loaded_is_told_in_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files cut off and weights of another shape came as tracebacks of safetensors and torch."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=16, n_layer=1, n_head=1, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_judge(tmp_path, CPU), TransformersJudge)
    (tmp_path / "chat_template.jinja").rename(tmp_path / "chat_template.moved")
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        load_judge(tmp_path, CPU)
    content, weights = (tmp_path / "config.json").read_text(), (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(content), "n_embd": 32}))
    with pytest.raises(UserError, match="transformers cannot load it as a reward model"):
        load_judge(tmp_path, CPU)
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="transformers cannot load it as a reward model: .*header"):
        load_judge(tmp_path, CPU)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="transformers cannot load it as a reward model"):
        load_judge(tmp_path, CPU)


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.5, 0.02)])
def test_bradley_terry_beside_trl(margin: float, centering: float) -> None:
    from trl import RewardTrainer

    class Accelerator:
        def gather_for_metrics(self, x: torch.Tensor) -> torch.Tensor:
            return x

        gather = gather_for_metrics

    rewards = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.4, -2.0], requires_grad=True)

    class Model:
        training = True

        def __call__(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=rewards.unsqueeze(1))

    model = Model()
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=Accelerator(),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(6, 2), "margin": torch.full((3,), margin)}
    expected = RewardTrainer.compute_loss(trainer, model, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, rewards)
    found = bradley_terry_loss(rewards[:3], rewards[3:], margin, centering).mean()
    (gradient,) = torch.autograd.grad(found, rewards)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_packed_pairs_have_the_loss_and_figures_of_conversations_one_by_one(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": f"fish {i}", "chosen": "yes gladly", "rejected": "no" * i} for i in range(1, 8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.0)
    dataset = prepare(config, tokenizer, "preference", sequence_length=96, progress=False).packed(96)[0]
    batch = dataset.batch(range(dataset.num_rows))
    assert batch.filler_BT.any()
    model = RewardModel(shape(), InitConfig(zero_output_projections=False))
    objective = RewardModeling(RewardLossConfig(margin=0.7, centering=0.05))
    even = objective(model, batch)  # the head starts at zero
    assert float(even.loss_sum.detach()) == pytest.approx(7 * math.log(1 + math.exp(0.7)), rel=1e-5)
    assert {name: float(value) for name, value in even.metrics.items()} == {"accuracy": 3.5, "margin": 0, "reward": 0}

    expected = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0, "reward": 0.0}
    margins = []
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
        for pair in (document // 2 for row in batch.document_ids for document in row[::2]):
            rewards = []
            for document in (2 * pair, 2 * pair + 1):
                ids = torch.from_numpy(dataset.shards.tokens(document)[:-1].astype("int64"))  # without the end of text
                assert tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
                hidden = model(ids[None], torch.arange(len(ids))[None], CausalAttention())
                rewards.append(float(hidden[0, -1] @ model.score.weight[0]))
            better, worse = rewards
            expected["loss"] += math.log(1 + math.exp(-(better - worse - 0.7))) + 0.05 * (better + worse) ** 2
            expected["accuracy"] += better > worse
            expected["margin"] += better - worse
            expected["reward"] += (better + worse) / 2
            margins.append(better - worse)
        found = objective(model, batch)
    assert objective.count(batch) == 7
    assert {"loss": float(found.loss_sum), **{name: float(v) for name, v in found.metrics.items()}} == pytest.approx(
        expected, rel=1e-4, abs=1e-4
    )
    assert reward_margins(model, [batch]) == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert 0 < expected["accuracy"] < 7, "or a constant would do"


def test_reliability_by_hand() -> None:
    """Margins of log 3: confidence 0.75. Three of four right: calibrated. Two of four: 25 points too sure."""
    log3 = 1.0986123
    calibrated = reliability([log3, log3, log3, -log3])
    assert len(calibrated) == 1
    assert calibrated[0].confidence == pytest.approx(0.75, abs=1e-6)
    assert expected_calibration_error(calibrated) == pytest.approx(0.0, abs=1e-6)
    assert expected_calibration_error(reliability([log3, log3, -log3, -log3])) == pytest.approx(0.25, abs=1e-6)
    assert reliability([0.0])[0].accuracy == 0.5, "a tie is half right"
    assert reliability([1e6])[0].confidence == 1.0


def test_reliability_has_ten_bins_from_even_odds_to_certainty() -> None:
    """Confidences 0.52, 0.57 and 0.58 (a bin is 0.05 wide), 0.98: how often they are right is weighted by pairs."""
    odds = [math.log(p / (1 - p)) for p in (0.52, 0.57, 0.58, 0.98)]
    bins = reliability([odds[0], odds[1], -odds[2], odds[3], odds[3], odds[3]])
    assert [bin.count for bin in bins] == [1, 2, 3]
    assert [bin.confidence for bin in bins] == pytest.approx([0.52, 0.575, 0.98])
    assert [bin.accuracy for bin in bins] == [1.0, 0.5, 1.0]
    assert expected_calibration_error(bins) == pytest.approx((1 * 0.48 + 2 * 0.075 + 3 * 0.02) / 6)


def test_a_model_without_a_classifier_class_is_refused_before_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    experts = ExpertsConfig(**sizes, scoring="sigmoid")
    save_pretrained(CausalLM(shape(experts=experts, tie_word_embeddings=False)), tmp_path / "start", tokenizer)
    data = DataConfig(paths=("pairs.jsonl",))
    with pytest.raises(UserError, match="no sequence-classification class"):
        reward.run(reward.Config(run=str(tmp_path / "run"), init_from=str(tmp_path / "start"), data=data))
    assert not (tmp_path / "run").exists()
