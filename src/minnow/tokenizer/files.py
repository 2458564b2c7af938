"""The tokenizer's files in the Hugging Face format: tokenizer.json, tokenizer_config.json,
chat_template.jinja."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.errors import first_line
from minnow.json_file import read_json
from minnow.tokenizer.images import ImageFormat, processor_files, read_image_format
from minnow.tokenizer.roles import Roles, read_roles
from minnow.tokenizer.special import END_OF_TEXT
from minnow.tokenizer.template import folder_template

_UNLIMITED = 131072  # the model's config.json knows the trained length; transformers warns beyond this one


def save(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    roles: Roles,
    template: str | None,
    image_format: ImageFormat | None = None,
) -> None:
    """Write the files so that `transformers.AutoTokenizer` (4 and 5) gives the same ids beside any config.json.

    The class is named PreTrainedTokenizerFast, which takes tokenizer.json as it is: the class transformers
    would pick for a Qwen model adds an NFC normaliser.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": roles.bos,
        "eos_token": roles.eos,
        "pad_token": roles.pad,
        "unk_token": None,
        "add_bos_token": roles.adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _UNLIMITED,
    }
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if template is not None:
        _write(folder / "chat_template.jinja", template)
    if image_format is not None:
        for name, content in processor_files(image_format).items():
            _write(folder / name, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load(folder_or_hub_id: str | Path) -> tuple[tokenizers.Tokenizer, Roles, str | None, ImageFormat | None]:
    """The `tokenizers` tokenizer, which of its tokens begin, end and fill, the chat template and what the model beside
    it looks at, if there are such.

    Raises `UserError` where there is no tokenizer."""
    path = Path(folder_or_hub_id)
    if path.is_dir():
        folder = path if _is_tokenizer(path) else path / "model"
        if not _is_tokenizer(folder) and (path / "adapter_config.json").exists():  # PEFT's, of a base that has one
            base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
            if not base:
                raise UserError(f"{path}: no tokenizer.json here, and adapter_config.json does not name its model")
            return load(base)
        if not _is_tokenizer(folder):
            raise UserError(f"{path}: no tokenizer.json here, nor in {path / 'model'}")
    else:
        folder = _download(str(folder_or_hub_id))
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more special
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: not a tokenizer that can be read ({reason}); restore the file") from error
    else:
        tokenizer = _gpt2(folder)
    return tokenizer, read_roles(folder, tokenizer), folder_template(folder), read_image_format(folder)


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's older pair of files, vocab.json and merges.txt.

    UserError where they are another class's, which splits texts otherwise and has control tokens beside them.
    """
    file = folder / "tokenizer_config.json"
    named = read_json(file).get("tokenizer_class") if file.exists() else None
    if named is not None and not named.startswith("GPT2"):
        raise UserError(
            f"{folder}: vocab.json and merges.txt of a {named}, which only its own class reads; write tokenizer.json "
            "with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "config.json", "vocab.json", "merges.txt"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"{hub_id}: neither a folder here nor a model on the Hugging Face Hub ({first_line(error)})"
        ) from error
    if not _is_tokenizer(folder):
        raise UserError(f"{hub_id}: the Hub has it, but without a tokenizer.json")
    return folder
