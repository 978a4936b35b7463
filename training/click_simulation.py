"""Simulated users: boxes by the challenge's rule and clicks in the error region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from inference.object_prompts import stored_box
from inference.refinement import bounding_box

Triple = tuple[float, float, float]
Click = tuple[Triple, bool]

_REACH = 24  # steps, of two cells each, over which a component is followed


def challenge_box(
    mask: NDArray[np.bool_], padding: Triple = (0.0, 0.0, 0.0)
) -> tuple[Triple, Triple, float]:
    """The challenge's box of a mask: exact in z, the rectangle of the middle slice in y and x.

    Args:
        mask: (D, H, W), not empty.
        padding: voxels added on both sides (z is ignored by the rule; pass 0).

    Returns:
        Lower edges, upper edges (z, y, x; edges lie at voxel centre +- 0.5) and the middle slice.
    """
    box = stored_box(mask)
    first = np.array([box["z_min"], box["z_mid_y_min"], box["z_mid_x_min"]])
    last = np.array([box["z_max"], box["z_mid_y_max"], box["z_mid_x_max"]])
    z0, y0, x0 = (first - 0.5 - np.array(padding)).tolist()
    z1, y1, x1 = (last + 0.5 + np.array(padding)).tolist()
    return (z0, y0, x0), (z1, y1, x1), float(box["z_mid"])


def next_clicks(
    predicted: Tensor,
    target: Tensor,
    cells: Sequence[Triple],
    chances: Sequence[float],
    rule: str,
    slack: float,
) -> list[Click | None]:
    """The next click of each window, on the device of the masks.

    The organisers click the deepest point of the largest 26-connected component of the error.
    Here components are followed on a grid of half the resolution and depth is counted in
    erosions, both in batches and without leaving the device; and any cell within ``slack`` of the
    greatest depth may be clicked, since people do not click the exact centre either.

    Args:
        predicted, target: (B, D, H, W) bool.
        cells: edge lengths of each window's cells in voxels, so that depth is counted in voxels.
        chances: B numbers in [0, 1) that choose among a window's candidates.
        rule: ``"deep"``, or ``"random"`` for anywhere in the error (SAM-Med3D's training).
        slack: 0 for the deepest cells only, 1 for anywhere in the component.

    Returns:
        For each window (z, y, x) and whether the click is positive, or None where nothing is
        wrong.
    """
    errors = predicted != target
    candidates = errors
    if rule == "deep":
        depth = error_depth(largest_component(errors), cells)
        deepest = depth.amax((1, 2, 3), keepdim=True)
        candidates = (depth > 0) & (depth >= (1 - slack) * deepest)
    flat = candidates.flatten(1)
    running = flat.cumsum(1, dtype=torch.int32)
    counts = running[:, -1:]
    wanted = (torch.tensor(chances, device=flat.device)[:, None] * counts).int() + 1
    place = torch.searchsorted(running, wanted.minimum(counts.clamp_min(1)))
    place = place.clamp_max(flat.shape[1] - 1)
    positive = target.flatten(1).gather(1, place)
    H, W = errors.shape[2:]
    clicks: list[Click | None] = []
    # One transfer for the whole batch.
    for index, count, inside in torch.cat([place, counts, positive], 1).tolist():
        z, y, x = index // (H * W), index // W % H, index % W
        clicks.append(((float(z), float(y), float(x)), bool(inside)) if count else None)
    return clicks


def largest_component(errors: Tensor) -> Tensor:
    """The largest 26-connected component of each mask, components told apart at half resolution.

    Labels spread over the cells of a grid of half the resolution, the largest one winning, for a
    fixed number of steps: a component that winds further than about a window's edge counts as
    several.

    Args:
        errors: (B, D, H, W) bool.

    Returns:
        The same shape; empty where ``errors`` is.
    """
    B = errors.shape[0]
    odd = [n % 2 for n in errors.shape[1:]]
    whole = F.pad(errors.float(), (0, odd[2], 0, odd[1], 0, odd[0]))
    counts = F.avg_pool3d(whole[:, None], 2)[:, 0]
    inside = counts > 0
    number = torch.arange(1, inside[0].numel() + 1, device=errors.device, dtype=torch.int32)
    labels = number.reshape(inside.shape[1:]) * inside
    for _ in range(min(_REACH, max(labels.shape[1:]))):
        spread = labels
        for axis in (1, 2, 3):
            spread = _spread(spread, axis)
        labels = spread * inside
    sums = counts.new_zeros(B, inside[0].numel() + 1)
    sums.scatter_add_(1, labels.flatten(1).long(), counts.flatten(1))
    sums[:, 0] = 0
    largest = sums.argmax(1)[:, None, None, None]
    chosen = (labels == largest) & inside
    for axis in (1, 2, 3):
        chosen = chosen.repeat_interleave(2, axis)
    D, H, W = errors.shape[1:]
    return errors & chosen[:, :D, :H, :W]


def error_depth(errors: Tensor, cells: Sequence[Triple]) -> Tensor:
    """How many erosions each cell survives: its distance from the border, about Euclidean.

    Erosions by a cube and by a cross alternate; an axis of longer cells is eroded less often, so
    that depth is counted in the shortest edge of a window's cells. Beyond the window there is no
    error.

    Args:
        errors: (B, D, H, W) bool.
        cells: edge lengths (z, y, x) of each window's cells in voxels.

    Returns:
        (B, D, H, W) int16, 0 outside of the error.
    """
    if errors.device.type != "cpu":
        return _depth(errors, cells)
    depth = torch.zeros_like(errors, dtype=torch.int16)
    for one, found, cell in zip(errors, depth, cells, strict=True):
        if (box := bounding_box(one.numpy())) is not None:  # mostly a small part of the window
            place = tuple(map(slice, *box))
            found[place] = _depth(one[place][None], [cell])[0]
    return depth


def _depth(errors: Tensor, cells: Sequence[Triple]) -> Tensor:
    """:func:`error_depth`, all windows at once."""
    shares = np.array([[min(cell) / edge for edge in cell] for cell in cells])  # (B, 3)
    depth = errors.to(torch.int16)
    alive, step = errors, 0
    while True:
        step += 1
        due = np.floor(step * shares + 1e-9) > np.floor((step - 1) * shares + 1e-9)
        whole, eroded = alive, alive
        for axis in (1, 2, 3):
            which = due[:, axis - 1]
            if not which.any():
                continue
            thin = _erode(whole if step % 2 else eroded, axis)
            if not which.all():
                flags = torch.from_numpy(~which).to(errors.device)[:, None, None, None]
                thin = thin | flags
            eroded = eroded & thin
        alive = eroded
        depth += alive
        if not bool(alive.any()):
            return depth


def _erode(mask: Tensor, axis: int) -> Tensor:
    """Cells whose two neighbours along an axis are set as well; none beyond the border is."""
    n = mask.shape[axis]
    thin = mask.clone()
    thin.narrow(axis, 1, n - 1).logical_and_(mask.narrow(axis, 0, n - 1))
    thin.narrow(axis, 0, n - 1).logical_and_(mask.narrow(axis, 1, n - 1))
    thin.narrow(axis, 0, 1).zero_()
    thin.narrow(axis, n - 1, 1).zero_()
    return thin


def _spread(labels: Tensor, axis: int) -> Tensor:
    """The largest label among each cell and its two neighbours along an axis."""
    n = labels.shape[axis]
    wide = labels.clone()
    after, before = wide.narrow(axis, 1, n - 1), wide.narrow(axis, 0, n - 1)
    torch.maximum(after, labels.narrow(axis, 0, n - 1), out=after)
    torch.maximum(before, labels.narrow(axis, 1, n - 1), out=before)
    return wide
