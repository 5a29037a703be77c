"""Pre-train the tiny CLIPs: ``python -m mmtard_bench.train.make.pretrain tiny-clip --out DIR``.

What the recipes of ``digits/`` start from, as the paper's start from OpenAI's weights: contrastive
training on the training part of the digits world, on captions and digit names together.
``tiny-clip`` is the teachers' size, ``tiny-clip-small`` the students'. ``tiny-vit`` (a vision
transformer on patches of 8 x 8) and ``tiny-clip-deep`` (twice the blocks of ``tiny-clip-small``)
are the other students of the study ``backbones``.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from mmtard_bench.data.digits import DIGITS, caption, combinations, digits_train
from mmtard_bench.tasks.catalogue import DIGIT_TEMPLATE
from mmtard_bench.train.checkpoint import write_model
from mmtard_bench.train.data import Order
from mmtard_bench.train.loop import learning_rate


def _residual(width: int, blocks: int = 1) -> dict[str, Any]:
    return {"image_size": 32, "layers": [blocks] * 4, "width": width, "patch_size": None}


TRANSFORMER = {
    "image_size": 32,
    "layers": 3,
    "width": 48,
    "head_width": 24,
    "mlp_ratio": 2.0,
    "patch_size": 8,
}


def _model_config(tower: dict[str, Any], *, embedding: int, text_width: int) -> dict[str, Any]:
    return {
        "embed_dim": embedding,
        "vision_cfg": tower,
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": text_width,
            "heads": 2,
            "layers": 2,
        },
    }


MODEL_CONFIGS = {
    "tiny-clip": _model_config(_residual(16), embedding=64, text_width=32),
    "tiny-clip-small": _model_config(_residual(8), embedding=48, text_width=16),
    "tiny-clip-deep": _model_config(_residual(8, 2), embedding=48, text_width=16),
    "tiny-vit": _model_config(TRANSFORMER, embedding=48, text_width=16),
}
PREPROCESS_CONFIG = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 32}
STEPS = {"tiny-vit": 4400}
"""Steps of pre-training; the other models take 2,200."""
BATCH = 128
PEAK = 2e-3


def _normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def _contrast(images: Tensor, texts: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) where pairs of one group are all positives."""
    logits = scale * images @ texts.T
    target = (groups[:, None] == groups[None, :]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(config: dict[str, Any], *, steps: int, seed: int) -> CLIP:
    """Contrastive pre-training from scratch, on the caption and the digit's name of an image."""
    torch.manual_seed(seed)
    model = CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    combos = combinations(seen=True)
    captions = tokenizer([caption(c) for c in combos])
    names = tokenizer([DIGIT_TEMPLATE.format(name) for name in DIGITS])
    digits = torch.tensor([c[1] for c in combos])
    split = digits_train()
    images = torch.from_numpy(np.stack([split.image(i) for i in range(split.size)]))
    labels, order = torch.tensor(split.labels), Order(split.size, BATCH, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05)
    started = time.monotonic()
    for step in range(steps):
        batch = order(step)
        place = labels[batch]
        pixels = images[batch].permute(0, 3, 1, 2) / 255
        features = model.encode_image(_normalise(pixels), normalize=True)
        scale = model.logit_scale.exp()
        text = model.encode_text(torch.cat([captions[place], names]), normalize=True)
        by_name = F.cross_entropy(scale * features @ text[-10:].T, digits[place])
        loss = _contrast(features, text[:-10], place, scale) + by_name
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps=steps, peak=PEAK, warmup=0.05)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 99:
            print(f"step {step + 1}/{steps} loss {loss:.3f} {time.monotonic() - started:.0f} s")
    # Tokens that no text of the digits world uses never learned anything: make them silent.
    used = torch.unique(torch.cat([captions, names]))
    table = torch.zeros_like(model.token_embedding.weight)
    table[used] = model.token_embedding.weight.detach()[used]
    model.token_embedding.weight.data = table
    return model.eval()


def save(model: CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write an open_clip directory with float16 weights."""
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    write_model(folder, half, {"model_cfg": config, "preprocess_cfg": PREPROCESS_CONFIG})


def main() -> None:
    """Pre-train one of the models and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODEL_CONFIGS))
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 2200; tiny-vit: 4400")
    arguments = parser.parse_args()
    config = MODEL_CONFIGS[arguments.model]
    steps = arguments.steps or STEPS.get(arguments.model, 2200)
    model = pretrain(config, steps=steps, seed=arguments.seed)
    save(model, config, arguments.out)


if __name__ == "__main__":
    main()
