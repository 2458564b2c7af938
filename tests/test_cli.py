from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import subprocess
import sys
import types
from dataclasses import dataclass, field

import pytest

from minnow import cli
from minnow.config import UserError
from minnow.settings import settings_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """A command for tests."""

    word: str = field(default="", metadata={"positional": True})
    """What to do."""


def run(config: Config) -> None:
    if config.word == "mend":
        raise UserError("the word is wrong; say go")
    if config.word == "command":
        raise UserError("row 1 says \x1b]0;owned\x07")
    if config.word == "stop":
        raise KeyboardInterrupt
    if config.word.startswith("open "):
        open(config.word.removeprefix("open ")).close()
    if config.word == "fill":
        raise OSError(errno.ENOSPC, "No space left on device")
    if config.word.startswith("load "):
        importlib.import_module(config.word.removeprefix("load "))
    print(f"ran {config.word}")


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(Config=Config, run=run)
    monkeypatch.setitem(sys.modules, "minnow.stages.testing", module)
    monkeypatch.setitem(cli.COMMANDS, "act", cli.Command("testing", "does nothing much"))
    monkeypatch.setitem(cli.COMMANDS, "act twice", cli.Command("testing", "does it again"))


def test_runs_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["act", "go"]) == 0
    assert cli.main(["act", "twice", "again"]) == 0  # the longer name wins
    assert capsys.readouterr().out == "ran go\nran again\n"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["act", "mend"]) == 2
    assert capsys.readouterr().err == "error: the word is wrong; say go\n"
    assert cli.main(["act", "stop"]) == 130


def test_a_terminal_of_another_encoding_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the locale is no UTF-8, or Windows sends the output to a file: it ended in a UnicodeEncodeError."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    assert cli.main(["act", "über 鱼"]) == 0
    assert written.getvalue() == "ran über ?\n".encode("latin-1")


def test_what_an_error_quotes_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["act", "command"]) == 2
    assert capsys.readouterr().err == "error: row 1 says \\x1b]0;owned\\x07\n"


def test_mistakes_with_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for word, told in {
        "open no/such": "error: no/such: No such file or directory\n",
        "fill": "error: No space left on device\n",
    }.items():
        assert cli.main(["act", word]) == 2
        assert capsys.readouterr().err == told


def test_a_package_of_an_optional_part_is_named_with_its_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # as if it were not installed
    assert cli.main(["act", "load prometheus_client"]) == 2
    told = capsys.readouterr().err
    assert told == "error: prometheus_client is not installed; pip install 'minnow[serve]' brings it\n"


def test_a_missing_module_of_nobody_stays_a_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        cli.main(["act", "load no_such_module_anywhere"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "error: minnow pretrian: no such command; did you mean minnow pretrain?"),
        (
            ["data", "inspcet"],
            "error: minnow data inspcet: no such command; did you mean minnow data inspect?",
        ),
        (
            ["tokeniser", "train"],
            "error: minnow tokeniser: no such command; did you mean minnow tokenizer train?",
        ),
        (["xyzzy"], "error: minnow xyzzy: no such command; minnow --help lists the commands"),
        (["act", "--wrd", "1"], "error: minnow act: --wrd: no such setting; did you mean WORD?"),
    ],
)
def test_a_wrong_name_gets_the_nearest(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err == message + "\n"


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    assert "data pond" in text
    assert "pretrain" not in text


def test_help_is_quick_and_loads_no_torch() -> None:
    program = "import sys; from minnow.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_version_and_module() -> None:
    result = subprocess.run([sys.executable, "-m", "minnow", "--version"], capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("minnow ")
    assert result.returncode == 0


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if not name.startswith("act")])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = f"minnow.stages.{cli.COMMANDS[name].module}"
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: minnow {name}")
    undocumented = [item.key for item in settings_of(importlib.import_module(module).Config) if not item.doc]
    assert not undocumented, "settings without a string under them"
    assert "None" not in text, "what can be typed is null"
