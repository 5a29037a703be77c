"""Folders in transformers' layout, from outside: what is checked before the library sees them.

Nothing in them may run code, name files elsewhere, or ask for a model without end.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.errors import InputError
from mmtard_bench.hub import folder as hub_folder
from mmtard_bench.models.weights import pairs, read_json
from mmtard_bench.types import ClipModel, Tokenizer

TEXT_FILES = ("*.json", "*.txt", "*.model")
"""What of a repository configures a model or a tokenizer; never its code."""

VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""What the file of a tokenizer that holds its tokens may be called."""

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


class CheckedTokenizer:
    """A tokenizer from outside: texts -> tokens (N, L), int64, on lower-cased texts if ``lower``.

    Raises InputError for a text with a token that the text tower, of ``vocabulary``, does not
    know.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, *, lower: bool = False) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.lower = lower

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        tokens = self._tokenizer([text.lower() for text in texts] if self.lower else list(texts))
        unknown = (tokens >= self.vocabulary).any(dim=1)
        if unknown.any():
            index = int(unknown.int().argmax())
            raise InputError(
                f"The tokenizer gives {sorted(set(tokens[index].tolist()))} for {texts[index]!r}; "
                f"the text tower knows tokens below {self.vocabulary}. Use the model's own "
                "tokenizer."
            )
        return tokens


def checked_tokenizer(
    tokenizer: Tokenizer, folder: Path, vocabulary: int, spec: str
) -> tuple[CheckedTokenizer, tuple[str, ...]]:
    """The tokenizer of a folder, lower-casing where the folder says so and it does not; and a note.

    SigLIP 2 was trained on lower-cased texts; the class that transformers makes of its files
    does not read ``do_lower_case``.
    """
    plain = CheckedTokenizer(tokenizer, vocabulary)
    file = folder / "tokenizer_config.json"
    says = file.is_file() and read_json(spec, file).get("do_lower_case") is True
    if not says or torch.equal(*(tokenizer([text]) for text in ("A Photo", "a photo"))):
        return plain, ()
    note = "Texts are lower-cased, as do_lower_case in tokenizer_config.json says."
    return CheckedTokenizer(tokenizer, vocabulary, lower=True), (note,)


def last_added(tokenizer: Any) -> str:
    """The last plain token that was added to a tokenizer of transformers; "" if none was."""
    special = set(tokenizer.all_special_tokens)
    added = {text: i for text, i in tokenizer.get_added_vocab().items() if text not in special}
    return max(added, key=added.__getitem__, default="")


def require_end(spec: str, tokenizer: Tokenizer, own: Any, sought: int | None) -> None:
    """Refuse a text tower that is read at another token than the one that ends a text.

    ``own`` is the tokenizer of transformers, ``sought`` the token that the tower looks for; None
    if it takes the largest, which a token for padding or an added word may be.
    """
    ends = {own.eos_token_id, own.sep_token_id}
    read = {sought} if sought is not None else {*tokenizer(_WORDS).amax(1).tolist()}
    if not read <= ends:
        raise InputError(
            f"'{spec}': the text tower is read at {'the largest ' if sought is None else ''}"
            f"token, {', '.join(map(str, sorted(read)))}, but the tokenizer ends texts with "
            f"{own.eos_token_id}. Use the tokenizer and the configuration that belong to the "
            "weights; for CLIP, eos_token_id under text_config in config.json must be that end (an "
            "old 2 is the largest token)."
        )


@torch.no_grad()
def require_text_counts(
    spec: str, module: ClipModel, tokenizer: Tokenizer, added: str = ""
) -> None:
    """Raise InputError unless text embeddings change with the last word.

    They do not where they are read before the end of the text: the end token is not the one that
    the text tower looks for. ``added`` is a token of the tokenizer that is tried too.
    """
    for start in ("a photo of a", *([f"a {added}"] if added else [])):
        texts = [f"{start} {word}" for word in _WORDS]
        tokens = tokenizer(texts)
        features = F.normalize(module.encode_text(tokens).float(), dim=-1)
        if not (features - features[0]).abs().max() > _DIFFERENT:
            equal = bool((tokens == tokens[0]).all())
            why = "tokens" if equal else "embedding, which is read before the end of the text"
            raise InputError(
                f"'{spec}': the texts {texts[0]!r} and {texts[1]!r} have the same {why}. Use the "
                "tokenizer and the configuration that belong to the weights; for CLIP, "
                "text_config.eos_token_id in config.json must be the token that ends a text (an "
                "old 2 stands for the largest token, which an added token is)."
            )
