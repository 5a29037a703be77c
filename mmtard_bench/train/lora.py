"""Low-rank adapters (Hu et al., 2022, arXiv:2106.09685) on the attention of a ViT image tower.

peft can adapt ``nn.MultiheadAttention``, but it then merges the weights in every forward pass and
applies no dropout. Therefore, during training, the attention of the tower consists of plain linear
layers, which peft adapts as usual. ``merged`` returns the weights under open_clip's names.
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
    """Self-attention of open_clip's blocks, with the parameters of ``nn.MultiheadAttention``.

    Maps tokens (N, L, D) to (N, L, D). Returns None in place of the attention weights.
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
        # One linear layer gives q, k and v, which is correct for self-attention only.
        assert query is key is value
        assert not need_weights
        q, k, v = self.qkv(query).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(mixed.transpose(1, 2).flatten(2)), None


TARGETS = r".*\.attn\.(qkv|proj)"
"""The adapted layers, as a regular expression for peft's ``target_modules``."""


def add_lora(visual: nn.Module, *, rank: int, alpha: float, dropout: float) -> None:
    """Add adapters to qkv and proj of every attention block, in place, and freeze the rest.

    Adapters start at zero, so that the output does not change, and are scaled by alpha / rank.
    Attention pooling (CoCa) stays frozen.

    Args:
        visual: An image tower of open_clip with residual attention blocks.
        rank: The rank of the adapters.
        alpha: The scale of the adapters is alpha / rank.
        dropout: The probability of dropout before the adapters, in [0, 1).

    Raises:
        InputError: If the tower has no such blocks, or if peft is not installed. The tower is
            unchanged then.
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
    # New modules start in training mode, in which dropout is active.
    visual.train(visual.training)


@torch.no_grad()
def merged(visual: nn.Module) -> dict[str, Tensor]:
    """The state dict of the tower with its adapters merged, under open_clip's names.

    Adapted weights are W + alpha / rank * B A. The tower does not change. As in any state dict, the
    other tensors share memory with the tower.
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
    """A copy of the adapters: A (rank, in) and B (out, rank) of every adapted layer.

    Names are those of the tower, such as "transformer.resblocks.0.attn.qkv.lora_A.weight".
    """
    return {name: weight.clone() for name, weight in _live(visual).items()}


def adapter_files(
    visual: nn.Module, *, rank: int, alpha: float, dropout: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the configuration of the adapters, in the layout of a peft directory."""
    weights = {PREFIX + name: weight for name, weight in adapter(visual).items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": TARGETS,
        # peft writes this as well. Names alone do not tell an image tower from a text tower.
        "auto_mapping": {
            "base_model_class": type(visual).__name__,
            "parent_library": type(visual).__module__,
        },
    }
    return weights, config


def load_adapter(visual: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load adapters that ``adapter`` returned into a tower after ``add_lora``.

    Raises:
        InputError: If names or shapes differ from those of the tower, which is unchanged then.
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
