"""From the bytes of an image file to pixels."""

import io
import struct

import numpy as np
from PIL import Image

from mmtard_bench.data.base import Pixels
from mmtard_bench.errors import DamagedImageError, InputError


def decode(data: bytes, what: str, *, convert_rgb: bool) -> Pixels:
    """Decode an image file to (H, W, 3) uint8.

    Raises DamagedImageError if it is damaged, and InputError if it is, unless ``convert_rgb``,
    anything but 8-bit RGB.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            mode = "16-bit" if _png_depth(data) == 16 else image.mode
            if mode == "RGB" or convert_rgb:
                return np.array(image.convert("RGB"), dtype=np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{what} is damaged or no image: {error}") from error
    kind = {"L": "grey", "LA": "grey", "1": "black and white", "P": "a palette image"}
    kind |= {"RGBA": "RGBA", "I;16": "16-bit", "I": "16-bit", "CMYK": "CMYK"}
    raise InputError(
        f"{what} is {kind.get(mode, mode)}; expected 8-bit RGB. Convert it, or set "
        "convert_rgb = true in the task to have it converted as Pillow does."
    )


def _png_depth(data: bytes) -> int | None:
    """The bits a channel of a PNG file: Pillow reads 16-bit colour as 8-bit without a word."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 25:
        return None
    return int(struct.unpack(">B", data[24:25])[0])
