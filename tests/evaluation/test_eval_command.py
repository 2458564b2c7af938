import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from minnow.cli import main
from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import pretraining_documents, write_pond
from minnow.evaluation import long_context
from minnow.evaluation.registry import TASKS
from minnow.model.config import ModelConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.stages import eval as eval_stage
from minnow.tokenizer.tokenizer import Tokenizer
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


def test_texts_alone_ask_for_bits_per_byte(run_folder, tmp_path, capsys):
    """A pond was missed where nobody had asked for one."""
    (tmp_path / "lake.txt").write_text("The lake is calm.\n", encoding="utf-8")
    save_pretrained(load_pretrained(run_folder / "model"), tmp_path / "model", Tokenizer.from_pretrained(run_folder))
    out = tmp_path / "figures.json"
    command = ["eval", str(tmp_path / "model"), "--device", "cpu", "--json", str(out)]
    text = ["--text", str(tmp_path / "lake.txt")]
    assert main([*command, *text]) == 0
    assert set(json.loads(out.read_text())["tasks"]) == {"bpb"}
    assert main([*command, *text, "--pond", str(run_folder / "pond")]) == 0
    assert set(json.loads(out.read_text())["tasks"]) == {"pond", "bpb"}
    assert main(command) == 2
    assert "no pond beside the model" in capsys.readouterr().err


def test_the_file_says_what_was_done_to_the_model_first(run_folder, tmp_path):
    """The card took figures of the model as int8 for those of the weights that it stands beside."""
    (tmp_path / "lake.txt").write_text("The lake is deep.")
    out = tmp_path / "figures.json"
    command = ["eval", str(run_folder), "--tasks", "bpb", "--device", "cpu", "--text", str(tmp_path / "lake.txt")]
    command += ["--json", str(out)]
    for more, changed in (([], ""), (["--quantize", "int8", "--rope-scaling", "yarn"], "int8, yarn")):
        assert main([*command, *more]) == 0
        assert json.loads(out.read_text())["changed"] == changed


def test_an_unknown_task_is_one_line(run_folder, capsys):
    assert main(["eval", str(run_folder), "--tasks", "algebra"]) == 2
    assert "no such task; there are arithmetic, bpb," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "readers"),
    [
        ("--text", "9", "bpb, long-context"),
        ("--pairs", "9", "preference, judge"),
        ("--against", "9", "wins"),
        ("--context", "9", "long-context"),
        ("--context", "0", "long-context"),
    ],
)
def test_an_option_that_no_named_task_reads_is_refused(option, value, readers, run_folder, capsys):
    """Its figures would be taken for those of the file it names."""
    assert main(["eval", str(run_folder), "--tasks", "pond", option, value]) == 2
    assert f"{option} is read only by {readers}: name one" in " ".join(capsys.readouterr().err.split())


def test_a_task_of_ones_own_may_read_any_option(run_folder, monkeypatch):
    seen = []
    monkeypatch.setitem(TASKS, "own", lambda options: seen.append(options.texts) or [])
    assert main(["eval", str(run_folder), "--device", "cpu", "--tasks", "own", "--text", "a.txt"]) == 0
    assert seen == [("a.txt",)]


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


def test_by_default_the_pond_and_bits_per_byte_on_so_many_rows_of_each(run_folder, tmp_path):
    out = tmp_path / "figures.json"
    assert main(["eval", str(run_folder), "--device", "cpu", "--max_rows", "3", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["model"] == str(run_folder), "as the user named it, and not a folder of the cache"
    assert set(written["tasks"]) == {"pond", "bpb"}
    for task in written["tasks"].values():
        assert sum(figure["rows"] for figure in task["figures"].values()) == 3


def test_what_is_named_reaches_the_tasks(run_folder, monkeypatch):
    seen = []

    def make(name, options):
        seen.append((name, options))
        return []

    monkeypatch.setattr(eval_stage, "make_tasks", make)
    named = {"pond": "p", "text": "a,b", "pairs": "c,d", "judge": "j", "against": "o", "context": "128"}
    words = [word for key, value in named.items() for word in (f"--{key}", value)]
    assert main(["eval", str(run_folder), "--device", "cpu", "--tasks", "bpb,wins,long-context", *words]) == 0
    assert [name for name, _ in seen] == ["bpb", "wins", "long-context", "judge"], "--judge adds its task"
    for _, options in seen:
        assert options.model_folder == run_folder / "model"
        found = (options.pond, options.texts, options.pairs, options.judge, options.against, options.context)
        assert found == (Path("p"), ("a", "b"), ("c", "d"), "j", "o", 128)
    seen.clear()
    assert main(["eval", str(run_folder), "--device", "cpu", "--tasks", "judge,pond", "--judge", "j"]) == 0
    assert [name for name, _ in seen] == ["judge", "pond"], "and not twice"


def test_the_drawing_has_both_panels_and_the_length_before_any_stretching(run_folder, tmp_path, monkeypatch):
    drawn = []

    def draw(bits, facts, trained, title):
        drawn.append((set(bits), set(facts), trained, title))
        return Figure()

    monkeypatch.setattr(eval_stage, "long_context_figure", draw)
    monkeypatch.setattr(long_context, "FACTS", 1)
    monkeypatch.setattr(long_context, "DOCUMENTS", 1)
    words = ["--tasks", "long-context", "--context", "256", "--rope_scaling", "yarn", "--factor", "2"]
    plot = tmp_path / "curves.svg"
    assert main(["eval", str(run_folder), "--device", "cpu", *words, "--plot", str(plot)]) == 0
    ((bits, facts, trained, title),) = drawn
    assert "as it is/all" in bits
    assert facts == {f"as it is/{tokens}" for tokens in (64, 128, 256)}
    assert (trained, title) == (256, str(run_folder))


def test_no_task_at_all_is_refused(run_folder):
    with pytest.raises(UserError, match="--tasks is empty"):
        eval_stage.run(eval_stage.Config(model=str(run_folder), tasks=()))
