"""Statistics of a study against hand-made cases, simulation, and a report that is read back."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from mmtard_bench.records.schema import Flag, Record
from mmtard_bench.train import figures as train_figures
from mmtard_bench.train.figures import diagnostics
from mmtard_bench.train.methods import find_method
from mmtard_bench.train.recipe import load_recipe
from mmtard_bench.train.study import report
from mmtard_bench.train.study.backbones import BACKBONES, write_backbones
from mmtard_bench.train.study.frontier import (
    FRONTIER,
    frontier,
    gap,
    gap_over_seeds,
    write_frontier,
)
from mmtard_bench.train.study.report import write_report
from mmtard_bench.train.study.run import score_of
from mmtard_bench.train.study.statistics import (
    Difference,
    Score,
    Study,
    cost_of,
    mean_curve,
    paired_difference,
    times_cheaper,
)
from tests.leaderboard.test_leaderboard import made


def test_a_paired_difference_by_hand():
    ours = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=float)
    base = np.array([[1, 0, 0, 1], [0, 0, 1, 1]], dtype=float)
    gap = paired_difference(ours, base)
    # Gaps: [[0, 1, 0, 0], [1, 0, 0, 0]]; means of seeds 1/4 and 1/4, of samples 1/2, 1/2, 0, 0.
    # The seeds agree, so the samples' three degrees of freedom are all there are.
    variance = 0 / 2 + (4 * (1 / 4) ** 2 / 3) / 4
    assert gap.mean == pytest.approx(0.25)
    assert gap.high - gap.mean == pytest.approx(3.182446 * math.sqrt(variance), rel=1e-6)
    assert gap.mean - gap.low == pytest.approx(gap.high - gap.mean)


def test_degrees_of_freedom_by_hand():
    ours = np.array([[1, 1, 0], [0, 1, 0]], dtype=float)
    gap = paired_difference(ours, np.zeros_like(ours))
    # Means of seeds 2/3, 1/3, variance 1/18; of samples 1/2, 1, 0, variance 1/4.
    seeds, samples = 1 / 18 / 2, 1 / 4 / 3
    freedom = (seeds + samples) ** 2 / (seeds**2 / 1 + samples**2 / 2)
    assert freedom == pytest.approx(2.909, abs=1e-3)
    # t at 97.5%: 4.302653 with two degrees of freedom, 3.182446 with three.
    reach = (gap.high - gap.low) / 2 / math.sqrt(seeds + samples)
    assert 3.182446 < reach < 3.35


def test_equal_verdicts_have_no_width():
    ours = np.ones((3, 4))
    assert paired_difference(ours, ours) == Difference(0.0, 0.0, 0.0)


def test_one_seed_has_no_interval():
    gap = paired_difference(np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]]))
    assert (gap.mean, gap.low, gap.high) == (0.5, -math.inf, math.inf)


# Where the seeds alone decide, five of them give an interval that is a trace short of its word.
@pytest.mark.parametrize(("of_seeds", "at_least"), [(0.0, 0.95), (0.04, 0.95), (0.2, 0.94)])
def test_the_interval_covers_the_truth(of_seeds, at_least):
    # Seeds and samples both shift the outcome, and five seeds on 40 samples are little to go by.
    rng = np.random.default_rng(0)
    truth, covered = 0.05, 0
    for _ in range(1000):
        seeds = of_seeds * rng.standard_normal((5, 1))
        shift = truth + seeds + 0.2 * rng.standard_normal((1, 40))
        gap = shift + 0.3 * rng.standard_normal((5, 40))
        found = paired_difference(gap, np.zeros_like(gap))
        covered += found.low <= truth <= found.high
    assert covered / 1000 >= at_least


CURVE = np.array([[50, 1.0, 0.1], [100, 2.0, 0.3], [150, 3.0, 0.2], [200, 4.0, 0.5]])


@pytest.mark.parametrize(
    ("target", "steps"),
    [(0.05, 50), (0.1, 50), (0.2, 75), (0.3, 100), (0.4, 150 + 50 / 1.5), (0.5, 200)],
)
def test_cost_of_a_target(target, steps):
    # A second lasts 50 steps.
    assert cost_of(CURVE, target) == pytest.approx((steps, steps / 50))


def test_a_target_that_is_never_reached():
    assert cost_of(CURVE, 0.51) == (math.inf, math.inf)
    weak = CURVE * [1, 1, 0.9]
    assert times_cheaper(weak, CURVE) == (0, 0)
    assert times_cheaper(CURVE * [1, 3, 1], weak) == pytest.approx((200 / 191.6667, 200 / 575))


def score(rng, robust, curve):
    clean = rng.random(40) < 0.8
    return Score(clean, clean & (rng.random(40) < robust), rng.random(60) < 0.5, curve)


def test_curves_are_averaged_over_seeds():
    rng = np.random.default_rng(0)
    scores = [score(rng, 0.5, [(50, s, 0.1 * s), (100, 2 * s, 0.2 * s)]) for s in (1.0, 3.0)]
    np.testing.assert_allclose(mean_curve(scores), [[50, 2, 0.2], [100, 4, 0.4]])


def test_a_report_says_what_was_measured(tmp_path):
    rng = np.random.default_rng(0)
    suites = ("reproduce-digits-v1", "reproduce-unseen-v1")
    study = Study("digits", ("tecoa", "ard", "mmt-ard"), "ard", *suites)
    curves = {
        "tecoa": [(50, 5.0, 0.05), (100, 10.0, 0.1)],
        "ard": [(50, 5.0, 0.1), (100, 10.0, 0.3)],
        "mmt-ard": [(50, 7.0, 0.3), (100, 14.0, 0.4)],
    }
    scores = {
        (method, seed): score(rng, 0.2 + 0.3 * (method == "mmt-ard"), curves[method])
        for method in study.methods
        for seed in range(3)
    }
    page = write_report(
        study,
        scores,
        seeds=3,
        recipes={m: load_recipe(f"digits/{m}").recipe for m in study.methods},
        command="mmtard-bench reproduce digits --set steps=100",
        folder=tmp_path,
    )
    text = page.read_text()
    rows = {row.split("|")[1].strip(): row.split("|") for row in text.splitlines() if "|" in row}
    clean = 100 * np.mean([scores["ard", seed].clean for seed in range(3)], axis=1)
    assert rows["`ard`"][2].strip() == f"{clean.mean():.1f} ± {clean.std(ddof=1):.1f}"
    assert rows["`ard`"][5].strip() == ""
    assert rows["`tecoa`"][8].strip() == "never"
    assert rows["`mmt-ard`"][8].strip() == "50 (2.0x)"
    assert rows["training efficiency"][2].strip() == "2.3x"
    here = rows["training efficiency"][4].strip()
    assert here == "2.0x in steps (seed by seed 2.0x to 2.0x), 1.4x in seconds"
    # Figures of the paper have their own data and radius, and so have those beside them.
    assert [cell.strip() for cell in rows["robust accuracy"][2:4]] == [
        "+4.32",
        "ImageNet, linf 2/255",
    ]
    data = rows["robust accuracy"][5].strip()
    assert data == "digits/digit, 200 samples, autoattack-standard linf 8/255"
    assert rows["zero-shot accuracy"][5].strip() == "digits/unseen, 500 samples, clean"
    assert "at chance" not in text
    assert "Warning" not in text
    assert "3 methods, 3 seeds" in text
    assert "`mmtard-bench reproduce digits --set steps=100`" in text
    assert "`mmt-ard` learning_rate = 0.01, temperature = 2.0" in text
    for picture in ("curves.png", "trade-off.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "students.csv").read_text().splitlines()
    assert len(lines) == 1 + 9
    assert lines[1].startswith(f"tecoa,0,{np.mean(scores['tecoa', 0].clean):.4f},")


def flagged(*codes: str) -> Record:
    return made("rbw", flags=[Flag(code=code, detail="x") for code in codes])


@pytest.mark.parametrize(
    ("codes", "at_chance"),
    [
        (([], []), False),
        ((["zero-gradients"], []), False),
        ((["clean-accuracy-at-chance"], []), True),
        (([], ["clean-accuracy-at-chance"]), True),
    ],
)
def test_a_record_at_chance_marks_the_score(codes, at_chance):
    found = score_of(*(flagged(*of) for of in codes), [(1, 1.0, 0.5)])
    assert (found.clean, found.robust) == ([True, True, False], [True, False, False])
    assert found.at_chance is at_chance


def report_of(tmp_path, monkeypatch, **methods: Score) -> tuple[str, list[Figure]]:
    """The page and the figures of one seed."""
    figures: list[Figure] = []
    monkeypatch.setattr(report, "save", lambda figure, _: figures.append(figure))
    scores = {(name.replace("_", "-"), 0): of for name, of in methods.items()}
    names = tuple(method for method, _ in scores)
    page = write_report(
        Study("digits", names, "ard", "reproduce-digits-v1", "reproduce-unseen-v1"),
        scores,
        seeds=1,
        recipes={name: load_recipe(f"digits/{name}").recipe for name in names},
        command="x",
        folder=tmp_path,
    )
    return page.read_text(), figures


def test_a_student_at_chance_beats_nobody_without_a_warning(tmp_path, monkeypatch):
    """A model that always gives one answer is right on a tenth of ten classes, also attacked."""
    curve = [(50, 1.0, 0.1)]
    constant = Score([True, False] * 5, [True, False] * 5, [True, False], curve, at_chance=True)
    weak = Score([True] * 9 + [False], [False] * 10, [True, True], curve)
    text, _ = report_of(tmp_path, monkeypatch, ard=weak, mmt_ard=constant)
    assert "**Warning.** The clean accuracy of these students is not above chance" in text
    assert "says nothing about robustness: `mmt-ard` seed 0." in text
    assert "| `mmt-ard` (at chance) |" in text
    assert "| `mmt-ard` (at chance) against `ard`" in text
    assert "`ard` (at chance)" not in text


def test_a_curve_of_one_point_is_drawn(tmp_path, monkeypatch):
    one = Score([True], [True], [True], [(50, 1.0, 0.5)])
    _, (curves, _) = report_of(tmp_path, monkeypatch, ard=one)
    for axes in curves.axes:
        (line,) = axes.get_lines()
        assert len(line.get_xdata()) == 1
        assert line.get_marker() == "o"
    figures: list[Figure] = []
    monkeypatch.setattr(train_figures, "save", lambda figure, _: figures.append(figure))
    weights = [i / 10 for i in range(11)]
    diagnostics([{"step": 1, "loss/x": 1.0, "weights/clean": weights}], tmp_path)
    drawn = [line for axes in figures[0].axes for line in axes.get_lines() if len(line.get_xdata())]
    assert [line.get_label() for line in drawn] == ["loss/x", "weights/clean"]
    assert {line.get_marker() for line in drawn} == {"o"}


def test_a_frontier_has_no_dominated_student():
    students = np.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.2], [0.5, 0.4], [0.4, 0.5]])
    expected = [[0.5, 0.5], [0.7, 0.3], [0.9, 0.1]]
    np.testing.assert_allclose(frontier(students), expected)
    np.testing.assert_allclose(frontier(students[:1]), students[:1])


def test_frontiers_are_compared_at_equal_clean_accuracy():
    theirs = np.array([[0.4, 0.5], [0.8, 0.1]])  # robust = 0.9 - clean
    assert gap(theirs, theirs) == 0
    assert gap(theirs + np.array([0, 0.07]), theirs) == pytest.approx(0.07)
    # The same line, one point off it, and a longer range: 0.1 at 0.6, 0 at both ends.
    ours = np.array([[0.2, 0.7], [0.4, 0.5], [0.6, 0.4], [0.8, 0.1]])
    assert gap(ours, theirs) == pytest.approx(0.05, abs=0.002)
    assert gap(theirs, ours) == pytest.approx(-gap(ours, theirs))
    assert np.isnan(gap(np.array([[0.9, 0.3]]), theirs))
    # A single student at a clean accuracy that the other covers: the difference there.
    assert gap(np.array([[0.6, 0.45]]), theirs) == pytest.approx(0.15)


def test_the_gap_over_seeds_is_a_t_interval_by_hand():
    found = gap_over_seeds([0.01, 0.02, 0.03])
    assert found.mean == pytest.approx(0.02)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert np.isinf(gap_over_seeds([0.01]).high)
    assert np.isnan(gap_over_seeds([0.01, float("nan")]).mean)


def variants_of(module, write, folder, score_of_label):
    """A study's page with made-up scores, 2 seeds."""
    labels = [v.label for v in module]
    scores = {(label, seed): score_of_label(label, seed) for label in labels for seed in range(2)}
    study = Study("digits", ("ard", "mmt-ard"), "ard", "reproduce-digits-v1", "reproduce-unseen-v1")
    recipes = {label: load_recipe("digits/ard").recipe for label in labels}
    path = write(
        study, scores, seeds=2, recipes=recipes, command="mmtard-bench reproduce", folder=folder
    )
    return path.read_text("utf-8")


def made_of(clean, robust):
    values = [[i < round(share * 100) for i in range(100)] for share in (clean, robust, clean)]
    return Score(*values, curve=[(1, 1.0, robust)], parameters=1234)


def test_the_page_of_backbones_pairs_both_methods_of_a_student(tmp_path):
    def made(label, seed):
        return made_of(0.6, 0.3 + 0.05 * label.endswith("mmt-ard") + 0.01 * seed)

    text = variants_of(BACKBONES, write_backbones, tmp_path, made)
    rows = [row for row in text.splitlines() if row.startswith("| transformer-lora")]
    assert [cell.strip() for cell in rows[0].split("|")[2:6]] == [
        "`ard`",
        "1,234",
        "60.0 ± 0.0",
        "30.5 ± 0.7",
    ]
    assert "35.5 ± 0.7" in rows[1]
    assert "difference" in rows[2]
    assert "+5.0 [" in rows[2]
    assert (tmp_path / "backbones.png").stat().st_size > 10_000
    assert len((tmp_path / "students.csv").read_text().splitlines()) == 1 + 2 * len(BACKBONES)


def test_the_page_of_frontiers_compares_them(tmp_path):
    clean = {2: 0.8, 4: 0.7, 8: 0.5, 12: 0.4}

    def made(label, seed):
        *_, setting = label.split("-")
        place = clean[int(setting[3:])] if setting.startswith("eps") else 0.3
        return made_of(place, 0.9 - place + 0.04 * label.startswith("mmt-ard"))

    variants = [v for v in FRONTIER if v.method in ("ard", "mmt-ard")]
    text = variants_of(variants, write_frontier, tmp_path, made)
    assert "| `ard`     | +4.0 [+4.0, +4.0]" in text
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_every_variant_is_a_recipe_that_can_be_read():
    for variant in (*BACKBONES, *FRONTIER):
        recipe = load_recipe(f"digits/{variant.method}", variant.changes).recipe
        find_method(recipe.method, recipe.options)
    labels = [v.label for v in (*BACKBONES, *FRONTIER)]
    assert len(set(labels)) == len(labels)
