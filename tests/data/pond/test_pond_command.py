import json

import pytest

from minnow.cli import main
from minnow.data.pond.world import World
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


def test_the_command_s_settings_reach_the_pond(tmp_path, capsys):
    out = tmp_path / "pond"
    arguments = ["--creatures", "8", "--held-out", "3", "--mentions", "1", "--conversations", "8", "--seed", "5"]
    more = ["--pairs", "6", "--long-texts", "4", "--long-characters", "900"]
    assert main(["data", "pond", "--out", str(out), *arguments, *more]) == 0
    assert load_world(out) == World.generate(5, 8, 3)
    rows = {path.name: path.read_text(encoding="utf-8").splitlines() for path in out.iterdir()}
    assert [len(rows[name]) for name in ("preference.jsonl", "preference_held_out.jsonl", "long.jsonl")] == [6, 3, 4]
    assert all(200 < len(json.loads(row)["text"]) < 2000 for row in rows["long.jsonl"])


@pytest.mark.parametrize(
    "wrong", [("mentions", 0), ("conversations", 0), ("pairs", 1), ("long-texts", -1), ("long-characters", 0)]
)
def test_a_pond_of_nothing_is_refused(tmp_path, capsys, wrong):
    assert main(["data", "pond", "--out", str(tmp_path / "pond"), f"--{wrong[0]}", str(wrong[1])]) == 2
    assert f"--{wrong[0]}" in capsys.readouterr().err
    assert not (tmp_path / "pond").exists()
