"""A label map with the bounding box of every label, found once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Crop = tuple[slice, slice, slice]


@dataclass(frozen=True)
class LabelMap:
    """Labels of a volume and where each of them lies.

    Attributes:
        voxels: (D, H, W) unsigned integers, 0 is background.
        boxes: tight bounding box of each label that occurs (background excepted).
    """

    voxels: NDArray[np.unsignedinteger]
    boxes: dict[int, Crop]

    @classmethod
    def of(cls, voxels: NDArray[np.generic]) -> LabelMap:
        """Index ``voxels``: (D, H, W), any dtype whose values are whole and at least 0."""
        if voxels.ndim != 3:
            raise ValueError(f"a label map of shape {voxels.shape}; accepted: (D, H, W)")
        voxels = as_labels(voxels)
        found = ndimage.find_objects(voxels)
        return cls(voxels, {i + 1: box for i, box in enumerate(found) if box is not None})

    @property
    def labels(self) -> list[int]:
        """The labels that occur, ascending, background excepted."""
        return sorted(self.boxes)


def as_labels(voxels: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """``voxels`` as uint8, or uint16 where a label is over 255; ValueError where that loses."""
    if voxels.dtype in (np.uint8, np.uint16):
        return voxels
    if voxels.size == 0:
        return voxels.astype(np.uint8)
    low, high = voxels.min(), voxels.max()
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"labels {low} to {high}; accepted: 0 to 65535")
    labels = voxels.astype(np.uint8 if high <= 255 else np.uint16)
    if not np.array_equal(labels, voxels):
        raise ValueError("labels that are not whole numbers; accepted: integers, 0 is background")
    return labels


def union(boxes: Sequence[Crop | None]) -> Crop | None:
    """The smallest box around all given ones (None counts as empty)."""
    known = [box for box in boxes if box is not None]
    if not known:
        return None
    z, y, x = (
        slice(min(box[axis].start for box in known), max(box[axis].stop for box in known))
        for axis in range(3)
    )
    return z, y, x


def intersection(box: Crop | None, other: Crop | None) -> Crop | None:
    """What two boxes share, None where that is empty."""
    if box is None or other is None:
        return None
    z, y, x = (
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, other, strict=True)
    )
    return (z, y, x) if all(edge.start < edge.stop for edge in (z, y, x)) else None
