"""The attacked bound, against models whose bound is known, and through the command line."""

import json

import pytest
import torch
from torch import nn

import mmtard_bench as mb
from mmtard_bench.evaluation.bound import MODELS, Ensemble, Setting, bound_of, transfer_bound
from mmtard_bench.evaluation.certificates import CERTIFICATES, Answers, log_mixture
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, ThreatModel
from tests.conftest import Linear, ToyClip, assert_sentence, wrap

EPS = Eps(1, 20)
SHAPE = (3, 3, 3)
NORMAL = torch.randn(27, generator=torch.Generator().manual_seed(3))


class Ray(nn.Module):
    """Logits = slope * t + offset, where t = NORMAL (x - 1/2): the ball is an interval of t."""

    def __init__(self, slope, offset):
        super().__init__()
        self.slope, self.offset = torch.tensor(slope), torch.tensor(offset)

    def at(self, t):
        return t[..., None] * self.slope + self.offset

    def forward(self, images):
        return self.at((images - 0.5).flatten(1) @ NORMAL)


STUDENT = Ray([1.0, -1.0, 0.2], [0.5, 0.0, -0.5])
ROBUST = Ray([3.0, -2.0, 0.2], [1.5, 0.0, -0.5])
CLEAN = Ray([3.0, -2.5, 0.4], [1.5, 0.1, -0.8])


def setting(**changes):
    return Setting(threat=ThreatModel("apgd-pair", "linf", EPS), **{"steps": 20, **changes})


def attacked(models, images, labels, **changes):
    chosen = setting(**changes)
    ensemble = Ensemble(*models, share=chosen.share, temperature=chosen.temperature)
    ids = [str(i) for i in range(len(images))]
    return bound_of(ensemble, images, labels, ids=ids, setting=chosen, batch_size=32)


def samples(count=48):
    """Images away from the faces of the box, all of class 0."""
    generator = torch.Generator().manual_seed(1)
    images = 0.3 + 0.4 * torch.rand((count, *SHAPE), generator=generator)
    return images, torch.zeros(count, dtype=torch.long)


def on_grid(images, labels, share, temperature):
    """The least slacks and margins over the ball, from a fine grid of t in float64."""
    t = ((images - 0.5).flatten(1) @ NORMAL).double()
    reach = float(EPS) * float(NORMAL.abs().sum())
    grid = t[:, None] + reach * torch.linspace(-1, 1, 2001, dtype=torch.float64)
    every = labels[:, None].expand(grid.shape).reshape(-1)
    student, robust, clean = (
        model.at(grid).reshape(-1, 3) / temperature for model in (STUDENT, ROBUST, CLEAN)
    )
    weighted = [(share, robust), (1 - share, clean)]
    log_p = log_mixture([pair for pair in weighted if pair[0]], temperature=1.0)
    answers = Answers(log_p, student.log_softmax(1), every)
    return {
        name: slack(answers).view(grid.shape).amin(1).numpy()
        for name, slack in CERTIFICATES.items()
    }


def students_margin(images):
    """The least margin of the student over the ball, in closed form."""
    t = (images - 0.5).flatten(1) @ NORMAL
    reach = EPS.numerator / EPS.denominator * NORMAL.abs().sum()
    gaps = STUDENT.slope[0] - STUDENT.slope[1:], STUDENT.offset[0] - STUDENT.offset[1:]
    return (t[:, None] * gaps[0] + gaps[1] - reach * gaps[0].abs()).amin(1).numpy()


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_bound_on_linear_models(share, temperature):
    images, labels = samples()
    found = attacked((STUDENT, ROBUST, CLEAN), images, labels, share=share, temperature=temperature)
    actual = students_margin(images)
    assert (found.robust("student") == (actual > 0)).all()
    assert 0 < found.robust("student").sum() < found.right("student").sum()
    true = on_grid(images, labels, share, temperature)
    for name, least in true.items():
        clear = abs(least) > 1e-3
        assert clear.sum() > 40
        assert (found.robust(name) == (least > 0))[clear].all()
        assert (found.robust(name) <= (actual > 0)).all()
    assert found.robust("exact in KL").any()
    assert not (found.robust("Pinsker") & ~found.robust("exact in KL")).any()
    assert not (found.robust("Pinsker") & ~found.robust("total variation")).any()


def test_every_sample_is_certified_or_its_teachers_are_weak_or_it_is_far():
    images, labels = samples()
    found = attacked((STUDENT, ROBUST, CLEAN), images, labels)
    for name in CERTIFICATES:
        groups = found.robust(name).astype(int) + found.weak() + found.far(name)
        assert (groups == 1).all()
    assert found.weak().any()
    assert found.far("exact in KL").any()


def test_a_student_that_is_its_teacher_has_a_bound_without_loss():
    model, other = Linear(4, SHAPE), Linear(4, SHAPE, seed=5)
    images, labels = model.samples(32)
    found = attacked((model, model, other), images, labels, share=1.0)
    reached = model.distance(images, labels, "linf").numpy() > float(EPS)
    assert 0 < reached.sum() < 32
    for name in ("student", "teachers", "robust teacher", *CERTIFICATES):
        assert (found.robust(name) == reached).all(), name


def test_the_batch_changes_no_verdict():
    images, labels = samples(12)
    models = (STUDENT, ROBUST, CLEAN)
    whole, some = attacked(models, images, labels), attacked(models, images[:5], labels[:5])
    for name in (*MODELS, *CERTIFICATES):
        assert (whole.robust(name)[:5] == some.robust(name)).all(), name


COMMAND = ("bound", "student-ard", "--clean", "teacher-clean", "--robust", "teacher-robust")


def test_the_command(here, short_attacks):
    words = ("--eps", "3/255", "--steps", 2, "--share", 1, "--n", 5, "--json")
    done = here(*COMMAND, *words)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert len(body["samples"]) == body["n"] == 5
    for sample in body["samples"]:
        for name in CERTIFICATES:
            assert sample["student"] > 0 or sample[name] <= 0, sample
    assert sum(group["robust"] + group["not_robust"] for group in body["groups"]) == 5
    assert body["groups"][0]["robust"] == round(5 * body["robust"]["exact in KL"]) > 0
    assert body["groups"][0]["not_robust"] == 0
    # Each model is the one that was named, and the student is attacked as by the command eval.
    assert body["robust"]["clean teacher"] < body["robust"]["robust teacher"]
    record = mb.evaluate("student-ard", task="digits/digit", threat="apgd-pair", eps="3/255", n=5)
    assert record.results.clean_accuracy == body["clean"]["student"]
    robust = {sample.id for sample in record.samples if sample.robust}
    assert {sample["id"] for sample in body["samples"] if sample["student"] > 0} <= robust


def test_the_table(here, short_attacks):
    text = here(*COMMAND, "--eps", "1/255", "--steps", 1, "--share", 0.5, "--n", 2).stdout
    assert "student-ard on digits/digit, linf 1/255, 2 samples" in text
    rows = {line.split("  ")[0] for line in text.splitlines()}
    assert {"student: student-ard", "teachers: 0.5 robust + 0.5 clean"} <= rows
    assert {f"bound: {name}" for name in CERTIFICATES} <= rows
    assert "estimate from above" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--eps", "0.03"), "exact positive fraction"),
        (("--eps", "4/255", "--share", "1.5"), "from 0 (the clean teacher alone)"),
        (("--eps", "4/255", "--temperature", "0"), "temperature = 0.0; expected a number above 0"),
        (("--eps", "4/255", "--temperature", "warm"), "'warm' is not a number"),
        (("--eps", "99/1", "--norm", "l2"), "L2 radius above"),
        (("--eps", "4/255", "--task", "digits/retrieval"), "is retrieval"),
        (("--eps", "4/255", "--clean", "no-such-model"), "no-such-model"),
    ],
    ids=str,
)
def test_bad_input(here, change, said):
    assert_sentence(here(*COMMAND, "--n", 4, *change), said)


@pytest.mark.parametrize(("wrong", "said"), [(float("nan"), "NaN"), (None, "A model failed")])
def test_a_model_that_fails(wrong, said):
    class Failing(ToyClip):
        def encode_image(self, images):
            return super().encode_image(images) * wrong

    good, data = wrap(ToyClip()), load_task(find_task("digits/digit"), n=2, seed=0)
    with pytest.raises(mb.InputError, match=said):
        transfer_bound(
            wrap(Failing()),
            clean=good,
            robust=good,
            data=data,
            setting=setting(),
            device=torch.device("cpu"),
        )


def test_both_teachers_are_needed(here):
    assert_sentence(here("bound", "student-ard", "--clean", "teacher-clean"), "--robust", "--eps")
