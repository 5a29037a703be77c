"""The fast engine against the reference code: the same steps, the same projections."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.square import SquareAttack

from mmtard_bench.attacks.fast import losses
from mmtard_bench.attacks.fast.apgd import Apgd, checkpoints
from mmtard_bench.attacks.fast.fab import to_plane
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Samples
from mmtard_bench.attacks.fast.square import pattern
from tests.attacks.test_reference import Small

CPU = torch.device("cpu")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_goes_through_the_points_of_the_reference_code(norm, targeted):
    # In float64: in float32 sums of another order drift apart within a hundred steps. The reference
    # code keeps losses in float32, so that a step may count as a rise for one and not the other.
    model = Small().double()
    images = torch.rand((8, 3, 8, 8), generator=torch.Generator().manual_seed(5)).double()
    labels = model(images).argmax(1)
    # A radius at which nothing breaks, so that both go all the way.
    eps = 1 / 255 if norm == "linf" else 4 / 255
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
    ours = to_plane(points, normal, offset, norm=norm).flatten(1)
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
