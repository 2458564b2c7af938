"""Pictures in a conversation: where they stand, and how a file's bytes become the pixels that a vision tower reads."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minnow.config import UserError
from minnow.json_file import read_json
from minnow.tokenizer.special import IMAGE

if TYPE_CHECKING:
    import PIL.Image

MEAN, STD = 0.5, 0.5
"""SigLIP's: pixels go from 0 ... 1 to -1 ... 1."""
MODEL_TYPE = "llava"
"""transformers' name for a language model behind a vision tower, in config.json."""
_IMAGE_PROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_PREPARED: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
    "do_center_crop": False,
    "do_pad": False,
}
"""SigLIP's way from a file to pixels, in transformers' words."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MOST_PIXELS = 1 << 26
"""Of a picture as it is stored. A file of 34 bytes can claim so many, and takes 1 GB and two seconds to decode then."""


@dataclass(frozen=True)
class Image:
    """A picture in a message: an encoded file, and where in the message's content it stands."""

    data: bytes
    """The file's content: PNG, JPEG, WebP, GIF (its first frame) or BMP."""
    offset: int = 0
    """Characters of the content before it."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ImageFormat:
    """What a vision tower reads: square pictures of `image_size` pixels, cut into patches; each patch is a token."""

    image_size: int
    """Pixels of an edge."""
    patch_size: int
    """Pixels of a patch's edge; divides image_size."""

    @property
    def num_tokens(self) -> int:
        """Image tokens that a picture takes in a text."""
        return (self.image_size // self.patch_size) ** 2

    def pixels(self, data: bytes) -> np.ndarray:
        """An encoded picture as uint8 [3, image_size, image_size], stretched to the square as SigLIP's processor does.

        UserError for what is no picture, and for one of more than 67 million pixels.
        """
        import PIL.Image  # imported here: only those who look at pictures need it

        try:
            with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    raise UserError(
                        f"a picture of {picture.width} x {picture.height} pixels: at most {_MOST_PIXELS:,} are read"
                    )
                # The same pixels by way of RGBA, without a warning for each palette that is transparent in parts. No
                # filter of warnings: those are one for all threads, and pictures are decoded in several.
                coloured = picture.convert("RGBA") if picture.mode == "P" else picture
                if picture.mode == "I;16":  # a grey of 16 bits, which `convert` would cut off at 255: all white
                    coloured = picture.point(lambda grey: grey / 256)
                if coloured.mode != "RGB":  # it would be copied
                    coloured = coloured.convert("RGB")
                resized = coloured.resize((self.image_size, self.image_size), PIL.Image.Resampling.BICUBIC)
                resized = _upright(resized, _orientation(picture))
        except UserError:
            raise
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            # Of what is no picture at all it says only where in memory that lies, and servers tell strangers.
            reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f": {error}"
            raise UserError(f"not a picture that can be read ({', '.join(_FORMATS)}){reason}") from error
        return np.ascontiguousarray(np.asarray(resized, np.uint8).transpose(2, 0, 1))


def _orientation(picture: PIL.Image.Image) -> int:
    """How a camera was held, 1 to 8, by the file's EXIF; 1, upright, where that says nothing or cannot be read."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # whatever is wrong with what a file says about its picture, the picture is there
        return 1


def _upright(square: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """The picture as every viewer shows it: telephones store what they saw, and beside it how they were held.

    Turned when it is small already, which is as good as before that and takes no memory.
    """
    import PIL.Image

    turn = PIL.Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return square.transpose(turns[orientation]) if orientation in turns else square


def read_image_format(folder: Path) -> ImageFormat | None:
    """What the model in `folder` looks at; None for one that only reads.

    Where a tokenizer lies without a model, `processor_files` say so. UserError where pictures are otherwise prepared
    than SigLIP's are.
    """
    image_processor = _image_processor(folder)
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json")
        if content.get("model_type") != MODEL_TYPE:
            return None
        image_size, patch_size = map((content.get("vision_config") or {}).get, ("image_size", "patch_size"))
    elif image_processor and (folder / _PROCESSOR).is_file():
        image_size = (image_processor.get("size") or {}).get("height")
        patch_size = read_json(folder / _PROCESSOR).get("patch_size")
    else:
        return None
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        raise UserError(f"{folder}: its config.json, or its processor's files, lack image_size or patch_size")
    require_siglip_pixels(folder)
    return ImageFormat(image_size, patch_size)


def require_siglip_pixels(folder: Path) -> None:
    """UserError where the image processor of the model in `folder` prepares pictures otherwise than SigLIP's does."""
    image_processor = _image_processor(folder)
    for key, plain in _PREPARED.items():
        value = image_processor.get(key, plain)
        # SigLIP's own files say null: what is not converted there is RGB already.
        if value != plain and (key, value) != ("do_convert_rgb", None):
            raise UserError(f"{folder}: pictures with {key} {value} are not supported (only {plain})")


def _image_processor(folder: Path) -> dict[str, Any]:
    """How pictures are prepared: a file of its own, or (transformers 5) a part of the processor's."""
    if (folder / _IMAGE_PROCESSOR).is_file():
        return read_json(folder / _IMAGE_PROCESSOR)
    if (folder / _PROCESSOR).is_file():
        return read_json(folder / _PROCESSOR).get("image_processor") or {}
    return {}


def processor_files(image_format: ImageFormat) -> dict[str, dict[str, Any]]:
    """The files by which transformers' `AutoProcessor` prepares the same pixels and the same ids, by their names."""
    size = {"height": image_format.image_size, "width": image_format.image_size}
    image_processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": size,
        **_PREPARED,
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": image_format.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_token": IMAGE,
    }
    return {_IMAGE_PROCESSOR: image_processor, _PROCESSOR: processor}
