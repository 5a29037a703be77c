"""Where a model looks for a class: a map over the pixels of an image, by gradients of a layer.

captum computes the gradients and activations. Its dependencies are here anyway, while the package
grad-cam would bring OpenCV and ttach.
"""

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mmtard_bench.errors import InputError

SMALLEST_GRID = 7
"""Rows and columns of the coarsest stage that is used: fewer say little about a place."""


def relevance(
    classifier: nn.Module, visual: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, str]:
    """How much each place of an image speaks for its class, and the layer that says so.

    HiResCAM (Draelos and Carin, 2020, arXiv 2011.08891): activation times gradient, summed over the
    channels of each place. Grad-CAM (Selvaraju et al., 2017, arXiv 1610.02391) averages the
    gradients over all places first, which suits a last layer that is pooled by its mean; CLIP's
    towers pool by attention. Of ResNets the layer is the deepest stage with a grid of at least
    7 x 7; of transformers the input of the last attention, since the output of the last block
    reaches the logits through the class token only.

    Args:
        classifier: Images (N, 3, H, W) in [0, 1] -> logits (N, C).
        visual: The image tower inside it, of open_clip.
        images: (N, 3, H, W) in [0, 1].
        labels: The class of each image, (N,).

    Returns:
        Maps (N, H, W), resized from the layer's grid to the images, negative where a place speaks
        against the class; and the name of the layer.

    Raises:
        InputError: If captum is not installed, or for other towers.
    """
    try:
        from captum.attr import LayerAttribution, LayerGradientXActivation
    except ImportError as error:
        raise InputError(
            "Heat maps need the package captum; pip install 'mmtard-bench[heatmaps]' brings it."
        ) from error
    if isinstance(visual, VisionTransformer):
        name, layer = "input of the last attention", visual.transformer.resblocks[-1].ln_1
    elif isinstance(visual, ModifiedResNet):
        name, layer = _stage(classifier, visual, images[:1])
    else:
        raise InputError(
            f"There are no heat maps for the image tower {type(visual).__name__}; expected a "
            "ResNet or a vision transformer of open_clip, such as RN50 or ViT-B-32."
        )
    # A graph begins at the pixels: the weights may be frozen.
    pixels = images.detach().clone().requires_grad_()
    found = LayerGradientXActivation(classifier, layer).attribute(pixels, target=labels)
    if isinstance(visual, VisionTransformer):  # (N, 1 + P, D), the class token first
        grid = found.sum(2)[:, 1:].unflatten(1, visual.grid_size)[:, None]
    else:
        grid = found.sum(1, keepdim=True)
    rows, columns = grid.shape[2:]
    size = (images.shape[2], images.shape[3])
    maps = LayerAttribution.interpolate(grid, size, interpolate_mode="bilinear")
    return maps[:, 0].detach(), f"{name}, {rows} x {columns}"


def _stage(classifier: nn.Module, visual: ModifiedResNet, image: Tensor) -> tuple[str, nn.Module]:
    """The deepest stage of a residual tower whose grid is large enough, and its name."""
    sizes: dict[str, torch.Size] = {}
    stages: dict[str, nn.Module] = {f"layer{i}": getattr(visual, f"layer{i}") for i in range(1, 5)}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, __: object, output: Tensor) -> None:
            sizes[name] = output.shape[2:]

        return stages[name].register_forward_hook(note)

    hooks = [watch(name) for name in stages]
    try:
        with torch.no_grad():
            classifier(image)
    finally:
        for hook in hooks:
            hook.remove()
    large = [name for name in stages if min(sizes[name]) >= SMALLEST_GRID]
    if not large:
        raise InputError(
            f"No stage of the image tower has a grid of {SMALLEST_GRID} x {SMALLEST_GRID} for "
            f"images of {image.shape[2]} x {image.shape[3]}, so there is no map of places."
        )
    return large[-1], stages[large[-1]]
