"""The paper's five post-processing steps (section 2.2), with the paper's parameters.

1. ``remove_small_components``: components under 64 voxels are noise.
2. ``fill_holes``: cavities of an object belong to it.
3. ``close_gaps``: morphological closing with a 3x3x3 structuring element.
4. ``smooth``: Gaussian of sigma 0.8 voxel, threshold 0.5.
5. ``resolve_overlaps``: where two objects claim a voxel, the lower label has priority.

What the paper leaves open is settled so: components and cavities are face-connected, SciPy's
default; a cavity open to the volume's border is none; beyond the border lies background for the
closing, which therefore never removes a voxel, and the mirror image for the Gaussian, so that an
object cut off by the border keeps its cut face; "above 0.5" is strict. Steps 1-4 run on every
object by itself; step 5 merges what they give. The steps know nothing of clicks: a click may lose
its voxel, in the paper as here.

No step lets an object leave its bounding box, so each works on that box alone; the tests hold the
result equal, bit for bit, to whole-volume SciPy calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import TypeVar

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inference.neighbours import dilated, shut_in

MINIMUM_VOXELS = 64
SIGMA_VOXELS = 0.8

SMALL, HOLES, CLOSING, SMOOTHING = OBJECT_STEPS = ("small", "holes", "closing", "smoothing")

# The Gaussian's reach, as SciPy truncates it at four sigma.
RADIUS = int(4.0 * SIGMA_VOXELS + 0.5)

# Edge of the blocks that are smoothed one by one: small enough for the cache, large enough for the
# interpreter's share to vanish. 32 was fastest of 16, 32, 48, 64 and 96.
_TILE = 32

# More than rounding in single precision can move a smoothed value (about 20 roundings of 2^-24).
_ROUNDING = 2e-6

Labels = TypeVar("Labels", bound=np.generic)
Span = tuple[slice, slice, slice]


def postprocess(label_map: NDArray[Labels]) -> NDArray[Labels]:
    """All five steps on a label map.

    Args:
        label_map: (D, H, W), unsigned integers, 0 is background. Left as it is.

    Returns:
        (D, H, W), same type.

    Raises:
        ValueError: an array that is no label map.
    """
    _check(label_map, "u")
    return resolve_overlaps(_clean_objects(label_map), label_map)


def clean_object(
    mask: NDArray[np.bool_],
    start: tuple[int, int, int],
    shape: tuple[int, ...],
    steps: Collection[str] = OBJECT_STEPS,
) -> tuple[Span, NDArray[np.bool_]] | None:
    """Steps 1-4, or some of them, on one object's own mask.

    Args:
        mask: (d, h, w), all of the object.
        start: its first voxel in the volume.
        shape: of the volume.
        steps: of :data:`OBJECT_STEPS`; applied in their order.

    Returns:
        A region of the volume and the mask in it; None where nothing is left.
    """
    if not mask.size:
        return None
    if SMALL in steps:
        mask = remove_small_components(mask)
    box = ndimage.find_objects(mask.view(np.uint8))
    if not box:
        return None
    z, y, x = (slice(side.start + a, side.stop + a) for side, a in zip(box[0], start, strict=True))
    region = _grow((z, y, x), shape)
    cut = np.zeros([side.stop - side.start for side in region], bool)
    inner = tuple(
        slice(side.start - outer.start, side.stop - outer.start)
        for side, outer in zip((z, y, x), region, strict=True)
    )
    cut[inner] = mask[box[0]]
    for name, step in ((HOLES, fill_holes), (CLOSING, close_gaps), (SMOOTHING, smooth)):
        if name in steps:
            cut = step(cut)
    return region, cut


def _clean_objects(label_map: NDArray[Labels]) -> Iterable[tuple[int, Span, NDArray[np.bool_]]]:
    """Steps 1-4: label, region and mask within the region of every object that remains."""
    kept = remove_small_components(label_map)
    for label, box in enumerate(ndimage.find_objects(kept), start=1):
        if box is None:
            continue
        region = _grow(box, label_map.shape)
        mask = kept[region] == label
        yield label, region, smooth(close_gaps(fill_holes(mask)))


def _grow(box: Span, shape: tuple[int, ...]) -> Span:
    """The box with the Gaussian's reach about it: what lies beyond cannot change the result."""
    z, y, x = (
        slice(max(side.start - RADIUS, 0), min(side.stop + RADIUS, size))
        for side, size in zip(box, shape, strict=True)
    )
    return (z, y, x)


def remove_small_components(
    label_map: NDArray[Labels], minimum_voxels: int = MINIMUM_VOXELS
) -> NDArray[Labels]:
    """Set to background every face-connected component of one label under ``minimum_voxels``.

    Args:
        label_map: (D, H, W), a mask (bool) or a label map (unsigned integers): all labels are
            treated at once.
        minimum_voxels: size a component must reach to stay.

    Returns:
        A new array, same shape and type.
    """
    _check(label_map, "bu")
    kept = label_map.copy()
    components = cc3d.connected_components(label_map, connectivity=6)
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"]
    stays = voxels >= minimum_voxels
    for plane, numbers in zip(kept, components, strict=True):  # the index is 8 bytes a voxel
        plane *= stays[numbers]
    return kept


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill the cavities of a mask (D, H, W): background no face-connected path leads out of."""
    _check(mask, "b")
    filled = mask.copy()
    components, count = cc3d.connected_components(~mask, connectivity=6, return_N=True)
    is_hole = shut_in(components, count)
    if is_hole.any():
        for plane, numbers in zip(filled, components, strict=True):
            plane |= is_hole[numbers]
    return filled


def close_gaps(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Close a mask (D, H, W) with a 3x3x3 structuring element, background lying beyond the border.

    Done as a maximum and a minimum of three neighbours along one axis after the other.
    """
    _check(mask, "b")
    cube = (1, 1, 1)
    eroded = ~dilated(~dilated(np.pad(mask, 1), cube), cube)
    return eroded[1:-1, 1:-1, 1:-1]


def smooth(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Blur a mask (D, H, W) with a Gaussian of 0.8 voxel and keep what is above 0.5.

    The mask is mirrored at its border. Only a voxel with an unlike voxel among its 26 neighbours
    can change (a uniform 3x3x3 block holds 0.87 of the kernel), so only blocks that have such
    voxels are computed: in single precision, and again as SciPy does it where that comes so near
    to 0.5 that rounding could decide.
    """
    _check(mask, "b")
    padded = np.pad(mask, RADIUS, mode="symmetric")
    smoothed = mask.copy()
    for corner in product(*(range(0, size, _TILE) for size in mask.shape)):
        sizes = [min(_TILE, size - start) for size, start in zip(mask.shape, corner, strict=True)]
        with_neighbours = padded[_span(corner, sizes, offset=RADIUS - 1, border=2)]
        if not with_neighbours.any() or with_neighbours.all():
            continue
        tile = padded[_span(corner, sizes, offset=0, border=2 * RADIUS)]
        values = _blur(tile)
        if (np.abs(values - 0.5) < _ROUNDING).any():
            inner = (slice(RADIUS, -RADIUS),) * 3
            values = ndimage.gaussian_filter(tile.astype(np.float64), SIGMA_VOXELS)[inner]
        smoothed[_span(corner, sizes, offset=0, border=0)] = values > 0.5
    return smoothed


def _span(corner: tuple[int, ...], sizes: list[int], offset: int, border: int) -> Span:
    z, y, x = (
        slice(start + offset, start + offset + size + border)
        for start, size in zip(corner, sizes, strict=True)
    )
    return (z, y, x)


def _gaussian_kernel() -> NDArray[np.float32]:
    """The half kernel from the centre outwards, normalised over its whole length."""
    distances = np.arange(RADIUS + 1)
    half = np.exp(-0.5 * (distances / SIGMA_VOXELS) ** 2)
    kernel: NDArray[np.float32] = (half / (2 * half.sum() - half[0])).astype(np.float32)
    return kernel


def _blur(tile: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Gaussian of a tile, less its margin of ``RADIUS`` voxels on every side."""
    kernel = _gaussian_kernel()
    values: NDArray[np.float32] = tile.astype(np.float32)
    for axis in range(3):
        blurred: NDArray[np.float32] = _shifted(values, axis, 0) * kernel[0]
        for step in range(1, RADIUS + 1):
            pair = _shifted(values, axis, -step) + _shifted(values, axis, step)
            pair *= kernel[step]
            blurred += pair
        values = blurred
    return values


def _shifted(values: NDArray[np.float32], axis: int, step: int) -> NDArray[np.float32]:
    """The part of a tile within its margin along one axis, moved by up to that margin."""
    index = [slice(None)] * 3
    index[axis] = slice(RADIUS + step, values.shape[axis] - RADIUS + step)
    part: NDArray[np.float32] = values[tuple(index)]
    return part


def resolve_overlaps(
    objects: Iterable[tuple[int, Span, NDArray[np.bool_]]], like: NDArray[Labels]
) -> NDArray[Labels]:
    """Merge objects into one label map; where two claim a voxel the lower label has priority.

    Args:
        objects: label, region of the volume and mask within that region.
        like: an array of the label map's shape and type.

    Returns:
        (D, H, W), same type as ``like``.
    """
    label_map = np.zeros_like(like)
    for label, region, mask in objects:
        current = label_map[region]
        current[mask & ((current == 0) | (current > label))] = label
    return label_map


def _check(array: NDArray[np.generic], kinds: str) -> None:
    if array.ndim != 3 or not array.size or array.dtype.kind not in kinds:
        accepted = {"b": "bool", "u": "unsigned integers", "bu": "bool or unsigned integers"}[kinds]
        raise ValueError(
            f"received {array.dtype} of shape {array.shape}: "
            f"accepted are {accepted} of shape (D, H, W), none of them 0"
        )
