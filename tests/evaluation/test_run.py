"""Runs: resumable at any moment, the same verdicts however they were computed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import FAST, REFERENCE, prepare
from mmtard_bench.evaluation.loop import Batch
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.resume import Partial
from mmtard_bench.evaluation.run import run_folder, run_model
from mmtard_bench.records.files import read_record
from mmtard_bench.records.schema import Record, Sample, digest_of
from mmtard_bench.registry import protocols
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.suites import list_suites, load_suite, with_overrides
from mmtard_bench.types import Eps, ThreatModel
from tests.conftest import REPOSITORY, ToyClip, assert_sentence, tokenize, wait_for, wrap

CPU = torch.device("cpu")


def truth(record: Record) -> list[tuple[object, ...]]:
    """The verdicts of a record."""
    return [(s.id, s.prediction, s.robust, s.broken_by) for s in record.samples]


def score(
    threat: str,
    *,
    batch_size: int | None,
    n: int = 70,
    norm: str = "linf",
    engine: str = "fast",
    model: str = "teacher-robust",
) -> Record:
    return mb.evaluate(
        model,
        task="digits/digit",
        threat=threat,
        eps="8/255" if norm == "linf" else "60/255",
        n=n,
        batch_size=batch_size,
        engine=engine,
    )


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("threat", ["pgd-10", "cw-linf-10", "apgd-pair"])
def test_the_batch_size_never_changes_a_verdict(threat, engine):
    steps = threat.endswith("10")
    records = [
        score(threat, batch_size=size, n=60 if steps else 8, engine=engine, model="student-tecoa")
        for size in ([1, 7, 64] if steps else [5, 64])
    ]
    assert {record.status for record in records} == {"ok"}
    assert all(truth(record) == truth(records[0]) for record in records)
    assert len({record.identity for record in records}) == 1
    assert 0 < records[0].robust_accuracy < records[0].clean_accuracy


def test_a_record_accounts_for_every_sample():
    fast, whole = (score("pgd-10", batch_size=16, n=40, engine=e) for e in ("fast", "reference"))
    assert truth(fast) == truth(whole)
    # It is the same attack: to stop at the first success changes what it costs.
    assert fast.identity == whole.identity
    assert len(whole.samples) == 40
    for sample, other in zip(fast.samples, whole.samples, strict=True):
        expected = (11, 10) if sample.clean_correct else (0, 0)
        assert (other.forward, other.backward) == expected
        if sample.robust or not sample.clean_correct:
            assert (sample.forward, sample.backward) == expected
        else:
            assert 1 <= sample.forward <= 11
            assert sample.backward == min(sample.forward, 10)
    assert whole.results.forward_per_sample == pytest.approx(11 * whole.clean_accuracy)
    assert fast.results.forward_per_sample < whole.results.forward_per_sample
    assert 0 < fast.model_seconds < fast.seconds
    assert whole.model_seconds is None


def test_the_engine_of_an_attack_that_draws_otherwise_is_part_of_the_identity():
    fast, reference = (
        score("apgd-pair", batch_size=8, n=2, engine=engine, model="student-tecoa")
        for engine in ("fast", "reference")
    )
    assert fast.identity != reference.identity
    assert fast.threat.parameters["code"] == "mmtard_bench fast 1"
    assert fast.threat.block is None


def test_what_fits_in_memory_is_found_once_a_model_and_size_of_images():
    clip = mb.load_model("tiny-clip-small")
    first, second = (
        mb.evaluate(clip, task="digits/digit", threat="pgd-1", eps="8/255", n=4) for _ in range(2)
    )
    (found,) = clip.cache.batch_sizes.values()
    assert found > 64
    assert first.environment.batch_size == second.environment.batch_size == 64


def test_what_changes_verdicts_changes_the_identity_and_nothing_else_does():
    clip, other = wrap(ToyClip()), wrap(ToyClip(seed=1))
    renamed = wrap(ToyClip(), name="other name")
    retold = replace(wrap(ToyClip()), tokenizer=lambda texts: tokenize(texts) + 1)
    suite = load_suite("quick-v1")

    def identity(clip=clip, attack="pgd-2", eps="8/255", n=8, seed=0, suite=None, surface="native"):
        data = load_task(find_task("digits/digit"), n=n, seed=seed)
        threat = ThreatModel(attack, "linf", Eps.parse(eps), surface)
        return prepare(clip, data, threat, seed=seed, suite=suite).identity

    base = identity()
    assert identity(clip=renamed) == base == identity()
    changed = [
        identity(clip=other),
        identity(clip=retold),
        identity(attack="pgd-3"),
        identity(eps="7/255"),
        identity(n=9),
        identity(seed=1),
        identity(suite=suite),
        identity(surface="model"),
    ]
    assert base not in changed
    assert len(set(changed)) == len(changed)


def test_overrides_make_another_suite():
    suite = load_suite("quick-v1")
    assert with_overrides(suite, n=None, seed=None) == suite
    assert with_overrides(suite, n=suite.n, seed=suite.seed) == suite
    limited = with_overrides(suite, n=8, seed=3)
    assert (limited.name, limited.n, limited.seed) == ("quick-v1+n8+seed3", 8, 3)
    assert limited.digest != suite.digest


def test_text_attacks_run_on_images_of_mixed_sizes():
    """Those are resized for the model before anything else."""
    attacked = {(t.attack, t.surface) for t in protocols.get("mmtard-text-v1").threats}
    for k in range(3):
        assert {(f"text-charmer-k{k}", "native"), (f"text-charmer-k{k}", "model")} <= attacked


# A suite that ships is never changed: a change is a new version under a new name.
PINNED = {
    "quick-v1": "3650124579235c85b1f32a78d0467aad2b5fd6725296411b829077c3363d7398",
    "digits-v1": "845e34a08de053be95d7a7d97fb55d049f417c604d08b24dad52f7404a4d180a",
    "reproduce-digits-v1": "d084e2210a9cb45189ff60a8738a9813951387a6f8c6ff4bc5e613fb9ae5e74b",
    "retrieval-v1": "3a55022db8faadfe3ca136efe573e3ffde8a496d0b50733b2f808fd7b4742181",
    "text-v1": "30a9527e25360dbeebeb2f8118431bb439ed75b20999f2cda820080d512a503d",
    "zeroshot13-v1": "1e91f24b2c366151d72894146062fbeab68b80f16ddfda5053ad4fc29aef9352",
    "mmtard-imagenet-v1": "6b475920098d5508a7971a33c937c645eadf238cf5d0e4a6cb00d61f017a0b9c",
    "tecoa-v1": "ccbf1906314be71ea7fdec000129c8772c0ec4a5484b1b0b8d8bf58bf419ae1f",
    "rb-standard-v1": "a9186c1d8e31cc570b0414f94dd23250d13ed33532088a3947ca56494379bd6a",
    "reproduce-unseen-v1": "5e76cbcbd85f863db91ad531b0fc20e5b9bc97359c1739115edd2cb7b1ae2fbb",
    "curve-v1": "8dd33861a9f4b5c76c1c92a0d866b3f795ae73040ed9a92f6a8ea53b9c11c113",
}


def test_the_meaning_of_the_suites_that_ship_is_pinned():
    assert {name: load_suite(name).digest for name in list_suites()} == PINNED


def run(suite, clip, out, engine=FAST):
    progress = RunProgress(Console(quiet=True))
    return list(
        run_model(clip, suite, Resources(CPU, 16), out=out, progress=progress, engine=engine)
    )


def test_finished_records_are_read_and_not_made_again(tmp_path):
    suite = with_overrides(load_suite("quick-v1"), n=6, seed=None)
    clip = wrap(ToyClip())
    first = run(suite, clip, tmp_path)
    assert [record.status for record in first] == ["ok"] * 3
    assert run(suite, clip, tmp_path) == first
    # Other weights under the same name neither reuse nor destroy them.
    other = run(suite, wrap(ToyClip(seed=1)), tmp_path)
    assert {r.identity for r in other}.isdisjoint(r.identity for r in first)
    assert run(suite, clip, tmp_path) == first


def test_failed_records_are_tried_again(tmp_path):
    class Moody(ToyClip):
        broken = True

        def encode_image(self, images):
            features = super().encode_image(images)
            return features * float("nan") if self.broken else features

    suite = with_overrides(load_suite("quick-v1"), n=4, seed=None)
    clip = wrap(Moody())
    assert [record.status for record in run(suite, clip, tmp_path)] == ["error"] * 3
    assert len(list(tmp_path.rglob("*.json"))) == 3
    Moody.broken = False
    assert [record.status for record in run(suite, clip, tmp_path)] == ["ok"] * 3


RESTRICTED = """
name = "mixed-v1"
description = "a threat model for one task alone"
n = 4
seed = 0
tasks = ["digits/digit", "digits/unseen"]
threats = [
    {attack = "pgd-1", norm = "linf", eps = "8/255"},
    {attack = "pgd-2", norm = "linf", eps = "8/255", tasks = ["digits/unseen"]},
]
"""


def test_a_threat_model_may_be_for_some_tasks_only(tmp_path):
    path = tmp_path / "mixed-v1.toml"
    path.write_text(RESTRICTED)
    suite = load_suite(str(path))
    records = run(suite, wrap(ToyClip()), tmp_path)
    assert [(record.task.name, record.threat.attack) for record in records] == [
        ("digits/digit", "pgd-1"),
        ("digits/unseen", "pgd-1"),
        ("digits/unseen", "pgd-2"),
    ]
    assert {record.suite.records for record in records} == {3}
    path.write_text(RESTRICTED.replace('["digits/unseen"]}', '["digits/digit"]}'))
    assert load_suite(str(path)).digest != suite.digest


def test_what_was_settled_before_a_failure_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "inspect", lambda self: [])  # only passes of the attack count here

    class Tired(ToyClip):
        calls = 0

        def encode_image(self, images):
            Tired.calls += 1
            if 60 < Tired.calls < 1000:
                raise RuntimeError("out of memory")
            return super().encode_image(images)

    suite = with_overrides(load_suite("quick-v1"), n=60, seed=None)
    suite = replace(suite, plan=tuple((task, threats[:1]) for task, threats in suite.plan))
    clip = wrap(Tired(seed=5))
    (failed,) = run(suite, clip, tmp_path, REFERENCE)
    assert failed.error == "RuntimeError: out of memory"
    (partial,) = tmp_path.rglob("*.partial")
    settled = len(partial.read_text().splitlines())
    assert 1 <= settled < 4
    Tired.calls = 1000
    (record,) = run(suite, clip, tmp_path, REFERENCE)
    assert record.status == "ok"
    # 4 batches: each costs a clean pass, 20 steps, a look, and perhaps a confirmation.
    assert Tired.calls - 1000 < 10 + (4 - settled) * 24
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("attack", ["pgd-5", "apgd-pair"])
def test_an_interrupted_record_goes_on_where_it_was(attack, short_attacks):
    n = 40 if attack == "pgd-5" else 20
    data = load_task(find_task("digits/digit"), n=n, seed=0)
    clip = mb.load_model("student-tecoa")
    job = prepare(clip, data, ThreatModel(attack, "linf", Eps.parse("12/255")), seed=0)
    batches: list[Batch] = []
    whole = execute(job, Resources(CPU, 4), keep=batches.append)
    # 16 samples at once; of APGD's, those that stood after the cheap stage in fours.
    assert len(batches) > 3 if attack == "apgd-pair" else len(batches) == 3
    assert 0 < whole.robust_accuracy < whole.clean_accuracy
    done = [replace(batch, seconds=9.0) for batch in batches[:2]]
    again: list[Batch] = []
    resumed = execute(job, Resources(CPU, 4), earlier=done, keep=again.append)
    settled = sum(len(batch.samples) for batch in done)
    assert sum(len(batch.samples) for batch in again) == n - settled
    assert truth(resumed) == truth(whole)
    assert resumed.seconds >= 18.0


def test_a_partial_line_cut_short_is_dropped(tmp_path):
    def batch(name: str) -> Batch:
        sample = Sample(
            id=name,
            label=0,
            prediction=0,
            clean_correct=True,
            robust=True,
            broken_by=None,
            unconfirmed=False,
            forward=1,
            backward=1,
        )
        return Batch([sample], [], 1.0)

    partial = Partial(tmp_path / "x.partial", "identity")
    partial.append(batch("a"))
    partial.append(batch("b"))
    text = partial.path.read_text()
    partial.path.write_text(text[:-20])
    assert [b.samples[0].id for b in partial.read()] == ["a"]
    partial.append(batch("c"))
    assert [b.samples[0].id for b in partial.read()] == ["a", "c"]
    assert Partial(partial.path, "another identity").read() == []


def flip(line: dict[str, Any]) -> None:
    sample = next(s for s in line["samples"] if s["clean_correct"])
    robust = not sample["robust"]
    sample |= {"robust": robust, "broken_by": None if robust else "pgd-20", "unconfirmed": False}


def rename(line: dict[str, Any]) -> None:
    line["samples"][0]["id"] = "no such sample"


def relabel(line: dict[str, Any]) -> None:
    sample = next(s for s in line["samples"] if s["clean_correct"])
    sample |= {"label": 99, "prediction": 99}


def repredict(line: dict[str, Any]) -> None:
    sample = line["samples"][0]
    sample |= {"prediction": 99, "clean_correct": False, "robust": False, "broken_by": None}


def double(line: dict[str, Any]) -> None:
    line["samples"].append(line["samples"][0])


def empty(line: dict[str, Any]) -> None:
    line["samples"] = []


def time_of(name: str, seconds: float) -> Callable[[dict[str, Any]], None]:
    return lambda line: line.update({name: seconds})


CHANGES = [
    flip,
    rename,
    relabel,
    repredict,
    double,
    empty,
    time_of("seconds", float("nan")),
    time_of("seconds", -1.0),
    time_of("model_seconds", float("inf")),
    lambda line: line.pop("seal"),
    lambda line: line.update(more=1),
]


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_partial_line_that_was_changed_is_dropped(tmp_path, change, resealed):
    suite = with_overrides(load_suite("quick-v1"), n=24, seed=None)
    suite = replace(suite, plan=tuple((task, threats[:1]) for task, threats in suite.plan))
    clip = wrap(ToyClip())
    (whole,) = run(suite, clip, tmp_path)
    (path,) = tmp_path.rglob("*.json")
    data = load_task(suite.plan[0][0], n=24, seed=suite.seed)
    job = prepare(clip, data, suite.plan[0][1][0], seed=suite.seed, suite=suite)
    kept = Partial(path.with_suffix(".partial"), whole.identity)
    execute(job, Resources(CPU, 2), keep=kept.append)
    path.unlink()
    first, second, *_ = kept.path.read_text().splitlines()
    assert len(kept.read()) == 3
    line = json.loads(first)
    change(line)
    if resealed:
        # As if by somebody who knows how: still nothing may end in a traceback.
        body = {key: value for key, value in line.items() if key != "seal"}
        try:
            line["seal"] = digest_of(body)
        except ValueError:
            pytest.skip("no seal over such numbers")
    kept.path.write_text(f"{json.dumps(line)}\n{second}\n")
    said: list[str] = []
    progress = RunProgress(Console(quiet=True))
    progress.say = said.append
    (again,) = run_model(clip, suite, Resources(CPU, 16), out=tmp_path, progress=progress)
    assert again.status == "ok"
    if not (resealed and change is flip):
        assert again.samples == whole.samples
    if not (resealed and change in (flip, CHANGES[-2])):
        assert any("1 of 2 lines are not as they were written" in text for text in said)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmtard_bench", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SLOW_SUITE = """
name = "slow-v1"
description = "long enough to be killed in the middle of its second record"
n = 192
seed = 0
tasks = ["digits/digit"]
[[threats]]
attack = "pgd-2"
norm = "linf"
eps = "8/255"
[[threats]]
attack = "apgd-pair"
norm = "linf"
eps = "8/255"
"""


def test_kill_and_resume_gives_the_same_verdicts(tmp_path):
    (tmp_path / "slow-v1.toml").write_text(SLOW_SUITE)
    command = ["run", "slow-v1.toml", "--model", "tiny-clip"]
    process = start([*command, "--batch-size", "32"], tmp_path)
    partial = wait_for("*apgd-pair*.partial", tmp_path / "runs", process)

    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = len(partial.read_text().splitlines())
    assert 1 <= kept < 3
    (first,) = (tmp_path / "runs").rglob("*pgd-2*.json")
    before = first.stat().st_mtime_ns

    again = start([*command, "--batch-size", "7"], tmp_path)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "already there" in output
    assert first.stat().st_mtime_ns == before
    assert not list((tmp_path / "runs").rglob("*.partial"))

    (tmp_path / "slow-v1.toml").write_text(SLOW_SUITE)
    clip, suite = mb.load_model("tiny-clip"), load_suite(str(tmp_path / "slow-v1.toml"))
    uninterrupted = run(suite, clip, tmp_path / "other")
    folder = run_folder(tmp_path / "runs", suite, clip)
    resumed = {r.identity: r for r in map(read_record, folder.glob("*.json"))}
    assert len(resumed) == 2
    for record in uninterrupted:
        assert truth(resumed[record.identity]) == truth(record)


def test_two_processes_may_not_work_in_one_run_directory(forked, tmp_path):
    suite = with_overrides(load_suite("quick-v1"), n=3, seed=None)
    folder = run_folder(tmp_path / "runs", suite, mb.load_model("tiny-clip"))
    folder.mkdir(parents=True)
    command = ["run", "quick-v1", "--model", "tiny-clip", "--n", "3"]
    with FileLock(folder / ".lock"):
        assert_sentence(forked(*command), "Another process is working in", "--out")
    # A lock file that a dead process left behind does not matter.
    assert (folder / ".lock").exists()
    assert forked(*command).returncode == 0


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    (tmp_path / "slow-v1.toml").write_text(SLOW_SUITE)
    # A robust model, so that the second record cannot be done before the signal is sent.
    process = start(["run", "slow-v1.toml", "--model", "teacher-robust"], tmp_path)
    wait_for("*pgd-2*.json", tmp_path / "runs", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "the same command resumes from there" in errors


def test_show_and_leaderboard_read_a_run(here, tmp_path):
    assert here("run", "quick-v1", "--model", "tiny-clip", "--n", "3").returncode == 0
    shown = here("show", "runs")
    assert shown.returncode == 0
    assert "worst case linf 8/255" in shown.stdout
    records = json.loads(here("show", "runs", "--json").stdout)
    assert len(records) == 3
    leaderboard = ("leaderboard", "--records", "runs", "--output", "board/README.md")
    assert here(*leaderboard).returncode == 0
    text = (tmp_path / "board" / "README.md").read_text()
    assert "mmtard-bench run quick-v1 --model tiny-clip --n 3" in text
    assert here(*leaderboard, "--check").returncode == 0
    (tmp_path / "board" / "README.md").write_text(text.replace("3 samples", "30 samples"))
    stale = here(*leaderboard, "--check")
    assert stale.returncode == 1
    assert "stale" in stale.stderr


def test_lists_and_doctor(here):
    for kind in ("models", "datasets", "tasks", "threats", "protocols", "suites"):
        listed = json.loads(here("list", kind, "--json").stdout)
        assert listed
        assert all(item["name"] and item["description"] for item in listed)
    doctor = here("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "everything fits together" in doctor.stdout


def test_doctor_names_a_torchvision_of_another_torch(cli, tmp_path):
    (tmp_path / "torchvision").mkdir()
    fake = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(fake)
    done = cli("doctor")
    assert done.returncode == 1
    assert "do not match" in done.stdout
    assert "install both from one place" in done.stdout


def test_two_records_of_one_task_with_other_samples_have_no_worst_case():
    from mmtard_bench.records.worst import worst_cases

    one, two = score("pgd-1", batch_size=16, n=4), score("pgd-2", batch_size=16, n=5)
    with pytest.raises(InputError, match="same samples"):
        worst_cases([one, two])


def test_a_threat_model_that_does_not_suit_costs_the_others_nothing(tmp_path):
    path = tmp_path / "mixed-v1.toml"
    path.write_text(
        RESTRICTED.replace('["digits/digit", "digits/unseen"]', '["digits/retrieval"]')
        .replace("digits/unseen", "digits/retrieval")
        .replace('{attack = "pgd-1", norm = "linf", eps = "8/255"}', TEXT_ATTACK)
    )
    suite = load_suite(str(path))
    records = []
    progress = RunProgress(Console(quiet=True))
    with pytest.raises(mb.InputError, match="text-charmer-k1"):
        for record in run_model(
            wrap(ToyClip()), suite, Resources(CPU, 16), out=tmp_path, progress=progress
        ):
            records.append(record)
    assert [(record.threat.attack, record.status) for record in records] == [("pgd-2", "ok")]


TEXT_ATTACK = '{attack = "text-charmer-k1", norm = "levenshtein", eps = "1/1"}'
