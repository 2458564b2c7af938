"""What a user gave: the words of the command line and the keys of YAML files, as text beside where it stands.

Which text belongs to which setting is found out here, and a word that belongs to none is told the one probably meant.
What the text means is `minnow.config`'s.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from minnow.errors import UserError
from minnow.settings import (
    Setting,
    describe,
    is_sequence,
    literals_of,
    nearest,
    nearest_key,
    options_of,
    section_class,
)

SHORT_SECTIONS = ("training", "data")
"""Sections whose name may be left out on the command line."""


@dataclasses.dataclass(frozen=True)
class Given:
    """A value as the user wrote it (text; lists and dicts of text), and where: "FILE:LINE" or the program."""

    raw: Any
    where: str


# --- The command line -----------------------------------------------------------------------------


class CommandLine:
    """The words after the command, sorted into settings, configuration files and switches."""

    def __init__(self, settings: dict[str, Setting], program: str) -> None:
        self.settings = settings
        self.program = program
        self.positionals = [setting for setting in settings.values() if setting.positional]
        self.given: dict[str, Given] = {}
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
            raw = before + [part for word in words for part in split_list(word)]
        self.given[setting.key] = Given(raw, self.program)


def split_list(text: str) -> list[str]:
    """A comma list, or a YAML list in brackets (for values that contain commas)."""
    if text.startswith("[") and text.endswith("]"):
        return [str(item) for item in yaml.load(text, Loader=yaml.BaseLoader)]
    return [part for part in text.split(",") if part]


# --- The YAML file --------------------------------------------------------------------------------


def read_yaml(path: Path, config_class: type, settings: dict[str, Setting]) -> dict[str, Given]:
    """Read the settings of a `config_class` in the file at `path`. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)  # UTF-8, or UTF-16 as PowerShell's `>` writes
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    given: dict[str, Given] = {}
    if root is not None:
        _read_section(root, config_class, "", path, settings, given)
    return given


def _read_section(
    node: yaml.Node,
    cls: type,
    prefix: str,
    path: Path,
    settings: dict[str, Setting],
    given: dict[str, Given],
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
            given[key] = Given(_plain(value_node), where)
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


# --- Words for people -----------------------------------------------------------------------------


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
