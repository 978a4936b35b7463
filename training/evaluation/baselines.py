"""What no learning gives: methods every quality table should show beside a trained one.

Each takes a :class:`inference.case.Case` and returns a label map, so that all go through the same
protocol as the segmenter. Where a case has no boxes the shape methods know its clicks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import graph, segmentation
from torch import Tensor

from inference.case import Case, ObjectPrompts
from inference.model.refiner import CHANNELS, RefinerConfig
from inference.prompts import WindowPrompts, normalise_window, refiner_channels, window_prompts
from inference.refinement import bounding_box, first_windows, honour_clicks, merge, to_voxels
from inference.resampling import window_cells

# Radius of an object that is known by a click alone, as a fraction of the volume's edges.
_UNBOXED_RADIUS = 0.1
# Window about such an object, in longest edges of the volume.
_UNBOXED_EDGE = 0.5
# Share of the ellipsoid in the box that is taken for granted where seeds are needed.
_SEED_RADIUS = 0.5
_SEED_CELLS = 2.5  # radius of a click; a random walker escapes from a single cell
# Grids on which scikit-image takes about a second an object.
_WALKER_CELLS, _GEODESIC_CELLS = 48, 48
_WALKER_BETA = 130  # scikit-image's default
_GEODESIC_GRADIENT = 20.0  # cells; what crossing one standard deviation of intensity costs

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

    The refiner's likelihood channel taken as its answer. It starts from box and clicks in every
    round; only where a case has no boxes does the previous mask say how large the object is.
    """

    def log_odds(view: _View) -> Tensor:
        known = view.previous is not None
        previous = view.previous if view.previous is not None else torch.zeros_like(view.image)
        channels = refiner_channels(view.image[None], [view.prompts], previous[None], [known])
        return channels[0, CHANNELS.index("likelihood")]

    return _object_by_object(case, RefinerConfig().window, log_odds)


def random_walker(case: Case) -> Labels:
    """Random walker (Grady 2006, scikit-image), seeded by box and clicks."""

    def log_odds(view: _View) -> Tensor:
        inside, outside = _seeds(view)
        seeds = np.where(outside, 2, np.where(inside, 1, 0)).astype(np.int8)
        image = normalise_window(view.image[None])[0].double().numpy()
        share = segmentation.random_walker(
            image,
            seeds,
            beta=_WALKER_BETA,
            mode="cg_j",
            prob_tol=1,  # only the sign is used: an overshoot of the solver needs no warning
            return_full_prob=True,
        )
        return torch.from_numpy(share[0] - share[1]).float()

    return _object_by_object(case, _WALKER_CELLS, log_odds)


def geodesic(case: Case) -> Labels:
    """Nearest seed by geodesic distance over intensity (scikit-image's minimal cost paths).

    Criminisi et al. 2008 (GeoS) without its symmetric filter: a step costs its length plus the
    gradient it crosses, and a voxel belongs to the side whose seeds it reaches more cheaply.
    """

    def log_odds(view: _View) -> Tensor:
        image = normalise_window(view.image[None])[0].double().numpy()
        gradient = np.sqrt(sum(g**2 for g in np.gradient(image)))
        paths = graph.MCP_Geometric(1 + _GEODESIC_GRADIENT * gradient)
        inside, outside = (
            np.array(paths.find_costs(np.argwhere(seeds).tolist())[0])  # it reuses its memory
            for seeds in _seeds(view)
        )
        return torch.from_numpy(outside - inside).float()

    return _object_by_object(case, _GEODESIC_CELLS, log_odds)


@dataclass(frozen=True)
class _View:
    """One object in a window: image, prompts in cells, and the previous mask, 0..1, or None."""

    image: Tensor
    prompts: WindowPrompts
    previous: Tensor | None


def _object_by_object(case: Case, edge: int, log_odds: Callable[[_View], Tensor]) -> Labels:
    """Each object in its window of ``edge``^3 cells by itself, merged as the segmenter does."""
    shape = (case.image.shape[0], case.image.shape[1], case.image.shape[2])
    cells = (edge, edge, edge)
    results = []
    for prompts in case.objects:
        if prompts.is_empty:
            continue
        previous, before = None, None
        if prompts.box is None and case.previous is not None:
            before = bounding_box(case.previous == prompts.label)
        (window,) = first_windows(prompts, before, shape, case.spacing_mm, cells, [_UNBOXED_EDGE])
        if before is not None and case.previous is not None:
            previous = window_cells(case.previous, window, label=prompts.label)[0]
        image = window_cells(case.image, window, edge=True)[0]
        found = log_odds(_View(image, window_prompts(prompts, window), previous))
        voxels = to_voxels(found, window, prompts.label, shape)
        results.append(honour_clicks(voxels, prompts.clicks))
    return merge(results, shape)


def _seeds(view: _View) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Cells that surely belong to the object and cells that surely do not; neither is empty."""
    shape = tuple(view.image.shape)
    inside, outside = np.zeros((2, *shape), bool)
    box = view.prompts.box
    if box is not None:
        offsets = [
            (np.arange(n) - (low + high) / 2) / max((high - low) / 2, 0.5)
            for n, low, high in zip(shape, *box, strict=True)
        ]
        dz, dy, dx = np.meshgrid(*offsets, indexing="ij", sparse=True)
        inside |= dz**2 + dy**2 + dx**2 < _SEED_RADIUS**2
        outside |= np.maximum(np.maximum(abs(dz), abs(dy)), abs(dx)) > 1
    else:
        outside[[0, -1]] = outside[:, [0, -1]] = outside[:, :, [0, -1]] = True
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    for position, positive in view.prompts.clicks:
        inner = [min(max(p, 0), n - 1) for p, n in zip(position, shape, strict=True)]
        ball = sum((a - p) ** 2 for a, p in zip(axes, inner, strict=True)) <= _SEED_CELLS**2
        inside[ball], outside[ball] = positive, not positive
    if not inside.any():
        middle = tuple(n // 2 for n in shape)
        inside[middle], outside[middle] = True, False
    return inside, outside


BASELINES: dict[str, Callable[[Case], Labels]] = {
    "box": box,
    "ellipsoid": ellipsoid,
    "likelihood": likelihood,
    "random-walker": random_walker,
    "geodesic": geodesic,
}
