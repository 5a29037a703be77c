"""From a configuration of open_clip and weights to a module and its tokenizer."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from mmtard_bench.errors import InputError, first_line
from mmtard_bench.hub import from_hub, quiet, refusal
from mmtard_bench.models.foreign import (
    VOCABULARIES,
    checked_repository,
    checked_tokenizer,
    last_added,
    require_end,
    require_text_counts,
)
from mmtard_bench.models.towers import State
from mmtard_bench.models.weights import bound_layers, misfits, read_json
from mmtard_bench.types import Tokenizer


def assemble(
    spec: str,
    model: dict[str, Any],
    state: State | None,
    folder: Path | None,
) -> tuple[Any, Tokenizer, tuple[str, ...]]:
    """The model of a configuration with the weights of a file, or untrained from seed 0.

    With its tokenizer, and notes on that; one of transformers comes from ``folder``, or else from
    the repository that is named.
    """
    text = model["text_cfg"]
    named, tower = text.get("hf_tokenizer_name"), text.get("hf_model_name")
    try:
        where = checked_repository(spec, tower) if tower else None
        if where and state:
            bound_layers(spec, read_json(spec, where / "config.json"), len(state.tensors))
        files = (folder or checked_repository(spec, named)) if named else None
        if files and not any((files / name).is_file() for name in VOCABULARIES):
            raise InputError(
                f"'{spec}' has texts for the tokenizer {named!r}, but {files} has none of "
                f"{', '.join(VOCABULARIES)}. Put the files of that tokenizer there."
            )
        with quiet():
            module: Any = _filled(spec, partial(_build, model, where), state).eval()
            tokenizer = _tokenizer(text, files)
            notes: tuple[str, ...] = ()
            added = ""
            if files:
                own = cast("Any", tokenizer).tokenizer
                added = last_added(own)
                _require_end(spec, module, tokenizer, own)
                tokenizer, notes = checked_tokenizer(tokenizer, files, module.vocab_size, spec)
            require_text_counts(spec, module, tokenizer, added)
    except InputError:
        raise
    except Exception as error:  # open_clip, timm, transformers and torch have no common base
        if from_hub(error):
            raise refusal(spec, error) from error
        raise InputError(
            f"'{spec}': its configuration makes no model of open_clip: {first_line(error)} Use the "
            "configuration that was written with the weights."
        ) from error
    return module, tokenizer, notes


def _require_end(spec: str, module: Any, tokenizer: Tokenizer, own: Any) -> None:
    text = getattr(module, "text", module)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", ""))
    if pool == "argmax":
        require_end(spec, tokenizer, own, None)
    elif pool == "eos":
        require_end(spec, tokenizer, own, text.eos_id)


def _build(model: dict[str, Any], text_folder: Path | None) -> nn.Module:
    """An untrained model, as open_clip's ``create_model`` makes it, which takes names alone."""
    given = deepcopy(model)
    custom = given.pop("custom_text", False)
    if given["vision_cfg"].get("timm_model_name"):
        given["vision_cfg"]["timm_model_pretrained"] = False
    if text_folder:
        custom = True
        given["text_cfg"] |= {"hf_model_name": str(text_folder), "hf_model_pretrained": False}
    if not custom:
        return cast("nn.Module", open_clip.CLIP(**given))
    kind = open_clip.CoCa if "multimodal_cfg" in given else open_clip.CustomTextCLIP
    return cast("nn.Module", kind(**given))


def _filled(spec: str, build: Callable[[], nn.Module], state: State | None) -> nn.Module:
    """A model with the weights of a file, each of them used; untrained from seed 0 without one.

    It is made without memory first, so that sizes that the weights do not have cost nothing.
    """
    weights: Mapping[str, Tensor] = {}
    if state and state.tensors:
        with torch.device("meta"):
            empty = build()
        weights = _as_open_clip(empty, state.tensors)
        wrong = misfits(empty.state_dict(), weights)
        if wrong:
            raise InputError(
                f"'{spec}' could not be loaded: the weights do not fit the architecture ({wrong}). "
                f"{_advice(spec, state)}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    if state and not state.tensors:
        _fill_from_numpy(spec, module, state.path)
    elif state:
        module.load_state_dict(weights)
    return module


def _advice(spec: str, state: State) -> str:
    if not state.is_tower:
        return "Name the architecture that they were trained as; each must be used, and no other."
    architecture = spec.partition(":")[0]
    known = architecture if architecture in open_clip.list_models() else "ARCH"
    return (
        f"{state.path} holds an image tower alone; name a model whose text tower goes with it, and "
        f"put the tower in, for example {known}:openai+visual:{state.path}."
    )


def _as_open_clip(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names: of Apple's MobileCLIP, and of older versions of open_clip."""
    expected = module.state_dict()
    parts = {key.partition(".")[0] for key in state}
    if "image_encoder" in parts and parts <= {"image_encoder", "text_encoder", "logit_scale"}:
        state = convert_state_dict(module, dict(state))
    if "positional_embedding" in state and "positional_embedding" not in expected:
        state = convert_to_custom_text_state_dict(dict(state))
    scalars = ("logit_scale", "logit_bias")
    return {
        key: value.reshape(expected[key].shape)
        if key in scalars and key in expected and value.numel() == expected[key].numel()
        else value
        for key, value in state.items()
    }


def _fill_from_numpy(spec: str, module: nn.Module, file: Path) -> None:
    with np.load(file) as arrays:
        names = [name for name in arrays.files if name.startswith("params/")] or arrays.files
        held = sum(arrays[name].size for name in names)
    own = sum(parameter.numel() for parameter in module.parameters())
    if held != own:
        raise InputError(
            f"'{spec}' could not be loaded: {file} holds {held} numbers, but the architecture has "
            f"{own}. Name the architecture that it was trained as."
        )
    open_clip.load_checkpoint(module, str(file))


def _tokenizer(text: dict[str, Any], files: Path | None) -> Tokenizer:
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    if files is None:
        return cast("Tokenizer", SimpleTokenizer(context_length=length, **options))
    mode = text.get("tokenizer_mode")
    made = HFTokenizer(str(files), length, tokenizer_mode=mode, trust_remote_code=False, **options)
    return cast("Tokenizer", made)
