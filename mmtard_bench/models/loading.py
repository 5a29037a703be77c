"""Load a ``Clip`` by name: registered models, open_clip, transformers, factories, checkpoints."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
from torch import nn

from mmtard_bench import registry
from mmtard_bench.errors import InputError, reason
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.openclip import load_open_clip
from mmtard_bench.models.specs import FORMS, SCHEMES, parts_of, require_form
from mmtard_bench.models.towers import with_adapter, with_visual
from mmtard_bench.models.transformers_clip import load_transformers
from mmtard_bench.schema import Text, checked

_DEBUG = "mmtard-bench --debug COMMAND prints the traceback."


@checked
def load_model(spec: Text | Path) -> Clip:
    """Load a model by its registered name or from a file, a directory or a hub.

    A spec is BASE, BASE+visual:FILE, BASE+lora:DIR or BASE+visual:FILE+lora:DIR; a ``Path`` means
    ``local-dir:PATH``.

    - BASE is a registered name; ``ARCH:TAG`` or ``ARCH:FILE`` (open_clip's architectures;
      ``ARCH:random`` has untrained weights from seed 0); ``hf-hub:ORG/REPO[@REVISION]``
      or ``local-dir:PATH`` (open_clip's layout); ``transformers:ORG/REPO[@REVISION]`` or
      ``transformers:PATH`` (CLIP and SigLIP, see ``load_transformers``); or
      ``package.module:factory``.
    - ``+visual:FILE`` replaces the image tower (see ``with_visual``).
    - ``+lora:DIR`` merges a peft adapter into the model (see ``with_adapter``).

    Weights are read as safetensors or with ``weights_only=True``; only ``package.module:factory``
    runs code, the user's own. Files of weights do not state their activation and preprocessing:
    these are assumed, with a warning and an entry in ``Clip.notes`` (see ``load_open_clip``).
    Raises InputError for anything that cannot be loaded.
    """
    if isinstance(spec, Path):
        spec = f"local-dir:{spec}"
    base, *changes = parts_of(spec)
    clip = _load_base(base)
    for change in changes:
        kind, _, where = change.partition(":")
        clip = (with_visual if kind == "visual" else with_adapter)(clip, Path(where), spec)
    return clip


def _load_base(spec: str) -> Clip:
    if spec in registry.models:
        return _made_by(spec, partial(registry.made, registry.models, spec))
    require_form(spec)
    scheme, _, rest = spec.partition(":")
    if scheme == "transformers":
        return load_transformers(spec, rest)
    if scheme in SCHEMES:
        return load_open_clip(spec, spec, None)
    if scheme in open_clip.list_models():
        return load_open_clip(spec, scheme, None if rest == "random" else rest)
    with _working_directory():
        return _from_factory(spec, scheme, rest)


def require_clip(value: object, what: str) -> Clip:
    """Return the value if it is a ``Clip``. Raises InputError, which names ``what``, otherwise."""
    if not isinstance(value, Clip):
        raise InputError(
            f"Expected {what} to be a mmtard_bench.Clip, but it is {type(value).__name__}; wrap "
            "the model with its tokenizer and preprocessing: Clip(module, tokenizer, preprocess, "
            "name)."
        )
    return value


def load_known(spec: str, digest: str, whose: str) -> Clip:
    """Load a model and require a digest; ``whose`` names the owner of the digest in messages.

    Raises InputError if the model cannot be loaded or has another digest.
    """
    clip = load_model(spec)
    if clip.digest != digest:
        raise InputError(
            f"'{spec}' is not the model of {whose}: its digest is {clip.digest[:16]}, expected "
            f"{digest[:16]}. Its weights, configuration or code changed, or the records are of "
            "schema version 1, whose digests covered the weights alone. Name the right model, or "
            "run the suite again."
        )
    return clip


def load_local_dir(path: Path, name: str) -> Clip:
    """Load an open_clip directory (configuration and weights) under a name of its own.

    Raises InputError for anything that cannot be loaded or does not fit.
    """
    return load_open_clip(name, f"local-dir:{path}", None)


@contextmanager
def _working_directory() -> Iterator[None]:
    """Within this context, modules of the working directory can be imported, as with python -m."""
    here = str(Path.cwd())
    missing = not {"", here} & {*sys.path}
    if missing:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if missing and here in sys.path:
            sys.path.remove(here)


def _from_factory(spec: str, module_name: str, attribute: str) -> Clip:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code: whatever it raises, others get their turn
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not module_name.startswith(missing):
            raise InputError(
                f"'{spec}': importing {module_name} failed: {error!r}. {_DEBUG}"
            ) from error
        raise InputError(
            f"'{spec}': there is no architecture and no module '{module_name}'. "
            f"{registry.near_matches(module_name, open_clip.list_models())} A model is {FORMS}."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f"'{spec}': {module_name} has no function '{attribute}'.")
    return _made_by(spec, factory)


def _made_by(spec: str, factory: Callable[[], object]) -> Clip:
    """Call a factory and copy the module of its result.

    A factory may return the same object on every call. Changes of a loaded model (another tower,
    training) must not change that object.
    """
    try:
        made = factory()
    except InputError:
        raise
    except Exception as error:  # other people's code
        raise InputError(f"'{spec}' could not be loaded: it raised {error!r}. {_DEBUG}") from error
    clip = require_clip(made, f"what '{spec}' returned")
    if not isinstance(clip.module, nn.Module):
        return clip
    try:
        return replace(clip, module=deepcopy(clip.module))
    except Exception as error:  # modules may hold anything
        raise InputError(
            f"'{spec}' returned a module that copy.deepcopy cannot copy ({reason(error)}); each "
            "loaded model needs a module of its own. Remove what cannot be copied, such as a lock "
            "or a tensor that is the result of a computation."
        ) from error
