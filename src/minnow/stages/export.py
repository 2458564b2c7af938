"""`minnow export`: a model in the format of another program, or on the Hugging Face Hub."""

from __future__ import annotations

import errno
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from minnow.config import UserError
from minnow.console import plain_console
from minnow.disk import told_when_full
from minnow.model.adapter import base_of, is_adapter
from minnow.model.context import ContextConfig
from minnow.model.pretrained import read_vision, resolve_model_folder
from minnow.report.model_card import write_model_card

if TYPE_CHECKING:
    from minnow.export.gguf_file import GgufFile, GgufType

ExportType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "int8"]


@dataclass(frozen=True, kw_only=True)
class Config(ContextConfig):
    """Write a model for llama.cpp (gguf), ollama or ONNX runtimes, or push it to the Hugging Face Hub.

    transformers and vLLM need no export: they read the model folder as it is.
    """

    model: str = field(metadata={"positional": True})
    """Model folder, run folder or Hub id."""
    to: Literal["gguf", "ollama", "onnx", "hub"]
    """gguf: one file; ollama: that file and a Modelfile; onnx: a graph with a KV cache; hub: upload the folder."""
    repo: str | None = field(default=None, metadata={"positional": True})
    """With hub: the repository to push to, OWNER/NAME."""
    type: ExportType | None = None
    """Number format of the matrices; by default f16, and f32 for onnx. gguf, ollama: all but int8; onnx: f32, int8."""
    out: str | None = None
    """File to write (ollama: folder); by default in the model folder, or for a Hub id OWNER/NAME in a new folder NAME
    here."""
    thinking: bool = False
    """The model was taught to reason first: llama.cpp and ollama then let it, unless a request says otherwise."""
    private: bool = False
    """With hub: make a new repository private."""


def run(config: Config) -> None:
    """Export, and say what was written and how it is used."""
    console = plain_console(soft_wrap=True)
    if (config.repo is None) == (config.to == "hub"):
        raise UserError("minnow export MODEL --to hub OWNER/NAME: a repository belongs to hub, and hub needs one")
    if config.to == "hub" and not Path(config.model).exists():
        # What the Hub's client keeps of a Hub id lacks its card, and is not ours to write another one into.
        raise UserError(
            f"{config.model}: --to hub pushes a folder of this machine, and there is none of that name; of a Hub model "
            "push what you train from it, or get it with its card and licence and push that folder "
            f"(hf download {config.model} --local-dir FOLDER)"
        )
    if config.to == "hub" and (config.rope_scaling or config.factor):
        raise UserError("--rope-scaling changes what gguf, ollama and onnx write; --to hub uploads the folder as it is")
    _refuse_unread(config)
    folder = resolve_model_folder(config.model)
    # Where the folder is a copy that the Hub's client keeps, nothing is written into it.
    home = folder if Path(config.model).exists() else Path(config.model.rpartition("/")[2])
    if home == folder and config.to != "hub":
        _renew_card(folder, console)
    if config.to in ("ollama", "onnx") and read_vision(folder) is not None:
        raise UserError(
            f"{config.model} looks at pictures, and --to {config.to} would write a model that only reads: --to gguf "
            "writes both of llama.cpp's files, and transformers and vLLM read the folder as it is"
        )
    ways = {"gguf": _gguf, "ollama": _ollama, "onnx": _onnx, "hub": _hub}
    with told_when_full(config.out or home):
        ways[config.to](config, folder, home, console)


def _renew_card(folder: Path, console: Console) -> None:
    try:
        write_model_card(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        console.print(f"note: {folder} may only be read: its card stays as it is")  # --out may lie elsewhere


def _refuse_unread(config: Config) -> None:
    for option, given, ways in (
        ("thinking", config.thinking, ("gguf", "ollama")),
        ("private", config.private, ("hub",)),
        ("type", config.type, ("gguf", "ollama", "onnx")),
        ("out", config.out, ("gguf", "ollama", "onnx")),
    ):
        if given and config.to not in ways:
            raise UserError(f"--{option} is for --to {' and '.join(ways)}: with {config.to} it would change nothing")


def _gguf(config: Config, folder: Path, home: Path, console: Console) -> None:
    from minnow.export.gguf_file import write_gguf

    kind = _gguf_type(config)
    out = _file(config, home / f"model-{kind}.gguf")
    _tell(write_gguf(folder, out, kind, thinking=config.thinking, context=config), console)


def _file(config: Config, default: Path) -> Path:
    """The file that is to be written. UserError where --out is a folder, as ollama's is."""
    out = Path(config.out or default)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name the file, such as {out / default.name}")
    return out


def _ollama(config: Config, folder: Path, home: Path, console: Console) -> None:
    from minnow.export.ollama import write_ollama
    from minnow.export.template import model_name

    out = Path(config.out or home)
    _tell(write_ollama(folder, out, _gguf_type(config), thinking=config.thinking, context=config), console)
    file = out / "Modelfile"
    console.print(f"{file}: ollama create {shlex.quote(model_name(folder))} -f {shlex.quote(str(file))}")


def _onnx(config: Config, folder: Path, home: Path, console: Console) -> None:
    from minnow.export.onnx_file import ONNX_TYPES, write_onnx

    kind = config.type or "f32"
    if kind not in ONNX_TYPES:
        raise UserError(f"--type {kind} is no ONNX type; there are {', '.join(ONNX_TYPES)}")
    name = "model.onnx" if kind == "f32" else f"model_{kind}.onnx"
    out = _file(config, home / "onnx" / name)
    write_onnx(folder, out, kind, context=config)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def _hub(config: Config, folder: Path, home: Path, console: Console) -> None:
    from minnow.export.hub import push

    assert config.repo is not None
    base = Path(base_of(folder)) if is_adapter(folder) else None
    if base is not None and (base.is_absolute() or base.exists()):
        raise UserError(
            f"{folder}: an adapter of {base}, a folder of this machine: nobody else could load it. Push a whole model "
            f"(minnow merge-lora {config.model} --out FOLDER, and push that), or push the base and put its OWNER/NAME "
            "into adapter_config.json as base_model_name_or_path"
        )
    write_model_card(folder, repo=config.repo)
    console.print(push(folder, config.repo, private=config.private))


def _gguf_type(config: Config) -> GgufType:
    from minnow.export.gguf_file import GGUF_TYPES

    kind = config.type or "f16"
    if kind not in GGUF_TYPES:
        raise UserError(f"--type {kind} is no GGUF type; there are {', '.join(GGUF_TYPES)}")
    return kind


def _tell(written: GgufFile, console: Console) -> None:
    console.print(f"{written.path}: {written.bytes / 1e6:.1f} MB")
    if written.mmproj is not None:
        console.print(
            f"{written.mmproj}: {written.mmproj.stat().st_size / 1e6:.1f} MB; "
            f"llama-server -m {shlex.quote(str(written.path))} --mmproj {shlex.quote(str(written.mmproj))}"
        )
    if written.kept_f16:
        console.print(f"note: {len(written.kept_f16)} matrices stay f16: their rows are no multiple of 32 wide")
    if written.note:
        console.print(f"note: {written.note}")
