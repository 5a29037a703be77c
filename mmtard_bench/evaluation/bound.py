"""Bound a student's robust accuracy by its teachers': docs/explanation/transfer-bound.md.

Every certificate is attacked, and so are the student and its teachers. All of them are judged at
all points that any attack found, so that no bound exceeds the student's robust accuracy only
because one attack was stronger than another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmtard_bench.attacks import losses
from mmtard_bench.attacks.base import Attack, Classifier, Engine, Work, margin
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.fast.apgd import Apgd
from mmtard_bench.attacks.fast.ensemble import staged
from mmtard_bench.attacks.fast.rows import Search, State
from mmtard_bench.errors import InputError, ModelError, reason
from mmtard_bench.evaluation.certificates import (
    CERTIFICATES,
    Answers,
    Slack,
    divergence,
    log_mixture,
    pinsker,
    smooth_pinsker,
)
from mmtard_bench.evaluation.checks import require_in_ball
from mmtard_bench.evaluation.device import (
    available_memory,
    batch_size_of,
    full_float32,
    rows_that_fit,
)
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.statistics import Floats, Truths
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.scoring import ZeroShotScorer
from mmtard_bench.tasks.watched import Watched
from mmtard_bench.types import ThreatModel

MODELS = ("student", "teachers", "robust teacher", "clean teacher")
"""Whose margins are measured; "teachers" is their mixture."""

JUDGED = (*MODELS, *CERTIFICATES)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the bound, besides models and samples.

    ``threat`` has the ball, and the attack on the models themselves. ``share`` is the weight of the
    robust teacher, in [0, 1]; ``temperature`` divides the logits of all models. The attack on a
    certificate makes ``steps`` steps and ``restarts`` restarts for each of its objectives.
    """

    threat: ThreatModel
    share: float = 0.5
    temperature: float = 1.0
    steps: int = 50
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(
                f"share = {self.share}; expected a number from 0 (the clean teacher alone) to 1 "
                "(the robust teacher alone)."
            )
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature = {self.temperature}; expected a number above 0.")


class Ensemble(nn.Module):
    """A student beside its teachers: images (N, 3, H, W) -> (N, 2C), float64.

    The first C columns are the log-probabilities of the teachers' mixture, the others the
    student's.
    """

    def __init__(
        self,
        student: Classifier,
        robust: Classifier,
        clean: Classifier,
        *,
        share: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.student, self.robust, self.clean = student, robust, clean
        self.share, self.temperature = share, temperature

    def forward(self, images: Tensor) -> Tensor:
        student = self.student(images).double() / self.temperature
        return torch.cat([self.teachers(images), torch.log_softmax(student, 1)], 1)

    def teachers(self, images: Tensor) -> Tensor:
        """The log-probabilities of the mixture, (N, C), float64."""
        teachers = [(self.share, self.robust), (1 - self.share, self.clean)]
        answers = [(weight, model(images).double()) for weight, model in teachers if weight]
        return log_mixture(answers, temperature=self.temperature)

    def mixture(self, images: Tensor) -> Tensor:
        """The same in float32, as a classifier for attacks: log-probabilities are logits."""
        return self.teachers(images).float()

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> Tensor:
        """The margins of ``MODELS``, then the slacks of ``CERTIFICATES``, (7, N), float64."""
        log_p, log_q = self(images).chunk(2, dim=1)
        answers = Answers(log_p, log_q, labels)
        own = [log_q, log_p, self.robust(images).double(), self.clean(images).double()]
        margins = [margin(logits, labels) for logits in own]
        return torch.stack([*margins, *(slack(answers) for slack in CERTIFICATES.values())])


@dataclass(frozen=True)
class Bound:
    """The lowest margins and slacks of N samples that the attacks found.

    ``clean`` and ``lowest`` have a row (N,) for each of ``JUDGED``: on clean images, and the least
    over all points. A model is robust, or a certificate holds, where the lowest one is positive; a
    tie counts as an error.
    """

    ids: Sequence[str]
    clean: Mapping[str, Floats]
    lowest: Mapping[str, Floats]

    def right(self, name: str) -> Truths:
        """Where a model is right, or a certificate holds, on the clean image, (N,)."""
        return self.clean[name] > 0

    def robust(self, name: str) -> Truths:
        """Where a model is right, or a certificate holds, at all points that were found, (N,)."""
        return self.lowest[name] > 0

    def weak(self) -> Truths:
        """Where the mixture of the teachers is broken, so that it certifies no student, (N,)."""
        return ~self.robust("teachers")

    def far(self, certificate: str) -> Truths:
        """Where the mixture is robust, but the student too far from it for a certificate, (N,)."""
        return self.robust("teachers") & ~self.robust(certificate)


@dataclass(frozen=True, kw_only=True)
class _Search(Apgd):
    """APGD on answers of an ``Ensemble`` that ends where a certificate does not hold."""

    slack: Slack

    def found(self, state: State, logits: Tensor) -> Tensor:
        """See ``Search``."""
        log_p, log_q = logits.chunk(2, dim=1)
        return self.slack(Answers(log_p, log_q, state["labels"])) <= 0


def _objectives(certificate: str) -> dict[str, Slack]:
    """What an attack on a certificate lowers, one after the other: its slack, and its parts.

    The student's margin is no such part: where it is not positive, no certificate holds, and the
    attack on the student has tried.
    """
    slack = CERTIFICATES[certificate]
    return {
        "slack": smooth_pinsker if slack is pinsker else slack,
        "divergence": lambda answers: -divergence(answers.log_p, answers.log_q),
        "teachers": lambda answers: margin(answers.log_p, answers.labels),
    }


def _loss(objective: Slack) -> losses.Loss:
    def loss(logits: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        log_p, log_q = logits.chunk(2, dim=1)
        # The search keeps losses in float32; verdicts come from float64.
        return -objective(Answers(log_p, log_q, labels)).float()

    return loss


def _searches(certificate: str, setting: Setting) -> list[Search]:
    return [
        _Search(
            name=f"{certificate}: {name}",
            loss=_loss(objective),
            slack=CERTIFICATES[certificate],
            steps=setting.steps,
            variants=setting.restarts,
            norm=setting.threat.pixel_norm,
            eps=float(setting.threat.eps),
        )
        for name, objective in _objectives(certificate).items()
    ]


def bound_of(
    ensemble: Ensemble,
    images: Tensor,
    labels: Tensor,
    *,
    ids: Sequence[str],
    setting: Setting,
    batch_size: int,
    report: Callable[[str], None] = lambda _: None,
) -> Bound:
    """Attack a student, its teachers and the certificates on images (N, 3, H, W) in [0, 1].

    ``labels`` (N,) are the true classes; ``ids`` seed the random starts. ``report`` gets what is
    attacked next. Raises ModelError if an attack leaves the ball.
    """

    def judge(points: Tensor) -> Tensor:
        parts = zip(torch.split(points, batch_size), torch.split(labels, batch_size), strict=True)
        return torch.cat([ensemble.judge(some, right) for some, right in parts], 1)

    clean = judge(images)
    lowest = clean.clone()
    for name, model, attack in _plan(ensemble, setting, columns=ensemble(images[:1]).shape[1] // 2):
        report(name)
        rows = (lowest[JUDGED.index(name)] > 0).nonzero().squeeze(1)
        if not len(rows):
            continue
        work = Work(
            model=model,
            images=images[rows],
            labels=labels[rows],
            ids=[ids[row] for row in rows.tolist()],
            seed=setting.seed,
            batch_size=batch_size,
        )
        found = attack.whole(work).adversarial
        require_in_ball(found, images[rows], setting.threat)
        lowest = torch.minimum(lowest, judge(images.index_copy(0, rows, found)))
    return Bound(ids, _by_name(clean), _by_name(lowest))


def _plan(
    ensemble: Ensemble, setting: Setting, *, columns: int
) -> list[tuple[str, Classifier, Attack]]:
    """Which of ``JUDGED`` is attacked, through which classifier, and by what, in order."""
    own = build_attack(setting.threat, n_classes=columns, engine=Engine("fast"))
    plan: list[tuple[str, Classifier, Attack]] = [
        ("student", ensemble.student, own),
        ("clean teacher", ensemble.clean, own),
        ("robust teacher", ensemble.robust, own),
    ]
    if setting.share not in (0, 1):  # otherwise it is one of the teachers
        plan.append(("teachers", ensemble.mixture, own))
    # The loosest is the last: a point that defeats another certificate defeats Pinsker's.
    for name in CERTIFICATES:
        plan.append((name, ensemble, staged(setting.threat, _searches(name, setting), {})))
    return plan


def _by_name(values: Tensor) -> dict[str, Floats]:
    rows = values.cpu().numpy().astype(np.float64)
    return dict(zip(JUDGED, rows, strict=True))


@full_float32()
def transfer_bound(
    student: Clip,
    *,
    clean: Clip,
    robust: Clip,
    data: TaskData,
    setting: Setting,
    device: torch.device,
    report: Callable[[str], None] = lambda _: None,
) -> Bound:
    """Bound the robust accuracy of a student on a task by its teachers'.

    Every model gets the task's pixels and classifies with its own text tower.

    Raises:
        InputError: For a task of retrieval, images of several sizes, or a radius beyond the pixels.
        ModelError: If a model raises or returns NaN, or no gradient reaches the pixels.
    """
    if data.task.metric == "retrieval":
        raise InputError(
            f"The task '{data.task.name}' is retrieval, where a student has no classes to share "
            "with its teachers; name a task of classification."
        )
    data.require_images("native")
    images = data.images(
        range(len(data.labels)), surface="native", preprocess=student.preprocess
    ).to(device)
    setting.threat.require_reach(*images.shape[-2:])
    scorers = []
    for clip in (student, robust, clean):
        clip.refresh()
        clip.to(device)
        scorers.append(ZeroShotScorer(clip, data, device))
    watched = [Watched(scorer.classifier, device) for scorer in scorers]
    ensemble = Ensemble(*watched, share=setting.share, temperature=setting.temperature)
    try:
        fit = rows_that_fit(ensemble, images[0], available_memory(device))
        found = bound_of(
            ensemble,
            images,
            scorers[0].labels,
            ids=data.manifest.ids,
            setting=setting,
            batch_size=batch_size_of(None, fit, device),
            report=report,
        )
    except InputError:
        raise
    except Exception as error:  # a model may raise anything
        raise ModelError(f"A model failed while it was attacked: {reason(error)}.") from error
    for model in watched:
        model.require_finite()
    return found
