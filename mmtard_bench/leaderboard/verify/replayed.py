"""Level "replayed": a clean pass over every sample, checks of the model, and stored images."""

from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import ModelCode
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.verify.images import Adversarials, replay_stack
from mmtard_bench.leaderboard.verify.well_formed import Formed, Place
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.recall import CUTOFFS
from mmtard_bench.records.schema import Flag, Sample
from mmtard_bench.records.worst import balls_of
from mmtard_bench.tasks.prompts import understood
from mmtard_bench.tasks.retrieval import RetrievalScorer

BORDERLINE = 0.005
"""The share of samples whose prediction may differ by rounding on another machine; at least one."""

Answer = tuple[object, ...]
"""What is compared for a sample between a record and a clean pass."""


def replay(formed: Formed, clip: Clip, resources: Resources) -> str:
    """Compare every record with a clean pass and with the checks of the model.

    Returns:
        A summary of the comparison.

    Raises:
        InputError: If a record has another configuration than the model, if the predictions of
            more than BORDERLINE of its samples differ, or if it lacks a flag.
    """
    groups: dict[tuple[str, str], list[Place]] = defaultdict(list)
    for place in formed.places:
        groups[place.data.task.name, place.threat.surface].append(place)
    most, samples = 0, 0
    for group in groups.values():
        first = group[0]
        for place in group:
            _require_identity(place, formed, clip)
        data = understood(clip, first.data)
        with full_float32():
            bench = Bench(clip, data, first.threat.surface, resources)
            answers, doubts = _answers(bench), bench.inspect()
        samples += len(answers)
        for place in group:
            _require_flags(place, doubts)
            most = max(most, _differing(place, answers))
    return f"{samples} clean predictions, at most {most} of a record differ"


def borderline(n: int) -> int:
    """The number of samples, of n, whose prediction may differ."""
    return max(1, int(BORDERLINE * n))


def _require_identity(place: Place, formed: Formed, clip: Clip) -> None:
    job = prepare(
        clip,
        place.data,
        place.threat,
        seed=formed.suite.seed,
        suite=formed.suite,
        engine=place.engine,
    )
    model, task, _ = job.facts
    if model.parameters != place.record.model.parameters:
        raise InputError(
            f"{place.name}: the record says {place.record.model.parameters} parameters; these "
            f"weights have {model.parameters}."
        )
    if job.identity == place.record.identity:
        return
    what = "the preprocessing"
    if task.prompts_digest != place.record.task.prompts_digest:
        what = "the prompts"
    elif model.preprocessing == place.record.model.preprocessing:
        what = "the configuration"
    raise InputError(
        f"{place.name}: {what} of the record differs from that of these weights in this version. "
        "Run the suite again."
    )


def _require_flags(place: Place, doubts: Sequence[Flag]) -> None:
    given = {flag.code for flag in place.record.flags if flag.code in get_args(ModelCode)}
    missing = [doubt for doubt in doubts if doubt.code not in given]
    if missing:
        raise InputError(
            f"{place.name}: the record lacks the flag '{missing[0].code}', which the model gets: "
            f"{missing[0].detail}."
        )


def _answers(bench: Bench) -> list[Answer]:
    """For each sample its prediction; in retrieval, the cutoffs k that its ranks are within.

    Ranks are not compared directly: rounding changes them too often.
    """
    verdicts, scorer = bench.clean(), bench.scorer
    if not isinstance(scorer, RetrievalScorer):
        return [(verdict.prediction,) for verdict in verdicts]
    ids = bench.data.manifest.ids
    pairs = zip(ids, verdicts, strict=True)
    captions = scorer.caption_ranks({name: (v.embedding, v.embedding) for name, v in pairs})
    return [
        _recalled(verdict.rank or 0, [(place, rank) for place, rank, _ in captions[name]])
        for name, verdict in zip(ids, verdicts, strict=True)
    ]


def _answer_of(sample: Sample) -> Answer:
    if sample.ranks is None:
        return (sample.prediction,)
    ranks = sample.ranks
    return _recalled(ranks.image[0], [(place, rank) for place, rank, _ in ranks.captions])


def _recalled(image: int, captions: Sequence[tuple[int, int]]) -> Answer:
    counted = tuple((place, tuple(rank <= k for k in CUTOFFS)) for place, rank in captions)
    return tuple(image <= k for k in CUTOFFS), counted


def _differing(place: Place, answers: Sequence[Answer]) -> int:
    samples = place.record.samples
    pairs = zip(samples, answers, strict=True)
    wrong = [sample.id for sample, answer in pairs if _answer_of(sample) != answer]
    if len(wrong) > borderline(len(samples)):
        raise InputError(
            f"{place.name}: for {len(wrong)} of {len(samples)} clean images the record has "
            f"another answer than the model, '{wrong[0]}' for example; at most "
            f"{borderline(len(samples))} may differ by rounding."
        )
    return len(wrong)


def require_model(file: Adversarials, card: Card) -> None:
    """Raise InputError if the images were made for other weights than the card's."""
    if file.contents.model != card.digest:
        raise InputError(
            f"{file.path} has images for the weights {file.contents.model[:16]}, but those of "
            f"'{card.name}' are {card.digest[:16]}."
        )


def replay_images(
    formed: Formed, card: Card, file: Adversarials, clip: Clip, resources: Resources
) -> str:
    """Classify every stored adversarial image of a run.

    Returns:
        A summary.

    Raises:
        InputError: If the file is not the one that the card names, if an image is outside its ball
            or the box [0, 1], if an image breaks a sample that the entry calls robust, or if more
            than BORDERLINE of the images of a stack do not break their sample.
    """
    require_model(file, card)
    if card.adversarials != file.digest:
        raise InputError(
            f"{file.path} is not the file of the entry '{card.name}': its SHA-256 is "
            f"{file.digest[:16]}, the card says {(card.adversarials or 'none')[:16]}."
        )
    balls = {
        (ball.task, threat.norm, threat.eps, threat.surface): (ball, place.data)
        for ball in balls_of(formed.run.records)
        if not ball.edits
        for place in formed.places
        if place.data.task.name == ball.task
        for threat in [ball.strongest.threat]
    }
    images = unbroken = 0
    for place, stack in enumerate(file.contents.stacks):
        if stack.suite != formed.suite.name:
            continue
        where = f"{file.path}, {stack.name}"
        key = (stack.task, stack.norm, stack.eps, stack.surface)
        if key not in balls:
            raise InputError(f"{where}: {stack.suite} has no such task and ball.")
        ball, data = balls[key]
        found = replay_stack(file, place, data, clip, resources)
        robust = set(found.broken) & set(ball.robust)
        if found.outside:
            raise InputError(f"{where}: the image of '{found.outside[0]}' is outside the ball.")
        if robust:
            raise InputError(f"{where}: breaks '{min(robust)}', which the entry calls robust.")
        if len(found.unbroken) > borderline(len(stack.ids)):
            raise InputError(
                f"{where}: {len(found.unbroken)} of {len(stack.ids)} images do not break their "
                f"sample, '{found.unbroken[0]}' for example."
            )
        images += len(stack.ids)
        unbroken += len(found.unbroken)
    return f"{images} adversarial images in ball and box, {unbroken} of them break nothing"
