"""Small architectures of open_clip for tests of checkpoints, each with GELU and with QuickGELU."""

import json
from pathlib import Path

import open_clip

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
WIDE = {**TEXT, "width": VIT["width"], "layers": VIT["layers"]}
"""Of the image tower's sizes, so that only a class tells the layers of one from the other's."""
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}


def add_toys(folder: Path) -> None:
    """Register toy-vit, toy-vit-quickgelu, toy-rn, and two with the text tower WIDE."""
    for name, vision, text, quick in (
        ("toy-vit", VIT, TEXT, False),
        ("toy-vit-quickgelu", VIT, TEXT, True),
        ("toy-rn", RESNET, TEXT, False),
        ("toy-vit-wide", VIT, WIDE, False),
        ("toy-rn-wide", RESNET, WIDE, False),
    ):
        config = {"embed_dim": 12, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
