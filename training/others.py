"""What is said of other objects, in the cells of a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.geometry import Window
from training.view import View
from training.volumes import Point, TrainingObject

#: Of the rounds, so many bring an object a positive click, with a box and without one (then after
#: the first): counted in evaluations of bent training cases.
_POSITIVE_WITH_BOX, _POSITIVE_WITHOUT = 0.4, 0.5


@dataclass(frozen=True)
class Cells:
    """A window's cells as places in its volume, but for an elastic deformation of a cell or so.

    Attributes:
        matrix: (3, 3) from the window's -1..1 to voxels.
        origin: (3,) the window's centre.
        edge: cells along each axis.
        faces: (2, 3) in cells, of what counts: of the window, unless another one is about it.
    """

    matrix: NDArray[np.float64]
    origin: NDArray[np.float64]
    edge: int
    faces: NDArray[np.float64] | None = None

    def within(self, window: Window, view: View) -> Cells:
        """The same cells, with all counting that lies in a window with parallel axes about them."""
        corners = self._of(view.of_volume(np.array([window.start, window.stop]) - 0.5))
        return dataclasses.replace(self, faces=np.stack([corners.min(0), corners.max(0)]))

    @property
    def _faces(self) -> tuple[Any, Any]:
        return (-0.5, self.edge - 0.5) if self.faces is None else (self.faces[0], self.faces[1])

    def clicks(
        self,
        objects: Sequence[TrainingObject],
        rng: np.random.Generator,
        rounds: int,
        boxed: bool,
    ) -> tuple[NDArray[np.float64], ...]:
        """Positive clicks on objects, those outside left out.

        Args:
            objects: that are clicked on.
            rng: of the plan.
            rounds: with clicks.
            boxed: whether objects have boxes; without, the first click of each is its deepest
                point. The others lie between that and its border.

        Returns:
            For each round, (n, 3) cells.
        """
        deepest = np.array([one.deepest for one in objects], float).reshape(-1, 3)
        low, high = self._faces
        found = []
        for number in range(rounds):
            if not boxed and number == 0:
                points = deepest
            else:
                share = _POSITIVE_WITH_BOX if boxed else _POSITIVE_WITHOUT
                clicked = rng.random(len(objects)) < share
                border = [one.surface[rng.integers(len(one.surface))] for one in objects]
                away = np.array(border).reshape(-1, 3) - deepest
                points = (deepest + rng.uniform(0, 0.8, (len(objects), 1)) * away)[clicked]
            places = self._of(points)
            found.append(places[((places > low) & (places < high)).all(1)])
        return tuple(found)

    def boxes(
        self,
        objects: Sequence[TrainingObject],
        view: View,
        cell: Point,
        rng: np.random.Generator,
    ) -> NDArray[np.float64]:
        """(n, 2, 3) boxes, those outside left out; upright, however the window is turned."""
        padded = [view.edges_of(one, view.draw_padding(rng)) for one in objects]
        edges = np.array(padded).reshape(-1, 2, 3)
        half = (edges[:, 1] - edges[:, 0]) / 2 / np.array(cell)
        centre = self._of(view.of_volume(edges.mean(1)))
        low, high = self._faces
        near = ((centre + half > low) & (centre - half < high)).all(1)
        return np.stack([centre - half, centre + half], 1)[near]

    def _of(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 3) voxels as cells."""
        u = (points - self.origin) @ np.linalg.inv(self.matrix).T
        places: NDArray[np.float64] = (u + 1) * (self.edge / 2) - 0.5
        return places
