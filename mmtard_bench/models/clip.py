"""A CLIP-like model with its tokenizer, its preprocessing and its digest."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.answers import (
    embeddings_of,
    require_log_scale,
    text_embeddings_of,
    tokens_of,
)
from mmtard_bench.models.digest import checksum, model_digest
from mmtard_bench.records.schema import Name
from mmtard_bench.schema import Strict, Text, checked, explained
from mmtard_bench.types import ClipModel, Tokenizer

Triple = tuple[float, float, float]

LARGEST_SIDE = 4096
"""The largest side of a model's input in pixels; the largest of open_clip is 1,024."""
SMALLEST_DEVIATION = 1e-3
"""The smallest standard deviation: 1/255 maps [0, 1] to 0 .. 255, and less amplifies noise."""

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Mean = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(ge=SMALLEST_DEVIATION, le=1)]


class PreprocessFacts(Strict):
    """What a ``Preprocess`` may hold, in the fields that files state too; see there."""

    size: Any  # narrowed where it is used: files may give one number for both sides
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"


class _AllFacts(PreprocessFacts):
    size: tuple[Side, Side]
    crop: Literal["nearest", "floor"]


@dataclass(frozen=True)
class Preprocess:
    """How pixels in [0, 1] become the image tower's input, in differentiable operations.

    The same rules as open_clip's evaluation transform: resize ("shortest" side to the model's
    size, then cut the centre; or "squash" both sides), then normalise by channel. ``size`` is
    (height, width) in pixels; ``mean`` and ``std`` are those of pixels in [0, 1]. ``crop`` says
    where a centre between two pixels lies: at the "nearest" even offset (torchvision, so
    open_clip) or at the lower one, "floor" (transformers). Lists become tuples. Raises InputError
    for anything else.
    """

    size: tuple[int, int]
    mean: Triple
    std: Triple
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    crop: Literal["nearest", "floor"] = "nearest"

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            if isinstance(getattr(self, name), list):  # as files of JSON have them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        with explained(
            "This preprocessing cannot be right",
            "Expected size (height, width), and three means and three deviations of pixels in "
            "[0, 1] as tuples: divide those of pixels in 0 .. 255 by 255.",
        ):
            _AllFacts(**{each.name: getattr(self, each.name) for each in fields(self)})

    def resize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, *size) in [0, 1]. The identity at the right size."""
        height, width = images.shape[-2:]
        if (height, width) == self.size:
            return images
        target = self.size if self.resize_mode == "squash" else self._covering(height, width)
        if (height, width) != target:
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True)
        half = round if self.crop == "nearest" else int
        top, left = (half((t - s) / 2) for t, s in zip(target, self.size, strict=True))
        images = images[..., top : top + self.size[0], left : left + self.size[1]]
        # Bicubic kernels overshoot; 8-bit image libraries saturate there, and so does this. The
        # gradient passes as if it did not: clamp's is zero at black and white, which would mask.
        return images + (images.clamp(0, 1) - images).detach()

    def _covering(self, height: int, width: int) -> tuple[int, int]:
        """The size before the centre crop: the smallest of this shape that covers ``size``."""
        rows, columns = self.size
        if rows == columns:  # the long side cut off, not rounded, as in torchvision
            short = min(height, width)
            return rows * height // short, rows * width // short
        ratio = min(height / rows, width / columns)
        return round(height / ratio), round(width / ratio)

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of each channel."""
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        return (images - mean) / images.new_tensor(self.std).view(1, 3, 1, 1)


@dataclass
class Cache:
    """Values computed from the weights of a model. A copy of the model starts with an empty cache.

    ``prompts``: tokens. ``heads``: class embeddings. ``towers``: folded image towers for attacks,
    by device. ``batch_sizes``: the sizes that fit in memory. ``state``: the checksum of the module.
    """

    state: int | None = None
    digest: str | None = None
    prompts: dict[tuple[object, ...], Any] = field(default_factory=dict)
    heads: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    batch_sizes: dict[tuple[object, ...], int] = field(default_factory=dict)
    towers: dict[torch.device, nn.Module | None] = field(default_factory=dict)


@checked
@dataclass(frozen=True, repr=False)
class Clip:
    """A model to score: ``module`` meets ``ClipModel``; ``source`` says where it was loaded from.

    The module is put in evaluation mode and its parameters are frozen. It may change between two
    evaluations, as in a training loop that scores each epoch: every evaluation checks for a change.
    ``given_digest``: a string that changes whenever the model does; required for a module without a
    ``state_dict``. ``architecture``: whatever decides the answers and is visible neither in the
    weights nor in the layer classes. Both are part of the digest. ``config``: the content of an
    ``open_clip_config.json``, if the model has one; the trainer needs it to save the model.
    ``notes``: assumptions made at loading (an activation, a preprocessing), one sentence each;
    every record of the model repeats them.
    """

    module: ClipModel
    tokenizer: Tokenizer
    preprocess: Preprocess
    name: Text
    source: str = "python object"
    given_digest: Name | None = None
    architecture: str | None = None
    config: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()
    cache: Cache = field(default_factory=Cache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for attribute in ("encode_image", "encode_text", "logit_scale"):
            if not hasattr(self.module, attribute):
                raise InputError(
                    f"The model '{self.name}' has no '{attribute}'; a CLIP-like model needs "
                    "encode_image, encode_text and logit_scale."
                )
        if not callable(self.tokenizer):
            raise InputError(
                f"The tokenizer of the model '{self.name}' is a {type(self.tokenizer).__name__}, "
                "which cannot be called; expected a function from a list of texts to a tensor."
            )
        if not isinstance(self.preprocess, Preprocess):
            raise InputError(
                f"The preprocess of the model '{self.name}' is a {type(self.preprocess).__name__}; "
                "expected mmtard_bench.Preprocess(size=(H, W), mean=(R, G, B), std=(R, G, B)), "
                "which gradients pass through. A Compose has these figures in its Resize and "
                "Normalize."
            )
        require_log_scale(self.module.logit_scale, self.name)
        if isinstance(self.module, nn.Module):
            self.module.eval().requires_grad_(False)

    @classmethod
    def from_open_clip(
        cls, model: nn.Module, tokenizer: Any, preprocess: Any, *, name: str
    ) -> "Clip":
        """Wrap a model of open_clip that is in memory.

        A wrapper of ``torch.compile`` or of parallel training is removed. A model in half precision
        is copied and cast to float32, and a note of every record says so.

        Args:
            model: The model, such as the first value of ``open_clip.create_model_and_transforms``.
            tokenizer: A function of a list of texts that returns tokens (N, L).
            preprocess: The transform for evaluation (the last value of that function), or a
                ``Preprocess``. The transform for training is refused.
            name: The model's name in records.

        Raises:
            InputError: If the transform does anything that a ``Preprocess`` cannot do, if its size
                is not the model's, or if tokenizer and text tower do not belong together.

        Examples:
            >>> model, _, transform = open_clip.create_model_and_transforms("RN50-quickgelu")
            >>> tokenizer = open_clip.get_tokenizer("RN50-quickgelu")
            >>> mb.Clip.from_open_clip(model, tokenizer, transform, name="mine").preprocess.size
            (224, 224)
        """
        from mmtard_bench.models.memory import from_open_clip

        return from_open_clip(model, tokenizer, preprocess, name=name)

    @classmethod
    def from_transformers(cls, model: Any, processor: Any, *, name: str) -> "Clip":
        """Wrap a ``CLIPModel`` or ``SiglipModel`` of transformers that is in memory.

        Wrappers and half precision are treated as in ``from_open_clip``.

        Args:
            model: The model, with both towers.
            processor: Its ``CLIPProcessor`` or ``SiglipProcessor``: tokenizer and image processor.
            name: The model's name in records.

        Raises:
            InputError: If the model is of another kind, if the image processor does anything that
                a ``Preprocess`` cannot do, or if the tokenizer does not belong to the text tower.
        """
        from mmtard_bench.models.memory import from_transformers

        return from_transformers(model, processor, name=name)

    def __repr__(self) -> str:
        return f"Clip({self.name!r}, {self.parameters or 0:,} parameters, {self.source})"

    def refresh(self) -> Cache:
        """The cache, emptied if the module changed since it was filled.

        The module is put in evaluation mode again, because a training loop may have changed it.
        """
        if isinstance(self.module, nn.Module):
            self.module.eval()
        state = checksum(self.module, self.tokenizer)
        if state != self.cache.state:
            object.__setattr__(self, "cache", Cache(state))
        return self.cache

    @property
    def digest(self) -> str:
        """SHA-256 of the model's weights, configuration and answers; see ``model_digest``."""
        if self.given_digest is None and not isinstance(self.module, nn.Module):
            raise InputError(
                f"The model '{self.name}' is no torch module, so its weights cannot be hashed; "
                "pass given_digest= with a string that changes whenever the model does."
            )
        cache = self.refresh()
        if cache.digest is None:
            cache.digest = model_digest(self)
        return cache.digest

    @property
    def parameters(self) -> int | None:
        """The number of parameters, or None if the module is no torch module."""
        if not isinstance(self.module, nn.Module):
            return None
        return sum(p.numel() for p in self.module.parameters())

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing as plain values, for the record."""
        values = asdict(self.preprocess)
        if values["crop"] == "nearest":  # as before there was a choice: records stay comparable
            del values["crop"]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def to(self, device: torch.device) -> None:
        """Move the module, where it is a torch module, with its convolutions in channels-last.

        That layout made attacks on small convolutional towers a third faster on a CPU.
        """
        if isinstance(self.module, nn.Module):
            self.module.to(device)
            self.module.to(memory_format=torch.channels_last)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The tokens of texts, one row each, on the CPU. Raises InputError for anything else."""
        return tokens_of(self.tokenizer, texts, self.name)

    def text_features(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Unit text embeddings, (len(texts), D), float32."""
        return self.token_features(self.tokens(texts), device)

    def token_features(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Unit text embeddings of rows of tokens, (len(tokens), D), float32."""
        with torch.no_grad():
            batches = [
                text_embeddings_of(self.module.encode_text, part.to(device), self.name)
                for part in torch.split(tokens, 256)
            ]
        return torch.cat(batches)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image embeddings (N, D) of images (N, 3, H, W) in [0, 1], differentiable."""
        inputs = self.preprocess.normalise(self.preprocess.resize(images))
        return embeddings_of(self.module.encode_image, inputs, self.name)

    def scale(self) -> Tensor:
        """The factor of the cosines: exp(logit_scale), 100 for OpenAI's models."""
        return torch.as_tensor(self.module.logit_scale).detach().float().exp()
