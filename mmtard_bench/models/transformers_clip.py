"""CLIP and SigLIP models of the ``transformers`` package, an optional dependency."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmtard_bench.errors import InputError, first_line
from mmtard_bench.hub import folder as hub_folder, quiet
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.foreign import (
    TEXT_FILES,
    VOCABULARIES,
    checked_tokenizer,
    last_added,
    refuse_code,
    require_end,
    require_text_counts,
)
from mmtard_bench.models.image_processor import preprocess_of as _preprocess
from mmtard_bench.models.weights import bound_layers, check_file, count_tensors, read_json

if TYPE_CHECKING:
    from types import ModuleType

_SAFE, _PICKLED = "model*.safetensors", "pytorch_model*.bin"


class _Vision(nn.Module):
    """Normalised images (N, 3, H, W) -> embeddings (N, D): CLIP projects them, SigLIP does not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.vision_model(pixel_values=images).pooler_output
        return cast("Tensor", self.visual_projection(pooled))


class _Text(nn.Module):
    """Tokens (N, L) -> embeddings (N, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model = model.text_model
        self.text_projection = getattr(model, "text_projection", nn.Identity())

    def forward(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.text_projection(self.text_model(input_ids=tokens).pooler_output))


class TransformersClip(nn.Module):
    """A ``CLIPModel`` or ``SiglipModel`` as a ``ClipModel``.

    There is no attention mask. CLIP's text tower is causal and its answer is read at the first end
    of text, which padding on the right never reaches; SigLIP was trained to attend to its padding.
    SigLIP's ``logit_bias`` is left out: a constant added to all logits changes neither their order
    nor their softmax, which is all that is scored or attacked here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = _Vision(model)
        self.text = _Text(model)
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))

    def encode_image(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.visual(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", self.text(tokens))


class TransformersTokenizer:
    """Texts -> (N, L), int64, cut or padded on the right to the length that the tower knows."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.length = length

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return cast("Tensor", tokens["input_ids"])


def load_transformers(spec: str, where: str) -> Clip:
    """Load a folder, or ORG/REPO[@REVISION] from the hub, that ``transformers`` wrote.

    A folder two names deep must be written as a path, ``./a/b``. SigLIP 2 at fixed resolution is
    of the kind ``siglip`` there, and loads. Safetensors are preferred; .bin is read with
    ``weights_only=True``; code of a repository is never run. Raises InputError for whatever cannot
    be loaded, and if transformers is not installed.
    """
    library = _library(spec)
    folder = _folder(spec, where)
    refuse_code(spec, folder)
    files = _files(spec, folder)
    bound_layers(spec, read_json(spec, folder / "config.json"), sum(map(count_tensors, files)))
    try:
        with _quiet(library):
            config = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = _model(spec, library, folder, config, files)
            own = _tokenizer(spec, library, folder, config)
            processor = library.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            preprocess = _preprocess(spec, processor)
            sides = {*preprocess.size, int(config.vision_config.image_size)}
    except InputError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch: no common base
        raise InputError(
            f"'{spec}' could not be loaded: {first_line(error)} Expected what save_pretrained of a "
            "CLIP or SigLIP model, its tokenizer and its image processor wrote."
        ) from error
    if len(sides) > 1:
        raise InputError(
            f"'{spec}': the image processor makes images of {preprocess.size}, but the image tower "
            f"takes a side of {config.vision_config.image_size} pixels. Use the files that were "
            "written together."
        )
    _warn_of_gelu(spec, where, config)
    module = TransformersClip(model).eval()
    vocabulary = int(config.text_config.vocab_size)
    tokenizer, notes = checked_tokenizer(own, folder, vocabulary, spec)
    require_text_counts(spec, module, tokenizer, last_added(own.tokenizer))
    return Clip(
        module,
        tokenizer,
        preprocess,
        name=spec,
        source=spec,
        architecture=decides(config),
        notes=notes,
    )


def decides(config: Any) -> str:
    """The part of a configuration that decides the answers: that of the towers."""
    towers = [config.vision_config.to_dict(), config.text_config.to_dict()]
    ignored = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    kept = [{k: v for k, v in tower.items() if k not in ignored} for tower in towers]
    return json.dumps(kept, sort_keys=True, default=str)


def _library(spec: str) -> "ModuleType":
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"'{spec}' needs the package transformers, which cannot be imported ({error}); "
            "pip install 'mmtard-bench[transformers]'."
        ) from error
    return cast("ModuleType", transformers)


@contextmanager
def _quiet(library: "ModuleType") -> Iterator[None]:
    """Silence the library's progress bars and warnings; their causes raise errors here."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _folder(spec: str, where: str) -> Path:
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        folder = Path(where).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(
                f"'{spec}': there is no {folder / 'config.json'}; expected a folder that "
                "save_pretrained wrote, or ORG/REPO of the hub."
            )
        return folder
    if Path(where).is_dir():
        raise InputError(
            f"'{spec}' may be the folder {where} or a repository of the hub; write "
            f"transformers:./{where} for the folder, or go to another directory."
        )
    repository, _, revision = where.partition("@")
    folder = hub_folder(spec, repository, revision, (*TEXT_FILES, _SAFE))
    if not any(folder.glob(_SAFE)):
        folder = hub_folder(spec, repository, revision, (*TEXT_FILES, _PICKLED))
    return folder


def _files(spec: str, folder: Path) -> list[Path]:
    """The files of weights that the library would pick in a folder."""
    files = [*folder.glob(_SAFE)] or [*folder.glob(_PICKLED)]
    if not files:
        raise InputError(
            f"'{spec}' could not be loaded: {folder} holds no {_SAFE} or {_PICKLED}; expected the "
            "weights that save_pretrained wrote."
        )
    for file in files:
        check_file(spec, file)
    named = read_json(spec, folder / "config.json").get("transformers_weights")
    wanted = {named} if named else set()
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        wanted |= set(read_json(spec, index).get("weight_map", {}).values())
    if not wanted <= {file.name for file in files}:
        raise InputError(
            f"'{spec}' could not be loaded: its files name other weights, "
            f"{sorted(map(str, wanted))[:3]}; expected {_SAFE} or {_PICKLED} beside config.json."
        )
    return files


def _model(
    spec: str, library: "ModuleType", folder: Path, config: Any, files: Sequence[Path]
) -> Any:
    """Load the model. Every weight must be in the files; the library would invent missing ones."""
    kinds = {"clip": library.CLIPModel, "siglip": library.SiglipModel}
    if config.model_type not in kinds:
        raise InputError(
            f"'{spec}' is a model of the kind '{config.model_type}'; expected "
            f"{' or '.join(kinds)}, with both towers."
        )
    kind = kinds[config.model_type]
    with torch.device("meta"):  # without memory, which absurd sizes would take
        needed = sum(weight.numel() for weight in kind(config).parameters())
    held = sum(file.stat().st_size for file in files)
    if needed > held:
        raise InputError(
            f"'{spec}' could not be loaded: config.json asks for a model of {needed} weights, but "
            f"the files have {held} bytes. Use the files that were written together."
        )
    model, found = kind.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused below
    )
    wrong = [
        f"{len(keys)} {what} ({', '.join(map(str, sorted(keys)[:2]))})"
        for what in ("missing", "unexpected", "mismatched")
        if (keys := found[f"{what}_keys"])
    ]
    if wrong:
        raise InputError(
            f"'{spec}': the weights do not fit config.json: {'; '.join(wrong)}. Use the files that "
            "were written together."
        )
    return model


def _tokenizer(
    spec: str, library: "ModuleType", folder: Path, config: Any
) -> TransformersTokenizer:
    """Load the tokenizer and test it: without its files the library would make an empty one."""
    text = config.text_config
    own = library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer = TransformersTokenizer(own, int(text.max_position_embeddings))
    tokens = tokenizer(["a photo"])
    known = any((folder / name).is_file() for name in VOCABULARIES)
    if not known or tokens.max() >= text.vocab_size:
        raise InputError(
            f"'{spec}': the tokenizer gives {sorted(set(tokens.flatten().tolist()))} for 'a "
            f"photo'; expected one of {', '.join(VOCABULARIES)} in the folder, and tokens below "
            f"{text.vocab_size}. Put the model's own tokenizer there."
        )
    if config.model_type == "clip":  # SigLIP is read at the last token, whatever it is
        end = text.eos_token_id
        # Old configurations say 2; then transformers reads CLIP's embedding at the largest token.
        require_end(spec, tokenizer, own, None if end == 2 else end)
    return tokenizer


def _warn_of_gelu(spec: str, where: str, config: Any) -> None:
    activations = {config.vision_config.hidden_act, config.text_config.hidden_act}
    if "openai" in where.lower() and activations != {"quick_gelu"}:
        warnings.warn(
            f"'{spec}' seems to come from OpenAI's models, which were trained with QuickGELU, but "
            f"its config.json says hidden_act {' and '.join(sorted(activations))}, which silently "
            "costs accuracy. If it does, set it to quick_gelu.",
            stacklevel=3,
        )
