"""The tiny models that ship with the package, made by ``mmtard_bench.train.tiny``."""

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


@register_model("tiny-tecoa")
def tiny_tecoa() -> "Clip":
    """Fine-tuned from tiny-clip as in TeCoA, linf 8/255, image tower only."""
    return _load("tiny-tecoa")
