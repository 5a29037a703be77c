"""Images made with other gradients break a model whose own gradients mislead."""

import pytest

import mmtard_bench as mb
from mmtard_bench.leaderboard.verify.reattacked import SURROGATES
from mmtard_bench.leaderboard.verify.transfer import broken_by_others
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, ThreatModel
from tests.cheats.models import checker
from tests.leaderboard.verify.forge import CPU

SURROGATE = SURROGATES["digits"]


@pytest.fixture(scope="module")
def data():
    return load_task(find_task("digits/digit"), n=8, seed=0)


def broken(clip, data, surrogate=SURROGATE, norm="linf", eps="8/255"):
    threat = ThreatModel("pgd-20", norm, Eps.parse(eps, norm=norm))
    other = surrogate and mb.load_model(surrogate)
    return broken_by_others(clip, data, threat, CPU, surrogate=other, seed=3)


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("l2", "128/255")])
def test_a_decoy_falls_to_the_images_of_another_model(data, tmp_path, norm, eps):
    decoy = mb.load_model(checker(tmp_path / "decoy"))
    found = broken(decoy, data, norm=norm, eps=eps)
    assert list(found.values()).count(f"images of {SURROGATE}") >= 7
    assert set(found) <= set(data.manifest.ids)
    assert f"images of {SURROGATE}" not in broken(decoy, data, None, norm, eps).values()


def test_the_gradients_of_an_honest_model_serve_in_each_form(data):
    """tiny-clip is 0% robust: its smoothed gradients alone break every sample."""
    assert set(broken(mb.load_model("tiny-clip"), data, None)) == set(data.manifest.ids)


def test_a_robust_model_stays_robust(data):
    assert len(broken(mb.load_model("teacher-robust"), data, eps="2/255")) <= 1
