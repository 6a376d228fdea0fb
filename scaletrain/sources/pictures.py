"""From the file or bytes of an image to pixels, whatever its mode, depth and orientation."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain.errors import InputError


class BadImageError(InputError):
    """An image that cannot be read; ``--skip-bad`` may put another example in its place."""


def read(picture: dict[str, Any] | None, size: int | None, where: str, row: int) -> Tensor:
    """Decode an image to (3, H, W) float32 in [0, 1], scaled to ``size`` x ``size`` if that is given.

    ``picture`` has ``bytes`` or ``path``. It is turned upright as EXIF says, transparency shows white, 16 bits are
    divided by 65535, and fractions are taken as they are. Raises BadImageError naming file and row.
    """
    from PIL import Image

    if picture is None or (picture["bytes"] is None and picture["path"] is None):
        raise BadImageError(f"{where}: the image is missing in row {row} (counted from 0)")
    name = picture["path"] or f"{where} row {row}"
    try:
        with Image.open(picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])) as opened:
            return _pixels(opened, size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise BadImageError(f"image {name} (row {row}): {reason}") from None


def _pixels(image: Any, size: int | None) -> Tensor:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    deep = image.mode == "F" or image.mode.startswith("I")
    if deep:
        values = np.asarray(image, dtype=np.float32) / (1 if image.mode == "F" else 65535)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"mode {image.mode} with values {np.asarray(image).min():g} to {np.asarray(image).max():g}; "
                "convert it to 8 or 16 bits, or to fractions from 0 to 1"
            )
        image = Image.fromarray(values)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if not deep:
        image = image.convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))  # (H, W) float or (H, W, 3) uint8
    return pixels.expand(3, -1, -1).contiguous() if deep else pixels.permute(2, 0, 1).float() / 255
