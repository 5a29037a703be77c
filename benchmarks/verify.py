"""Is an entry that overstates its robustness by 10 points caught as often as verify says?

An entry of the leaderboard is forged: of digits/digit in the ball linf 8/255, 50 of 500 samples
that its records call broken are called robust. ``verify --reattack 64`` draws 64 of those that it
then calls robust and attacks them; that is done 100 times with other seeds, for the forged entry
(another choice of 50 in every trial) and for the honest one.

What is random is the draw, by the function that verify uses, and the attack's seed. A sample's
verdict follows from its own seed and not from who else is attacked, so each sample is attacked
once with each of three seeds, and a trial takes one of the three for all its samples. The attack is
apgd-pair, the first two stages of the fast engine's autoattack-standard, which verify would take
here: what falls to the pair falls to both, and FAB and Square broke nothing in docs/engine.md.

    python benchmarks/verify.py --cells runs/verify.jsonl

What is measured is kept in the file of cells. About 10 minutes on a core.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

import mmtard_bench as mb
from mmtard_bench.entries.folder import Entry, read_entry
from mmtard_bench.reattack import Ball, attack_again, balls_of, chosen, data_of, suite_of, threat_of
from mmtard_bench.records import wilson
from mmtard_bench.resources import Resources
from mmtard_bench.verify.again import draw
from mmtard_bench.verify.bounds import allowed, caught

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
        data = chosen(data_of(record, suite_of(record)), [*ball.standing, *ball.broken])
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


def refused(standing: list[str], fell: list[set[str]], trial: int) -> bool:
    """Whether verify refuses an entry that calls these samples robust."""
    ids = draw(standing, DRAWN, seed=trial, where=f"{TASK} {BALL}")
    count = sum(name in fell[trial % len(fell)] for name in ids)
    return count > allowed(len(ids))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Are forged entries caught?")
    parser.add_argument("--cells", type=Path, default=Path("runs/verify.jsonl"))
    parser.add_argument("--entries", type=Path, default=Path("leaderboard/entries"))
    arguments = parser.parse_args()
    for model in MODELS:
        entry = read_entry(arguments.entries / model)
        records = [r for run in entry.runs if run.suite == "digits-v1" for r in run.records]
        (ball,) = [b for b in balls_of(records) if (b.task, b.name) == (TASK, BALL)]
        fell = fallen(entry, ball, arguments.cells)
        n = len(ball.records[0].samples)
        false = round(POINTS * n)
        again = [len(found & set(ball.standing)) for found in fell]
        stood = [len(set(ball.broken) - found) for found in fell]
        print(
            f"{model}: {len(ball.standing)} of {n} stand; of them fell with other seeds {again}; "
            f"of {len(ball.broken)} broken ones stood {stood}"
        )
        robust = len(ball.standing) + false
        forged = honest = 0
        for trial in range(TRIALS):
            lies = random.Random(trial).sample(ball.broken, false)
            forged += refused([*ball.standing, *lies], fell, trial)
            honest += refused(ball.standing, fell, trial)
        low, high = wilson(forged, TRIALS)
        print(
            f"  forged by {100 * POINTS:.0f} points: {forged} of {TRIALS} refused "
            f"[{low:.3f}, {high:.3f}]; verify says {caught(robust, DRAWN, false):.4f}"
        )
        low, high = wilson(honest, TRIALS)
        print(f"  honest: {honest} of {TRIALS} refused [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
