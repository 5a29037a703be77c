"""Pre-train the tiny CLIPs: ``python -m mmtard_bench.train.pretrain tiny-clip --out DIR``.

What the recipes of ``digits/`` start from, as the paper's start from OpenAI's weights: contrastive
training on the training part of the digits world, on captions and digit names together.
``tiny-clip`` is the teachers' size, ``tiny-clip-small`` the students'.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor

from mmtard_bench.data.digits import DIGITS, caption, combinations, digits_train
from mmtard_bench.tasks.declared import DIGIT_TEMPLATE


def _model_config(*, embedding: int, image_width: int, text_width: int) -> dict[str, Any]:
    return {
        "embed_dim": embedding,
        "vision_cfg": {
            "image_size": 32,
            "layers": [1, 1, 1, 1],
            "width": image_width,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": text_width,
            "heads": 2,
            "layers": 2,
        },
    }


MODEL_CONFIGS = {
    "tiny-clip": _model_config(embedding=64, image_width=16, text_width=32),
    "tiny-clip-small": _model_config(embedding=48, image_width=8, text_width=16),
}
PREPROCESS_CONFIG = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 32}


def _training_set() -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and places in ``combinations(seen=True)``, (N,)."""
    split = digits_train()
    pixels = np.stack([split.image(i) for i in range(split.size)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(split.labels)


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Index batches that walk through reshuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def _normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then cosine to zero."""
    warm = max(steps // 20, 1)
    return step / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * step / steps)


def _contrast(images: Tensor, texts: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) where pairs of one group are all positives."""
    logits = scale * images @ texts.T
    target = (groups[:, None] == groups[None, :]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(
    config: dict[str, Any], images: Tensor, places: Tensor, *, steps: int, seed: int
) -> CLIP:
    """Contrastive pre-training from scratch, on the caption and the digit's name of an image."""
    torch.manual_seed(seed)
    model = CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    combos = combinations(seen=True)
    captions = tokenizer([caption(c) for c in combos])
    names = tokenizer([DIGIT_TEMPLATE.format(name) for name in DIGITS])
    digits = torch.tensor([c[1] for c in combos])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _schedule(s + 1, steps + 1))
    started = time.monotonic()
    for step, batch in enumerate(_batches(len(images), 128, steps, seed)):
        place = places[batch]
        features = model.encode_image(_normalise(images[batch] / 255), normalize=True)
        scale = model.logit_scale.exp()
        text = model.encode_text(torch.cat([captions[place], names]), normalize=True)
        by_name = F.cross_entropy(scale * features @ text[-10:].T, digits[place])
        loss = _contrast(features, text[:-10], place, scale) + by_name
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 99:
            print(f"pretrain {step + 1}/{steps} loss {loss:.3f} {time.monotonic() - started:.0f} s")
    # Tokens that no text of the digits world uses never learned anything: make them silent.
    used = torch.unique(torch.cat([captions, names]))
    table = torch.zeros_like(model.token_embedding.weight)
    table[used] = model.token_embedding.weight.detach()[used]
    model.token_embedding.weight.data = table
    return model.eval()


def save(model: CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write an open_clip directory: configuration and float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config, "preprocess_cfg": PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(half, folder / "open_clip_model.safetensors")


def main() -> None:
    """Pre-train one of the two models and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODEL_CONFIGS))
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    arguments = parser.parse_args()
    config = MODEL_CONFIGS[arguments.model]
    images, places = _training_set()
    model = pretrain(config, images, places, steps=arguments.steps, seed=arguments.seed)
    save(model, config, arguments.out)


if __name__ == "__main__":
    main()
