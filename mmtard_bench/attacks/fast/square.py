"""Square (Andriushchenko et al., 2020): random squares, kept when they lower the margin.

Sizes of squares, the pattern of the L2 form and the first points are the reference code's. Its
squares never reach the last row and column; as in the paper (Algorithm 2), these do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.attacks.base import margin, norm_of, sample_generator
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Search, State, choose
from mmtard_bench.types import Norm

SHARE = 0.8
"""Of the image, that the first squares cover."""
HALVINGS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
"""From which query on squares cover half as much; not stretched to the number of queries."""
TILES = 5
"""The first points of the L2 form have so many patterns a side."""


@dataclass(frozen=True, kw_only=True)
class Square(Search):
    """Square on the margin; sizes do not depend on the number of queries, as in AutoAttack."""

    name: str = "square"
    steps: int = 5000
    backward: int = 0

    def begin(self, images: Tensor, keys: Sequence[tuple[object, ...]]) -> State:
        """See ``Search``. A row's randomness is drawn at once, (rows, steps, 6) in [0, 1)."""
        offsets, draws = [], []
        for key in keys:
            generator = sample_generator(*key)
            offsets.append(self._offset(images.shape[1:], generator))
            draws.append(torch.rand((self.steps, 6), generator=generator))
        points = (images + self.eps * torch.stack(offsets).to(images)).clamp(0, 1)
        return {
            **self.ball(images),
            "points": points,
            "best": points.clone(),
            "best_margin": images.new_full((len(keys),), torch.inf),
            "draws": torch.stack(draws).to(images),
        }

    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """See ``Search``."""
        looked, at = state["points"], state["at"]
        logits = passes.logits(looked)
        gap = margin(logits, state["labels"])
        better = gap < state["best_margin"]
        state["best_margin"] = torch.where(better, gap, state["best_margin"])
        state["best"] = choose(better, looked, state["best"])
        draws = state["draws"][torch.arange(len(at), device=at.device), at]
        sides = _sides(self.steps, tuple(looked.shape[-2:]), self.norm, at.device)[at]
        propose = self._linf if self.norm == "linf" else self._l2
        state["points"] = propose(state, sides, draws)
        state["at"] = at + 1
        return looked, self.found(state, logits)

    def _linf(self, state: State, sides: Tensor, draws: Tensor) -> Tensor:
        """A square at one corner of the ball in each channel."""
        corner = torch.lerp(state["lower"], state["upper"], _bits(draws[:, 5]))
        square = _window(corner, sides, draws[:, 0], draws[:, 1])
        return torch.lerp(state["best"], corner, square)

    def _l2(self, state: State, sides: Tensor, draws: Tensor) -> Tensor:
        """A pattern in one square, from what an emptied second square and the ball leave over."""
        images, best = state["images"], state["best"]
        delta = best - images
        first = _window(images, sides, draws[:, 0], draws[:, 1])
        second = _window(images, sides, draws[:, 2], draws[:, 3])
        inside = delta * first
        unit = inside / (_length(inside) + 1e-12)
        new = _placed(images, sides, draws) * (2 * _bits(draws[:, 5]) - 1) + unit
        left = (self.eps**2 - _length(delta, whole=True) ** 2).clamp_min(0) / images.shape[1]
        budget = (left + _length(delta * torch.maximum(first, second)) ** 2).sqrt()
        new = new / (_length(new) + 1e-12) * budget
        delta = torch.lerp(delta * (1 - second), new, first)
        return (images + delta * (self.eps / (_length(delta, whole=True) + 1e-12))).clamp_(0, 1)

    def _offset(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first offset of a row, of norm one: stripes in L-inf, tiles of patterns in L2."""
        channels, height, width = shape
        if self.norm == "linf":
            return _signs_of((channels, 1, width), generator).expand(shape)
        side = max(min(height, width) // TILES, 1)
        down, across = min(height // side, TILES), min(width // side, TILES)
        turned = torch.randint(2, (down, across), generator=generator)
        tiles = torch.stack([pattern(side), pattern(side).T])[turned]
        signed = tiles * _signs_of((channels, down, across, 1, 1), generator)
        block = signed.transpose(2, 3).reshape(channels, down * side, across * side)
        offset = torch.zeros(shape)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        offset[:, top : top + down * side, left : left + across * side] = block
        return offset / norm_of(offset[None], "l2")


def pattern(side: int) -> Tensor:
    """The pattern of the L2 form, (side, side), of norm one: two pyramids of opposite signs."""
    if side == 1:
        return torch.ones(1, 1)
    top = side // 2
    whole = torch.cat([_pyramid(top, side), -_pyramid(side - top, side)])
    return F.normalize(whole.flatten(), dim=0).view_as(whole)


def _pyramid(height: int, width: int) -> Tensor:
    """Rings around the centre, the k-th with the sum of 1 / (k + 1)^2 from k on; of norm one."""
    rings = max(height, width) // 2 + 1
    falling = (1 / torch.arange(1, rings + 1) ** 2).flip(0).cumsum(0).flip(0)
    down = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    values = falling[torch.maximum(down[:, None], across[None])]
    return F.normalize(values.flatten(), dim=0).view_as(values)


@lru_cache(maxsize=8)
def _sides(steps: int, size: tuple[int, int], norm: Norm, device: torch.device) -> Tensor:
    """The side of the square of each query, (steps,)."""
    sides = []
    for query in range(steps):
        share = SHARE / 2 ** sum(query >= start for start in HALVINGS)
        side = max(round(math.sqrt(share * size[0] * size[1])), 1 if norm == "linf" else 3)
        if norm == "l2":
            side += 1 - side % 2
        sides.append(min(side, *size))
    return torch.tensor(sides, device=device)


@lru_cache(maxsize=8)
def _patterns(largest: int, device: torch.device) -> Tensor:
    """The patterns of every side up to the largest, (largest + 1, largest, largest)."""
    table = torch.zeros(largest + 1, largest, largest)
    for side in range(1, largest + 1):
        table[side, :side, :side] = pattern(side)
    return table.to(device)


def _corner(images: Tensor, sides: Tensor, down: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """The first row and column of squares of given sides, uniform where they fit, (N,) each."""
    height, width = images.shape[-2:]
    return (down * (height - sides + 1)).long(), (across * (width - sides + 1)).long()


def _window(images: Tensor, sides: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """One for the pixels that the squares cover, zero for others, (N, 1, H, W)."""
    masks = []
    corner = _corner(images, sides, down, across)
    for first, size in zip(corner, images.shape[-2:], strict=True):
        place = torch.arange(size, device=images.device) - first[:, None]
        masks.append(((place >= 0) & (place < sides[:, None])).to(images))
    return (masks[0][:, :, None] * masks[1][:, None, :])[:, None]


def _placed(images: Tensor, sides: Tensor, draws: Tensor) -> Tensor:
    """The patterns at the first squares of their rows, turned or not, (N, 1, H, W)."""
    top, left = _corner(images, sides, draws[:, 0], draws[:, 1])
    height, width = images.shape[-2:]
    table = _patterns(min(height, width), images.device)
    down = torch.arange(height, device=images.device) - top[:, None]
    across = torch.arange(width, device=images.device) - left[:, None]
    inside = (down >= 0) & (down < sides[:, None])
    beside = (across >= 0) & (across < sides[:, None])
    i = down.clamp(0, len(table) - 2)[:, :, None]
    j = across.clamp(0, len(table) - 2)[:, None, :]
    turned = (draws[:, 4] > 0.5)[:, None, None]
    side = sides[:, None, None]
    values = torch.where(turned, table[side, j, i], table[side, i, j])
    return (values * (inside[:, :, None] & beside[:, None, :]))[:, None]


def _bits(draw: Tensor) -> Tensor:
    """Zero or one for each of three channels from one draw in [0, 1), (N, 3, 1, 1)."""
    bits = (draw * 8).long()[:, None] >> torch.arange(3, device=draw.device)
    return (bits & 1).to(draw).view(-1, 3, 1, 1)


def _signs_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1


def _length(values: Tensor, *, whole: bool = False) -> Tensor:
    """The L2 norm of every channel, or of the whole image, (N, 3 or 1, 1, 1)."""
    over = (1, 2, 3) if whole else (2, 3)
    return values.square().sum(over, keepdim=True).sqrt()
