"""Edits of the class name and PGD on the pixels together: ``joint-charmer-k{edits}-pgd-{steps}``.

The attacker has both budgets at once. Three stages, each on what the earlier ones left:

- ``charmer``: edits alone, the image clean;
- ``charmer+pgd``: PGD inside the pixels' ball against the head with the worst name of that search,
  which differs from image to image;
- ``pgd+charmer``: PGD against the clean head, then the search for a name on the image that it left.

Both orders are run: what ``text-charmer-k{edits}`` breaks is then broken here, and so, from the
same random start, is what ``pgd-{steps}`` breaks. Text first is the stronger one: on 200 digits,
with the alphabet cut down so that edits alone leave something, it broke 0 to 3 samples more than
the other order in each of 12 settings (two tiny models, two radii each, three alphabets), never
fewer; the other order then added one sample in one of the 12.

The norm and eps are the pixels'; the edits are in the name and in the parameters, and worst cases
keep such balls apart from those of images alone.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.attacks.base import Attack, AttackResult, PromptedClassifier, Work, random_start
from mmtard_bench.attacks.charmer import described, edits_of, worst_names
from mmtard_bench.attacks.pgd import budget_of, number_of, pgd, step_size_of
from mmtard_bench.registry import register_attack
from mmtard_bench.types import ThreatModel

ORDERS = ("charmer+pgd", "pgd+charmer")


@register_attack("joint-charmer-k{edits}-pgd-{steps}")
def build_joint(threat: ThreatModel, n_classes: int) -> Attack:
    """Edits of the class name and PGD on cross-entropy together, in both orders."""
    edits, steps = edits_of(threat), number_of(threat)
    norm, eps = threat.pixel_norm, float(threat.eps)

    def attack_pixels(
        model: PromptedClassifier, images: Tensor, labels: Tensor, rows: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """PGD where image i's own class has row i (N, D).

        Returns points, their logits, and which PGD saw misclassified, (N,) bool.
        """

        def logits_of(points: Tensor) -> Tensor:
            features = model.features(points)
            own = (features * rows).sum(1, keepdim=True)
            return (features @ model.head.T).scatter(1, labels[:, None], own)

        points, found = pgd(
            logits_of,
            images,
            loss=lambda logits: F.cross_entropy(logits, labels, reduction="none"),
            norm=norm,
            eps=eps,
            steps=steps,
            step_size=step_size_of(eps, steps),
            start=start,
            done=lambda logits: logits.argmax(1) != labels,
        )
        with torch.no_grad():
            return points, logits_of(points), found

    def run(work: Work) -> AttackResult:
        images, labels, ids = work.images, work.labels, work.ids
        prompted = cast("PromptedClassifier", work.model)
        keys = [(work.seed, f"pgd-{steps}", 0, sample) for sample in ids]
        starts = random_start(images, norm=norm, eps=eps, keys=keys)
        with torch.no_grad():
            text = worst_names(prompted, prompted.features(images), labels, edits=edits)
        result = AttackResult(
            adversarial=images.clone(),
            broken_by=[None] * len(ids),
            forward=[1 + count for count in text.prompts],
            backward=[0] * len(ids),
            names=list(text.names),
        )

        def settle(stage: str, left: Sequence[int], wrong: Tensor) -> None:
            for i, broken in zip(left, wrong.tolist(), strict=True):
                result.broken_by[i] = stage if broken else None

        settle("charmer", range(len(ids)), text.logits.argmax(1) != labels)
        for stage in ORDERS:
            left = [i for i, name in enumerate(result.broken_by) if name is None]
            if not left:
                break
            own = labels[left]
            text_first = stage == "charmer+pgd"
            rows = text.rows[left] if text_first else prompted.head[own]
            points, logits, found = attack_pixels(prompted, images[left], own, rows, starts[left])
            extra = [steps + 1] * len(left)
            if not text_first:
                with torch.no_grad():
                    again = worst_names(prompted, prompted.features(points), own, edits=edits)
                logits = again.logits
                extra = [steps + 2 + count for count in again.prompts]
                for i, name in zip(left, again.names, strict=True):
                    result.names[i] = name
            result.adversarial[left] = points
            for i, passes in zip(left, extra, strict=True):
                result.forward[i] += passes
                result.backward[i] += steps
            # As in PGD alone: what broke under any pass is claimed, also of a model that is noisy.
            settle(stage, left, found | (logits.argmax(1) != own))
        return result

    return Attack(threat.attack, {**described(edits), **budget_of(steps)}, run, edits=edits)
