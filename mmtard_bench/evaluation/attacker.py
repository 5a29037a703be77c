"""Attack the samples of a job on one device, as many as fit at once, and confirm the result."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from mmtard_bench.attacks.base import AttackResult, Part, Work, joined
from mmtard_bench.errors import ModelError
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import require_in_ball
from mmtard_bench.evaluation.device import Resources, is_out_of_memory, smaller
from mmtard_bench.evaluation.headway import Headway
from mmtard_bench.evaluation.job import Job
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.folding import folded, using
from mmtard_bench.records.edits import NameEdit, names_another_class
from mmtard_bench.tasks.scoring import Aim, Verdict

REFILLS = 4
"""How many batches an attack gets at once if it replaces broken samples by new ones."""

CHUNK_BYTES = 2**30
"""The most bytes of images that an attack gets at once, unless one image is larger."""


class Attacker(Bench):
    """The attack of a job on the samples of its task, and the check of what the attack finds."""

    def __init__(self, job: Job, resources: Resources) -> None:
        job.data.require_images(job.threat.surface, workers=resources.workers)
        block = job.attack.block or 1
        super().__init__(job.clip, job.data, job.threat.surface, resources, block=block)
        self.job = job
        self.most_images = max(CHUNK_BYTES // self.probes[0].nbytes, 1)
        self.tower = folded(job.clip, self.probes) if job.attack.refills else None

    @property
    def chunk_size(self) -> int:
        """How many samples the attack gets at once."""
        attack = self.job.attack
        if attack.block is not None:
            return attack.block
        return min(self.batch_size * (REFILLS if attack.refills else 1), self.most_images)

    def attack(
        self, images: Tensor, rows: list[int], headway: Headway | None = None
    ) -> Iterator[Part]:
        """Attack images of some rows. Yields results with the positions of their images."""
        found: list[Part] = []
        for aim in self.scorer.aims(rows) if rows else []:
            for part in self._attack_at(aim, images, rows, headway):
                found.append(part)
                if self.job.attack.refills:
                    yield found.pop()
        if found:
            whole = joined(found)
            yield range(len(whole.broken_by)), whole

    def _attack_at(
        self, aim: Aim, images: Tensor, rows: Sequence[int], headway: Headway | None
    ) -> Iterator[Part]:
        """Attack the samples of an aim. Yields results with their positions among the rows.

        If a batch does not fit in memory, its samples are attacked again in smaller batches, which
        changes no verdict. A block is never split.
        """
        ids = self.job.data.manifest.ids
        attack = self.job.attack
        left = list(range(len(aim.places)))
        while left:
            some = left if attack.refills or attack.block else left[: self.batch_size]
            places = [aim.places[i] for i in some]
            work = Work(
                model=aim.classifier,
                images=images[places],  # a copy: an attack may do with it what it likes
                labels=aim.labels[some],
                ids=[ids[rows[place]] for place in places],
                seed=self.job.seed,
                batch_size=self.batch_size,
                watch=headway.watch if headway else lambda _: None,
            )
            if headway:
                headway.begin(aim.classifier)
            parts, done, fits = attack.parts(work), list[AttackResult](), True
            try:
                # Only the attack uses the folded tower; the model's own tower confirms the result.
                while part := _next(parts, self.job.clip, self.tower):
                    aim.classifier.require_finite()
                    found = {some[place]: None for place in part[0]}
                    done.append(part[1])
                    left = [i for i in left if i not in found]
                    yield [aim.places[i] for i in found], part[1]
            except Exception as error:  # several kinds say that memory did not suffice
                fits = not is_out_of_memory(error)
                if fits:
                    raise
            if headway:
                headway.end(done)
            missing = sum(i in some for i in left)
            if fits and missing:
                raise ModelError(
                    f"The attack {self.job.threat.attack} gave no result for {missing} of "
                    f"{len(some)} samples; expected one for each."
                )
            if not fits:
                del work, parts
                tried = len(some) if attack.block else min(self.batch_size, len(some))
                self.batch_size = smaller(tried, least=attack.block or 1)

    def confirm(
        self, attacked: Sequence[int], images: Tensor, result: AttackResult
    ) -> dict[int, Verdict]:
        """Check that adversarial images are in ball and box, and classify them by a new pass.

        In classification only images that the attack claims are checked; in retrieval all are,
        because the ranks come from the last image of each sample.
        """
        every = self.scorer.ranked
        chosen = [i for i, name in enumerate(result.broken_by) if every or name is not None]
        if not chosen:
            return {}
        found = result.adversarial[chosen].float()
        require_in_ball(found, images[chosen], self.job.threat)
        rows = [attacked[i] for i in chosen]
        names = [result.names[i] for i in chosen] if result.names else []
        self._require_edits(rows, names)
        return dict(zip(rows, self.judge(found, rows, names=names), strict=True))

    def _require_edits(self, rows: Sequence[int], names: Sequence[str | None]) -> None:
        data, most = self.job.data, self.job.attack.edits or 0
        for row, name in zip(rows, names, strict=False):
            if name is None:
                continue
            edit = self._edit(row, name)
            if name == edit.original:  # two classes may share it
                continue
            if edit.distance > most or names_another_class(data.classes, data.labels[row], name):
                raise ModelError(
                    f"The attack {self.job.threat.attack} made {name!r} of {edit.original!r}: "
                    f"{edit.distance} edits, where {most} are allowed, and never another class."
                )

    def _edit(self, row: int, name: str) -> NameEdit:
        data = self.job.data
        return NameEdit(original=data.classes[data.labels[row]], adversarial=name)


def _next(parts: Iterator[Part], clip: Clip, tower: nn.Module | None) -> Part | None:
    with using(clip, tower):
        return next(parts, None)
