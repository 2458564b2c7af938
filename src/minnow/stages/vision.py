"""How a language model gets a vision tower, and what learns: the settings that `minnow vlm` and `minnow plan` share."""

from __future__ import annotations

from dataclasses import dataclass

from minnow.config import UserError
from minnow.model.vision_language import Trained
from minnow.model.vision_tower import VisionConfig

PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower."


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """A vision tower and a projector before a language model."""

    siglip: str | None = None
    """A trained vision tower for a language model: that of a SigLIP folder or Hub id, such as
    google/siglip-base-patch16-224."""
    tower: VisionConfig | None = None
    """Shape of a new vision tower, where siglip names none; null: a small one. It learns from your pictures alone."""
    train: Trained | None = None
    """What learns. projector: only what translates the tower's patches into tokens, which is how a trained tower is
    first introduced to a language model that it must not disturb; language: the language model too, LLaVA's second
    step, with a learning rate that steers it; all: the tower as well. null: all where the tower is new, as without
    learning it sees nothing; projector where it is SigLIP's; language where the model has a tower already."""

    def new_parts(self, init_from: str, *, sees: bool) -> tuple[str, ...]:
        """How the names of the parameters begin that `init_from` is given anew; it may see already.

        Beside a trained language model, which is only steered, they need the rates of a new one: nothing of what they
        are now is worth keeping. UserError for a second tower.
        """
        if sees:
            for name in ("siglip", "tower"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--{name}: {init_from} has a vision tower already, and the training goes on with it: leave "
                        "that out, or start from the language model"
                    )
            return ()
        if self.siglip is not None and self.tower is not None:
            raise UserError("--tower is the shape of a new tower, and --siglip brings its own: leave one of them out")
        return (PROJECTOR,) if self.siglip is not None else (PROJECTOR, TOWER)

    def parts_to_train(self, new_parts: tuple[str, ...]) -> Trained:
        """`train`, or its default. UserError where a new tower would not learn."""
        if TOWER not in new_parts:
            return self.train or ("projector" if new_parts else "language")
        if self.train not in (None, "all"):
            raise UserError(
                f"--train {self.train} leaves the new tower as it was drawn, and that sees nothing: give a trained one "
                "(--siglip), or --train all"
            )
        return "all"


def require_room(vision: VisionConfig, row_length: int) -> None:
    """UserError where a picture leaves a row no room for words."""
    tokens = vision.num_patches
    if tokens >= row_length:
        raise UserError(
            f"a picture takes {tokens} tokens, and a row has {row_length}: give a greater --sequence_length, smaller "
            "pictures or larger patches (--tower.image_size, --tower.patch_size)"
        )
