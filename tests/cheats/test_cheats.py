"""Models that hide their gradients get a flag, and honest ones do not."""

import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.leaderboard.badges import MASKING
from mmtard_bench.tasks.samples import find_task, load_task
from tests.cheats.models import PYTHON, WEIGHTS_ALONE, Cheat

CPU = Resources(torch.device("cpu"), 64, workers=0)


@pytest.fixture(scope="module")
def data():
    return load_task(find_task("digits/digit"), n=64, seed=0)


def clip_of(trick):
    honest = mb.load_model("tiny-clip")
    return mb.Clip(Cheat(trick), honest.tokenizer, honest.preprocess, "cheat", architecture="cheat")


@full_float32()
def flags(clip, data):
    return {flag.code for flag in Bench(clip, data, "native", CPU).inspect()}


@pytest.mark.parametrize("name", ["bright", "checker", "random filter"])
def test_weights_with_the_answers_of_a_model_and_a_useless_gradient(name, data, tmp_path):
    clip = mb.load_model(WEIGHTS_ALONE[name](tmp_path / "decoy"))
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-20", eps="8/255", n=32)
    honest = mb.evaluate("tiny-clip", task="digits/digit", threat="pgd-20", eps="8/255", n=32)
    # The cheat works: the same answers, and robust where the honest weights are not.
    assert record.clean_accuracy == honest.clean_accuracy > 0.9
    assert honest.robust_accuracy == 0
    assert record.robust_accuracy > 0.5
    codes = {flag.code for flag in record.flags}
    assert {"gradient-does-not-predict", "precision-dependent"} <= codes & MASKING


def test_weights_whose_logits_are_rounded_to_a_few_levels(tmp_path):
    clip = mb.load_model(WEIGHTS_ALONE["plateau"](tmp_path / "plateau"))
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-20", eps="8/255", n=32)
    codes = {flag.code for flag in record.flags}
    assert {"coarse-logits", "dominant-dimension"} <= codes & MASKING


@pytest.mark.parametrize("name", sorted(PYTHON))
def test_a_trick_in_python_gets_its_flag(name, data):
    trick, code = PYTHON[name]
    torch.manual_seed(0)
    assert code in flags(clip_of(trick), data)
    assert code in MASKING


def test_a_decoy_is_robust_at_a_radius_where_no_classifier_is(data):
    trick, _ = PYTHON["decoy"]
    assert "robust-at-any-radius" in flags(clip_of(trick), data) & MASKING


def test_the_wrapper_without_a_trick_is_honest(data):
    assert flags(clip_of(lambda model, images: model.base.encode_image(images)), data) == set()


@pytest.mark.parametrize("name", mb.list_models())
def test_no_shipped_model_is_flagged(name, data):
    assert flags(mb.load_model(name), data) == set()


@pytest.mark.parametrize(
    "name", ["ViT-S-32-alt:random", pytest.param("RN50:random", marks=pytest.mark.slow)]
)
def test_a_real_architecture_is_not_flagged(name, data):
    clip = mb.load_model(name)
    few = load_task(find_task("digits/digit"), n=4, seed=0)
    assert flags(clip, few) & MASKING == set()
