"""Configuration: YAML files + command line -> frozen dataclasses; also the user's error.

A configuration is a frozen, keyword-only dataclass. Its sections are dataclasses too, so every setting has a
dotted key: `optim.learning_rate`. Settings come from (later wins) the dataclass defaults, the YAML files that
`--config` names and the command line. jsonargparse turns text into typed values; this module finds out which
text belongs to which key, and says in one line what is wrong, where it stands and which key was meant.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        '''Continue a text.'''

        model: str = field(metadata={"positional": True})
        '''Model folder, run folder or Hub id.'''
        sampling: SamplingParams = field(default_factory=SamplingParams)
        '''How tokens are drawn.'''

The string under a field is its help. Positional fields take the bare arguments, in their order; a positional
tuple takes all that are left.
"""

from __future__ import annotations

import dataclasses
import operator
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minnow.settings import (
    Setting,
    default_of,
    describe,
    help_text,
    is_sequence,
    literals_of,
    nearest,
    nearest_key,
    options_of,
    section_class,
    settings_of,
)

T = TypeVar("T")

SHORT_SECTIONS = ("training", "data")
"""Sections whose name may be left out on the command line."""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first line of what a library's error says; its kind where it says nothing, as a time-out may."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def parse_config(config_class: type[T], argv: Sequence[str], *, program: str) -> T:
    """Read `argv`, and the files it names with `--config`, into a `config_class`.

    Args:
        config_class: a frozen dataclass; its docstring is the command's description.
        argv: the arguments after the command's name.
        program: the command as typed, e.g. "minnow tokenizer train"; used in `--help` and in messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing setting; one line.
        SystemExit: code 0, after `--help` or `--print_config` has printed.
    """
    settings = {setting.key: setting for setting in settings_of(config_class)}
    command_line = _CommandLine(settings, program)
    command_line.read(list(argv))
    if command_line.help:
        print(help_text(config_class, settings.values(), program))
        raise SystemExit(0)
    given: dict[str, _Given] = {}
    for file in command_line.files:
        given |= _read_yaml(Path(file), config_class, settings)
    given |= command_line.given
    values = {key: _convert(settings[key], item) for key, item in given.items()}
    if command_line.print_config:
        print(_dump(_tree(settings.values(), values)), end="")
        raise SystemExit(0)
    missing = [setting.flag for setting in settings.values() if _is_missing(setting, values)]
    if missing:
        raise UserError(f"{program}: {', '.join(missing)} must be given; {program} --help tells more")
    return _build(config_class, values, "", {key: item.where for key, item in given.items()}, program)


def config_from_yaml(config_class: type[T], path: str | Path) -> T:
    """Read the YAML file at `path` into a `config_class`; raises what `parse_config` raises."""
    return parse_config(config_class, ["--config", str(path)], program=str(path))


def config_to_yaml(config: Any) -> str:
    """Write `config`, a dataclass instance, as YAML that `config_from_yaml` reads back into an equal one."""
    return _dump(dataclasses.asdict(config))


def refuse_unused(config: Any, unused: Mapping[str, str], section: str = "") -> None:
    """Refuse settings that would have no effect: whoever changed one from its default expects something of it.

    Called from the `__post_init__` of the configuration that knows, with its own keys.

    Args:
        config: a dataclass instance.
        unused: dotted keys below `config`, each with what it belongs to, the end of a sentence: "it is simpo's".
        section: what stands before the keys in front of the user, "" or ending in ".".

    Raises:
        UserError: one of them is not at its default.
    """
    defaults = {setting.key: setting.default for setting in settings_of(type(config))}
    for key, owner in unused.items():
        value = operator.attrgetter(key)(config)
        if value != defaults[key]:
            default = "null" if defaults[key] is None else defaults[key]
            raise UserError(
                f"{section}{key} is {value}, which has no effect here: {owner}; leave it out, or at {default}"
            )


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value as the user wrote it (text; lists and dicts of text), and where: "FILE:LINE" or the program."""

    raw: Any
    where: str


# --- The command line -----------------------------------------------------------------------------


class _CommandLine:
    """The words after the command, sorted into settings, configuration files and switches."""

    def __init__(self, settings: dict[str, Setting], program: str) -> None:
        self.settings = settings
        self.program = program
        self.positionals = [setting for setting in settings.values() if setting.positional]
        self.given: dict[str, _Given] = {}
        self.files: list[str] = []
        self.help = False
        self.print_config = False

    def read(self, words: list[str]) -> None:
        """Consume `words` from the left."""
        while words:
            word = words.pop(0)
            if word == "--":
                while words:
                    self._read_bare(words.pop(0))
            elif word.startswith("-") and word != "-":
                self._read_option(word, words)
            else:
                self._read_bare(word)

    def _read_bare(self, word: str) -> None:
        if not self.positionals:
            raise UserError(f"{self.program}: what is {word!r} for? Settings are given as --key value")
        setting = self.positionals[0]
        self._add(setting, [word])
        if not is_sequence(setting.type):
            self.positionals.pop(0)

    def _read_option(self, word: str, words: list[str]) -> None:
        flag, has_value, value = word.partition("=")
        key = "help" if flag == "-h" else flag.removeprefix("--").replace("-", "_")
        if key not in self.settings:  # --steps 100, --on-bad-row skip: these settings go by their own names too
            key = next((f"{name}.{key}" for name in SHORT_SECTIONS if f"{name}.{key}" in self.settings), key)
        if key in ("help", "print_config") and not has_value:
            setattr(self, key, True)
        elif key == "config":
            self.files.append(value if has_value else self._next(words, flag, "a YAML file"))
        elif key not in self.settings:
            raise UserError(f"{self.program}: {flag}: {_unknown(key, self.settings, flag='--')}")
        elif has_value:
            self._add(self.settings[key], [value])
        else:
            self._add(self.settings[key], self._values(self.settings[key], flag, words))

    def _values(self, setting: Setting, flag: str, words: list[str]) -> list[str]:
        if bool in options_of(setting.type):
            named = {"true", "false", "yes", "no", "null", *literals_of(setting.type)}
            return [words.pop(0) if words and words[0].lower() in named else "true"]
        values = [self._next(words, flag, describe(setting.type))]
        # `--data *.jsonl` arrives as many words; a command with bare arguments must take one word only.
        has_positionals = any(other.positional for other in self.settings.values())
        while is_sequence(setting.type) and not has_positionals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        return values

    def _next(self, words: list[str], flag: str, wanted: str) -> str:
        if not words or words[0].startswith("--"):
            raise UserError(f"{self.program}: {flag} needs a value: {wanted}")
        return words.pop(0)

    def _add(self, setting: Setting, words: list[str]) -> None:
        """A sequence's words add up; of anything else the last word counts."""
        raw: Any = words[-1]
        if is_sequence(setting.type):
            before = self.given[setting.key].raw if setting.key in self.given else []
            raw = before + [part for word in words for part in _split(word)]
        self.given[setting.key] = _Given(raw, self.program)


def _split(text: str) -> list[str]:
    """A comma list, or a YAML list in brackets (for values that contain commas)."""
    if text.startswith("[") and text.endswith("]"):
        return [str(item) for item in yaml.load(text, Loader=yaml.BaseLoader)]
    return [part for part in text.split(",") if part]


# --- The YAML file --------------------------------------------------------------------------------


def _read_yaml(path: Path, config_class: type, settings: dict[str, Setting]) -> dict[str, _Given]:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    given: dict[str, _Given] = {}
    if root is not None:
        _read_section(root, config_class, "", path, settings, given)
    return given


def _read_section(
    node: yaml.Node,
    cls: type,
    prefix: str,
    path: Path,
    settings: dict[str, Setting],
    given: dict[str, _Given],
) -> None:
    if not isinstance(node, yaml.MappingNode):
        example = next((key for key in settings if key.startswith(prefix)), prefix)
        what = f"{prefix[:-1]} is a section" if prefix else "this is a configuration"
        raise UserError(f"{path}:{node.start_mark.line + 1}: {what}: it holds keys such as {example}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        name = str(key_node.value).replace("-", "_")
        key = prefix + name
        if name not in fields:
            if isinstance(value_node, yaml.MappingNode):
                raise UserError(f"{where}: {key}: {_unknown_section(name, prefix, hints)}")
            raise UserError(f"{where}: {key}: {_unknown(key, settings)}")
        if name in seen:
            raise UserError(f"{where}: {key} stands twice in this file; keep one")
        seen.add(name)
        section = section_class(hints[name])
        if section is None:
            given[key] = _Given(_plain(value_node), where)
        elif not _is_null(value_node):
            _read_section(value_node, section, f"{key}.", path, settings, given)


def _plain(node: yaml.Node) -> Any:
    """The node, scalars as text: the setting's type, not YAML's guess, decides what `1e-3` or `no` is."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    return None if _is_null(node) else node.value


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


# --- Text to values, values to a configuration ----------------------------------------------------


def _convert(setting: Setting, given: _Given) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    raw = _split(given.raw) if is_sequence(setting.type) and isinstance(given.raw, str) else given.raw
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=setting.type)
    try:
        if raw is None and type(None) not in options_of(setting.type):
            raise ArgumentError(None, "null")  # jsonargparse takes null for "not given"
        return parser.instantiate(parser.parse_object({"value": raw})).value
    except (ArgumentError, ValueError, TypeError):
        shown = "null" if raw is None else repr(given.raw)
        close = nearest(str(raw), literals_of(setting.type))
        hint = f"; did you mean {close}?" if close else ""
        key = setting.key if ":" in given.where else setting.flag
        problem = f"{shown} does not fit: it takes {describe(setting.type)}{hint}"
        raise UserError(f"{given.where}: {key}: {problem}") from None


def _unknown(key: str, settings: dict[str, Setting], flag: str = "") -> str:
    close = nearest_key(key, list(settings))
    if close is None:
        return "no such setting; --help lists them all"
    name = settings[close].flag if settings[close].positional else flag + close
    return f"no such setting; did you mean {name}?"


def _unknown_section(name: str, prefix: str, hints: dict[str, Any]) -> str:
    """`hints`: the fields among which a section of that name was looked for, with their types."""
    sections = [field for field, hint in hints.items() if section_class(hint) is not None]
    if not sections:
        return "no such section; there is none here"
    close = nearest(name, sections)
    return "no such section; " + (
        f"did you mean {prefix}{close}?" if close else f"there are {', '.join(prefix + each for each in sections)}"
    )


def _is_missing(setting: Setting, values: dict[str, Any]) -> bool:
    if setting.default is not dataclasses.MISSING or setting.key in values:
        return False
    return not setting.in_optional_section or _is_used(setting.key.rpartition(".")[0], values)


def _is_used(section: str, values: dict[str, Any]) -> bool:
    return any(key.startswith(f"{section}.") for key in values)


def _build(
    cls: type[T], values: dict[str, Any], prefix: str, places: dict[str, str], program: str, default: Any = None
) -> T:
    """Make a `cls`; a field that was not given keeps the value in `default`, or the class's own default.

    places: where each key of `values` was given.
    """
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        key, section = prefix + field.name, section_class(hints[field.name])
        start = getattr(default, field.name) if default is not None else default_of(field)
        if key in values:
            arguments[field.name] = values[key]
        elif section is not None and (_is_used(key, values) or start is dataclasses.MISSING):
            instance = start if dataclasses.is_dataclass(start) else None
            arguments[field.name] = _build(section, values, f"{key}.", places, program, instance)
        elif start is not dataclasses.MISSING:
            arguments[field.name] = start
    try:
        return cls(**arguments)
    except ValueError as error:
        label = "" if prefix[:-1] in str(error) else f"{prefix[:-1]}: "
        raise UserError(f"{_place(str(error), prefix, places) or program}: {label}{error}") from None


def _place(problem: str, prefix: str, places: dict[str, str]) -> str | None:
    """Where the first of the settings that `problem` names was given: it begins with one, others have their section."""
    for number, word in enumerate(re.findall(r"[\w.]+", problem)):
        if number == 0 or "." in word:
            name = word.rpartition(".")[2]
            alike = [key for key in places if key.startswith(prefix) and key.rpartition(".")[2] == name]
            if alike:
                return places[max(alike, key=lambda key: key.endswith(word))]
    return None


def _tree(settings: Iterable[Setting], values: dict[str, Any]) -> dict[str, Any]:
    """The settings as nested dicts, a missing one as None; null sections that nobody used stay out."""
    tree: dict[str, Any] = {}
    for setting in settings:
        section, _, name = setting.key.rpartition(".")
        if setting.in_optional_section and not _is_used(section, values):
            continue
        node = tree
        for part in section.split(".") if section else ():
            node = node.setdefault(part, {})
        default = None if setting.default is dataclasses.MISSING else setting.default
        node[name] = values.get(setting.key, default)
    return tree


def _dump(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(_yamlable(tree), sort_keys=False, allow_unicode=True, width=110)


def _yamlable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _yamlable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_yamlable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
