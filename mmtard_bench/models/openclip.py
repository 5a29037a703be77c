"""Models of open_clip: tags, files, directories and hub repositories."""

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from open_clip import constants

from mmtard_bench import registry
from mmtard_bench.errors import InputError, first_line
from mmtard_bench.hub import (
    checked,
    download,
    first_file,
    from_hub,
    quiet,
    refusal,
    resolve_commit,
)
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.models.text_table import is_table_config, load_table_clip
from mmtard_bench.models.towers import OPENAI_KEYS, TECOA, flat_state, warn_of_gelu
from mmtard_bench.models.weights import (
    check_file,
    misfits,
    read_weights,
    why_unreadable,
)


def load_open_clip(spec: str, architecture: str, pretrained: str | None) -> Clip:
    """Load an architecture with a tag's or a file's weights, or untrained; a directory or the hub.

    ``architecture`` may be ``hf-hub:ORG/REPO`` or ``local-dir:PATH``. On QuickGELU, which leaves
    no trace in weights: tags know it. A file in OpenAI's own format was trained with it, so it is
    used, with a warning where the architecture has GELU. Where only a path or repository says
    "openai" there is a warning and no change: it may be said of data, or of a start long left.
    Raises InputError for anything that cannot be loaded.
    """
    scheme, _, rest = architecture.partition(":")
    folder = Path(rest) if scheme == "local-dir" else None
    if scheme == "hf-hub":
        folder = _hub_folder(spec, rest)
    origin = f"local-dir:{folder}" if folder else architecture
    config = _check_inputs(spec, architecture, pretrained, folder)
    if folder and is_table_config(config):
        return replace(load_table_clip(folder, spec, spec), config=config)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    file = Path(pretrained) if pretrained and not tag else None
    if tag:
        _fetch_tag(spec, tag)
    state = _state_of(spec, architecture, file) if file else {}
    openai = file is not None and state.keys() >= OPENAI_KEYS
    quick_gelu = openai or bool(tag.get("quick_gelu"))
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            module = open_clip.create_model(
                origin,
                None if file else pretrained,
                weights_only=True,
                require_pretrained=bool(tag or rest),
                pretrained_text=file is None,
                force_quick_gelu=quick_gelu,
            )
            if file:
                _fill(module, file, state)
        # A tokenizer of transformers has a repository; in a folder, it would have to lie beside.
        named = "hf_tokenizer_name" in str(config)
        tokenizer = open_clip.get_tokenizer(architecture if named else origin)
    except Exception as error:  # open_clip, safetensors, pickle and hub errors have no common base
        raise (refusal(spec, error) if from_hub(error) else _refusal(spec, error)) from error
    preprocess = cast("dict[str, Any]", open_clip.get_model_preprocess_cfg(module))
    if config is None:
        model_config = {**(open_clip.get_model_config(architecture) or {})}
        _warn(spec, file, module, openai=openai, has_it=bool(model_config.get("quick_gelu")))
        if quick_gelu:
            model_config["quick_gelu"] = True
        config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    elif "openai" in rest.lower():
        warn_of_gelu(f"'{spec}'", module)
    return Clip(
        module,
        tokenizer,
        _preprocess(spec, preprocess),
        name=spec,
        source=spec,
        config=config,
    )


def _hub_folder(spec: str, repository: str) -> Path:
    """A folder of the cache with a hub repository's configuration and weights, of one commit."""
    commit = resolve_commit(spec, repository, "", kind="model")
    config = download(spec, repository, constants.HF_CONFIG_NAME, commit, kind="model")
    names = (constants.HF_SAFE_WEIGHTS_NAME, constants.HF_WEIGHTS_NAME)
    check_file(spec, first_file(spec, repository, names, commit))
    return config.parent


def tag_repository(tag: dict[str, Any]) -> str:
    """The hub repository with the weights of one of open_clip's tags; "" if there is none."""
    return "/".join(str(tag.get("hf_hub") or "").split("/")[:2])


def _fetch_tag(spec: str, tag: dict[str, Any]) -> None:
    """Have a tag's weights in the cache: open_clip checks no checksum of the hub's.

    It also says little of why a download failed.
    """
    fetch = partial(open_clip.download_pretrained, tag)
    check_file(spec, checked(spec, tag_repository(tag), fetch))


def _state_of(spec: str, architecture: str, file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file. Raises InputError for a file without one, or of a tower alone."""
    check_file(spec, file)
    if file.suffix in (".npz", ".npy"):  # of big_vision, which open_clip reads
        return {}
    raw = read_weights(spec, file)
    state = flat_state(spec, file, raw)
    if TECOA in raw or "conv1.weight" in state:
        raise InputError(
            f"'{spec}': {file} holds an image tower alone; name a model whose text tower goes with "
            f"it, and put the tower in, for example {architecture}:openai+visual:{file}."
        )
    return state


def _fill(module: torch.nn.Module, file: Path, state: dict[str, torch.Tensor]) -> None:
    weights = {key: value for key, value in state.items() if key not in OPENAI_KEYS}
    if misfits(module.state_dict(), weights):
        # Other people's layouts and sizes, some of which open_clip converts.
        open_clip.load_checkpoint(module, str(file), weights_only=True)
    else:
        module.load_state_dict(weights)


def _warn(
    spec: str, file: Path | None, module: torch.nn.Module, *, openai: bool, has_it: bool
) -> None:
    if openai and not has_it:
        warnings.warn(
            f"'{spec}': {file} is in OpenAI's own format, so the model was trained with QuickGELU, "
            "which is used, although this architecture has GELU.",
            stacklevel=3,
        )
    elif file and "openai" in str(file).lower():
        warn_of_gelu(f"'{spec}': {file}", module)


def _check_inputs(
    spec: str, architecture: str, pretrained: str | None, folder: Path | None
) -> dict[str, Any] | None:
    """Refuse early what open_clip would answer with a traceback, a warning or foreign code.

    Returns the configuration in a folder; None for a known architecture.
    """
    if folder is None:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"'{pretrained}' is neither a file nor weights that open_clip knows for "
                f"{architecture}. {registry.near_matches(pretrained, [*tags, 'random'])}"
            )
        return None
    config_file = folder / constants.HF_CONFIG_NAME
    if not config_file.is_file():
        raise InputError(
            f"'{spec}': there is no {config_file}; expected an open_clip directory with "
            "open_clip_config.json and weights beside it."
        )
    config = _read_json(spec, config_file)
    if "trust_remote_code" in str(config):
        raise InputError(
            f"'{spec}' asks for trust_remote_code; code that comes with weights is never run."
        )
    return config


def _read_json(spec: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{spec}': {path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"'{spec}': {path.name} holds no JSON object; expected a configuration.")
    return config


def _refusal(spec: str, error: Exception) -> InputError:
    text = str(error)
    misfit = ("size mismatch", "Missing key", "Unexpected key", "pos_embed width changed")
    if any(words in text for words in misfit):
        why = f"the weights do not fit the architecture ({first_line(error)})"
    else:
        why = f"its weights file {why_unreadable(error)}"
    return InputError(f"'{spec}' could not be loaded: {why}.")


def _preprocess(spec: str, config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    interpolation, mode = config["interpolation"], config["resize_mode"]
    if interpolation not in ("bicubic", "bilinear") or mode not in ("shortest", "squash"):
        raise InputError(
            f"'{spec}' wants interpolation '{interpolation}' and resize mode '{mode}'; expected "
            "bicubic or bilinear, and shortest or squash."
        )
    return Preprocess(
        size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        mean=_triple(config["mean"]),
        std=_triple(config["std"]),
        interpolation=cast("Literal['bicubic', 'bilinear']", interpolation),
        resize_mode=cast("Literal['shortest', 'squash']", mode),
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue
