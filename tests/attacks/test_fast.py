"""The fast engine against the reference code: the same steps, the same projections."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

import mmtard_bench as mb
from mmtard_bench.attacks import losses
from mmtard_bench.attacks.base import CountPasses, Engine, Work, norm_of
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.attacks.fast import rows
from mmtard_bench.attacks.fast.apgd import Apgd, checkpoints
from mmtard_bench.attacks.fast.fab import Plane
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.pgd import Pgd
from mmtard_bench.attacks.fast.rows import Samples, search_all
from mmtard_bench.attacks.fast.square import Square, pattern
from mmtard_bench.types import Eps, ThreatModel
from tests.attacks.test_reference import Small
from tests.conftest import Linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("scale", [1, 30])
def test_apgd_goes_through_the_points_of_the_reference_code(norm, targeted, scale):
    # In float64: in float32 sums of another order drift apart within a hundred steps. The reference
    # code keeps losses in float32, so that a step may count as a rise for one and not the other.
    model = Small().double()
    images = torch.rand((8, 3, 8, 8), generator=torch.Generator().manual_seed(5)).double()
    labels = model(images).argmax(1)
    # In a small ball all end in a corner; in a large one they do not, and the steps' sizes matter.
    eps = scale / 255 if norm == "linf" else 4 * scale / 255
    looked = []

    class Seen(torch.nn.Module):
        def forward(self, points):
            looked.append(points.detach().clone())
            return model(points)

    loss = losses.dlr_targeted if targeted else losses.cross_entropy
    search = Apgd(name="apgd", loss=loss, norm=norm, eps=eps, targeted=targeted)
    targets = model(images).sort(dim=1).indices[:, -2:-1]
    samples = Samples(images, labels, targets, [str(i) for i in range(8)])
    state = search.start(samples, [(i, 0) for i in range(8)], 0)
    start = state["points"].clone()
    passes = Passes(Seen(), CPU, "float32")
    for _ in range(100):
        search.step(state, passes)
    ours = [*looked, state["points"]]
    looked.clear()
    cls, extra = (APGDAttack_targeted, {}) if targeted else (APGDAttack, {"loss": "ce"})
    reference = cls(Seen(), norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, device=CPU, **extra)
    reference.y_target = targets[:, 0]
    reference.init_hyperparam(images)
    reference.attack_single_run(images, labels, x_init=start)
    assert len(looked) == len(ours) == 101
    for step, (a, b) in enumerate(zip(ours, looked, strict=True)):
        assert (a - b).abs().amax() < 1e-3 * eps, step


def test_checkpoints_are_those_of_the_paper():
    # p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("far", [0.1, 1.0, 100.0])
def test_projection_is_the_reference_code_s(norm, far):
    generator = torch.Generator().manual_seed(3)
    points = torch.rand((40, 3, 8, 8), generator=generator)
    points[:20] = points[:20].round()  # many pixels on the box
    normal = torch.randn((40, 3, 8, 8), generator=generator)
    normal[5] *= 1e-4
    normal[6] = 0
    offset = far * torch.randn(40, generator=generator) * normal.flatten(1).norm(dim=1)
    ours = Plane(normal, norm).reach(points, offset).flatten(1)
    theirs = {"linf": projection_linf, "l2": projection_l2}[norm](
        points.flatten(1), normal.flatten(1), offset + (normal * points).flatten(1).sum(1)
    )
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().amax(1)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 9, 29])
def test_patterns_of_square_are_the_reference_code_s(side):
    if side == 1:
        assert pattern(1).item() == 1
        return
    reference = SquareAttack(None, norm="L2", eps=1.0, device=CPU)
    theirs = reference.eta(side)
    assert torch.allclose(pattern(side), theirs, atol=1e-6) or torch.allclose(
        pattern(side).T, theirs, atol=1e-6
    )


class Rough(nn.Module):
    """Under autocast the second class wins, in float32 the first does."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1, keepdim=True)
        first = torch.zeros_like(mean) if torch.is_autocast_enabled("cpu") else mean * 0 + 2
        return torch.cat([first, 1 + 1e-3 * mean, -1 + 0 * mean, -1 + 0 * mean], 1)


@pytest.mark.parametrize("name", ["pgd-4", "apgd-pair"])
def test_what_a_lower_precision_finds_counts_once_float32_agrees(name):
    images, labels = torch.rand(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)
    threat = ThreatModel(name, "linf", Eps.parse("8/255"))

    def run(model):
        attack = build_attack(threat, n_classes=4, engine=Engine("fast", "bfloat16"))
        assert attack.parameters["attack_precision"] == "bfloat16"
        return attack.whole(
            Work(
                model=model,
                images=images,
                labels=labels,
                ids=["a", "b", "c"],
                seed=0,
                batch_size=64,
            ),
        )

    counted = CountPasses(Rough())
    result = run(counted)
    # Every claim was looked at again, none was shared, and the search went on to its end.
    assert result.broken_by == [None] * 3
    cost = {"pgd-4": (5, 4), "apgd-pair": (101 + 1 + 3 * 101, 100 + 3 * 100)}[name]
    looks = {"pgd-4": 5, "apgd-pair": 101 + 3 * 101}[name]
    assert result.forward == [cost[0] + looks] * 3
    assert result.backward == [cost[1]] * 3
    assert counted.forward_rows == sum(result.forward)
    broken = run(Linear(4, shape=(3, 8, 8)))
    assert any(broken.broken_by)


class Window(nn.Module):
    """Under autocast every point is adversarial, in float32 those of a medium brightness."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(1, keepdim=True)
        if torch.is_autocast_enabled("cpu"):
            wrong = 1 + mean
        else:
            wrong = 0.01 - (mean - 0.5 - 1.5 * STEP).abs() / STEP + 0.6
        return torch.cat([torch.zeros_like(mean), wrong, mean * 0 - 1, mean * 0 - 1], 1)


STEP = 2.5 * (8 / 255) / 4


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_claim_that_float32_denies_hides_no_later_one(together, monkeypatch):
    """Of four steps the second and third are adversarial in float32, not the first or the last."""
    monkeypatch.setattr(rows, "TOGETHER", {"cpu": together})
    images, labels = torch.full((3, 3, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    search = Pgd(name="pgd-4", loss=losses.cross_entropy, steps=4, norm="linf", eps=8 / 255)
    monkeypatch.setattr(
        Pgd, "begin", lambda self, images, _: self.ball(images) | {"points": images}
    )
    samples, found = Samples(images, labels, labels[:, None], "abc"), rows.Found()
    passes = Passes(Window(), CPU, "bfloat16")
    search_all(search, samples, [0, 1, 2], passes, seed=0, batch_size=2, found=found)
    assert sorted(found.adversarial) == [0, 1, 2]
    for image in found.adversarial.values():
        assert (image.mean() - 0.5 - STEP).abs() < 1e-4
    # The clean image is denied, the next point confirmed: further ones are not asked for.
    looked = {1: 2, 2: 2, 4: 4}[together]
    assert found.forward == dict.fromkeys(range(3), looked + 2)
    assert found.backward == dict.fromkeys(range(3), looked)


def test_bfloat16_breaks_what_float32_breaks():
    record, lower = (
        mb.evaluate(
            "student-tecoa",
            task="digits/digit",
            threat="pgd-10",
            eps="8/255",
            n=64,
            precision=precision,
        )
        for precision in ("float32", "bfloat16")
    )
    assert record.identity != lower.identity
    assert lower.flags == record.flags == []
    differ = sum(a.robust != b.robust for a, b in zip(record.samples, lower.samples, strict=True))
    assert differ <= 2
    assert 0 < lower.robust_accuracy < lower.clean_accuracy


@pytest.mark.parametrize("name", ["cw-l2", "autoattack-rand"])
def test_a_precision_is_refused_where_there_is_no_fast_attack(name):
    threat = ThreatModel(name, "l2", Eps.parse("1/2"))
    with pytest.raises(mb.InputError, match=r"bfloat16 .* pgd-"):
        build_attack(threat, n_classes=4, engine=Engine("fast", "bfloat16"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (5, 9), (33, 40)])
def test_square_stays_in_the_ball_and_reaches_every_pixel(norm, size):
    class Seen(nn.Module):
        """Always right; remembers where it was touched."""

        touched = torch.zeros(size, dtype=torch.bool)

        def forward(self, points):
            self.touched |= ((points - images[0]).abs() > 1e-6).flatten(0, 1).any(0)
            return torch.tensor([[1.0, 0.0]]).expand(len(points), 2)

    images = torch.full((2, 3, *size), 0.5)
    labels = torch.zeros(2, dtype=torch.long)
    search = Square(norm=norm, eps=0.25, steps=60)
    model = Seen()
    passes = Passes(model, CPU, "float32")
    samples = Samples(images, labels, labels[:, None], ["a", "b"])
    state = search.start(samples, [(0, 0), (1, 0)], 0)
    for _ in range(60):
        search.step(state, passes)
        distance = norm_of(state["points"] - images, norm)
        assert (distance <= 0.25 * (1 + 1e-5)).all()
    assert model.touched.all()
