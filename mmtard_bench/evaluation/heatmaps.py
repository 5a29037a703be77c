"""From which teacher did a student take where to look, and does it keep that under attack?

Figure 3 of MMT-ARD (arXiv 2511.17448) shows heat maps of teachers and students; here they are
compared in figures as well.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from mmtard_bench.attacks.base import Engine, Work
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.checks import require_in_ball
from mmtard_bench.evaluation.device import full_float32
from mmtard_bench.evaluation.relevance import relevance
from mmtard_bench.files import write_atomically
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.scoring import ZeroShotScorer
from mmtard_bench.text import printable
from mmtard_bench.types import ThreatModel

Floats = NDArray[np.float64]
VIEWS = ("clean", "adversarial")
BATCH = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class Looks:
    """Where a model looks for the true class of N images, and what it answers.

    ``maps`` (N, H, W) and ``predicted`` (N,) have an entry for each of ``VIEWS``.
    """

    name: str
    layer: str
    maps: Mapping[str, Floats]
    predicted: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Comparison:
    """A student and its teachers on the same images, (N, 3, H, W), of each of ``VIEWS``.

    ``ink`` (N, H, W) says which pixels are the object; None where the data do not say.
    """

    data: TaskData
    images: Mapping[str, Floats]
    models: tuple[Looks, ...]
    ink: NDArray[np.bool_] | None

    @property
    def student(self) -> Looks:
        """The first model."""
        return self.models[0]


@full_float32()
def compare_looks(
    models: Sequence[Clip],
    data: TaskData,
    threat: ThreatModel,
    *,
    seed: int,
    device: torch.device,
) -> Comparison:
    """The maps of a student and its teachers for the true class, on clean and adversarial images.

    ``models`` are the student and at least one teacher. The adversarial images are those of the
    student: one attack by ``threat``, which leaves unchanged what it does not break.

    Raises:
        InputError: For retrieval, images of several sizes, models of one name, towers without
            maps, or no captum.
    """
    if data.task.metric == "retrieval":
        raise InputError(f"The task '{data.task.name}' is retrieval, which has no true class.")
    names = [clip.name for clip in models]
    if len(set(names)) < len(names):
        raise InputError(f"Name each model once; given were {', '.join(names)}.")
    data.require_images("native")
    rows = range(len(data.labels))
    clean = data.images(rows, surface="native", preprocess=models[0].preprocess).to(device)
    threat.require_reach(*clean.shape[-2:])
    scorers = []
    for clip in models:
        clip.refresh()
        clip.to(device)
        scorers.append(ZeroShotScorer(clip, data, device))
    attack = build_attack(threat, n_classes=len(data.classes), engine=Engine("fast"))
    work = Work(
        model=scorers[0].classifier,
        images=clean,
        labels=scorers[0].labels,
        ids=data.manifest.ids,
        seed=seed,
        batch_size=BATCH,
    )
    moved = attack.whole(work).adversarial
    require_in_ball(moved, clean, threat)
    images = dict(zip(VIEWS, (clean, moved), strict=True))
    return Comparison(
        data,
        {view: points.cpu().numpy().astype(np.float64) for view, points in images.items()},
        tuple(_looks(clip, scorer, images) for clip, scorer in zip(models, scorers, strict=True)),
        _ink(data),
    )


def _looks(clip: Clip, scorer: ZeroShotScorer, images: Mapping[str, torch.Tensor]) -> Looks:
    visual = getattr(clip.module, "visual", None)
    if not isinstance(visual, nn.Module):
        raise InputError(f"The model '{clip.name}' has no image tower 'visual', so no heat maps.")
    maps, predicted, layer = {}, {}, ""
    for view, points in images.items():
        parts, answers = [], []
        batches = zip(torch.split(points, BATCH), torch.split(scorer.labels, BATCH), strict=True)
        for some, labels in batches:
            found, layer = relevance(scorer.classifier, visual, some, labels)
            parts.append(found.cpu())
            with torch.no_grad():
                answers.append(scorer.classifier(some).argmax(1).cpu())
        maps[view] = torch.cat(parts).numpy().astype(np.float64)
        predicted[view] = torch.cat(answers).numpy()
    return Looks(clip.name, layer, maps, predicted)


def _ink(data: TaskData) -> NDArray[np.bool_] | None:
    ink = getattr(data.dataset, "ink", None)
    return None if ink is None else np.stack([ink(index) for index in data.manifest.indices])


def rank_correlations(one: Floats, other: Floats) -> Floats:
    """Spearman's correlation of each pair of maps (N, H, W), (N,); NaN where a map is constant."""
    ranks = [stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (one, other)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    norms = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    with np.errstate(invalid="ignore"):
        return np.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms, np.nan)


def share_on(maps: Floats, ink: NDArray[np.bool_]) -> Floats:
    """The share of the positive relevance that lies on the ink, (N,); NaN without any."""
    positive = np.clip(maps, 0, None)
    total = positive.sum((1, 2))
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (positive * ink).sum((1, 2)) / total, np.nan)


def points_at(maps: Floats, ink: NDArray[np.bool_]) -> Floats:
    """The pointing game (Zhang et al., 2016): 1 where a map's largest value is on the ink, (N,)."""
    flat = maps.reshape(len(maps), -1)
    found: Floats = np.take_along_axis(ink.reshape(len(ink), -1), flat.argmax(1)[:, None], axis=1)[
        :, 0
    ].astype(np.float64)
    return found


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its 95% interval (bootstrap); ``left_out`` samples are NaN."""

    mean: float
    low: float
    high: float
    left_out: int


def mean_of(values: Floats, *, seed: int = 0) -> Mean:
    """The mean of values (N,) with a percentile bootstrap over samples, of 2,000 resamples."""
    there = values[~np.isnan(values)]
    if not len(there):
        return Mean(np.nan, np.nan, np.nan, len(values))
    drawn = np.random.default_rng(seed).integers(len(there), size=(RESAMPLES, len(there)))
    low, high = np.quantile(there[drawn].mean(1), (0.025, 0.975))
    return Mean(float(there.mean()), float(low), float(high), len(values) - len(there))


def figures_of(found: Comparison) -> dict[str, dict[str, Mean]]:
    """Every figure by its name and view: correlations, what is kept, the ink and the pointing."""
    student = found.student
    figures: dict[str, dict[str, Mean]] = {}
    alike = {
        teacher.name: {v: rank_correlations(student.maps[v], teacher.maps[v]) for v in VIEWS}
        for teacher in found.models[1:]
    }
    for teacher in found.models[1:]:
        of_pair, name = alike[teacher.name], f"{student.name} with {teacher.name}"
        figures[name] = {v: mean_of(of_pair[v]) for v in VIEWS}
        # What maps have in common whatever the image: a centre, an edge, a grid.
        others = {v: np.roll(teacher.maps[v], 1, axis=0) for v in VIEWS}
        figures[f"{name} on another image"] = {
            v: mean_of(rank_correlations(student.maps[v], others[v])) for v in VIEWS
        }
    first, *rest = alike
    for name in rest:
        figures[f"{first} minus {name}"] = {
            v: mean_of(alike[first][v] - alike[name][v]) for v in VIEWS
        }
    for looks in found.models:
        kept = rank_correlations(looks.maps["clean"], looks.maps["adversarial"])
        figures[f"{looks.name}, clean with adversarial"] = {"adversarial": mean_of(kept)}
    if found.ink is None:
        return figures
    for looks in found.models:
        for title, figure in (("on the ink", share_on), ("points at the ink", points_at)):
            figures[f"{looks.name}: {title}"] = {
                v: mean_of(figure(looks.maps[v], found.ink)) for v in VIEWS
            }
    area = found.ink.mean((1, 2))
    figures["a uniform map: on the ink"] = {v: mean_of(area) for v in VIEWS}
    return figures


def draw(found: Comparison, path: Path, *, most: int) -> None:
    """Write a picture: two rows for each of the first ``most`` samples, a column for each model."""
    shown = range(min(most, len(found.data.labels)))
    columns = 1 + len(found.models)
    figure = Figure(figsize=(2.1 * columns, 2.3 * 2 * len(shown)), layout="constrained")
    grid = figure.subplots(2 * len(shown), columns, squeeze=False)
    for row in shown:
        true = printable(found.data.classes[found.data.labels[row]])
        for line, view in zip(grid[2 * row : 2 * row + 2], VIEWS, strict=True):
            pixels = found.images[view][row].transpose(1, 2, 0)
            line[0].imshow(pixels)
            line[0].set_title(f"{view}: {true}", fontsize=8, parse_math=False)
            for axes, looks in zip(line[1:], found.models, strict=True):
                axes.imshow(pixels.mean(2), cmap="gray", vmin=0, vmax=1)
                axes.imshow(np.clip(looks.maps[view][row], 0, None), cmap="jet", alpha=0.5)
                said = printable(found.data.classes[looks.predicted[view][row]])
                axes.set_title(
                    f"{printable(looks.name)}\nsays {said}", fontsize=7, parse_math=False
                )
    for axes in grid.flat:
        axes.set_axis_off()

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
