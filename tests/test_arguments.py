"""The public functions from Python: what fits is taken, and what does not is a sentence."""

import math
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmtard_bench as mb
from mmtard_bench.attacks.base import Engine
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.schema import checked
from mmtard_bench.types import Eps, ThreatModel
from tests.conftest import ToyClip, wrap

KEYWORDS = {"task": "digits/digit", "threat": "pgd-2", "eps": "1/255", "n": 4}


def scored(model="tiny-clip", **changes):
    return mb.evaluate(model, **{**KEYWORDS, **changes})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "float64"}, "'float32' or 'bfloat16'"),
        ({"precision": None}, "'float32' or 'bfloat16'"),
        ({"engine": "Fast"}, "'fast' or 'reference'"),
        ({"engine": True}, "'fast' or 'reference'"),
        ({"n": 8.0}, "valid integer"),
        ({"n": "8"}, "valid integer"),
        ({"n": True}, "valid integer"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": -1}, "greater than or equal to 1"),
        ({"seed": "a"}, "valid integer"),
        ({"seed": 1.5}, "valid integer"),
        ({"seed": None}, "valid integer"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**32}, "less than"),
        ({"batch_size": -3}, "greater than or equal to 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"batch_size": 2.5}, "valid integer"),
        ({"threat": ["pgd-2"]}, "ThreatModel"),
        ({"threat": None}, "ThreatModel"),
        ({"threat": ""}, "not empty"),
        ({"task": 3}, "Task"),
        ({"task": Path("digits/digit")}, "Task"),
        ({"norm": "Linf"}, "'linf'"),
        ({"surface": "Native"}, "'native' or 'model'"),
        ({"device": 0}, "device"),
        ({"device": "abacus"}, "abacus"),
        ({"eps": None}, "exact positive fraction"),
        ({"eps": 8 / 255}, "exact positive fraction"),
        ({"eps": "8/1"}, 'write "8/255"'),
        ({"eps": "256/255"}, "at most 1/1"),
        ({"eps": "999999/1"}, "at most 1/1"),
        ({"eps": "56/1", "norm": "l2"}, "above 55.4"),
        ({"eps": "128/1", "norm": "l2", "threat": "cw-l2", "surface": "model"}, "above 55.4"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, words):
    with pytest.raises(mb.InputError, match=words):
        scored(**change)


@pytest.mark.parametrize("model", [None, 3, ToyClip(), b"tiny-clip", ["tiny-clip"]])
def test_a_model_of_another_kind(model):
    with pytest.raises(mb.InputError, match="Clip"):
        scored(model)
    with pytest.raises(mb.InputError, match="load_model: spec"):
        mb.load_model(model)


def test_the_largest_radii_are_allowed():
    assert scored(eps="1/1").robust_accuracy == 0
    assert scored(eps="55/1", norm="l2").status == "ok"


def test_a_threat_model_is_taken_as_it_is():
    whole = scored()
    for eps in ("1/255", Eps(1, 255)):
        given = mb.ThreatModel("pgd-2", "linf", eps)
        assert scored(threat=given, eps=None).identity == whole.identity
    agreeing = scored(threat=given, norm="linf", surface="native", eps="1/255")
    assert agreeing.identity == whole.identity
    for other in ({"eps": "2/255"}, {"norm": "l2"}, {"surface": "model"}):
        with pytest.raises(mb.InputError, match="was given beside it"):
            scored(threat=given, **{"eps": None, **other})
    on_model = mb.ThreatModel("pgd-2", "linf", "1/255", "model")
    assert scored(threat=on_model, eps=None).threat.surface == "model"


@pytest.mark.parametrize("eps", ["0/255", "0.03", 8 / 255, "2/1", None])
def test_a_threat_model_has_a_radius_that_can_be(eps):
    with pytest.raises(mb.InputError, match=r"exact positive fraction|at most 1/1"):
        ThreatModel("pgd-2", "linf", eps)


def test_paths_are_text_or_path(tmp_path):
    folder = WEIGHTS / "tiny-clip"
    one, other = mb.load_model(folder), mb.load_model(f"local-dir:{folder}")
    assert one.digest == other.digest
    assert one.source == f"local-dir:{folder}"
    with pytest.raises(mb.InputError, match=r"open_clip_config\.json"):
        mb.load_model(tmp_path)
    record = scored()
    record.save(tmp_path / "a.json")
    assert mb.read_record(str(tmp_path / "a.json")) == mb.read_record(tmp_path / "a.json") == record
    for wrong in (None, 3, "gone.json", tmp_path, "a\0b"):
        with pytest.raises(mb.InputError, match="cannot be read"):
            mb.read_record(wrong)


def clip_of(**changes):
    return replace(wrap(ToyClip()), **changes)


class Compose:
    """As torchvision's."""

    def __call__(self, image):
        return image


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preprocess": Compose()}, "Compose"),
        ({"preprocess": None}, "Preprocess"),
        ({"tokenizer": "ViT-B-32"}, "cannot be called"),
        ({"tokenizer": None}, "cannot be called"),
        ({"name": ""}, "not empty"),
        ({"name": None}, "string"),
        ({"given_digest": "sha 1"}, "given_digest"),
        ({"given_digest": 7}, "given_digest"),
        ({"notes": "one note"}, "tuple"),
        ({"architecture": 3}, "string"),
    ],
)
def test_a_clip_is_checked_when_it_is_made(change, words):
    with pytest.raises(mb.InputError, match=words):
        clip_of(**change)


@pytest.mark.parametrize(
    "value",
    [100.0, 14.3, 50, math.inf, -math.inf, math.nan, None, "log", torch.ones(2), lambda: 4.6],
)
def test_a_scale_in_place_of_its_logarithm_is_refused(value):
    module = types.SimpleNamespace(encode_image=None, encode_text=None, logit_scale=value)
    with pytest.raises(mb.InputError, match="logarithm of the scale"):
        clip_of(module=module)


@pytest.mark.parametrize("value", [math.log(100), torch.tensor([4.6]), 0.0, math.log(1e4)])
def test_logarithms_of_scales_are_taken(value):
    module = types.SimpleNamespace(encode_image=None, encode_text=None, logit_scale=value)
    assert clip_of(module=module).module is module


class NoGrad(ToyClip):
    @torch.no_grad()
    def encode_image(self, images):
        return super().encode_image(images)


class Inference(ToyClip):
    @torch.inference_mode()
    def encode_image(self, images):
        return super().encode_image(images)


class Detached(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images).detach()


class ThroughNumpy(ToyClip):
    def encode_image(self, images):
        return torch.from_numpy(super().encode_image(images.detach()).numpy())


class Pair(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images), None


class Output(ToyClip):
    def encode_image(self, images):
        return {"image_embeds": super().encode_image(images)}


class Tokens(ToyClip):
    def encode_image(self, images):
        return super().encode_image(images)[:, None].expand(-1, 4, -1)


class TextPair(ToyClip):
    def encode_text(self, tokens):
        return (super().encode_text(tokens),)


class OneRow(ToyClip):
    def encode_text(self, tokens):
        return super().encode_text(tokens)[0]


class WideText(ToyClip):
    def encode_text(self, tokens):
        return super().encode_text(tokens).repeat(1, 2)


class Cross(ToyClip):
    def encode_text(self, tokens):
        return super().encode_text(tokens + 10**6)


class NanText(ToyClip):
    def encode_text(self, tokens):
        return super().encode_text(tokens) * math.nan


@pytest.mark.parametrize("threat", ["pgd-2", "apgd-pair", "autoattack-standard"])
@pytest.mark.parametrize("kind", [NoGrad, Inference, Detached, ThroughNumpy])
def test_no_gradient_to_the_pixels_is_said(kind, threat):
    record = scored(wrap(kind()), n=24, threat=threat)
    assert record.status == "error"
    assert "No gradient reaches the pixels" in record.error


def test_attacks_on_text_alone_need_no_gradient():
    record = scored(wrap(NoGrad()), n=8, threat="text-charmer-k0", eps="0/1")
    assert record.status == "ok", record.error


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (ToyClip().half(), "module.float()"),
        (ToyClip().double(), "module.float()"),
        (ToyClip().bfloat16(), "module.float()"),
        (Pair(), "encode_image of the model 'toy' returned a tuple"),
        (Output(), "encode_image of the model 'toy' returned a dict"),
        (Tokens(), "shape (2, 4, 16)"),
        (TextPair(), "encode_text of the model 'toy' returned a tuple"),
        (OneRow(), "encode_text of the model 'toy' returned a tensor of shape (16,)"),
        (WideText(), "both towers must share one width"),
        (NanText(), "NaN"),
        (Cross(), "encode_text of the model 'toy' failed on tokens of shape (10,)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_answers_that_do_not_fit_are_said_in_the_record(module, words):
    record = scored(wrap(module), batch_size=4)
    assert record.status == "error"
    assert words in record.error
    assert not record.error.startswith(("RuntimeError", "IndexError", "TypeError"))


def test_integers_of_numpy_and_torch_are_integers():
    whole = scored()
    for four, zero in ((np.int64(4), np.uint32(0)), (torch.tensor(4), torch.tensor(0))):
        assert scored(n=four, seed=zero, batch_size=four).identity == whole.identity
    for wrong in (np.float64(4), torch.tensor(4.0), np.bool_(True), torch.tensor([4, 4])):
        with pytest.raises(mb.InputError, match="evaluate: n"):
            scored(n=wrong)


def test_checked_names_what_was_given_and_converts_nothing():
    @checked
    def half(number: int, *others: object, by: float = 2.0) -> float:
        """Docstring."""
        return number / by

    assert half(4) == half(number=4) == 2
    assert half.__doc__ == "Docstring."
    with pytest.raises(mb.InputError, match=r"half: number = '4' \(str\) does not fit"):
        half("4")
    with pytest.raises(TypeError, match="unexpected"):
        half(4, to=1)
    with pytest.raises(TypeError, match=r"half\(\) missing 1 required"):
        half()
    with pytest.raises(mb.InputError, match="half: number"):
        half("long" * 100)


@pytest.mark.parametrize("name", ["Fast", "", None])
def test_engines_and_precisions_that_do_not_exist_cannot_be_made(name):
    with pytest.raises(mb.InputError, match="'fast' or 'reference'"):
        Engine(name)
    with pytest.raises(mb.InputError, match="'float32' or 'bfloat16'"):
        Engine(precision=name)
