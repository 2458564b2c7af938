"""The tokenizer's files in the Hugging Face format: tokenizer.json, tokenizer_config.json,
chat_template.jinja."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from minnow.config import UserError, atomic_write
from minnow.tokenizer.special import END_OF_TEXT, IM_END
from minnow.tokenizer.template import folder_template

_UNLIMITED = 131072  # the model's config.json knows the trained length; transformers warns beyond this one


def save(folder: Path, tokenizer: tokenizers.Tokenizer, end_of_text: str, *, chat: bool, template: str | None) -> None:
    """Write the files so that `transformers.AutoTokenizer` (4 and 5) gives the same ids beside any config.json.

    The class is named PreTrainedTokenizerFast, which takes tokenizer.json as it is: the class transformers
    would pick for a Qwen model adds an NFC normaliser.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,  # what a document starts with; nothing adds it to a text
        "eos_token": IM_END if chat else end_of_text,
        "pad_token": end_of_text,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _UNLIMITED,
    }
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if template is not None:
        _write(folder / "chat_template.jinja", template)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load(folder_or_hub_id: str | Path) -> tuple[tokenizers.Tokenizer, str, str | None]:
    """The `tokenizers` tokenizer, the text of its end-of-document token, and the chat template if there is one.

    Raises `UserError` where there is no tokenizer."""
    path = Path(folder_or_hub_id)
    if path.is_dir():
        folder = path if _is_tokenizer(path) else path / "model"
        if not _is_tokenizer(folder) and (path / "adapter_config.json").exists():  # PEFT's, of a base that has one
            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
            return load(base)
        if not _is_tokenizer(folder):
            raise UserError(f"{path}: no tokenizer.json here, nor in {path / 'model'}")
    else:
        folder = _download(str(folder_or_hub_id))
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        tokenizer = _gpt2(folder)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return tokenizer, END_OF_TEXT if END_OF_TEXT in known else _end_token(folder), folder_template(folder)


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's older pair of files, vocab.json and merges.txt."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _end_token(folder: Path) -> str:
    """`eos_token` of the config beside tokenizer.json, for tokenizers that call `<|endoftext|>` something
    else."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
    raise UserError(f"{folder}: the tokenizer has neither {END_OF_TEXT} nor an eos_token to end a document with")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["tokenizer*.json", "special_tokens_map.json", "*.jinja"]))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{hub_id}: neither a folder here nor a model on the Hugging Face Hub ({reason})") from error
