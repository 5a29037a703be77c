"""Record a stronger attack: images that break samples which an entry calls robust."""

from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.files import write_atomically
from mmtard_bench.leaderboard.entries.breaks import Break, Fallen, after_breaks, read_breaks
from mmtard_bench.leaderboard.entries.folder import Entry, Run
from mmtard_bench.leaderboard.verify.images import Adversarials, Stack, replay_stack
from mmtard_bench.leaderboard.verify.levels import failures_of, today
from mmtard_bench.leaderboard.verify.replayed import require_model
from mmtard_bench.leaderboard.verify.weights import load_weights
from mmtard_bench.leaderboard.verify.well_formed import Formed, require_formed
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.worst import Ball, balls_of, worst_cases
from mmtard_bench.text import slug


def break_entry(
    entry: Entry,
    file: Adversarials,
    resources: Callable[[], Resources],
    *,
    by: str,
    paper: str | None,
    images: str | None,
    weights: str | None,
    tell: Callable[[str], None],
) -> list[Path]:
    """Replay a file of adversarial images and record, beside the entries, the samples they break.

    A sample counts if the worst case of a ball calls it robust and no earlier break names it. An
    image in a ball also lies in every larger ball. Images outside their ball, and images that
    break nothing, are left out with a message.

    Args:
        entry: The entry under attack.
        file: The adversarial images.
        resources: Makes the device and batch size.
        by: Who found the images.
        paper: Where the attack is described; None if nowhere.
        images: Where others find the file; None if nowhere.
        weights: A model spec to load instead of the card's weights.
        tell: Receives progress messages.

    Returns:
        The files that were written.

    Raises:
        InputError: If the images were made for other weights, or if no further sample is broken.
    """
    card = entry.card
    require_model(file, card)
    folder = entry.place.resolve().parent.parent / "breaks"
    known = read_breaks(folder)
    formed = [require_formed(run) for run in entry.runs]
    written = []
    with failures_of(entry):
        clip = load_weights(card, weights)
        for run in formed:
            robust = _robust(known, run.run)
            fallen = _fallen(run, file, clip, resources(), robust, tell)
            if not fallen:
                continue
            found = Break(
                entry=card.name,
                suite=run.suite.name,
                model=card.digest,
                by=by,
                paper=paper,
                date=today(),
                adversarials=file.digest,
                images=images,
                fallen=fallen,
            )
            written.append(_free_name(folder, f"{card.name}--{slug(by).lower()}"))
            write_atomically(written[-1], found.model_dump_json(indent=1) + "\n")
    if not written:
        raise InputError(
            f"No image of {file.path} breaks a sample that '{card.name}' calls robust and that "
            "no earlier break names, so nothing is recorded."
        )
    return written


def _fallen(
    run: Formed,
    file: Adversarials,
    clip: Clip,
    resources: Resources,
    robust: dict[tuple[str, str], set[str]],
    tell: Callable[[str], None],
) -> list[Fallen]:
    data = {place.data.task.name: place.data for place in run.places}
    balls = balls_of(run.run.records)
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for place, stack in enumerate(file.contents.stacks):
        around = [ball for ball in balls if stack.suite == run.suite.name and _holds(ball, stack)]
        if not around:
            continue
        seen = replay_stack(file, place, data[stack.task], clip, resources)
        tell(
            f"{stack.name}: {len(seen.broken)} of {len(stack.ids)} images break their sample; "
            f"{len(seen.outside)} are outside the ball or box, {len(seen.unbroken)} break nothing"
        )
        for ball in around:
            key = (ball.task, ball.name)
            found[key] |= set(seen.broken) & robust[key]
    fallen = []
    for ball in balls:
        ids = found[ball.task, ball.name]
        if not ids:
            continue
        threat = ball.strongest.threat
        assert threat.norm != "levenshtein"
        left = len(robust[ball.task, ball.name])
        tell(f"{ball.task} {ball.name}: {len(ids)} of {left} robust samples are broken")
        fallen.append(
            Fallen(
                task=ball.task,
                norm=threat.norm,
                eps=threat.eps,
                surface=threat.surface,
                ids=sorted(ids),
            )
        )
    return fallen


def _holds(ball: Ball, stack: Stack) -> bool:
    """Whether the ball of a stack lies inside ``ball``."""
    return not ball.edits and stack.is_in(ball.task, ball.strongest.threat)


def _robust(known: list[Break], run: Run) -> dict[tuple[str, str], set[str]]:
    """The robust samples of a run by task and ball, without those that earlier breaks name."""
    model = run.records[0].model.digest
    mine = [each for each in known if each.model == model and each.suite == run.suite]
    cases, _ = after_breaks(worst_cases(run.records), mine)
    return {
        (case.task, case.ball): {name for name, verdict in case.robust.items() if verdict}
        for case in cases
    }


def _free_name(folder: Path, stem: str) -> Path:
    """The first name of ENTRY--WHO.json, ENTRY--WHO-2.json, ... that is free."""
    names = (f"{stem}{'' if i == 1 else f'-{i}'}.json" for i in count(1))
    return next(folder / name for name in names if not (folder / name).exists())
