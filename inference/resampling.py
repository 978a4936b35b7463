"""Voxels of a window to cells of its grid and back, on any device."""

from __future__ import annotations

import functools
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
    volume = volume.contiguous()
    parts = keep or (slice(None), slice(None), slice(None))
    sizes = [len(range(*part.indices(n))) for part, n in zip(parts, shape, strict=True)]
    for axis in sorted((1, 2, 3), key=lambda a: sizes[a - 1] / volume.shape[a]):  # shrink first
        before, n, part = volume.shape[:axis], volume.shape[axis], parts[axis - 1]
        m = shape[axis - 1]
        if n == m:
            volume = volume[(slice(None),) * axis + (part,)].contiguous()
            continue
        matrix = _matrix(n, m)[:, part].to(volume.device, volume.dtype)
        if axis == 3:
            volume = volume @ matrix
        else:  # the axes behind are one: (..., n, rest), so that nothing is transposed
            after = volume.shape[axis + 1 :]
            volume = (matrix.T @ volume.reshape(*before, n, -1)).reshape(*before, -1, *after)
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
def _matrix(n: int, m: int) -> Tensor:
    """(n, m) weights of n input voxels in each of m output cells; columns sum to 1."""
    weights = np.zeros((n, m), np.float32)
    if m > n:
        position = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        low = np.minimum(position.astype(int), max(n - 2, 0))
        high = np.minimum(low + 1, n - 1)
        np.add.at(weights, (low, np.arange(m)), 1 - (position - low))
        np.add.at(weights, (high, np.arange(m)), position - low)
    else:
        edges = np.arange(m + 1) * n / m
        voxels = np.arange(n)
        overlap = np.minimum(edges[1:], voxels[:, None] + 1) - np.maximum(
            edges[:-1], voxels[:, None]
        )
        weights[:] = np.clip(overlap, 0, None) * m / n
    return torch.from_numpy(weights)


def to_tensor(voxels: NDArray[np.generic], device: torch.device | str = "cpu") -> Tensor:
    """(D, H, W) array of any real dtype -> (1, D, H, W) float32 on ``device``."""
    if voxels.dtype not in (np.uint8, np.float32):
        voxels = voxels.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(voxels))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # uint8 crosses the bus, floats are made on the device
    return tensor.to(device, non_blocking=True).float()[None]
