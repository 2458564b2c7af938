"""`minnow vlm`: give a language model a vision tower, or train the one it has, on conversations with pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rich.console import Console

from minnow.config import UserError
from minnow.console import plain_console
from minnow.model.pretrained import load_pretrained, load_vision_tower, resolve_model_folder
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.stages.language_model import LanguageModelConfig, PackedData, run_language_model
from minnow.stages.rows import with_row_length
from minnow.stages.vision import TOWER, VisionSettings, require_room
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.images import ImageFormat
from minnow.tokenizer.template import chat_template
from minnow.training.config import TrainingConfig

ROWS_LOOKED_AT = 64
"""In which there must be a picture, or the user is told."""


@dataclass(frozen=True, kw_only=True)
class Config(LanguageModelConfig, VisionSettings):
    """Teach a model to look at pictures: LLaVA's way, a vision tower and a projector before the language model."""

    run: str = "runs/vlm"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    init_from: str
    """Model to start from: a model folder, a run folder or a Hub id. A language model gets a vision tower (siglip,
    or tower); of one that has its own the training goes on. Its tokenizer must have the tokens of chat and pictures."""
    replace_chat_template: bool = False
    """Teach minnow's chat template to a model that came with another; it is saved with minnow's."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=2, batch_tokens=32_768))
    """The training loop."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    """The optimizer. What is new (projector, tower) learns at a new model's rates, also beside a trained language
    model."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="linear", warmup_steps=20))
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if self.lora.rank:
            raise UserError(
                "lora.rank: adapters are saved without the projector, which learns here: leave it out (an adapter on a "
                "model that looks at pictures already is what minnow lora trains, on pictures too)"
            )


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    console = plain_console(stderr=True)
    folder = resolve_model_folder(config.init_from)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.require_chat_tokens()
    if not config.replace_chat_template:
        tokenizer.require_chat_template(config.init_from)
    tokenizer.chat_template = chat_template()  # one that says the same of texts may know nothing of pictures
    start = load_pretrained(folder)
    fresh = config.new_parts(config.init_from, sees=isinstance(start, VisionLanguageModel))
    config = replace(config, train=config.parts_to_train(fresh))
    model = with_vision_modules(config, start, tokenizer)
    model.train_only(config.train)
    if TOWER in fresh:
        config = replace(config, tower=model.vision)
    config = with_row_length(config, model.config.max_position_embeddings)
    model.config.check_training_rows(config.row_length)
    require_room(model.vision, config.row_length)
    run_language_model(
        config,
        tokenizer,
        model,
        "sft",
        console,
        title="vlm",
        check=lambda packed: require_pictures(packed, config, console),
        fresh=fresh,
    )


def with_vision_modules(config: Config, start: CausalLM, tokenizer: Tokenizer) -> VisionLanguageModel:
    """The model to train; the tokenizer shows it its pictures. UserError for a tokenizer that cannot."""
    if isinstance(start, VisionLanguageModel):
        vision, tower = start.vision, None
    elif config.siglip is not None:
        vision, tower = load_vision_tower(config.siglip)
    else:
        vision, tower = config.tower or VisionConfig(), None
    tokenizer.image_format = ImageFormat(vision.image_size, vision.patch_size)
    image_id = tokenizer.image_id
    if image_id >= start.config.vocab_size:
        raise UserError(
            f"{config.init_from}: its tokenizer's image token is {image_id}, and its model knows only "
            f"{start.config.vocab_size} tokens"
        )
    if isinstance(start, VisionLanguageModel):
        start.image_token_id = image_id
        return start
    return VisionLanguageModel.from_language_model(start, vision, image_id, config.training.seed, tower)


def require_pictures(packed: PackedData, config: Config, console: Console) -> None:
    """UserError where no row holds a picture; a note where none of the first ones does."""
    rows = next(iter(packed.train.window_rows))
    seen = min(rows, ROWS_LOOKED_AT)
    if any(packed.train.batch([row]).pixels_ICHW is not None for row in range(seen)):
        return
    if not config.stream and seen == rows == packed.train.num_rows:
        raise UserError("there is not one picture in the data: on texts a model is trained with minnow sft")
    console.print(f"note: there is no picture in the first {seen} rows of the data")
