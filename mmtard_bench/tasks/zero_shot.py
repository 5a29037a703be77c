"""The zero-shot classifier: class names and prompt templates become the rows of a linear head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip


class ZeroShotClassifier(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> logits (N, C) = exp(logit_scale) * cosine.

    The head's row of a class is the normalised mean of the unit text embeddings of its prompts,
    one a template (Radford et al., 2021, section 3.1.4).
    """

    def __init__(
        self, clip: Clip, classes: tuple[str, ...], templates: tuple[str, ...], device: torch.device
    ) -> None:
        super().__init__()
        self.clip = clip
        self.head: Tensor
        self.scale: Tensor
        self.register_buffer("head", class_embeddings(clip, classes, templates, device))
        self.register_buffer("scale", clip.scale().to(device))

    def forward(self, images: Tensor) -> Tensor:
        features = self.clip.image_features(images)
        if features.shape[-1] != self.head.shape[-1]:
            raise InputError(
                f"The model '{self.clip.name}' gives image embeddings of width "
                f"{features.shape[-1]} but text embeddings of width {self.head.shape[-1]}; "
                "both towers must share one width."
            )
        return self.scale * features @ self.head.T


def class_embeddings(
    clip: Clip, classes: tuple[str, ...], templates: tuple[str, ...], device: torch.device
) -> Tensor:
    """Unit class embeddings (C, D) from one prompt a template and class, computed once a model."""
    key = (classes, templates, device)
    if key not in clip.heads:
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        features = clip.text_features(prompts, device).view(len(classes), len(templates), -1)
        clip.heads[key] = F.normalize(features.mean(1), dim=-1)
    return clip.heads[key]
