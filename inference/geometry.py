"""Window: a cut-out of a volume at network resolution, for voxels and for points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """A box of voxels, possibly leaving the volume, seen through a grid of cells.

    The edges of voxels and cells coincide at the window's faces, so a cell is
    ``(stop - start) / shape`` voxels long, and both maps between coordinates are affine.

    Attributes:
        start: first voxel (z, y, x); may be negative.
        stop: one past the last voxel; may exceed the volume.
        shape: cells along each axis.
    """

    start: Triple
    stop: Triple
    shape: Triple

    def __post_init__(self) -> None:
        """Refuse windows without voxels or cells."""
        if any(b <= a for a, b in zip(self.start, self.stop, strict=True)) or min(self.shape) < 1:
            raise ValueError(
                f"window {self.start}..{self.stop} with {self.shape} cells; accepted: stop > start "
                "on every axis and at least one cell"
            )

    @property
    def size(self) -> Triple:
        """Voxels along each axis."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def cell(self) -> tuple[float, float, float]:
        """Edge lengths of a cell in voxels."""
        z, y, x = (s / n for s, n in zip(self.size, self.shape, strict=True))
        return z, y, x

    def to_grid(self, point: Iterable[float]) -> tuple[float, float, float]:
        """Voxel coordinates -> cell coordinates; centres are integers in both."""
        z, y, x = (
            (p + 0.5 - a) / c - 0.5 for p, a, c in zip(point, self.start, self.cell, strict=True)
        )
        return z, y, x

    def to_volume(self, point: Iterable[float]) -> tuple[float, float, float]:
        """Cell coordinates -> voxel coordinates, the inverse of :meth:`to_grid`."""
        z, y, x = (
            (p + 0.5) * c + a - 0.5 for p, a, c in zip(point, self.start, self.cell, strict=True)
        )
        return z, y, x

    def voxels(self, low: Triple, high: Triple) -> tuple[Triple, Triple]:
        """The voxels that a box of cells touches; both boxes are half-open."""
        # In whole numbers: in floats 27 cells of 112 / 48 voxels end beyond the 63rd.
        grid = list(zip(self.start, self.size, self.shape, strict=True))
        z0, y0, x0 = (w + a * s // n for a, (w, s, n) in zip(low, grid, strict=True))
        z1, y1, x1 = (w - (-b * s // n) for b, (w, s, n) in zip(high, grid, strict=True))
        return (z0, y0, x0), (z1, y1, x1)

    def inside(self, shape: Triple) -> tuple[slice, slice, slice]:
        """The cells whose centres lie in a volume of ``shape``: slices of the grid."""
        z, y, x = (
            # In whole numbers: a centre may lie on a face of the volume.
            slice(*(min(max(-((s - 2 * (v - a) * m) // (2 * s)), 0), m) for v in (0, n)))
            for a, s, m, n in zip(self.start, self.size, self.shape, shape, strict=True)
        )
        return z, y, x


#: Least edge of a region of interest, as a share of its longest edge in millimetres.
SLENDEREST = 0.6
_SHORTEST = 8  # voxels


def window_around(
    start: Sequence[float],
    stop: Sequence[float],
    shape: Triple,
    spacing_mm: Sequence[float],
    scale: float = 1.0,
) -> Window:
    """The region of interest about a box: ``scale`` times its edges, same centre.

    A box may say little about an object that winds: it is exact on its middle slice only. So no
    axis is shorter than :data:`SLENDEREST` times the longest, in millimetres, nor than 8 voxels.

    Args:
        start, stop: edges of the box in voxels, half-open.
        shape: cells of the window.
        spacing_mm: (z, y, x).
        scale: region edge over box edge.
    """
    edges = [b - a for a, b in zip(start, stop, strict=True)]
    least = SLENDEREST * max(e * s for e, s in zip(edges, spacing_mm, strict=True))
    low, high = [], []
    for a, edge, spacing in zip(start, edges, spacing_mm, strict=True):
        centre, half = a + edge / 2, max(max(edge, least / spacing) * scale, _SHORTEST) / 2
        low.append(round(centre - half))
        high.append(max(round(centre + half), low[-1] + 1))
    return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]), shape)
