"""What a model may be called. Imports without torch, so that a slip in a name is found at once."""

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mmtard_bench import registry
from mmtard_bench.errors import InputError

SCHEMES = ("hf-hub", "local-dir", "transformers")
FORMS = (
    "a registered name (mmtard-bench list models), ARCHITECTURE:PRETRAINED (an open_clip tag, a "
    "weights file, or 'random'), hf-hub:ORG/REPO[@REVISION], local-dir:PATH, "
    "transformers:ORG/REPO[@REVISION] or transformers:PATH, or package.module:factory; "
    "+visual:FILE (another image tower) and +lora:DIR (an adapter) may follow"
)
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def parts_of(spec: str) -> list[str]:
    """BASE, then each change of it without its plus: "visual:FILE", "lora:DIR".

    Raises InputError for changes other than one +visual:FILE and then one +lora:DIR.
    """
    base, *changes = re.split(r"\+(?=(?:visual|lora):)", spec)
    kinds = [change.partition(":")[0] for change in changes]
    if kinds not in ([], ["visual"], ["lora"], ["visual", "lora"]):
        raise InputError(
            f"'{spec}' changes the model by {', '.join(kinds)}; expected one +visual:FILE at most, "
            "then one +lora:DIR at most."
        )
    return [base, *changes]


def architectures() -> list[str]:
    """The architectures of open_clip: from its files, until it is imported."""
    imported = sys.modules.get("open_clip")
    if imported is not None:  # with those that the user added
        return list(imported.list_models())
    found = find_spec("open_clip")
    folders = found.submodule_search_locations if found else None
    return sorted(
        path.stem for folder in folders or () for path in Path(folder).glob("model_configs/*.json")
    )


def is_data(spec: str) -> bool:
    """Whether ``load_model`` reads a spec's weights as data; if not, it may run code to have them.

    A model that is registered runs the code of an installed package.
    """
    base = parts_of(spec)[0]
    scheme, colon, _ = base.partition(":")
    return base in registry.models or bool(colon and scheme in (*SCHEMES, *architectures()))


def require_form(spec: str) -> None:
    """Raise InputError for a spec that has none of the forms."""
    known = architectures()
    base = parts_of(spec)[0]
    scheme, _, rest = base.partition(":")
    if base in registry.models or (rest and scheme in (*SCHEMES, *known)):
        return
    if not rest:
        _refuse_name(scheme, known)
    if not all(part.isidentifier() for part in [*scheme.split("."), rest]):
        hint = registry.near_matches(scheme, known)
        raise InputError(f"There is no architecture '{scheme}'. {hint} A model is {FORMS}.")


def _refuse_name(name: str, known: Sequence[str]) -> None:
    if name in known:
        raise InputError(
            f"'{name}' is an architecture without weights; write {name}:PRETRAINED, where "
            f"PRETRAINED is a tag of open_clip (such as {name}:openai) or a file (such as "
            f"{name}:weights.safetensors), or {name}:random for untrained weights."
        )
    if Path(name).suffix in _WEIGHTS:
        raise InputError(
            f"'{name}' is a file of weights, which does not say of which architecture; write "
            f"ARCHITECTURE:{name}, such as ViT-B-32:{name}."
        )
    raise InputError(
        f"There is no model '{name}'. {registry.near_matches(name, [*registry.models, *known])} A "
        f"model is {FORMS}. A model that a script registers with @register_model exists inside "
        "that script only; give its function as module:function, or declare an entry point "
        "(CONTRIBUTING.md)."
    )
