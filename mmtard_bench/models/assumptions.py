"""What weights do not say of a model of open_clip, and is assumed: said, and kept in its notes."""

from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from mmtard_bench.models.clip import Preprocess
from mmtard_bench.models.towers import State
from mmtard_bench.models.weights import assume

_TWIN = "-quickgelu"
_RULES = ("mean", "std", "interpolation", "resize_mode")
_SAY_IT = (
    "If the weights were trained with another one, put it into the preprocess_cfg of an "
    "open_clip_config.json beside them, and write local-dir:PATH."
)


def activation_of_file(spec: str, architecture: str, state: State) -> tuple[str, ...]:
    """What is assumed of the activation of weights in a file, which leaves no trace in them.

    A warning is given, but for OpenAI's own format with an architecture that has QuickGELU.
    """
    config = open_clip.get_model_config(architecture) or {}
    quick = bool(config.get("quick_gelu"))
    if state.openai:
        if quick:
            return ()
        note = (
            f"{state.path.name} is in OpenAI's own format, so the model was trained with "
            "QuickGELU, which is used, although this architecture has GELU."
        )
        return (assume(spec, note),)
    other = architecture.removesuffix(_TWIN) if quick else architecture + _TWIN
    if other == architecture or other not in open_clip.list_models():
        return ()
    ours, theirs = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    hint = (
        "; it seems to come from OpenAI's models, which have QuickGELU"
        if (not quick and "openai" in str(state.path).lower())
        else ""
    )
    note = (
        f"The activation of {state.path.name} is assumed to be {ours}, that of {architecture}"
        f"{hint}. If it was trained with {theirs}, write {other}:FILE: the wrong one silently "
        "costs accuracy."
    )
    return (assume(spec, note),)


def preprocessing_without_tag(
    spec: str, architecture: str, *, file: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The preprocessing for weights without a tag, and a note of what is assumed.

    It is that of all pretrained tags of the architecture, where they agree. If not, or if there
    are none, it is open_clip's default, with a warning for the weights of a file.
    """
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        config = open_clip.get_pretrained_cfg(architecture, tag)
        rules = _rules(merge_preprocess_dict(PreprocessCfg(), config))
        found.setdefault(_words(rules), (rules, []))[1].append(tag)
    default = _rules(merge_preprocess_dict(PreprocessCfg(), {}))
    if len(found) == 1:
        ((words, (rules, _)),) = found.items()
        why = f"that of all pretrained tags of {architecture}"
        return rules, (f"The preprocessing is assumed to be {why}: {words}.",)
    why = (
        f"as the tags of {architecture} differ"
        if found
        else (f"as {architecture} has no pretrained tags")
    )
    note = f"The preprocessing is assumed to be open_clip's default, {_words(default)}, {why}."
    if file:
        others = [f"{', '.join(tags[:3])}: {words}" for words, (_, tags) in found.items()]
        assume(spec, " ".join([note, *(f"{other}." for other in others), _SAY_IT]))
    return default, (note,)


def preprocessing_of_folder(spec: str, given: dict[str, Any], used: Preprocess) -> tuple[str, ...]:
    """What is assumed where a ``preprocess_cfg`` is silent, or contradicts the image tower."""
    notes = []
    silent = [key for key in ("mean", "std") if given.get(key) is None]
    if silent:
        notes.append(
            f"The preprocess_cfg of open_clip_config.json has no {' and no '.join(silent)}; "
            f"open_clip's default is assumed: mean {used.mean}, deviation {used.std}."
        )
    size = given.get("size")
    if size is not None and (size if isinstance(size, list) else [size, size]) != [*used.size]:
        notes.append(
            f"The preprocess_cfg of open_clip_config.json has the size {size}, but the image tower "
            f"takes {used.size[0]} x {used.size[1]} pixels, which is used, as open_clip does."
        )
    return tuple(assume(spec, note) for note in notes)


def _rules(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _RULES}


def _words(rules: dict[str, Any]) -> str:
    mean, std = (tuple(float(v) for v in rules[key]) for key in ("mean", "std"))
    return f"mean {mean}, deviation {std}, {rules['interpolation']}, {rules['resize_mode']}"
