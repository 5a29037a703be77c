"""What the caller set in torch changes no number."""

import pytest
import torch

import mmtard_bench as mb
from tests.conftest import ToyClip, wrap


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_an_evaluation_is_the_same_under(context, engine):
    options = {"task": "digits/digit", "threat": "pgd-3", "eps": "1/255", "n": 16, "engine": engine}
    plain = mb.evaluate(wrap(ToyClip()), **options)
    clip, seen = wrap(ToyClip()), []
    encode = clip.module.encode_image
    clip.module.encode_image = lambda images: seen.append(encode(images)) or seen[-1]
    with context():
        record = mb.evaluate(clip, **options)
    assert record.status == "ok", record.error
    assert record.samples == plain.samples
    assert record.flags == plain.flags
    assert {found.dtype for found in seen} <= {torch.float32, torch.float64}
