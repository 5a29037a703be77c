"""A faster image tower for attacks: frozen batch normalisation folded into the convolutions."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from mmtard_bench.models.clip import Clip

CLOSE = 1e-4
"""Logits may differ by so much of their range, which is rounding; more means another function."""

_LOG = logging.getLogger(__name__)


def folded(clip: Clip, probe: Tensor) -> nn.Module | None:
    """``fold``, once a model and device: a suite has many records."""
    if probe.device not in clip.cache.towers:
        clip.cache.towers[probe.device] = fold(clip, probe)
    return clip.cache.towers[probe.device]


def fold(clip: Clip, probe: Tensor) -> nn.Module | None:
    """The image tower with every batch normalisation that follows a convolution folded into it.

    ``probe`` are images (N, 3, H, W) on which both towers must agree. Returns None where there is
    nothing to fold, where the tower cannot be traced, or where they do not agree.
    """
    tower = getattr(clip.module, "visual", None)
    if not isinstance(tower, nn.Module):
        return None
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in tower.modules()):
        return None
    try:
        fused = fuse(tower)
    except Exception as error:  # tracing runs the model's own code, which may do anything
        _LOG.info("not folded: %s", error)
        return None
    fused.requires_grad_(False).to(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = clip.image_features(probe)
        with using(clip, fused):
            difference = (clip.image_features(probe) - plain).abs().max()
    return fused if difference <= CLOSE * plain.abs().max() else None


@contextmanager
def using(clip: Clip, tower: nn.Module | None) -> Iterator[None]:
    """Let a CLIP encode images with another tower for a while; with its own for None."""
    if tower is None:
        yield
        return
    module: nn.Module = clip.module  # type: ignore[assignment]
    own = module.visual
    module.visual = tower
    try:
        yield
    finally:
        module.visual = own
