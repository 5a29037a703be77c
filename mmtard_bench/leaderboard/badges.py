"""What a reader should know about a row at a glance. Imports without torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from mmtard_bench import registry
from mmtard_bench.leaderboard.entries.verifications import Verification
from mmtard_bench.records.files import made_at
from mmtard_bench.records.schema import Record

MASKING = frozenset(
    {
        "batch-dependent-output",
        "optimises-at-inference",
        "randomised-output",
        "softmax-output",
        "square-beats-gradients",
        "unusual-logit-scale",
        "zero-gradients",
    }
)
"""Flags of ``attacks.checks``: signs that gradients mislead attacks (Athalye et al., 2018)."""


class Badge(NamedTuple):
    """``text`` is a few words, ``detail`` what they mean."""

    kind: Literal["incomplete", "masking", "flag", "protocol", "lowered", "verified", "age"]
    text: str
    detail: str


def badges(
    records: Sequence[Record],
    *,
    complete: bool,
    verified: Verification | None,
    lowered: Sequence[int],
    samples: Mapping[str, int],
) -> tuple[Badge, ...]:
    """The badges of a row, from what speaks most against it to what is only good to know.

    ``lowered`` counts the samples that each stronger attack broke; ``samples`` is how many each
    task has in other rows.
    """
    return (
        *_doubts(records, complete),
        *_deviations(records, samples),
        *_lowered(lowered),
        _level(verified),
        _age(records),
    )


def _doubts(records: Sequence[Record], complete: bool) -> Iterable[Badge]:
    if not complete:
        yield Badge("incomplete", "incomplete", "a record of the suite is missing or failed")
    details = {flag.code: flag.detail for record in records for flag in record.flags}
    for code in sorted(details, key=lambda code: (code not in MASKING, code)):
        if code in MASKING:
            yield Badge("masking", f"gradient masking: {code}", details[code])
        else:
            yield Badge("flag", code, details[code])


def _deviations(records: Sequence[Record], samples: Mapping[str, int]) -> Iterable[Badge]:
    suite = records[0].suite
    name = suite.protocol if suite else None
    if name is None:
        yield Badge("protocol", "no protocol", "the suite follows rules of its own")
    elif name not in registry.protocols:
        yield Badge("protocol", "unknown protocol", f"no protocol {name} is registered")
    else:
        known = {threat.name for threat in registry.protocols.get(name).threats}
        foreign = sorted({record.threat.name for record in records} - known)
        if foreign:
            detail = f"{name} does not have {', '.join(foreign)}"
            yield Badge("protocol", "foreign threat models", detail)
    changes = suite.name.split("+")[1:] if suite else []
    if changes:
        detail = f"not as the suite has it: {', '.join(changes)} (n: samples)"
        yield Badge("protocol", "suite changed", detail)
    for task, n in {r.task.name: len(r.samples) for r in records if r.results}.items():
        if n < samples[task]:
            detail = f"{n} of the {samples[task]} samples of {task}"
            yield Badge("protocol", "fewer samples", detail)


def _lowered(counts: Sequence[int]) -> Iterable[Badge]:
    if counts:
        text = f"lowered by {sum(counts)} sample{'s' * (sum(counts) > 1)}"
        yield Badge("lowered", text, "broken since by a stronger attack, in the worst case alone")


def _level(verified: Verification | None) -> Badge:
    if verified is None:
        return Badge("verified", "not verified", "nobody else has checked these records yet")
    detail = f"by {verified.by} with version {verified.version}: {verified.detail}"
    return Badge("verified", f"{verified.level} {verified.date}", detail)


def _age(records: Sequence[Record]) -> Badge:
    return Badge("age", f"made {newest(records)}", "the day of the newest record")


def newest(records: Iterable[Record]) -> str:
    """The day of the newest record, such as 2026-11-24."""
    return max(map(made_at, records)).date().isoformat()
