"""The image processors of ``transformers`` as a ``Preprocess``."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Preprocess

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that torch has too."""
_ROUNDING = 3.0
"""Levels of 255 that two ways to resize an 8-bit image may differ by: they round in between."""


def preprocess_of(spec: str, processor: Any) -> Preprocess:
    """The rules of an image processor, after its pixels were compared with theirs.

    The shortest edge and a cut from the centre, or a squash. Raises InputError for others.
    """
    preprocess = _preprocess(spec, processor)

    def pixels(image: Tensor) -> Tensor:
        found = processor(images=image, return_tensors="pt")["pixel_values"]
        return cast("Tensor", found[0])

    require_pixels(spec, preprocess, pixels, f"the image processor {type(processor).__name__}")
    return preprocess


def _preprocess(spec: str, processor: Any) -> Preprocess:
    size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
    shortest = size.get("shortest_edge")
    target = (shortest, shortest) if shortest else (size.get("height"), size.get("width"))
    cut = (crop.get("height"), crop.get("width")) if processor.do_center_crop else target
    scaled = processor.do_rescale and abs(processor.rescale_factor * 255 - 1) < 1e-6
    plain = processor.do_resize and processor.do_normalize and scaled
    if not plain or None in target or cut != target or processor.resample not in _FILTERS:
        raise InputError(
            f"'{spec}': the image processor resizes to {size} with filter {processor.resample} and "
            f"cuts {crop if processor.do_center_crop else 'nothing'}; expected a resize by 2 "
            "(bilinear) or 3 (bicubic) to the size of the cut, pixels divided by 255, and then "
            "normalised."
        )
    try:
        return Preprocess(
            size=cast("tuple[int, int]", target),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            interpolation=_FILTERS[int(processor.resample)],
            resize_mode="shortest" if shortest else "squash",
            crop="floor",
        )
    except InputError as error:
        raise InputError(f"'{spec}': {error}") from error


def require_pixels(
    spec: str, preprocess: Preprocess, pixels: Callable[[Tensor], Tensor], what: str
) -> None:
    """Raise InputError if a transform gives other pixels than ``preprocess`` on two images.

    Args:
        spec: The model, for the message.
        preprocess: What the transform should do.
        pixels: The transform: an image (3, H, W), uint8, to the tower's input (3, *size).
        what: The transform, for the message.
    """
    height, width = preprocess.size
    generator = torch.Generator().manual_seed(0)
    for shape in ((height + 3, width), (height * 3 // 2, width * 2)):
        # Of little contrast, so that no kernel overshoots: where to saturate is a matter of taste.
        coarse = 0.3 + 0.4 * torch.rand((1, 3, *(s // 4 for s in shape)), generator=generator)
        images = (F.interpolate(coarse, shape, mode="bilinear") * 255).round()
        theirs = pixels(images[0].byte())[None]
        ours = preprocess.normalise(preprocess.resize(images / 255))
        off = torch.tensor(255.0)
        if ours.shape == theirs.shape:
            off = ((ours - theirs) * ours.new_tensor(preprocess.std).view(1, 3, 1, 1)).abs().max()
        if not off * 255 < _ROUNDING:
            raise InputError(
                f"'{spec}': {what} gives other pixels for an image of {shape[0]} x {shape[1]} than "
                "its size, filter, cut, mean and deviation say (it may pad, crop or scale by "
                "options of its own), so the model would not see what it was trained on. Expected "
                "what CLIP's and SigLIP's do."
            )


def _sides(size: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}
