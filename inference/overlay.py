"""A picture of a result: three orthogonal slices through its largest object, objects outlined."""

from __future__ import annotations

import colorsys
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.neighbours import pairs
from inference.output import label_voxels
from inference.whole_file import replacing

PANEL_PIXELS = 384
"""Length in pixels of the longer edge of the field of view; the scale is common to all slices."""

MAX_SCALE = 16.0
"""Pixels along a voxel's shortest edge at most: a tiny volume stays a small picture."""

GAP_PIXELS = 4


def draw_overlay(
    image: NDArray[np.generic],
    label_map: NDArray[np.uint8],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.uint8]:
    """Draw the axial, coronal and sagittal slice through the largest object, side by side.

    Slices keep their physical proportions; each object is outlined in a colour of its own. The
    slices are those that cut most voxels of the largest object, or the middle ones where the label
    map is empty. The grey scale runs from the 0.5th to the 99.5th percentile of the three slices.

    Args:
        image: (D, H, W), any real dtype.
        label_map: (D, H, W) uint8.
        spacing_mm: voxel size (z, y, x).

    Returns:
        (height, width, 3) uint8, RGB.
    """
    centre = _best_slices(label_map)
    extent_mm = np.multiply(image.shape, spacing_mm)
    scale = min(PANEL_PIXELS / extent_mm.max(), MAX_SCALE / min(spacing_mm))
    sizes = np.maximum(1, np.rint(extent_mm * scale)).astype(int)

    cuts = [(axis, [other for other in range(3) if other != axis]) for axis in range(3)]
    greys = [np.take(image, centre[axis], axis=axis).astype(np.float32) for axis, _ in cuts]
    low, high = np.percentile(np.concatenate([grey.reshape(-1) for grey in greys]), (0.5, 99.5))
    panels = []
    for grey, (axis, (down, across)) in zip(greys, cuts, strict=True):
        size = (sizes[down], sizes[across])
        grey = np.clip((grey - low) / max(high - low, 1e-12), 0.0, 1.0)
        panel = np.repeat(_resized(grey, size, order=1)[..., None] * 255.0, 3, axis=2)
        labels = _resized(np.take(label_map, centre[axis], axis=axis), size, order=0)
        outline = _outline(labels)
        panel[outline] = _colours()[labels[outline]]
        # Slice 0 is at the feet in most scans, and a viewer shows the head on top.
        panels.append((panel if axis == 0 else panel[::-1]).astype(np.uint8))
    return _side_by_side(panels)


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write an RGB picture (height, width, 3) uint8 as PNG, whole or not at all.

    Raises:
        OSError: the file could not be written; an earlier one is left as it was.
    """
    height, width, _ = picture.shape
    # Each row of a PNG starts with the number of its filter; 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
        + _chunk(b"IEND", b"")
    )
    with replacing(path) as file:
        file.write(content)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _best_slices(label_map: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Per axis the slice that holds most of the largest object; the middle where there is none."""
    voxels = label_voxels(label_map)
    voxels[0] = 0
    if not voxels.any():
        return (label_map.shape[0] // 2, label_map.shape[1] // 2, label_map.shape[2] // 2)
    return fullest_slices(label_map == voxels.argmax())


def fullest_slices(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Along each axis of a (D, H, W) mask the slice that holds most of it."""
    z, y, x = (int(mask.sum(axis=other).argmax()) for other in ((1, 2), (0, 2), (0, 1)))
    return z, y, x


def _resized(plane: NDArray[Any], size: tuple[int, int], order: int) -> NDArray[Any]:
    """A plane in another number of pixels over the same length: of order 0 nearest, 1 linear."""
    from scipy import ndimage  # a fifth of a second that only pictures are worth

    factors = [wanted / voxels for wanted, voxels in zip(size, plane.shape, strict=True)]
    resized: NDArray[Any] = ndimage.zoom(
        plane, factors, order=order, mode="nearest", grid_mode=True
    )
    return resized


def _outline(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Labelled pixels within one pixel of another label, drawn two pixels wide."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in (1, 2):
            low, high = pairs(2, axis, step)
            differ = labels[low] != labels[high]
            edge[low] |= differ
            edge[high] |= differ
    return edge & (labels > 0)


def _colours() -> NDArray[np.uint8]:
    """(256, 3): a bright colour a label, neighbouring labels far apart on the colour wheel."""
    golden = 0.618034
    table = [colorsys.hsv_to_rgb((0.33 + label * golden) % 1.0, 0.85, 1.0) for label in range(256)]
    return (np.array(table) * 255).astype(np.uint8)


def _side_by_side(panels: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + GAP_PIXELS * (len(panels) - 1)
    picture = np.zeros((height, width, 3), np.uint8)
    left = 0
    for panel in panels:
        top = (height - panel.shape[0]) // 2
        picture[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
        left += panel.shape[1] + GAP_PIXELS
    return picture
