"""What the commands that talk in a terminal share."""

from __future__ import annotations

from dataclasses import dataclass, field

from minnow.console import plain_console
from minnow.engine import Engine, SamplingOptions
from minnow.engine.parts import check_memory_share
from minnow.evaluation.quantization import quantization_note
from minnow.model.context import ContextConfig
from minnow.model.pretrained import resolve_model_folder
from minnow.model.quantize import QuantizeConfig
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.training.hardware import DeviceName, Precision, choose_device, choose_precision


@dataclass(frozen=True, kw_only=True)
class TalkingConfig(SamplingOptions, ContextConfig, QuantizeConfig):
    """The model and how it speaks."""

    model: str = field(metadata={"positional": True})
    """Model folder, run folder or Hub id."""
    device: DeviceName = "auto"
    """Where to run; auto takes a GPU where there is one."""
    precision: Precision = "auto"
    """Number format of weights and arithmetic; auto is bf16 where the hardware is faster in it, else fp32."""
    memory_share: float | None = None
    """Part of the memory for keys and values, 0 to 1; by default 0.5 of a GPU's free memory, 0.25 of the machine's
    (a container's, where that has less)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_memory_share(self.memory_share)

    def load_engine(self) -> Engine:
        """The engine for the model, its context stretched if asked for."""
        device = choose_device(self.device)
        engine = Engine.from_pretrained(
            self.model,
            dtype=choose_precision(self.precision, device),
            device=device,
            quantize=self.quantize,
            context=self,
            frozen=True,
            memory_share=self.memory_share,
        )
        note_foreign_template(engine.tokenizer, self.model)
        if self.quantize != "none":
            plain_console(stderr=True).print(
                quantization_note(resolve_model_folder(self.model), engine), soft_wrap=True
            )
        return engine


def note_foreign_template(tokenizer: Tokenizer, model: str) -> None:
    """Say so where MODEL was taught to converse in another form than minnow will ask it in."""
    if tokenizer.has_chat_tokens and (foreign := tokenizer.foreign_template) is not None:
        plain_console(stderr=True).print(f"note: {model} came with {foreign}: expect worse answers than elsewhere")
