"""Normalised surface distance (NSD): the surface Dice coefficient at a tolerance.

Nikolov et al. 2018 (arXiv:1809.04430), as the ``surface-distance`` package computes it: surface
elements sit on the corners between voxels, an element's area depends on which of the eight voxels
around the corner belong to the object, and an element counts where the other surface has an
element within the tolerance. The table of areas is the package's own; the distances are not
computed at all, only whether they exceed the tolerance.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from training.evaluation.label_map import Crop

Spacing = tuple[float, float, float]

# Up to this many offsets the ball of the tolerance is searched offset by offset; a larger ball
# costs more than a k-d tree of what its innermost offsets left over.
_MAX_OFFSETS = 400


@dataclass(frozen=True)
class Surface:
    """The surface elements of one object.

    Attributes:
        start: corner index (z, y, x) of the first cell of ``is_surface``.
        is_surface: (d+1, h+1, w+1) which corners of the object's bounding box are elements.
        corners: (N, 3) indices of the elements in the volume's corner grid, C order.
        areas: (N,) mm^2.
    """

    start: tuple[int, int, int]
    is_surface: NDArray[np.bool_]
    corners: NDArray[np.intp]
    areas: NDArray[np.float64]


def surface_dice(
    reference: Surface | None, prediction: Surface | None, spacing: Spacing, tolerance: float
) -> float:
    """Share of the two surfaces' area that lies within the tolerance of the other surface.

    Args:
        reference: surface of the reference mask, None where that is empty.
        prediction: surface of the predicted mask, None where that is empty.
        spacing: edge lengths of a voxel along the arrays' three axes, mm.
        tolerance: mm; a distance equal to it counts as within.

    Returns:
        0..1; 0 where one mask is empty, NaN where both are.
    """
    if reference is None and prediction is None:
        return math.nan
    if reference is None or prediction is None:
        return 0.0
    near_reference = _within(reference, prediction, spacing, tolerance)
    near_prediction = _within(prediction, reference, spacing, tolerance)
    overlap = reference.areas[near_reference].sum() + prediction.areas[near_prediction].sum()
    return float(overlap / (reference.areas.sum() + prediction.areas.sum()))


def find_surface(
    voxels: NDArray[np.generic], label: int, box: Crop | None, spacing: Spacing
) -> Surface | None:
    """The surface of ``voxels == label``, which lies inside ``box``; None where that is None.

    Outside the volume there is background: an object that touches the border has a surface there.
    """
    if box is None:
        return None
    mask = voxels[box] == label
    padded = np.zeros([n + 2 for n in mask.shape], np.uint8)
    padded[1:-1, 1:-1, 1:-1] = mask
    # The eight voxels around each corner as the bits of one byte, one axis after the other.
    code = 2 * padded[:, :, :-1] + padded[:, :, 1:]
    code = 4 * code[:, :-1] + code[:, 1:]
    code = 16 * code[:-1] + code[1:]
    is_surface = (code + np.uint8(1)) > 1  # neither 0 nor 255, which wraps to 0
    corners = np.argwhere(is_surface)
    areas = _areas(spacing)[code[is_surface]]
    start = (box[0].start, box[1].start, box[2].start)
    return Surface(start, is_surface, corners + start, areas)


@functools.lru_cache(maxsize=64)
def _areas(spacing: Spacing) -> NDArray[np.float64]:
    """(256,) area in mm^2 of the surface element with each neighbourhood code."""
    return np.asarray(create_table_neighbour_code_to_surface_area(spacing), np.float64)


def _within(
    surface: Surface, other: Surface, spacing: Spacing, tolerance: float
) -> NDArray[np.bool_]:
    """(N,) whether each element of ``surface`` has one of ``other`` within the tolerance."""
    low = np.minimum(surface.corners.min(0), other.corners.min(0))
    high = np.maximum(surface.corners.max(0), other.corners.max(0))
    if math.dist(low * spacing, high * spacing) < tolerance:
        return np.ones(len(surface.corners), bool)  # nothing can be further apart
    offsets, complete = _offsets(spacing, tolerance)
    radius = np.abs(offsets).max(0)
    position = surface.corners - other.start
    reachable = np.flatnonzero(
        ((position >= -radius) & (position < other.is_surface.shape + radius)).all(1)
    )
    # Padded so that no offset of a reachable element leaves the grid.
    grid = np.pad(other.is_surface, [(2 * r, 2 * r) for r in radius])
    strides = np.array([grid.shape[1] * grid.shape[2], grid.shape[2], 1])
    cells = grid.reshape(-1)
    left, flat = reachable, (position[reachable] + 2 * radius) @ strides
    result = np.zeros(len(surface.corners), bool)
    for shift in offsets @ strides:
        hit = cells[flat + shift]
        result[left[hit]] = True
        left, flat = left[~hit], flat[~hit]
        if not len(left):
            break
    if not complete:
        rest = np.flatnonzero(~result)
        result[rest] = _within_by_tree(surface.corners[rest], other.corners, spacing, tolerance)
    return result


@functools.lru_cache(maxsize=64)
def _offsets(spacing: Spacing, tolerance: float) -> tuple[NDArray[np.intp], bool]:
    """(K, 3) corner offsets within the tolerance, nearest first, and whether that is all of them.

    Of a ball of more than ``_MAX_OFFSETS`` corners only the 27 innermost at most.
    """
    radius = [int(min(tolerance / s, _MAX_OFFSETS)) + 1 for s in spacing]
    complete = math.prod(2 * r + 1 for r in radius) <= 4 * _MAX_OFFSETS
    if not complete:
        radius = [1, 1, 1]
    cube = np.stack(
        np.meshgrid(*(np.arange(-r, r + 1) for r in radius), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    distances = _lengths(cube, spacing)
    order = np.argsort(distances, kind="stable")
    order = order[distances[order] <= tolerance]
    return cube[order], complete


def _within_by_tree(
    corners: NDArray[np.intp],
    others: NDArray[np.intp],
    spacing: Spacing,
    tolerance: float,
) -> NDArray[np.bool_]:
    """(N,) whether each of ``corners`` has one of ``others`` within the tolerance."""
    if not len(corners):
        return np.zeros(0, bool)
    tree = cKDTree(others * np.asarray(spacing), balanced_tree=False, compact_nodes=False)
    # The tree's own distances carry the rounding of absolute positions; those of the offsets, as
    # a distance transform takes them, do not, and decide at the tolerance itself.
    _, nearest = tree.query(
        corners * np.asarray(spacing), distance_upper_bound=tolerance * (1 + 1e-6)
    )
    found = nearest < len(others)
    result = np.zeros(len(corners), bool)
    offsets = corners[found] - others[nearest[found]]
    result[found] = _lengths(offsets, spacing) <= tolerance
    return result


def _lengths(offsets: NDArray[np.intp], spacing: Spacing) -> NDArray[np.float64]:
    """(N, 3) offsets in voxels -> (N,) lengths in mm."""
    z, y, x = ((offsets[:, axis] * spacing[axis]) ** 2 for axis in range(3))
    return np.sqrt(z + y + x)
