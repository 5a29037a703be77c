"""Adversarial images by other gradients than the model's own.

Images that break one model often break another (Papernot et al., 2017), so a model whose gradients
mislead falls to those of a surrogate. Two surrogates come from the model itself: its logits
averaged over small noise, which smooths shattered gradients (Athalye et al., 2018), and a copy in
float64.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import Classifier, margin, random_start
from mmtard_bench.attacks.pgd import pgd, step_size_of
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import inside
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.evaluation.gradients import embeddings_by
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.tasks.prompts import understood
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.types import ThreatModel

STEPS = 20
NOISY = 4
"""How many noisy copies of an image the smoothed logits average."""


def broken_by_others(
    clip: Clip,
    data: TaskData,
    threat: ThreatModel,
    resources: Resources,
    *,
    surrogate: Clip | None,
    seed: int,
) -> dict[str, str]:
    """Attack the samples of ``data`` by PGD on the margin of each surrogate.

    Returns:
        The name of the surrogate whose image broke a sample, by the sample's id. Samples that no
        surrogate broke are missing.
    """
    found: dict[str, str] = {}
    with full_float32():
        bench = Bench(clip, understood(clip, data), threat.surface, resources)
        for name, model in _surrogates(bench, threat, surrogate, seed):
            for chunk in bench.chunks():
                rows = [row for row in chunk if data.manifest.ids[row] not in found]
                if rows:
                    broken = _transferred(bench, model, rows, threat, (seed, name))
                    found |= {data.manifest.ids[row]: name for row in broken}
    return found


def _transferred(
    bench: Bench, model: Classifier, rows: list[int], threat: ThreatModel, key: tuple[object, ...]
) -> list[int]:
    images, labels = bench.images(rows), bench.scorer.labels[rows]
    norm, eps = threat.pixel_norm, float(threat.eps)
    keys = [(*key, bench.data.manifest.ids[row]) for row in rows]
    points, _ = pgd(
        model,
        images,
        loss=lambda logits: -margin(logits, labels),
        norm=norm,
        eps=eps,
        steps=STEPS,
        step_size=step_size_of(eps, STEPS),
        start=random_start(images, norm=norm, eps=eps, keys=keys),
    )
    kept = inside(points, images, norm=norm, eps=eps)
    verdicts = bench.judge(torch.where(kept[:, None, None, None], points, images), rows)
    return [row for row, verdict in zip(rows, verdicts, strict=True) if not verdict.right]


def _surrogates(
    bench: Bench, threat: ThreatModel, surrogate: Clip | None, seed: int
) -> Iterator[tuple[str, Classifier]]:
    classifier = bench.scorer.classifier
    assert isinstance(classifier, ZeroShotClassifier)  # of classification alone
    yield "smoothed gradients", _smoothed(classifier, threat, seed)
    twin = _in_float64(bench.clip, classifier)
    if twin is not None:
        yield "gradients in float64", twin
    if surrogate is not None:
        surrogate.to(bench.device)
        names, templates = classifier.names, classifier.templates
        own = ZeroShotClassifier(surrogate, names, templates, bench.device)
        yield f"images of {surrogate.name}", own


def _smoothed(model: Classifier, threat: ThreatModel, seed: int) -> Classifier:
    """Logits averaged over Gaussian noise of half the radius (a quarter of it for linf)."""
    generator = torch.Generator().manual_seed(seed)

    def smoothed(images: Tensor) -> Tensor:
        eps = float(threat.eps)
        size = eps / 2 / images[0].numel() ** 0.5 if threat.pixel_norm == "l2" else eps / 4
        noise = (
            torch.randn(images.shape, generator=generator).to(images) * size for _ in range(NOISY)
        )
        return torch.stack([model(images + some) for some in noise]).mean(0)

    return smoothed


def _in_float64(clip: Clip, classifier: ZeroShotClassifier) -> Callable[[Tensor], Tensor] | None:
    """The classifier with an image tower in float64; None for a module that cannot be cast."""
    if not isinstance(clip.module, nn.Module):
        return None
    try:
        twin = deepcopy(clip.module).double()
        head = classifier.head.double() * float(classifier.scale)
        twin.encode_image(torch.zeros(1, 3, *clip.preprocess.size).to(head))
    except Exception:  # a module may refuse the cast in any way
        return None

    def doubled(images: Tensor) -> Tensor:
        return embeddings_by(clip, twin, images.double()) @ head.T

    return doubled
