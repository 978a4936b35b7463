"""The challenge's simulated user: where the next click of each class goes.

One click a class and round, at the point deepest inside the largest 26-connected component of the
voxels where prediction and reference disagree; a foreground click where the object was missed, a
background click where it was overdrawn. Rule and constants are those of the evaluator of the CVPR
2025 challenge on interactive 3D biomedical segmentation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cc3d
import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training.evaluation.label_map import LabelMap, union

_SEED = 42
_HALVED_ABOVE = 60_000_000  # voxels of the padded component
# Squared distances are whole numbers, exact in float32 up to 2^24.
_EXACT_EDGE = 4096


class SimulatedClick(NamedTuple):
    """A click: voxel (z, y, x), and whether it says "belongs to the object"."""

    position: tuple[int, int, int]
    positive: bool


def next_click(reference: LabelMap, prediction: LabelMap, label: int) -> SimulatedClick | None:
    """The next click for one class, or None where prediction and reference agree.

    Args:
        reference: true labels.
        prediction: same shape.
        label: the class.
    """
    box = union([reference.boxes.get(label), prediction.boxes.get(label)])
    if box is None:
        return None
    truth = reference.voxels[box] == label
    error = (prediction.voxels[box] == label) != truth
    component, start = _largest_component(error)
    if component is None:
        return None
    deepest = np.argwhere(_deepest(component))
    # The evaluator seeds anew for every click; a generator of its own leaves the global one alone.
    chosen = deepest[np.random.RandomState(_SEED).choice(len(deepest))] + start
    positive = bool(truth[tuple(chosen)])
    z, y, x = (int(c) + edge.start for c, edge in zip(chosen, box, strict=True))
    return SimulatedClick((z, y, x), positive)


def _largest_component(
    error: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_] | None, NDArray[np.intp]]:
    """The largest 26-connected component, cut out, and where; the first of equally large ones."""
    # As bytes: cc3d 4.1.1 fails on rows of bools with many components.
    components, count = cc3d.connected_components(
        error.view(np.uint8), connectivity=26, return_N=True
    )
    if count == 0:
        return None, np.zeros(3, np.intp)
    statistics = cc3d.statistics(components, no_slice_conversion=True)
    largest = int(np.argmax(statistics["voxel_counts"][1:])) + 1
    z0, z1, y0, y1, x0, x1 = (int(edge) for edge in statistics["bounding_boxes"][largest])
    cut = components[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1] == largest
    return cut, np.array([z0, y0, x0])


def _deepest(component: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where the distance to the background is largest; beyond the cut-out there is background."""
    shape = component.shape
    padding = [max(n // 4, 1) for n in shape]
    if math.prod(n + 2 * p for n, p in zip(shape, padding, strict=True)) > _HALVED_ABOVE:
        depth = _depth_at_half_resolution(component, padding)
    elif max(shape) <= _EXACT_EDGE:
        depth = edt.edtsq(component, black_border=True)
    else:
        depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1, 1:-1]
    depth *= component
    highest = depth.max()
    return depth == highest if highest > 0 else component


def _depth_at_half_resolution(
    component: NDArray[np.bool_], padding: list[int]
) -> NDArray[np.float32]:
    """Squared depth on a grid of half the resolution, repeated to full, as the evaluator has it.

    The blocks of 2^3 voxels start at the padding's corner, and the padded array has no border.
    """
    # Odd sizes are completed with background.
    padded = np.pad(
        component,
        [(p, p + n % 2) for p, n in zip(padding, component.shape, strict=True)],
    )
    d, h, w = (n // 2 for n in padded.shape)
    halved = padded.reshape(d, 2, h, 2, w, 2).max(axis=(1, 3, 5))
    depth = edt.edtsq(halved, black_border=False)
    for axis in range(3):
        depth = depth.repeat(2, axis=axis)
    crop = tuple(slice(p, p + n) for p, n in zip(padding, component.shape, strict=True))
    return depth[crop]
