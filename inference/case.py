"""A case: one image with the prompts of its objects. The only reader and validator of input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Click(NamedTuple):
    """One click: voxel index (z, y, x) and whether it marks the object (else background)."""

    position: tuple[int, int, int]
    positive: bool


@dataclass(frozen=True)
class Box:
    """A bounding box in voxels, half-open, (z, y, x).

    The z range is exact. The y and x ranges are those of slice ``middle`` only (padded by a few
    voxels): on other slices the object may leave them.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    middle: int


@dataclass(frozen=True)
class ObjectPrompts:
    """What a user said about one object: label 1..255, a box or none, clicks oldest first."""

    label: int
    box: Box | None = None
    clicks: tuple[Click, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True where nothing was said: the object is left empty."""
        return self.box is None and not self.clicks


@dataclass(frozen=True)
class Case:
    """One image and its prompts.

    Attributes:
        name: file name, for messages and for the output.
        image: (D, H, W), any real dtype, finite, nominally 0..255.
        spacing_mm: voxel size (z, y, x).
        objects: one entry a label, ascending, labels 1..N.
        previous: (D, H, W) uint8 label map of the last round, or None.
        notes: what was repaired while reading, one sentence each.
    """

    name: str
    image: NDArray[np.generic]
    spacing_mm: tuple[float, float, float]
    objects: tuple[ObjectPrompts, ...]
    previous: NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()
