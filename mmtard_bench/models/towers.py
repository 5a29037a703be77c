"""Another image tower, or an adapter, for a model: checkpoints as people save them."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.adapters import PREFIX, merge, merge_own, read_adapter
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.weights import misfits, read_weights

OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's own state dicts hold beside the weights."""
TECOA = "vision_encoder_state_dict"
_WRAPPERS = (TECOA, "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.", PREFIX)
_TOWERS = (("visual.",), ("vision_model.", "visual_projection."))


def with_visual(clip: Clip, path: Path, spec: str) -> Clip:
    """The model with the image tower of a checkpoint; the text tower and the scale stay.

    ``path`` is safetensors, or what ``torch.save`` wrote. Recognised by its keys: a bare image
    tower (RobustVLM and MMT-ARD save ``model.visual.state_dict()``), one within a whole model
    (``visual.``; its text tower is left out, the base's stays), under ``state_dict``, ``model``
    or TeCoA's ``vision_encoder_state_dict``, behind ``module.`` (DataParallel), ``_orig_mod.``
    (torch.compile) or ``model.``, and with MMT-ARD's LoRA layers (``merge_own``). Whatever its
    precision, the tower is float32.

    The activation is that of the base, since weights do not tell. A warning is given where they
    come from OpenAI's models (by their format; TeCoA's and MMT-ARD's LoRA code know no others; or
    the path says so) and the base has GELU.

    The module changes in place. Raises InputError for what cannot be read, has a learned visual
    prompt, or does not fill the tower exactly.
    """
    visual = _tower(clip, spec)
    raw = read_weights(spec, path)
    state, openai = tower_state(spec, path, raw)
    _fill(visual, state, spec, str(path))
    if openai or "openai" in str(path).lower():
        warn_of_gelu(f"'{spec}': {path}", visual)
    return _changed(clip, spec)


def with_adapter(clip: Clip, folder: Path, spec: str) -> Clip:
    """The model with a ``peft`` adapter of its image tower merged in: W + scale * B A.

    Our trainer writes such a directory with --adapter. The module changes in place. Raises
    InputError for what cannot be read, or does not fit.
    """
    visual = _tower(clip, spec)
    matrices, scale = read_adapter(spec, folder)
    _fill(visual, merge(spec, visual.state_dict(), matrices, scale), spec, str(folder))
    return _changed(clip, spec)


def tower_state(spec: str, path: Path, raw: Any) -> tuple[dict[str, Tensor], bool]:
    """The image tower in what a weights file holds, and whether it comes from OpenAI's models.

    Raises InputError if there is none, or if a visual prompt was learned with it.
    """
    tecoa = isinstance(raw, dict) and TECOA in raw
    if tecoa:
        _refuse_prompts(spec, path, raw)
    state = flat_state(spec, path, raw)
    openai = state.keys() >= OPENAI_KEYS
    for names in _TOWERS:
        part = {k: v for k, v in state.items() if k.startswith(names)}
        if part:
            # Within open_clip's models the tower is a module of its own, named visual.
            own = "visual." if names == ("visual.",) else ""
            state = _without_prefixes({k.removeprefix(own): v for k, v in part.items()})
            break
    lora = any(".lora_" in key for key in state)
    return merge_own(spec, state), openai or tecoa or lora


def flat_state(spec: str, path: Path, raw: Any) -> dict[str, Tensor]:
    """The state dict in what a weights file holds, without wrappers and prefixes.

    Raises InputError if there is none.
    """
    for key in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
            break
    if not isinstance(raw, dict) or not raw or not all(_is_weight(*item) for item in raw.items()):
        held = ", ".join(f"'{k}'" for k in list(raw)[:5]) if isinstance(raw, dict) else None
        raise InputError(
            f"'{spec}': {path} holds no state dict but {held or type(raw).__name__}; expected "
            f"tensors by name, alone or under {', '.join(_WRAPPERS[:-1])} or {_WRAPPERS[-1]}."
        )
    return _without_prefixes(raw)


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    while True:
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                break
        else:
            return dict(state)


def _refuse_prompts(spec: str, path: Path, raw: Mapping[str, Any]) -> None:
    """TeCoA's code (cvlab-columbia/ZSRobust4FoundationModel) saves prompts beside the tower."""
    parts = {part: raw.get(part) for part in ("state_dict", "add_prompter", TECOA)}
    learned = [
        f"{part}.{key} {tuple(value.shape)}"
        for part, held in parts.items()
        for key, value in (held.items() if isinstance(held, dict) else ())
        if isinstance(value, Tensor) and value.numel() and (part != TECOA or "prompt" in key)
    ]
    if learned:
        raise InputError(
            f"'{spec}': {path} holds a visual prompt that was learned with the image tower "
            f"({', '.join(learned[:2])}). Without it this would be another model, and prompts are "
            "not supported; use a checkpoint that was trained without (add_prompt_size 0, "
            "null_patch)."
        )


def _tower(clip: Clip, spec: str) -> nn.Module:
    visual = getattr(clip.module, "visual", None)
    if not isinstance(visual, nn.Module):
        raise InputError(
            f"'{spec}': the model '{clip.name}' has no image tower 'visual' to change; expected a "
            "model in open_clip's layout."
        )
    if clip.given_digest is not None:
        raise InputError(
            f"'{spec}': the model '{clip.name}' names its own digest, which would stay the same "
            "with other weights; change the weights where it is made."
        )
    return visual


@torch.no_grad()
def _fill(visual: nn.Module, state: Mapping[str, Tensor], spec: str, source: str) -> None:
    wrong = misfits(visual.state_dict(), state)
    if wrong:
        raise InputError(
            f"'{spec}': {source} does not fit the image tower {type(visual).__name__}: {wrong}. "
            "Name the architecture that it was trained as; every weight of the tower must be "
            "there, and nothing else."
        )
    visual.load_state_dict(state)


def _changed(clip: Clip, spec: str) -> Clip:
    return replace(clip, name=spec, source=spec)


def warn_of_gelu(what: str, module: nn.Module) -> None:
    """Warn if weights of OpenAI's models meet GELU: they were trained with QuickGELU."""
    if any(isinstance(layer, nn.GELU) for layer in module.modules()):
        warnings.warn(
            f"{what} seems to come from OpenAI's models, which were trained with QuickGELU, but "
            "this architecture has GELU, which silently costs accuracy. If it does, write "
            "ARCH-quickgelu or ARCH:openai, or set quick_gelu in open_clip_config.json.",
            stacklevel=2,
        )
