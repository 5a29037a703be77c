"""The tiny models that ship with the package."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.registry import register_model

if TYPE_CHECKING:
    from mmtard_bench.models.clip import Clip


def _load(name: str) -> "Clip":
    from mmtard_bench.models.loading import load_local_dir

    return load_local_dir(Path(str(files("mmtard_bench.models"))) / "weights" / name, name)


@register_model("tiny-clip")
def tiny_clip() -> "Clip":
    """Contrastively pre-trained on the digits world; undefended."""
    return _load("tiny-clip")


@register_model("tiny-clip-small")
def tiny_clip_small() -> "Clip":
    """As tiny-clip, a quarter of the image tower: what the students of digits/* start from."""
    return _load("tiny-clip-small")


@register_model("tiny-tecoa")
def tiny_tecoa() -> "Clip":
    """Fine-tuned from tiny-clip as in TeCoA, linf 8/255, image tower only."""
    return _load("tiny-tecoa")
