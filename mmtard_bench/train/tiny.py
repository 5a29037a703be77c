"""Make the tiny models that ship with the package: ``python -m mmtard_bench.train.tiny``.

``tiny-clip`` is pre-trained contrastively on the training part of the digits world, on captions
and digit names together. ``tiny-tecoa`` is fine-tuned from it as in TeCoA (Mao et al., 2023):
cross-entropy of adversarial images against frozen text embeddings, image tower only.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor

from mmtard_bench.attacks.pgd import pgd
from mmtard_bench.data.digits import DIGITS, caption, combinations, digits_train
from mmtard_bench.tasks.declared import DIGIT_TEMPLATE

MODEL_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS_CONFIG = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 32}
EPS = 8 / 255


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


def pretrain(images: Tensor, places: Tensor, *, steps: int, seed: int) -> CLIP:
    """Contrastive pre-training from scratch, on the caption and the digit's name of an image."""
    torch.manual_seed(seed)
    model = CLIP(**MODEL_CONFIG)
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


def finetune(model: CLIP, images: Tensor, places: Tensor, *, steps: int, seed: int) -> CLIP:
    """TeCoA: cross-entropy of PGD-5 images over the digit names and over the captions."""
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    combos = combinations(seen=True)
    digits = torch.tensor([c[1] for c in combos])
    with torch.no_grad():
        texts = tokenizer([DIGIT_TEMPLATE.format(name) for name in DIGITS])
        names = model.encode_text(texts, normalize=True)
        captions = model.encode_text(tokenizer([caption(c) for c in combos]), normalize=True)
        scale = model.logit_scale.exp()
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.visual.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _schedule(s + 1, steps + 1))
    torch.manual_seed(seed)
    started = time.monotonic()
    for step, batch in enumerate(_batches(len(images), 128, steps, seed + 1)):
        clean, place = images[batch] / 255, places[batch]

        def loss(features: Tensor, place: Tensor = place) -> Tensor:
            by_name = F.cross_entropy(scale * features @ names.T, digits[place], reduction="none")
            by_caption = F.cross_entropy(scale * features @ captions.T, place, reduction="none")
            return by_name + 0.5 * by_caption

        model.eval()
        attacked, _ = pgd(
            lambda pixels: model.encode_image(_normalise(pixels), normalize=True),
            clean,
            loss=loss,
            norm="linf",
            eps=EPS,
            steps=5,
            step_size=2.5 * EPS / 5,
            start=(torch.rand_like(clean) * 2 - 1) * EPS,
        )
        model.train()
        value = loss(model.encode_image(_normalise(attacked), normalize=True)).mean()
        optimiser.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.visual.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            spent = time.monotonic() - started
            print(f"finetune {step + 1}/{steps} loss {value:.3f} {spent:.0f} s")
    return model.eval()


def save(model: CLIP, folder: Path) -> None:
    """Write an open_clip directory: configuration and float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(half, folder / "open_clip_model.safetensors")


def main() -> None:
    """Train both models, or one of them, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the two folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain-steps", type=int, default=2200)
    parser.add_argument("--finetune-steps", type=int, default=1500)
    parser.add_argument("--only", choices=("tiny-clip", "tiny-tecoa"))
    arguments = parser.parse_args()
    images, places = _training_set()
    if arguments.only != "tiny-tecoa":
        model = pretrain(images, places, steps=arguments.pretrain_steps, seed=arguments.seed)
        save(model, arguments.out / "tiny-clip")
    if arguments.only != "tiny-clip":
        # From the file, not from memory: what is fine-tuned is the model that ships.
        model = open_clip.create_model(f"local-dir:{arguments.out / 'tiny-clip'}")
        model = finetune(model, images, places, steps=arguments.finetune_steps, seed=arguments.seed)
        save(model, arguments.out / "tiny-tecoa")


if __name__ == "__main__":
    main()
