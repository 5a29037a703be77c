"""Models with a locked text tower, known for a fixed list of prompts: small made-up tables."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmtard_bench as mb
from mmtard_bench.models.text_table import (
    CONFIG,
    WEIGHTS,
    TableClip,
    TextTable,
    is_table_config,
    load_table_clip,
)
from mmtard_bench.tasks.classifier import ZeroShotClassifier
from mmtard_bench.train.make.text_table import text_table, write_start

PROMPTS = [f"a photo of a {name}." for name in ("cat", "dog", "pine_tree")]
VISION = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "size": 32,
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def config(**model):
    model_config = {"embed_dim": 12, "vision_cfg": VISION, "text_table": PROMPTS, **model}
    return {"model_cfg": model_config, "preprocess_cfg": PREPROCESS}


def make(folder, *, vision=VISION, half=False):
    """Write a small model; the module that was written."""
    torch.manual_seed(0)
    module = TableClip(vision, torch.randn(len(PROMPTS), 12), 20.0)
    # open_clip starts residual branches at zero; away from there every weight counts.
    for key, weight in module.named_parameters():
        if key.endswith("bn3.weight"):
            torch.nn.init.ones_(weight)
    weights = {k: v.half() if half and v.is_floating_point() else v for k, v in state(module)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config(vision_cfg=vision)))
    return module.eval().requires_grad_(False)


def state(module):
    return ((key, value.detach().contiguous()) for key, value in module.state_dict().items())


def load(folder):
    return load_table_clip(folder, "toy", f"local-dir:{folder}")


@pytest.mark.parametrize("vision", [VISION, VIT])
def test_what_was_written_is_loaded(tmp_path, vision):
    module = make(tmp_path, vision=vision)
    before = torch.get_rng_state()
    clip = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(clip.module.encode_image(images), module.encode_image(images))
    rows = clip.module.encode_text(clip.tokenizer([PROMPTS[2], PROMPTS[0], PROMPTS[2]]))
    assert torch.equal(rows, module.text_table[[2, 0, 2]])
    assert clip.scale().item() == pytest.approx(20)
    assert (clip.name, clip.source) == ("toy", f"local-dir:{tmp_path}")
    assert clip.preprocess.size == (32, 32)
    assert (clip.preprocess.interpolation, clip.preprocess.resize_mode) == ("bilinear", "squash")
    assert clip.digest == load(tmp_path).digest
    save_file(dict(state(clip.module)), tmp_path / WEIGHTS)
    assert load(tmp_path).digest == clip.digest


def test_weights_of_half_precision_become_float32(tmp_path):
    module = make(tmp_path, half=True)
    clip = load(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["text_table"].dtype == torch.float16
    floats = [v for v in clip.module.state_dict().values() if v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    assert torch.equal(clip.module.text_table, module.text_table.half().float())
    images = torch.rand(2, 3, 32, 32)
    difference = clip.module.encode_image(images) - module.encode_image(images)
    assert difference.abs().max() < 0.05


def test_it_classifies_and_gradients_reach_the_pixels(tmp_path):
    make(tmp_path)
    names, templates = ("cat", "dog", "pine_tree"), ("a photo of a {}.",)
    classifier = ZeroShotClassifier(load(tmp_path), names, templates, torch.device("cpu"))
    # Another size than the model's: through the resize as well.
    images = torch.rand(4, 3, 24, 24, requires_grad=True)
    logits = classifier(images)
    assert logits.shape == (4, 3)
    assert logits.isfinite().all()
    assert logits.abs().max() <= 20
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs() > 0).float().mean() > 0.9


def test_the_image_tower_can_learn_and_the_table_cannot(tmp_path):
    make(tmp_path)
    module = load(tmp_path).module
    module.requires_grad_(True)
    module.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert module.visual.conv1.weight.grad.abs().sum() > 0
    assert not module.text_table.requires_grad


def test_an_unknown_prompt_is_a_sentence():
    tokenizer = TextTable(PROMPTS)
    assert tokenizer(PROMPTS).tolist() == [0, 1, 2]
    assert tokenizer(PROMPTS).dtype == torch.long
    with pytest.raises(mb.InputError, match=r"knows 3 prompts; 'a photo of a cot\.' is not") as e:
        tokenizer(["a photo of a dog.", "a photo of a cot."])
    assert "The nearest are 'a photo of a cat.'" in str(e.value)
    with pytest.raises(mb.InputError, match="'pine tree' is not among them"):
        tokenizer(["pine tree"])


def test_configurations_of_this_kind_are_told_from_others():
    assert is_table_config(config())
    for other in ({"model_cfg": {"embed_dim": 4}}, {"model_cfg": []}, {}, [], None, "text_table"):
        assert not is_table_config(other)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("how", ["missing", "a folder", "cut", "empty", "noise"])
def test_files_that_cannot_be_read(tmp_path, name, how):
    make(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff\x00" * 99}[how]
        )
    with pytest.raises(mb.InputError, match=f"'toy'.*{name}"):
        load(tmp_path)


def test_a_pointer_in_place_of_weights_is_a_sentence(tmp_path):
    make(tmp_path)
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(mb.InputError, match="git lfs pull"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed_dim": 0}, "model_cfg.embed_dim"),
        ({"embed_dim": "12"}, "model_cfg.embed_dim"),
        ({"embed_dim": 13}, r"'text_table' has the shape \(3, 12\), expected \(3, 13\)"),
        ({"embed_dim": 10**30}, "makes no image tower"),
        ({"text_table": []}, "model_cfg.text_table"),
        ({"text_table": [1, 2, 3]}, "model_cfg.text_table"),
        ({"text_table": PROMPTS[:2]}, r"'text_table' has the shape"),
        ({"text_table": [*PROMPTS[:2], PROMPTS[0]]}, "more than once"),
        ({"text_cfg": {}}, "'model_cfg.text_cfg' is unknown"),
        ({"vision_cfg": []}, "model_cfg.vision_cfg"),
        ({"vision_cfg": {**VISION, "width": 16}}, "has the shape"),
        ({"vision_cfg": {**VISION, "width": 10**9}}, "has the shape|makes no image tower"),
        ({"vision_cfg": {**VISION, "width": "8"}}, "makes no image tower"),
        ({"vision_cfg": {**VISION, "layers": [1, 1]}}, "makes no image tower"),
        ({"vision_cfg": {**VISION, "layers": [1, 1, 1, 2]}}, "are missing|more are missing"),
        ({"vision_cfg": {**VISION, "image_size": 64}}, "makes no image tower"),
        ({"vision_cfg": {**VISION, "colour": 1}}, "makes no image tower.*colour"),
        ({"vision_cfg": {**VIT, "output_tokens": True}}, "makes no image tower"),
        ({"vision_cfg": {**VISION, "timm_model_name": "hf-hub:them/x"}}, "timm"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, changed, message):
    make(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config(**changed)))
    with pytest.raises(mb.InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mean": [0.5, 0.5]}, "preprocess_cfg.mean"),
        ({"mean": [0.5, 0.5, math.nan]}, "preprocess_cfg.mean"),
        ({"std": [0.25, 0, 0.25]}, "preprocess_cfg.std"),
        ({"size": 64}, "makes no image tower for images of 64 x 64"),
        ({"size": -32}, "preprocess_cfg.size"),
        ({"interpolation": "nearest"}, "preprocess_cfg.interpolation"),
        ({"resize_mode": "longest"}, "preprocess_cfg.resize_mode"),
        ({"fill": 0}, "'preprocess_cfg.fill' is unknown"),
    ],
)
def test_preprocessing_that_does_not_fit(tmp_path, changed, message):
    make(tmp_path)
    whole = {**config(), "preprocess_cfg": {**PREPROCESS, **changed}}
    (tmp_path / CONFIG).write_text(json.dumps(whole))
    with pytest.raises(mb.InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("logit_scale"), "'logit_scale' is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' is unknown"),
        (lambda w: w.update(text_table=torch.zeros(4, 12)), "'text_table' has the shape"),
        (lambda w: w.update(logit_scale=torch.tensor(3)), "'logit_scale' is torch.int64"),
        (lambda w: w.clear(), "the weights have 0 tensors"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    make(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(mb.InputError, match=message):
        load(tmp_path)


def test_a_starting_point_knows_every_name_as_it_is_spelt(tmp_path):
    asked = []

    def encode(texts):
        asked.extend(texts)
        generator = torch.Generator().manual_seed(0)
        rows = 5 + torch.randn(len(texts), 12, generator=generator)
        return torch.nn.functional.normalize(rows, dim=-1)

    prompts, table = text_table([("cat", "pine_tree", "dog"), ("cat", "ship")], encode)
    assert prompts == [f"a photo of a {name}." for name in ("cat", "pine_tree", "dog", "ship")]
    assert asked == [f"a photo of a {name}." for name in ("cat", "pine tree", "dog", "ship")]
    rows = encode(asked[:4])
    centred = rows - rows[:3].mean(0)
    assert torch.allclose(table, centred / centred.norm(dim=1, keepdim=True), atol=1e-5)

    write_start(tmp_path / "a", prompts, table, width=4, seed=0)
    write_start(tmp_path / "b", prompts, table, width=4, seed=0)
    write_start(tmp_path / "c", prompts, table, width=4, seed=1)
    first, same, other = (load(tmp_path / name) for name in "abc")
    assert first.digest == same.digest != other.digest
    assert first.scale().item() == pytest.approx(20)
    assert torch.equal(first.module.encode_text(first.tokenizer(prompts)), table)
    assert first.image_features(torch.rand(2, 3, 32, 32)).isfinite().all()
    with pytest.raises(mb.InputError, match="holds a model already"):
        write_start(tmp_path / "a", prompts, table, width=4, seed=0)
    with pytest.raises(mb.InputError, match="even number"):
        write_start(tmp_path / "d", prompts, table, width=5, seed=0)
