import json

import pytest
import torch

from minnow.cli import main
from minnow.data.pond.world import World
from minnow.data.pond.write import pretraining_documents, write_pond
from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as the quickstart leaves it: pond/ and model/ (untrained here)."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    world = World.generate(seed=1, creatures=4, held_out=1)
    write_pond(folder / "pond", world, mentions=5, conversation_count=5)
    tokenizer = train_tokenizer((document.text for document in pretraining_documents(world, mentions=20)), 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    save_pretrained(CausalLM(config), folder / "model", tokenizer)
    return folder


def test_minnow_eval(run_folder, tmp_path, capsys):
    out, rows = tmp_path / "figures.json", tmp_path / "rows.jsonl"
    arguments = ["--tasks", "pond,bpb", "--json", str(out), "--rows", str(rows)]
    assert main(["eval", str(run_folder), "--device", "cpu", *arguments]) == 0
    written = json.loads(out.read_text())
    # 1 held-out creature x 9 relations for every figure; an untrained model knows nothing.
    assert written["tasks"]["pond"]["figures"]["exact_match/zh"]["rows"] == 9
    assert written["tasks"]["pond"]["figures"]["exact_match/zh"]["value"] == 0
    assert set(written["tasks"]["bpb"]["figures"]) == {"bits_per_byte/en", "bits_per_byte/zh"}
    assert sum(1 for _ in rows.open()) > 36
    assert "bits_per_byte/en" in capsys.readouterr().out


def test_bits_per_byte_of_files(run_folder, tmp_path):
    (tmp_path / "lake.txt").write_text("The lake is calm.\n", encoding="utf-8")
    (tmp_path / "sea.jsonl").write_text(json.dumps({"text": "The sea is not."}) + "\n", encoding="utf-8")
    texts = ["--text", f"{tmp_path / 'lake.txt'},{tmp_path / 'sea.jsonl'}"]
    out = tmp_path / "figures.json"
    assert main(["eval", str(run_folder), "--tasks", "bpb", "--device", "cpu", *texts, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["tasks"]["bpb"]["figures"]
    assert set(figures) == {"bits_per_byte/lake.txt", "bits_per_byte/sea.jsonl"}


def test_an_unknown_task_is_one_line(run_folder, capsys):
    assert main(["eval", str(run_folder), "--tasks", "algebra"]) == 2
    assert "no such task; there are arithmetic, bpb," in capsys.readouterr().err


def test_an_examination_of_nothing_is_no_success(run_folder, tmp_path, capsys):
    """It printed an empty table, exit code 0."""
    empty, full = tmp_path / "empty.jsonl", tmp_path / "full.txt"
    empty.write_text("")
    full.write_text("The lake is calm.\n")
    for task, option, files in (("bpb", "--text", f"{full},{empty}"), ("preference", "--pairs", str(empty))):
        assert main(["eval", str(run_folder), "--device", "cpu", "--tasks", task, option, files]) == 2
        assert f"{empty}: there is not one" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-3"])
def test_max_rows_is_at_least_one(run_folder, capsys, number):
    assert main(["eval", str(run_folder), "--tasks", "bpb", "--max_rows", number]) == 2
    assert f"--max_rows {number}: give 1 or more" in capsys.readouterr().err
