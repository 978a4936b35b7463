"""Tiles cover every cell, and an identity predictor comes back unchanged."""

from __future__ import annotations

import itertools

import pytest
import torch

from inference.sliding_window import importance, sliding_window, tile_grid


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((16, 16, 16), (16, 16, 16)),
        ((17, 31, 5), (8, 16, 5)),
        ((1, 40, 33), (1, 7, 32)),
        ((9, 2, 5), (1, 2, 3)),
        ((50, 6, 7), (10, 6, 7)),
    ],
)
def test_an_identity_predictor_comes_back(
    shape: tuple[int, int, int], tile: tuple[int, int, int]
) -> None:
    volume = torch.randn(shape)
    tiles = tile_grid(shape, tile)
    blended = sliding_window(
        tiles, lambda places: torch.stack([volume[p] for p in places]), torch.zeros(shape), 3
    )
    torch.testing.assert_close(blended, volume)


def test_tiles_share_at_least_the_overlap() -> None:
    starts = sorted({place[0].start for place in tile_grid((100, 8, 8), (32, 8, 8))})
    assert starts[0] == 0 and starts[-1] == 68
    assert all(b - a <= 24 for a, b in itertools.pairwise(starts))


def test_cells_without_a_tile_keep_the_fill() -> None:
    fill = torch.full((8, 8, 8), -5.0)
    tiles = tile_grid((8, 8, 8), (4, 8, 8))[:1]
    blended = sliding_window(tiles, lambda p: torch.ones(len(p), 4, 8, 8), fill)
    assert (blended[:4] == 1).all() and (blended[4:] == -5).all()


def test_the_middle_of_a_tile_counts_more_than_its_border() -> None:
    """Two tiles that disagree: each wins in its own middle, and the seam lies between."""
    tiles = tile_grid((12, 4, 4), (8, 4, 4))
    values = iter([-1.0, 1.0])
    blended = sliding_window(
        tiles, lambda p: torch.full((1, 8, 4, 4), next(values)), torch.zeros(12, 4, 4)
    )
    line = blended[:, 2, 2]
    assert (line.diff() >= -1e-6).all() and line[4] < -0.5 < 0.5 < line[7]
    weights = importance((8, 8, 8))
    assert weights[4, 4, 4] == weights.max() > 100 * weights[0, 0, 0] and weights.min() >= 1e-3


@pytest.mark.parametrize("tile", [(9, 8, 8), (0, 8, 8)])
def test_a_tile_that_does_not_fit_is_refused(tile: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="accepted: 1 <= tile <= grid"):
        tile_grid((8, 8, 8), tile)
