"""An object as it may be looked at: its boxes with axes permuted, and windows about it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from inference.geometry import Triple, Window, window_around
from inference.sam_stage import PUBLIC_MARGIN, PUBLIC_SPACING_MM
from training.box_padding import box_padding
from training.volumes import LabelledVolume, Point, TrainingObject

T = TypeVar("T", int, float)


class View:
    """An object with the axes of its volume permuted.

    Args:
        volume: that it lies in.
        seen: the object.
        order: the volume's axis of each axis here.
        rng: draws how far its box is padded.

    Attributes:
        spacing_mm: along the axes here, as everything that follows.
        longest_mm: the longest edge of the volume.
        padding: of its box, in voxels.
        edges: of its padded box, lower and upper, and its middle slice.
    """

    def __init__(
        self, volume: LabelledVolume, seen: TrainingObject, order: Triple, rng: np.random.Generator
    ) -> None:
        """Draw the padding."""
        self._seen, self._order = seen, order
        self.spacing_mm = self._turned(volume.spacing_mm)
        self._shape = self._turned(volume.labels.shape)
        self.longest_mm = max(n * mm for n, mm in zip(self._shape, self.spacing_mm, strict=True))
        self.padding = self.draw_padding(rng)
        self.edges = (*self.edges_of(seen, self.padding), seen.boxes[order[0]][2])

    def draw_padding(self, rng: np.random.Generator) -> Point:
        """Of one object's box, in voxels."""
        y, x = box_padding(rng, *self._shape[1:])
        return 0.0, float(y), float(x)

    def edges_of(self, seen: TrainingObject, padding: Point) -> tuple[Point, Point]:
        """Lower and upper edges of an object's box, padded as far as there is an image."""
        low, high, _ = seen.boxes[self._order[0]]
        edges = zip(self._turned(low), self._turned(high), padding, self._shape, strict=True)
        z, y, x = ((max(a - p, -0.5), min(b + p, n - 0.5)) for a, b, p, n in edges)
        return (z[0], y[0], x[0]), (z[1], y[1], x[1])

    def of_volume(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 3) points along these axes, in the order of the volume's."""
        turned = np.empty_like(points)
        turned[:, list(self._order)] = points
        return turned

    def _turned(self, values: tuple[T, ...]) -> tuple[T, T, T]:
        z, y, x = (values[axis] for axis in self._order)
        return z, y, x

    @property
    def size_mm(self) -> list[float]:
        """Edges of the object's bounding box."""
        size = [b - a for a, b in zip(self._seen.start, self._seen.stop, strict=True)]
        return [n * mm for n, mm in zip(self._turned(tuple(size)), self.spacing_mm, strict=True)]

    @property
    def centre(self) -> list[float]:
        """Of the bounding box, as an edge coordinate: voxel 0 lies between 0 and 1."""
        middle = [(a + b) / 2 for a, b in zip(self._seen.start, self._seen.stop, strict=True)]
        return list(self._turned(tuple(middle)))

    @property
    def deepest(self) -> Point:
        """About the voxel deepest inside."""
        return self._turned(self._seen.deepest)

    @property
    def surface(self) -> NDArray[np.int32]:
        """(N, 3) some of its outermost voxels."""
        return self._seen.surface[:, list(self._order)]

    def box(self, window: Window) -> tuple[Point, Point, float]:
        """The challenge's box in a window's cells."""
        low, high, middle = self.edges
        return window.to_grid(low), window.to_grid(high), window.to_grid((middle, 0, 0))[0]


def about_box(
    centre: list[float], edges: list[float], cells: int, spacing_mm: Point, scale: float = 1.0
) -> Window:
    """``window_around`` a box given by its centre and edges."""
    return window_around(
        [c - e / 2 for c, e in zip(centre, edges, strict=True)],
        [c + e / 2 for c, e in zip(centre, edges, strict=True)],
        (cells, cells, cells),
        spacing_mm,
        scale,
    )


def about_click(view: View, edge: int, rng: np.random.Generator) -> Window:
    """A cube in millimetres about an object's deepest point.

    It may be smaller than the object: then the prediction has to reach its border, so that
    inference knows to look further.
    """
    cube = max(view.size_mm) * float(np.exp(rng.uniform(np.log(0.4), np.log(4.0))))
    edges = [cube / mm for mm in view.spacing_mm]
    centre = [
        p + 0.5 + float(rng.uniform(-0.1, 0.1)) * e
        for p, e in zip(view.deepest, edges, strict=True)
    ]
    return about_box(centre, edges, edge, view.spacing_mm)


def first_look(view: View, edge: int, rng: np.random.Generator) -> Window:
    """A cube about an object's deepest point, of about the size of the volume.

    With nothing but a click known, that is where inference begins (refinement.py), however small
    the object.
    """
    length = view.longest_mm * float(np.exp(rng.uniform(np.log(0.4), np.log(1.6))))
    return about_box(
        [p + 0.5 for p in view.deepest],
        [length / mm for mm in view.spacing_mm],
        edge,
        view.spacing_mm,
    )


def public_window(view: View, edge: int) -> Window:
    """The cube at 1.5 mm about the object that public SAM-Med3D checkpoints see.

    Of an object too large for it, a coarser cube, as ``inference/sam_stage.py`` chooses it.
    """
    cube = max(PUBLIC_SPACING_MM * edge, PUBLIC_MARGIN * max(view.size_mm))
    start, stop = [], []
    for centre, mm in zip(view.centre, view.spacing_mm, strict=True):
        n = max(1, round(cube / mm))
        start.append(round(centre - n / 2))
        stop.append(start[-1] + n)
    return Window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]), (edge, edge, edge))


def zoomed_window(window: Window, view: View, edge: int, rng: np.random.Generator) -> Window:
    """A finer window within another, as the second pass has them (inference/second_pass.py).

    Half of them show the whole object, as one tile does, the others a part of the window about a
    random voxel of the object's surface, as one of several tiles.
    """
    whole = rng.random() < 0.5
    off = rng.uniform(-0.05, 0.05, 3) if whole else rng.uniform(-0.25, 0.25, 3)
    if whole:
        corner, opposite, _ = view.edges
        size = [b - a for a, b in zip(corner, opposite, strict=True)]
        centre = [(a + b + 1) / 2 for a, b in zip(corner, opposite, strict=True)]
        about = about_box(centre, size, edge, view.spacing_mm, float(rng.uniform(1.1, 1.4)))
        wanted = [float(n) for n in about.size]
    else:
        centre = [p + 0.5 for p in view.surface[rng.integers(len(view.surface))].tolist()]
        share = float(rng.uniform(0.3, 0.75))
        wanted = [n * share for n in window.size]
    edges = [round(min(max(w, edge), n)) for w, n in zip(wanted, window.size, strict=True)]
    low = [
        min(max(round(c + float(o) * e - e / 2), a), b - e)
        for c, o, e, a, b in zip(centre, off, edges, window.start, window.stop, strict=True)
    ]
    high = [a + e for a, e in zip(low, edges, strict=True)]
    return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]), window.shape)
