"""A folder for `ollama create`: the GGUF file and a Modelfile with the chat template in ollama's language (Go's).

`ollama.gotmpl` says what `chat_template.jinja` says. Where ollama cannot: it writes JSON without spaces and escapes
`<`, `>` and `&` in it, does not trim what was said, and leaves an assistant's last message open to be continued.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.export.gguf_file import GgufFile, GgufType, write_gguf
from minnow.model.context import AS_TRAINED, ContextConfig
from minnow.model.pretrained import read_config
from minnow.tokenizer.template import differences, folder_template
from minnow.tokenizer.tokenizer import Tokenizer

# ollama offers reasoning where a template writes .Thinking, and then asks for it unless told otherwise.
_EMPTY_THINK = "<think>\n\n</think>\n\n"
_REASONING = (
    "{{ if and .Thinking (gt $i $lastUser) }}<think>\n{{ .Thinking }}\n</think>\n\n"
    "{{ else }}<think>\n\n</think>\n\n{{ end }}"
)
_OPENING = "<think>\n{{ if not .Think }}\n</think>\n\n{{ end }}"


def write_ollama(
    folder: Path,
    out: Path,
    type: GgufType = "f16",
    *,
    thinking: bool = False,
    context: ContextConfig = AS_TRAINED,
) -> GgufFile:
    """Write `out/model-TYPE.gguf` and `out/Modelfile` of the model in `folder`.

    thinking: whether ollama offers (and by default asks for) reasoning. context: how far to stretch the model's.
    UserError for a chat template that is not minnow's: there is no translation from Jinja.
    """
    template = folder_template(folder)
    if template is not None and differences(template):
        raise UserError(f"{folder}: its chat template is not minnow's, and ollama's language is another: use --to gguf")
    content = modelfile(
        f"model-{type}.gguf",
        context=context.extend(read_config(folder)).max_position_embeddings,
        stops=_stops(Tokenizer.from_pretrained(folder)),
        template=go_template(thinking=thinking) if template is not None else "{{ .Prompt }}",
    )
    written = write_gguf(folder, out / f"model-{type}.gguf", type, thinking=thinking, context=context)
    with atomic_write(out / "Modelfile") as temporary:
        temporary.write_text(content, encoding="utf-8")
    return written


def go_template(*, thinking: bool) -> str:
    """minnow's chat template as ollama reads it."""
    text = (resources.files("minnow.export") / "ollama.gotmpl").read_text(encoding="utf-8")
    reasoning, opening = (_REASONING, _OPENING) if thinking else (_EMPTY_THINK, _EMPTY_THINK)
    # The file breaks the line after each place; what stands there ends with its own line breaks, or none.
    return text.replace("@REASONING@\n{{-", reasoning + "{{").replace("@OPENING@\n{{-", opening + "{{")


def modelfile(gguf: str, *, context: int, stops: list[str], template: str) -> str:
    """Text of a Modelfile for the file `gguf` beside it."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # ollama's own defaults: 4,096 tokens, and a penalty that a small model pays for every name it has to repeat.
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Tokenizer) -> list[str]:
    return list(dict.fromkeys([tokenizer.roles.eos, tokenizer.roles.end_of_text]))
