from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from minnow.config import UserError, config_from_yaml, config_to_yaml, parse_config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the learning rate rises and falls."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """Shape of the curve."""
    warmup_steps: int = 40
    """Optimizer steps until the peak."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How weights move."""

    learning_rate: float = 0.01
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two averages."""
    schedule: Schedule = field(default_factory=Schedule)
    """The schedule."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError("learning_rate must be above 0")
        if self.learning_rate == 13 and self.schedule.warmup_steps == 13:
            raise UserError("optim.learning_rate is 13, as optim.schedule.warmup_steps is")


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every stage has."""

    seed: int = 0
    """Seed of everything drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Train something."""

    model: str = field(metadata={"positional": True})
    """Model folder."""
    optim: Optim = field(default_factory=lambda: Optim(learning_rate=0.5))
    """The optimizer."""
    validation: Optim | None = None
    """A section that may be absent."""
    data: tuple[str, ...] = ()
    """Files to read."""
    out: Path = Path("runs/x")
    """Where the run goes."""
    patience: int | None = None
    """Evaluations without progress before the run stops."""
    resume: bool = False
    """Go on from the last checkpoint."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop."""

    seed: int = 0
    """Its seed."""
    steps: int = 1
    """Its steps."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of bad ones."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """May be absent, but not half there."""

    path: str
    """A file."""
    size: int = 1
    """A number."""


@dataclass(frozen=True, kw_only=True)
class Stage(Common):
    """A stage."""

    training: Loop = field(default_factory=Loop)
    """The loop."""
    data: Data = field(default_factory=Data)
    """The data."""
    extra: Extra | None = None
    """Something more."""


def parse(*words: str) -> Config:
    return parse_config(Config, words, program="minnow train")


def test_defaults_and_overrides() -> None:
    assert parse("m") == Config(model="m")
    config = parse("m", "--optim.learning-rate", "1e-3", "--optim.schedule.warmup_steps=7", "--out", "runs/y")
    assert config.optim == Optim(learning_rate=1e-3, schedule=Schedule(warmup_steps=7))
    assert config.out == Path("runs/y")


def test_a_section_keeps_the_defaults_its_owner_gives_it() -> None:
    assert parse("m", "--optim.schedule.kind", "cosine").optim.learning_rate == 0.5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume=false"], False),
        (["--resume", "--compile"], True),
        (["--no-such"], None),
    ],
)
def test_flags(words: list[str], expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match="no such setting"):
            parse("m", *words)
    else:
        assert parse(*words, "m").resume is expected


def test_a_flag_or_a_word() -> None:
    assert parse("m", "--compile").compile is True
    assert parse("m", "--compile", "false").compile is False
    assert parse("m", "--compile", "auto").compile == "auto"


def test_lists_come_with_commas_or_repeated() -> None:
    assert parse("m", "--data", "a,b", "--data", "c").data == ("a", "b", "c")
    assert parse("m", "--data", '["a,1", b]').data == ("a,1", "b")
    assert parse("--data", "a", "m").data == ("a",)  # a command with bare arguments takes one word a time
    assert parse("m", "--optim.betas", "0.8,0.99").optim.betas == (0.8, 0.99)


def test_without_positionals_a_list_takes_all_words_a_shell_expands() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Files:
        data: tuple[str, ...] = ()
        seed: int = 0

    globals()["Files"] = Files
    assert parse_config(Files, ["--data", "a", "b", "--seed", "1"], program="p") == Files(data=("a", "b"), seed=1)


def test_positional_tuple_takes_the_rest() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Show:
        model: str = field(metadata={"positional": True})
        text: tuple[str, ...] = field(default=(), metadata={"positional": True})

    assert parse_config(Show, ["m", "a", "b", "--", "--c"], program="p").text == ("a", "b", "--c")


def test_null_and_optional_sections() -> None:
    assert parse("m", "--patience", "3").patience == 3
    assert parse("m", "--patience", "3", "--patience", "null").patience is None
    assert parse("m").validation is None
    assert parse("m", "--validation.learning_rate", "2").validation == Optim(learning_rate=2)


def test_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\noptim:\n  learning-rate: 1e-3\n  schedule:\n    kind: cosine\ndata: [1, no]\n")
    config = parse("--optim.schedule.warmup_steps", "1", "--config", str(file), "--seed", "5")
    assert config.optim == Optim(learning_rate=1e-3, schedule=Schedule(kind="cosine", warmup_steps=1))
    assert (config.model, config.data, config.seed) == ("m", ("1", "no"), 5)


def test_of_two_files_the_later_one_wins(tmp_path: Path) -> None:
    for name, text in (("a", "model: m\nseed: 1\npatience: 1\n"), ("b", "seed: 2\n")):
        (tmp_path / name).write_text(text)
    config = parse("--config", str(tmp_path / "a"), "--config", str(tmp_path / "b"))
    assert (config.seed, config.patience) == (2, 1)


def test_a_quoted_null_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text('model: "null"\npatience: null\n')
    assert parse("--config", str(tmp_path / "c.yaml")) == Config(model="null")


def test_the_settings_of_training_and_data_go_by_their_own_names() -> None:
    """Where the command has none of that name itself."""
    words = ["--seed", "3", "--steps", "5", "--on-bad-row", "skip"]
    expected = Stage(seed=3, training=Loop(steps=5), data=Data(on_bad_row="skip"))
    assert parse_config(Stage, words, program="p") == expected


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("model: m\noptim:\n  learning_rate: -1\n", "", "{file}:3: optim: learning_rate must be above 0"),
        ("model: m\noptim:\n  learning_rate: -1\n", "--optim.learning_rate -2", "minnow train: optim: learning_rate"),
        ("model: m\noptim:\n  schedule:\n    warmup_steps: 13\n", "--optim.learning_rate 13", "minnow train: optim.l"),
        (
            "model: m\noptim:\n  learning_rate: 13\n",
            "--optim.schedule.warmup_steps 13",
            "{file}:3: optim.learning_rate",
        ),
    ],
)
def test_a_value_that_its_section_refuses_is_named_with_its_place(
    tmp_path: Path, text: str, words: str, message: str
) -> None:
    """Of several files nobody knew which one to open."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(file), *words.split())
    assert str(error.value).startswith(message.format(file=file))


@dataclass(frozen=True, kw_only=True)
class TwoLoops:
    """One after the other."""

    first: Loop = field(default_factory=Loop)
    """The first."""
    second: Loop = field(default_factory=Loop)
    """The second."""

    def __post_init__(self) -> None:
        if self.first.steps == 0:
            raise UserError("first.steps is 0, and second.steps need not be")


def test_of_settings_with_the_same_name_the_one_that_is_refused_is_found(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("second:\n  steps: 2\nfirst:\n  steps: 0\n")
    with pytest.raises(UserError, match=r"c\.yaml:4: first\.steps is 0"):
        parse_config(TwoLoops, ["--config", str(file)], program="p")
    file.write_text("first:\n  steps: 0\nsecond:\n  steps: 2\n")
    with pytest.raises(UserError, match=r"c\.yaml:2: first\.steps is 0"):
        parse_config(TwoLoops, ["--config", str(file)], program="p")


def test_what_a_section_needs_must_be_given_once_it_is_used() -> None:
    assert parse_config(Stage, [], program="p").extra is None
    with pytest.raises(UserError, match="p: --extra.path must be given"):
        parse_config(Stage, ["--extra.size", "3"], program="p")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Config(model="模型", data=("a", "b,c"), validation=Optim(learning_rate=1e-9), patience=2, compile=True)
    (tmp_path / "c.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert config_from_yaml(Config, tmp_path / "c.yaml") == config


def test_print_config_is_a_file_that_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("m", "--optim.learning_rate", "0.25", "--print_config")
    assert stop.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "c.yaml")) == parse("m", "--optim.learning_rate", "0.25")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_print_config_reads_back_equal_from_any_terminal(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the locale is no UTF-8 `--print_config > file` wrote ? for Chinese, and bytes that are no UTF-8 for é."""
    file = tmp_path / "c.yaml"
    with open(file, "w", encoding=encoding, errors="replace") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit):
            parse("模型/é", "--out", "runs/小鱼🐟", "--print_config")
    assert parse("--config", str(file)) == parse("模型/é", "--out", "runs/小鱼🐟")


def test_print_config_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--print-config")
    assert "model: null" in capsys.readouterr().out


def test_help_shows_every_field_with_doc_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for line in (
        "usage: minnow train MODEL",
        "Train something.",
        "Seed of everything drawn at random. [default: 0]",
        "--optim.schedule.kind wsd|cosine",
        "Peak learning rate. [default: 0.5]",
        "Model folder. [required]",
        "Files to read. [default: none]",
        "Evaluations without progress before the run stops. [default: null]",
        "optim: The optimizer.",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "minnow train: MODEL must be given; minnow train --help tells more"),
        (
            "m --optm.learning_rate 1",
            "minnow train: --optm.learning_rate: no such setting; did you mean --optim.learning_rate?",
        ),
        (
            "m --learning-rate 1",
            "minnow train: --learning-rate: no such setting; did you mean --optim.learning_rate?",
        ),
        ("m --sede 1", "minnow train: --sede: no such setting; did you mean --seed?"),
        ("m --modl 1", "minnow train: --modl: no such setting; did you mean MODEL?"),
        ("m --qqqqqq 1", "minnow train: --qqqqqq: no such setting; --help lists them all"),
        (
            "m --warmup_stps 3",
            "minnow train: --warmup_stps: no such setting; did you mean --optim.schedule.warmup_steps?",
        ),
        ("m --seed many", "minnow train: --seed: 'many' does not fit: it takes an integer"),
        ("m --seed null", "minnow train: --seed: 'null' does not fit: it takes an integer"),
        ("m --seed", "minnow train: --seed needs a value: an integer"),
        ("m --resume=maybe", "minnow train: --resume: 'maybe' does not fit: it takes true or false"),
        (
            "m --optim.schedule.kind cosin",
            "minnow train: --optim.schedule.kind: 'cosin' does not fit: it takes one of wsd, cosine;"
            " did you mean cosine?",
        ),
        (
            "m --optim.betas 1",
            "minnow train: --optim.betas: ['1'] does not fit: it takes a list of 2, each a number",
        ),
        ("m --optim.learning_rate -1", "minnow train: optim: learning_rate must be above 0"),
        ("m n", "minnow train: what is 'n' for? Settings are given as --key value"),
        ("m --config no.yaml", "no.yaml: no such configuration file"),
    ],
)
def test_errors_are_one_clear_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(*words.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: m\noptim:\n  lerning_rate: 1\n",
            ":3: optim.lerning_rate: no such setting; did you mean optim.learning_rate?",
        ),
        ("model: m\noptm:\n  learning_rate: 1\n", ":2: optm: no such section; did you mean optim?"),
        ("model: m\nshape:\n  seed: 1\n", ":2: shape: no such section; there are optim, validation"),
        (
            "optim:\n  betas:\n  - 0.9\n  shedule:\n    x: 1\n",
            ":4: optim.shedule: no such section; did you mean optim.schedule?",
        ),
        (
            "optim:\n  schedule:\n    more:\n      x: 1\n",
            ":3: optim.schedule.more: no such section; there is none here",
        ),
        ("model: m\noptim: 3\n", ":2: optim is a section: it holds keys such as optim.learning_rate"),
        ("- m\n", ":1: this is a configuration: it holds keys such as seed"),
        ("seed: 1\nseed: 2\n", ":2: seed stands twice in this file; keep one"),
        ("seed: [1, 2]\n", ":1: seed: ['1', '2'] does not fit: it takes an integer"),
        ("seed:\n", ":1: seed: null does not fit: it takes an integer"),
        ("seed: 1\n\tmodel: m\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        ("seed: 1\nmodel: &m *m\n", ""),
    ],
)
def test_errors_in_a_file_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(file))
    assert str(error.value).startswith(f"{file}{message}")
    assert "\n" not in str(error.value)
