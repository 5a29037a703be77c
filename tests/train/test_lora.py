"""Adapters on a tiny ViT: what they change, what they leave alone, and how they come out again."""

import sys

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from mmtard_bench.errors import InputError
from mmtard_bench.train.lora import adapter, add_lora, load_adapter, merged

pytest.importorskip("peft")

TEXT = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 48, "head_width": 24, "patch_size": 8}
POOLED = {**VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def tower(seed=0, vision=VIT):
    torch.manual_seed(seed)
    return CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT).visual.eval()


def adapted(rank=4, alpha=8.0, dropout=0.5, learnt=True):
    """A tower with adapters, as they might be after some steps of training if ``learnt``."""
    visual = tower()
    add_lora(visual, rank=rank, alpha=alpha, dropout=dropout)
    if learnt:
        with torch.no_grad():
            for weight in learning(visual).values():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return visual


def learning(visual):
    return {name: p for name, p in visual.named_parameters() if p.requires_grad}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vision", [VIT, POOLED], ids=["vit", "pooled"])
def test_adding_adapters_changes_no_output(vision, images):
    visual = tower(vision=vision)
    before = visual(images)
    add_lora(visual, rank=4, alpha=8.0, dropout=0.5)
    torch.testing.assert_close(visual(images), before)
    assert not any(isinstance(b.attn, nn.MultiheadAttention) for b in visual.transformer.resblocks)


@pytest.mark.parametrize("vision", [VIT, POOLED], ids=["vit", "pooled"])
def test_only_the_adapters_learn(vision):
    visual = tower(vision=vision).requires_grad_(True)
    add_lora(visual, rank=4, alpha=8.0, dropout=0.5)
    assert set(learning(visual)) == {
        f"transformer.resblocks.{i}.attn.{layer}.lora_{ab}.default.weight"
        for i in range(2)
        for layer in ("qkv", "proj")
        for ab in "AB"
    }


def test_gradients_reach_the_adapters_and_the_pixels(images):
    visual = adapted().train()
    images.requires_grad_()
    loss = visual(images).square().sum()
    gradients = torch.autograd.grad(loss, [images, *learning(visual).values()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def test_the_gradient_at_the_pixels_is_that_of_the_merged_tower(images):
    visual, plain = adapted(), tower(seed=7)
    plain.load_state_dict(merged(visual))
    images.requires_grad_()
    of = [torch.autograd.grad(v(images).square().sum(), images)[0] for v in (visual, plain)]
    torch.testing.assert_close(of[0], of[1], rtol=1e-4, atol=1e-5)


def test_merged_loads_into_a_fresh_tower_that_says_the_same(images):
    visual, plain = adapted(), tower(seed=7)
    weights = merged(visual)
    assert list(weights) == list(plain.state_dict())
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain(images), visual(images))
    assert (plain(images) - tower()(images)).abs().max() > 0.01


def test_merged_adds_alpha_over_rank_times_b_a():
    visual, start = adapted(rank=4, alpha=6.0), tower().state_dict()
    weights, own = merged(visual), adapter(visual)
    for layer, original in (("qkv", "in_proj_weight"), ("proj", "out_proj.weight")):
        at = "transformer.resblocks.1.attn."
        b, a = own[f"{at}{layer}.lora_B.weight"], own[f"{at}{layer}.lora_A.weight"]
        torch.testing.assert_close(weights[at + original], start[at + original] + 1.5 * b @ a)
    changed = {name for name, weight in weights.items() if not weight.equal(start[name])}
    assert len(changed) == 4


def test_merging_leaves_the_live_tower_as_it_was(images):
    visual = adapted()
    before = {name: weight.clone() for name, weight in visual.state_dict().items()}
    output = visual(images)
    merged(visual)
    after = visual.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)
    assert visual(images).equal(output)
    assert len(learning(visual)) == 8


def test_dropout_acts_in_training_only(images):
    visual = adapted()
    # add_lora keeps the tower's mode: this one was in evaluation.
    assert visual(images).equal(visual(images))
    visual.train()
    assert not visual(images).equal(visual(images))
    visual.eval()
    assert visual(images).equal(visual(images))


def test_an_adapter_comes_back(images):
    visual, other = adapted(), adapted(learnt=False)
    saved = adapter(visual)
    assert sum(weight.numel() for weight in saved.values()) == 2 * 4 * (48 + 144 + 48 + 48)
    load_adapter(other, saved)
    assert other(images).equal(visual(images))
    # What was saved is a copy: training goes on without it.
    with torch.no_grad():
        for weight in learning(visual).values():
            weight.zero_()
    assert all(weight.any() for weight in saved.values())


@pytest.mark.parametrize("damage", ["rank", "missing", "unknown", "no adapters"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(damage):
    visual = tower() if damage == "no adapters" else adapted()
    before = adapter(visual)
    state = adapter(adapted(rank=2 if damage == "rank" else 4))
    if damage == "missing":
        state.popitem()
    if damage == "unknown":
        state["transformer.resblocks.9.attn.qkv.lora_A.weight"] = torch.zeros(4, 48)
    with pytest.raises(InputError, match=r"does not fit this image tower: .* was expected; load"):
        load_adapter(visual, state)
    assert all(weight.equal(before[name]) for name, weight in adapter(visual).items())


def test_bfloat16_autocast(images):
    visual = adapted()
    exact = visual(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = visual(images)
        rough.float().square().sum().backward()
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning(visual).values())


def test_a_tower_without_attention_blocks_is_refused():
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    visual = tower(vision=resnet)
    with pytest.raises(InputError, match=r"needs a ViT image tower.*ModifiedResNet"):
        add_lora(visual, rank=4, alpha=4.0, dropout=0.0)
    assert all(p.requires_grad for p in visual.parameters())


def test_without_peft_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    visual = tower()
    with pytest.raises(InputError, match=r"pip install 'mmtard-bench\[lora\]'"):
        add_lora(visual, rank=4, alpha=4.0, dropout=0.0)
    assert isinstance(visual.transformer.resblocks[0].attn, nn.MultiheadAttention)


def test_the_papers_student_has_884736_trainable_parameters():
    with torch.device("meta"):
        visual = CLIP(**open_clip.get_model_config("ViT-B-32")).visual
    add_lora(visual, rank=16, alpha=16, dropout=0.1)
    assert sum(p.numel() for p in learning(visual).values()) == 884_736
