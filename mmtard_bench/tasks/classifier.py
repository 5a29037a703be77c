"""The zero-shot classifier: class names and prompt templates become the rows of a linear head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.prompts import prompts_of

_KNOWN = 2048
"""How many lists of names are cached with their embeddings; an attack's lists have at most 100."""

KEPT = 2**30
"""The most bytes of embeddings to ``keep``. 1,000 classes and ViT-L would need 7 times as much."""


class ZeroShotClassifier(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> logits (N, C) = exp(logit_scale) * cosine.

    Each row of the head is the normalised mean of the unit text embeddings of a class's prompts,
    one prompt per template (Radford et al., 2021, section 3.1.4).
    """

    def __init__(
        self, clip: Clip, classes: tuple[str, ...], templates: tuple[str, ...], device: torch.device
    ) -> None:
        super().__init__()
        self.clip = clip
        self.names = classes
        self.templates = templates
        self.prompts_a_name = len(templates)
        self.head: Tensor
        self.scale: Tensor
        self.register_buffer("head", class_embeddings(clip, classes, templates, device))
        self.register_buffer("scale", clip.scale().to(device))
        self._known: dict[tuple[str, ...], Tensor] = {}
        self._kept: dict[tuple[str, ...], Tensor] = {}
        self._kept_bytes = 0

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images) @ self.head.T

    def features(self, images: Tensor) -> Tensor:
        """Scaled image embeddings (N, D); their products with the head are the logits."""
        features = self.clip.image_features(images)
        if features.shape[-1] != self.head.shape[-1]:
            raise InputError(
                f"The model '{self.clip.name}' gives image embeddings of width "
                f"{features.shape[-1]} but text embeddings of width {self.head.shape[-1]}; "
                "both towers must share one width."
            )
        return self.scale * features

    def embed_names(self, names: Sequence[str], *, keep: bool = False) -> Tensor:
        """The rows (M, D) that other class names would have in the head. They are cached.

        With ``keep``, the cache never drops them for others, unless they do not fit.
        """
        key = tuple(names)
        rows = self._kept.get(key, self._known.get(key))
        if rows is None:
            rows = embed_names(self.clip, key, self.templates, self.head.device)
            if keep and self._kept_bytes + rows.nbytes <= KEPT:
                self._kept[key] = rows
                self._kept_bytes += rows.nbytes
            else:
                if len(self._known) >= _KNOWN:
                    self._known.clear()
                self._known[key] = rows
        return rows


def class_embeddings(
    clip: Clip, classes: tuple[str, ...], templates: tuple[str, ...], device: torch.device
) -> Tensor:
    """Unit class embeddings (C, D), one prompt per template and class, computed once per model."""
    key = (classes, templates, device)
    if key not in clip.cache.heads:
        tokens = prompts_of(clip, classes, templates).tokens
        clip.cache.heads[key] = _pooled(clip.token_features(tokens, device), len(templates))
    return clip.cache.heads[key]


def embed_names(
    clip: Clip, names: Sequence[str], templates: Sequence[str], device: torch.device
) -> Tensor:
    """Unit embeddings (M, D) of names: the normalised mean over one prompt per template."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return _pooled(clip.text_features(prompts, device), len(templates))


def _pooled(features: Tensor, templates: int) -> Tensor:
    return F.normalize(features.view(-1, templates, features.shape[-1]).mean(1), dim=-1)
