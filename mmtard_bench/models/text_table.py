"""CLIPs whose text tower is locked, and known only for a fixed list of prompts.

LiT (Zhai et al., 2022) locks one pretrained tower and trains the other to meet it. There it is the
image tower; here it is the text tower ("uL" in that paper's terms), as in DeViSE (Frome et al.,
2013). A locked tower needs no weights where its embeddings are known: a table of them takes some
hundred kilobytes, a sentence encoder a hundred megabytes.
"""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from open_clip.model import _build_vision_tower
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip, Preprocess, PreprocessFacts, Side
from mmtard_bench.models.weights import bound_layers, misfits, read_config, read_weights
from mmtard_bench.schema import Strict, explained

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"

Positive = Annotated[int, Field(ge=1)]


class TextTable:
    """The prompts that a locked text tower knows, in the order of its rows: the tokenizer."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._rows = {text: row for row, text in enumerate(self.texts)}

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        """Row numbers (len(texts),), int64. Raises InputError for a text without a row."""
        for text in texts:
            if text not in self._rows:
                near = difflib.get_close_matches(text, self.texts, n=3, cutoff=0)
                raise InputError(
                    f"This model's text tower is locked and knows {len(self.texts)} prompts; "
                    f"{text!r} is not among them. The nearest are "
                    f"{', '.join(map(repr, near))}. Use the class names and templates that the "
                    "model was made for, or a model with a whole text tower."
                )
        return torch.tensor([self._rows[text] for text in texts], dtype=torch.long)


class TableClip(nn.Module):
    """An open_clip image tower and a table of text embeddings; implements ``ClipModel``.

    ``vision_cfg`` is open_clip's. The table (T, D), float32, is a buffer: it never learns. D is
    also the width of the image embeddings.
    """

    def __init__(self, vision_cfg: dict[str, Any], table: Tensor, scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.visual: nn.Module = _build_vision_tower(table.shape[1], vision_cfg)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.text_table: Tensor
        self.register_buffer("text_table", table)

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> embeddings (N, D)."""
        embeddings: Tensor = self.visual(images)
        return embeddings

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Row numbers (N,) of ``TextTable`` -> embeddings (N, D)."""
        return self.text_table[tokens]


class _ModelConfig(Strict):
    embed_dim: Positive
    vision_cfg: dict[str, Any]
    text_table: Annotated[list[str], Field(min_length=1)]

    @field_validator("vision_cfg")
    @classmethod
    def _own_towers(cls, value: dict[str, Any]) -> dict[str, Any]:
        # A timm name may stand for a folder or a repository of somebody else's choice.
        if any(key.startswith("timm") for key in value):
            raise ValueError("towers of timm are not supported here; use open_clip's own")
        return value

    @field_validator("text_table")
    @classmethod
    def _no_twins(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a prompt occurs more than once")
        return value


class _PreprocessConfig(PreprocessFacts):
    """As open_clip's, with its defaults."""

    size: Side | tuple[Side, Side]

    def preprocess(self) -> Preprocess:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Preprocess(size, self.mean, self.std, self.interpolation, self.resize_mode)


class _Config(Strict):
    model_cfg: _ModelConfig
    preprocess_cfg: _PreprocessConfig


def is_table_config(config: object) -> bool:
    """Whether the content of an ``open_clip_config.json`` describes a model of this kind."""
    model = config.get("model_cfg") if isinstance(config, dict) else None
    return isinstance(model, dict) and "text_table" in model


def load_table_clip(folder: Path, name: str, source: str) -> Clip:
    """Load a folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Weights become float32, whatever their precision on disk. Nothing in the folder is executed.
    Raises InputError for what is missing, damaged, or does not fit together.
    """
    config = _read_config(name, folder / CONFIG)
    weights = read_weights(name, folder / WEIGHTS)
    bound_layers(name, config.model_cfg.vision_cfg, len(weights))
    preprocess = config.preprocess_cfg.preprocess()
    module = _empty(name, config.model_cfg, preprocess.size)
    _fill(name, module, weights)
    return Clip(module, TextTable(config.model_cfg.text_table), preprocess, name, source)


def _read_config(name: str, path: Path) -> _Config:
    with explained(f"'{name}': {path} is no configuration of a model with a text table"):
        return _Config.model_validate_json(read_config(name, path))


def _empty(name: str, config: _ModelConfig, size: tuple[int, int]) -> TableClip:
    """The module without memory, tried on an image: what is wrong shows before weights count.

    On torch's device "meta" a configuration that asks for absurd sizes costs nothing, and the
    random initialisation, which the weights replace, draws no random numbers.
    """
    width = config.embed_dim
    try:
        with torch.device("meta"), torch.no_grad():
            module = TableClip(config.vision_cfg, torch.empty(len(config.text_table), width)).eval()
            shape = tuple(module.encode_image(torch.empty(1, 3, *size)).shape)
    except Exception as error:  # open_clip checks nothing: types, sizes and names fail as they do
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"'{name}': the vision_cfg makes no image tower for images of {size[0]} x {size[1]}: "
            f"{line}. Expected open_clip's keys, with image_size as in preprocess_cfg."
        ) from error
    if shape != (1, width):
        raise InputError(
            f"'{name}': the image tower gives embeddings of shape {shape}; expected (1, {width}), "
            "as embed_dim says. Correct vision_cfg."
        )
    return module


def _fill(name: str, module: TableClip, weights: dict[str, Tensor]) -> None:
    expected = module.state_dict()
    wrong = misfits(expected, weights)
    if wrong:
        raise InputError(
            f"'{name}': {WEIGHTS} does not fit {CONFIG}: {wrong}. Use the two files that were "
            "written together."
        )
    # Copied: tensors of a mapped file would change with the file.
    copies = {key: value.to(expected[key].dtype, copy=True) for key, value in weights.items()}
    module.load_state_dict(copies, assign=True)
