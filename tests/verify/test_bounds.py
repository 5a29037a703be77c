"""What a draw says: exact, so it can be counted."""

from math import comb

from hypothesis import given, strategies as st

from mmtard_bench.verify.again import draw
from mmtard_bench.verify.bounds import HONEST, LEVEL, allowed, caught, most_false


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


@given(st.integers(1, 300))
def test_an_honest_entry_is_rarely_refused(drawn):
    def more_than(t: int) -> float:
        return 1 - sum(
            comb(drawn, f) * HONEST**f * (1 - HONEST) ** (drawn - f) for f in range(t + 1)
        )

    assert more_than(allowed(drawn)) <= LEVEL + 1e-9
    assert allowed(drawn) == 0 or more_than(allowed(drawn) - 1) > LEVEL


@given(st.data())
def test_the_chance_of_being_caught(data):
    robust = data.draw(st.integers(1, 60))
    false = data.draw(st.integers(0, robust))
    drawn = data.draw(st.integers(1, robust))
    expected = sum(
        chance(robust, false, drawn, fell)
        for fell in range(allowed(drawn) + 1, min(drawn, false) + 1)
    )
    assert abs(caught(robust, drawn, false) - expected) < 1e-9


def test_what_64_draws_are_worth():
    """As CONTRIBUTING says it."""
    assert allowed(64) == 4
    assert most_false(361, 64, 0) / 500 < 0.04
    assert caught(411, 64, 50) > 0.92


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
