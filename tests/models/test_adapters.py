"""LoRA adapters from peft's directories, from our trainer, and from MMT-ARD's checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmtard_bench as mb
from mmtard_bench.train.lora import Attention, adapter_files, add_lora, merged
from tests.models.conftest import visual_of

peft = pytest.importorskip("peft")

BASE = "toy-vit-quickgelu:random"


def learn(module, seed=1):
    """Adapters as they might be after some training, in a module that peft adapted."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if ".lora_" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


def write_adapter(folder, rank=4, alpha=6.0):
    """What our trainer writes, and the tower that it is of, merged."""
    visual = mb.load_model(BASE).module.visual
    add_lora(visual, rank=rank, alpha=alpha, dropout=0.1)
    learn(visual)
    weights, config = adapter_files(visual, rank=rank, alpha=alpha, dropout=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged(visual)


def assert_tower(clip, expected):
    state = clip.module.visual.state_dict()
    assert set(state) == set(expected)
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], msg=key)


def linear_attention(visual):
    """The tower with MMT-ARD's attention: one linear layer for q, k and v, one after."""
    for block in visual.transformer.resblocks:
        block.attn = Attention(block.attn)
    return visual


def test_what_our_trainer_writes(tmp_path):
    expected = write_adapter(tmp_path / "adapter")
    spec = f"{BASE}+lora:{tmp_path / 'adapter'}"
    clip, base = mb.load_model(spec), mb.load_model(BASE)
    assert (clip.name, clip.source) == (spec, spec)
    assert_tower(clip, expected)
    images = torch.rand(2, 3, 32, 32)
    assert (clip.image_features(images) - base.image_features(images)).abs().max() > 0.01
    assert torch.equal(clip.module.token_embedding.weight, base.module.token_embedding.weight)


def test_peft_reads_what_our_trainer_writes(tmp_path):
    expected = write_adapter(tmp_path / "adapter")
    visual = linear_attention(mb.load_model(BASE).module.visual)
    model = peft.PeftModel.from_pretrained(visual, str(tmp_path / "adapter"))
    plain = model.merge_and_unload().state_dict()
    for i in range(2):
        at = f"transformer.resblocks.{i}.attn."
        torch.testing.assert_close(plain[f"{at}qkv.weight"], expected[f"{at}in_proj_weight"])
        torch.testing.assert_close(plain[f"{at}proj.weight"], expected[f"{at}out_proj.weight"])


def plain_names(state):
    """The names of nn.MultiheadAttention instead of those of linear attention."""
    names = [("attn.qkv.", "attn.in_proj_"), ("attn.proj.", "attn.out_proj.")]
    for ours, name in names:
        state = {key.replace(ours, name): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("root", ["visual", "model"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes(tmp_path, root, rslora):
    model = mb.load_model(BASE).module
    linear_attention(model.visual)
    layers = r"(visual\.)?transformer\.resblocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.c_fc)"
    if root == "model":
        layers = layers.replace("?", "")
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=layers)
    adapted = peft.get_peft_model(model if root == "model" else model.visual, config)
    learn(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    clip = mb.load_model(f"{BASE}+lora:{tmp_path / 'adapter'}")
    state = plain_names(adapted.merge_and_unload().state_dict())
    assert_tower(clip, visual_of(state) if root == "model" else state)


def test_adapters_of_attention_modules_are_left_to_peft(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=r"transformer\.resblocks\.\d+\.attn")
    adapted = peft.get_peft_model(mb.load_model(BASE).module.visual, config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(mb.InputError, match=r"attn\.base_layer\.out_proj.*merge it with peft"):
        mb.load_model(f"{BASE}+lora:{tmp_path / 'adapter'}")


def mmtard_checkpoint(path, rank=16):
    """As MMT-ARD's training script saves its LoRA student, and the tower, merged by peft."""
    visual = linear_attention(mb.load_model(BASE).module.visual)
    config = peft.LoraConfig(
        r=rank, lora_alpha=16, target_modules=["qkv", "proj"], lora_dropout=0.1, bias="none"
    )
    adapted = peft.get_peft_model(visual, config)
    learn(adapted)
    torch.save(adapted.state_dict(), path)
    return plain_names(adapted.merge_and_unload().state_dict())


def test_the_authors_lora_checkpoint(tmp_path):
    expected = mmtard_checkpoint(tmp_path / "final.pt")
    assert any(".lora_A.default." in key for key in torch.load(tmp_path / "final.pt"))
    clip = mb.load_model(f"{BASE}+visual:{tmp_path / 'final.pt'}")
    assert_tower(clip, {key: expected[key] for key in clip.module.visual.state_dict()})
    with pytest.warns(UserWarning, match="trained with QuickGELU"):
        mb.load_model(f"toy-vit:random+visual:{tmp_path / 'final.pt'}")


def test_the_authors_layout_with_another_rank_does_not_say_its_scale(tmp_path):
    mmtard_checkpoint(tmp_path / "final.pt", rank=8)
    with pytest.raises(mb.InputError, match=r"rank \[8\] and not their alpha; expected rank 16"):
        mb.load_model(f"{BASE}+visual:{tmp_path / 'final.pt'}")


def test_another_tower_and_then_an_adapter(tmp_path):
    expected = write_adapter(tmp_path / "adapter")
    start = mb.load_model(BASE).module.visual.state_dict()
    torch.save({k: v + 1 for k, v in start.items()}, tmp_path / "w.pt")
    clip = mb.load_model(f"{BASE}+visual:{tmp_path / 'w.pt'}+lora:{tmp_path / 'adapter'}")
    assert_tower(clip, {key: value + 1 for key, value in expected.items()})


def change_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(how):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        how(weights)
        save_file(weights, path)

    return change


A = "base_model.model.transformer.resblocks.0.attn.qkv.lora_A.weight"
OTHER = "base_model.model.transformer.resblocks.9.attn.qkv.lora_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no adapter that can be merged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"cut"), "truncated or damaged"),
        (change_config(peft_type="LOHA"), "peft_type"),
        (change_config(use_dora=True), "use_dora"),
        (change_config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (change_config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (change_config(init_lora_weights="olora"), "init_lora_weights"),
        (
            change_weights(lambda w: w.update({A.replace("_A", "_B"): torch.zeros(96, 3)})),
            "qkv.lora_A.weight'",
        ),
        (change_config(r=8), r"rank \[4\], expected 8"),
        (change_config(fan_in_fan_out=True), "fan_in_fan_out"),
        (change_config(rank_pattern={"qkv": 2}), "rank_pattern"),
        (change_config(alpha_pattern={"qkv": 2.0}), "alpha_pattern"),
        (change_weights(lambda w: w.pop(A)), "resblocks.0.attn.qkv.lora_B.weight'"),
        (change_weights(lambda w: w.pop(A.replace("_A", "_B"))), "qkv.lora_A.weight'"),
        (change_weights(lambda w: w.update({A: torch.zeros(4, 5)})), "qkv.lora_A.weight'"),
        (
            change_weights(
                lambda w: w.update({A.replace("lora_A.weight", "bias"): w[A][0].clone()})
            ),
            "attn.qkv.bias'",
        ),
        (
            change_weights(
                lambda w: w.update({A.replace("A.weight", "magnitude_vector"): w[A][0].clone()})
            ),
            "lora_magnitude_vector'",
        ),
        (
            change_weights(
                lambda w: w.update(
                    {OTHER + "A.weight": w[A] * 2, OTHER + "B.weight": torch.zeros(96, 4)}
                )
            ),
            "resblocks.9",
        ),
        (change_weights(lambda w: w.clear()), r"rank \[\]"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path, change, words):
    write_adapter(tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(mb.InputError, match=words):
        mb.load_model(f"{BASE}+lora:{tmp_path / 'adapter'}")


def test_what_a_configuration_leaves_null_is_the_default(tmp_path):
    expected = write_adapter(tmp_path / "adapter")
    change_config(rank_pattern=None, alpha_pattern=None, use_rslora=None)(tmp_path / "adapter")
    assert_tower(mb.load_model(f"{BASE}+lora:{tmp_path / 'adapter'}"), expected)


def test_an_adapter_of_another_architecture(tmp_path):
    write_adapter(tmp_path / "adapter")
    with pytest.raises(mb.InputError, match=r"of a VisionTransformer .* fits no part of the model"):
        mb.load_model(f"toy-rn:random+lora:{tmp_path / 'adapter'}")


def peft_adapter(folder, root, targets, base="toy-vit-wide:random"):
    """What peft writes for a module of a model, and that model with the adapter merged in."""
    module = mb.load_model(base).module
    part = module.get_submodule(root) if root else module
    adapted = peft.get_peft_model(part, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    learn(adapted)
    adapted.save_pretrained(folder)
    adapted.merge_and_unload()
    return module


def assert_model(clip, expected):
    for key, value in clip.module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[key], msg=key)


FC = ["c_fc", "c_proj"]
IMAGE_FC, TEXT_FC = r"visual\..*c_fc", r"transformer\.resblocks\.\d+\.mlp\.c_fc"


@pytest.mark.parametrize("base", ["toy-vit-wide:random", "toy-vit:random"])
@pytest.mark.parametrize(
    ("root", "targets", "towers"),
    [
        ("", FC, {"image", "text"}),
        ("", TEXT_FC, {"text"}),
        ("", IMAGE_FC, {"image"}),
        ("visual", FC, {"image"}),
    ],
)
def test_an_adapter_changes_the_towers_that_it_was_made_for(tmp_path, base, root, targets, towers):
    expected = peft_adapter(tmp_path / "a", root, targets, base)
    clip, plain = mb.load_model(f"{base}+lora:{tmp_path / 'a'}"), mb.load_model(base)
    assert_model(clip, expected)
    changed = {
        "image" if key.startswith("visual.") else "text"
        for key, value in clip.module.state_dict().items()
        if not value.equal(plain.module.state_dict()[key])
    }
    assert changed == towers


def name_class(folder, name):
    mapping = {"base_model_class": name, "parent_library": "them"} if name else None
    change_config(auto_mapping=mapping)(folder)


@pytest.mark.parametrize("name", ["TheirWrapper", "Transformer", None])
@pytest.mark.parametrize("root", ["visual", ""])
def test_where_the_files_do_not_say_which_tower_an_adapter_is_refused(tmp_path, root, name):
    peft_adapter(tmp_path / "a", root, TEXT_FC)
    name_class(tmp_path / "a", name)
    with pytest.raises(mb.InputError, match="would fit the whole model and visual"):
        mb.load_model(f"toy-vit-wide:random+lora:{tmp_path / 'a'}")


@pytest.mark.parametrize("targets", [IMAGE_FC, FC])
def test_names_that_begin_with_a_tower_need_no_class(tmp_path, targets):
    expected = peft_adapter(tmp_path / "a", "", targets)
    for name in ("TheirWrapper", None):
        name_class(tmp_path / "a", name)
        assert_model(mb.load_model(f"toy-vit-wide:random+lora:{tmp_path / 'a'}"), expected)


def test_an_adapter_without_a_class_is_of_the_image_tower_or_refused(tmp_path):
    expected = peft_adapter(tmp_path / "image", "visual", TEXT_FC, "toy-vit:random")
    name_class(tmp_path / "image", None)
    assert_model(mb.load_model(f"toy-vit:random+lora:{tmp_path / 'image'}"), expected)
    peft_adapter(tmp_path / "text", "", TEXT_FC, "toy-vit:random")
    name_class(tmp_path / "text", None)
    with pytest.raises(mb.InputError, match="would fit the whole model, and its files do not say"):
        mb.load_model(f"toy-vit:random+lora:{tmp_path / 'text'}")


@pytest.mark.parametrize("name", ["VisionTransformer", None])
def test_an_image_towers_adapter_never_reaches_a_text_tower(tmp_path, name):
    peft_adapter(tmp_path / "a", "visual", TEXT_FC)
    name_class(tmp_path / "a", name)
    with pytest.raises(mb.InputError, match="would fit the whole model"):
        mb.load_model(f"toy-rn-wide:random+lora:{tmp_path / 'a'}")


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "lora_only"},
        {"modules_to_save": ["proj"]},
        {"lora_bias": True},
        {"target_parameters": ["proj"]},
        {"trainable_token_indices": [1]},
        {"velora_config": {"scale": 1}},
    ],
)
def test_what_does_more_than_plain_lora_is_refused(tmp_path, changes):
    write_adapter(tmp_path / "adapter")
    change_config(**changes)(tmp_path / "adapter")
    with pytest.raises(mb.InputError, match=next(iter(changes))):
        mb.load_model(f"{BASE}+lora:{tmp_path / 'adapter'}")
