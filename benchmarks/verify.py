"""Is an entry that overstates its robustness by 10 points caught as often as verify says?

An entry of the leaderboard is forged: of digits/digit in the ball linf 8/255, 50 of 500 samples
that its records call broken are called robust. ``verify --reattack 64`` draws 64 of those that it
then calls robust and attacks them; that is done 100 times with other seeds, for the forged entry
(another choice of 50 in every trial) and for the honest one.

What is random is the draw, by the function that verify uses, and the attack's seed. A sample's
verdict follows from its own seed and not from who else is attacked, so each sample is attacked
once with each of three seeds, and a trial takes one of the three for all its samples. The attack is
apgd-pair, the first two stages of the fast engine's autoattack-standard, which verify would take
here: what the pair breaks is broken for both, and FAB and Square broke nothing in
docs/explanation/engine.md.

First it prints what follows from the rules alone: how often an honest entry is refused, and how
often one that overstates one ball, or every ball, is, beside simpler rules. That takes seconds, and
with --rules nothing else is done.

    python benchmarks/verify.py --cells runs/verify.jsonl

What is measured is kept in the file of cells. About 10 minutes on a core.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom

import mmtard_bench as mb
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.sources import chosen, data_of, suite_of, threat_of
from mmtard_bench.leaderboard.entries.folder import Entry, read_entry
from mmtard_bench.leaderboard.verify.bounds import (
    HONEST,
    LEVEL,
    caught,
    limit_of_ball,
    limit_of_entry,
    size_of_second,
    unsuspicious,
)
from mmtard_bench.leaderboard.verify.reattacked import draw
from mmtard_bench.records.statistics import wilson
from mmtard_bench.records.worst import Ball, balls_of

MODELS = ("student-tecoa", "teacher-robust")
TASK, BALL, ATTACK = "digits/digit", "linf 8/255", "apgd-pair"
DRAWN, POINTS, TRIALS = 64, 0.10, 100
SEEDS = (101, 102, 103)


def fallen(entry: Entry, ball: Ball, cells: Path) -> list[set[str]]:
    """The ids of the samples right on clean images that fall with each seed."""
    known = [json.loads(line) for line in cells.read_text().splitlines()] if cells.exists() else []
    found = {cell["seed"]: cell for cell in known if cell["model"] == entry.card.digest}
    for seed in SEEDS:
        if seed in found:
            continue
        record = ball.strongest
        data = chosen(data_of(record, suite_of(record)), [*ball.robust, *ball.broken])
        threat = replace(threat_of(record), attack=ATTACK)
        clip, resources = mb.load_model(entry.card.weights), Resources(torch.device("cpu"))
        started = time.monotonic()
        outcomes = attack_again(clip, data, threat, resources, seed=seed)
        fell = sorted(outcome.id for outcome in outcomes if outcome.broken)
        found[seed] = {"model": entry.card.digest, "name": entry.card.name, "seed": seed}
        found[seed] |= {"fell": fell, "seconds": round(time.monotonic() - started, 1)}
        cells.parent.mkdir(parents=True, exist_ok=True)
        with cells.open("a") as file:
            file.write(json.dumps(found[seed]) + "\n")
    return [set(found[seed]["fell"]) for seed in SEEDS]


def refused(robust: list[str], fell: list[set[str]], trial: int, balls: int) -> bool:
    """Whether the draws of this ball refuse an entry that calls these samples robust."""
    where, broken = f"{TASK} {BALL}", fell[trial % len(fell)]
    ids = draw(robust, DRAWN, seed=trial, where=where)
    if len(broken & set(ids)) <= unsuspicious(len(ids)):
        return False
    rest = [name for name in robust if name not in ids]
    second = size_of_second(len(robust), len(ids))
    ids += draw(rest, second, seed=trial, where=f"{where}, second draw")
    return len(broken & set(ids)) > limit_of_ball(len(ids), balls)


def rules(balls: int = 26, n: int = 1000, robust: int = 500, trials: int = 100_000) -> None:
    """Print how often entries are refused by a level of 1% a ball, by Bonferroni's, by verify's.

    Each ball has n samples, of which ``robust`` are; 1% of those, or HONEST, another seed breaks.
    """
    random = np.random.default_rng(0)
    strict = next(t for t in range(DRAWN) if binom.sf(t, DRAWN, HONEST) <= LEVEL / balls)
    print(f"{balls} balls, {robust} of {n} robust, {DRAWN} drawn in each; refused, in percent:")
    print("1% for each ball, Bonferroni alone, verify:")
    for name, points in {
        "honest: another seed breaks 2% of each ball's": [None] * balls,
        "10 points in one ball": [0.10] + [0.0] * (balls - 1),
        "5 points in one ball": [0.05] + [0.0] * (balls - 1),
        "2 points in each ball": [0.02] * balls,
        "1 point in each ball": [0.01] * balls,
    }.items():
        lies = np.array([round(n * p) if p else 0 for p in points])
        claimed = robust + lies
        share = HONEST if points[0] is None else 0.01
        false = lies + np.round(share * robust).astype(int)
        second = np.array([size_of_second(int(c), DRAWN) for c in claimed])
        first = random.hypergeometric(false, claimed - false, DRAWN, (trials, balls))
        left = false - first
        more = random.hypergeometric(left, claimed - DRAWN - left, second)
        limits = np.array([limit_of_ball(DRAWN + int(s), balls) for s in second])
        ours = ((first > unsuspicious(DRAWN)) & (first + more > limits)).any(1)
        ours |= first.sum(1) > limit_of_entry(balls * DRAWN)
        shares = [(first > unsuspicious(DRAWN)).any(1), (first > strict).any(1), ours]
        cells = "  ".join(f"{100 * found.mean():5.1f}" for found in shares)
        print(f"{cells}  {name}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Are forged entries caught?")
    parser.add_argument("--cells", type=Path, default=Path("runs/verify.jsonl"))
    parser.add_argument("--entries", type=Path, default=Path("leaderboard/entries"))
    parser.add_argument("--rules", action="store_true", help="only what follows from the rules")
    arguments = parser.parse_args()
    rules()
    for model in MODELS if not arguments.rules else ():
        entry = read_entry(arguments.entries / model)
        balls = sum(len(balls_of(run.records)) for run in entry.runs)
        records = [r for run in entry.runs if run.suite == "digits-v1" for r in run.records]
        (ball,) = [b for b in balls_of(records) if (b.task, b.name) == (TASK, BALL)]
        fell = fallen(entry, ball, arguments.cells)
        n = len(ball.records[0].samples)
        false = round(POINTS * n)
        again = [len(found & set(ball.robust)) for found in fell]
        stood = [len(set(ball.broken) - found) for found in fell]
        print(
            f"{model}: {len(ball.robust)} of {n} robust; other seeds break {again} of them, "
            f"and leave {stood} of the {len(ball.broken)} broken ones robust"
        )
        robust = len(ball.robust) + false
        forged = honest = 0
        for trial in range(TRIALS):
            lies = random.Random(trial).sample(ball.broken, false)
            forged += refused([*ball.robust, *lies], fell, trial, balls)
            honest += refused(ball.robust, fell, trial, balls)
        low, high = wilson(forged, TRIALS)
        print(
            f"  forged by {100 * POINTS:.0f} points: {forged} of {TRIALS} refused "
            f"[{low:.3f}, {high:.3f}]; verify says {caught(robust, DRAWN, false, balls):.4f}"
        )
        low, high = wilson(honest, TRIALS)
        print(f"  honest: {honest} of {TRIALS} refused [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
