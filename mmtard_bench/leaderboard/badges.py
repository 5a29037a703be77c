"""Badges: what a reader should know about a row at a glance. Imports without torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from mmtard_bench import registry
from mmtard_bench.leaderboard.entries.verifications import Level, Verification
from mmtard_bench.records.black_box import includes_square, wants_check
from mmtard_bench.records.files import made_at
from mmtard_bench.records.schema import Record

MASKING = frozenset(
    {
        "batch-dependent-output",
        "black-box-beats-gradients",
        "coarse-logits",
        "dominant-dimension",
        "gradient-does-not-predict",
        "grid-dependent-output",
        "optimises-at-inference",
        "precision-dependent",
        "randomised-output",
        "robust-at-any-radius",
        "softmax-output",
        "square-beats-gradients",
        "unusual-logit-scale",
        "zero-gradients",
    }
)
"""Flags that are signs of gradient masking: gradients mislead attacks (Athalye et al., 2018)."""

Kind = Literal[
    "incomplete", "masking", "flag", "protocol", "broken", "verified", "unverified", "fact"
]


class Badge(NamedTuple):
    """A badge: ``text`` is a few words, ``detail`` explains them in a sentence."""

    kind: Kind
    text: str
    detail: str


LEVELS_MEAN: Mapping[Level, str] = {
    "reproduced": "a second run of the whole suite gave the same verdicts",
    "re-attacked": "a random draw of the robust samples stayed robust under another seed",
    "replayed": "the published weights give the recorded predictions on the clean images",
    "well-formed": "the records are complete and consistent; the model was not run",
}
"""What each level of verification means, from the strongest to the weakest."""
_INCOMPLETE = "a record of the suite is missing or failed, so the row has no place"
_MASKING = (
    "gradients may mislead the attacks, so the true robust accuracy may be lower; the row has no "
    "place"
)
_BROKEN = "a stronger attack broke these samples later; the worst case counts them as broken"
_UNVERIFIED = "nobody has verified these records yet"
_UNCHECKED = (
    "no attack without gradients checked the robust samples, so gradients that mislead the attacks "
    "may go unnoticed"
)
_DAY = "the day of the newest record"
_ENGINES = {
    "fast": "attacks that exist in both engines ran in this project's own code",
    "reference": "attacks that exist in both engines ran in the reference library",
}

LEGEND = (
    Badge("incomplete", "incomplete", _INCOMPLETE),
    Badge("masking", "gradient masking: …", _MASKING),
    Badge(
        "flag",
        "clean-accuracy-at-chance, …",
        "a warning of the evaluation that is no sign of gradient masking",
    ),
    Badge(
        "protocol",
        "no protocol, fewer samples, …",
        "the run follows no published protocol, or departs from it",
    ),
    Badge("broken", "9 samples broken since", _BROKEN),
    Badge("unverified", "no black-box check", _UNCHECKED),
    *(Badge("verified", level, meaning) for level, meaning in LEVELS_MEAN.items()),
    Badge("unverified", "not verified", _UNVERIFIED),
    Badge("fact", "made 2026-11-25", _DAY),
    *(Badge("fact", f"{engine} engine", meaning) for engine, meaning in _ENGINES.items()),
)
"""An example of every badge with its meaning, in the order in which a row shows them."""


def masks(records: Iterable[Record]) -> bool:
    """Whether a record has a sign of gradient masking. It counts for the whole row."""
    return any(flag.code in MASKING for record in records for flag in record.flags)


def badges(
    records: Sequence[Record],
    *,
    complete: bool,
    verified: Verification | None,
    broken: int,
    engine: str,
    samples: Mapping[str, int],
) -> tuple[Badge, ...]:
    """The badges of a row, in the order of ``LEGEND``.

    Args:
        records: The records of the row.
        complete: Whether the row has every record of its suite.
        verified: The highest verified level of the row, if any.
        broken: The number of samples that stronger attacks have broken since.
        engine: "fast" or "reference"; "" if no attack of the row exists in both.
        samples: The largest number of samples that any row has, by task.
    """
    return (
        *_doubts(records, complete),
        *_deviations(records, samples),
        *_broken(broken),
        *_unchecked(records),
        _level(verified),
        Badge("fact", f"made {newest(records)}", _DAY),
        *([Badge("fact", f"{engine} engine", _ENGINES[engine])] if engine else []),
    )


def _doubts(records: Sequence[Record], complete: bool) -> Iterable[Badge]:
    if not complete:
        yield Badge("incomplete", "incomplete", _INCOMPLETE)
    details = {flag.code: flag.detail for record in records for flag in record.flags}
    for code in sorted(details, key=lambda code: (code not in MASKING, code)):
        if code in MASKING:
            yield Badge("masking", f"gradient masking: {code}", f"{details[code]}; {_MASKING}")
        else:
            yield Badge("flag", code, details[code])


def _deviations(records: Sequence[Record], samples: Mapping[str, int]) -> Iterable[Badge]:
    suite = records[0].suite
    name = suite.protocol if suite else None
    if name is None:
        yield Badge("protocol", "no protocol", "the suite follows no published protocol")
    elif name not in registry.protocols:
        yield Badge("protocol", "unknown protocol", f"no protocol is registered as {name}")
    else:
        known = {threat.name for threat in registry.protocols.get(name).threats}
        foreign = sorted({record.threat.name for record in records} - known)
        if foreign:
            detail = f"{name} does not contain {', '.join(foreign)}"
            yield Badge("protocol", "foreign threat models", detail)
    changes = suite.name.split("+")[1:] if suite else []
    if changes:
        detail = f"options replaced values of the suite: {', '.join(changes)} (n: samples)"
        yield Badge("protocol", "suite changed", detail)
    for task, n in {r.task.name: len(r.samples) for r in records if r.results}.items():
        if n < samples[task]:
            detail = f"{n} of the {samples[task]} samples of {task}"
            yield Badge("protocol", "fewer samples", detail)


def _broken(count: int) -> Iterable[Badge]:
    if count:
        yield Badge("broken", f"{count} sample{'s' * (count > 1)} broken since", _BROKEN)


def _unchecked(records: Sequence[Record]) -> Iterable[Badge]:
    by_square = {
        (record.task.name, record.threat.ball)
        for record in records
        if includes_square(record.threat.attack)
    }
    due = [
        record
        for record in records
        if wants_check(
            record.threat.attack, record.threat.norm, record.task.metric, len(record.samples)
        )
        and (record.task.name, record.threat.ball) not in by_square
        and any(sample.robust for sample in record.samples)
    ]
    missing = sum(record.black_box is None for record in due)
    if missing:
        detail = f"{missing} of {len(due)} records: {_UNCHECKED}"
        yield Badge("unverified", "no black-box check", detail)


def _level(verified: Verification | None) -> Badge:
    if verified is None:
        return Badge("unverified", "not verified", _UNVERIFIED)
    meaning = LEVELS_MEAN[verified.level]
    detail = f"{meaning} (by {verified.by} with version {verified.version}: {verified.detail})"
    return Badge("verified", f"{verified.level} {verified.date}", detail)


def newest(records: Iterable[Record]) -> str:
    """The day of the newest record, such as 2026-11-24."""
    return max(map(made_at, records)).date().isoformat()
