"""Models from everywhere, and what the attack sees of them."""

import json
import shutil

import open_clip
import pytest
import torch
import torchvision.transforms.functional as vision

import mmtard_bench as mb
from mmtard_bench import registry
from mmtard_bench.models.clip import Preprocess
from mmtard_bench.models.tiny import WEIGHTS
from tests.conftest import SHARED_DATA, ToyClip, tokenize, wrap


def test_one_model_by_every_way_in(tmp_path, monkeypatch):
    named = mb.load_model("tiny-clip")
    folder = tmp_path / "copy"
    shutil.copytree(WEIGHTS / "tiny-clip", folder)
    assert mb.load_model(f"local-dir:{folder}").digest == named.digest

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-test-arch.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test-arch.json")
    checkpoint = tmp_path / "w.pt"
    torch.save(named.module.state_dict(), checkpoint)
    with pytest.warns(UserWarning, match="preprocessing is assumed to be open_clip's default"):
        assert mb.load_model(f"tiny-test-arch:{checkpoint}").digest == named.digest

    (tmp_path / "their_models.py").write_text(
        "import mmtard_bench as mb\ndef make():\n    return mb.load_model('tiny-clip')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert mb.load_model("their_models:make").digest == named.digest
    assert mb.load_model("teacher-robust").digest != named.digest


def test_the_digest_follows_the_weights_and_not_their_precision_on_disk():
    clip = wrap(ToyClip())
    same, other = wrap(ToyClip()), ToyClip()
    assert same.digest == clip.digest
    other.image.data[0, 0] += 1e-6
    assert wrap(other).digest != clip.digest


def test_the_digest_tells_activations_apart():
    """QuickGELU and GELU have no weights, and another activation is another model."""
    plain, quick = mb.load_model("ViT-B-32:random"), mb.load_model("ViT-B-32-quickgelu:random")
    assert torch.equal(plain.module.visual.proj, quick.module.visual.proj)
    assert plain.digest != quick.digest


def test_an_object_without_weights_needs_a_digest():
    class Plain:
        logit_scale = torch.tensor(3.0)

        def encode_image(self, images):
            return images.flatten(1)[:, :16]

        def encode_text(self, tokens):
            return torch.randn(1741, 16, generator=torch.Generator().manual_seed(0))[tokens]

    preprocess = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    with pytest.raises(mb.InputError, match="given_digest"):
        mb.Clip(Plain(), tokenize, preprocess, "plain").digest  # noqa: B018
    clip = mb.Clip(Plain(), tokenize, preprocess, "plain", given_digest="v1")
    record = mb.evaluate(clip, task="digits/digit", threat="pgd-1", eps="1/255", n=8)
    assert record.status == "ok"
    assert record.model.digest == clip.digest
    assert mb.Clip(Plain(), tokenize, preprocess, "x", given_digest="v1").digest == clip.digest
    assert mb.Clip(Plain(), tokenize, preprocess, "x", given_digest="v2").digest != clip.digest


def test_registered_models_are_found_and_checked():
    @mb.register_model("test-model")
    def make():
        """A model of this test."""
        return wrap(ToyClip(), "test-model")

    try:
        assert mb.load_model("test-model").name == "test-model"
        with pytest.raises(mb.InputError, match="taken"):
            mb.register_model("test-model")(make)
    finally:
        del registry.models._items["test-model"]


def test_logits_are_scaled_cosines_of_the_prompt_ensemble():
    from mmtard_bench.tasks.classifier import ZeroShotClassifier

    clip = mb.load_model("tiny-clip")
    classes, templates = ("zero", "one", "two"), ("a photo of the digit {}", "{}")
    classifier = ZeroShotClassifier(clip, classes, templates, torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32)
    model = clip.module
    with torch.no_grad():
        rows = []
        for name in classes:
            text = model.encode_text(clip.tokenizer([t.format(name) for t in templates]))
            mean = (text / text.norm(dim=1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
        image = model.encode_image((images - 0.5) / 0.25)
        image = image / image.norm(dim=1, keepdim=True)
        expected = model.logit_scale.exp() * image @ torch.stack(rows).T
        assert torch.allclose(classifier(images), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (300, 200), (224, 224), (65, 224)])
def test_resizing_agrees_with_pillow(size):
    """Pillow rounds to 8 bits between the two passes of a resize; we do not."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 8, 8), generator=generator)
    images = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    images = (images * 255).round() / 255
    picture = vision.to_pil_image(images[0])
    resized = vision.resize(picture, 224, vision.InterpolationMode.BICUBIC)
    expected = vision.to_tensor(vision.center_crop(resized, [224, 224]))
    preprocess = Preprocess((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    ours = preprocess.resize(images)[0]
    assert ours.shape == expected.shape == (3, 224, 224)
    assert (ours - expected).abs().max() < 2.5 / 255


def test_the_resize_is_differentiable_and_the_identity_at_the_right_size():
    preprocess = Preprocess((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = torch.rand(2, 3, 32, 32)
    assert preprocess.resize(images) is images
    small = torch.rand(1, 3, 20, 24, requires_grad=True)
    preprocess.resize(small).sum().backward()
    assert small.grad.abs().sum() > 0
    # Black and white pixels, where clipping to the box would hide the gradient.
    black = torch.zeros(1, 3, 20, 24, requires_grad=True)
    preprocess.resize(black).sum().backward()
    assert (black.grad.flatten(1).abs() > 0).float().mean() > 0.8


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared real photographs are not here")
@pytest.mark.parametrize("surface", ["native", "model"])
@pytest.mark.parametrize("architecture", ["RN50", "ViT-B-32"])
def test_real_photographs_at_both_surfaces(architecture, surface):
    clip = mb.load_model(f"{architecture}:random")
    cifar = f"parquet:{SHARED_DATA / 'cifar10-test-4000.parquet'}"
    record = mb.evaluate(
        clip, task=cifar, threat="pgd-1", eps="2/255", n=4, surface=surface, batch_size=4
    )
    assert record.status == "ok", record.error
    assert record.task.n_classes == 10
    nips = mb.Task(
        name="nips",
        data=f"parquet:{SHARED_DATA / 'imagenet-nips2017-100.parquet'}",
        templates=("a photo of a {}.",),
        classes=tuple(open_clip.IMAGENET_CLASSNAMES[:1000]),
    )
    with pytest.warns(UserWarning, match="more than once"):
        record = mb.evaluate(
            clip, task=nips, threat="pgd-1", eps="2/255", n=2, surface=surface, batch_size=2
        )
    assert record.status == "ok", record.error
    assert record.task.n_classes == 1000
