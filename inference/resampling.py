"""Voxels of a window to cells of its grid and back, on any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from inference.geometry import Window

_LEAST_SHARE = 0.25
_SHARES = (0.5, 0.45, 0.4, 0.35, 0.3, _LEAST_SHARE)


def resample(
    volume: Tensor, shape: tuple[int, int, int], keep: tuple[slice, slice, slice] | None = None
) -> Tensor:
    """Resample (B, D, H, W) to (B, *shape), the outer voxel edges aligned.

    Linear interpolation along an axis that grows; along one that shrinks the mean of the voxels
    under each cell, weighted by their overlap, so that none is skipped. A size that stays is
    copied exactly. The filter is separable: one small matrix an axis.

    Args:
        volume: (B, D, H, W) float.
        shape: output size.
        keep: the part of the output to compute; all of it by default.
    """
    parts = keep or (slice(None), slice(None), slice(None))
    maps: list[slice | Tensor] = []
    for n, m, part in zip(volume.shape[1:], shape, parts, strict=True):
        first, last, _ = part.indices(m)
        maps.append(slice(first, last) if n == m else _matrix(n, m, first, last))
    return _mapped(volume, maps)


def window_cells(
    volume: NDArray[np.generic],
    window: Window,
    device: torch.device | str = "cpu",
    *,
    edge: bool = False,
    label: int | None = None,
) -> Tensor:
    """What a window shows of a volume: its voxels there, as :func:`resample` has them.

    A window may reach as far beyond the volume as it likes: only voxels that exist are touched.

    Args:
        volume: (D, H, W), any real dtype.
        window: where, and in which grid.
        device: where to compute.
        edge: beyond the volume its outermost voxels go on, else there are zeros.
        label: of a label map, the one whose share of each cell is wanted.

    Returns:
        (1, *window.shape) float32.
    """
    places: list[slice] = []
    maps: list[slice | Tensor] = []
    for start, stop, m, n in zip(
        window.start, window.stop, window.shape, volume.shape, strict=True
    ):
        low, high = min(max(start, 0), n), max(min(stop, n), 0)
        if edge and low >= high:  # nothing in sight: the nearest voxel is all there is
            low = min(low, n - 1)
            high = low + 1
        if low >= high:
            return torch.zeros((1, *window.shape), device=device)
        places.append(slice(low, high))
        size = stop - start
        if size == m == high - low:
            maps.append(slice(None))
        else:
            maps.append(_matrix(size, m, 0, m, low - start, high - start, edge))
    part = volume[places[0], places[1], places[2]]
    if label is not None:
        part = (part == label).view(np.uint8)
    return _mapped(to_tensor(part, device), maps)


def _mapped(volume: Tensor, maps: Sequence[slice | Tensor]) -> Tensor:
    """(B, D, H, W), each axis mapped: the part to copy, or (inputs, outputs) weights."""
    volume = volume.contiguous()

    def growth(axis: int) -> float:
        n, how = volume.shape[axis], maps[axis - 1]
        return (len(range(n)[how]) if isinstance(how, slice) else how.shape[1]) / n

    for axis in sorted((1, 2, 3), key=growth):  # shrink first
        how, n, before = maps[axis - 1], volume.shape[axis], volume.shape[:axis]
        if isinstance(how, slice):
            volume = volume[(slice(None),) * axis + (how,)].contiguous()
            continue
        matrix = how.to(volume.device, volume.dtype)
        if axis == 3:
            volume = volume @ matrix
        else:  # the axes behind are one: (..., n, rest), so that nothing is transposed
            after = volume.shape[axis + 1 :]
            flat = matrix.T @ volume.reshape(*before, n, math.prod(after))
            volume = flat.reshape(*before, matrix.shape[1], *after)
    return volume


def covered_cells(share: Tensor) -> Tensor:
    """Which cells belong to an object that covers shares of them.

    One half is the threshold, unless an object of thin layers would lose volume by it: then the one
    that keeps the volume best, down to ``_LEAST_SHARE``.

    Args:
        share: (B, D, H, W) of an object each, 0..1.

    Returns:
        (B, D, H, W) bool.
    """
    thresholds = torch.tensor(_SHARES, device=share.device)
    volume = share.sum((1, 2, 3))
    counts = torch.stack([(share > t).sum((1, 2, 3)) for t in _SHARES])
    best = (counts - volume).abs().argmin(0)
    return share > thresholds[best][:, None, None, None]


def transfer(values: Tensor, source: Window, target: Window, fill: float) -> Tensor:
    """Values on one window's grid, linearly interpolated at the cells of another's.

    Args:
        values: (B, *source.shape) float.
        source: the window the values belong to.
        target: the window to look through.
        fill: for cells outside of ``source``.

    Returns:
        (B, *target.shape).
    """
    axes = []
    for axis in range(3):
        first, last = (
            source.to_grid(target.to_volume((i, i, i)))[axis] for i in (0, target.shape[axis] - 1)
        )
        cells = torch.linspace(first, last, target.shape[axis], device=values.device)
        axes.append((2 * cells + 1) / source.shape[axis] - 1)  # grid_sample's -1..1, edge to edge
    z, y, x = (axis.abs() <= 1 for axis in axes)
    inside = z[:, None, None] & y[:, None] & x
    moved = interpolate(values, axes)
    return torch.where(inside, moved, moved.new_tensor(fill))


def interpolate(values: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """(B, D, H, W) values, linearly interpolated at the cells of a grid with parallel axes.

    Args:
        values: float.
        axes: where the cells lie along z, y, x: -1 and 1 are the values' outer edges. Beyond them
            the outermost values go on.
    """
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack((x, y, z), -1)
    return F.grid_sample(values[None], grid[None], padding_mode="border", align_corners=False)[0]


@functools.lru_cache(maxsize=256)
def _matrix(
    n: int, m: int, first: int, last: int, low: int = 0, high: int | None = None, edge: bool = True
) -> Tensor:
    """Weights of voxels in cells, where n voxels of a window are m cells of its grid.

    Args:
        n, m: of the window.
        first, last: the cells that are wanted.
        low, high: the voxels that there are, counted from the window's start; all by default.
        edge: the others are as the nearest of these, else zero.

    Returns:
        (high - low, last - first); columns sum to 1, with zeros outside perhaps to less.
    """
    high = n if high is None else high
    weights = np.zeros((high - low, last - first), np.float32)
    cells = np.arange(first, last)
    if m > n:
        position = np.clip((cells + 0.5) * n / m - 0.5, 0, n - 1)
        left = np.minimum(position.astype(int), max(n - 2, 0))
        for voxel, share in (
            (left, 1 - (position - left)),
            (np.minimum(left + 1, n - 1), position - left),
        ):
            there = (low <= voxel) & (voxel < high) | edge
            held = np.clip(voxel, low, high - 1) - low
            np.add.at(weights, (held[there], cells[there] - first), share[there])
        return torch.from_numpy(weights)
    edges = np.arange(first, last + 1) * n / m
    voxels = np.arange(low, high)[:, None]
    # The outermost voxels go on for ever.
    begin, end = voxels.astype(float), voxels + 1.0
    if edge:
        begin[0], end[-1] = -np.inf, np.inf
    overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    weights[:] = np.clip(overlap, 0, None) * m / n
    return torch.from_numpy(weights)


def to_tensor(voxels: NDArray[np.generic], device: torch.device | str = "cpu") -> Tensor:
    """(D, H, W) array of any real dtype -> (1, D, H, W) float32 on ``device``."""
    if voxels.dtype not in (np.uint8, np.float32):
        voxels = voxels.astype(np.float32)
    voxels = np.ascontiguousarray(voxels)
    # Strides below 0 are of an axis of one voxel, turned round.
    if min(voxels.strides, default=0) < 0 or not voxels.flags.writeable:
        voxels = voxels.copy()
    tensor = torch.from_numpy(voxels)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # uint8 crosses the bus, floats are made on the device
    return tensor.to(device, non_blocking=True).float()[None]
