import itertools
import json
import math

import pytest
import torch
from tests.without_float64 import WithoutFloat64

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.evaluation.bits_per_byte import BitsPerByteTask, Text, _batches, document_nats, make
from minnow.evaluation.evaluate import evaluate
from minnow.evaluation.registry import Subject, TaskOptions, labels
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer

torch.set_num_threads(1)
END = 0


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    model = CausalLM(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # every part has a say, also those that start at zero
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def naive_nats(model, document):
    tokens = torch.tensor([[END, *document]])
    positions = torch.arange(tokens.shape[1])[None]
    logits = model.logits(model(tokens, positions, CausalAttention()))[0, :-1].double()
    return -float(torch.log_softmax(logits, -1)[range(len(document)), document].sum())


def test_side_by_side_equals_one_by_one(model):
    documents = [[5, 6, 7], list(range(10, 70)), [250], [9, 9, 9, 9]]
    expected = [naive_nats(model, document) for document in documents]
    assert document_nats(model, documents, END, 64) == pytest.approx(expected, rel=1e-5)


def test_no_float64_is_asked_of_the_device(model):
    expected = document_nats(model, [[1, 2, 3]], END, 64)
    with WithoutFloat64():
        assert document_nats(model, [[1, 2, 3]], END, 64) == expected


@torch.no_grad()
def test_a_long_document_is_cut_and_every_token_predicted_once(model):
    document = list(range(20, 45))
    pieces = [document[:10], document[10:20], document[20:]]
    (nats,) = document_nats(model, [document], END, 10)
    expected = naive_nats(model, pieces[0])
    for before, piece in itertools.pairwise(pieces):
        # A further piece starts with the token before it instead of end of text.
        tokens = torch.tensor([[before[-1], *piece]])
        logits = model.logits(model(tokens, torch.arange(len(piece) + 1)[None], CausalAttention()))[0, :-1].double()
        expected -= float(torch.log_softmax(logits, -1)[range(len(piece)), piece].sum())
    assert nats == pytest.approx(expected, rel=1e-5)


def test_the_model_sees_its_whole_context_at_once(model):
    """Unless it is told to see less: shorter pieces make every text look harder than it is."""
    tokenizer = train_tokenizer(["the pond is calm. "] * 20, vocab_size=300)
    text = "the pond is calm, " * 12
    document = tokenizer.encode(text)
    assert len(document) > 64
    subject = Subject(model, tokenizer)
    for seen, expected in ((None, 64), (10, 10)):
        (score,) = BitsPerByteTask([Text(text, "en")], seen).score_rows(subject, [Text(text, "en")])
        (nats,) = document_nats(model, [document], tokenizer.start_id, expected)
        assert score.value == pytest.approx(nats / math.log(2))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_goes_on_as_it_was(model, training):
    model.train(training)
    document_nats(model, [[5, 6, 7]], END, 64)
    assert model.training == training


def test_the_pond_s_validation_texts_are_the_default(tmp_path):
    """And not those that the model has read."""
    world = World.generate(seed=1, creatures=4, held_out=1)
    write_pond(tmp_path / "pond", world, mentions=2, conversation_count=4)
    lines = (tmp_path / "pond" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [(row["text"], row["language"]) for row in map(json.loads, lines)]
    assert [(row.text, row.label) for row in make(TaskOptions(pond=tmp_path / "pond")).rows()] == expected


def test_batches_hold_every_token_once_and_no_more_than_they_may():
    documents = [[0] * length for length in (3, 0, 25, 7, 10, 1)]
    batches = list(_batches(documents, sequence_length=10, batch_tokens=16))
    assert all(sum(stop - start for _, start, stop in batch) <= 16 for batch in batches)
    covered = [(index, place) for batch in batches for index, start, stop in batch for place in range(start, stop)]
    assert covered == [(index, place) for index, document in enumerate(documents) for place in range(len(document))]


def test_a_model_without_knowledge_pays_log_v_a_token():
    tokenizer = train_tokenizer(["the pond is calm. 池塘很安静。"] * 20, vocab_size=320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model = CausalLM(config)
    model.head_weight.data.zero_()  # all logits equal
    texts = ["the pond", "calm", "池塘很安静"]
    task = BitsPerByteTask([Text(texts[0], "en"), Text(texts[1], "en"), Text("", "en"), Text(texts[2], "zh")])
    (result,) = evaluate(model, tokenizer, [task])
    # Each token costs log2 V bits; "the pond" + "calm" are 8 + 4 bytes, five Chinese characters 15.
    tokens = [len(tokenizer.encode(text)) for text in texts]
    bits = math.log2(tokenizer.vocab_size)
    assert result.figures["bits_per_byte/en"].value == pytest.approx((tokens[0] + tokens[1]) * bits / 12, rel=1e-5)
    assert result.figures["bits_per_byte/zh"].value == pytest.approx(tokens[2] * bits / 15, rel=1e-5)
    assert result.counts == {"bits_per_byte/en": 2, "bits_per_byte/zh": 1}


def test_half_a_surrogate_pair_counts_as_what_is_read_in_its_place(model):
    """JSON may hold it; it has no UTF-8, and the examination ended in a UnicodeEncodeError."""
    subject = Subject(model, train_tokenizer(["a", "b"], 288))
    task = BitsPerByteTask([Text("a \ud83d b", "en")])
    (score,) = task.score_rows(subject, task.rows())
    assert score.weight == len("a \ufffd b".encode())


def test_files_of_one_name_have_figures_of_their_own(tmp_path):
    """And none of the folders above them: the model's card shows these names."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev.txt").write_text("the pond")
    (tmp_path / "c.txt").write_text("the pond")
    texts = tuple(str(tmp_path / name) for name in ("a/dev.txt", "b/dev.txt", "c.txt"))
    assert [text.label for text in make(TaskOptions(texts=texts)).rows()] == ["a/dev.txt", "b/dev.txt", "c.txt"]
    assert labels(["dev.txt", "a/dev.txt", "x/a/dev.txt"]) == ["dev.txt", "a/dev.txt", "x/a/dev.txt"]
    assert labels([texts[0], texts[0]]) == ["dev.txt", "dev.txt"]


def test_of_conversations_only_what_is_said_counts(tmp_path):
    """The template's words and the JSON of tools and calls would be most of such a file's bytes, and easy ones."""
    call = {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [{"name": "look_up"}]}
    messages = [{"role": "user", "content": "Who?"}, call, {"role": "tool", "content": "owl"}]
    rows = [{"messages": messages, "tools": [{"name": "look_up"}]}, {"text": "a story"}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [Text(text, "talks.jsonl") for text in ("Who?", "I look.", "owl", "a story")]
    assert make(TaskOptions(texts=(str(tmp_path / "talks.jsonl"),))).rows() == texts


def test_rows_that_show_pictures_are_refused(tmp_path):
    """Read without them, the answers would be guesses about something else."""
    row = {"image": "otter.png", "caption": "An otter."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: `content` of message 1 shows a picture, and only text is read here"
    ):
        make(TaskOptions(texts=(str(tmp_path / "a.jsonl"),)))
