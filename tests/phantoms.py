"""Builders of cases in the challenge's format: ellipsoids on a noisy background."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.object_prompts import stored_box

# Mean of the background and of the objects, and how far noise goes either way, 0..255.
_CONTRAST = {
    "CT": (70, 170, 20),
    "MR": (60, 140, 30),
    "PET": (15, 200, 12),
    "US": (90, 40, 38),
    "Microscopy": (30, 190, 28),
}


def challenge_case(
    shape: tuple[int, int, int] = (20, 48, 40),
    n_classes: int = 2,
    modality: str = "CT",
    *,
    boxes: bool = True,
    clicks: int = 0,
    order: bool = True,
    previous: bool = False,
    gts: bool = True,
    spacing_xyz: tuple[float, float, float] = (1.0, 2.0, 3.0),
    padding: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """A case with one ellipsoid a class, each in a cell of its own.

    Args:
        shape: (D, H, W); every class needs a cell of at least two voxels.
        n_classes: labels 1..n_classes.
        modality: CT, MR, PET, US or Microscopy: which contrast.
        boxes: whether ``boxes`` is there, by the organisers' rule.
        clicks: rounds of clicks; each class gets foreground and background in turn, the first in
            the middle of the object. 0: neither ``clicks`` nor ``clicks_order``.
        order: whether ``clicks_order`` is there.
        previous: whether ``prev_pred`` is there: the objects, shifted by one voxel.
        gts: whether ``gts`` is there.
        spacing_xyz: as files store it.
        padding: of the boxes, in y and x.
        seed: of noise, sizes, places and clicks.
    """
    rng = np.random.default_rng(seed)
    low, high, noise = _CONTRAST[modality]
    labels = np.zeros(shape, np.uint8)
    image = rng.integers(low - noise, low + noise, shape, dtype=np.uint8)
    stored: list[dict[str, int]] = []
    sides: list[dict[str, list[list[np.int64]]]] = []
    orders: list[list[str]] = []
    for label, cell in enumerate(_cells(shape, n_classes), start=1):
        size = np.array([part.stop - part.start for part in cell])
        centre = (size - 1) / 2
        radii = np.maximum(size * rng.uniform(0.25, 0.45, 3), 0.6)
        grid = np.ogrid[tuple(slice(0, n) for n in size)]
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1
        inside[tuple(np.round(centre).astype(int))] = True
        labels[cell][inside] = label
        image[cell][inside] += np.uint8((high - low) % 256)  # may wrap down to a darker object

        z, y, x = (part.start for part in cell)
        offset = np.array([z, y, x])
        if boxes:
            stored.append(stored_box(inside, padding, (z, y, x), shape))
        middle = np.round(centre).astype(int)
        found: dict[str, list[list[np.int64]]] = {"fg": [], "bg": []}
        names = ["fg" if i % 2 == 0 else "bg" for i in range(clicks)]
        for i, name in enumerate(names):
            choices = np.argwhere(inside if name == "fg" else ~inside)
            position = middle if i == 0 else choices[rng.integers(len(choices))]
            found[name].append(list(position + offset))
        sides.append(found)
        orders.append(names)

    case: dict[str, NDArray[Any]] = {"imgs": image, "spacing": np.array(spacing_xyz, np.float64)}
    if boxes:
        case["boxes"] = np.array(stored, dtype=object)
    if clicks:
        case["clicks"] = np.array(sides, dtype=object)
        if order:
            case["clicks_order"] = np.array(orders)
    if previous:
        case["prev_pred"] = np.roll(labels, 1, axis=2)
    if gts:
        case["gts"] = labels
    return case


def small_case(**changes: Any) -> dict[str, Any]:
    """A case of two classes, boxes, two rounds of clicks and ``prev_pred``, with some keys changed.

    A change to None takes the key away.
    """
    arrays: dict[str, Any] = challenge_case((6, 20, 16), clicks=2, previous=True) | changes
    return {key: value for key, value in arrays.items() if value is not None}


def objects(*entries: Any) -> NDArray[Any]:
    """An object array of one dimension, whatever the entries are."""
    array = np.empty(len(entries), object)
    for index, entry in enumerate(entries):
        array[index] = entry
    return array


def write_npz(path: Path, case: Mapping[str, Any]) -> Path:
    """Write a case the way the organisers do; returns the path."""
    np.savez_compressed(path, allow_pickle=True, **case)
    return path


def _cells(shape: tuple[int, int, int], count: int) -> list[tuple[slice, slice, slice]]:
    """``count`` boxes that do not touch, from cutting the longest edge until there are enough."""
    cuts = [1, 1, 1]
    while math.prod(cuts) < count:
        cuts[int(np.argmax(np.array(shape) / cuts))] += 1
    edges = [np.linspace(0, n, k + 1).astype(int) for n, k in zip(shape, cuts, strict=True)]
    parts = [[slice(int(a), int(b)) for a, b in itertools.pairwise(e)] for e in edges]
    cells = [(z, y, x) for z in parts[0] for y in parts[1] for x in parts[2]]
    if min(part.stop - part.start for cell in cells for part in cell) < 2:
        raise ValueError(f"received shape {shape} for {count} classes; accepted: larger shapes")
    return cells[:count]
