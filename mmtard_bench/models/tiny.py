"""The tiny models that ship with the package.

Two are whole; the others were trained from one of these, text tower frozen, so that only their
image towers are kept (``mmtard_bench.train.ship``), with the card of the recipe beside them.
"""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mmtard_bench.registry import register_model

if TYPE_CHECKING:
    from mmtard_bench.models.clip import Clip

WEIGHTS = Path(str(files("mmtard_bench.models"))) / "weights"


def _load(name: str) -> "Clip":
    from mmtard_bench.models.loading import load_local_dir

    return load_local_dir(WEIGHTS / name, name)


def _trained_from(base: str, name: str) -> "Clip":
    from mmtard_bench.models.towers import with_visual

    return with_visual(_load(base), WEIGHTS / f"{name}.safetensors", name)


@register_model("tiny-clip")
def tiny_clip() -> "Clip":
    """Contrastively pre-trained on the digits world; undefended."""
    return _load("tiny-clip")


@register_model("tiny-clip-small")
def tiny_clip_small() -> "Clip":
    """As tiny-clip, a quarter of the image tower: what the students of digits/* start from."""
    return _load("tiny-clip-small")


@register_model("tiny-clip-deep")
def tiny_clip_deep() -> "Clip":
    """As tiny-clip-small, with twice the residual blocks; a student of the study backbones."""
    return _load("tiny-clip-deep")


@register_model("tiny-vit")
def tiny_vit() -> "Clip":
    """A vision transformer of the size of tiny-clip-small; a student of the study backbones."""
    return _load("tiny-vit")


@register_model("teacher-clean")
def teacher_clean() -> "Clip":
    """tiny-clip after digits/teacher-clean: the clean teacher of digits/*."""
    return _trained_from("tiny-clip", "teacher-clean")


@register_model("teacher-robust")
def teacher_robust() -> "Clip":
    """tiny-clip after digits/teacher-robust (TeCoA): the robust teacher of digits/*."""
    return _trained_from("tiny-clip", "teacher-robust")


@register_model("tiny-tecoa")
def tiny_tecoa() -> "Clip":
    """teacher-robust, under the name of its method."""
    return teacher_robust()


def _register_student(method: str) -> None:
    def student() -> "Clip":
        return _trained_from("tiny-clip-small", f"student-{method}")

    student.__doc__ = f"tiny-clip-small after digits/{method}, seed 0: a student of digits/*."
    register_model(f"student-{method}")(student)


for _method in ("clean-ft", "tecoa", "fare", "pmg-aft", "ard", "mmt-ard-shipped", "mmt-ard"):
    _register_student(_method)
