"""Samples of a record attacked once more."""

from dataclasses import replace

import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import attack_again
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.checks import inside
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import FAST, REFERENCE, prepare
from mmtard_bench.evaluation.sources import chosen, data_of, suite_of, threat_of
from mmtard_bench.records.schema import SuiteFacts
from mmtard_bench.records.worst import balls_of
from mmtard_bench.tasks import suites
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.tasks.suites import load_suite
from mmtard_bench.types import Eps, ThreatModel
from tests.leaderboard.test_leaderboard import made

RESOURCES = Resources(torch.device("cpu"), batch_size=16)


@pytest.fixture(scope="module")
def data():
    return load_task(find_task("digits/digit"), n=40, seed=0)


@pytest.fixture(scope="module")
def clip():
    return mb.load_model("student-tecoa")


def threat(attack: str, eps: str = "8/255", norm: str = "linf") -> ThreatModel:
    return ThreatModel(attack, norm, Eps.parse(eps, norm=norm))


@pytest.mark.parametrize(
    ("attack", "norm", "eps", "engine"),
    [
        ("pgd-5", "linf", "8/255", FAST),
        ("pgd-5", "l2", "128/255", REFERENCE),
        ("text-charmer-k1", "levenshtein", "1/1", FAST),
    ],
)
def test_the_verdicts_of_an_evaluation_come_again(clip, data, attack, norm, eps, engine):
    model = threat(attack, eps, norm)
    record = execute(prepare(clip, data, model, seed=3, engine=engine), RESOURCES)
    outcomes = attack_again(clip, data, model, RESOURCES, seed=3, engine=engine)
    found = {outcome.id: outcome for outcome in outcomes}
    assert len(found) == 40
    for sample in record.samples:
        outcome = found[sample.id]
        assert outcome.label == sample.label
        assert outcome.before == sample.prediction
        assert outcome.broken == (sample.broken_by is not None and not sample.unconfirmed)
        assert outcome.broken_by == sample.broken_by
        assert (outcome.adversarial is not None) == (sample.broken_by is not None)
        assert outcome.broken == (sample.clean_correct and outcome.after != sample.label)
        assert (outcome.name is not None) == (sample.edit is not None)
    assert {o.broken for o in found.values()} == {True, False}


def test_images_are_in_the_ball_and_misclassified(clip, data):
    model = threat("pgd-5")
    outcomes = list(attack_again(clip, data, model, RESOURCES, seed=0))
    broken = [outcome for outcome in outcomes if outcome.broken]
    bench = Bench(clip, chosen(data, [o.id for o in broken]), "native", RESOURCES)
    images = torch.stack([outcome.adversarial for outcome in broken])
    rows = range(len(broken))
    assert torch.equal(bench.images(rows), torch.stack([outcome.image for outcome in broken]))
    assert inside(images, bench.images(rows), norm="linf", eps=8 / 255).all()
    verdicts = bench.judge(images, rows)
    assert [v.prediction for v in verdicts] == [outcome.after for outcome in broken]
    assert not any(verdict.right for verdict in verdicts)


def test_verdicts_do_not_follow_from_who_else_is_attacked(clip, data):
    model = threat("pgd-10", "10/255")
    few = chosen(data, data.manifest.ids[:12])
    alone = {o.id: o.broken for o in attack_again(clip, few, model, RESOURCES, seed=1)}
    small = replace(RESOURCES, batch_size=5)
    again = {o.id: o.broken for o in attack_again(clip, few, model, small, seed=1)}
    assert alone == again


def test_the_clean_pass_is_that_of_an_evaluation(clip, data):
    record = execute(prepare(clip, data, threat("pgd-1"), seed=0), RESOURCES)
    bench = Bench(clip, data, "native", RESOURCES)
    assert [v.prediction for v in bench.clean()] == [s.prediction for s in record.samples]
    assert bench.inspect() == []


def test_inside_looks_at_ball_and_box():
    images = torch.tensor([0.0, 0.5, 1.0]).repeat(1, 3, 1)[None].expand(5, 1, 3, 3).clone()
    found = images.clone()
    found[1, 0, 0, 1] += 8 / 255
    found[2, 0, 0, 1] += 8.1 / 255
    found[3, 0, 0, 0] -= 1 / 255
    found[4, 0, 0, 2] += 1 / 255
    assert inside(found, images, norm="linf", eps=8 / 255).tolist() == [1, 1, 0, 0, 0]
    far = images + 0.0
    far[0, 0] = (images[0, 0] - 0.5) * 0.8 + 0.5  # six pixels by 0.1
    distance = 0.1 * 6**0.5
    assert inside(far, images, norm="l2", eps=distance + 1e-4).tolist() == [True] * 5
    assert inside(far, images, norm="l2", eps=distance - 1e-4).tolist() == [False] + [True] * 4


def test_unknown_samples_are_refused(data):
    assert chosen(data, data.manifest.ids[3:5]).labels == data.labels[3:5]
    with pytest.raises(InputError, match="'nobody' is no sample"):
        chosen(data, ["nobody"])


def test_balls_say_what_stands_and_what_broke():
    one, other = made("rrbbw", attack="pgd-5"), made("rbrbw", attack="cw-linf-5")
    (ball,) = balls_of([one, other])
    assert ball.robust == ["s/0"]
    assert ball.broken == ["s/1", "s/2", "s/3"]
    assert ball.strongest is other
    assert not ball.edits


@pytest.mark.parametrize(
    ("stronger", "weaker"),
    [
        ("autoattack-standard", "apgd-pair-5r"),
        ("apgd-pair-5r", "apgd-pair"),
        ("apgd-pair", "autoattack-rand"),
        ("autoattack-rand", "cw-linf-100"),
        ("cw-linf-10", "pgd-100"),
        ("pgd-100", "pgd-20"),
        ("pgd-20", "pgd-3"),
        ("pgd-1", "cw-l2"),
        ("cw-l2", "somebody-elses"),
    ],
)
def test_attacks_have_an_order(stronger, weaker):
    for pair in ((stronger, weaker), (weaker, stronger)):
        (ball,) = balls_of([made("rr", attack=name) for name in pair])
        assert ball.strongest.threat.attack == stronger


def test_balls_of_edits_stand_apart():
    pixels = made("rb")
    facts = pixels.threat.model_copy(update={"parameters": {"edits": 1}})
    text = made("bb", threat=facts)
    assert [(ball.name, ball.edits) for ball in balls_of([pixels, text])] == [
        ("linf 8/255", False),
        ("linf 8/255 + 1 edit", True),
    ]


def of_suite(name: str, digest: str | None = None, n: int = 24):
    suite = load_suite("quick-v1")
    facts = SuiteFacts(
        name=name, protocol=suite.protocol, digest=digest or suite.digest, records=suite.records
    )
    return made("r" * n, suite=facts)


def test_the_suite_and_data_of_a_record():
    suite = load_suite("quick-v1")
    assert suite_of(of_suite("quick-v1")).digest == suite.digest
    with pytest.raises(InputError, match="another suite"):
        suite_of(of_suite("quick-v1", "0" * 64))
    with pytest.raises(InputError, match="does not ship"):
        suite_of(of_suite("slow-v1"))
    with pytest.raises(InputError, match="has no task 't'"):
        data_of(of_suite("quick-v1"), suite)
    record = of_suite("quick-v1")
    task = record.task.model_copy(update={"name": "digits/digit"})
    with pytest.raises(InputError, match="not those that quick-v1 draws"):
        data_of(record.model_copy(update={"task": task}), suite)
    assert threat_of(record) == ThreatModel("pgd-5", "linf", Eps.parse("8/255"))


def test_a_suite_is_never_a_file_that_lies_around(tmp_path, monkeypatch):
    """A record may name "quick-v1.toml", which load_suite would take for a path."""
    monkeypatch.chdir(tmp_path)
    shipped = (suites.suite_folder() / "quick-v1.toml").read_text()
    (tmp_path / "quick-v1.toml").write_text(shipped)
    with pytest.raises(InputError, match="does not ship"):
        suite_of(of_suite("quick-v1.toml"))
