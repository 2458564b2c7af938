"""The long-context examination counts the right tokens in the right way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from minnow.cli import main
from minnow.config import UserError
from minnow.data.pond.long_texts import hidden_facts, strangers
from minnow.data.pond.world import World
from minnow.data.pond.write import pretraining_documents, write_pond
from minnow.evaluation import Subject, TaskOptions, evaluate, make_tasks
from minnow.evaluation import long_context as module
from minnow.evaluation.bits_per_byte import document_nats, token_nats
from minnow.evaluation.long_context import MIN_TOKENS, HiddenFacts, LongTexts, readings
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.context import extend_context
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer

torch.set_num_threads(1)
TRAINED = 64


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=1, creatures=4, held_out=1)


@pytest.fixture(scope="module")
def subject(world):
    tokenizer = train_tokenizer((document.text for document in pretraining_documents(world, mentions=20)), 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=TRAINED,
    )  # fmt: skip
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
    return Subject(model, tokenizer)


@pytest.fixture(scope="module")
def texts(world):
    words = " ".join(document.text for document in pretraining_documents(world, mentions=20))
    return [words[start : start + 1200] for start in (0, 1200, 2400)]


def nats_one_by_one(subject, text: str, config: ModelConfig, length: int, context: int) -> list[float]:
    """Straight from the definition: each piece alone, the whole softmax, in float64."""
    model, tokenizer = subject.model, subject.tokenizer
    ids = tokenizer.encode(text)[:context]
    inputs = [tokenizer.end_of_text_id, *ids[:-1]]
    nats = []
    model.config, before = config, model.config
    for start in range(0, len(ids), length):
        piece = torch.tensor([inputs[start : start + length]])
        positions = torch.arange(piece.shape[1])[None]
        hidden = model(piece, positions, CausalAttention(), allow_beyond_trained_length=True)
        logprobs = model.logits(hidden)[0].double().log_softmax(-1)
        targets = ids[start : start + length]
        nats += [-logprobs[i, target].item() for i, target in enumerate(targets)]
    model.config = before
    return nats


def test_bits_by_position_are_those_of_the_definition(subject, texts):
    context = 4 * TRAINED
    with torch.no_grad():
        (result,) = evaluate(subject.model, subject.tokenizer, [LongTexts(subject, texts, context)])
        config = subject.model.config
        for name, shape, length in (
            ("in pieces", config, TRAINED),
            ("as it is", config, context),
            ("yarn", extend_context(config, "yarn", 4), context),
        ):
            nats = [nats_one_by_one(subject, text, shape, length, context) for text in texts]
            token_bytes = subject.tokenizer.token_bytes()
            sizes = [[token_bytes[token] for token in subject.tokenizer.encode(text)[:context]] for text in texts]
            for start, stop, place in ((0, context, "all"), (0, 16, "0-16"), (240, 256, "240-256")):
                bits = sum(sum(row[start:stop]) for row in nats) / math.log(2)
                expected = bits / sum(sum(row[start:stop]) for row in sizes)
                assert result.figures[f"{name}/{place}"].value == pytest.approx(expected, rel=1e-4)
    assert len(result.figures) == 3 * 17
    assert subject.model.config.rope_scaling is None  # put back


def test_token_nats_add_up_to_the_documents(subject, texts):
    documents = [subject.tokenizer.encode(text) for text in texts]
    nats = token_nats(subject.model, documents, 0, TRAINED)
    assert [len(row) for row in nats] == [len(document) for document in documents]
    assert [row.sum().item() for row in nats] == pytest.approx(document_nats(subject.model, documents, 0, TRAINED))
    with pytest.raises(UserError, match="longer than the model's max_position_embeddings"):
        token_nats(subject.model, documents, 0, 2 * TRAINED)


class Echo(torch.nn.Module):
    """A stand-in that is sure of the next token of the text it was given, but for those it must not know."""

    def __init__(self, model: CausalLM, wrong: set[int]) -> None:
        super().__init__()
        self.config, self.head_weight, self.wrong = model.config, model.head_weight, wrong

    def forward(self, tokens, positions, attention, *, allow_beyond_trained_length=False):
        following = tokens.roll(-1, dims=1)
        hidden = torch.nn.functional.one_hot(following, self.config.vocab_size).float()
        for token in self.wrong:
            hidden[following == token] = 0.0
        return hidden

    def logits(self, hidden):
        return hidden


def test_a_fact_counts_when_every_token_of_the_answer_is_likeliest(subject, world):
    task = HiddenFacts(subject, world, 4 * TRAINED)
    assert {row.tokens for row in task.rows()} == {64, 128, 256}
    perfect = Subject(Echo(subject.model, set()), subject.tokenizer)
    rows = list(task.rows())
    assert all(score.value == 1.0 for score in task.score_rows(perfect, rows))
    stop = subject.tokenizer.encode(rows[0].fact.answer)[-1]
    (one,) = task.score_rows(Subject(Echo(subject.model, {stop}), subject.tokenizer), rows[:1])
    assert one.value == 0.0
    # What stands in the question need not be predicted.
    known = set(subject.tokenizer.encode(rows[0].fact.text)) - set(subject.tokenizer.encode(rows[0].fact.answer))
    (one,) = task.score_rows(Subject(Echo(subject.model, known), subject.tokenizer), rows[:1])
    assert one.value == 1.0


def test_texts_have_the_length_asked_for(subject, world):
    encode = subject.tokenizer.encode
    for language in ("en", "zh"):
        facts = list(hidden_facts(world, language, 20, tokens=255, num_tokens=lambda text: len(encode(text))))
        lengths = [len(encode(fact.text + fact.answer)) for fact in facts]
        assert max(lengths) <= 255
        assert sum(lengths) / len(lengths) > 160


def test_readings_of_a_stretched_model():
    config = ModelConfig(max_position_embeddings=128)
    assert [way.name for way in readings(config, 512)] == ["in pieces", "as it is", "yarn"]
    stretched = extend_context(config, "yarn", 4)
    assert [(way.name, way.length) for way in readings(stretched, 512)] == [("in pieces", 128), ("as it is", 512)]


def test_a_text_of_the_trained_length_or_less_is_not_stretched():
    """Nothing is beyond what the model knows, so yarn has no say; and no piece is longer than the text."""
    config = ModelConfig(max_position_embeddings=128)
    for context in (64, 128):
        assert [(way.name, way.length) for way in readings(config, context)] == [
            ("in pieces", context),
            ("as it is", context),
        ]


def test_a_model_reads_as_before_also_after_a_failure(subject):
    before = subject.model.config
    (way,) = [way for way in readings(before, 4 * TRAINED) if way.name == "yarn"]

    def read():
        with way.applied(subject.model):
            assert subject.model.config.rope_scaling is not None
            raise MemoryError

    with pytest.raises(MemoryError):
        read()
    assert subject.model.config is before


def test_at_most_so_many_documents_are_read(subject, texts, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENTS", 2)
    assert {row.document for row in LongTexts(subject, texts, TRAINED).rows()} == {0, 1}


def test_the_pond_s_long_texts_speak_of_held_out_strangers(subject, world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENTS", 16)
    monkeypatch.setattr(module, "FACTS", 2)
    write_pond(tmp_path / "pond", world, mentions=1, conversation_count=1)
    long_texts, facts = make_tasks("long-context", TaskOptions(subject=subject, pond=tmp_path / "pond", context=256))
    read = "\n".join(subject.tokenizer.decode(document) for document in long_texts._documents)
    names = {split: [name for pair in strangers(world, split) for name in pair] for split in ("training", "held_out")}
    assert not any(name in read for name in names["training"])
    assert any(name in read for name in names["held_out"])
    assert {row.fact.language for row in facts.rows()} == {"en", "zh"}
    (_, shortest) = make_tasks("long-context", TaskOptions(subject=subject, pond=tmp_path / "pond", context=MIN_TOKENS))
    assert {row.tokens for row in shortest.rows()} == {MIN_TOKENS}


def test_given_texts_are_read_though_there_is_a_pond(subject, world, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FACTS", 1)
    write_pond(tmp_path / "pond", world, mentions=1, conversation_count=1)
    (tmp_path / "long.txt").write_text(texts[0], encoding="utf-8")
    asked = TaskOptions(
        subject=subject, pond=tmp_path / "pond", texts=(str(tmp_path / "long.txt"),), context=2 * TRAINED
    )
    long_texts, facts = make_tasks("long-context", asked)
    start = subject.tokenizer.encode(texts[0])[: 2 * TRAINED]
    assert long_texts._documents == [start]
    assert long_texts.rows()[0].stop == 2 * TRAINED
    assert max(row.tokens for row in facts.rows()) == 2 * TRAINED


def test_a_fact_is_looked_for_in_the_way_of_its_figure(subject, world, monkeypatch):
    """And the text begins as every text does that the model has read."""
    monkeypatch.setattr(module, "FACTS", 1)
    task = HiddenFacts(subject, world, 4 * TRAINED)
    seen = []

    class Reads(Echo):
        def forward(self, tokens, positions, attention, *, allow_beyond_trained_length=False):
            assert tokens[0, 0] == subject.tokenizer.start_id
            seen.append("as it is" if self.config.rope_scaling is None else "yarn")
            return super().forward(tokens, positions, attention)

    task.score_rows(Subject(Reads(subject.model, set()), subject.tokenizer), task.rows())
    assert seen == [row.reading.name for row in task.rows()]
    assert set(seen) == {"as it is", "yarn"}


def test_what_is_missing_is_said(subject, texts, tmp_path):
    with pytest.raises(UserError, match=r"no text of 4096 tokens \(the longest of 3 has \d+\)"):
        LongTexts(subject, texts, 4096)
    with pytest.raises(UserError, match="no pond beside the model"):
        make_tasks("long-context", TaskOptions(subject=subject, model_folder=tmp_path))
    for context in (0, 8):
        with pytest.raises(UserError, match=f"--context {context} is too short"):
            make_tasks("long-context", TaskOptions(subject=subject, context=context))
    (tmp_path / "long.txt").write_text(texts[0], encoding="utf-8")
    asked = TaskOptions(subject=subject, texts=(str(tmp_path / "long.txt"),), context=TRAINED)
    assert len(make_tasks("long-context", asked)) == 1
    with pytest.raises(UserError, match="no such file"):  # a pond that was named is not left out in silence
        make_tasks("long-context", replace(asked, pond=tmp_path / "pnod"))


def test_minnow_eval_long_context(drawn, subject, world, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "DOCUMENTS", 2)
    monkeypatch.setattr(module, "FACTS", 2)
    run = tmp_path / "run"
    save_pretrained(subject.model, run / "model", subject.tokenizer)
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["eval", str(run), "--tasks", "long-context", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    # Given texts and no pond: bits per byte alone.
    assert main([*command, "--text", str(tmp_path / "long.jsonl"), "--plot", str(tmp_path / "curve.svg")]) == 0
    tasks = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert set(tasks) == {"long-context"}
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    # A pond: its own texts, and hidden facts.
    write_pond(run / "pond", world, mentions=1, conversation_count=1)
    assert main([*command, "--plot", str(tmp_path / "curve.png")]) == 0
    tasks = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert set(tasks["hidden-fact"]["figures"]) == {
        f"{way}/{tokens}" for way in ("as it is", "yarn") for tokens in (64, 128, 256)
    }
    assert (tmp_path / "curve.png").stat().st_size > 1000
    # Stretched for the occasion, everything reads so.
    assert main([*command, "--rope-scaling", "linear", "--factor", "2"]) == 0
    tasks = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert {name.partition("/")[0] for name in tasks["long-context"]["figures"]} == {"in pieces", "as it is"}
    assert main(["eval", str(run), "--tasks", "bpb", "--plot", "x.png"]) == 2
    assert "--plot is read only by long-context: name" in capsys.readouterr().err
    assert load_pretrained(run).config.rope_scaling is None
