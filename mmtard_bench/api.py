"""The functions of the public interface that combine several parts of the package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from mmtard_bench import registry
from mmtard_bench.attacks.base import Classifier, Engine, EngineName, Work
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.checks import require_in_ball
from mmtard_bench.evaluation.device import Resources, find_device, full_float32
from mmtard_bench.evaluation.evaluate import threat_model
from mmtard_bench.evaluation.headway import Progress
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.run import run_model
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model
from mmtard_bench.records.schema import Record
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.tasks.samples import DEFAULT_TEMPLATE
from mmtard_bench.tasks.suites import load_suite, with_overrides
from mmtard_bench.tasks.watched import Watched, WatchedPrompts, require_logits
from mmtard_bench.types import Suite, ThreatModel, ThreatNorm

if TYPE_CHECKING:
    import pandas

Model = str | Path | Clip


def run(
    suite: str | Suite,
    models: Model | Sequence[Model],
    *,
    out: str | Path = "runs",
    n: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    engine: EngineName = "fast",
    black_box: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> list[Record]:
    """Score models on a suite, as ``mmtard-bench run`` does.

    Every record is written below ``out`` as soon as it is finished. A second call with the same
    arguments reads finished records and resumes an unfinished one.

    Args:
        suite: The name of a suite, the path of a .toml file, or a ``Suite``.
        models: A ``Clip``, anything that ``load_model`` takes, or a list of these.
        out: The directory for records.
        n: The number of samples per task; default: the suite's.
        seed: The seed; default: the suite's.
        device: "auto" (a GPU if there is one), or a device of torch.
        batch_size: The most images per pass; default: what fits in memory. It changes no verdict.
        engine: "fast" (our attacks) or "reference" (the reference libraries).
        black_box: As in ``evaluate``.
        progress: Is called with a ``Progress`` several times per second.

    Returns:
        The records, model by model, in the order of the suite. Failed ones have the status "error".

    Raises:
        InputError: For bad input. Records that were finished before stay in ``out``.

    Examples:
        >>> records = mb.run("quick-v1", "tiny-clip", out=folder, n=8)
        >>> [record.threat.attack for record in records]
        ['pgd-20', 'cw-linf-20', 'autoattack-standard']
    """
    chosen = with_overrides(load_suite(suite) if isinstance(suite, str) else suite, n=n, seed=seed)
    resources = Resources(find_device(device), batch_size=batch_size, black_box=black_box)
    several = [models] if isinstance(models, str | Path | Clip) else list(models)
    found: list[Record] = []
    with RunProgress(Console(), quiet=True, also=progress) as quiet:
        for model in several:
            clip = model if isinstance(model, Clip) else load_model(model)
            found += run_model(
                clip, chosen, resources, out=Path(out), progress=quiet, engine=Engine(engine)
            )
    return found


@dataclass(frozen=True)
class Attacked:
    """The result of ``attack`` on N images.

    Attributes:
        adversarial: The adversarial images, (N, 3, H, W) in [0, 1]. Where no attack broke the
            sample, and where the clean image is misclassified, this is the clean image.
        broken: (N,) bool: an attack broke the sample, and a float32 pass confirmed it.
        broken_by: The name of the attack that broke each sample, or None.
        clean_correct: (N,) bool: the model classifies the clean image correctly.
    """

    adversarial: Tensor
    broken: Tensor
    broken_by: list[str | None]
    clean_correct: Tensor

    @property
    def robust(self) -> Tensor:
        """(N,) bool: correctly classified, and no attack broke the sample."""
        return self.clean_correct & ~self.broken

    def __repr__(self) -> str:
        return (
            f"Attacked({len(self.broken)} images, {int(self.clean_correct.sum())} correct, "
            f"{int(self.robust.sum())} robust)"
        )


@full_float32()
def attack(
    model: Model | Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[str] | int,
    threat: str | ThreatModel = "apgd-pair",
    eps: str | None = None,
    norm: ThreatNorm | None = None,
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    seed: int = 0,
    batch_size: int = 64,
    engine: EngineName = "fast",
) -> Attacked:
    """Attack images in memory: tensors in, tensors out.

    Args:
        model: A ``Clip`` or anything that ``load_model`` takes; or, if ``classes`` is a number, a
            classifier: a function of images (N, 3, H, W) in [0, 1] that returns logits (N, C).
        images: (N, 3, H, W), floating point, in [0, 1].
        labels: (N,), integers in [0, C).
        classes: The class names; or the number of classes if ``model`` is a classifier.
        threat: The name of an attack on pixels (``mmtard-bench list threats``), or a
            ``ThreatModel``, which has the next two arguments.
        eps: The radius as an exact fraction; default: "4/255".
        norm: "linf" or "l2"; default: "l2" for "cw-l2", otherwise "linf".
        templates: Prompt templates with {} for the class name.
        seed: The seed of random starts.
        batch_size: The most images per pass.
        engine: "fast" (our attacks) or "reference" (the reference libraries).

    Returns:
        The adversarial images and which samples are broken.

    Raises:
        InputError: For bad input.
        ModelError: If the model returns NaN, or no gradient reaches the pixels.

    Examples:
        >>> images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
        >>> found = mb.attack("tiny-clip", images, labels, classes=["zero", "one", "two", "three"])
        >>> found.adversarial.shape
        torch.Size([4, 3, 32, 32])
    """
    if eps is None and not isinstance(threat, ThreatModel):
        eps = "4/255"
    attacker = threat_model(threat, eps, norm, None)
    _require_pixels(attacker)
    count = classes if isinstance(classes, int) else len(classes)
    _require_batch(images, labels, count)
    algorithm = build_attack(attacker, n_classes=count, engine=Engine(engine))
    images, device = images.detach().float(), images.device
    labels = labels.to(device).long()
    classifier = _classifier(model, classes, tuple(templates), device)
    correct = _correct(classifier, images, labels, count, batch_size)
    rows = correct.nonzero().flatten().tolist()
    adversarial = images.clone()
    broken_by: list[str | None] = [None] * len(images)
    broken = torch.zeros_like(correct)
    if rows:
        work = Work(
            model=classifier,
            images=images[rows],
            labels=labels[rows],
            ids=[str(row) for row in rows],
            seed=seed,
            batch_size=batch_size,
        )
        found = algorithm.whole(work)
        classifier.require_finite()
        points = found.adversarial.detach()
        require_in_ball(points, images[rows], attacker)
        wrong = ~_correct(classifier, points, labels[rows], count, batch_size)
        for place, row in enumerate(rows):
            # A claim counts only where a pass of its own confirms it.
            if wrong[place]:
                broken[row], adversarial[row] = True, points[place]
                broken_by[row] = found.broken_by[place] or attacker.attack
    return Attacked(adversarial, broken, broken_by, correct)


def _require_pixels(threat: ThreatModel) -> None:
    _ = threat.pixel_norm
    if threat.surface != "native":
        raise InputError(
            f"mb.attack attacks the images that it is given, but the threat model {threat.name} "
            "has the surface 'model'; resize the images to the model's input size instead."
        )


def _require_batch(images: Tensor, labels: Tensor, count: int) -> None:
    good = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3
    if not good or not images.is_floating_point() or not len(images):
        given = f"{images.dtype}, {tuple(images.shape)}" if isinstance(images, Tensor) else images
        raise InputError(
            f"images = {given!s:.80}; expected a floating-point tensor (N, 3, H, W) in [0, 1]. "
            "Divide 8-bit images by 255."
        )
    if not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise InputError(
            f"The images have values from {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "expected [0, 1], before normalisation. The model normalises its input itself."
        )
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1]:
        raise InputError(f"labels must be a tensor of {len(images)} integers, one per image.")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= count:
        raise InputError(
            f"labels must be integers from 0 to {count - 1}, since there are {count} classes; "
            f"given: {labels.dtype} from {labels.min().item()} to {labels.max().item()}."
        )


def _classifier(
    model: Model | Classifier,
    classes: Sequence[str] | int,
    templates: tuple[str, ...],
    device: torch.device,
) -> Watched:
    if isinstance(classes, int):
        if isinstance(model, str | Path | Clip) or not callable(model):
            raise InputError(
                "A number of classes goes with a classifier, a function of images that returns "
                "logits; a CLIP model needs the class names: classes=['cat', 'dog']."
            )
        module = model if isinstance(model, torch.nn.Module) else _Function(model)
        return Watched(module, device)
    if isinstance(model, str | Path):
        model = load_model(model)
    if not isinstance(model, Clip):
        raise InputError(
            f"Class names go with a Clip or a model spec, but the model is a "
            f"{type(model).__name__}; for a classifier give the number of classes."
        )
    model.refresh()
    model.to(device)
    return WatchedPrompts(ZeroShotClassifier(model, tuple(classes), templates, device), device)


class _Function(torch.nn.Module):
    def __init__(self, function: Classifier) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _correct(
    model: Watched, images: Tensor, labels: Tensor, classes: int, batch_size: int
) -> Tensor:
    """Which images the model classifies correctly, (N,) bool."""
    found = []
    with torch.no_grad():
        for first in range(0, len(images), batch_size):
            some = images[first : first + batch_size]
            right = labels[first : first + batch_size]
            logits = model(some)
            require_logits(logits, rows=len(some), classes=classes)
            found.append(logits.argmax(1) == right)
    model.require_finite()
    return torch.cat(found)


def list_models() -> list[str]:
    """The names of the registered models. ``load_model`` takes many other specs as well."""
    return list(registry.models)


def list_datasets() -> list[str]:
    """The names of the registered data sets."""
    return list(registry.datasets)


def list_tasks() -> list[str]:
    """The names of the registered tasks."""
    return list(registry.tasks)


def list_attacks() -> list[str]:
    """The names of the registered attacks; {steps} and the like stand for numbers."""
    return registry.attack_names()


def frame(records: Sequence[Record]) -> "pandas.DataFrame":
    """Records as a table of pandas, one row per record.

    Args:
        records: Any records, such as those that ``run`` and ``records`` return.

    Returns:
        A DataFrame with the columns model, suite, task, attack, norm, eps, surface, seed, n,
        clean_accuracy, robust_accuracy, their 95% intervals (clean_low, clean_high, robust_low,
        robust_high), status and identity. Accuracies are shares in [0, 1]; a failed record has NaN.

    Examples:
        >>> table = mb.frame(mb.records(folder))
        >>> sorted(table["attack"])
        ['autoattack-standard', 'cw-linf-20', 'pgd-20']
    """
    import pandas

    return pandas.DataFrame([_row(record) for record in records], columns=list(_COLUMNS))


_COLUMNS = (
    "model",
    "suite",
    "task",
    "attack",
    "norm",
    "eps",
    "surface",
    "seed",
    "n",
    "clean_accuracy",
    "clean_low",
    "clean_high",
    "robust_accuracy",
    "robust_low",
    "robust_high",
    "status",
    "identity",
)


def _row(record: Record) -> dict[str, Any]:
    results = record.results
    row: dict[str, Any] = {
        "model": record.model.name,
        "suite": record.suite.name if record.suite else None,
        "task": record.task.name,
        "attack": record.threat.attack,
        "norm": record.threat.norm,
        "eps": record.threat.eps,
        "surface": record.threat.surface,
        "seed": record.seed,
        "n": results.n if results else 0,
        "status": record.status,
        "identity": record.identity,
    }
    if results is not None:
        row |= {
            "clean_accuracy": results.clean_accuracy,
            "robust_accuracy": results.robust_accuracy,
        }
        row["clean_low"], row["clean_high"] = results.clean_interval
        row["robust_low"], row["robust_high"] = results.robust_interval
    return row
