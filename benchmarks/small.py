"""Is ``evaluate`` slower than torchattacks' PGD on few samples? Ratios of seconds, in a table.

Both attack the same samples of digits/digit with 20 steps, one after the other, several rounds in
one process; a ratio above 1 says that ``evaluate`` took longer. It does more: it loads the data,
checks the model, confirms every adversarial image, and stops at the first one. On a robust model
nothing stops early, so the comparison is of the same passes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchattacks
from tabulate import tabulate

import mmtard_bench as mb
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps

CPU = torch.device("cpu")
STEPS = 20


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="teacher-robust")
    parser.add_argument("--samples", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eps", default="1/255")
    arguments = parser.parse_args()
    eps = float(Eps.parse(arguments.eps))
    clip = mb.load_model(arguments.model)
    rows = []
    for n in arguments.samples or [4, 16, 64, 256]:
        data = load_task(find_task("digits/digit"), n=n, seed=0)
        model = ZeroShotClassifier(clip, data.classes, data.templates, CPU).eval()
        images = data.images(range(n), surface="native", preprocess=clip.preprocess)
        labels = torch.tensor(data.labels)
        direct = torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / STEPS, steps=STEPS)

        def ours(size: int | None, n: int = n) -> None:
            mb.evaluate(
                clip,
                task="digits/digit",
                threat=f"pgd-{STEPS}",
                eps=arguments.eps,
                n=n,
                batch_size=size,
                device="cpu",
            )

        def theirs(direct=direct, images=images, labels=labels) -> None:
            direct(images, labels)

        for work in (lambda: ours(None), theirs):
            work()
        found = [
            (timed(lambda: ours(None)), timed(lambda: ours(64)), timed(theirs))
            for _ in range(arguments.rounds)
        ]
        medians = [statistics.median(values) for values in zip(*found, strict=True)]
        ratios = [[a / c for a, _, c in found], [b / c for _, b, c in found]]
        middle = [statistics.median(values) for values in ratios]
        spread = f"{min(ratios[0]):.2f} - {max(ratios[0]):.2f}"
        rows.append([n, *medians, *middle, spread])
    headers = ["samples", "chosen s", "batch 64 s", "torchattacks s", "ratio", "ratio at 64"]
    print(f"{arguments.model}, pgd-{STEPS} at {arguments.eps}, {arguments.rounds} rounds\n")
    print(tabulate(rows, [*headers, "spread"], floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
