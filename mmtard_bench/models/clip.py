"""A CLIP-like model with what it takes to score it: tokenizer, preprocessing, weights digest."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.answers import (
    embeddings_of,
    require_log_scale,
    text_embeddings_of,
    tokens_of,
)
from mmtard_bench.records import Name
from mmtard_bench.strict import Text, checked
from mmtard_bench.types import ClipModel, Tokenizer

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """How pixels in [0, 1] become the image tower's input, in differentiable operations.

    The same rules as open_clip's evaluation transform: resize ("shortest" side to the model's
    size, then cut the centre; or "squash" both sides), then normalise by channel.
    """

    size: tuple[int, int]
    mean: Triple
    std: Triple
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    def resize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, *size) in [0, 1]. The identity at the right size."""
        height, width = images.shape[-2:]
        if (height, width) == self.size:
            return images
        target = self.size
        if self.resize_mode == "shortest":
            scale = max(self.size[0] / height, self.size[1] / width)
            # Cut off, not rounded, as in torchvision; exact products may fall just short.
            target = (int(height * scale + 1e-6), int(width * scale + 1e-6))
        if (height, width) != target:
            images = F.interpolate(images, target, mode=self.interpolation, antialias=True)
        top, left = (round((t - s) / 2) for t, s in zip(target, self.size, strict=True))
        images = images[..., top : top + self.size[0], left : left + self.size[1]]
        # Bicubic kernels overshoot; 8-bit image libraries saturate there, and so does this. The
        # gradient passes as if it did not: clamp's is zero at black and white, which would mask.
        return images + (images.clamp(0, 1) - images).detach()

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation of each channel."""
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        return (images - mean) / images.new_tensor(self.std).view(1, 3, 1, 1)


@checked
@dataclass(frozen=True)
class Clip:
    """A model to score: ``module`` meets ``ClipModel``; ``source`` says where it was loaded from.

    The module is put in evaluation mode and its parameters are frozen. Its weights must not change
    afterwards: what is computed from them (the digest, the class embeddings in ``heads``) is kept,
    as are the ``batch_sizes`` that suit it and the ``towers`` that attacks look at.
    For a module without a ``state_dict``, ``given_digest`` stands in for the hash of its weights;
    it must change when the model's answers do, since it decides which records are reused.
    ``architecture`` is hashed too: whatever decides answers and shows neither in weights nor in
    kinds of layers, such as the number of heads. ``config`` is the content of an
    ``open_clip_config.json``, where the model has one: what a trainer needs to save it again.
    ``notes`` state what was assumed when the model was loaded (an activation, a preprocessing),
    one sentence each; every record of the model repeats them.
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
    heads: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    prompts: dict[tuple[object, ...], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    batch_sizes: dict[tuple[object, ...], int] = field(
        default_factory=dict, repr=False, compare=False
    )
    towers: dict[torch.device, nn.Module | None] = field(
        default_factory=dict, repr=False, compare=False
    )

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

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the logit scale, the kinds of layers, and the weights as float32.

        Which file held the weights, and in which precision, does not matter.
        """
        if self.given_digest is not None:
            return self.given_digest
        if not isinstance(self.module, nn.Module):
            raise InputError(
                f"The model '{self.name}' is no torch module, so its weights cannot be hashed; "
                "pass given_digest= with a string that changes whenever the model does."
            )
        sha = hashlib.sha256(f"scale {float(self.scale()):.6g}".encode())
        if self.architecture is not None:
            sha.update(f"architecture {self.architecture}".encode())
        for key, layer in self.module.named_modules():
            sha.update(f"{key} {type(layer).__qualname__}".encode())
        for key, value in sorted(self.module.state_dict().items()):
            sha.update(f"{key} {tuple(value.shape)}".encode())
            values = value.detach().float().cpu().contiguous()
            sha.update(values.numpy().tobytes())
        return sha.hexdigest()

    @property
    def parameters(self) -> int | None:
        """The number of parameters, or None if the module is no torch module."""
        if not isinstance(self.module, nn.Module):
            return None
        return sum(p.numel() for p in self.module.parameters())

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing as plain values, for the record."""
        values = asdict(self.preprocess)
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
