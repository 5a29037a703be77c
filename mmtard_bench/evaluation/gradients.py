"""Can the gradients and the numbers of a model be believed? Checks against gradient masking.

An attack by gradients is only as good as the gradient (Athalye et al., 2018; Carlini et al., 2019,
section 5). The weights of an ordinary network can make gradients that do not predict its answers:
a channel that float32 rounding removes from the output still adds its derivative to the gradient.
Each check returns a flag with its figures, or None. docs/explanation/cheating.md gives the figures
of honest models, from which the thresholds follow.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtard_bench.attacks.base import Classifier, margin
from mmtard_bench.attacks.pgd import pgd, step_size_of
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.schema import Flag

POINTS = 8
"""How many images the checks use that need many passes."""
STEPS = (1 / 4, 1.0, 4.0)
"""Step sizes of the central differences, in 1/255 per pixel."""
RANDOM = 2
"""How many random directions are compared with the gradient at each step size."""
NUDGE = 1e-4
"""How far pixels move off the 8-bit grid."""
LARGE, LARGE_STEPS = 0.5, 10
"""The L-inf radius at which no classifier is robust, and the steps of PGD there."""

_FEW_ZERO = 0.05  # share of images without a gradient that an honest model may have
_PREDICTED = 0.2  # least median of actual over predicted rise; honest: 0.92 or more
_BETTER = 0.5  # least share of images whose gradient beats random directions; honest: 1.0
_NEAR, _HALF = 1e-2, 5e-2  # of the range of the logits; honest: 5e-4 and 6e-3 or less
_PRECISION = 1e-2  # of the spread of the embeddings between images; honest: 4e-7 or less
_TURNED = 0.9  # least median cosine of float32 and float64 gradients; honest: 0.9999 or more
_LEVELS = 2**14  # least range of an image's logits, in units of float32 rounding; honest: 5e6
_DISTINCT = 0.5  # least share of distinct logits
_DOMINANT = 0.99  # most of an embedding's squared norm that one dimension may have


def check_zero(model: Classifier, images: Tensor, labels: Tensor) -> Flag | None:
    """Whether gradients of the losses reach the pixels: images (N, 3, H, W), labels (N,)."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "cross-entropy": lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
        "margin": lambda logits: margin(logits, labels).sum(),
    }
    points = images.clone().requires_grad_()
    for name, loss in losses.items():
        logits = model(points)
        gradient = _gradient(loss(logits), points) if logits.requires_grad else None
        missing = (
            torch.ones(len(points), dtype=torch.bool)
            if gradient is None
            else ~(gradient.flatten(1).abs().amax(1) > 0)
        )
        zero, share = int(missing.sum()), float(missing.float().mean())
        if share > _FEW_ZERO:
            return Flag(
                code="zero-gradients",
                detail=f"the gradient of the {name} is zero or NaN for {zero} of {len(points)} "
                "correctly classified images; gradient-based attacks cannot see past that",
            )
    return None


def check_prediction(model: Classifier, images: Tensor) -> Flag | None:
    """Compare what the gradient predicts with what the model does: images (N, 3, H, W).

    The loss of an image is the logit of its runner-up minus that of its predicted class. A step of
    size h along the sign of the gradient g should raise the loss by h * ||g||_1, and by more than a
    step of the same size along random signs. Central differences measure both, at three step sizes,
    of which the best counts for each image.
    """
    images = images[:POINTS]
    with torch.no_grad():
        logits = model(images)
    if logits.shape[1] < 2:
        return None
    pair = logits.topk(2).indices

    def loss(points: Tensor) -> Tensor:
        first, second = model(points).gather(1, pair).unbind(1)
        return second - first

    points = images.clone().requires_grad_()
    gradient = _gradient(loss(points).sum(), points)
    if gradient is None or not bool(gradient.any()):
        return None  # check_zero says so
    generator = torch.Generator().manual_seed(0)
    slope = gradient.flatten(1).abs().sum(1)
    ratios, better = [], []
    for step in STEPS:
        size = step / 255
        rise = _rise(loss, images, gradient.sign() * size)
        random = [
            _rise(loss, images, size * _signs(images, generator)).abs() for _ in range(RANDOM)
        ]
        ratios.append(torch.nan_to_num(rise / (size * slope), 0.0, 0.0, 0.0))
        better.append(rise > torch.stack(random).amax(0))
    ratio = float(torch.stack(ratios).amax(0).median())
    share = float(torch.stack(better).any(0).float().mean())
    if ratio >= _PREDICTED and share >= _BETTER:
        return None
    return Flag(
        code="gradient-does-not-predict",
        detail=f"a step along the gradient raises the loss by {ratio:.1e} of what the gradient "
        f"predicts (median of {len(images)} images), and by more than a random step for "
        f"{share:.0%} of them; attacks by gradients are too weak",
    )


def check_grid(model: Classifier, images: Tensor, logits: Tensor, spread: float) -> Flag | None:
    """Whether logits jump off the grid of 8-bit pixels: images (N, 3, H, W) on it.

    ``logits`` (N, C) are those of the images, and ``spread`` is their range. Adversarial images are
    off the grid. A model that notices can answer them by other means. Pixels move by 1e-4 in random
    directions, and all by half a grey level up, then down.
    """
    generator = torch.Generator().manual_seed(0)
    half = torch.full_like(images, 0.5 / 255)
    with torch.no_grad():
        near, up, down = (
            float((model((images + step).clamp(0, 1)) - logits).abs().max()) / spread
            for step in (NUDGE * _signs(images, generator), half, -half)
        )
    if near <= _NEAR and max(up, down) <= _HALF:
        return None
    return Flag(
        code="grid-dependent-output",
        detail=f"logits change by {near:.1e} of their range when pixels move by {NUDGE:g}, and by "
        f"{max(up, down):.1e} when they move by half a grey level: off the 8-bit grid, where "
        "adversarial images are, the model is another",
    )


def check_large_radius(model: Classifier, images: Tensor) -> Flag | None:
    """Whether PGD changes the predictions of images (N, 3, H, W) at an L-inf radius of 0.5.

    There every image can become the same grey, so that no classifier is robust; an attack that
    finds nothing is misled (Carlini et al., 2019, section 5.1).
    """
    images = images[:POINTS]
    logits, gradient = answers_and_gradients(model, images)
    if logits.shape[1] < 2 or not bool(gradient.any()):
        return None  # check_zero says so
    labels = logits.argmax(1)
    _, broken = pgd(
        model,
        images,
        loss=lambda logits: -margin(logits, labels),
        norm="linf",
        eps=LARGE,
        steps=LARGE_STEPS,
        step_size=step_size_of(LARGE, LARGE_STEPS),
        start=torch.zeros_like(images),
        done=lambda logits: margin(logits, labels) < 0,
    )
    robust = int((~broken).sum())
    if not robust:
        return None
    return Flag(
        code="robust-at-any-radius",
        detail=f"PGD with {LARGE_STEPS} steps at L-inf {LARGE} leaves {robust} of {len(images)} "
        "images robust, although every image can become the same grey there; attacks by gradients "
        "are too weak",
    )


def check_precision(clip: Clip, images: Tensor) -> Flag | None:
    """Compare the image tower in float32 with a copy in float64: images (N, 3, H, W).

    Returns None for a module that cannot be cast, or that is no torch module.
    """
    images = images[:POINTS]
    if not isinstance(clip.module, nn.Module) or len(images) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    single, direction, by_single = _embedded(clip, clip.module, images, generator)
    try:
        twin = deepcopy(clip.module).double()
        double, _, by_double = _embedded(clip, twin, images.double(), direction)
    except Exception:  # a user's module may refuse the cast in any way
        return None
    spread = float((double.amax(0) - double.amin(0)).max())
    difference = float((single - double).abs().max()) / spread if spread else 0.0
    some = by_single.any(1)  # check_zero speaks of the others
    cosine = float(F.cosine_similarity(by_single, by_double)[some].median()) if some.any() else 1.0
    if difference <= _PRECISION and cosine >= _TURNED:
        return None
    return Flag(
        code="precision-dependent",
        detail=f"in float64 image embeddings differ by {difference:.1e} of their spread, and "
        f"gradients have a cosine of {cosine:.2f} with those in float32 (median of {len(images)} "
        "images): rounding decides the answers or the gradients",
    )


def check_levels(logits: Tensor, embeddings: Tensor) -> list[Flag]:
    """Whether float32 resolves the logits (N, C), and one dimension rules the embeddings (N, D)."""
    found = []
    ranges = logits.amax(1) - logits.amin(1)
    unit = torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    levels = float((ranges / unit).median())
    distinct = sum(len(row.unique()) for row in logits) / logits.numel()
    if levels < _LEVELS or distinct < _DISTINCT:
        detail = (
            f"the logits of an image span {levels:.0f} units of float32 rounding (median), and "
            f"{distinct:.0%} of them are distinct; attacks cannot see small changes"
        )
        found.append(Flag(code="coarse-logits", detail=detail))
    share = float((embeddings.double() ** 2).amax(1).median())
    if share > _DOMINANT:
        detail = (
            f"one dimension has {share:.2%} of the squared norm of the image embeddings (median), "
            "which hides changes of the others"
        )
        found.append(Flag(code="dominant-dimension", detail=detail))
    return found


def answers_and_gradients(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, C), and gradients (N, P) of the sum of each image's logits in a fixed direction.

    Gradients are zeros where none reaches the pixels.
    """
    points = images.clone().requires_grad_()
    logits = model(points)
    along = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0))
    gradient = _gradient((logits @ along.to(logits)).sum(), points)
    flat = torch.zeros_like(points) if gradient is None else gradient
    return logits.detach(), flat.flatten(1)


def _embedded(
    clip: Clip, module: nn.Module, images: Tensor, along: Tensor | torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings (N, D), a direction (D,), and gradients (N, P) of the embeddings along it."""
    points = images.clone().requires_grad_()
    embeddings = embeddings_by(clip, module, points)
    if isinstance(along, torch.Generator):
        along = torch.randn(embeddings.shape[1], generator=along).to(embeddings)
    gradient = _gradient((embeddings @ along.to(embeddings)).sum(), points)
    flat = torch.zeros_like(points) if gradient is None else gradient
    return embeddings.detach().double(), along, flat.flatten(1).double()


def embeddings_by(clip: Clip, module: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings (N, D) of images (N, 3, H, W) by a copy of the model in their precision."""
    inputs = clip.preprocess.normalise(clip.preprocess.resize(images))
    return F.normalize(module.encode_image(inputs), dim=-1)  # type: ignore[operator]


def _gradient(loss: Tensor, points: Tensor) -> Tensor | None:
    if not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, points, allow_unused=True)
    return gradient


@torch.no_grad()
def _rise(loss: Callable[[Tensor], Tensor], images: Tensor, step: Tensor) -> Tensor:
    """The central difference of the loss along a step, (N,)."""
    return (loss(images + step) - loss(images - step)) / 2


def _signs(images: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(2, images.shape, generator=generator) * 2 - 1).to(images)
