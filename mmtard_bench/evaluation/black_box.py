"""Attack some samples that a record calls robust by Square, which no gradient can mislead."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.headway import Headway, Progress
from mmtard_bench.evaluation.job import Job
from mmtard_bench.records.black_box import BlackBox, wants_check
from mmtard_bench.records.schema import Sample

SHARE = 0.05
"""The queries of the check, as a share of the record's passes."""
LEAST = 800
"""The fewest queries of the check."""
FEW, MANY = 100, 500
"""The fewest and the most queries for a sample."""
FEWEST_DRAWN = LEAST // FEW
"""The fewest samples that are drawn, unless fewer are robust."""
SAMPLES, MOST = 32, 128
"""Samples are drawn until there are so many; then each gets more queries; then more are drawn."""


def check_by_square(
    job: Job, resources: Resources, samples: Sequence[Sample], report: Callable[[Progress], None]
) -> BlackBox | None:
    """Attack a draw of the robust samples of a finished evaluation.

    Each of several processes attacks its share. Returns None if it is not wanted.
    """
    threat, metric = job.threat, job.data.task.metric
    wanted = wants_check(threat.attack, threat.norm, metric, len(samples))
    if not (wanted and resources.black_box):
        return None
    rows = [row for row, sample in enumerate(samples) if sample.robust]
    queries, count = plan(sum(s.forward + s.backward for s in samples), len(rows))
    draw = random.Random(f"{job.identity}|black box").sample(rows, count)
    square = replace(threat, attack=f"square-{queries}")
    processes = resources.processes
    own = processes.share(draw)
    headway = Headway(
        [],
        todo=len(own),
        total=len(own),
        budget=queries,
        report=lambda progress: report(_as_last_step(progress, samples)),
    )

    def attacked() -> int:
        if not own:
            return 0
        outcomes = attack_again(
            job.clip, job.data.at(own), square, resources, seed=job.seed, headway=headway
        )
        return sum(outcome.broken for outcome in outcomes)

    broken = sum(processes.gather(processes.agree(attacked), int))
    return BlackBox(attack=square.attack, drawn=count, broken=broken)


def plan(passes: int, robust: int) -> tuple[int, int]:
    """The queries for a sample, and the number of samples, for a record of so many passes."""
    total = max(int(SHARE * passes), LEAST)
    queries = min(max(total // SAMPLES, FEW), MANY)
    return queries, min(total // queries, MOST, robust)


def _as_last_step(progress: Progress, samples: Sequence[Sample]) -> Progress:
    """All samples have a verdict; what is left is the check."""
    count = len(samples)
    return replace(
        progress,
        settled=count,
        robust=sum(sample.robust for sample in samples),
        seen=count,
        total=count,
        pulse=replace(progress.pulse, stage="check without gradients, square"),
    )
