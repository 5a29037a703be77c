"""What a leaderboard shows follows from its records, and from what others found out about them."""

import ast
from pathlib import Path

import numpy as np
import pytest

from mmtard_bench import registry
from mmtard_bench.errors import InputError
from mmtard_bench.files import suite_folder
from mmtard_bench.leaderboard.badges import LEGEND, MASKING
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.entries.breaks import Break, Fallen
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.entries.folder import Entry, Run
from mmtard_bench.leaderboard.entries.verifications import LEVELS, Verification
from mmtard_bench.leaderboard.markdown import render
from mmtard_bench.leaderboard.rows import Row
from mmtard_bench.leaderboard.standings import SUITES, SuiteStandings, standings
from mmtard_bench.records.black_box import FEWEST, BlackBox
from mmtard_bench.records.compare import compare
from mmtard_bench.records.schema import Flag, Record, SuiteFacts, digest_of
from mmtard_bench.records.statistics import mean_accuracy, wilson
from mmtard_bench.records.worst import worst_cases
from mmtard_bench.types import FAST_CODE
from tests.conftest import REPOSITORY
from tests.leaderboard.test_leaderboard import in_suite, made, on
from tests.records.test_records import retrieval_record

RUN = "7" * 64


def entry_of(*records: Record, name: str = "m") -> Entry:
    card = Card(name=name, weights="hf-hub:me/it", digest=name)
    return Entry(card, (Run("quick-v1", RUN, records),), Path(name))


def a_break(*ids: str, eps: str = "8/255", day: int = 1, model: str = "m", **changes: str) -> Break:
    facts = {"task": "t", "norm": "linf", "eps": eps, "surface": "native", **changes}
    return Break(
        entry="m",
        suite="quick-v1",
        model=model,
        by=f"who {day}",
        paper=None,
        date=f"2026-12-0{day}",
        adversarials="0" * 64,
        images=None,
        fallen=[Fallen(ids=list(ids), **facts)],
    )


def at(eps: str, outcomes: str, records: int = 2) -> Record:
    record = made(outcomes, records=records)
    threat = record.threat.model_copy(update={"eps": eps})
    return in_suite(record, records, threat=threat)


def only(board: Board) -> tuple[SuiteStandings, Row]:
    (suite,) = standings(board)
    (row,) = suite.rows
    return suite, row


def test_what_a_stronger_attack_broke_counts_in_every_ball_that_holds_it():
    records = [at("8/255", "rrrrb"), at("4/255", "rrrrr")]
    board = Board(entries=[entry_of(*records)], breaks=[a_break("s/0", "s/1", "s/4", eps="4/255")])
    suite, row = only(board)
    assert {ball: worst.value for ball, worst in row.worst.items()} == {
        "linf 4/255": 0.4,
        "linf 8/255": 0.4,
    }
    cells = row.tasks["t"]
    assert cells.worst["linf 8/255"].interval == wilson(2, 5)
    # Its own columns stay as they are, so the worst case gets one although it has one attack.
    assert cells.robust["pgd-5 linf 8/255"].value == 0.8
    assert suite.joint["t"] == ["linf 4/255", "linf 8/255"]
    # Sample 4 stood in the smaller ball only.
    assert [(c.by, c.samples) for c in row.credits] == [("who 1", 3)]
    page = render(board)
    assert "- m: 3 samples by who 1, 2026-12-01" in page
    assert "3 samples broken since" in next(x for x in page.splitlines() if x.startswith("| 1 "))


@pytest.mark.parametrize(
    "changes",
    [{"eps": "9/255"}, {"norm": "l2"}, {"surface": "model"}, {"task": "u"}, {"model": "another"}],
)
def test_what_fell_outside_of_a_ball_or_of_other_weights_does_not_count(changes):
    board = Board(entries=[entry_of(made("rrrb"))], breaks=[a_break("s/0", **changes)])
    suite, row = only(board)
    assert row.worst["linf 8/255"].value == 0.75
    assert row.credits == ()
    assert suite.joint["t"] == []


def test_who_broke_a_sample_first_has_the_credit():
    breaks = [
        a_break("s/0", "s/1", day=3),
        a_break("s/1", "s/3", day=2),  # s/3 had fallen to the record's own attack
        a_break("s/0", day=4),
    ]
    _, row = only(Board(entries=[entry_of(made("rrrb"))], breaks=breaks))
    assert [(c.date, c.samples) for c in row.credits] == [("2026-12-02", 1), ("2026-12-03", 1)]
    assert row.worst["linf 8/255"].value == 0.25


def test_a_break_moves_a_model_down():
    fell = [f"s/{i}" for i in range(30)]
    entries = [entry_of(made("r" * 40, "m")), entry_of(made("r" * 20 + "b" * 20, "n"), name="n")]
    (suite,) = standings(Board(entries=entries))
    assert [(row.model, row.place) for row in suite.rows] == [("m", 1), ("n", 2)]
    (suite,) = standings(Board(entries=entries, breaks=[a_break(*fell)]))
    assert [row.model for row in suite.rows] == ["n", "m"]


def test_models_share_a_place_where_they_cannot_be_told_apart():
    n, models = 100, {"best": 90, "second": 45, "third": 43, "last": 10}
    outcomes = {name: "r" * good + "b" * (n - good) for name, good in models.items()}
    outcomes["third"] = "b" * 5 + "r" * 43 + "b" * 52
    records = [made(text, name) for name, text in outcomes.items()]
    partial = made("r" * n, "partial", records=2)
    (suite,) = standings(Board(loose=records))
    assert [(row.model, row.place) for row in suite.rows] == [
        ("best", 1),
        ("second", 2),
        ("third", 2),
        ("last", 4),
    ]
    (suite,) = standings(Board(loose=[*records, partial]))
    assert (suite.rows[-1].model, suite.rows[-1].place) == ("partial", None)
    assert [row.place for row in suite.rows[:-1]] == [1, 2, 2, 4]


def test_places_pool_the_samples_of_all_tasks():
    """Neither task alone tells them apart, both together do."""

    def board(*tasks: str) -> list[int | None]:
        records = [
            in_suite(
                record := made(text, name, records=len(tasks)),
                len(tasks),
                task=record.task.model_copy(update={"name": task}),
            )
            for name, text in (("a", "r" * 5 + "b" * 5), ("b", "b" * 10))
            for task in tasks
        ]
        (suite,) = standings(Board(loose=records))
        return [row.place for row in suite.rows]

    assert board("one") == [1, 1]
    assert board("one", "two") == [1, 2]


def test_without_common_samples_the_figure_decides():
    other = made("rrrb", "other")
    samples = [s.model_copy(update={"id": f"x/{i}"}) for i, s in enumerate(other.samples)]
    ids = digest_of([s.id for s in samples])
    other = in_suite(other, samples=samples, sample_ids_digest=ids)
    (suite,) = standings(Board(loose=[made("rrbb"), other]))
    assert [(row.model, row.place) for row in suite.rows] == [("other", 1), ("m", 2)]


def test_an_average_of_one_task_has_its_interval():
    for k in (0, 30, 100):
        value, interval = mean_accuracy([k / 100], [100])
        assert value == k / 100
        assert interval == pytest.approx(wilson(k, 100), abs=1e-12)


def test_of_tasks_with_equally_many_samples_the_interval_is_that_of_the_pool():
    assert mean_accuracy([0.2, 0.6], [50, 50]).interval == pytest.approx(wilson(40, 100))


@pytest.mark.parametrize(
    ("shares", "sizes"),
    [
        ([0.5, 0.6], [500, 500]),
        ([0.02, 0.01, 0.3], [500] * 3),
        ([0.7, 0.9, 0.2, 0.4], [1000, 100, 300, 50]),
        ([0.001] * 13, [1000] * 13),
        ([0.5, 0.01], [50, 1000]),
        ([0.99, 0.05, 0.95, 0.5], [200] * 4),
    ],
)
def test_the_interval_of_an_average_covers_it(shares, sizes):
    random = np.random.default_rng(0)
    trials = random.binomial(sizes, shares, (1000, len(shares)))
    covered = 0
    for counts in trials.tolist():
        parts = [k / n for k, n in zip(counts, sizes, strict=True)]
        low, high = mean_accuracy(parts, sizes).interval
        covered += low <= np.mean(shares) <= high
    assert covered >= 930, covered


def test_masking_is_every_doubt_of_the_checks():
    codes = {
        node.keywords[0].value.value
        for path in (REPOSITORY / "mmtard_bench").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Flag"
    }
    # A few unconfirmed images come from rounding; the others are of clean accuracy.
    others = {"unconfirmed-adversarials", "clean-accuracy-at-chance", "equal-class-embeddings"}
    assert codes == MASKING | others


def badge_texts(*records: Record, **board: object) -> list[str]:
    _, row = only(Board(entries=[entry_of(*records)], **board))
    return [badge.text for badge in row.badges]


def test_badges_say_what_speaks_against_a_row():
    flags = [Flag(code=code, detail="x") for code in ("unconfirmed-adversarials", "zero-gradients")]
    assert badge_texts(made("rb", records=2, flags=flags)) == [
        "incomplete",
        "gradient masking: zero-gradients",
        "unconfirmed-adversarials",
        "unknown protocol",
        "not verified",
        "made 2026-11-24",
    ]


def test_the_legend_explains_every_badge():
    """Of rows of all kinds, in the order in which a row shows them."""
    known = [badge.kind for badge in LEGEND]
    assert {badge.text for badge in LEGEND if badge.kind == "verified"} == set(LEVELS)
    flags = [Flag(code=code, detail="x") for code in ("unconfirmed-adversarials", "zero-gradients")]
    parameters = {"code": f"{FAST_CODE} 1"}
    threat = made("rb").threat.model_copy(update={"parameters": parameters})
    record = made("rrb", records=2, flags=flags, threat=threat)
    cases = [Board(loose=[record]), Board(entries=[entry_of(made("rrb"))], breaks=[a_break("s/0")])]
    shown = [only(board)[1].badges for board in cases]
    for row in shown:
        assert {badge.kind for badge in row} <= set(known)
        assert [badge.kind for badge in row] == sorted((b.kind for b in row), key=known.index)
        assert all(badge.detail for badge in row)
    texts = {badge.text: badge.detail for row in shown for badge in row}
    assert "fast engine" in texts
    meanings = {badge.text: badge.detail for badge in LEGEND}
    assert texts["1 sample broken since"] == meanings["9 samples broken since"]


def test_suites_stand_in_the_declared_order_and_others_follow_by_name():
    shipped = {path.stem for path in suite_folder().glob("*.toml")}
    assert set(SUITES) == shipped
    names = ["a-v1", "curve-v1", "digits-v1", "digits-v1+n4", "zeroshot13-v1"]
    records = [made("rb", suite=suite_facts(None, name)) for name in names]
    found = [suite.name for suite in standings(Board(loose=records))]
    assert found == ["zeroshot13-v1", "digits-v1", "curve-v1", "a-v1", "digits-v1+n4"]


def suite_facts(protocol: str | None, name: str = "quick-v1") -> SuiteFacts:
    return SuiteFacts(name=name, protocol=protocol, digest="1" * 64, records=1)


def test_badges_say_how_a_run_departs_from_its_protocol():
    threat = registry.protocols.get("mmtard-curve-v1").threats[0]
    known = made("rb", attack=threat.attack, suite=suite_facts("mmtard-curve-v1"))
    known = in_suite(
        known,
        suite=known.suite,
        threat=known.threat.model_copy(update={"eps": str(threat.eps)}),
    )
    usual = ["not verified", "made 2026-11-24"]
    assert badge_texts(known) == usual
    assert badge_texts(made("rb", suite=suite_facts("mmtard-curve-v1"))) == [
        "foreign threat models",
        *usual,
    ]
    assert badge_texts(made("rb", suite=suite_facts(None, "quick-v1+n2"))) == [
        "no protocol",
        "suite changed",
        *usual,
    ]


def test_a_badge_says_that_robust_samples_were_not_checked_without_gradients():
    verdicts = "r" * FEWEST
    badge = "no black-box check"
    assert badge in badge_texts(made(verdicts, attack="pgd-20"))
    assert badge not in badge_texts(made("b" * FEWEST, attack="pgd-20"))
    assert badge not in badge_texts(made(verdicts[1:], attack="pgd-20"))
    checked = BlackBox(attack="square-100", drawn=8, broken=0)
    assert badge not in badge_texts(made(verdicts, attack="pgd-20", black_box=checked))
    both = [made(verdicts, attack=name) for name in ("pgd-20", "autoattack-standard")]
    assert badge not in badge_texts(*both)


def test_a_row_with_fewer_samples_than_others_says_so():
    (suite,) = standings(Board(loose=[made("rrrb", "all"), made("rrr", "less")]))
    texts = {row.model: [badge.text for badge in row.badges] for row in suite.rows}
    assert "fewer samples" in texts["less"]
    assert "fewer samples" not in texts["all"]


def test_the_verified_level_is_a_badge_with_its_date_and_stands_below_in_full():
    facts = {"entry": "m", "suite": "quick-v1", "version": "0.2", "by": "me", "detail": "64 stood"}
    found = [
        Verification(level="re-attacked", date="2026-11-25", records=RUN, **facts),
        Verification(level="reproduced", date="2026-11-26", records="8" * 64, **facts),
    ]
    assert "re-attacked 2026-11-25" in badge_texts(made("rb"), verifications=found)
    page = render(Board(entries=[entry_of(made("rb"))], verifications=found))
    assert "- m: re-attacked by me on 2026-11-25 with version 0.2: 64 stood" in page
    assert "not verified" not in next(x for x in page.splitlines() if x.startswith("| 1 "))
    assert "reproduced by" not in page


def test_facts_of_a_row():
    record = made("rrbw", flags=[Flag(code="zero-gradients", detail="x")])
    suite, row = only(Board(entries=[entry_of(record)]))
    assert (suite.protocol, suite.n, suite.seeds, suite.tasks) == ("p-v1", 4, (0,), ("t",))
    assert suite.threats == {"t": ["pgd-5 linf 8/255"]}
    assert row.card.weights == "hf-hub:me/it"
    assert row.clean == (0.75, wilson(3, 4))
    assert row.tasks["t"].robust == {"pgd-5 linf 8/255": (0.5, wilson(2, 4))}
    assert row.remarks == (("zero-gradients", "x", "t, pgd-5 linf 8/255"),)
    assert (row.forward, row.backward, row.seconds) == (6, 5, 1.5)
    assert row.reproduce == "mmtard-bench run quick-v1 --model m"
    changed = made("rb", suite=suite_facts(None, "quick-v1+n2+s7"))
    assert only(Board(loose=[changed]))[1].reproduce == (
        "mmtard-bench run quick-v1 --model m --n 2 --seed 7"
    )


def test_curves_and_recalls_are_there():
    radii = {"2/255": "rrrw", "8/255": "rbbw", "16/255": "bbbw"}
    _, row = only(Board(loose=[at(eps, outcomes, 3) for eps, outcomes in radii.items()]))
    points = row.tasks["t"].curves["pgd-5 linf"]
    assert [(p.eps, p.accuracy) for p in points] == [
        ("0", 0.75),
        ("2/255", 0.75),
        ("8/255", 0.25),
        ("16/255", 0.0),
    ]
    record = in_suite(retrieval_record([(1, 2, 1, 2), (3, 3, 1, 1), (1, 1, 2, 2), (1, 1, 1, 1)]))
    suite, row = only(Board(loose=[record]))
    assert suite.metric == "retrieval"
    (recalls,) = row.tasks[record.task.name].recalls.values()
    assert recalls == record.results.recalls


def test_results_on_different_data_are_never_in_one_table():
    """A sample id of another revision may be another image."""

    def of(model: str, task: str, revision: str, outcomes: str, day: int) -> Record:
        record = on("native", task, outcomes)
        facts = {
            "model": record.model.model_copy(update={"name": model, "digest": model}),
            "task": record.task.model_copy(update={"revision": revision}),
            "created": f"2026-11-2{day}T00:00:00+00:00",
        }
        return in_suite(record, 2, **facts)

    good, bad = "r" * 40, "b" * 40
    records = [
        of("a", "one", "old", good, 1),
        of("a", "two", "same", good, 1),
        of("b", "one", "new", bad, 2),
        of("b", "two", "same", bad, 2),
        of("c", "one", "old", bad, 3),
        of("c", "two", "same", bad, 3),
        of("d", "two", "same", good, 1),  # incomplete: it fits both
        of("c", "one", "new", good, 4),
    ]
    for given in (records, records[::-1]):
        first, second = standings(Board(loose=given))
        assert {s.revisions["one"]: {row.model for row in s.rows} for s in (first, second)} == {
            "new": {"b", "c", "d"},
            "old": {"a", "c"},
        }
        places = {(s.revisions["one"], r.model): r.place for s in (first, second) for r in s.rows}
        assert places == {
            ("new", "c"): 1,
            ("new", "b"): 2,
            ("new", "d"): None,
            ("old", "a"): 1,  # and not behind c on the new data
            ("old", "c"): None,
        }
        assert first.plot != second.plot
        page = render(Board(loose=given))
        assert page.count("## quick-v1 on data ") == 2
        assert "Data: revision old of one; results on other data are in another table." in page
    # Of one data there is nothing to say.
    (suite,) = standings(Board(loose=records[:2]))
    assert (suite.title, suite.data) == ("quick-v1", "")


def test_one_sample_id_of_two_revisions_is_never_paired():
    record = made("rb", attack="pgd-1", records=2)
    task = record.task.model_copy(update={"revision": "another"})
    other = in_suite(made("br", attack="pgd-2", records=2), 2, task=task)
    with pytest.raises(InputError, match="same samples of the same data"):
        worst_cases([record, other])
    with pytest.raises(InputError, match="share no finished record"):
        compare([record], [in_suite(record, 2, task=task)])


def test_an_average_over_some_of_the_tasks_is_none():
    whole = [on("native", "one", "rr"), on("native", "two", "rb")]
    weights = whole[0].model.model_copy(update={"name": "less", "digest": "e"})
    part = in_suite(whole[0], 2, model=weights)
    (suite,) = standings(Board(loose=[*whole, part]))
    assert [(row.model, row.clean is None) for row in suite.rows] == [("m", False), ("less", True)]
    assert suite.rows[1].worst == {"linf 8/255": None}


def test_the_largest_radius_decides():
    def of(name: str, eps: str, outcomes: str) -> Record:
        record = made(outcomes, name, records=2)
        return in_suite(record, 2, threat=record.threat.model_copy(update={"eps": eps}))

    near = [of("near", "1/255", "r" * 40), of("near", "8/255", "b" * 30 + "r" * 10)]
    far = [of("far", "1/255", "b" * 10 + "r" * 30), of("far", "8/255", "b" * 12 + "r" * 28)]
    (suite,) = standings(Board(loose=[*near, *far]))
    assert suite.deciding == "linf 8/255"
    assert [(row.model, row.place) for row in suite.rows] == [("far", 1), ("near", 2)]


def test_no_row_has_a_better_place_than_one_above():
    # Many discordant samples show nothing, few one-sided ones do: the middle row is above the last
    # in figures, but the first is significantly better only than the middle one.
    n = 100
    first = "r" * 60 + "b" * 40
    middle = "b" * 11 + "r" * 49 + "b" * 40
    last = "b" * 45 + "r" * 48 + "b" * 7
    (suite,) = standings(Board(loose=[made(first, "a"), made(middle, "b"), made(last, "c")]))
    figures = [row.worst["linf 8/255"].value for row in suite.rows]
    assert figures == sorted(figures, reverse=True)
    assert len(first) == len(middle) == len(last) == n
    assert [row.place for row in suite.rows] == [1, 2, 2]
