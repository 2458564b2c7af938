"""What a configuration class can be told: its settings, one per field that is not a section, and how they are
described to people (`--help`, and the second half of error messages)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a configuration: a field that is not itself a section."""

    key: str
    """Dotted: "optim.learning_rate"."""
    type: Any
    """The field's annotation, resolved."""
    default: Any
    """`dataclasses.MISSING` when it must be given."""
    doc: str
    """The string literal under the field."""
    positional: bool
    """Given as a bare argument."""
    in_optional_section: bool
    """Below a section that may be null: its missing values count only once the section is used."""
    section_doc: str
    """The doc of the field that holds the section."""

    @property
    def flag(self) -> str:
        """How the command line names it: --optim.learning_rate, or MODEL for a positional."""
        return self.key.upper() if self.positional else f"--{self.key}"


def settings_of(
    cls: type, prefix: str = "", default: Any = None, optional: bool = False, section_doc: str = ""
) -> Iterator[Setting]:
    """Yield every setting of the dataclass `cls`, in field order, sections followed into.

    Args:
        cls: the dataclass.
        prefix: dotted prefix of its keys, "" or ending in ".".
        default: the instance that the enclosing class uses as default, if any: its values are the defaults.
        optional: the section may be null.
        section_doc: what the enclosing class says about it.
    """
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key, hint, doc = prefix + field.name, hints[field.name], docs.get(field.name, "")
        value = getattr(default, field.name) if default is not None else default_of(field)
        section = section_class(hint)
        if section is None:
            positional = bool(field.metadata.get("positional"))
            yield Setting(key, hint, value, doc, positional, optional, section_doc)
        else:
            instance = value if dataclasses.is_dataclass(value) else None
            yield from settings_of(section, f"{key}.", instance, optional or value is None, doc)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of `field`, made if need be; `dataclasses.MISSING` without one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def section_class(hint: Any) -> type | None:
    """The dataclass that `hint` names, alone or with None; None when `hint` is a leaf's type."""
    options = [option for option in options_of(hint) if option is not type(None)]
    if len(options) == 1 and isinstance(options[0], type) and dataclasses.is_dataclass(options[0]):
        return options[0]
    return None


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or `hint` alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_sequence(hint: Any) -> bool:
    """Whether `hint` is a tuple or list, or may be one."""
    return any(get_origin(option) in (tuple, list) for option in options_of(hint))


def literals_of(hint: Any) -> list[str]:
    """The words that `hint` allows by name."""
    return [str(word) for option in options_of(hint) if get_origin(option) is Literal for word in get_args(option)]


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it, as one line; base classes included."""
    from docstring_parser.attrdoc import add_attribute_docstrings
    from docstring_parser.common import Docstring

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        parsed = Docstring()
        add_attribute_docstrings(base, parsed)
        docs |= {item.arg_name: " ".join((item.description or "").split()) for item in parsed.params}
    return docs


# --- Words for people -----------------------------------------------------------------------------


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The spelling in `valid` closest to `word`, if any is close."""
    return next(iter(difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)), None)


def nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """The key probably meant by `key`: the same name in a section spelt alike, else the nearest spelling."""
    by_name: dict[str, list[str]] = {}
    for candidate in keys:
        by_name.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    name = key.rpartition(".")[2]
    same_name = by_name.get(name) or by_name.get(nearest(name, by_name) or "", [])
    found = max(same_name, key=lambda candidate: _likeness(key, candidate), default=None)
    return found or nearest(key, keys)


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def describe(hint: Any) -> str:
    """A type in words: "an integer or null", "one of muon, adamw"."""
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    parts = []
    for option in options_of(hint):
        arguments = get_args(option)
        if option is type(None):
            parts.append("null")
        elif get_origin(option) is Literal:
            parts.append(("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments)))
        elif get_origin(option) in (tuple, list):
            count = len(arguments) if get_origin(option) is tuple and Ellipsis not in arguments else None
            parts.append(f"a list{f' of {count}' if count else ''}, each {describe(arguments[0])}")
        else:
            parts.append(words.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(parts)


def help_text(config_class: type, settings: Iterable[Setting], program: str) -> str:
    """What `--help` prints: usage, the class's docstring, every setting with its type, doc and default."""
    width = min(shutil.get_terminal_size().columns, 110)
    # Positionals first; the sort is stable, so a section's settings stay together.
    ordered = sorted(settings, key=lambda setting: (not setting.positional, "." in setting.key))
    usage = [
        program,
        *(_usage(setting) for setting in ordered if setting.positional),
        "[--config FILE] [--key value ...]",
    ]
    lines = [f"usage: {' '.join(usage)}", "", inspect.cleandoc(config_class.__doc__ or "")]
    heading = None
    for setting in ordered:
        section = setting.key.rpartition(".")[0]
        here = "arguments" if setting.positional else f"{section}: {setting.section_doc}" if section else "settings"
        if here != heading:
            lines += ["", here]
            heading = here
        default = "required" if setting.default is dataclasses.MISSING else f"default: {_show(setting.default)}"
        lines.append(f"  {setting.flag}" + ("" if setting.positional else f" {_metavar(setting.type)}"))
        text = f"{setting.doc} [{default}]".strip()
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "also", "  --config FILE     read settings from a YAML file; the command line wins over it"]
    lines += [
        "  --print_config    print all settings as YAML and stop",
        "  --help            print this and stop",
    ]
    return "\n".join(lines)


def _usage(setting: Setting) -> str:
    word = setting.flag + (" ..." if is_sequence(setting.type) else "")
    return word if setting.default is dataclasses.MISSING else f"[{word}]"


def _metavar(hint: Any) -> str:
    names = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
    parts = []
    for option in options_of(hint):
        arguments = [item for item in get_args(option) if item is not Ellipsis]
        if get_origin(option) is Literal:
            parts += [str(value) for value in arguments]
        elif get_origin(option) in (tuple, list):
            is_fixed = get_origin(option) is tuple and Ellipsis not in get_args(option)
            parts.append(",".join(map(_metavar, arguments)) + ("" if is_fixed else ",..."))
        elif option is not type(None):
            parts.append(names.get(option, getattr(option, "__name__", str(option)).upper()))
    return "|".join(parts)


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_show, value)) or "none"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
