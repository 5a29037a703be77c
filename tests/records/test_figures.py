"""What the figures show is what the records say."""

import shutil
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from mmtard_bench.records.curves import eps_curves
from mmtard_bench.records.figures import by_task, draw, robust_after
from mmtard_bench.records.schema import Record, aggregate, digest_of
from mmtard_bench.records.statistics import wilson
from tests.conftest import REPOSITORY, Cli, assert_sentence
from tests.leaderboard.test_leaderboard import in_suite, made

RADII = {"8/255": "rbbw", "16/255": "bbbw", "2/255": "rrrw"}


def at(eps: str, outcomes: str, name: str = "m", **changes: object) -> Record:
    record = made(outcomes, name)
    threat = record.threat.model_copy(update={"eps": eps, **changes})
    return in_suite(record, 3, threat=threat)


def spending(outcomes: str, passes: list[int]) -> Record:
    record = made(outcomes)
    samples = [
        sample.model_copy(update={"forward": count - count // 2, "backward": count // 2})
        for sample, count in zip(record.samples, passes, strict=True)
    ]
    return in_suite(
        record,
        samples=samples,
        results=aggregate(samples),
        sample_ids_digest=digest_of([sample.id for sample in samples]),
    )


def picture(path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_points_of_a_curve_follow_from_the_records():
    records = [at(eps, outcomes) for eps, outcomes in RADII.items()]
    other = [at("8/255", "rrrr", "one radius"), at("8/255", "rrrr", "m", surface="model")]
    curves = eps_curves([*records, *other])
    assert list(curves) == ["pgd-5 linf"]
    assert list(curves["pgd-5 linf"]) == ["m"]
    points = curves["pgd-5 linf"]["m"]
    # As numbers, not as texts: 16/255 is the largest.
    assert [(point.eps, point.accuracy) for point in points] == [
        ("0", 0.75),
        ("2/255", 0.75),
        ("8/255", 0.25),
        ("16/255", 0.0),
    ]
    assert [point.interval for point in points] == [wilson(k, 4) for k in (3, 3, 1, 0)]


def test_a_failed_radius_is_no_point():
    failed = in_suite(
        at("4/255", "rrrr"), 3, status="error", error="broke", results=None, samples=[]
    )
    curves = eps_curves([failed, *(at(eps, outcomes) for eps, outcomes in RADII.items())])
    assert [p.eps for p in curves["pgd-5 linf"]["m"]] == ["0", "2/255", "8/255", "16/255"]


def test_the_share_still_robust_after_a_number_of_passes():
    record = spending("rwbbb", [40, 0, 5, 9, 5])
    assert robust_after(record) == [(0, 0.8), (5, 0.4), (9, 0.2), (40, 0.2)]
    # The curve ends with the last broken sample if nothing took longer; without passes, at once.
    assert robust_after(spending("bb", [3, 7])) == [(0, 1.0), (3, 0.5), (7, 0.0)]
    assert robust_after(spending("rw", [0, 0])) == [(0, 0.5)]


@pytest.mark.parametrize(
    ("models", "suite"), [(1, "a suite with a longer name"), (4, "a long name " * 9), (40, "s")]
)
def test_the_legend_covers_no_title(models, suite, monkeypatch):
    """Drawn in memory: where the title and the legend come to lie, in pixels."""
    figures = []
    monkeypatch.setattr(
        "mmtard_bench.records.figures._save", lambda figure, _: figures.append(figure)
    )
    facts = made("rb").suite.model_copy(update={"name": suite})
    radii = {eps: text for eps, text in RADII.items() if models > 1 or eps == "8/255"}
    names = [f"a model with quite a long name {number}" for number in range(models)]
    draw(
        [
            at(e, text, n).model_copy(update={"suite": facts})
            for n in names
            for e, text in radii.items()
        ],
        Path(),
    )
    assert len(figures) == (2 if models > 1 else 1)
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        title, (legend,) = figure._suptitle.get_window_extent(), figure.legends
        whole, below = figure.bbox, legend.get_window_extent()
        assert not title.overlaps(below)
        for box in (title, below):
            assert whole.x0 <= box.x0 < box.x1 <= whole.x1
            assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_a_curve_is_drawn_with_names_that_matplotlib_would_take_apart(tmp_path):
    names = ["_hidden", r"$\frac{x}$", "x" * 200, "tab\tname"]
    records = [at(eps, outcomes, name) for name in names for eps, outcomes in RADII.items()]
    written = draw(records, tmp_path / "new" / "folder")
    assert [path.name.rsplit("--")[-1] for path in written] == ["eps.png", "passes.png"]
    for path in written:
        image = picture(path)
        assert image.format == "PNG"
        assert 500 < image.width < 3000
        assert 300 < image.height < 3000
        # More than a white page.
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_a_model_made_again_replaces_itself_and_other_weights_do_not():
    old, new = (
        at("8/255", o).model_copy(update={"created": f"2026-11-24T09:30:0{c}+00:00"})
        for o, c in (("r", "1"), ("b", "2"))
    )
    weights = old.model.model_copy(update={"digest": "another"})
    alone = made("r", suite=None)
    groups = by_task([new, old, in_suite(old, 3, model=weights), alone])
    found = {
        where: [(r.model.name, r.robust_accuracy) for r in group] for where, group in groups.items()
    }
    assert found == {
        ("no-suite", alone.sample_ids_digest, "t", "r"): [("m (d)", 1.0)],
        ("quick-v1", "1" * 64, "t", "r"): [("m (another)", 1.0), ("m (d)", 0.0)],
    }


def test_models_on_two_revisions_of_the_data_are_in_two_figures(tmp_path):
    old, new = at("8/255", "rr"), at("8/255", "rb")
    other = in_suite(new, 3, task=new.task.model_copy(update={"revision": "w"}))
    assert len(draw([old], tmp_path)) == 1
    written = draw([old, other], tmp_path)
    assert len(written) == len(set(written)) == 2
    assert all("--t-data-" in path.name for path in written)


def test_the_entries_that_ship(here: Cli, tmp_path):
    for model in ("teacher-robust", "tiny-clip"):  # of all of them: reading takes seconds
        (tmp_path / "entries" / model).mkdir(parents=True)
        for name in ("card.json", "digits-v1.json"):
            source = REPOSITORY / "leaderboard/entries" / model / name
            shutil.copy(source, tmp_path / "entries" / model / name)
    done = here("plot", "entries", "--out", "figures")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    paths = [tmp_path / line for line in done.stdout.splitlines()]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())
    # One radius a norm: no curve over eps.
    assert [path.name.split("--", 1)[1] for path in paths] == [
        "digits-digit--passes.png",
        "digits-unseen--passes.png",
    ]
    for path in paths:
        assert picture(path).width > 1000


def test_a_run_of_a_curve_through_the_command_line(here: Cli, tmp_path):
    for number, (eps, outcomes) in enumerate(RADII.items()):
        at(eps, outcomes).save(tmp_path / "run" / f"{number}.json")
    done = here("plot", "run")
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines()]
    assert {path.parent for path in paths} == {tmp_path / "figures" / "run"}
    assert [picture(path).format for path in paths] == ["PNG", "PNG"]
    one = here("plot", "run/0.json", "--out", "one")
    assert one.stdout.splitlines() == [
        str(next((tmp_path / "one").iterdir()).relative_to(tmp_path))
    ]


def test_bad_input_is_a_sentence(here: Cli, tmp_path):
    assert_sentence(here("plot", "nowhere"), "There is no directory nowhere")
    (tmp_path / "empty").mkdir()
    assert_sentence(here("plot", "empty"), "There are no records below empty")
    failed = made("rb", status="error", error="broke", results=None, samples=[])
    failed.save(tmp_path / "failed" / "x.json")
    assert_sentence(here("plot", "failed"), "No record is finished")
    made("rb").save(tmp_path / "good" / "x.json")
    (tmp_path / "file").write_text("")
    assert_sentence(here("plot", "good", "--out", "file"), "could not be written")
    (tmp_path / "good" / "y.json").write_text('{"identity": "1"}')
    assert_sentence(here("plot", "good"), "edited or cut short")
