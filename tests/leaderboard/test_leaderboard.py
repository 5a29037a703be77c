"""From records to markdown."""

import pytest
from hypothesis import given, strategies as st

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.markdown import render
from mmtard_bench.records.files import from_text
from mmtard_bench.records.schema import Record, SuiteFacts, identity
from mmtard_bench.records.tables import table_of
from mmtard_bench.records.worst import worst_cases
from tests.records.test_records import record_of, retrieval_record, sample, text_record


def in_suite(record: Record, records: int = 1, **changes: object) -> Record:
    """The record as part of a suite, its identity renewed."""
    suite = SuiteFacts(name="quick-v1", protocol="p-v1", digest="1" * 64, records=records)
    changed = record.model_copy(update={"suite": suite, **changes})
    parts = ("suite", "model", "task", "threat", "seed", "precision", "sample_ids_digest")
    new = identity(**{part: getattr(changed, part) for part in parts})
    return from_text(changed.model_copy(update={"identity": new}).to_text(), "here")


def made(outcomes: str, name: str = "m", attack: str = "pgd-5", **changes: object) -> Record:
    words = {"w": "wrong", "r": "robust", "b": "broken"}
    samples = [sample(i, words[letter]) for i, letter in enumerate(outcomes)]
    return in_suite(record_of(samples, name, attack), **changes)


@given(st.lists(st.text("rb", min_size=12, max_size=12), min_size=1, max_size=4))
def test_the_worst_case_is_the_and_over_threat_models(columns):
    records = [made(text, attack=f"pgd-{i + 1}") for i, text in enumerate(columns)]
    (worst,) = worst_cases(records)
    expected = sum(all(text[i] == "r" for text in columns) for i in range(12)) / 12
    assert worst.accuracy == expected
    assert worst.accuracy <= min(record.robust_accuracy for record in records)


def test_models_are_sorted_by_their_worst_case():
    weak = [made("rrbb", "weak", "pgd-1", records=2), made("bbrr", "weak", "pgd-2", records=2)]
    strong = [made("rrrb", "strong", f"pgd-{i}", records=2) for i in (1, 2)]
    # Better on every single threat model it has, but one is missing.
    partial = [made("rrrr", "partial", "pgd-1", records=2)]
    text = render(Board(loose=[*weak, *partial, *strong]))
    overview = [line for line in text.splitlines() if line.startswith("| ")][:4]
    assert [line.split("|")[2].strip() for line in overview] == [
        "model",
        "strong",
        "weak",
        "partial",
    ]
    assert "incomplete" in next(line for line in overview if "partial" in line)
    assert "| 0.0" in next(line for line in overview if "weak" in line)


def test_an_entry_that_leaves_out_a_threat_model_has_no_worst_case():
    """Alone in its suite, too: what is complete follows from the suite, not from the others."""
    alone = made("rrrr", "alone", records=2)
    text = render(Board(loose=[alone]))
    assert "incomplete" in next(x for x in text.splitlines() if x.startswith("| -       | alone"))
    assert "100.0 [" in text
    assert "worst case" not in table_of([alone])


def test_two_surfaces_are_two_columns():
    records = []
    for surface, outcomes in (("native", "rbbb"), ("model", "rrrb")):
        record = record_of(
            [sample(i, {"r": "robust", "b": "broken"}[o]) for i, o in enumerate(outcomes)]
        )
        threat = record.threat.model_copy(update={"surface": surface})
        records.append(in_suite(record, records=2, threat=threat))
    lines = render(Board(loose=records)).splitlines()
    row = next(line for line in lines if line.startswith("| m "))
    header = next(line for line in lines if line.startswith("| model "))
    cells = dict(zip(header.split("|"), row.split("|"), strict=True))
    by_name = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert by_name["pgd-5 linf 8/255"].startswith("25.0 ")
    assert by_name["pgd-5 linf 8/255 model"].startswith("75.0 ")


def test_a_failed_record_is_shown_and_never_counts():
    good = made("rrrb", "good")
    failed = made("rrrb", "bad", status="error", error="it broke | badly", results=None, samples=[])
    text = render(Board(loose=[good, failed]))
    assert any("failed" in line for line in text.splitlines() if line.startswith("| bad "))
    assert "it broke \\| badly" in text
    assert text.index("| good ") < text.index("| bad ")
    assert "FAILED" in table_of([failed])
    assert worst_cases([failed]) == []


def test_suites_never_share_a_table():
    other = SuiteFacts(name="quick-v1+n4", protocol=None, digest="2" * 64, records=1)
    text = render(Board(loose=[made("rrrb", "one"), made("rrrb", "two", suite=other)]))
    assert text.count("\n## ") == 2


@pytest.mark.parametrize(
    "name", ["a|b", "<script>alert(1)</script>", "[x](y)", "a\nb", "`x`", "# h"]
)
def test_names_cannot_format_the_page(name):
    text = render(Board(loose=[made("rb", name)]))
    row = next(line for line in text.splitlines() if line.startswith("| 1 "))
    # Inside the code block with the command nothing formats.
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any("<script>" in line for line in prose)
    assert row.replace("\\|", "").count("|") == len(row.split("|")) - 1 - row.count("\\|")
    assert "\n# h" not in text


def test_without_records_there_is_still_a_page():
    assert render(Board(loose=[])).startswith("# Leaderboard")


def test_recalls_have_their_own_table():
    record = in_suite(retrieval_record([(1, 2, 1, 2), (3, 3, 1, 1), (1, 1, 2, 2), (1, 1, 1, 1)]))
    page = render(Board(loose=[record]))
    assert "recall at 1" in page
    assert "zero-shot average" not in page
    rows = [
        line for line in page.splitlines() if "image to text" in line or "text to image" in line
    ]
    numbers = [[cell.strip() for cell in row.split("|")[5:-1]] for row in rows]
    assert numbers == [
        ["75.0", "100.0", "100.0", "50.0", "100.0", "100.0"],
        ["75.0", "100.0", "100.0", "50.0", "100.0", "100.0"],
    ]
    assert "attacked R@10" in table_of([record])
    assert "attacked R@10" not in table_of([made("rb")])
    assert "attacked R@10" not in render(Board(loose=[made("rb")]))


def test_balls_of_text_and_pixels_stand_apart():
    text = in_suite(text_record(), records=3)
    pixels = made("rb", records=3)
    both = pixels.threat.model_copy(
        update={"attack": "joint-charmer-k1-pgd-5", "parameters": {"edits": 1}}
    )
    joint = made("bb", records=3, threat=both)
    balls = {w.ball: w.accuracy for w in worst_cases([text, pixels, joint])}
    assert balls == {"levenshtein 1/1": 0.5, "linf 8/255": 0.5, "linf 8/255 + 1 edit": 0.0}
    page = render(Board(loose=[text, pixels, joint]))
    assert "worst case linf 8/255 + 1 edit" in page


def test_a_curve_has_a_column_an_eps_in_the_order_of_radii():
    records = []
    for eps in ("16/255", "2/255", "8/255"):
        record = made("rb", records=3)
        threat = record.threat.model_copy(update={"eps": eps})
        records.append(in_suite(record, 3, threat=threat))
    overview, table, _ = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in render(Board(loose=records)).splitlines()
        if "model " in line and line.startswith("|")
    )
    radii = ["linf 2/255", "linf 8/255", "linf 16/255"]
    assert overview[3:6] == [f"worst case {ball}" for ball in radii]
    # Of one threat model each, they are not shown twice.
    assert table == ["model", "clean", *(f"pgd-5 {ball}" for ball in radii)]


def on(surface: str, task: str, outcomes: str) -> Record:
    record = made(outcomes, records=2)
    threat = record.threat.model_copy(update={"surface": surface})
    facts = record.task.model_copy(update={"name": task})
    return in_suite(record, 2, threat=threat, task=facts)


def test_an_average_is_over_all_tasks_whatever_their_surface():
    small, large = on("native", "cifar10", "rrrr"), on("model", "cars", "rrbb")
    text = render(Board(loose=[small, large]))
    assert "worst case linf 8/255 model" not in text
    overview = next(line for line in text.splitlines() if line.startswith("| 1 "))
    assert overview.split("|")[4].strip().startswith("75.0 ")
    # One task at both surfaces: two threat models, two balls.
    text = render(Board(loose=[small, on("model", "cifar10", "rrbb")]))
    assert "worst case linf 8/255 model" in text


def test_a_command_that_makes_a_row_again_is_printed_if_it_runs():
    """It cannot run for a model of Python code, nor for a suite whose file only its author has."""

    def line(record: Record) -> str:
        text = render(Board(loose=[record]))
        return text.split("To reproduce a row:")[1].strip().splitlines()[0].strip()

    model, suite = made("rb").model, made("rb").suite
    assert line(made("rb")) == "mmtard-bench run quick-v1 --model m    # weights d"
    python = model.model_copy(update={"source": "python object"})
    said = line(made("rb", model=python))
    assert said.startswith("# a model object from Python: score it there")
    assert "mmtard-bench run" not in said
    parameters = {"code": "mmtard_bench fast 1", "attack_precision": "bfloat16"}
    lower = made("rb").threat.model_copy(update={"parameters": parameters})
    assert "--model m --precision bfloat16 " in line(made("rb", threat=lower))
    own = suite.model_copy(update={"name": "my-suite-v1+n2"})
    assert line(made("rb", suite=own)) == (
        "# needs the file of the suite, which does not ship: mmtard-bench run my-suite-v1.toml "
        "--model m --n 2    # weights d"
    )


def test_show_tells_records_of_older_data_apart(here, tmp_path):
    """Data that changed between runs: no table mixes them, and each file is named."""
    task = made("rb").task.model_copy(update={"revision": "new"})
    facts = {"records": 2, "created": "2026-11-24T00:00:00+00:00"}
    later = {"records": 2, "task": task, "created": "2026-11-25T00:00:00+00:00"}
    for name, record in {
        "1-old": made("bbbb", attack="pgd-1", **facts),
        "2-old": made("rrrr", attack="pgd-2", **facts),
        "1-new": made("rrrb", attack="pgd-1", **later),
    }.items():
        record.save(tmp_path / "runs" / f"{name}.json")
    done = here("show", "runs")
    assert done.returncode == 0, done.stderr
    assert "not counted: runs/1-old.json: there is a newer record of pgd-1" in done.stdout
    assert "not counted: runs/2-old.json: pgd-2 linf 8/255 on t was evaluated on" in done.stdout
    assert "run the suite again, then delete or move this one" in done.stdout
    assert "75.0" in done.stdout
    assert "worst case" not in done.stdout
    assert "100.0 [51.0, 100.0]  100.0" not in done.stdout
    made("rbrr", attack="pgd-2", **later).save(tmp_path / "runs" / "2-new.json")
    assert "50.0" in next(
        row for row in here("show", "runs").stdout.splitlines() if "worst case" in row
    )
