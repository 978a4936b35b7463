"""Overlapping tiles over a large grid, blended with Gaussian importance."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Size = tuple[int, int, int]
Tile = tuple[slice, slice, slice]


OVERLAP = 0.25
"""Least share of a tile that it has in common with its neighbour."""


def tile_grid(shape: Size, tile: Size) -> list[Tile]:
    """Tiles of equal size that cover a grid, overlapping by :data:`OVERLAP` or more.

    Args:
        shape: cells of the grid.
        tile: cells of a tile; no axis may exceed the grid's.

    Raises:
        ValueError: for a tile larger than the grid.
    """
    if any(t > n or t < 1 for t, n in zip(tile, shape, strict=True)):
        raise ValueError(f"tile {tile} on a grid of {shape}; accepted: 1 <= tile <= grid")
    starts = []
    for n, t in zip(shape, tile, strict=True):
        step = max(1, int(t * (1 - OVERLAP)))
        count = -(-(n - t) // step) + 1
        starts.append([round(i * (n - t) / max(1, count - 1)) for i in range(count)])
    return [
        (slice(z, z + tile[0]), slice(y, y + tile[1]), slice(x, x + tile[2]))
        for z, y, x in itertools.product(*starts)
    ]


@functools.lru_cache(maxsize=8)
def importance(tile: Size) -> Tensor:
    """Weight of each cell of a tile: a Gaussian of sigma 1/8 of the edge, at least 1e-3."""
    axes = []
    for n in tile:
        x = (torch.arange(n, dtype=torch.float32) + 0.5) / n - 0.5
        axes.append(torch.exp(-0.5 * (x / 0.125) ** 2))
    z, y, x = axes
    return (z[:, None, None] * y[None, :, None] * x[None, None, :]).clamp_min(1e-3)


def sliding_window(
    tiles: Sequence[Tile],
    predict: Callable[[Sequence[Tile]], Tensor],
    fill: Tensor,
    batch: int = 1,
) -> Tensor:
    """Blend a prediction over tiles.

    Args:
        tiles: equal tiles of the grid, e.g. some of :func:`tile_grid`; may be empty.
        predict: takes up to ``batch`` tiles, returns (n, d, h, w) logits.
        fill: (D, H, W) values for cells that no tile covers.
        batch: tiles a call.

    Returns:
        (D, H, W) the weighted mean of the tiles' predictions.
    """
    total, weight = torch.zeros_like(fill), torch.zeros_like(fill)
    for i in range(0, len(tiles), batch):
        chunk = tiles[i : i + batch]
        for place, logits in zip(chunk, predict(chunk), strict=True):
            d, h, w = logits.shape
            importances = importance((d, h, w)).to(logits.device)
            total[place].addcmul_(logits, importances)
            weight[place] += importances
    return torch.where(weight > 0, total / weight.clamp_min(1e-6), fill)
