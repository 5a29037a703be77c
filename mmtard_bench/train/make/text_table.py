"""Make the start of a CLIP with a text table: ``python -m mmtard_bench.train.make.text_table``.

What the recipes of ``cifar/`` start from: an image tower of random weights, and for every class
name of the given data sets the embedding of "a photo of a NAME." by a pretrained sentence encoder
(all-MiniLM-L6-v2; Reimers and Gurevych, 2019), which is not needed afterwards. The embeddings are
centred: the mean over the prompts of the first data set is subtracted before they are normalised.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.data.files import open_outside
from mmtard_bench.errors import InputError
from mmtard_bench.models.foreign import refuse_code
from mmtard_bench.models.text_table import CONFIG, TableClip
from mmtard_bench.train.checkpoint import write_model
from mmtard_bench.types import Task

TEMPLATE = "a photo of a {}."
SCALE = 20.0
PREPROCESS_CONFIG = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    # The stem halves images twice and the layers three times more: of 32 pixels one would be left.
    "size": 64,
    "interpolation": "bilinear",
    "resize_mode": "shortest",
}


def class_names(file: Path) -> tuple[str, ...]:
    """The class names in a parquet file's schema, as an evaluation sees them.

    Raises InputError if it has fewer than two.
    """
    task = Task(name=file.name, data=f"parquet:{file}", templates=(TEMPLATE,))
    names = open_outside(task).class_names
    if len(names) < 2:
        raise InputError(
            f"{file} has {len(names)} class names in its schema; expected two or more, in a label "
            "column of the kind ClassLabel."
        )
    return names


def text_table(
    names: Sequence[Sequence[str]], encode: Callable[[list[str]], Tensor]
) -> tuple[list[str], Tensor]:
    """The prompts of all data sets' class names, each once, and their unit embeddings (T, D).

    ``encode`` turns texts into unit rows. A prompt holds the name as the data set spells it;
    the text that is encoded has spaces for underscores.
    """
    # A name that two data sets share has one row, at its first place.
    every = dict.fromkeys(name for group in names for name in group)
    prompts = [TEMPLATE.replace("{}", name) for name in every]
    rows = encode([TEMPLATE.replace("{}", name.replace("_", " ")) for name in every])
    # Sentences of one template have much in common, so all cosines are high and near each other:
    # at any scale an image tower would first have to find that common direction, which tells no
    # classes apart. One mean for all, so that what is learned on the first data set means the
    # same on the others, whose names must not shift it.
    centre = rows[: len(set(names[0]))].mean(0)
    return prompts, F.normalize(rows - centre, dim=-1)


def sentence_encoder(folder: Path) -> Callable[[list[str]], Tensor]:
    """A sentence encoder in a local folder in transformers' layout: texts -> unit rows (N, D).

    The mean of the last layer's tokens, padding left out, then L2 normalisation. Raises
    InputError if transformers or the folder cannot be used, or if the folder asks for code.
    """
    try:
        # By name: transformers is needed here alone, and type checkers must not ask for it.
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"Encoding prompts needs the package transformers, which cannot be imported ({error}); "
            "install it with: pip install transformers"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--encoder {folder}: there is no config.json; expected a folder with a sentence "
            "encoder in transformers' layout, such as the one of all-MiniLM-L6-v2."
        )
    refuse_code(f"--encoder {folder}", folder)
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **own)
        model = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **own
        ).eval()
    except Exception as error:  # transformers, tokenizers and safetensors have no common base
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--encoder {folder} could not be loaded: {line}") from error

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states: Tensor = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    return encode


def write_start(folder: Path, prompts: list[str], table: Tensor, *, width: int, seed: int) -> None:
    """Write a model with an untrained image tower of a width, and the table.

    Raises InputError if there is a model already, StorageError if it cannot be written.
    """
    if (folder / CONFIG).exists():
        raise InputError(f"{folder} holds a model already; choose another --out, or remove it.")
    if width < 2 or width % 2:
        raise InputError(f"--vision {width} is no even number from 2; 16 and 24 are usual here.")
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": width, "patch_size": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TableClip(vision, table, SCALE)
    model = {"embed_dim": table.shape[1], "vision_cfg": vision, "text_table": prompts}
    config = {"model_cfg": model, "preprocess_cfg": PREPROCESS_CONFIG}
    write_model(folder, module.state_dict(), config)


def main() -> None:
    """Encode the prompts and write the starting point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", type=Path, required=True, help="the sentence encoder's folder")
    parser.add_argument(
        "--names",
        type=Path,
        action="append",
        required=True,
        metavar="FILE.parquet",
        help="a data set with class names in its schema; the first is the one to train on",
    )
    parser.add_argument("--vision", type=int, required=True, help="width of the image tower")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        names = [class_names(file) for file in arguments.names]
        prompts, table = text_table(names, sentence_encoder(arguments.encoder))
        write_start(arguments.out, prompts, table, width=arguments.vision, seed=arguments.seed)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(f"{arguments.out}: {len(prompts)} prompts, width {arguments.vision}")


if __name__ == "__main__":
    main()
