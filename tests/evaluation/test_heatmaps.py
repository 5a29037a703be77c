"""Maps of relevance against closed forms and planted models, and the command that compares them."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from scipy import stats
from torch import nn

import mmtard_bench as mb
from mmtard_bench.cli import main
from mmtard_bench.cli.heatmaps import _answer
from mmtard_bench.data.digits import digits_test
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.heatmaps import (
    Mean,
    compare_looks,
    figures_of,
    mean_of,
    points_at,
    rank_correlations,
    share_on,
)
from mmtard_bench.evaluation.relevance import relevance
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, ThreatModel

CPU = torch.device("cpu")
PGD = ThreatModel("pgd-5", "linf", Eps.parse("8/255"))


class Planted(ModifiedResNet):
    """A residual tower whose stages are the pixels' channels, and which reads one place of them."""

    def __init__(self, place):
        super().__init__(layers=(1, 1, 1, 1), output_dim=4, heads=8, image_size=32, width=8)
        self.place = place
        self.layer1 = nn.AvgPool2d(4)  # 8 x 8: large enough; the later ones are not
        self.layer2 = self.layer3 = self.layer4 = nn.AdaptiveAvgPool2d(4)

    def forward(self, images):
        grid = self.layer1(images)
        self.layer4(self.layer3(self.layer2(grid)))
        row, column = self.place
        red = grid[:, 0, row, column]
        return torch.stack([3 * red, -red], dim=1)


def test_a_map_is_activation_times_gradient_at_the_place_that_is_read():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = Planted((1, 6)).eval()
    maps, layer = relevance(tower, tower, images, torch.tensor([0, 1]))
    assert layer == "layer1, 8 x 8"
    red = torch.nn.functional.avg_pool2d(images, 4)[:, 0, 1, 6]
    grid = torch.zeros(2, 1, 8, 8)
    grid[:, 0, 1, 6] = red * torch.tensor([3.0, -1.0])
    expected = torch.nn.functional.interpolate(grid, size=(32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, expected)
    assert (maps[0] > 0).any(1).nonzero().squeeze().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_transformer_has_a_map_of_its_patches():
    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=3
    ).eval()
    images = torch.rand(2, 3, 32, 32)
    labels = torch.tensor([2, 0])
    maps, layer = relevance(tower, tower, images, labels)
    assert layer == "input of the last attention, 4 x 4"
    kept = []
    hook = tower.transformer.resblocks[-1].ln_1.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    logits = tower(images.requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[[0, 1], labels].sum(), kept)
    grid = (kept[0] * gradient).sum(2)[:, 1:].reshape(2, 1, 4, 4)
    expected = torch.nn.functional.interpolate(grid, size=(32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, expected.detach())


def test_a_tower_without_places_is_refused():
    tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(InputError, match="no heat maps for the image tower Sequential"):
        relevance(tower, tower, torch.rand(1, 3, 32, 32), torch.tensor([0]))
    small = Planted((0, 0)).eval()
    with pytest.raises(InputError, match="No stage of the image tower has a grid of 7 x 7"):
        relevance(small, small, torch.rand(1, 3, 24, 24), torch.tensor([0]))


def test_rank_correlation_is_scipys_and_a_constant_map_has_none():
    rng = np.random.default_rng(0)
    one, other = rng.integers(5, size=(2, 3, 4, 6)).astype(float)
    one[2] = 1.0
    found = rank_correlations(one, other)
    pairs = zip(one[:2], other[:2], strict=True)
    expected = [stats.spearmanr(a.ravel(), b.ravel())[0] for a, b in pairs]
    np.testing.assert_allclose(found[:2], expected)
    assert np.isnan(found[2])
    np.testing.assert_allclose(rank_correlations(other, other**3), 1)
    assert mean_of(found).left_out == 1
    assert mean_of(found).mean == pytest.approx(np.mean(expected))


def test_the_share_on_the_ink_counts_positive_relevance():
    ink = np.array([[[True, False], [False, False]]] * 3)
    maps = np.array([[[3.0, 1.0], [-9.0, 0.0]], [[1.0, 2.0], [0.0, 1.0]], [[-1.0, -2], [-1, -1]]])
    np.testing.assert_allclose(share_on(maps, ink)[:2], [0.75, 0.25])
    assert np.isnan(share_on(maps, ink)[2])
    np.testing.assert_allclose(points_at(maps, ink), [1, 0, 1])


def test_the_interval_of_a_mean_covers_it():
    rng = np.random.default_rng(1)
    means = [mean_of(rng.normal(0.3, 1.0, 60), seed=i) for i in range(200)]
    assert 0.88 <= np.mean([m.low <= 0.3 <= m.high for m in means]) <= 0.99


def test_the_ink_of_a_digit_is_where_its_colour_is():
    split = digits_test()
    for index in range(20):
        image, ink = split.image(index).astype(float), split.ink(index)
        assert 0.05 < ink.mean() < 0.5
        inside, outside = image[ink].mean(0), image[~ink].mean(0)
        nearer = np.linalg.norm(image - inside, axis=2) < np.linalg.norm(image - outside, axis=2)
        # All but pixels that are half covered, and those of another sample do not fit.
        assert (nearer == ink).mean() > 0.9 > (nearer == split.ink(index + 20)).mean()


def test_a_model_looks_where_it_looks_and_another_one_elsewhere():
    data = load_task(find_task("digits/digit"), n=6, seed=0)
    student, teacher = mb.load_model("student-ard"), mb.load_model("teacher-robust")
    twin = replace(mb.load_model("student-ard"), name="twin")
    found = compare_looks([student, twin, teacher], data, PGD, seed=0, device=CPU)
    figures = figures_of(found)
    for view in ("clean", "adversarial"):
        assert figures["student-ard with twin"][view].mean == 1
        assert figures["student-ard with teacher-robust"][view].mean < 0.9
        assert figures["twin minus teacher-robust"][view].low > 0
    assert np.abs(found.images["adversarial"] - found.images["clean"]).max() <= 8 / 255 + 1e-6
    right = found.student.predicted["clean"] == np.array(data.labels)
    broken = found.student.predicted["adversarial"] != np.array(data.labels)
    assert right.sum() >= 3
    assert broken.sum() > (~right).sum()


def test_the_command_writes_a_picture_and_figures(tmp_path, capsys):
    out = tmp_path / "maps"
    words = ["heatmaps", "--student", "student-mmt-ard", "--teacher", "teacher-clean"]
    words += ["--teacher", "teacher-robust", "--n", "4", "--shown", "2", "--threat", "pgd-2"]
    assert main([*words, "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "student-mmt-ard (layer1, 8 x 8)" in said
    assert "Under attack, its maps correlate" in said
    assert (out / "heatmaps.png").stat().st_size > 20_000
    body = json.loads((out / "heatmaps.json").read_text())
    assert body["n"] == len(body["samples"]) == 4
    assert body["figures"]["teacher-clean: on the ink"]["clean"]["mean"] > 0
    assert f"{body['figures']['student-mmt-ard with teacher-clean']['clean']['mean']:.2f}" in said


def answer_of(alike, other, gap):
    """The command's sentence for made-up means: (mean, low, high) of two teachers and their gap."""
    figures = {"S, clean with adversarial": {"adversarial": Mean(0.9, 0.8, 1.0, 0)}}
    for name, mean in zip("AB", alike, strict=True):
        figures[f"S with {name}"] = {"clean": Mean(*mean, 0)}
        figures[f"S with {name} on another image"] = {"clean": Mean(*other, 0)}
    figures["A minus B"] = {"clean": Mean(*gap, 0)}
    looks = [SimpleNamespace(name=name) for name in "SAB"]
    return _answer(SimpleNamespace(student=looks[0], models=looks), figures)


def test_the_answer_follows_the_intervals():
    chance, near, far = (0.0, -0.1, 0.1), (0.5, 0.4, 0.6), (0.3, 0.2, 0.4)
    assert "closer to those of A than to those of B: correlations of 0.50 and 0.30" in answer_of(
        [near, far], chance, (0.2, 0.1, 0.3)
    )
    assert "closer to those of B than to those of A" in answer_of(
        [far, near], chance, (-0.2, -0.3, -0.1)
    )
    assert "is not significant" in answer_of([near, far], chance, (0.2, -0.1, 0.5))
    assert "than with their maps of other images" in answer_of(
        [near, far], (0.5, 0.3, 0.6), (0.2, 0.1, 0.3)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "0.03"], "0.03"),
        (["--teacher", "no-such-model"], "no-such-model"),
        (["--task", "digits/retrieval"], "which has no true class"),
        (["--teacher", "student-ard"], "Name each model once"),
    ],
)
def test_bad_input_is_a_message(words, message, tmp_path, capsys):
    fixed = ["heatmaps", "--student", "student-ard", "--teacher", "teacher-robust", "--n", "2"]
    assert main([*fixed, *words, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


def test_without_captum_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    tower = Planted((0, 0)).eval()
    with pytest.raises(InputError, match=r"mmtard-bench\[heatmaps\]"):
        relevance(tower, tower, torch.rand(1, 3, 32, 32), torch.tensor([0]))
