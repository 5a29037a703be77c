"""Low-rank adapters (Hu et al., 2022, arXiv:2106.09685) on the attention of a ViT image tower.

peft adapts ``nn.MultiheadAttention`` too, but merges the weights in every forward pass and has no
dropout there. So while it trains, the tower's attention is made of plain linear layers, which peft
adapts as usual; ``merged`` gives the weights back under open_clip's names.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.adapters import PREFIX


class Attention(nn.Module):
    """What ``nn.MultiheadAttention`` computes for open_clip's blocks, with the same parameters.

    Tokens (N, L, D) -> (N, L, D) and, in the place of the attention weights, None.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        assert original.batch_first
        assert original.dropout == 0
        self.heads = original.num_heads
        self.qkv = nn.Linear(original.embed_dim, 3 * original.embed_dim, device="meta")
        self.qkv.weight, self.qkv.bias = original.in_proj_weight, original.in_proj_bias
        self.proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        # One layer gives q, k and v, so it must be self-attention.
        assert query is key is value
        assert not need_weights
        q, k, v = self.qkv(query).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(mixed.transpose(1, 2).flatten(2)), None


TARGETS = r".*\.attn\.(qkv|proj)"
"""The layers that are adapted, as peft's ``target_modules``."""


def add_lora(visual: nn.Module, *, rank: int, alpha: float, dropout: float) -> None:
    """Put adapters on qkv and proj of every attention block, in place; nothing else learns.

    The output stays what it was, as the adapters begin at zero; they scale by alpha / rank. A
    pooling by attention (CoCa) is no block and stays frozen. Raises InputError for a tower without
    such blocks and where peft is not installed, and then leaves the tower as it was.
    """
    blocks = [module for module in visual.modules() if isinstance(module, ResidualAttentionBlock)]
    if not blocks:
        raise InputError(
            f"LoRA needs a ViT image tower, with open_clip's attention blocks; this one is a "
            f"{type(visual).__name__}. Choose another student, or train all weights without lora."
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            f"LoRA needs peft, which cannot be imported ({error}); "
            "pip install 'mmtard-bench[lora]'."
        ) from error
    for block in blocks:
        block.attn = Attention(block.attn)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast("int", alpha),  # peft says int, and only divides it by the rank
        lora_dropout=dropout,
        target_modules=TARGETS,
    )
    inject_adapter_in_model(config, visual)
    # New modules begin in training mode, in which dropout acts.
    visual.train(visual.training)


@torch.no_grad()
def merged(visual: nn.Module) -> dict[str, Tensor]:
    """The state dict of the tower as it was before ``add_lora``, with the adapters added in.

    W + alpha / rank * B A under open_clip's names; the tower itself does not change. As in any
    state dict, the other tensors share their memory with the tower.
    """
    state = visual.state_dict()
    base = ".base_layer.weight"
    for name in [name for name in state if name.endswith(base)]:
        layer = cast("Any", visual.get_submodule(name.removesuffix(base)))
        state[name] = state[name] + layer.get_delta_weight("default")
    return {
        name.replace(".qkv.base_layer.", ".in_proj_").replace(".proj.base_layer.", ".out_proj."): w
        for name, w in state.items()
        if ".lora_" not in name
    }


def _live(visual: nn.Module) -> dict[str, Tensor]:
    weights = visual.state_dict().items()
    return {name.replace(".default.", "."): w for name, w in weights if ".lora_" in name}


def adapter(visual: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters alone: A (rank, in), B (out, rank) of every adapted layer.

    Names are those of the tower: "transformer.resblocks.0.attn.qkv.lora_A.weight".
    """
    return {name: weight.clone() for name, weight in _live(visual).items()}


def adapter_files(
    visual: nn.Module, *, rank: int, alpha: float, dropout: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration of the adapters in the layout of a ``peft`` directory."""
    weights = {PREFIX + name: weight for name, weight in adapter(visual).items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": TARGETS,
        # As peft writes it: the names alone could be those of a text tower.
        "auto_mapping": {
            "base_model_class": type(visual).__name__,
            "parent_library": type(visual).__module__,
        },
    }
    return weights, config


def load_adapter(visual: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put what ``adapter`` gave into a tower after ``add_lora``.

    Raises InputError unless names and shapes are the tower's, and then changes nothing.
    """
    live = _live(visual)
    expected = {(name, tuple(weight.shape)) for name, weight in live.items()}
    given = {(name, tuple(weight.shape)) for name, weight in state.items()}
    if given != expected:
        raise InputError(
            f"The adapter does not fit this image tower: it has {_first(given - expected)}, where "
            f"{_first(expected - given)} was expected; load it into the architecture and with the "
            "rank that it was trained with."
        )
    for name, weight in live.items():
        weight.copy_(state[name])


def _first(weights: set[tuple[str, tuple[int, ...]]]) -> str:
    return next((f"{name} of shape {shape}" for name, shape in sorted(weights)), "nothing more")
