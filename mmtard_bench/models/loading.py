"""From a name to a ``Clip``: registered models, open_clip tags, files, folders, hub, factories."""

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from mmtard_bench import registry
from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.models.text_table import is_table_config, load_table_clip

_FORMS = (
    "a registered name (mmtard-bench list models), ARCH:PRETRAINED (an open_clip tag, a weights "
    "file, or 'random'), hf-hub:ORG/REPO, local-dir:PATH, or package.module:factory"
)


def load_model(spec: str) -> Clip:
    """Load a model by registered name or by where it is.

    ``ARCH:random`` gives an open_clip architecture with untrained weights from seed 0. Weights
    are read as safetensors or with ``weights_only=True``; only ``package.module:factory`` runs
    code, the user's own. Raises InputError for anything that cannot be loaded.
    """
    if spec in registry.models:
        return require_clip(registry.models.get(spec)(), f"what '{spec}' returned")
    scheme, _, rest = spec.partition(":")
    if not rest:
        spec = scheme
        if scheme in open_clip.list_models():
            tags = [*open_clip.list_pretrained_tags_by_model(spec), "weights.safetensors"]
            raise InputError(
                f"'{spec}' is an architecture without weights; write {spec}:PRETRAINED, for "
                f"example {spec}:{tags[0]}, or {spec}:random for untrained weights."
            )
        hint = registry.near_matches(spec, [*registry.models, *open_clip.list_models()])
        raise InputError(f"There is no model '{spec}'. {hint} A model is {_FORMS}.")
    if scheme in ("hf-hub", "local-dir"):
        return _open_clip(spec, spec, None)
    if scheme in open_clip.list_models():
        return _open_clip(spec, scheme, None if rest == "random" else rest)
    if not all(part.isidentifier() for part in [*scheme.split("."), rest]):
        hint = registry.near_matches(scheme, open_clip.list_models())
        raise InputError(f"There is no architecture '{scheme}'. {hint} A model is {_FORMS}.")
    return _from_factory(spec, scheme, rest)


def require_clip(value: object, what: str) -> Clip:
    """The value, if it is a ``Clip``. Raises InputError, with what it is called, if not."""
    if not isinstance(value, Clip):
        raise InputError(
            f"Expected {what} to be a mmtard_bench.Clip, but it is {type(value).__name__}; wrap "
            "the model with its tokenizer and preprocessing: Clip(module, tokenizer, preprocess, "
            "name)."
        )
    return value


def load_local_dir(path: Path, name: str, *, visual: Path | None = None) -> Clip:
    """Load an open_clip directory (configuration and weights) under a name of its own.

    ``visual`` is a safetensors file whose image tower takes the place of the directory's. Raises
    InputError for anything that cannot be loaded or does not fit.
    """
    clip = _open_clip(name, f"local-dir:{path}", None)
    if visual is not None:
        try:
            tower = load_file(visual)
            stays = {k: v for k, v in _state(clip).items() if not k.startswith("visual.")}
            cast("torch.nn.Module", clip.module).load_state_dict(stays | tower)
        except Exception as error:  # safetensors, torch and system errors have no common base
            raise InputError(_explain(name, error)) from error
    return clip


def _state(clip: Clip) -> dict[str, Any]:
    return dict(cast("torch.nn.Module", clip.module).state_dict())


def _open_clip(spec: str, architecture: str, pretrained: str | None) -> Clip:
    untrained = pretrained is None and not architecture.startswith(("hf-hub:", "local-dir:"))
    config = _check_inputs(spec, architecture, pretrained)
    scheme, _, rest = architecture.partition(":")
    if scheme == "local-dir" and is_table_config(config):
        return replace(load_table_clip(Path(rest), spec, spec), config=config)
    quick_gelu = _needs_quick_gelu(architecture, pretrained)
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            module = open_clip.create_model(
                architecture,
                pretrained,
                weights_only=True,
                require_pretrained=not untrained,
                force_quick_gelu=quick_gelu,
            )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip, safetensors, pickle and hub errors have no common base
        raise InputError(_explain(spec, error)) from error
    preprocess = cast("dict[str, Any]", open_clip.get_model_preprocess_cfg(module))
    if config is None:
        model_config = {**(open_clip.get_model_config(architecture) or {})}
        if quick_gelu:
            model_config["quick_gelu"] = True
        config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    return Clip(
        module,
        tokenizer,
        _preprocess(spec, preprocess),
        name=spec,
        source=spec,
        config=config,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's remarks on the root logger; what matters in them raises here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _needs_quick_gelu(architecture: str, pretrained: str | None) -> bool:
    """Whether weights known by a tag were trained with QuickGELU: open_clip would only warn."""
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else None
    return bool(tag and tag.get("quick_gelu"))


def _check_inputs(spec: str, architecture: str, pretrained: str | None) -> dict[str, Any] | None:
    """Refuse early what open_clip would answer with a traceback, a warning or foreign code.

    Returns the configuration of a folder or hub repository; None for a known architecture.
    """
    scheme, _, rest = architecture.partition(":")
    config_file: Path | None = None
    if scheme == "local-dir":
        config_file = Path(rest) / "open_clip_config.json"
        if not config_file.is_file():
            raise InputError(
                f"'{spec}': there is no {config_file}; expected an open_clip directory with "
                "open_clip_config.json and weights beside it."
            )
    elif scheme == "hf-hub":
        config_file = _hub_config(spec, rest)
    elif pretrained is not None:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"'{pretrained}' is neither a file nor weights that open_clip knows for "
                f"{architecture}. {registry.near_matches(pretrained, [*tags, 'random'])}"
            )
    if config_file is None:
        return None
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


def _hub_config(spec: str, repository: str) -> Path:
    try:
        return Path(hf_hub_download(repository, "open_clip_config.json"))
    except Exception as error:  # network, offline, missing and gated repositories, bad names
        raise InputError(
            f"'{spec}' could not be read from the hub: {_first_line(error)} Check the name and the "
            "network; with HF_HUB_OFFLINE=1 only what is in the cache can be used."
        ) from error


def _explain(spec: str, error: Exception) -> str:
    text = str(error)
    if "size mismatch" in text or "Missing key" in text or "Unexpected key" in text:
        why = "the weights do not fit the architecture"
    elif "Weights only load failed" in text or "Unsupported operand" in text:
        why = "the file is no plain weights file (a pickle that holds code, or no checkpoint)"
    elif any(word in text for word in ("deserializ", "zip archive", "EOF", "Ran out of input")):
        why = "the weights file is truncated or damaged"
    else:
        why = "open_clip could not load it"
    return (
        f"'{spec}' could not be loaded: {why}. ({_first_line(error)}) "
        "Expected safetensors, or a checkpoint of tensors alone."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


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


def _from_factory(spec: str, module_name: str, attribute: str) -> Clip:
    # As for python -m: the user's own module may lie in the directory that they work in.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code: whatever it raises, others get their turn
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not module_name.startswith(missing):
            raise InputError(f"'{spec}': importing {module_name} failed: {error!r}") from error
        raise InputError(
            f"'{spec}': there is no architecture and no module '{module_name}'. "
            f"{registry.near_matches(module_name, open_clip.list_models())} A model is {_FORMS}."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f"'{spec}': {module_name} has no function '{attribute}'.")
    try:
        made = factory()
    except InputError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"'{spec}': {attribute}() failed: {error!r}") from error
    return require_clip(made, f"what '{spec}' returned")
