"""The adapters beside an engine's model: read from their folders, chosen by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from minnow.config import UserError
from minnow.model.adapter import is_adapter, read_adapter
from minnow.model.lora import LoraLinear
from minnow.model.pretrained import resolve_model_folder
from minnow.model.switched import AdapterChoice, put_adapter
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer


class Adapters:
    """What requests may choose from.

    folders: by name, an adapter's folder, its run or a Hub id, of minnow or of PEFT. UserError for one that does not
    fit the model, and for a model that is an adapter on its base itself.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, folders: Mapping[str, str | Path]) -> None:
        if folders and model.adapter is not None:
            raise UserError("adapters stand beside a plain model: merge the one it has (minnow merge-lora)")
        self.choice = AdapterChoice()
        self._model, self._tokenizer = model, tokenizer
        for name, folder in folders.items():
            self.put(name, self.read(folder))

    @property
    def names(self) -> frozenset[str]:
        """All there are."""
        return frozenset(self.choice.names)

    def require(self, name: str | None) -> None:
        """UserError that lists the others where there is no such adapter; None is the model itself."""
        if name is not None and name not in self.names:
            raise UserError(f"there is no adapter {name!r} here; there are: {', '.join(sorted(self.names)) or 'none'}")

    def through(self, name: str | None, tokens: int) -> AbstractContextManager[None]:
        """Within it, a pass of the model over so many tokens goes through the adapter. UserError as in `require`."""
        self.require(name)
        return nullcontext() if name is None else self.choice.of([(name, tokens)], self._model.head_weight.device)

    def read(self, adapter: str | Path) -> dict[str, LoraLinear]:
        """The layers of an adapter, around the model's weights; nothing is changed yet.

        UserError for a whole model, for layers or shapes that the model does not have, and for another tokenizer.
        """
        folder = resolve_model_folder(adapter)
        if not is_adapter(folder):
            raise UserError(f"{folder}: a whole model, not an adapter (it has no adapter_config.json)")
        layers = read_adapter(self._model, folder)
        own_tokenizer = (folder / "tokenizer.json").is_file()  # PEFT alone writes none
        if own_tokenizer and Tokenizer.from_pretrained(folder).fingerprint != self._tokenizer.fingerprint:
            raise UserError(f"{folder}: it was trained with another tokenizer than the model's")
        return layers

    def put(self, name: str, layers: dict[str, LoraLinear]) -> None:
        """Let requests choose an adapter; one that has this name already makes room."""
        put_adapter(self._model, self.choice, name, layers)
