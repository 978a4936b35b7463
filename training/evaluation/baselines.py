"""What no learning gives: methods every quality table should show beside a trained one.

Each takes a :class:`inference.case.Case` and returns a label map, so that all go through the same
protocol as the segmenter. Where a case has no boxes the shape methods know its clicks only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from inference.case import Case, ObjectPrompts
from inference.model.refiner import CHANNELS, RefinerConfig
from inference.prompts import refiner_channels
from inference.refinement import bounding_box, first_window, honour_clicks, merge
from inference.resampling import resample, to_tensor
from inference.segmenter import to_voxels, window_prompts

# Radius of an object that is known by a click alone, as a fraction of the volume's edges.
_UNBOXED_RADIUS = 0.1

Labels = NDArray[np.uint8]


def box(case: Case) -> Labels:
    """Each box filled; where two overlap the one whose middle is nearer wins."""
    return _nearest(case, lambda offsets: np.maximum(np.maximum(*offsets[:2]), offsets[2]))


def ellipsoid(case: Case) -> Labels:
    """The ellipsoid inscribed in each box; where two overlap the one with the nearer middle."""
    return _nearest(case, lambda offsets: np.sqrt(sum(offset**2 for offset in offsets)))


def _nearest(
    case: Case, radius: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]]
) -> Labels:
    """Label of the shape whose relative radius is smallest at a voxel, 0 beyond all of them.

    Args:
        case: what to segment.
        radius: of absolute offsets along the axes, each 1 on the faces of the box.
    """
    shape = case.image.shape
    best = np.full(shape, np.inf, np.float32)
    labels = np.zeros(shape, np.uint8)
    for prompts in case.objects:
        for low, high in _extents(prompts, shape):
            start = [max(int(np.floor(a)), 0) for a in low]
            stop = [min(int(np.ceil(b)), n) for b, n in zip(high, shape, strict=True)]
            inside = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            offsets = [
                np.abs((np.arange(s.start, s.stop) + 0.5 - (a + b) / 2) / ((b - a) / 2)).reshape(
                    [-1 if axis == other else 1 for other in range(3)]
                )
                for axis, (s, a, b) in enumerate(zip(inside, low, high, strict=True))
            ]
            distance = radius(offsets)
            nearer = (distance <= 1) & (distance < best[inside])
            best[inside][nearer] = distance[nearer]
            labels[inside][nearer] = prompts.label
    return labels


def _extents(
    prompts: ObjectPrompts, shape: tuple[int, ...]
) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Half-open voxel ranges (low, high) of an object's box, or of a ball at each of its clicks."""
    if prompts.box is not None:
        return [(prompts.box.start, prompts.box.stop)]
    balls = []
    for click in prompts.clicks:
        if click.positive:
            ends = [
                (c + 0.5 - _UNBOXED_RADIUS * n, c + 0.5 + _UNBOXED_RADIUS * n)
                for c, n in zip(click.position, shape, strict=True)
            ]
            balls.append((tuple(low for low, _ in ends), tuple(high for _, high in ends)))
    return balls


def likelihood(case: Case) -> Labels:
    """Soft ellipsoid times intensity likelihood (inference/likelihood.py), no learning.

    The refiner's likelihood channel taken as its answer, in the segmenter's first window of each
    object. It starts from box and clicks in every round; only where a case has no boxes does the
    previous mask say how large the object is.
    """
    shape = case.image.shape
    cells = (RefinerConfig().window,) * 3
    results = []
    for prompts in case.objects:
        before = None
        if prompts.box is None and case.previous is not None:
            before = bounding_box(case.previous == prompts.label)
        if prompts.is_empty:
            continue
        window = first_window(prompts, before, shape, case.spacing_mm, cells)
        image = resample(to_tensor(window.crop(case.image, edge=True)), cells)
        known = before is not None
        previous = torch.zeros_like(image)
        if known:
            mask = window.crop(case.previous) == prompts.label
            previous = resample(to_tensor(mask.astype(np.uint8)), cells)
        channels = refiner_channels(image, [window_prompts(prompts, window)], previous, [known])
        log_odds = channels[0, CHANNELS.index("likelihood")]
        found = to_voxels(log_odds, window, prompts.label, shape)
        results.append(honour_clicks(found, prompts.clicks))
    return merge(results, shape)


BASELINES: dict[str, Callable[[Case], Labels]] = {
    "box": box,
    "ellipsoid": ellipsoid,
    "likelihood": likelihood,
}
