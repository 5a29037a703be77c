"""Run many searches in one batch: a row that succeeds leaves at once, and a new row replaces it.

A row is one search for one sample: a restart, or one of its target classes. The state of all
running rows is a dictionary of tensors whose first dimension is the row, so that any search can
replace and remove rows. Each row counts its own steps. The result of a row never depends on the
other rows of the batch.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmtard_bench.attacks.base import projector
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.types import Norm

TOGETHER = {"cuda": 4}
"""How many steps run before the host reads the results; each read waits for the GPU."""

State = dict[str, Tensor]
"""Tensors (rows, ...). Every state has "images", "labels", "points" (what is looked at next), "at"
(how many steps each row has made), and "targets" where the search is targeted."""


@dataclass(frozen=True)
class Samples:
    """Samples of a batch: images (N, 3, H, W), labels (N,), target classes (N, T), ids."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    ids: Sequence[str]


def choose(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows (N, ...) of ``yes`` where ``which`` (N,) is true, else of ``no``, exactly."""
    if which.device.type != "cpu":
        return torch.where(which.view(-1, *[1] * (yes.ndim - 1)), yes, no)
    # Nothing waits for a CPU, and most of the time few rows change.
    rows = which.nonzero().squeeze(1)
    return no.index_copy(0, rows, yes[rows]) if len(rows) else no


Row = tuple[int, int]
"""The position of a sample, and the number of its variant."""


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """One kind of search. ``name`` is its stage.

    A row makes ``steps`` steps, each of ``forward`` and ``backward`` passes, and then tests its
    last point. A point inside the ball that is misclassified is an adversarial image. A sample has
    ``variants`` rows: restarts or, if ``targeted``, target classes.
    """

    name: str
    norm: Norm
    eps: float
    steps: int
    forward: int = 1
    backward: int = 1
    variants: int = 1
    targeted: bool = False

    @property
    def passes(self) -> int:
        """The most forward and backward passes that a sample costs."""
        return self.variants * (self.steps * (self.forward + self.backward) + 1)

    def start(self, samples: Samples, rows: Sequence[Row], seed: int) -> State:
        """The state of new rows."""
        places = [sample for sample, _ in rows]
        images, labels = samples.images[places], samples.labels[places]
        state = {"images": images, "labels": labels, "at": torch.zeros_like(labels)}
        if self.targeted:
            state["targets"] = samples.targets[places, [variant for _, variant in rows]]
        keys = [(seed, self.name, variant, samples.ids[sample]) for sample, variant in rows]
        return state | self.begin(images, keys)

    @abstractmethod
    def begin(self, images: Tensor, keys: Sequence[tuple[object, ...]]) -> State:
        """The state of new rows: their first "points" and whatever else the search needs.

        ``keys`` seed the random numbers of the rows.
        """

    @abstractmethod
    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """Test the points of all rows, then make a step. Replaces tensors of the state.

        Returns the tested points, (rows, 3, H, W), and which of them are adversarial, (rows,).
        """

    def ball(self, images: Tensor) -> State:
        """The state that ``project`` needs of new rows: for L-inf the corners of ball and box."""
        if self.norm == "l2":
            return {}
        return {
            "lower": (images - self.eps).clamp_(min=0),
            "upper": (images + self.eps).clamp_(max=1),
        }

    def project(self, state: State, points: Tensor) -> Tensor:
        """Project points to the ball and the box."""
        if self.norm == "linf":
            return points.clamp(state["lower"], state["upper"])
        return projector(state["images"], norm=self.norm, eps=self.eps)(points)

    def found(self, state: State, logits: Tensor) -> Tensor:
        """Which points are adversarial by their logits, and inside the ball, (rows,)."""
        return logits.argmax(1) != state["labels"]


@dataclass
class Found:
    """The result of a search: adversarial images of the broken samples, and the passes of all.

    ``steps`` (rows,) counts the steps of each running row.
    """

    adversarial: dict[int, Tensor] = field(default_factory=dict)
    forward: dict[int, int] = field(default_factory=dict)
    backward: dict[int, int] = field(default_factory=dict)
    steps: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def spend(self, sample: int, forward: int, backward: int) -> None:
        """Count passes of a sample."""
        self.forward[sample] = self.forward.get(sample, 0) + forward
        self.backward[sample] = self.backward.get(sample, 0) + backward


class _Queue:
    """The waiting rows. The first variant of a sample runs alone; the others follow if it fails.

    The first variant succeeds most often, so running all at once would waste passes.
    """

    def __init__(self, samples: Sequence[int], variants: int, found: Found) -> None:
        self.waiting = deque((sample, 0) for sample in samples)
        self.variants = variants
        self.found = found

    def failed(self, row: Row) -> None:
        sample, variant = row
        if variant == 0:
            self.waiting.extend((sample, other) for other in range(1, self.variants))

    def take(self, most: int) -> list[Row]:
        taken: list[Row] = []
        while self.waiting and len(taken) < most:
            row = self.waiting.popleft()
            if row[0] not in self.found.adversarial:
                taken.append(row)
        return taken


def search_all(
    search: Search,
    samples: Samples,
    left: Sequence[int],
    passes: Passes,
    *,
    seed: int,
    batch_size: int,
    found: Found,
) -> None:
    """Search for an adversarial image of each sample ``left``, with ``batch_size`` rows at once.

    Results go into ``found``, which is up to date at every call of the model.
    """
    queue = _Queue(left, search.variants, found)
    together = math.gcd(search.steps, TOGETHER.get(passes.device.type, 1))
    state: State = {}
    rows: list[Row] = []
    leaving: list[int] = []
    while True:
        fresh = queue.take(batch_size - len(rows) + len(leaving))
        new = search.start(samples, fresh, seed) if fresh else {}
        state, rows = _replace(state, rows, leaving, new, fresh)
        if not rows:
            return
        found.steps = state["at"]
        looks = [search.step(state, passes) for _ in range(together)]
        points, broken = _first(looks, state, passes, rows, found)
        ended = (state["at"] >= search.steps) & ~broken
        leaving = []
        if not bool((broken | ended).any()):
            continue
        _look_again(search, state, passes, points, broken, ended, rows, found)
        over = ended.tolist()
        verdicts = zip(rows, broken.tolist(), over, strict=True)
        for place, (row, won, lost) in enumerate(verdicts):
            if won:
                found.adversarial.setdefault(row[0], points[place].clone())
            elif lost:
                queue.failed(row)
        made = state["at"].tolist()
        for place, (row, lost) in enumerate(zip(rows, over, strict=True)):
            # With a sample that is broken its other rows leave too.
            if lost or row[0] in found.adversarial:
                leaving.append(place)
                steps = made[place]
                found.spend(row[0], search.forward * steps, search.backward * steps)


def _replace(
    state: State,
    rows: list[Row],
    leaving: Sequence[int],
    new: State,
    fresh: Sequence[Row],
) -> tuple[State, list[Row]]:
    """Write new rows over those that leave. Allocate tensors only if the number of rows changes."""
    both = min(len(leaving), len(fresh))
    rows = list(rows)
    if both:
        slots = torch.tensor(leaving[:both], device=state["at"].device)
        for key, values in state.items():
            values.index_copy_(0, slots, new[key][:both])
        for slot, row in zip(leaving, fresh, strict=False):
            rows[slot] = row
    if len(fresh) > both:
        more = {key: values[both:] for key, values in new.items()}
        state = {k: torch.cat([state[k], v]) if state else v.clone() for k, v in more.items()}
        rows += fresh[both:]
    elif len(leaving) > both:
        gone = set(leaving[both:])
        stay = [place for place in range(len(rows)) if place not in gone]
        state = {key: values[stay] for key, values in state.items()}
        rows = [rows[place] for place in stay]
    return state, rows


def _first(
    looks: Sequence[tuple[Tensor, Tensor]],
    state: State,
    passes: Passes,
    rows: Sequence[Row],
    found: Found,
) -> tuple[Tensor, Tensor]:
    """The first adversarial point of each row in a sequence of steps, and which rows have one.

    After passes in lower precision, float32 checks every candidate; if it rejects one, later
    candidates of the row still count.
    """
    points, broken = looks[0][0], torch.zeros_like(looks[0][1])
    if passes.lower and not bool(torch.stack([claims for _, claims in looks]).any()):
        return points, broken
    for look, claims in looks:
        now = _confirmed(state, passes, look, claims & ~broken, rows, found)
        points = choose(now, look, points)
        broken = broken | now
    return points, broken


def _look_again(
    search: Search,
    state: State,
    passes: Passes,
    points: Tensor,
    broken: Tensor,
    ended: Tensor,
    rows: Sequence[Row],
    found: Found,
) -> None:
    """Test the last points of rows that ended. Changes ``points`` and ``broken`` in place."""
    last = ended.nonzero().squeeze(1)
    if not len(last):
        return
    ending = {key: values[last] for key, values in state.items()}
    claims = search.found(ending, passes.logits(ending["points"]))
    its = [rows[place] for place in last.tolist()]
    for sample, _ in its:
        found.spend(sample, 1, 0)
    points[last] = ending["points"]
    broken[last] = _confirmed(ending, passes, ending["points"], claims, its, found)


def _confirmed(
    state: State,
    passes: Passes,
    points: Tensor,
    claims: Tensor,
    rows: Sequence[Row],
    found: Found,
) -> Tensor:
    """Which of the claimed rows, (rows,), are broken in float32 as well."""
    claimed = claims.nonzero().squeeze(1) if passes.lower else None
    if claimed is None or not len(claimed):
        return claims
    for place in claimed.tolist():
        found.spend(rows[place][0], 1, 0)
    agreed = claims.clone()
    agreed[claimed] = passes.confirm(points[claimed], state["labels"][claimed])
    return agreed
