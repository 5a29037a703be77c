"""Small leaderboards for the page."""

from pathlib import Path

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.entries.breaks import Break, Fallen
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.entries.folder import Entry, Run
from mmtard_bench.leaderboard.entries.verifications import Verification
from mmtard_bench.records.schema import Record, digest_of
from tests.leaderboard.test_leaderboard import in_suite, made

N = 40
RADII = ("2/255", "8/255", "16/255")


def records(name: str, *stand: int) -> list[Record]:
    """A model of whose samples so many stand at each of the radii."""
    found = []
    for eps, count in zip(RADII, stand, strict=True):
        record = made("r" * count + "b" * (N - count), name)
        threat = record.threat.model_copy(update={"eps": eps})
        facts = record.model.model_copy(update={"digest": digest_of(name)})
        found.append(in_suite(record, len(RADII), threat=threat, model=facts))
    return found


def entry(name: str, *stand: int, **facts: object) -> Entry:
    """An entry whose card nothing checks: ``facts`` may be what a card may not."""
    fields = {"name": name, "weights": name, "digest": digest_of(name), **facts}
    run = Run("quick-v1", "a" * 64, tuple(records(name, *stand)))
    return Entry(Card.model_construct(**fields), (run,), Path())


def verification(name: str, records: str = "a" * 64) -> Verification:
    return Verification(
        entry=name,
        suite="quick-v1",
        records=records,
        level="replayed",
        date="2026-11-20",
        version="1.0",
        by="A. Reader",
        detail="31 of 31 images",
    )


def stronger(name: str, count: int) -> Break:
    """An attack that breaks the first samples at the smallest radius."""
    fallen = Fallen(
        task="t",
        norm="linf",
        eps="2/255",
        surface="native",
        ids=[f"s/{i}" for i in range(count)],
    )
    return Break(
        entry=name,
        suite="quick-v1",
        model=digest_of(name),
        by="B. Breaker",
        paper="https://example.org/attack",
        date="2026-11-21",
        adversarials="b" * 64,
        images=None,
        fallen=[fallen],
    )


def board() -> Board:
    """Three entries, one of them verified and one broken, and a model without a card."""
    return Board(
        entries=[
            entry("strong", 39, 35, 30, paper="https://example.org/paper", licence="MIT"),
            entry("middling", 30, 12, 8),
            entry("weak", 10, 2, 0),
        ],
        loose=records("loose", 31, 11, 7),
        verifications=[verification("strong"), verification("middling", "c" * 64)],
        breaks=[stronger("weak", 4)],
    )
