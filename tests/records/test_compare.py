"""Paired statistics keep the error rates that they state: on synthetic pairs, whose truth is known.

A trial is one pair of models on N samples; each sample is one of "both stand", "only a", "only b",
"neither" with fixed probabilities. Everything is seeded, and counted for all trials at once.
"""

import json
import re
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import binom, binomtest

from mmtard_bench.errors import InputError
from mmtard_bench.records.compare import compare
from mmtard_bench.records.schema import Record, SuiteFacts
from mmtard_bench.records.statistics import all_pairs, difference_interval, holm, mcnemar
from tests.conftest import REPOSITORY, Cli, assert_sentence
from tests.leaderboard.test_leaderboard import in_suite, made

TRIALS, N = 2000, 500
ENTRIES = REPOSITORY / "leaderboard" / "entries"


def drawn(both: float, only_a: float, only_b: float, size=TRIALS, n=N, seed=0) -> np.ndarray:
    """McNemar's tables: an array (4, *size) of both, only a, only b, neither."""
    shares = (both, only_a, only_b, 1 - both - only_a - only_b)
    return np.moveaxis(np.random.default_rng(seed).multinomial(n, shares, size), -1, 0)


def at_most(rate: float, trials: int) -> float:
    """The share of trials that an event of this rate stays below in 999 of 1,000 repetitions."""
    return binom.ppf(0.999, trials, rate) / trials


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    n = only_a + only_b
    expected = binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.3])
def test_equal_models_are_told_apart_in_at_most_one_of_twenty(discordant):
    _, only_a, only_b, _ = drawn(0.5, discordant / 2, discordant / 2)
    rate = (mcnemar(only_a, only_b) <= 0.05).mean()
    assert 0.001 < rate <= at_most(0.05, TRIALS)


def test_a_known_difference_is_found_as_often_as_computed():
    share_a, share_b = 0.13, 0.08  # five points
    _, only_a, only_b, _ = drawn(0.4, share_a, share_b)
    found = (mcnemar(only_a, only_b) <= 0.05).mean()
    # Directly: over the number of discordant samples, and how they fall.
    power = 0.0
    for discordant in range(N + 1):
        a = np.arange(discordant + 1)
        rejected = mcnemar(a, discordant - a) <= 0.05
        shares = binom.pmf(a, discordant, share_a / (share_a + share_b))
        power += binom.pmf(discordant, N, share_a + share_b) * shares[rejected].sum()
    assert 0.5 < power < 0.9
    assert found == pytest.approx(power, abs=0.035)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_agrees_with_its_definition(p):
    """A hypothesis falls if it and all smaller ones are below the level over what is left."""
    corrected = holm(p)
    for level in (0.01, 0.05, 0.3):
        order = sorted(range(len(p)), key=lambda i: p[i])
        fallen = set()
        for step, i in enumerate(order):
            if p[i] * (len(p) - step) > level:
                break
            fallen.add(i)
        assert {i for i, value in enumerate(corrected) if value <= level} == fallen


def test_holm_on_the_example_of_a_text_book():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)


def test_a_family_of_ten_nulls_has_a_false_finding_in_at_most_one_of_twenty():
    _, only_a, only_b, _ = drawn(0.4, 0.1, 0.1, size=(TRIALS, 10))
    p = mcnemar(only_a, only_b)
    wrong = np.array([(holm(family) <= 0.05).any() for family in p]).mean()
    assert 0.005 < wrong <= at_most(0.05, TRIALS)
    # Without the correction it would be far more: the test can fail.
    assert (p <= 0.05).any(1).mean() > 0.25


@pytest.mark.parametrize(
    ("both", "only_a", "only_b"),
    [(0.4, 0.1, 0.1), (0.4, 0.13, 0.08), (0.05, 0.02, 0.01), (0.9, 0.03, 0.02), (0.3, 0.2, 0.0)],
)
def test_the_interval_of_a_difference_covers_it(both, only_a, only_b):
    stand, a, b, _ = drawn(both, only_a, only_b)
    low, high = difference_interval(stand, a, b, N)
    covered = ((low <= only_a - only_b) & (only_a - only_b <= high)).mean()
    assert 0.93 <= covered <= 0.97


def test_the_interval_of_a_difference_is_the_published_one():
    """Fagerland, Lydersen and Laake (2014), airway hyper-responsiveness: 1, 1, 7 and 12 pairs."""
    low, high = difference_interval(1, 1, 7, 21)
    assert (low, high) == pytest.approx((-0.507, -0.026), abs=5e-4)


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(sum))
def test_the_interval_of_a_difference_holds_it_and_has_no_side(table):
    both, only_a, only_b, neither = table
    low, high = difference_interval(both, only_a, only_b, sum(table))
    assert -1 <= low <= (only_a - only_b) / sum(table) <= high <= 1
    assert difference_interval(both, only_b, only_a, sum(table)) == pytest.approx((-high, -low))
    assert difference_interval(neither, only_a, only_b, sum(table)) == pytest.approx((low, high))


def stands_of(verdicts: np.ndarray) -> list[dict[int, bool]]:
    return [dict(enumerate(row.tolist())) for row in verdicts]


def test_equal_models_are_separated_in_at_most_one_of_twenty_leaderboards():
    """Five equal models whose verdicts go together, as those of real models do."""
    random = np.random.default_rng(1)
    ease = random.uniform(0.1, 0.9, (500, 1, 200))
    verdicts = random.random((500, 5, 200)) < ease
    wrong = np.mean([all_pairs(stands_of(board)).better.any() for board in verdicts])
    assert 0 < wrong <= at_most(0.05, 500)


def test_all_pairs_are_what_single_tests_with_holm_say():
    random = np.random.default_rng(2)
    verdicts = random.random((6, 300)) < np.linspace(0.3, 0.6, 6)[:, None]
    better, compared = all_pairs(stands_of(verdicts))
    pairs = list(combinations(range(6), 2))
    p = holm(
        [
            mcnemar(*(np.sum(verdicts[x] & ~verdicts[y]) for x, y in ((i, j), (j, i))))
            for i, j in pairs
        ]
    )
    expected = np.zeros((6, 6), bool)
    for (i, j), value in zip(pairs, p, strict=True):
        ahead = (i, j) if verdicts[i].sum() > verdicts[j].sum() else (j, i)
        expected[ahead] = value <= 0.05
    assert 0 < expected.sum() < 15
    assert np.array_equal(better, expected)
    assert compared.all()


def test_models_without_common_samples_are_not_compared():
    first, second = dict.fromkeys(range(50), True), dict.fromkeys(range(50, 100), False)
    third = dict.fromkeys(range(25, 75), False)
    better, compared = all_pairs([first, second, third])
    assert not compared[0, 1]
    assert compared[0, 2]
    assert compared[1, 2]
    assert np.argwhere(better).tolist() == [[0, 2]]
    assert all_pairs([]).better.shape == (0, 0)


def test_fifty_models_take_no_time():
    verdicts = np.random.default_rng(3).random((50, 13_000)) < 0.5
    stands = stands_of(verdicts)
    start = time.perf_counter()
    all_pairs(stands)
    assert time.perf_counter() - start < 5


def shared(name: str, *outcomes: str, **changes: object) -> list[Record]:
    return [
        made(text, name, f"pgd-{i}", records=len(outcomes), **changes)
        for i, text in enumerate(outcomes, start=1)
    ]


def test_clean_each_threat_model_and_the_worst_case_are_compared():
    a, b = shared("a", "rrrbw", "rrbrw"), shared("b", "rrwbr", "rbwbr")
    found = {row.what: row for row in compare(a, b)}
    counts = {what: (row.a, row.b, row.only_a, row.only_b) for what, row in found.items()}
    assert counts == {
        "clean": (0.8, 0.8, 1, 1),
        "pgd-1 linf 8/255": (0.6, 0.6, 1, 1),
        "pgd-2 linf 8/255": (0.6, 0.4, 2, 1),
        "worst case linf 8/255": (0.4, 0.4, 1, 1),
    }
    assert {row.n for row in found.values()} == {5}
    low, high = found["pgd-2 linf 8/255"].interval
    assert low < 0 < 0.2 < high
    assert {row.better for row in found.values()} == {""}


def test_better_is_who_stands_alone_more_often_and_p_is_corrected():
    rows = compare(shared("a", "r" * 20), shared("b", "b" * 20))
    attacked = rows[1]
    assert (attacked.better, attacked.p, attacked.p_holm) == ("a", 2**-19, 2**-18)
    assert compare(shared("b", "b" * 20), shared("a", "r" * 20))[1].better == "b"
    assert rows[0].better == ""  # equal on clean images


def test_what_only_one_has_is_left_out():
    failed = made(
        "rrbb", "a", "pgd-2", records=2, status="error", error="x", results=None, samples=[]
    )
    a = [*shared("a", "rrbb"), failed]
    rows = compare(a, shared("b", "rbbb", "bbbb"))
    # The worst case over one shared threat model is that threat model.
    assert [row.what for row in rows] == ["clean", "pgd-1 linf 8/255"]
    assert rows[1].b == 0.25


def test_other_samples_suites_and_data_are_not_compared():
    a = shared("a", "rrbb")
    other_suite = SuiteFacts(name="other-v1", protocol=None, digest="2" * 64, records=1)
    other_data = a[0].task.model_copy(update={"revision": "another"})
    for changes in ({"suite": other_suite}, {"task": other_data}):
        with pytest.raises(InputError, match="nothing to compare"):
            compare(a, shared("b", "rrbb", **changes))
    with pytest.raises(InputError, match="on the same samples"):
        compare(a, shared("b", "rrbbb"))


def test_a_record_made_again_replaces_itself():
    times = (("rr", "2026-11-24T09:30:00+00:00"), ("rb", "2026-11-24T09:30:00.000001+00:00"))
    old, new = (made(o).model_copy(update={"created": time}) for o, time in times)
    assert compare([new, old], [old])[1].a == 0.5


def test_the_command_says_who_is_better_and_for_how_many_it_corrected(here: Cli, tmp_path):
    for name, outcomes in (("one", "r" * 30 + "bb"), ("two", "b" * 30 + "rr")):
        for record in shared(name, outcomes, outcomes):
            record.save(tmp_path / name / f"{record.threat.attack}.json")
    done = here("compare", "one", "two")
    assert done.returncode == 0, done.stderr
    assert "A: one (d)\nB: two (d)" in done.stdout
    lines = done.stdout.splitlines()
    row = next(line for line in lines if "worst case" in line)
    assert row.split()[-11:-8] == ["32", "93.8", "6.2"]
    assert row.endswith(" A")
    assert "+87.5 [" in row
    assert lines[-1] == (
        "At 5%, by McNemar's exact test with Holm's correction for 4 comparisons: A is better in 3 "
        "(t: pgd-1 linf 8/255, pgd-2 linf 8/255, worst case linf 8/255), no difference is shown in "
        "1."
    )
    body = json.loads(here("compare", "two", "one/pgd-2.json", "--json").stdout)
    assert body["b"] == {"name": "one", "digest": "d"}
    assert [row["better"] for row in body["comparisons"]] == ["", "b"]


def test_entries_are_compared(here: Cli):
    done = here("compare", ENTRIES / "student-mmt-ard", ENTRIES / "student-tecoa")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    found = re.search(
        r"for (\d+) comparisons: A is better in (\d+) .*digits-v1: digits/unseen: clean", said
    )
    assert found, said
    rows = [
        line for line in done.stdout.splitlines() if line.startswith(("curve-v1: ", "digits-v1: "))
    ]
    assert int(found[1]) >= 20
    assert int(found[1]) == len(rows)
    assert "no difference is shown in" in said


def test_bad_input_is_a_sentence(here: Cli, tmp_path):
    one, two = made("rb", "one"), made("rbb", "two")
    weights = two.model.model_copy(update={"digest": "e"})
    for folder, records in {
        "one": [one],
        "two": [two],
        "both": [one, in_suite(two, model=weights)],
    }.items():
        for i, record in enumerate(records):
            record.save(tmp_path / folder / f"{i}.json")
    assert_sentence(here("compare", "one", "both"), "2 models (one, two)", "Name the directory")
    assert_sentence(here("compare", "one", "two"), "nothing to compare")
    assert_sentence(here("compare", "one", "nowhere"), "There is no directory nowhere")
    assert_sentence(here("compare", "one", ENTRIES), "holds the records of 11 models")
