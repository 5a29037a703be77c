"""Models that are in memory: of open_clip, and of ``transformers``."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.models.foreign import last_added, require_end, require_text_counts
from mmtard_bench.models.image_processor import preprocess_of, require_pixels
from mmtard_bench.models.transformers_clip import TransformersClip, TransformersTokenizer, decides

_HALF = "Its weights are in {dtype} and were cast to float32."


def from_open_clip(
    model: nn.Module,
    tokenizer: Callable[[Sequence[str]], Tensor],
    preprocess: Preprocess | Callable[[Any], Tensor],
    *,
    name: str,
) -> Clip:
    """Wrap a model of open_clip. See ``Clip.from_open_clip``."""
    module, notes = _plain(model, name)
    if not isinstance(preprocess, Preprocess):
        preprocess = _preprocess_of(name, preprocess)
    clip = Clip(cast("Any", module), cast("Any", tokenizer), preprocess, name=name, notes=notes)
    _require_size(name, module, preprocess)
    require_text_counts(name, clip.module, clip.tokenizer)
    return clip


def from_transformers(model: Any, processor: Any, *, name: str) -> Clip:
    """Wrap a model of transformers. See ``Clip.from_transformers``."""
    plain, notes = _plain(model, name)
    config: Any = plain.config
    if config.model_type not in ("clip", "siglip"):
        raise InputError(
            f"'{name}' is a model of the kind '{config.model_type}'; expected clip or siglip."
        )
    own = processor.tokenizer
    tokenizer = TransformersTokenizer(own, int(config.text_config.max_position_embeddings))
    if config.model_type == "clip":
        end = config.text_config.eos_token_id
        require_end(name, tokenizer, own, None if end == 2 else end)
    module = TransformersClip(plain).eval()
    preprocess = preprocess_of(name, processor.image_processor)
    require_text_counts(name, module, tokenizer, last_added(own))
    architecture = decides(config)
    return Clip(module, tokenizer, preprocess, name=name, architecture=architecture, notes=notes)


def _plain(model: Any, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The module without the wrappers of compile and of parallel training, in float32."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' is a {type(model).__name__}; expected a torch module.")
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return model, ()
    note = _HALF.format(dtype=" and ".join(sorted(str(k).removeprefix("torch.") for k in kinds)))
    return copy.deepcopy(model).float(), (note,)


def _require_size(name: str, module: nn.Module, preprocess: Preprocess) -> None:
    size = getattr(getattr(module, "visual", None), "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and tuple(sides) != preprocess.size:
        raise InputError(
            f"'{name}': the preprocessing makes images of {preprocess.size}, but the image tower "
            f"takes {tuple(sides)}. Use the transform that was made with the model."
        )


def _preprocess_of(name: str, transform: Any) -> Preprocess:
    """The steps of a transform of torchvision, after its pixels were compared with theirs."""
    steps = list(getattr(transform, "transforms", []))
    kinds = [type(step).__name__ for step in steps]
    resize = next((step for step in steps if type(step).__name__ == "Resize"), None)
    crop = next((step for step in steps if type(step).__name__ == "CenterCrop"), None)
    normalise = next((step for step in steps if type(step).__name__ == "Normalize"), None)
    if resize is None or normalise is None or any(kind.startswith("Random") for kind in kinds):
        raise InputError(
            f"'{name}': the transform has the steps {', '.join(kinds) or 'of no Compose'}; "
            "expected open_clip's transform for evaluation (the last value of "
            "create_model_and_transforms), or a mmtard_bench.Preprocess."
        )
    shortest = isinstance(resize.size, int) or len(resize.size) == 1
    size = crop.size if crop is not None else resize.size
    sides = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
    preprocess = Preprocess(
        size=cast("tuple[int, int]", sides * 2 if len(sides) == 1 else sides),
        mean=cast("Any", tuple(float(v) for v in normalise.mean)),
        std=cast("Any", tuple(float(v) for v in normalise.std)),
        interpolation=cast("Any", str(getattr(resize.interpolation, "value", ""))),
        resize_mode="shortest" if shortest else "squash",
    )

    def pixels(image: Tensor) -> Tensor:
        return cast("Tensor", transform(Image.fromarray(image.permute(1, 2, 0).numpy())))

    require_pixels(name, preprocess, pixels, "the transform")
    return preprocess
