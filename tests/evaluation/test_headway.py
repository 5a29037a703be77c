"""What a run says while it works: counts that are right, estimates that are honest, no silence."""

import io
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mmtard_bench.attacks.base import AttackResult, Pulse
from mmtard_bench.evaluation import headway, progress
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.headway import Headway, Progress
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.tasks.watched import Watched
from tests.attacks.toys import kind_of, toy_clip, toy_data, toy_job

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy"), 16)


@pytest.mark.parametrize("name", ["pgd-4", "apgd-pair", "autoattack-standard"])
@pytest.mark.parametrize("kinds", ["robust", "robust easy masked wrong"])
def test_a_search_reports_stage_rows_step_and_what_is_left(data, name, kinds, monkeypatch):
    monkeypatch.setattr(headway, "_SECONDS", 0.0)
    rows = [i for i, name in enumerate(data.manifest.ids) if kind_of(name) in kinds.split()]
    job = toy_job(toy_clip(), data.at(rows), name)
    seen: list[Progress] = []
    record = execute(job, Resources(CPU, 4, workers=0, black_box=False), report=seen.append)
    assert {p.pulse.stage for p in seen} >= set(job.attack.parameters.get("stages", name).split())
    assert {p.pulse.step for p in seen} >= {1, 2, 3}
    assert max(p.pulse.rows for p in seen) == 4
    assert [p.settled for p in seen] == sorted(p.settled for p in seen)
    assert (seen[-1].settled, seen[-1].robust) == (len(rows), sum(s.robust for s in record.samples))
    # At worst less and less is left, by what was spent or by samples that broke.
    left = [p.passes_left for p in seen]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (len(rows) * job.attack.passes, 0) or "wrong" in kinds
    if kinds == "robust":
        spent = {s.forward + s.backward for s in record.samples}
        assert spent == {job.attack.passes}


def test_the_estimate_counts_the_passes_of_robust_samples(monkeypatch):
    """Of 100 samples 10 were seen, of which 5 are broken; a robust one costs 100 passes."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    seen: list[Progress] = []
    counted = Headway([], todo=100, total=100, budget=100, report=seen.append)
    watched = Watched(torch.nn.Identity(), CPU)
    counted.judged(wrong=0, right=10)
    assert seen[-1].passes_left == 100 * 100
    assert seen[-1].seconds_left is None
    counted.begin(watched)
    counted.watch(lambda: Pulse(settled=5, broken=5, spent=10, stage="s", rows=5, step=1))
    clock[0], watched.passes = 30.0, 60
    watched.beat()
    assert seen[-1].passes_left == 5 * 100 - 50 + 90 * 100
    # Half of a second each pass: (5 x 100 - 50) here, and 90 samples at (10 + 5 x 100) / 10.
    assert seen[-1].seconds_left == pytest.approx((450 + 90 * 51) / 2)
    none = torch.zeros(0, 3, 1, 1)
    counted.end(
        [AttackResult(none, ["s"] * 5 + [None] * 5, [1] * 5 + [50] * 5, [1] * 5 + [50] * 5)]
    )
    assert (seen[-1].settled, seen[-1].robust) == (10, 5)
    assert seen[-1].passes_left == 90 * 100


def test_an_attack_that_does_not_say_what_it_costs_gets_no_false_estimate(data, monkeypatch):
    monkeypatch.setattr(headway, "_SECONDS", 0.0)
    job = toy_job(toy_clip(), data, "pgd-4", engine="reference")
    unknown = replace(job, attack=replace(job.attack, passes=None))
    seen: list[Progress] = []
    execute(unknown, Resources(CPU, 16, workers=0), report=seen.append)
    # A sign of life with every pass, all the same.
    assert len(seen) > 4 * 5
    assert all(p.seconds_left is None for p in seen if p.settled < 16)
    assert seen[-1].seconds_left == 0


def lines(said: io.StringIO) -> list[str]:
    return said.getvalue().splitlines()


def test_lines_come_in_a_pipe_while_nothing_breaks(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    said = io.StringIO()
    shown = RunProgress(Console(file=said, width=200))
    shown.start("model task threat", "threat", total=1000, settled=0)
    pulse = Pulse(stage="apgd-t", rows=128, step=37)
    shown.update(Progress(0, 16, 16, 1000, pulse, 12_345_678, 4 * 3600.0))
    (line,) = lines(said)
    assert line == (
        "model task threat: 0/1000 samples, robust 100.0%, apgd-t: 128 rows, step 37, "
        "<= 12.3M passes, ~4 h 0 min left after 0 s"
    )


def test_lines_come_in_a_pipe_while_a_single_pass_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    said = io.StringIO()
    with RunProgress(Console(file=said, width=200)) as shown:
        shown.start("model task threat", "threat", total=10, settled=3)
        deadline = time.monotonic() + 30
        while not lines(said) and time.monotonic() < deadline:
            time.sleep(0.05)
        shown.stop()
    assert lines(said)[0].startswith("model task threat: 3/10 samples after ")


def test_a_terminal_of_80_columns_shows_it_all():
    said = io.StringIO()
    console = Console(file=said, width=80, force_terminal=True, color_system=None)
    with RunProgress(console) as shown:
        shown.start("x", "autoattack-standard linf 8/255", total=9999, settled=9998)
        pulse = Pulse(stage="square", rows=512, step=4321)
        shown.update(Progress(9998, 9998, 9998, 9999, pulse, 999_000_000, 47.9 * 3600))
        shown.bars.refresh()
    for text in ("autoattack-standard linf 8/255", "square: 512 rows, step 4321", "9998/9999"):
        assert text in said.getvalue()
    for text in ("robust 100.0%", "~47 h 54 min left", "<= 999M passes"):
        assert text in said.getvalue()
