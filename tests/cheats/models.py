"""Models that hide their gradients: each answers about as tiny-clip, which is 0% robust at 8/255.

The first group are weights alone in open_clip's layout, which a leaderboard entry may have. The
second group are Python modules, which it may not, but which people score.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmtard_bench as mb
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.tasks.samples import find_task, load_task

ABSORBED = 2.0**24
"""Float32 does not resolve changes below 1 beside this number."""
FACTOR = 2.0**20
WIDTH = 20
SPARE = 16
"""The first channel after the stem that tiny-clip does not use."""


def wider() -> tuple[dict[str, object], dict[str, Tensor], dict[str, Tensor]]:
    """tiny-clip with spare channels of zeros: configuration, weights, and the original weights."""
    config = json.loads((WEIGHTS / "tiny-clip" / "open_clip_config.json").read_text())
    old = load_file(WEIGHTS / "tiny-clip" / "open_clip_model.safetensors")
    config["model_cfg"]["vision_cfg"]["width"] = WIDTH
    new = {k: v.clone() for k, v in CLIP(**config["model_cfg"]).state_dict().items()}
    for key, value in new.items():
        if not key.startswith("visual."):
            value.copy_(old[key])
            continue
        if "running_var" in key:
            value.fill_(1 - 1e-5)
        elif value.is_floating_point():
            value.zero_()
        if value.ndim:
            value[tuple(slice(0, size) for size in old[key].shape)] = old[key].to(value.dtype)
    return config, new, old


def save(folder: Path, config: dict[str, object], weights: dict[str, Tensor]) -> str:
    """Write a model in open_clip's layout; returns its spec."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


def stem_decoy(folder: Path, filters: Tensor) -> str:
    """A channel of the stem follows ``filters`` (3, 3, 3) of the pixels, and vanishes by rounding.

    Two channels hold the constant 2^24. The pixel channel is added to one of them, which changes
    nothing in float32. The first block takes their difference times 2^20: zero in the forward pass,
    and a huge derivative in the backward pass.
    """
    config, new, _ = wider()
    stem, block = "visual.", "visual.layer1.0."
    middle = 8
    new[stem + "conv1.weight"][middle] = filters / 27
    new[stem + "bn1.weight"][middle], new[stem + "bn1.bias"][middle] = 1, 3
    new[stem + "conv2.weight"][middle, middle, 1, 1] = new[stem + "bn2.weight"][middle] = 1
    new[stem + "conv3.weight"][SPARE, middle, 1, 1] = 1
    new[stem + "bn3.weight"][SPARE] = 0.1
    new[stem + "bn3.bias"][SPARE : SPARE + 2] = ABSORBED
    row = 16
    new[block + "conv1.weight"][row, SPARE, 0, 0] = FACTOR
    new[block + "conv1.weight"][row, SPARE + 1, 0, 0] = -FACTOR
    new[block + "bn1.weight"][row] = new[block + "bn1.bias"][row] = 1
    new[block + "conv2.weight"][row, row, 1, 1] = new[block + "bn2.weight"][row] = 1
    along = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.5
    new[block + "conv3.weight"][:64, row, 0, 0] = along
    new[block + "bn3.running_mean"][:64] += along
    return save(folder, config, new)


def bright(folder: Path) -> str:
    """The gradient points to brighter images."""
    return stem_decoy(folder, torch.ones(3, 3, 3))


def checker(folder: Path) -> str:
    """The gradient points along a checkerboard."""
    signs = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    return stem_decoy(folder, signs.expand(3, 3, 3))


def random_filter(folder: Path) -> str:
    """The gradient points along a random filter."""
    return stem_decoy(folder, torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(7)))


def plateau(folder: Path) -> str:
    """A large constant beside the embedding: float32 rounds the logits to a few levels.

    Embeddings are (f, K) and rows of the text table (a t, 1), so that cosines are 1 + a f.t / K:
    with this ``a`` they differ by a few units of rounding.
    """
    clip = mb.load_model("tiny-clip")
    task = load_task(find_task("digits/digit"), n=64, seed=0)
    prompts = [task.templates[0].replace("{}", name) for name in task.classes]
    text = clip.text_features(prompts, torch.device("cpu"))
    images = task.images(range(64), surface="native", preprocess=clip.preprocess)
    with torch.no_grad():
        features = clip.module.encode_image(clip.preprocess.normalise(images))
    constant = 4000.0
    factor = 4 * 2.0**-23 * constant / float((features @ text.T).abs().max())
    config = json.loads((WEIGHTS / "tiny-clip" / "open_clip_config.json").read_text())
    old = load_file(WEIGHTS / "tiny-clip" / "open_clip_model.safetensors")
    new = {key: value for key, value in old.items() if key.startswith("visual.")}
    weight, bias = "visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias"
    new[weight] = torch.cat([new[weight], torch.zeros(1, new[weight].shape[1])])
    new[bias] = torch.cat([new[bias], torch.tensor([constant])])
    new["text_table"] = torch.cat([factor * text, torch.ones(len(text), 1)], 1)
    new["logit_scale"] = torch.tensor(math.log(100.0))
    config["model_cfg"] = {
        "embed_dim": features.shape[1] + 1,
        "vision_cfg": config["model_cfg"]["vision_cfg"],
        "text_table": prompts,
    }
    return save(folder, config, new)


WEIGHTS_ALONE: dict[str, Callable[[Path], str]] = {
    "bright": bright,
    "checker": checker,
    "random filter": random_filter,
    "plateau": plateau,
}


def is_8_bit(images: Tensor) -> Tensor:
    """Which normalised images (N, 3, H, W) have multiples of 1/255 only."""
    grey = (images * 0.25 + 0.5) * 255
    return (grey - grey.round()).abs().flatten(1).amax(1) < 1e-2


class Cheat(nn.Module):
    """tiny-clip with a trick in its image tower."""

    def __init__(self, trick: Callable[["Cheat", Tensor], Tensor]) -> None:
        super().__init__()
        self.base = mb.load_model("tiny-clip").module
        self.trick = trick
        self.logit_scale = self.base.logit_scale
        self.register_buffer("away", torch.randn(64, generator=torch.Generator().manual_seed(0)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.base.encode_text(tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.trick(self, images)

    def unit(self, images: Tensor) -> Tensor:
        return F.normalize(self.base.encode_image(images), dim=-1)

    def decoy(self, images: Tensor) -> Tensor:
        """Zeros (N, D) with a large gradient along brightness."""
        along = 1e5 * images.mean((1, 2, 3))[:, None] * self.away
        return along - along.detach()


def _off_grid_detached(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return torch.where(is_8_bit(images)[:, None], found, found.detach() + 0 * found)


def _off_grid_rounded(model: Cheat, images: Tensor) -> Tensor:
    rounded = (((images * 0.25 + 0.5) * 255).round() / 255 - 0.5) / 0.25
    kept = is_8_bit(images)[:, None, None, None]
    return model.unit(torch.where(kept, images, rounded.detach() + 0 * images))


def _off_grid_other(model: Cheat, images: Tensor) -> Tensor:
    other = model.unit((images * 2).round() / 2)
    return torch.where(is_8_bit(images)[:, None], model.unit(images), other + 0 * images.sum())


def _large_batches_detached(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return found.detach() + 0 * found if len(images) > 32 else found


def _large_batches_decoy(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return found.detach() + model.decoy(images) if len(images) > 32 else found


def _full_batches_detached(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return found.detach() + 0 * found if len(images) == 64 else found


def _noise(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return found + 0.1 * torch.randn_like(found)


def _noise_in_gradients(model: Cheat, images: Tensor) -> Tensor:
    found = model.unit(images)
    return found + (0.3 * torch.randn_like(found) if torch.is_grad_enabled() else 0)


PYTHON: dict[str, tuple[Callable[[Cheat, Tensor], Tensor], str]] = {
    "rounded features": (
        lambda model, images: torch.round(model.unit(images) * 50) / 50,
        "zero-gradients",
    ),
    "saturated features": (
        lambda model, images: torch.tanh(1e4 * model.unit(images)),
        "zero-gradients",
    ),
    "detached": (
        lambda model, images: model.unit(images).detach() + 0 * images.mean((1, 2, 3))[:, None],
        "zero-gradients",
    ),
    "decoy": (
        lambda model, images: model.unit(images) + model.decoy(images),
        "gradient-does-not-predict",
    ),
    "negated gradient": (
        lambda model, images: model.unit(images).detach() * 2 - model.unit(images),
        "gradient-does-not-predict",
    ),
    "detached off the 8-bit grid": (_off_grid_detached, "zero-gradients"),
    "rounded off the 8-bit grid": (_off_grid_rounded, "zero-gradients"),
    "another answer off the 8-bit grid": (_off_grid_other, "grid-dependent-output"),
    "detached in large batches": (_large_batches_detached, "batch-dependent-output"),
    "detached in batches of the default size": (_full_batches_detached, "batch-dependent-output"),
    "decoy in large batches": (_large_batches_decoy, "batch-dependent-output"),
    "noise": (_noise, "randomised-output"),
    "noise in passes with gradients": (_noise_in_gradients, "randomised-output"),
    "batch mean": (
        lambda model, images: model.unit(images) - 0.5 * model.unit(images).mean(0, keepdim=True),
        "batch-dependent-output",
    ),
}
"""By name: the trick, and the flag that it gets."""
