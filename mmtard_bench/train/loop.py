"""One training step: attack the student, compare it with the teachers, update its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mmtard_bench.attacks.base import sample_generator
from mmtard_bench.attacks.pgd import pgd
from mmtard_bench.errors import InputError
from mmtard_bench.train.methods.base import Guide, Loss, Method, Options
from mmtard_bench.train.recipe import InnerAttack, Recipe
from mmtard_bench.train.towers import Head, Output, Role, Teachers, Tower, View
from mmtard_bench.types import Eps


class NotFiniteError(InputError):
    """A term of the loss, or the gradient, became NaN or infinite. No weight was updated."""


def uniform_start(
    shape: Sequence[int], attack: InnerAttack, *, key: tuple[object, ...], device: torch.device
) -> Tensor:
    """Random starting perturbations for a global batch, uniform in [-eps, eps].

    They depend only on ``key`` and ``shape``. For the norm "l2" they may lie outside the ball; PGD
    projects its start into the ball.
    """
    seed = sample_generator(*key).initial_seed()
    generator = torch.Generator(device).manual_seed(seed)
    unit = torch.rand(tuple(shape), generator=generator, device=device) * 2 - 1
    return unit * float(Eps.parse(attack.eps, norm=attack.norm))


@dataclass
class StudentBatch:
    """The batch that a method receives; implements ``methods.base.Batch``."""

    images: Mapping[View, Tensor]
    positions: Tensor
    labels: Tensor
    teachers: Teachers
    accelerator: Accelerator
    memory: Mapping[str, float]
    student: dict[View, Output] = field(default_factory=dict)
    _asked: dict[tuple[Role, View], Output] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    def teacher(self, role: Role, view: View, /) -> Output:
        key = role, view
        if key not in self._asked:
            teacher = self.teachers[role]
            known = teacher.recall(self.positions) if view == "clean" else None
            self._asked[key] = teacher(self.images[view]) if known is None else known
        return self._asked[key]

    def gather(self, rows: Tensor, /) -> Tensor:
        if self.processes == 1:
            return rows
        everything: Tensor = self.accelerator.gather(rows.detach())
        begin = self.accelerator.process_index * len(rows)
        return torch.cat([everything[:begin], rows, everything[begin + len(rows) :]])


class Trainer:
    """A student, its optimiser and its teachers, for one process's share of every batch."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        options: Options,
        *,
        tower: Tower,
        head: Head,
        teachers: Teachers,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.options = options
        # Set every layer: the tower wraps a loaded model, whose layers are in another mode.
        self.tower = tower.train()
        self.head = head
        self.teachers = teachers
        self.accelerator = accelerator
        self.seed = seed
        self.memory: Mapping[str, float] = {}
        self.learned = [p for p in tower.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.learned)
        optimiser = torch.optim.AdamW(
            self.learned, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.model, self.optimiser = accelerator.prepare(tower, optimiser)

    def step(self, step: int, images: Tensor, positions: Tensor, labels: Tensor) -> "Learned":
        """Run step number ``step`` on this process's images (N, 3, H, W), uint8.

        Raises:
            NotFiniteError: If the loss or the gradient is not finite; no weight is updated then.
        """
        device = self.accelerator.device
        clean = images.to(device, non_blocking=True).float() / 255
        batch = StudentBatch(
            {"clean": clean},
            positions,
            labels.to(device),
            self.teachers,
            self.accelerator,
            self.memory,
        )
        guide = self.method.guide(self.options)
        with self.accelerator.autocast():
            if guide is not None:
                adversarial = self._attack(step, batch, guide)
                batch.images = {"clean": clean, "adv": adversarial}
            if not self.tower.training:  # train() visits every layer, so call it only if needed
                self.tower.train()
            batch.student = self._outputs(batch.images)
        loss = self.method.loss(batch, self.options)
        self._update(step, loss)
        self.memory = loss.memory
        return Learned(batch, loss)

    def _outputs(self, images: Mapping[View, Tensor]) -> dict[View, Output]:
        """The student's outputs on the views of the method, from one forward pass."""
        views = self.method.views
        everything = torch.cat([images[view] for view in views])
        if not self.method.patches:
            parts = self.model(everything).float().chunk(len(views))
            return {v: Output(rows, self.head) for v, rows in zip(views, parts, strict=True)}
        embedding, patches = self.model(everything, patches=True)
        parts, theirs = (t.float().chunk(len(views)) for t in (embedding, patches.embeddings))
        return {
            view: Output(rows, self.head, replace(patches, embeddings=own))
            for view, rows, own in zip(views, parts, theirs, strict=True)
        }

    def _attack(self, step: int, batch: StudentBatch, guide: Guide) -> Tensor:
        """The adversarial images of the batch, made with the student in evaluation mode."""
        clean = batch.images["clean"]
        target = batch.teacher(guide.role, "clean") if guide.role else None
        whole = (len(clean) * batch.processes, *clean.shape[1:])
        start = uniform_start(
            whole, self.recipe.attack, key=(self.seed, "start", step), device=clean.device
        )
        begin = self.accelerator.process_index * len(clean)
        mine = start[begin : begin + len(clean)]
        return self.perturb(clean, mine, batch.labels, head=self.head, guide=guide, target=target)

    def perturb(
        self,
        images: Tensor,
        start: Tensor,
        labels: Tensor,
        *,
        head: Head,
        guide: Guide,
        target: Output | None = None,
    ) -> Tensor:
        """Run the recipe's PGD on the student. ``start`` is (N, 3, H, W) like the images."""
        attack = self.recipe.attack
        self.tower.eval()
        points, _ = pgd(
            self.tower,
            images,
            loss=lambda found: guide.objective(Output(found.float(), head), target, labels),
            norm=attack.norm,
            eps=float(Eps.parse(attack.eps, norm=attack.norm)),
            steps=attack.steps,
            step_size=float(Eps.parse(attack.step_size, norm=attack.norm)),
            start=start,
        )
        return points

    def _update(self, step: int, loss: Loss) -> None:
        recipe = self.recipe
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(
                step, steps=recipe.steps, peak=recipe.learning_rate, warmup=recipe.warmup
            )
        terms = torch.stack([term.float() for term in loss.terms.values()])
        self.accelerator.backward(terms.sum())
        norm = clip_grad_norm_(self.learned, recipe.clip_norm, foreach=True)
        checked = torch.cat([terms.detach(), norm.detach().float().reshape(1)])
        finite = torch.isfinite(checked).tolist()
        if not all(finite):
            self.optimiser.zero_grad()
            names = [f"the loss term '{name}'" for name in loss.terms] + ["the gradient"]
            raise NotFiniteError(
                f"At step {step}, {names[finite.index(False)]} became NaN or infinite. Training "
                "stopped before the update. Lower learning_rate, or check the data and teachers."
            )
        self.optimiser.step()
        self.optimiser.zero_grad()


@dataclass
class Learned:
    """The batch and the loss of a step, for monitoring."""

    batch: StudentBatch
    loss: Loss


def accuracy(output: Output, labels: Tensor) -> Tensor:
    """The share of N images whose largest logit is that of the label, a scalar."""
    return (output.logits.argmax(1) == labels).float().mean()


def learning_rate(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine to zero.

    It depends only on ``step``, counted from 0, so that a resumed run needs no saved state.

    Args:
        step: The step.
        steps: The number of steps of the run.
        peak: The learning rate at the end of the warm-up.
        warmup: The share of the steps that the warm-up takes.
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    share = (step - warm) / max(steps - warm, 1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * share))
