"""Where the second pass looks and how finely: near the object, in as few tiles as show it well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from inference.case import ObjectPrompts
from inference.geometry import Triple, Window, window_around
from inference.prompts import cells_a_face
from inference.refinement import bounding_box, click_voxels, hull
from inference.sliding_window import OVERLAP, Tile, tile_grid

#: Voxels: in longer cells a second pass is worth its time, of thin objects and of thick ones (all
#: constants here are chosen on training cases, those about the region on bent ones).
_COARSE_CELL, _COARSE_CELL_OF_THICK = 1.25, 3.0
#: Cells to a face of its surface from which on an object is thick: a ball of a radius of 11 cells.
_THICK = 2.4
#: Edges of what is looked at in edges of what the first pass found, and in voxels at least.
_AROUND, _LEAST = 1.25, 96
#: Share of the first pass in what both find together: it sees more around the object, the second
#: one sees it finer.
FIRST_PASS = 1 / 3
#: Edge of a tile in cells. One is enough where its cells are not longer than two voxels.
_TILE, _FINE_CELL = 112, 2.0


def second_window(
    window: Window,
    found: Tensor,
    prompts: ObjectPrompts,
    spacing_mm: Sequence[float],
    tiles: int,
    multiple: int,
) -> Window | None:
    """The part of the first pass's window to look at again, in a finer grid.

    Thick objects are looked at again only in cells above three voxels, and one tile does as well as
    more.

    Args:
        window: the first pass's.
        found: (D, H, W) bool, what it found there.
        prompts: of the object; its box and positive clicks are looked at in any case.
        spacing_mm: (z, y, x).
        tiles: most tiles to get along with, overlapping by a quarter.
        multiple: of the network; every axis has a multiple of so many cells.

    Returns:
        A window within the other one, or None where it would add nothing.
    """
    cell = max(window.cell)
    box = bounding_box(found.cpu().numpy()) if cell > _COARSE_CELL else None
    if box is None:
        return None
    if float(cells_a_face(found)) >= _THICK:
        if cell <= _COARSE_CELL_OF_THICK:
            return None
        tiles = 1
    region = _region(window, box, prompts, spacing_mm)
    closer = Window(region.start, region.stop, fine_shape(region, tiles, multiple))
    finer = math.prod(window.cell) / math.prod(closer.cell)
    return closer if finer > 1.5 else None


def tile_edge(multiple: int) -> int:
    """Edge in cells of the tiles of a network whose windows have multiples of so many."""
    return -(-_TILE // multiple) * multiple


def fine_shape(region: Window, tiles: int, multiple: int) -> Triple:
    """Cells of the second pass's grid: voxels, or as short as tiles allow and are worth it.

    Args:
        region: where; no axis gets coarser than its own grid.
        tiles, multiple: as :func:`second_window` has them.
    """
    wanted = [max(n, s) for n, s in zip(region.shape, region.size, strict=True)]

    def capped(most: Sequence[int]) -> Triple:
        z, y, x = (-(-min(n, m) // multiple) * multiple for n, m in zip(wanted, most, strict=True))
        return z, y, x

    tile = edge = tile_edge(multiple)
    shape = capped([tile] * 3)
    while edge < max(wanted):  # where an axis needs less, the others may have more
        edge += multiple
        more = capped([edge] * 3)
        if math.prod(more) > tile**3:
            break
        shape = more
    for count in range(2, tiles + 1):
        if max(s / n for s, n in zip(region.size, shape, strict=True)) <= _FINE_CELL:
            break
        shape = max(shape, capped(_edges_of_tiles(wanted, count, tile, multiple)), key=math.prod)
    return shape


def boundary_tiles(mask: Tensor, inside: Tensor, edge: int) -> list[Tile]:
    """Those tiles of a grid that a boundary of the object runs through.

    Args:
        mask: (D, H, W) 0/1, what is known of the object in a :func:`fine_shape`.
        inside: likewise, which cells lie in the volume.
        edge: of a tile; a grid of no more cells is one.
    """
    z, y, x = mask.shape
    if z * y * x > edge**3:
        z, y, x = (min(edge, n) for n in mask.shape)
    return [
        tile
        for tile in tile_grid((mask.shape[0], mask.shape[1], mask.shape[2]), (z, y, x))
        if 0 < float(mask[tile].mean()) < float(inside[tile].mean())
    ]


def _edges_of_tiles(wanted: Sequence[int], tiles: int, edge: int, multiple: int) -> list[int]:
    """Most cells along each axis that so many tiles cover.

    An axis of up to 1.25 tiles is squeezed into one, since a second tile would cost twice for
    little.
    """
    step = int(edge * (1 - OVERLAP)) // multiple * multiple
    if not step:  # tiles of one multiple cannot overlap
        return [edge] * 3
    counts = [min(1 + max(0, -(-(n - edge * 5 // 4) // step)), tiles) for n in wanted]
    while math.prod(counts) > tiles:
        counts[int(np.argmax(counts))] -= 1
    return [edge + step * (count - 1) for count in counts]


def _region(
    window: Window,
    found: tuple[Triple, Triple],
    prompts: ObjectPrompts,
    spacing_mm: Sequence[float],
) -> Window:
    """The part of a window about a box of its cells and about prompts, in cells as long as its."""
    low, high = hull(
        [
            window.voxels(*found),
            *([] if prompts.box is None else [(prompts.box.start, prompts.box.stop)]),
            *click_voxels(prompts.clicks, positive=True),
        ]
    )
    about = window_around(low, high, window.shape, spacing_mm, _AROUND)
    first, last, shape = [], [], []
    for a, b, w, v, cell in zip(
        about.start, about.stop, window.start, window.stop, window.cell, strict=True
    ):
        edge = min(max(b - a, _LEAST), v - w)
        first.append(min(max((a + b - edge) // 2, w), v - edge))
        last.append(first[-1] + edge)
        shape.append(max(1, round(edge / cell)))
    return Window(
        (first[0], first[1], first[2]), (last[0], last[1], last[2]), (shape[0], shape[1], shape[2])
    )
