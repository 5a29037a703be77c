"""What a draw says: exact, so it can be counted."""

from math import comb
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st
from scipy.stats import binom

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.verify import reattacked as again
from mmtard_bench.leaderboard.verify.bounds import (
    HONEST,
    LEVEL,
    caught,
    limit_of_ball,
    limit_of_entry,
    most_false,
    unsuspicious,
)
from mmtard_bench.leaderboard.verify.reattacked import draw


def chance(robust: int, false: int, drawn: int, fell: int) -> float:
    """Of the subsets of a size, the share with so many false samples."""
    return comb(false, fell) * comb(robust - false, drawn - fell) / comb(robust, drawn)


@given(st.data())
def test_the_bound_covers_the_truth_in_95_of_100_draws(data):
    robust = data.draw(st.integers(1, 60))
    false = data.draw(st.integers(0, robust))
    drawn = data.draw(st.integers(1, robust))
    covered = sum(
        chance(robust, false, drawn, fell)
        for fell in range(max(0, drawn + false - robust), min(drawn, false) + 1)
        if most_false(robust, drawn, fell) >= false
    )
    assert covered >= 0.95 - 1e-9


@given(st.integers(1, 40), st.data())
def test_the_bound_is_the_least_that_covers(robust, data):
    drawn = data.draw(st.integers(1, robust))
    fell = data.draw(st.integers(0, drawn))
    bound = most_false(robust, drawn, fell)
    assert fell <= bound <= robust - drawn + fell

    def at_most(false: int) -> float:
        return sum(chance(robust, false, drawn, f) for f in range(min(fell, false) + 1))

    assert at_most(bound) > 0.05 or bound == fell
    if bound < robust - drawn + fell:
        assert at_most(bound + 1) <= 0.05 + 1e-9


def test_who_looks_at_all_knows():
    assert most_false(64, 64, 3) == 3
    assert most_false(0, 0, 0) == 0


def more_than(limit: int, drawn: int) -> float:
    """The probability that more than so many of a draw are broken, of an entry that is honest."""
    terms = (comb(drawn, f) * HONEST**f * (1 - HONEST) ** (drawn - f) for f in range(limit + 1))
    return 1 - sum(terms)


@given(st.integers(1, 300), st.integers(1, 100))
def test_the_tests_of_an_entry_share_the_level(drawn, balls):
    """Bonferroni's bound on the probability that any of them refuses an honest entry."""
    ball, entry = limit_of_ball(drawn, balls), limit_of_entry(balls * drawn)
    assert balls * more_than(ball, drawn) <= LEVEL / 2 + 1e-9
    assert ball == 0 or balls * more_than(ball - 1, drawn) > LEVEL / 2
    assert binom.sf(entry, balls * drawn, HONEST) <= LEVEL / 2
    assert unsuspicious(drawn) <= ball


@given(st.data(), st.integers(1, 30))
def test_the_chance_of_being_caught(data, balls):
    robust = data.draw(st.integers(1, 60))
    false = data.draw(st.integers(0, robust))
    drawn = data.draw(st.integers(1, robust))
    second = min(3 * drawn, robust - drawn)
    expected = 0.0
    for first in range(unsuspicious(drawn) + 1, min(drawn, false) + 1):
        if drawn - first > robust - false:
            continue
        for more in range(max(0, limit_of_ball(drawn + second, balls) - first + 1), second + 1):
            if more <= false - first and second - more <= robust - drawn - false + first:
                expected += chance(robust, false, drawn, first) * chance(
                    robust - drawn, false - first, second, more
                )
    assert abs(caught(robust, drawn, false, balls) - expected) < 1e-9


def test_what_64_draws_are_worth():
    """As docs/explanation/verification.md says it."""
    assert unsuspicious(64) == 4
    assert [limit_of_ball(256, balls) for balls in (1, 6, 26)] == [12, 13, 15]
    assert most_false(361, 64, 0) / 500 < 0.04
    # What the level for a whole entry costs where one ball is overstated: nothing.
    assert [round(caught(411, 64, 50, balls), 3) for balls in (1, 6, 26)] == [0.921] * 3


@pytest.fixture
def entry(monkeypatch):
    """Re-attack an entry whose samples are broken with given probabilities; is it refused?"""
    random = Random(0)
    monkeypatch.setattr(again, "places_of", lambda run: run.places)
    # The share covers both attacks of a re-attack.
    monkeypatch.setattr(again, "_threats", lambda ball, place: [place.threat])
    monkeypatch.setattr(again, "chosen", lambda share, ids: [(name, share) for name in ids])
    monkeypatch.setattr(
        again,
        "attack_again",
        lambda clip, some, *_, **__: [
            SimpleNamespace(id=name, broken=random.random() < share, before=0, label=0)
            for name, share in some
        ],
    )

    class Share(float):
        labels = range(500)

    def refused(shares, *, runs=1, seed):
        robust = [f"s{i}" for i in range(400)]
        places = [
            (
                SimpleNamespace(task=f"t{i}", name="linf 1/255", robust=robust),
                SimpleNamespace(threat=SimpleNamespace(attack="pgd-20"), data=Share(share)),
            )
            for i, share in enumerate(shares)
        ]
        size = len(places) // runs
        formed = [
            SimpleNamespace(suite=SimpleNamespace(name=f"r{i}"), places=places[i * size :][:size])
            for i in range(runs)
        ]
        try:
            lines = again.reattack(formed, None, None, count=64, seed=seed, tell=lambda _: None)
        except InputError as error:
            return "overstates its robustness" in str(error)
        assert len(lines) == runs
        return False

    return refused


@pytest.mark.parametrize("runs", [1, 2])
def test_an_honest_entry_of_26_balls_is_rarely_refused(entry, runs):
    """A level of 1% for each ball refused 21% of them. 10 of 300 have p = 0.0003 at 1%."""
    refused = sum(entry([HONEST] * 26, runs=runs, seed=seed) for seed in range(300))
    assert refused < 10


def test_one_ball_of_26_that_is_overstated_is_caught(entry):
    """By 12.5% of its samples: 93% of a draw of 64 have more than 4."""
    caught = sum(entry([0.125] + [0.01] * 25, seed=seed) for seed in range(50))
    assert caught >= 42


def test_a_little_everywhere_is_caught_too(entry):
    """5% of the samples in each ball: no ball gives it away, all together do."""
    assert sum(entry([0.05] * 26, seed=seed) for seed in range(20)) == 20


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_a_draw_follows_from_its_seed_alone(seed, count):
    ids = [f"s{i}" for i in range(20)]
    drawn = draw(ids, count, seed=seed, where="t linf 8/255")
    assert drawn == draw(ids, count, seed=seed, where="t linf 8/255")
    assert len(set(drawn)) == min(count, 20)
    assert set(drawn) <= set(ids)


def test_each_sample_is_as_likely():
    ids = [f"s{i}" for i in range(10)]
    seen = [name for seed in range(2000) for name in draw(ids, 3, seed=seed, where="t")]
    assert all(500 < seen.count(name) < 700 for name in ids)
