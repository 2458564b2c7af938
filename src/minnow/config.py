"""Configuration: YAML files + command line -> frozen dataclasses; also the user's error.

A configuration is a frozen, keyword-only dataclass. Its sections are dataclasses too, so every setting has a
dotted key: `optim.learning_rate`. Settings come from (later wins) the dataclass defaults, the YAML files that
`--config` names and the command line. `minnow.given` finds out which text belongs to which key, jsonargparse turns text
into typed values, and what is wrong is said in one line, with where it stands and which key was meant.

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

import codecs
import dataclasses
import operator
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml

from minnow.errors import UnusedSetting, UserError
from minnow.given import CommandLine, Given, read_yaml, split_list
from minnow.settings import (
    Setting,
    default_of,
    describe,
    help_text,
    is_sequence,
    literals_of,
    nearest,
    options_of,
    section_class,
    settings_of,
)

T = TypeVar("T")


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
    command_line = CommandLine(settings, program)
    command_line.read(list(argv))
    if command_line.help:
        print(help_text(config_class, settings.values(), program))
        raise SystemExit(0)
    of_files: dict[str, Given] = {}
    for file in command_line.files:
        of_files |= read_yaml(Path(file), config_class, settings)
    given = of_files | command_line.given
    values = {key: _convert(settings[key], item) for key, item in given.items()}
    places = {key: item.where for key, item in given.items()}
    replaced: dict[str, Any] = {}
    for key in of_files.keys() & command_line.given.keys():
        with suppress(UserError):  # nobody reads what it would have been
            replaced[key] = _convert(settings[key], of_files[key])
    if command_line.print_config:
        with suppress(UserError, TypeError):  # takes out what has become idle; what is wrong is told by the run
            _build(config_class, values, "", places, replaced, program)
        print(_dump(_tree(settings.values(), values), escape=not _is_utf8(sys.stdout)), end="")
        raise SystemExit(0)
    missing = [setting.flag for setting in settings.values() if _is_missing(setting, values)]
    if missing:
        raise UserError(f"{program}: {', '.join(missing)} must be given; {program} --help tells more")
    return _build(config_class, values, "", places, replaced, program)


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
        UnusedSetting: one of them is not at its default.
    """
    defaults = {setting.key: setting.default for setting in settings_of(type(config))}
    for key, owner in unused.items():
        value = operator.attrgetter(key)(config)
        if value != defaults[key]:
            default = "null" if defaults[key] is None else defaults[key]
            raise UnusedSetting(
                f"{section}{key} is {value}, which has no effect here: {owner}; leave it out, or at {default}", key
            )


# --- Text to values, values to a configuration ----------------------------------------------------


def _convert(setting: Setting, given: Given) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    raw = split_list(given.raw) if is_sequence(setting.type) and isinstance(given.raw, str) else given.raw
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


def _is_missing(setting: Setting, values: dict[str, Any]) -> bool:
    if setting.default is not dataclasses.MISSING or setting.key in values:
        return False
    return not setting.in_optional_section or _is_used(setting.key.rpartition(".")[0], values)


def _is_used(section: str, values: dict[str, Any]) -> bool:
    return any(key.startswith(f"{section}.") for key in values)


def _build(
    cls: type[T],
    values: dict[str, Any],
    prefix: str,
    places: dict[str, str],
    replaced: dict[str, Any],
    program: str,
    default: Any = None,
) -> T:
    """Make a `cls`; a field that was not given keeps the value in `default`, or the class's own default.

    What a file set and the command line made idle is taken out of `values`.

    places: where each key of `values` was given. replaced: what files gave where the command line gave something else.
    """
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        key, section = prefix + field.name, section_class(hints[field.name])
        start = getattr(default, field.name) if default is not None else default_of(field)
        if key in replaced or start is not dataclasses.MISSING:
            starts[field.name] = replaced.get(key, start)
        if key in values:
            arguments[field.name] = values[key]
        elif section is not None and (_is_used(key, values) or start is dataclasses.MISSING):
            instance = start if dataclasses.is_dataclass(start) else None
            arguments[field.name] = _build(section, values, f"{key}.", places, replaced, program, instance)
        elif start is not dataclasses.MISSING:
            arguments[field.name] = start
    try:
        while True:
            try:
                return cls(**arguments)
            except UnusedSetting as unused:
                if not _made_idle(
                    cls, unused.name, arguments, starts, {n: places.get(prefix + n) for n in arguments}, program
                ):
                    raise
                del arguments[unused.name], values[prefix + unused.name]
    except ValueError as error:
        label = "" if prefix[:-1] in str(error) else f"{prefix[:-1]}: "
        raise UserError(f"{_place(str(error), prefix, places) or program}: {label}{error}") from None


def _made_idle(
    cls: type[Any],
    name: str,
    arguments: dict[str, Any],
    starts: dict[str, Any],
    places: dict[str, str | None],
    program: str,
) -> bool:
    """Whether a file gave the unused setting `name`, and had a use for it before the command line changed another one:
    `--schedule.shape constant` beside a recipe need not take its `final_fraction` back.

    starts: what each setting is where the command line gives none.
    """
    if places.get(name) in (None, program):
        return False
    before = {n: value for n, value in arguments.items() if places[n] != program} | {
        n: starts[n] for n, place in places.items() if place == program and n in starts
    }
    try:
        cls(**before)
    except (ValueError, TypeError):
        return False
    return True


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


def _dump(tree: dict[str, Any], *, escape: bool = False) -> str:
    """escape: write what is not ASCII as YAML's `\\u9C7C`, which reads back equal whatever bytes the text becomes."""
    return yaml.safe_dump(_yamlable(tree), sort_keys=False, allow_unicode=not escape, width=110)


def _is_utf8(stream: TextIO) -> bool:
    """Whether what is written there becomes UTF-8; a stream without an encoding keeps text as it is."""
    return stream.encoding is None or codecs.lookup(stream.encoding).name == "utf-8"


def _yamlable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _yamlable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_yamlable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
