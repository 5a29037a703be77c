"""Decode image files, independently of the settings that other libraries give to Pillow."""

import io
import warnings
from threading import Lock
from typing import Any

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mmtard_bench.data.base import Pixels
from mmtard_bench.errors import DamagedImageError, InputError

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
"""The formats that are read, as Pillow calls them, and how the names of such files end."""

FORMATS = tuple(EXTENSIONS)
IMAGE_EXTENSIONS = frozenset(end for ends in EXTENSIONS.values() for end in ends)

MOST_PIXELS = 2**26
"""The most pixels of one image, as of 8192 x 8192: a file of a few bytes can claim any size."""

_KINDS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "a palette image",
    "PA": "a palette image",
    "RGBX": "RGB with a fourth channel",
    "RGBA": "RGBA",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}
"""The modes besides RGB that Pillow converts from 8 bits a channel to 8-bit RGB."""

_STRIP = 2**20
"""How many pixels are converted at once: a large image is then in memory twice, not four times."""


def decode(data: bytes, what: str, *, convert_rgb: bool) -> Pixels:
    """Decode an image file to (H, W, 3) uint8, upright as its EXIF orientation says.

    ``convert_rgb`` converts images of 8 bits a channel as Pillow does, which ignores transparency.
    More bits are refused: the values that stand for black and white are not in the file (12 bits
    are stored in 16). Of several frames the first is used. The last two warn.

    Raises DamagedImageError if it is damaged, and InputError if it has more than ``MOST_PIXELS``,
    more than 8 bits a channel or, unless ``convert_rgb``, is not RGB.
    """
    try:
        with _SETTINGS, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _require_size(image, what)
            said = _frames(image)
            image.load()
            _require_rgb(image, _beyond_8_bits(image, data), what, convert_rgb=convert_rgb)
            said += _transparency(image)
            pixels = _pixels(_upright(image))
    except (MemoryError, InputError):
        raise
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise DamagedImageError(f"{what} is damaged or no image: expected {formats}.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        raise DamagedImageError(f"{what} is damaged or no image: {error}") from error
    for remark in said:
        # Without the sample's name: Python shows a warning of one text once.
        warnings.warn(remark, stacklevel=2)
    return pixels


class _Settings:
    """Pillow's settings while an image is decoded; afterwards the earlier settings return.

    The settings are global: of several threads, the first sets and the last restores them.
    """

    def __init__(self, *wanted: tuple[Any, str, Any]) -> None:
        self._wanted = wanted
        self._lock = Lock()
        self._users = 0
        self._before: list[object] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = [getattr(module, name) for module, name, _ in self._wanted]
                for module, name, value in self._wanted:
                    setattr(module, name, value)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for (module, name, _), value in zip(self._wanted, self._before, strict=True):
                    setattr(module, name, value)


_SETTINGS = _Settings(
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    # Its limit warns first; ours is checked before anything is decoded.
    (Image, "MAX_IMAGE_PIXELS", None),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
    (TiffImagePlugin, "READ_LIBTIFF", False),
)


def _require_size(image: Image.Image, what: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"{what} has {image.width} x {image.height} = {image.width * image.height:,} pixels; "
            f"at most {MOST_PIXELS:,} (8192 x 8192) are read. Make the image smaller."
        )


def _require_rgb(image: Image.Image, deep: str, what: str, *, convert_rgb: bool) -> None:
    """Raise InputError unless the image is 8-bit RGB or, with ``convert_rgb``, convertible to it.

    ``deep`` is the result of ``_beyond_8_bits``.
    """
    if deep:
        raise InputError(
            f"{what} is {deep}; expected 8-bit RGB. It is not converted: which values are black "
            "and white is not in the file (12 bits are often stored in 16). Scale it to 8 bits "
            "before you use it."
        )
    if image.mode == "RGB" or (convert_rgb and image.mode in _KINDS):
        return
    remedy = "Convert it"
    if image.mode in _KINDS:
        remedy += ", or set convert_rgb = true in the task to have it converted as Pillow does"
    raise InputError(
        f"{what} is {_KINDS.get(image.mode, image.mode)}; expected 8-bit RGB. {remedy}."
    )


def _beyond_8_bits(image: Image.Image, data: bytes) -> str:
    """Describe an image with more than 8 bits per channel; "" for 8 bits.

    The file itself is read, because Pillow silently reduces 16-bit colour to 8 bits.
    """
    if image.mode == "F":
        return "of floating-point numbers"
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        unsigned = set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) <= {1, 4}
        if bits > 8 or not unsigned:
            return f"{bits}-bit" if unsigned else f"{bits}-bit with signed values"
    if image.format == "PNG":
        bits = data[24]  # of the header, at a fixed place
        return f"{bits}-bit" if bits > 8 else ""
    return "16-bit or deeper" if image.mode.startswith("I") else ""


def _frames(image: Image.Image) -> list[str]:
    # A JPEG file of several pictures (MPO) has its photograph first, and views of it behind.
    if image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return []
    return [f"Of images with several frames or pages ({image.format}), only the first is used."]


def _transparency(image: Image.Image) -> list[str]:
    key = image.info.pop("transparency", b"")
    hidden = not isinstance(key, bytes) or min(key, default=255) < 255
    if "A" in image.getbands():
        hidden = image.getchannel("A").getextrema() != (255, 255)
    if not hidden:
        return []
    return ["Some images have transparent areas: the colours that are stored there are used."]


def _upright(image: Image.Image) -> Image.Image:
    """Rotate as the EXIF orientation states, as the package ``datasets`` does in training."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # an EXIF block that cannot be read says nothing, and the pixels are whole
        return image
    if orientation != 1:
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return pixels
