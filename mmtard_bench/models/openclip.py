"""Models of open_clip: tags, files, directories and hub repositories."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import open_clip
from open_clip import constants
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from mmtard_bench import registry
from mmtard_bench.errors import InputError
from mmtard_bench.hub import checked, download, first_file, resolve_commit
from mmtard_bench.models.assembly import assemble
from mmtard_bench.models.assumptions import (
    activation_of_file,
    preprocessing_of_folder,
    preprocessing_without_tag,
)
from mmtard_bench.models.clip import Clip, Preprocess
from mmtard_bench.models.foreign import (
    LONGEST_TEXT,
    checked_repository,
    refuse_code,
)
from mmtard_bench.models.text_table import is_table_config, load_table_clip
from mmtard_bench.models.towers import State, read_state, warn_of_gelu
from mmtard_bench.models.weights import bound_layers, check_file, read_json

_WEIGHTS = (
    constants.HF_SAFE_WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    constants.HF_WEIGHTS_NAME,
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""File names of weights in a directory; the first existing one is used, as in open_clip."""

_TOKENIZER_OPTIONS = {"clean", "strip_sep_token"}
"""What open_clip's own configurations ask of tokenizers; others may name files, or draw lots."""


def load_open_clip(spec: str, architecture: str, pretrained: str | None) -> Clip:
    """Load an architecture with a tag's or a file's weights, or untrained; a directory or the hub.

    ``architecture`` may be ``hf-hub:ORG/REPO[@REVISION]`` or ``local-dir:PATH``.

    Weights do not show whether they need GELU or QuickGELU. A tag states it. A file in OpenAI's own
    format gets QuickGELU, with a warning if the architecture has GELU. Any other file gets the
    activation of the architecture, with a warning if the same architecture exists with the other
    activation. The preprocessing of a file is assumed as well (see ``preprocessing_without_tag``).
    ``Clip.notes`` state both assumptions. Every tensor of a file must be used. Raises InputError
    for anything that cannot be loaded.
    """
    scheme, _, rest = architecture.partition(":")
    if scheme == "hf-hub":
        return _load_folder(spec, _hub_folder(spec, rest), rest.partition("@")[0])
    if scheme == "local-dir":
        return _load_folder(spec, Path(rest), "")
    return _load_known(spec, architecture, pretrained)


def _load_known(spec: str, architecture: str, pretrained: str | None) -> Clip:
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    if pretrained and not tag and not Path(pretrained).exists():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise InputError(
            f"'{pretrained}' is neither a file nor weights that open_clip knows for "
            f"{architecture}. {registry.near_matches(pretrained, [*tags, 'random'])}"
        )
    model = cast("dict[str, Any]", open_clip.get_model_config(architecture))
    file = _fetch_tag(spec, tag) if tag else Path(pretrained) if pretrained else None
    state = _read(spec, file) if file else None
    openai = bool(state and state.openai and not tag)
    if openai or tag.get("quick_gelu"):
        model["quick_gelu"] = True
    module, tokenizer, notes = assemble(spec, model, state, None)
    asked = merge_preprocess_dict(PreprocessCfg(), tag)
    if not tag and not openai:  # OpenAI's preprocessing is the default
        overlay, assumed = preprocessing_without_tag(spec, architecture, file=bool(file))
        asked, notes = merge_preprocess_dict(asked, overlay), notes + assumed
    if state and not tag:
        notes += activation_of_file(spec, architecture, state)
    preprocess = _preprocess(spec, asked, module)
    asked["size"] = getattr(module.visual, "image_size", asked["size"])
    config = {"model_cfg": model, "preprocess_cfg": asked}
    return Clip(module, tokenizer, preprocess, spec, spec, config=config, notes=notes)


def _load_folder(spec: str, folder: Path, repository: str) -> Clip:
    """Load a directory; if ``repository`` is not "", it is the snapshot of one of its commits."""
    config_file = folder / constants.HF_CONFIG_NAME
    if not config_file.is_file():
        raise InputError(
            f"'{spec}': there is no {config_file}; expected an open_clip directory with "
            "open_clip_config.json and weights beside it."
        )
    config = read_json(spec, config_file)
    if is_table_config(config):
        return replace(load_table_clip(folder, spec, spec), config=config)
    refuse_code(spec, folder)
    _check_config(spec, config)
    state = _read(spec, _weights_in(spec, folder))
    bound_layers(spec, config["model_cfg"], len(state.tensors))
    model = config["model_cfg"]
    beside = None if repository else folder
    if repository and model["text_cfg"].get("hf_tokenizer_name") == repository:
        beside = checked_repository(spec, repository, folder.name)  # of the same commit
    module, tokenizer, said = assemble(spec, model, state, beside)
    given = config.get("preprocess_cfg") or {}
    preprocess = _preprocess(spec, merge_preprocess_dict(PreprocessCfg(), given), module)
    notes = said + preprocessing_of_folder(spec, given, preprocess)
    if "openai" in (repository or str(folder)).lower():
        warn_of_gelu(f"'{spec}'", module)
    return Clip(module, tokenizer, preprocess, spec, spec, config=config, notes=notes)


def _hub_folder(spec: str, where: str) -> Path:
    """A folder of the cache with a hub repository's configuration and weights, of one commit."""
    repository, _, revision = where.partition("@")
    commit = resolve_commit(spec, repository, revision, kind="model")
    config = download(spec, repository, constants.HF_CONFIG_NAME, commit, kind="model")
    first_file(spec, repository, (_WEIGHTS[0], _WEIGHTS[2]), commit)
    return config.parent


def tag_repository(tag: dict[str, Any]) -> str:
    """The hub repository with the weights of one of open_clip's tags; "" if there is none."""
    return "/".join(str(tag.get("hf_hub") or "").split("/")[:2])


def _fetch_tag(spec: str, tag: dict[str, Any]) -> Path:
    """Download a tag's weights into the cache and check their checksum, which open_clip does not.

    Its messages about failed downloads also say little.
    """
    return checked(spec, tag_repository(tag), partial(open_clip.download_pretrained, tag))


def _weights_in(spec: str, folder: Path) -> Path:
    found = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    endings = ("safetensors", "bin", "pth", "pt")
    others = [path for ending in endings for path in folder.glob(f"*.{ending}")]
    if found or len(others) == 1:
        return [*found, *others][0]
    raise InputError(
        f"'{spec}' could not be loaded: {folder} holds {len(others)} weights files"
        f"{''.join(f', {path.name}' for path in sorted(others)[:3])}; expected one, or "
        f"{_WEIGHTS[0]}. Name the one that is meant so."
    )


def _check_config(spec: str, config: dict[str, Any]) -> None:
    """Refuse configurations with which open_clip fails or loads other files."""
    model = config.get("model_cfg")
    given = model if isinstance(model, dict) else {}
    vision, text = given.get("vision_cfg"), given.get("text_cfg")
    preprocess = config.get("preprocess_cfg") or {}
    if not (isinstance(vision, dict) and isinstance(text, dict) and isinstance(preprocess, dict)):
        raise InputError(
            f"'{spec}': {constants.HF_CONFIG_NAME} describes no model; expected model_cfg with "
            "embed_dim, vision_cfg and text_cfg, and preprocess_cfg beside it."
        )
    if not re.fullmatch(r"[\w.-]*", str(vision.get("timm_model_name") or "")):
        raise InputError(
            f"'{spec}' has the tower {vision['timm_model_name']!r}; expected one of timm's own "
            "names. A configuration may not name files or repositories of other people."
        )
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    if not isinstance(length, int) or not 1 <= length <= LONGEST_TEXT:
        raise InputError(
            f"'{spec}' has texts of context_length {length}; expected 1 to {LONGEST_TEXT} tokens."
        )
    if not isinstance(options, dict) or not options.keys() <= _TOKENIZER_OPTIONS:
        raise InputError(
            f"'{spec}' has tokenizer_kwargs {options}; expected "
            f"{' and '.join(sorted(_TOKENIZER_OPTIONS))} at most. Others are not supported."
        )


def _read(spec: str, file: Path) -> State:
    check_file(spec, file)
    if file.suffix in (".npz", ".npy"):  # of big_vision, which open_clip converts
        return State(file, {})
    return read_state(spec, file)


def _preprocess(spec: str, asked: dict[str, Any], module: nn.Module) -> Preprocess:
    """The evaluation transform of open_clip, at the size that the image tower has."""
    size = getattr(module.visual, "image_size", asked["size"])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    # open_clip resizes to sides that differ with its default filter, whatever is asked for.
    own_filter = asked["resize_mode"] == "shortest" and len(set(sides)) > 1
    try:
        return Preprocess(
            size=cast("tuple[int, int]", sides),
            mean=_triple(asked["mean"]),
            std=_triple(asked["std"]),
            interpolation="bicubic" if own_filter else asked["interpolation"],
            resize_mode=asked["resize_mode"],
        )
    except InputError as error:
        raise InputError(f"'{spec}': {error}") from error


def _triple(values: Any) -> Any:
    """One value for all channels, as open_clip takes it, or a list; checked by ``Preprocess``."""
    if isinstance(values, list | tuple):
        return tuple(float(v) if type(v) is int else v for v in values)
    return (values,) * 3
