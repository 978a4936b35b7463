"""What is measured on an object before its post-processing is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray

from inference.adaptive_steps import Mask, Region
from inference.logits import Logits, expected_dice
from inference.neighbours import pairs

_SHELL = 2  # voxels on either side of the boundary in which intensities are compared
_MOST_CONTRAST = 100.0  # of a noiseless image
_UNSURE = math.log(0.9 / 0.1)  # logits between -this and this are unsure


@dataclass(frozen=True)
class ObjectFeatures:
    """Measurements of one object; all finite, so that a rule can compare any of them.

    Attributes:
        voxels: of the mask.
        voxel_mm: edge of a cube of a voxel's volume.
        anisotropy: longest over shortest edge of a voxel, 1 or more.
        sphericity: of the mask by its voxel faces: area of the ball of equal volume over its area;
            about 0.67 for a ball, towards 0 for what is thin, ragged or scattered.
        scatter: share of the mask outside of its largest 26-connected component.
        expected_dice: what the network expects of its mask.
        unsure: voxels with a probability from 0.1 to 0.9, as a multiple of the mask.
        contrast: difference of mean intensity between the two shells of 2 voxels on either side of
            the boundary, in units of their pooled standard deviation.
        noise: standard deviation between face neighbours in the inner shell, over the standard
            deviation of both shells.
        sharpness: mean intensity step across the boundary's faces over the shells' difference;
            1 is a step within one voxel, 0 no edge where the boundary is.
        clicks: number of clicks so far.
        boxed: 1 with a box, 0 without.
    """

    voxels: float
    voxel_mm: float
    anisotropy: float
    sphericity: float
    scatter: float
    expected_dice: float
    unsure: float
    contrast: float
    noise: float
    sharpness: float
    clicks: float
    boxed: float


FEATURES = tuple(ObjectFeatures.__dataclass_fields__)


def measure(
    logits: Logits, image: NDArray[np.generic], region: Region, clicks: int
) -> ObjectFeatures:
    """Measure an object.

    Args:
        logits: (d, h, w) float32, positive somewhere.
        image: (d, h, w), any real dtype: the same cut-out.
        region: what is known about it.
        clicks: number of clicks given.
    """
    mask = logits > 0
    voxels = int(np.count_nonzero(mask))
    spacing = region.spacing_mm
    voxel_volume = math.prod(spacing)
    components = cc3d.connected_components(mask.view(np.uint8), connectivity=26)
    sizes = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    inner, outer = _shells(mask)
    values = image.astype(np.float32)
    contrast, noise, sharpness = _edge(values, mask, inner, outer)
    return ObjectFeatures(
        voxels=voxels,
        voxel_mm=voxel_volume ** (1 / 3),
        anisotropy=max(spacing) / min(spacing),
        sphericity=_sphericity(mask, spacing, voxels * voxel_volume),
        scatter=1 - int(sizes.max()) / voxels,
        expected_dice=expected_dice(logits),
        unsure=np.count_nonzero(np.abs(logits) < _UNSURE) / voxels,
        contrast=contrast,
        noise=noise,
        sharpness=sharpness,
        clicks=clicks,
        boxed=region.slices is not None,
    )


def _shells(mask: Mask) -> tuple[Mask, Mask]:
    """The voxels within 2 face steps of the boundary: of the object, and around it."""
    grown, shrunk = mask, mask
    for _ in range(_SHELL):
        grown, shrunk = _grown(grown), ~_grown(~shrunk)
    return mask & ~shrunk, grown & ~mask


def _grown(mask: Mask) -> Mask:
    """The mask and its face neighbours."""
    grown = mask.copy()
    for axis in range(3):
        low, high = pairs(3, axis)
        grown[high] |= mask[low]
        grown[low] |= mask[high]
    return grown


def _sphericity(mask: Mask, spacing: tuple[float, float, float], volume: float) -> float:
    """Area of the ball of the mask's volume over the area of the mask's faces."""
    area = 0.0
    for axis in range(3):
        low, high = pairs(3, axis)
        faces = int(np.count_nonzero(mask[low] != mask[high]))
        faces += sum(int(np.count_nonzero(mask.take(side, axis))) for side in (0, -1))
        area += faces * math.prod(spacing) / spacing[axis]
    return float(math.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area)


def _edge(
    image: NDArray[np.float32], mask: Mask, inner: Mask, outer: Mask
) -> tuple[float, float, float]:
    """Contrast, noise and sharpness at the boundary; zeros where there is no boundary."""
    if not inner.any() or not outer.any():
        return 0.0, 0.0, 0.0
    inside, outside = image[inner], image[outer]
    difference = float(inside.mean(dtype=np.float64) - outside.mean(dtype=np.float64))
    deviation = math.sqrt((float(inside.var()) + float(outside.var())) / 2)
    step, faces, square, neighbours = 0.0, 0, 0.0, 0
    for axis in range(3):
        low, high = pairs(3, axis)
        change = image[high] - image[low]
        entering = mask[high] & ~mask[low]
        leaving = mask[low] & ~mask[high]
        step += float(change[entering].sum()) - float(change[leaving].sum())
        faces += int(np.count_nonzero(entering) + np.count_nonzero(leaving))
        within = change[inner[low] & inner[high]]
        square += float(np.square(within).sum())
        neighbours += within.size
    noise = math.sqrt(square / (2 * neighbours)) if neighbours else 0.0
    return (
        min(abs(difference) / deviation, _MOST_CONTRAST) if deviation else 0.0,
        noise / deviation if deviation else 0.0,
        step / faces / difference if faces and abs(difference) > 1e-6 else 0.0,
    )
