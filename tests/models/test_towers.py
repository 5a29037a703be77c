"""Checkpoints as people save them, put into a model with +visual:FILE."""

import argparse
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mmtard_bench as mb
from mmtard_bench import registry
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.models.towers import with_visual
from mmtard_bench.models.weights import misfits
from tests.cli.test_bad_input import SUITE
from tests.conftest import ToyClip, assert_sentence, wrap
from tests.models.conftest import trained, visual_of


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def tecoa(visual, tokens=0, **more):
    """As finetuning.py of cvlab-columbia/ZSRobust4FoundationModel saves it."""
    return {
        "epoch": 3,
        "state_dict": {},
        "add_prompter": {"module.prompt": torch.randn(1, tokens, 768)},
        "vision_encoder_state_dict": visual,
        "best_acc1": np.float64(41.5),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        **more,
    }


LAYOUTS = {
    "bare": visual_of,
    "within visual": lambda s: prefixed("visual.", visual_of(s)),
    "whole model": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model_state_dict, compiled": lambda s: {"model_state_dict": prefixed("_orig_mod.", s)},
    "model": lambda s: {"model": visual_of(s), "best": 0.5},
    "DataParallel": lambda s: prefixed("module.", visual_of(s)),
    "wrapped": lambda s: prefixed("module.model.", visual_of(s)),
    "whole DataParallel": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled": lambda s: prefixed("_orig_mod.", visual_of(s)),
    "TeCoA": lambda s: tecoa(visual_of(s)),
    "TeCoA, parallel": lambda s: tecoa(prefixed("module.", visual_of(s))),
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "linear attention": lambda s: {
        k.replace("attn.in_proj_", "attn.qkv.").replace("attn.out_proj", "attn.proj"): v
        for k, v in visual_of(s).items()
    },
}


@pytest.mark.filterwarnings("ignore:.*is more than an image tower")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fills_the_image_tower_and_nothing_else(tmp_path, layout):
    state = trained("toy-vit-quickgelu:random")
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pt")
    spec = f"toy-vit-quickgelu:random+visual:{tmp_path / 'w.pt'}"
    clip, base = mb.load_model(spec), mb.load_model("toy-vit-quickgelu:random")
    assert (clip.name, clip.source) == (spec, spec)
    before = base.module.state_dict()
    for key, value in clip.module.state_dict().items():
        expected = state[key] if key.startswith("visual.") else before[key]
        if layout == "half" and key.startswith("visual."):
            expected = expected.half().float()
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), key
    images = torch.rand(2, 3, 32, 32)
    assert (clip.image_features(images) - base.image_features(images)).abs().max() > 0.01
    assert clip.digest != base.digest


@pytest.mark.parametrize("ending", ["pth", "bin", "ckpt", "pth.tar", "safetensors"])
def test_every_ending(tmp_path, ending):
    visual = visual_of(trained("toy-rn:random"))
    path = tmp_path / f"w.{ending}"
    save_file(visual, path) if ending == "safetensors" else torch.save(visual, path)
    clip = mb.load_model(f"toy-rn:random+visual:{path}")
    assert all(v.equal(visual[k]) for k, v in clip.module.visual.state_dict().items())


def test_an_old_file_of_torch(tmp_path):
    visual = visual_of(trained("toy-rn:random"))
    torch.save(visual, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    clip = mb.load_model(f"toy-rn:random+visual:{tmp_path / 'w.pt'}")
    assert all(v.equal(visual[k]) for k, v in clip.module.visual.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "layout"), [("RN50", "bare"), ("ViT-B-32-quickgelu", "TeCoA")]
)
def test_real_architectures(tmp_path, architecture, layout):
    state = trained(f"{architecture}:random")
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pt")
    clip = mb.load_model(f"{architecture}:random+visual:{tmp_path / 'w.pt'}")
    visual = visual_of(state)
    assert all(v.equal(visual[k]) for k, v in clip.module.visual.state_dict().items())
    assert clip.image_features(torch.rand(1, 3, 224, 224)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("proj"), "'proj' is missing"),
        (lambda v: v.update(extra=torch.zeros(2)), "'extra' is unknown"),
        (lambda v: v.update(proj=torch.zeros(3, 3)), r"'proj' has the shape \(3, 3\), expected"),
        (lambda v: v.update(proj=v["proj"].long()), "'proj' is torch.int64"),
        (lambda v: v.clear(), "holds no state dict"),
        (lambda v: v.update(note="hello"), "holds no state dict but 'class_embedding'"),
    ],
)
def test_a_tower_that_does_not_fit(tmp_path, change, words):
    visual = visual_of(trained("toy-vit:random"))
    change(visual)
    torch.save(visual, tmp_path / "w.pt")
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"toy-vit:random+visual:{tmp_path / 'w.pt'}")


def test_another_architecture_names_what_misses_and_what_is_left(tmp_path):
    torch.save(visual_of(trained("toy-rn:random")), tmp_path / "w.pt")
    with pytest.raises(
        mb.InputError, match=r"VisionTransformer.*more are missing; .*more are unknown"
    ):
        mb.load_model(f"toy-vit:random+visual:{tmp_path / 'w.pt'}")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 5},
        {"state_dict": {"module.pad_up": torch.randn(1, 3, 4, 32)}},
        {"vision": {"prompt_pos_embedding": torch.zeros(5, 32)}},
    ],
    ids=["tokens", "padding", "positions"],
)
def test_a_learned_visual_prompt_is_not_dropped_silently(tmp_path, changed):
    visual = visual_of(trained("toy-vit-quickgelu:random")) | changed.pop("vision", {})
    torch.save(tecoa(visual, **changed), tmp_path / "w.pt")
    with pytest.raises(mb.InputError, match="visual prompt that was learned"):
        mb.load_model(f"toy-vit-quickgelu:random+visual:{tmp_path / 'w.pt'}")


def write(path, kind):
    state = visual_of(trained("toy-vit:random"))
    if kind == "html":
        path.write_text("\n<!DOCTYPE html><html><body>Please log in</body></html>")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save({"model": state, "args": argparse.Namespace(lr=1)}, path)
    elif kind == "script":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)), path)
    elif kind == "list":
        torch.save([state], path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["toy-vit:random+visual:{}", "toy-vit:{}"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", []),
        ("html", ["holds a web page", "download the file itself"]),
        ("lfs", ["git lfs pull"]),
        ("empty", ["is empty"]),
        ("cut", ["truncated or damaged"]),
        ("code", ["argparse.Namespace", "save its state dict alone"]),
        ("script", ["TorchScript", "never run", "ARCH:openai"]),
        ("list", ["holds no state dict but list"]),
    ],
)
def test_files_that_are_no_weights(here, tmp_path, kind, words, form):
    write(tmp_path / "w.pt", kind)
    spec = form.format("w.pt")
    assert_sentence(here("run", "quick-v1", "--model", spec), "w.pt", *words)


def test_a_tower_alone_is_no_model(tmp_path):
    for layout in ("bare", "TeCoA", "DataParallel"):
        torch.save(LAYOUTS[layout](trained("toy-rn:random")), tmp_path / "w.pt")
        with pytest.raises(mb.InputError, match=r"image tower alone.*toy-rn:openai\+visual:"):
            mb.load_model(f"toy-rn:{tmp_path / 'w.pt'}")


@pytest.mark.filterwarnings("ignore:.*The preprocessing is assumed")
def test_whole_models_from_wrapped_files(tmp_path):
    state = trained("toy-rn:random")
    for wrapped in ({"model": state}, {"state_dict": prefixed("module.", state)}):
        torch.save(wrapped, tmp_path / "w.pt")
        module = mb.load_model(f"toy-rn:{tmp_path / 'w.pt'}").module
        assert all(value.equal(state[key]) for key, value in module.state_dict().items())


def test_shipped_models_take_towers_too():
    tower = WEIGHTS / "teacher-robust.safetensors"
    clip = mb.load_model(f"tiny-clip+visual:{tower}")
    assert clip.digest == mb.load_model("teacher-robust").digest
    assert clip.source == f"tiny-clip+visual:{tower}"
    assert mb.load_model(f"local-dir:{WEIGHTS / 'tiny-clip'}+visual:{tower}").digest == clip.digest


def test_a_function_that_returns_one_object_keeps_it():
    model = mb.load_model("tiny-clip")
    registry.register_model("one-object")(lambda: model)
    try:
        before = {key: value.clone() for key, value in model.module.state_dict().items()}
        changed = mb.load_model(f"one-object+visual:{WEIGHTS / 'teacher-robust.safetensors'}")
        assert changed.digest != model.digest
        assert all(v.equal(before[k]) for k, v in model.module.state_dict().items())
    finally:
        del registry.models._items["one-object"]


def test_a_model_that_answers_with_another_tower_than_its_own_is_refused():
    """A copy of a module does not change what its functions hold."""

    def patched():
        model = mb.load_model("tiny-clip")
        encode = model.module.encode_image
        model.module.encode_image = lambda images: encode(images).flip(0).flip(0)
        return model

    registry.register_model("patched")(patched)
    try:
        with pytest.raises(mb.InputError, match="something else, such as an earlier tower"):
            mb.load_model(f"patched+visual:{WEIGHTS / 'teacher-robust.safetensors'}")
        assert mb.load_model("patched").name == "tiny-clip"
    finally:
        del registry.models._items["patched"]


def test_models_whose_tower_cannot_be_changed(tmp_path):
    path = WEIGHTS / "teacher-robust.safetensors"
    with pytest.raises(mb.InputError, match="no image tower 'visual'"):
        with_visual(wrap(ToyClip()), path, "toy+visual:w")
    model = mb.load_model("tiny-clip")
    named = mb.Clip(model.module, model.tokenizer, model.preprocess, "x", given_digest="v1")
    with pytest.raises(mb.InputError, match="its own digest"):
        with_visual(named, path, "x+visual:w")


@pytest.mark.parametrize("spec", ["{0}+visual:{0}", "+visual:a+visual:b", "+lora:a+visual:b"])
def test_specs_that_make_no_sense(spec):
    with pytest.raises(mb.InputError, match=r"one \+visual:FILE at most|There is no"):
        mb.load_model("tiny-clip" + spec if spec.startswith("+") else spec)


def test_plus_signs_in_paths_are_just_that(tmp_path):
    folder = tmp_path / "a+b+lora"
    folder.mkdir()
    torch.save(visual_of(trained("toy-rn:random")), folder / "w+visual.pt")
    clip = mb.load_model(f"toy-rn:random+visual:{folder / 'w+visual.pt'}")
    assert clip.digest != mb.load_model("toy-rn:random").digest


def test_the_option_visual(here, tmp_path):
    tower = WEIGHTS / "teacher-robust.safetensors"
    fields = {"attack": "pgd-1", "norm": "linf", "eps": '"1/255"', "surface": "native", "more": ""}
    suite = SUITE.format(n=2, task='"digits/digit"', **fields)
    (tmp_path / "mine-v1.toml").write_text(suite)
    done = here("run", "mine-v1.toml", "--model", "tiny-clip", "--visual", tower)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").rglob("*.json")
    assert mb.read_record(path).model.source == f"tiny-clip+visual:{tower}"
    two = here("run", "quick-v1", "--model", "a", "--model", "b", "--visual", tower)
    assert_sentence(two, "--visual", "one --model", "MODEL+visual:FILE")


def said_of(spec):
    """The model, and what was warned of while it was loaded."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        clip = mb.load_model(spec)
    return clip, [str(warning.message) for warning in said]


def whole(**changes):
    """A model of which the image tower was trained, and a few tensors beside it."""
    state = mb.load_model("toy-rn:random").module.state_dict()
    return state | prefixed("visual.", visual_of(trained("toy-rn:random"))) | changes


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_whole_model_with_the_bases_text_tower(tmp_path, kind):
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in whole().items()}
    torch.save({"state_dict": state, "optimizer": {"state": {}, "step": 3}}, tmp_path / "w.pt")
    clip, said = said_of(f"toy-rn:random+visual:{tmp_path / 'w.pt'}")
    assert said == []
    assert not any("image tower" in note for note in clip.notes)


@pytest.mark.parametrize(
    "name", ["transformer.resblocks.0.mlp.c_fc.weight", "logit_scale", "text_projection"]
)
def test_what_else_was_trained_is_named(tmp_path, name):
    torch.save(whole(**{name: whole()[name] + 0.01}), tmp_path / "w.pt")
    clip, (text,) = said_of(f"toy-rn:random+visual:{tmp_path / 'w.pt'}")
    assert f"('{name}')" in text
    assert "not used" in text
    assert clip.notes[-1] in text
    before = mb.load_model("toy-rn:random").module.state_dict()
    assert clip.module.state_dict()[name].equal(before[name])


def test_tensors_that_the_base_does_not_have_are_named(tmp_path):
    more = {"logit_bias": torch.tensor(-10.0), "head.weight": torch.zeros(3, 12)}
    torch.save(whole(**more), tmp_path / "w.pt")
    _, (text,) = said_of(f"toy-rn:random+visual:{tmp_path / 'w.pt'}")
    assert "'logit_bias', 'head.weight'" in text


@pytest.mark.parametrize("spec", ["toy-rn:{}", "toy-rn:random+visual:{}"])
def test_weights_beside_weights_are_named(tmp_path, spec):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": whole(), "ema": whole(), "best": 0.5, "history": {}}, path)
    _, said = said_of(spec.format(path))
    assert "w.pt also holds weights under 'ema'; those under 'state_dict' are used." in said[0]


def test_a_whole_model_on_a_shipped_base(tmp_path):
    model = mb.load_model("tiny-clip").module.state_dict()
    torch.save({**model, "text_projection": model["text_projection"] * 2}, tmp_path / "w.pt")
    _, (text,) = said_of(f"tiny-clip+visual:{tmp_path / 'w.pt'}")
    assert "('text_projection')" in text


LAYOUTS_OF_FILES = {
    "Lightning": (lambda s: {"state_dict": prefixed("clip_model.", s)}, "clip_model.*unknown"),
    "tower": (lambda s: {k: v for k, v in s.items() if k[:7] == "visual."}, "'transformer.*alone"),
    "no scale": (lambda s: {k: v for k, v in s.items() if k != "logit_scale"}, "'logit_scale' is"),
    "one more": (lambda s: {**s, "extra.weight": torch.zeros(2)}, "'extra.weight' is unknown"),
    "a bias": (lambda s: {**s, "logit_bias": torch.tensor(1.0)}, "'logit_bias' is unknown"),
    "shape": (
        lambda s: {**s, "text_projection": torch.zeros(3, 3)},
        r"'text_projection' has .*3, 3",
    ),
    "positions": (lambda s: {**s, "positional_embedding": torch.zeros(50, 16)}, r"\(50, 16\)"),
    "patches": (lambda s: {**s, "visual.positional_embedding": torch.zeros(50, 32)}, "50, 32"),
    "kind": (lambda s: {**s, "text_projection": s["text_projection"].int()}, "is torch.int32"),
    "transformers": (lambda s: prefixed("text_model.", s), "'text_model.*unknown"),
}


@pytest.mark.parametrize("layout", LAYOUTS_OF_FILES)
def test_every_misfit_names_its_tensors(tmp_path, layout):
    change, words = LAYOUTS_OF_FILES[layout]
    torch.save(change(trained("toy-vit:random")), tmp_path / "w.pt")
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"toy-vit:{tmp_path / 'w.pt'}")


def test_misfits_name_each_part_and_count_the_rest():
    expected = {f"{part}.{i}": torch.zeros(2) for part in "abcdef" for i in range(3)}
    assert misfits(expected, expected) == ""
    assert misfits(expected, {}) == "'a.0', 'b.0', 'c.0', 'd.0' and 14 more are missing"
    given = {**expected, "a.0": torch.zeros(3), "b.1": torch.zeros(1, dtype=torch.int64)}
    assert "'a.0' has the shape (3,), expected (2,); 'b.1' has the shape" in misfits(
        expected, given
    )
