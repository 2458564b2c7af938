"""`minnow merge-lora`: an adapter and its base become one plain model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.config import UserError
from minnow.console import plain_console
from minnow.disk import atomic_write
from minnow.model.lora import merge_lora
from minnow.model.pretrained import load_with_adapter, resolve_model_folder, save_pretrained
from minnow.report.lineage import MERGED_FROM
from minnow.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Add an adapter to the weights of its model and write the sum as a plain model."""

    adapter: str = field(metadata={"positional": True})
    """Adapter to merge: its folder, the run that trained it, or a Hub id; of minnow or of PEFT."""
    out: str
    """Folder for the merged model; a new one."""
    base: str | None = None
    """Where the adapter's model lies now (folder, run or Hub id), if not where it lay in training."""


def run(config: Config) -> None:
    """Merge and write."""
    out = Path(config.out)
    if out.exists():
        raise UserError(f"--out {out} exists already: name a new folder")
    folder = resolve_model_folder(config.adapter)
    model = load_with_adapter(folder, config.base)
    own_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_pretrained(folder if own_tokenizer or config.base is None else config.base)
    merge_lora(model)
    save_pretrained(model, out, tokenizer)
    with atomic_write(out / MERGED_FROM) as temporary:  # for its card
        temporary.write_text(f"{folder.resolve()}\n", encoding="utf-8")
    plain_console(stderr=True).print(f"merged model written to {out}")
