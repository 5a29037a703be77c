"""Folders in transformers' layout, from outside: what is checked before the library sees them.

Nothing in them may run code, name files elsewhere, or ask for a model without end.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmtard_bench.errors import InputError
from mmtard_bench.hub import folder as hub_folder
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.weights import pairs, read_json
from mmtard_bench.types import Tokenizer

TEXT_FILES = ("*.json", "*.txt", "*.model")
"""What of a repository configures a model or a tokenizer; never its code."""

LONGEST_TEXT = 8192
"""Tokens of a prompt: the longest text towers take a few hundred."""

_CODE = ("auto_map", "trust_remote_code", "use_kernels", "kernel_config", "custom_pipelines")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WORDS = ("cat", "dog", "one", "blue")
"""At least one of them is known to a model with a small vocabulary."""
_DIFFERENT = 1e-5
"""Unit embeddings of different texts differ by more; those of equal tokens by float noise."""


def checked_repository(spec: str, name: object, revision: str = "") -> Path:
    """A local copy of the configuration and tokenizer in a hub repository, without its code.

    ``name`` comes from a configuration; default revision: that of the default branch. Raises
    InputError if it is no name of a repository, cannot be had, or asks for code.
    """
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        raise InputError(
            f"'{spec}' names {name!r} for its text; expected ORG/NAME of the hub. A configuration "
            "may not name files of this machine."
        )
    folder = hub_folder(spec, name, revision, TEXT_FILES)
    refuse_code(spec, folder)
    return folder


def refuse_code(spec: str, folder: Path) -> None:
    """Raise InputError if a configuration in a folder asks for code, or for another model.

    transformers would ask a person whether to run the code, and take "y" from standard input.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"'{spec}': {folder} holds a peft adapter, and transformers would load the model that "
            "it names instead. Give the model, and then its adapter with +lora:DIR."
        )
    for file in sorted(folder.glob("*config*.json")):
        for key, value in pairs(read_json(spec, file)):
            kernel = key in _KERNELS and "/" in str(value)
            if (key in _CODE and value) or kernel:
                raise InputError(
                    f"'{spec}': {file.name} asks for code that comes with the model ({key}: "
                    f"{str(value)[:80]}); such code is never run. Use a model that transformers "
                    "knows, or wrap it in a function that you trust: package.module:factory."
                )


def lowered(
    spec: str, tokenizer: Callable[[Sequence[str]], Tensor], folder: Path
) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer, on lower-cased texts where its folder says so and it does not; and a note.

    SigLIP 2 was trained on lower-cased texts; the class that transformers makes of its files
    does not read ``do_lower_case``.
    """
    file = folder / "tokenizer_config.json"
    says = file.is_file() and read_json(spec, file).get("do_lower_case") is True
    if not says or torch.equal(*(tokenizer([text]) for text in ("A Photo", "a photo"))):
        return tokenizer, ()
    note = "Texts are lower-cased, as do_lower_case in tokenizer_config.json says."
    return lambda texts: tokenizer([text.lower() for text in texts]), (note,)


def require_text_counts(spec: str, clip: Clip, added: str = "") -> Clip:
    """The model, if its text embeddings change with the last word. Raises InputError if not.

    They do not where they are read before the end of the text: the end token is not the one that
    the text tower looks for. ``added`` is a token of the tokenizer that is tried too.
    """
    for start in ("a photo of a", *([f"a {added}"] if added else [])):
        texts = [f"{start} {word}" for word in _WORDS]
        features = clip.text_features(texts, torch.device("cpu"))
        if not (features - features[0]).abs().max() > _DIFFERENT:
            tokens = clip.tokenizer(texts)
            equal = bool((tokens == tokens[0]).all())
            why = "tokens" if equal else "embedding, which is read before the end of the text"
            raise InputError(
                f"'{spec}': the texts {texts[0]!r} and {texts[1]!r} have the same {why}. Use the "
                "tokenizer and the configuration that belong to the weights; for CLIP, "
                "text_config.eos_token_id in config.json must be the token that ends a text (an "
                "old 2 stands for the largest token, which an added token is)."
            )
    return clip
