"""Windows cut out of volumes in batches: one trilinear gather, every deformation folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from inference.resampling import resample
from training.plan import Plan
from training.volumes import Level, VolumeStore

# A window at a time stays within a CPU's cache; a GPU wants them all.
_CHUNK = {"cpu": 1}


def cut_windows(
    store: VolumeStore, plans: Sequence[Plan], shown: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Intensities and object of each planned window, and what of it lies in the volume.

    What ``grid_sample`` does for volumes of one size is done here for volumes of any sizes, which
    stay bytes: eight gathers from the store's buffers at places that rotation, shear, elastic
    deformation, flips, permutation and the level of the pyramid have all gone into.

    Args:
        store: holds the volumes.
        plans: B of them, of one edge; all with images, or all without.
        shown: False where the volumes have no image.

    Returns:
        Images (B, D, H, W) float32, 0..255; where ``shown`` is False the nearest label instead.
        Beyond the volume these go on as its edge. The object's share of each cell, 0..1, none of
        it beyond the volume. And which cells have their centre inside, bool.
    """
    chunk = _CHUNK.get(store.device.type, len(plans))
    parts = [_cut(store, plans[i : i + chunk], shown) for i in range(0, len(plans), chunk)]
    images, shares, inside = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(shares), torch.cat(inside)


def choose_level(levels: Sequence[Level], plan: Plan) -> Level:
    """The level in which the plan's cells are about two voxels long.

    Interpolation between voxels blurs by itself. Levels of one voxel a cell were further from
    inference's means over whole cells (0.16 of the image's standard deviation in windows of three
    and more voxels a cell, against 0.07) and lost more of thin objects.
    """
    cells = 2 * np.abs(plan.scale).sum(1) / plan.edge  # voxels of the volume, along its own axes

    def misfit(level: Level) -> float:
        ratio = cells / np.array(level.factor)
        return float(np.abs(np.log2(ratio) - 1).max())

    return min(levels, key=misfit)


def _cut(store: VolumeStore, plans: Sequence[Plan], shown: bool) -> tuple[Tensor, Tensor, Tensor]:
    device = store.device
    levels = [choose_level(store.levels[plan.volume], plan) for plan in plans]
    place, inside = _places(store, plans, levels)
    shape = np.array([level.shape for level in levels])  # (B, 3)
    low, weight = [], []
    for axis in range(3):
        # The last pair of voxels also serves a place on the very edge.
        last = _column(np.maximum(shape[:, axis] - 2, 0), device)
        floor = place[axis].floor().minimum(last).clamp_min_(0)
        low.append(floor.long())
        weight.append(place[axis] - floor)
    steps = [_column(shape[:, 1] * shape[:, 2], device, torch.int64)]
    steps.append(_column(shape[:, 2], device, torch.int64))
    offset = _column([level.offset for level in levels], device, torch.int64)
    index = (low[0] * steps[0]).add_(low[1] * steps[1]).add_(low[2]).add_(offset)
    # An axis of one voxel has no second one to go to.
    steps.append(torch.ones_like(steps[0]))
    steps = [s * _column(shape[:, a] > 1, device, torch.int64) for a, s in enumerate(steps)]

    kind = store.labels.dtype
    wanted = _column([plan.label for plan in plans], device, kind)
    second = _column([plan.also or plan.label for plan in plans], device, kind)
    joined = any(plan.also for plan in plans)

    def image(at: Tensor) -> Tensor:
        return store.images.take(at).float()

    def mask(at: Tensor) -> Tensor:
        found = store.labels.take(at)
        part = found == wanted
        return (part | (found == second) if joined else part).float()

    share = _interpolate(mask, index, steps, weight).mul_(inside)
    if shown:
        return _interpolate(image, index, steps, weight), share, inside
    nearest = index.clone()
    for step, part in zip(steps, weight, strict=True):
        nearest += step * (part > 0.5)
    return store.labels.take(nearest).float(), share, inside


def _places(
    store: VolumeStore, plans: Sequence[Plan], levels: Sequence[Level]
) -> tuple[list[Tensor], Tensor]:
    """Where each cell lies in its level, clamped, an axis a tensor; and which lie inside."""
    device, edge = store.device, plans[0].edge
    # A level may reach beyond the volume: odd edges were completed to halve them.
    whole = np.array([store.volumes[plan.volume].labels.shape for plan in plans])
    factors = np.array([level.factor for level in levels], float)[:, :, None]
    scale = np.stack([plan.scale for plan in plans]) / factors
    matrix = scale @ np.stack([plan.turn for plan in plans])
    # Voxel v of the volume lies at (v + 0.5) / factor - 0.5 in a level.
    origin = (np.stack([plan.origin for plan in plans]) + 0.5) / factors[..., 0] - 0.5
    u = (2 * np.arange(edge) + 1) / edge - 1
    rows = torch.from_numpy((matrix[..., None] * u).astype(np.float32)).to(device)
    bends = None
    if any(plan.bend is not None for plan in plans):
        knots = [np.zeros((3, 4, 4, 4)) if p.bend is None else p.bend for p in plans]
        bent = np.einsum("bij,bjklm->biklm", scale, np.stack(knots)).astype(np.float32)
        flat = torch.from_numpy(bent.reshape(-1, 4, 4, 4)).to(device)
        bends = resample(flat, (edge, edge, edge)).reshape(-1, 3, edge, edge, edge)
    places, inside = [], None
    for axis in range(3):
        z, y, x = rows[:, axis, 0], rows[:, axis, 1], rows[:, axis, 2]
        z = z + _column(origin[:, axis], device)[:, :, 0, 0]
        place = (z[:, :, None, None] + y[:, None, :, None]) + x[:, None, None, :]
        if bends is not None:
            place += bends[:, axis]
        last = _column([level.shape[axis] - 1 for level in levels], device)
        half = _column(whole[:, axis] / factors[:, axis, 0] / 2, device)
        within = (place + (0.5 - half)).abs_() < half
        inside = within if inside is None else inside.logical_and_(within)
        places.append(place.clamp_min_(0).minimum(last))
    assert inside is not None
    return places, inside


def _interpolate(
    read: Callable[[Tensor], Tensor],
    index: Tensor,
    steps: Sequence[Tensor],
    weight: Sequence[Tensor],
) -> Tensor:
    """Trilinear interpolation of what ``read`` finds at the eight corners of each place."""
    z, y, x = weight
    layers = []
    for i in (0, 1):
        rows = []
        for j in (0, 1):
            start = index + (i * steps[0] + j * steps[1])
            first, second = read(start), read(start.add_(steps[2]))
            rows.append(first.lerp_(second, x))
        layers.append(rows[0].lerp_(rows[1], y))
    result: Tensor = layers[0].lerp_(layers[1], z)
    return result


def _column(values: object, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A value a window, as (B, 1, 1, 1)."""
    return torch.from_numpy(np.asarray(values)).to(dtype).to(device)[:, None, None, None]
