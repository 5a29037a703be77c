"""Does the fast engine deserve to be the default? Strength, speed and overhead, in tables.

``make bench`` runs it, about two hours on two cores. What is measured is kept in a file of JSON
lines, one a cell of a table, and not measured again, so that it can be stopped; ``--fresh``
begins anew. ``--cells docs/engine.jsonl`` prints what we measured, with the samples that stood.

Strength: verdicts of the fast engine and of the reference code on the same samples, and of the
reference code against itself under another seed. Speed: seconds of a direct call of
``pyautoattack`` on the plain model over ours, interleaved, several rounds. Overhead: our seconds
over those that the same number of bare passes take at a full batch.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from tabulate import tabulate
from torch import Tensor, nn

import mmtard_bench as mb
from mmtard_bench.attacks.base import AttackResult, Engine, EngineName, T, Work
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.folding import fold, using
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, Norm, ThreatModel

CPU = torch.device("cpu")
EPS: dict[Norm, str] = {"linf": "8/255", "l2": "128/255"}
BATCH = 128
# Undefended; robust, with about half of the samples standing; the same, a larger model.
SPEED = (("tiny-clip", "8/255"), ("student-mmt-ard", "5/255"), ("teacher-robust", "12/255"))
PARTS = ("strength", "speed", "overhead", "flips")
STAGES = {"apgd-pair": ["apgd-ce", "apgd-t"], "autoattack-standard": None}


class Around(nn.Module):
    """A classifier with something done to its input or output."""

    def __init__(self, model: nn.Module, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.model, images)


def rounded(model: nn.Module) -> nn.Module:
    """Pixels rounded to 16 levels: no gradient at all."""
    return Around(model, lambda inner, images: inner((images * 15).round() / 15))


def saturated(model: nn.Module) -> nn.Module:
    """Logits a hundred times too large: the cross-entropy has no gradient where it is right."""
    return Around(model, lambda inner, images: 100 * inner(images))


def noisy(model: nn.Module) -> nn.Module:
    """Pixels with fresh noise in every pass."""
    generator = torch.Generator().manual_seed(0)

    def answer(inner: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = inner(images + 0.02 * torch.randn(images.shape, generator=generator))
        return logits

    return Around(model, answer)


# Name: (what it is, the model, what is put around its classifier).
MODELS: dict[str, tuple[str, str, Callable[[nn.Module], nn.Module]]] = {
    "undefended": ("pre-trained only", "tiny-clip", lambda model: model),
    "tecoa": ("adversarially trained with labels", "student-tecoa", lambda model: model),
    "fare": ("adversarially trained without labels", "student-fare", lambda model: model),
    "mmt-ard": ("distilled", "student-mmt-ard", lambda model: model),
    "rounded": ("masked: pixels of 16 levels", "student-tecoa", rounded),
    "saturated": ("masked: logits times 100", "student-mmt-ard", saturated),
    "noisy": ("random: noise on pixels", "student-mmt-ard", noisy),
}


class Subject:
    """A model with correctly classified samples of digits/digit."""

    def __init__(self, spec: str, samples: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
        self.clip: Clip = mb.load_model(spec)
        self.clip.to(CPU)
        data = load_task(find_task("digits/digit"), n=samples, seed=0)
        plain = ZeroShotClassifier(self.clip, data.classes, data.task.templates, CPU)
        images = data.images(range(samples), surface="native", preprocess=self.clip.preprocess)
        labels = torch.tensor(data.labels)
        with torch.no_grad():
            right = plain(images).argmax(1) == labels
        self.images, self.labels = images[right], labels[right]
        self.ids = [name for name, ok in zip(data.manifest.ids, right.tolist(), strict=True) if ok]
        self.model = wrap(plain).eval()
        self.tower = fold(self.clip, self.images[:32])

    def part(self, some: slice) -> "Subject":
        """The same with some of the samples."""
        found = copy(self)
        found.images, found.labels, found.ids = self.images[some], self.labels[some], self.ids[some]
        return found

    def attack(
        self,
        name: str,
        norm: Norm,
        engine: EngineName,
        *,
        seed: int = 0,
        eps: str = "",
        batch_size: int = BATCH,
    ) -> AttackResult:
        """Run one attack as the product does: the fast engine on the folded tower."""
        threat = ThreatModel(name, norm, Eps.parse(eps or EPS[norm], norm=norm))
        attack = build_attack(threat, n_classes=10, engine=Engine(engine))
        with using(self.clip, self.tower if engine == "fast" else None):
            return attack.run(
                Work(
                    model=self.model,
                    images=self.images,
                    labels=self.labels,
                    ids=self.ids,
                    seed=seed,
                    batch_size=batch_size,
                )
            )

    def direct(self, name: str, norm: Norm, eps: str) -> None:
        """Call ``pyautoattack`` as its users do."""
        stages = STAGES[name]
        version = "standard" if stages is None else "custom"
        names = {"linf": "Linf", "l2": "L2"}
        direct = AutoAttack(
            self.model,
            attacks=stages,
            norm=names[norm],
            eps=float(Eps.parse(eps)),
            seed=0,
            version=version,
        )
        direct.apgd.n_restarts = 1
        direct.run_standard_evaluation(self.images, self.labels, batch_size=BATCH)


Cell = dict[str, object]


class Cells:
    """What was measured, in a file: a line a cell, with a key that says what it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, Cell] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                cell = json.loads(line)
                self.lines[cell["key"]] = cell

    def get(self, key: str, measure: Callable[[], Cell]) -> Cell:
        """The cell of this key, measured now if it is not there."""
        if key not in self.lines:
            cell = {"key": key, **measure()}
            print(json.dumps(cell), flush=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            self.lines[key] = cell
        return self.lines[key]


def strength(cells: Cells, attack: str, names: list[str], norms: list[Norm], samples: int) -> None:
    """Verdicts of both engines, sample by sample."""
    rows = []
    for name in names:
        what, spec, wrap = MODELS[name]
        for norm in norms:

            def measure(spec=spec, wrap=wrap, norm=norm) -> Cell:
                subject = Subject(spec, samples, wrap)
                runs = {}
                for run, engine, seed in (
                    ("reference", "reference", 0),
                    ("again", "reference", 1),
                    ("fast", "fast", 0),
                ):
                    started = time.perf_counter()
                    result = subject.attack(attack, norm, engine, seed=seed)
                    seconds = round(time.perf_counter() - started, 1)
                    robust = [
                        i for i, by in zip(subject.ids, result.broken_by, strict=True) if not by
                    ]
                    runs[run] = {
                        "robust": robust,
                        "broken_by": {
                            stage: result.broken_by.count(stage)
                            for stage in sorted({by for by in result.broken_by if by})
                        },
                        "forward": sum(result.forward) / samples,
                        "backward": sum(result.backward) / samples,
                        "seconds": seconds,
                    }
                return {"clean": len(subject.ids) / samples, "runs": runs}

            runs = cells.get(f"strength {attack} {name} {norm} {samples}", measure)["runs"]
            first, again, fast = (set(runs[r]["robust"]) for r in ("reference", "again", "fast"))
            rows.append(
                [name, what, norm]
                + [100 * len(found) / samples for found in (first, again, fast)]
                + [len(fast - first), len(first - fast), len(again - first), len(first - again)]
            )
    means = [statistics.mean(row[i] for row in rows) for i in (3, 4, 5)]
    rows.append(["all", "", "", *means, *(sum(row[i] for row in rows) for i in (6, 7, 8, 9))])
    headers = ["model", "what", "norm", "reference %", "seed 1 %", "fast %"]
    headers += ["fast only", "reference only", "seed 1 only", "seed 0 only"]
    print(f"\nRobust accuracy, {attack}, {samples} samples; samples that stand for one run only\n")
    print(tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="github"))


def speed(cells: Cells, samples: int, rounds: int) -> None:
    """Seconds of a direct call of pyautoattack over ours, round by round."""
    rows = []
    for spec, eps in SPEED:
        for attack in STAGES:

            def measure(spec=spec, eps=eps, attack=attack) -> Cell:
                subject = Subject(spec, samples, lambda model: model)
                theirs, ours = [], []
                for _ in range(rounds):
                    theirs.append(timed(lambda: subject.direct(attack, "linf", eps))[0])
                    seconds, result = timed(lambda: subject.attack(attack, "linf", "fast", eps=eps))
                    ours.append(seconds)
                standing = result.broken_by.count(None)
                return {
                    "robust": standing / samples,
                    "theirs": theirs,
                    "ours": ours,
                    "forward": sum(result.forward) / len(subject.ids),
                    "backward": sum(result.backward) / len(subject.ids),
                    "outside": 1 - result.model_seconds / ours[-1],
                }

            cell = cells.get(f"speed {spec} {eps} {attack} {samples} {rounds}", measure)
            ratios = [t / o for t, o in zip(cell["theirs"], cell["ours"], strict=True)]
            medians = [
                statistics.median(values) for values in (cell["theirs"], cell["ours"], ratios)
            ]
            spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
            passes = [cell["forward"], cell["backward"], 100 * cell["outside"]]
            rows.append([spec, eps, attack, 100 * cell["robust"], *medians, spread, *passes])
    headers = ["model", "eps", "attack", "robust %", "pyautoattack s", "fast s", "ratio", "spread"]
    headers += ["forward", "backward", "outside the model %"]
    print(f"\nSpeed, {samples} samples, {rounds} rounds, {torch.get_num_threads()} threads\n")
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


def overhead(cells: Cells, rounds: int) -> None:
    """Our seconds over those of as many bare passes, both with a batch that is full."""
    rows = []
    for spec in ("tiny-clip", "student-mmt-ard"):
        for attack in ("pgd-20", "apgd-pair", "autoattack-standard"):

            def measure(spec=spec, attack=attack) -> Cell:
                subject = Subject(spec, 2 * BATCH, lambda model: model).part(slice(BATCH))
                # PGD is over in less time than a clock needs to be believed.
                repeats = 10 if attack == "pgd-20" else 1
                subject.attack("pgd-2", "linf", "fast", eps="1/255")
                ratios = []
                for _ in range(rounds):
                    before = bare(subject)
                    seconds = 0.0
                    results = []
                    for _ in range(repeats):
                        spent, result = timed(
                            lambda: subject.attack(attack, "linf", "fast", eps="1/255")
                        )
                        seconds += spent
                        results.append(result)
                    after = bare(subject)
                    forward, both = ((a + b) / 2 for a, b in zip(before, after, strict=True))
                    backward = sum(sum(result.backward) for result in results)
                    alone = sum(sum(result.forward) for result in results) - backward
                    ratios.append(seconds / (alone * forward + backward * both))
                return {"ratios": ratios}

            ratios = cells.get(f"overhead {spec} {attack} {rounds}", measure)["ratios"]
            spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
            rows.append([spec, attack, statistics.median(ratios), spread])
    headers = ["model", "attack", f"wall time over bare passes at batch {BATCH}", "spread"]
    print(f"\nOverhead, {BATCH} samples, {rounds} rounds\n")
    print(tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github"))


def flips(cells: Cells, samples: int) -> None:
    """Verdicts of other batch sizes, and of two halves of the samples, that differ from 64's."""
    rows = []
    for spec, eps in SPEED[:2]:
        for attack in STAGES:

            def measure(spec=spec, eps=eps, attack=attack) -> Cell:
                subject = Subject(spec, 2 * samples, lambda model: model).part(slice(samples))

                def standing(batch_size: int, *parts: slice) -> list[bool]:
                    found = {}
                    for part in parts or (slice(None),):
                        some = subject.part(part)
                        result = some.attack(attack, "linf", "fast", eps=eps, batch_size=batch_size)
                        found.update(zip(some.ids, result.broken_by, strict=True))
                    return [found[name] is None for name in subject.ids]

                first = standing(64)
                others = {
                    "1": standing(1),
                    "7": standing(7),
                    "two halves": standing(64, slice(0, None, 2), slice(1, None, 2)),
                }
                counts = {
                    name: sum(a != b for a, b in zip(first, other, strict=True))
                    for name, other in others.items()
                }
                return {"robust": sum(first) / samples, "flips": counts}

            cell = cells.get(f"flips {spec} {eps} {attack} {samples}", measure)
            rows.append([spec, eps, attack, 100 * cell["robust"], *cell["flips"].values()])
    headers = ["model", "eps", "attack", "robust %", "batch size 1", "7", "two halves"]
    print(f"\nVerdicts that differ from those of batch size 64, of {samples} samples\n")
    print(tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="github"))


def bare(subject: Subject) -> tuple[float, float]:
    """Seconds a row of a forward pass, and of a forward and a backward pass."""
    images = subject.images[:BATCH]

    def forward() -> None:
        with torch.no_grad():
            subject.model(images)

    def both() -> None:
        points = images.clone().requires_grad_()
        torch.autograd.grad(subject.model(points).sum(), points)

    with using(subject.clip, subject.tower):
        for work in (forward, both):
            work()
        found = [statistics.median(timed(work)[0] for _ in range(15)) for work in (forward, both)]
    return found[0] / len(images), found[1] / len(images)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, default=Path("runs/bench-engine.jsonl"))
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--attack", choices=tuple(STAGES), default="apgd-pair")
    parser.add_argument("--model", choices=tuple(MODELS), action="append")
    parser.add_argument("--norm", choices=tuple(EPS), action="append")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.cells.unlink(missing_ok=True)
    arguments.cells.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(arguments.cells)
    parts = arguments.part or PARTS
    if "strength" in parts:
        names, norms = arguments.model or list(MODELS), arguments.norm or list(EPS)
        strength(cells, arguments.attack, names, norms, arguments.samples)
    if "speed" in parts:
        speed(cells, arguments.samples, arguments.rounds)
    if "overhead" in parts:
        overhead(cells, arguments.rounds)
    if "flips" in parts:
        flips(cells, 32)


if __name__ == "__main__":
    main()
