from minnow.cli import main
from minnow.data.pond.write import load_world


def test_minnow_data_pond(tmp_path, capsys):
    out = tmp_path / "pond"
    arguments = ["--out", str(out), "--creatures", "8", "--held-out", "3", "--mentions", "5", "--conversations", "10"]
    assert main(["data", "pond", *arguments]) == 0
    assert f"{out}/sft.jsonl: 10 rows" in capsys.readouterr().out.splitlines(), "a long path is not broken"
    world = load_world(out)
    assert (len(world.members("training")), len(world.members("held_out"))) == (5, 3)


def test_impossible_worlds_are_one_line(tmp_path, capsys):
    assert main(["data", "pond", "--out", str(tmp_path / "pond"), "--creatures", "5"]) == 2
    assert "5 creatures with 60 held out cannot be" in capsys.readouterr().err
    assert not (tmp_path / "pond").exists()
