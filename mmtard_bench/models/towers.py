"""Replace the image tower of a model by a checkpoint's, or merge an adapter."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.adapters import PREFIX, adapted, merge_own, read_adapter
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.digest import checksum
from mmtard_bench.models.weights import assume, misfits, named, read_weights

OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's own state dicts hold beside the weights."""
TECOA = "vision_encoder_state_dict"
_WRAPPERS = (TECOA, "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.", PREFIX)
HALF = 2**-10
"""The relative rounding of float16: so far may weights that were saved in it be off."""
_TOWERS = (("visual.",), ("vision_model.", "visual_projection."))


@dataclass(frozen=True)
class State:
    """The content of a weights file: tensors by name, without wrappers and prefixes.

    ``openai`` says whether it is in OpenAI's own format, ``tecoa`` whether it is in TeCoA's.
    """

    path: Path
    tensors: dict[str, Tensor]
    openai: bool = False
    tecoa: bool = False

    @property
    def is_tower(self) -> bool:
        """Whether a state dict is a bare image tower in open_clip's layout."""
        whole = any(not key.startswith("visual.") for key in self.tensors)
        return self.tecoa or "conv1.weight" in self.tensors or not whole


def with_visual(clip: Clip, path: Path, spec: str) -> Clip:
    """Replace the image tower by that of a checkpoint; the text tower and the scale stay.

    ``path`` is safetensors, or what ``torch.save`` wrote. Recognised by its keys: a bare image
    tower (RobustVLM and MMT-ARD save ``model.visual.state_dict()``), one within a whole model
    (``visual.``; the base's text tower stays), under ``state_dict``, ``model`` or TeCoA's
    ``vision_encoder_state_dict``, behind ``module.`` (DataParallel), ``_orig_mod.``
    (torch.compile) or ``model.``, and with MMT-ARD's LoRA layers (``merge_own``). Whatever its
    precision, the tower is float32.

    If the checkpoint is a whole model whose other tensors differ from the base's, the scores are
    not those of the checkpoint: a warning and a note of the model say so.

    Weights do not state their activation, so the base's is used. If the checkpoint derives from
    OpenAI's models and the base has GELU, a warning is given. Signs of OpenAI's models are the
    format, the layout of TeCoA or of MMT-ARD's LoRA code, and the path.

    The module changes in place. Raises InputError for what cannot be read, has a learned visual
    prompt, or does not fill the tower exactly.
    """
    visual = _tower(clip, spec)
    state = read_state(spec, path)
    tower, rest = _split(state.tensors)
    lora = any(".lora_" in key for key in tower)
    with _counting(clip, visual, spec):
        _fill(visual, merge_own(spec, tower), spec, str(path))
    notes = _unused(clip, spec, path, rest)
    if state.openai or state.tecoa or lora or "openai" in str(path).lower():
        warn_of_gelu(f"'{spec}': {path}", visual)
    return _changed(clip, spec, notes)


def with_adapter(clip: Clip, folder: Path, spec: str) -> Clip:
    """The model with a ``peft`` adapter merged in: W + scale * B A.

    The adapter may be of the image tower, of the text tower or of both: see ``adapted``. Our
    trainer writes such a directory with --adapter. The module changes in place. Raises InputError
    for what cannot be read, does not fit, or fits more than one part of the model.
    """
    visual = _tower(clip, spec)
    module = cast("nn.Module", clip.module)
    with _counting(clip, visual, spec):
        module.load_state_dict(adapted(spec, module, read_adapter(spec, folder)))
    return _changed(clip, spec)


def read_state(spec: str, path: Path) -> State:
    """The state dict in a weights file, without wrappers and prefixes.

    Weights that lie beside it (of an average, of another model) are named in a warning. Raises
    InputError for what cannot be read, holds none, or has learned a visual prompt with it.
    """
    raw = read_weights(spec, path)
    tecoa = isinstance(raw, dict) and TECOA in raw
    if tecoa:
        _refuse_prompts(spec, path, raw)
    state = raw
    for key in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            state = raw[key]
            beside = [f"'{other}'" for other, held in raw.items() if other != key and _full(held)]
            if beside:
                assume(
                    spec,
                    f"{path.name} also holds weights under {', '.join(beside)}; those under "
                    f"'{key}' are used.",
                )
            break
    if not isinstance(state, dict) or not state or not all(_is_weight(*i) for i in state.items()):
        held = ", ".join(f"'{k}'" for k in list(state)[:5]) if isinstance(state, dict) else None
        raise InputError(
            f"'{spec}': {path} holds no state dict but {held or type(state).__name__}; expected "
            f"tensors by name, alone or under {', '.join(_WRAPPERS[:-1])} or {_WRAPPERS[-1]}."
        )
    tensors = {k: v for k, v in _without_prefixes(state).items() if not _counts(k, v)}
    openai = tensors.keys() >= OPENAI_KEYS
    if openai:
        tensors = {key: value for key, value in tensors.items() if key not in OPENAI_KEYS}
    return State(path, tensors, openai, tecoa)


def _full(held: object) -> bool:
    """Whether a value is a state dict that is not empty."""
    return (
        isinstance(held, dict)
        and bool(held)
        and all(_is_weight(*item) for item in held.items())
        and any(value.numel() for value in held.values())
    )


def _counts(key: str, value: Tensor) -> bool:
    """Whether this is the tensor 0, 1, ... that old transformers saved among the weights."""
    return key.endswith(".position_ids") and value.flatten().tolist() == [*range(value.numel())]


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The image tower in a state dict, under its own names, and all else."""
    for names in _TOWERS:
        part = {k: v for k, v in state.items() if k.startswith(names)}
        if part:
            # Within open_clip's models the tower is a module of its own, named visual.
            own = "visual." if names == ("visual.",) else ""
            tower = _without_prefixes({k.removeprefix(own): v for k, v in part.items()})
            return tower, {k: v for k, v in state.items() if k not in part}
    return dict(state), {}


def _unused(clip: Clip, spec: str, path: Path, rest: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Tensors of a checkpoint outside its image tower that differ from the base's."""
    own = {_plain(k): v for k, v in cast("nn.Module", clip.module).state_dict().items()}
    differ = [key for key, value in rest.items() if not _same(own.get(_plain(key)), value)]
    if not differ:
        return ()
    note = (
        f"{path.name} is more than an image tower, and the rest of it, which is not used, differs "
        f"from what the model has ({named(differ)}). If the text tower was trained too, give the "
        "whole checkpoint as a model of its own: ARCH:FILE, local-dir: or transformers:."
    )
    return (assume(spec, note),)


def _plain(key: str) -> str:
    """A name in the text tower, which some layouts have in a module of its own."""
    return key.removeprefix("text.")


def _same(own: Tensor | None, given: Tensor) -> bool:
    """Whether a checkpoint's tensor is the base's, but for half precision on the way."""
    if own is None or own.numel() != given.numel():
        return False
    given = given.reshape(own.shape).to(own.device)
    if given.dtype == torch.bfloat16:
        own = own.to(torch.bfloat16)
    return torch.allclose(own.float(), given.float(), rtol=HALF, atol=1e-6)


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


@contextmanager
def _counting(clip: Clip, visual: nn.Module, spec: str) -> Iterator[None]:
    """Refuse a change of the image tower that does not change the embeddings.

    Python code may compute them with another object: a function that holds the earlier tower, or a
    copy that was made for speed.
    """
    weights, answers = checksum(visual), _answers(clip)
    yield
    if answers is None or checksum(visual) == weights:
        return
    after = _answers(clip)
    if after is not None and torch.equal(answers, after):
        raise InputError(
            f"'{spec}': the weights of the image tower 'visual' change, but the answers of "
            f"encode_image of the model '{clip.name}' do not: it computes them with something "
            "else, such as an earlier tower that a function or a lambda holds. Let encode_image "
            "be a method that calls self.visual, or change the weights where the model is made."
        )


@torch.no_grad()
def _answers(clip: Clip) -> Tensor | None:
    """Embeddings of two noise images; None if the model fails on them."""
    images = torch.rand(2, 3, *clip.preprocess.size, generator=torch.Generator().manual_seed(0))
    try:
        return clip.image_features(images)
    except Exception:  # anybody's code; an evaluation says what is wrong
        return None


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


def _changed(clip: Clip, spec: str, notes: tuple[str, ...] = ()) -> Clip:
    return replace(clip, name=spec, source=spec, notes=clip.notes + notes)


def warn_of_gelu(what: str, module: nn.Module) -> None:
    """Warn if weights of OpenAI's models meet GELU: they were trained with QuickGELU."""
    if any(isinstance(layer, nn.GELU) for layer in module.modules()):
        warnings.warn(
            f"{what} seems to come from OpenAI's models, which were trained with QuickGELU, but "
            "this architecture has GELU, which silently costs accuracy. If it does, write "
            "ARCH-quickgelu or ARCH:openai, or set quick_gelu in open_clip_config.json.",
            stacklevel=2,
        )
