"""Voxels and those beside them: pairs along an axis, growth, background that is shut in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inference.geometry import Triple

Slices = tuple[slice, ...]


def pairs(dimensions: int, axis: int, step: int = 1) -> tuple[Slices, Slices]:
    """Indices of the lower and of the upper ones of all elements ``step`` apart along an axis."""
    low, high = [slice(None)] * dimensions, [slice(None)] * dimensions
    low[axis], high[axis] = slice(None, -step), slice(step, None)
    return tuple(low), tuple(high)


def dilated(mask: NDArray[np.bool_], reach: Triple) -> NDArray[np.bool_]:
    """Dilation of a (d, h, w) mask by a cuboid of ``reach`` voxels to every side, axis by axis."""
    for axis, steps in enumerate(reach):
        done = 0
        while done < steps:
            step = min(done + 1, steps - done)  # by a longer one, places between would be missed
            low, high = pairs(3, axis, step)
            grown = mask.copy()
            grown[high] |= mask[low]
            grown[low] |= mask[high]
            mask, done = grown, done + step
    return mask


def shut_in(background: NDArray[np.unsignedinteger], count: int) -> NDArray[np.bool_]:
    """Which components of a background touch none of the volume's faces.

    Args:
        background: (d, h, w), components from 1 on; 0 is the object.
        count: of components.

    Returns:
        (count + 1,), by number; the object is not among them.
    """
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False
    for axis in range(3):
        for side in (0, -1):
            enclosed[background.take(side, axis)] = False
    return enclosed
