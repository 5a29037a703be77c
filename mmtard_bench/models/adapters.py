"""LoRA adapters (Hu et al., 2022, arXiv:2106.09685) merged into a model: W + scale * B A."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.weights import read_config, read_weights
from mmtard_bench.schema import explained

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the module that it adapts."""

# The code of MMT-ARD adapts with r = 16 and alpha = 16, and its files do not say so.
_AUTHORS_RANK = _AUTHORS_ALPHA = 16

# Where the attention is made of linear layers, as our trainer's and MMT-ARD's is. What peft does to
# nn.MultiheadAttention itself is refused: peft 0.21 counts the adapter of its out_proj twice.
_ATTENTION = ((".attn.qkv", ".attn.in_proj_weight"), (".attn.proj", ".attn.out_proj.weight"))

_TOWERS = ("visual", "vision_model", "visual_projection", "text", "text_model", "text_projection")
"""With what the names of a tower's layers begin, in open_clip's layout and in transformers'."""
_WHOLE = "the whole model"

# What peft can do beside adding B A to the weights of layers.
_MORE = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
_METHODS = ("arrow_config", "kasa_config", "monteclora_config", "velora_config")


class _Config(BaseModel):
    """What of an ``adapter_config.json`` decides the merged weights."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: Literal[False] = False
    # Others (PiSSA, OLoRA, CorDA) change the weights that the adapter is added to.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] = True
    rank_pattern: dict[str, int] = Field(default={}, max_length=0)
    alpha_pattern: dict[str, float] = Field(default={}, max_length=0)
    bias: Literal["none"] = "none"
    auto_mapping: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            # Variants that are not W + scale * B A: DoRA, QALoRA, aLoRA and their like.
            variant = key.startswith("use_") and key != "use_rslora"
            if value and (variant or key in _MORE or key in _METHODS):
                raise ValueError(f"{key} asks for another kind of adapter than plain LoRA")
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}  # the default

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class Adapter:
    """The matrices of an adapter under the names of the module that it was made for.

    ``base`` is the class of that module, where the files say it; ``folder`` is where they are.
    """

    folder: Path
    matrices: dict[str, Tensor]
    scale: float
    base: str


def read_adapter(spec: str, folder: Path) -> Adapter:
    """The adapter in a directory that ``peft`` wrote.

    peft itself is not needed. Raises InputError for what is missing or damaged, and for what
    would change more than W + scale * B A (DoRA, biases, whole layers).
    """
    with explained(
        f"'{spec}': {folder / CONFIG} is no adapter that can be merged here",
        "Merge it with peft, and give the merged image tower with +visual:FILE.",
    ):
        config = _Config.model_validate_json(read_config(spec, folder / CONFIG))
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        weights = folder / "adapter_model.bin"
    found = read_weights(spec, weights)
    matrices = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.ndim != 2:
            raise InputError(
                f"'{spec}': {weights} holds '{key}', which is no matrix; expected lora_A and "
                "lora_B alone, as peft writes them."
            )
        matrices[key.removeprefix(PREFIX)] = value
    ranks = {value.shape[0] for key, value in matrices.items() if ".lora_A." in key}
    if ranks != {config.r}:
        raise InputError(
            f"'{spec}': {weights} holds matrices of rank {sorted(ranks)}, expected {config.r}, as "
            f"{CONFIG} says; use the two files that were written together."
        )
    base = str((config.auto_mapping or {}).get("base_model_class") or "")
    return Adapter(folder, matrices, config.scale, base)


def adapted(spec: str, module: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The weights of a model with an adapter added in, in float32.

    It may be of the whole model, of a tower or of a part of one. Its names must fit; but in
    open_clip's layout those of the text tower are those of an image tower, so they decide only
    where they begin with a tower's. Else the class that ``CONFIG`` names does, as far as just one
    part of the model has it; without one, the adapter must fit the image tower and nothing else.
    Raises InputError where no part or more than one remains.
    """
    state = module.state_dict()
    nearest = list(adapter.matrices)
    tell = any(key.partition(".")[0] in _TOWERS for key in adapter.matrices)
    # By the weights that would change, since two ways to name them may lead to one place.
    fits: dict[frozenset[str], str] = {}
    sure: dict[frozenset[str], dict[str, Tensor]] = {}
    for place, kinds, rename in _places(module):
        renamed = {rename(key): value for key, value in adapter.matrices.items()}
        strange = _strange(renamed, state)
        nearest = min(nearest, strange, key=len)
        if not strange:
            keys = frozenset(renamed)
            first = fits.setdefault(keys, place)
            alone = first == "visual" and not adapter.base
            if adapter.base in kinds or (tell and place == _WHOLE) or alone:
                sure[keys] = renamed
    if len(sure) == 1 and (adapter.base or tell or len(fits) == 1):
        (matrices,) = sure.values()
        return merge(spec, state, matrices, adapter.scale)
    what = f" of a {adapter.base}" if adapter.base else ""
    if fits:
        raise InputError(
            f"'{spec}': the adapter{what} in {adapter.folder} would fit "
            f"{' and '.join(fits.values())}, and its files do not say that it was made for one of "
            "them; expected a class of the model as base_model_class under auto_mapping in "
            f"{CONFIG}, as peft writes it. Merge it with peft, and give the merged weights."
        )
    raise InputError(
        f"'{spec}': the adapter{what} in {adapter.folder} fits no part of the model: "
        f"{_list(nearest)}. Expected matrices lora_A and lora_B of layers that it has, and nothing "
        "else; give the model that it was trained on, or merge it with peft and give the merged "
        "weights."
    )


def _places(module: nn.Module) -> Iterator[tuple[str, set[str], Callable[[str], str]]]:
    """Where an adapter may belong: the part, its classes, and its names -> the model's.

    Every part of the model, and the whole as transformers has it, without our two wrappers.
    """
    for path, part in module.named_modules():
        yield path or _WHOLE, {type(part).__name__}, partial(str.__add__, path and f"{path}.")
    parts = {
        name: f"{wrapper}.{name}"
        for wrapper in ("visual", "text")
        for name, _ in getattr(module, wrapper, nn.Identity()).named_children()
        if name in _TOWERS
    }
    if parts:

        def rename(key: str) -> str:
            first, dot, rest = key.partition(".")
            return parts.get(first, first) + dot + rest

        yield _WHOLE, {"CLIPModel", "SiglipModel"}, rename


def merge(
    spec: str, tower: Mapping[str, Tensor], matrices: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The weights of a tower with adapters added in: W + scale * B A, in float32.

    ``matrices`` are named LAYER.lora_A.weight (rank, in) and LAYER.lora_B.weight (out, rank).
    Raises InputError for one without its counterpart, its layer or its shape.
    """
    strange = _strange(matrices, tower)
    if strange or not matrices:
        raise InputError(
            f"'{spec}': the adapter does not fit the image tower: {_list(strange) or 'empty'}. "
            "Expected matrices lora_A and lora_B of layers that the tower has, and nothing else; "
            "give the model that it was trained on, or merge it with peft and use +visual:FILE."
        )
    merged = dict(tower)
    for key, a in matrices.items():
        layer, matrix = _split(key)
        name = _weight_of(layer, tower)
        if matrix == "A" and name is not None:
            b = matrices[f"{layer}.lora_B.weight"]
            merged[name] = tower[name].float() + scale * (b.float() @ a.float())
    return merged


def _strange(matrices: Mapping[str, Tensor], tower: Mapping[str, Tensor]) -> list[str]:
    """The matrices without their counterpart, their layer in the tower, or its shape."""
    strange = []
    for key, a in matrices.items():
        layer, matrix = _split(key)
        if matrix == "B" and _named(matrices, layer, "A") is not None:
            continue
        b = _named(matrices, layer, "B") if matrix == "A" else None
        name = _weight_of(layer, tower)
        if b is None or name is None or not _fits(a, b, tower[name]):
            strange.append(key)
    return strange


def merge_own(spec: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters that lie among the tower's own weights, as MMT-ARD's code saves them.

    There the attention is made of the linear layers ``qkv`` and ``proj``, which peft wraps
    (``base_layer``, ``lora_A.default``): repository itsnotacie/MMT-ARD. The files do not say by
    how much the adapters count, so the rank must be that of the code, 16, with alpha 16. States
    without adapters come back as they were, under the names of ``nn.MultiheadAttention``.
    """
    matrices = {k.replace(".default.", "."): v for k, v in state.items() if ".lora_" in k}
    tower = {}
    for key, value in state.items():
        if ".lora_" not in key:
            name = key.replace(".base_layer.", ".")
            name = re.sub(r"(resblocks\.\d+\.attn)\.qkv\.", r"\1.in_proj_", name)
            tower[re.sub(r"(resblocks\.\d+\.attn)\.proj\.", r"\1.out_proj.", name)] = value
    if not matrices:
        return tower
    ranks = {value.shape[0] for key, value in matrices.items() if ".lora_A." in key}
    if ranks != {_AUTHORS_RANK}:
        raise InputError(
            f"'{spec}': the checkpoint holds adapters of rank {sorted(ranks)} and not their alpha; "
            f"expected rank {_AUTHORS_RANK}, for which MMT-ARD's code fixes alpha "
            f"{_AUTHORS_ALPHA}. Merge them (peft: merge_and_unload), and save again."
        )
    return merge(spec, tower, matrices, _AUTHORS_ALPHA / _AUTHORS_RANK)


def _fits(a: Tensor, b: Tensor, weight: Tensor) -> bool:
    flat = a.ndim == b.ndim == 2
    return flat and b.shape[1] == a.shape[0] and (b.shape[0], a.shape[1]) == weight.shape


def _split(key: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
    return (match[1], match[2]) if match else (key, "")


def _named(matrices: Mapping[str, Tensor], layer: str, matrix: str) -> Tensor | None:
    return matrices.get(f"{layer}.lora_{matrix}.weight")


def _weight_of(layer: str, tower: Mapping[str, Tensor]) -> str | None:
    names = [f"{layer}.weight"]
    names += [layer.removesuffix(ours) + name for ours, name in _ATTENTION if layer.endswith(ours)]
    return next((name for name in names if name in tower), None)


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(f"'{key}'" for key in keys[:3]) + more
