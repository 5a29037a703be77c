"""What our adapters cost on top of the libraries they wrap: ratios in one run, same samples.

``make bench`` prints a table: seconds of a direct call of ``pyautoattack`` and of ours, their
ratio, and the passes a sample. Interleaved, several rounds, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from pyautoattack import AutoAttack
from tabulate import tabulate

import mmtard_bench as mb
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.tasks.resolve import find_task, load_task
from mmtard_bench.tasks.zero_shot import ZeroShotClassifier
from mmtard_bench.types import Eps, ThreatModel

EPS = Eps.parse("8/255")
STAGES = {"apgd-pair": ["apgd-ce", "apgd-t"], "autoattack-standard": None}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for name in ("tiny-clip", "teacher-robust"):
        clip = mb.load_model(name)
        data = load_task(find_task("digits/digit"), n=arguments.samples, seed=0)
        task = data.task
        model = ZeroShotClassifier(clip, data.classes, task.templates, torch.device("cpu"))
        images = data.images(range(arguments.samples), surface="native", preprocess=clip.preprocess)
        labels = torch.tensor(data.labels)
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        for attack in STAGES:
            ours, theirs, passes = compare(
                attack, model, images[right], labels[right], arguments.rounds
            )
            ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
            row = [name, attack, statistics.median(theirs), statistics.median(ours), ratio, passes]
            rows.append(row)
    headers = ["model", "attack", "pyautoattack s", "ours s", "ratio", "forward a sample"]
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


def compare(
    name: str, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, rounds: int
) -> tuple[list[float], list[float], float]:
    """Seconds of ours and of theirs, round by round, and our forward passes a sample."""
    attack = build_attack(ThreatModel(name, "linf", EPS), n_classes=10)
    ids = [str(i) for i in range(len(images))]
    forward: list[int] = []

    def ours() -> None:
        result = attack.run(model, images, labels, ids=ids, seed=0, decided=lambda *_: None)
        forward[:] = result.forward

    def theirs() -> None:
        stages = STAGES[name]
        version = "standard" if stages is None else "custom"
        direct = AutoAttack(
            model, attacks=stages, norm="Linf", eps=float(EPS), seed=0, version=version
        )
        direct.apgd.n_restarts = 1
        direct.run_standard_evaluation(images, labels, batch_size=len(images))

    seconds = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    return [o for o, _ in seconds], [t for _, t in seconds], statistics.mean(forward)


def timed(work: Callable[[], None]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
