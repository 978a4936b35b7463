"""One object's box, ordered clicks and previous mask as input of the networks.

Everything here is in grid coordinates of a window: cell ``i`` has its centre at ``i``, and a box
edge between cells ``i`` and ``i + 1`` lies at ``i + 0.5``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.case import Box, ObjectPrompts
from inference.geometry import Window
from inference.likelihood import likelihood_log_odds
from inference.model.refiner import CHANNELS

_ELLIPSOID_SLOPE = 4.0  # log-odds at the box centre; 0 on the inscribed ellipsoid
_SPHERE_RADIUS = 0.3  # of the window's edge: the expected size of an object without a box
_SPHERE_SLOPE = 2.0
_PREVIOUS_WEIGHT = 1.0
_CLICK_LOG_ODDS = 6.0
_CLICK_SIGMA = 2.5  # grid cells
_CLICK_DECAY = 0.85  # an older click speaks lower, so that the order is seen
_CLICK_FLOOR = 0.5
_BLOB_SIGMA = 0.6  # half edges of a smaller object's box
_BLOB_HEIGHT = 0.5  # a click on it says more
_WRONG_DEPTH = 0.6  # thicknesses that a click lies deep in an error: nothing is sure then

Point = tuple[float, float, float]


@dataclass(frozen=True)
class WindowPrompts:
    """The prompts of one object in a window's grid.

    Attributes:
        box: lower and upper edges (z, y, x), or None.
        middle: z of the slice whose rectangle the box is exact on; ignored without a box.
        clicks: ((z, y, x), positive) in cells, oldest first; may lie outside the window.
        elsewhere: (z, y, x) of other objects' positive clicks, in any order.
        others: lower and upper edges of other objects' boxes, in any order; ignored without a box.
    """

    box: tuple[Point, Point] | None = None
    middle: float = 0.0
    clicks: tuple[tuple[Point, bool], ...] = ()
    elsewhere: tuple[Point, ...] = ()
    others: tuple[tuple[Point, Point], ...] = ()


def refiner_channels(
    image: Tensor,
    prompts: Sequence[WindowPrompts],
    previous: Tensor,
    has_previous: Sequence[bool],
    coarse: Tensor | None = None,
) -> Tensor:
    """Input of the refiner (model/refiner.py, ``CHANNELS``) for a batch of windows.

    Args:
        image: (B, D, H, W) float, raw intensities of each window; any scale.
        prompts: B entries.
        previous: (B, D, H, W) the previous mask, 0..1; ignored where ``has_previous`` is False.
        has_previous: B flags.
        coarse: (B, D, H, W) logits of the first pass, for a second one, or None.

    Returns:
        (B, 11, D, H, W) float32.
    """
    B, D, H, W = image.shape
    z_scores = normalise_window(image)
    # Written in place, in the order of CHANNELS: stacking them afterwards would copy them all.
    channels = z_scores.new_empty((B, len(CHANNELS), D, H, W))
    torch.div(z_scores, 1.5, out=channels[:, 0])
    if coarse is None:
        channels[:, 1] = 0
    else:
        torch.clamp(coarse, -6, 6, out=channels[:, 1]).div_(3)
    prior, start, doubt = torch.empty_like(z_scores), torch.empty_like(z_scores), []
    axes = _axes(image)
    for i, (one, known) in enumerate(zip(prompts, has_previous, strict=True)):
        _, _, signed, _, shape, box, middle, positive, negative, others, larger = channels[i]
        shape[:], box[:], middle[:] = _box_maps(one, axes, known)
        positive[:], negative[:], evidence = _click_maps(one, axes)
        elsewhere = _clicks_elsewhere(one, axes)
        smaller, larger[:] = _boxes_elsewhere(one, axes)
        torch.maximum(elsewhere, smaller, out=others)
        evidence.sub_(elsewhere, alpha=_CLICK_LOG_ODDS).clamp_(-_CLICK_LOG_ODDS, _CLICK_LOG_ODDS)
        torch.add(shape, evidence, out=prior[i])
        shape /= _ELLIPSOID_SLOPE
        if known:
            # The first histograms come from the previous mask.
            mask = previous[i] > 0.5
            torch.mul(mask, 2.0, out=signed).sub_(1)
            torch.mul(mask, 0.9, out=start[i]).add_(0.05)
            prior[i].add_(signed, alpha=_PREVIOUS_WEIGHT)
            doubt.append(_doubt(one, axes, mask))
        else:
            signed[:] = 0
            torch.sigmoid(prior[i], out=start[i])
            doubt.append(prior.new_ones(()))
    # Without a box nothing keeps intensities from taking all that looks alike.
    clicks = [() if one.box is None else one.clicks for one in prompts]
    likelihood = likelihood_log_odds(z_scores, prior, start, clicks, torch.stack(doubt))
    torch.clamp(likelihood, -6, 6, out=channels[:, 3]).div_(3)
    return channels


def window_prompts(
    prompts: ObjectPrompts,
    window: Window,
    elsewhere: Sequence[tuple[int, int, int]] = (),
    others: Sequence[Box] = (),
) -> WindowPrompts:
    """An object's prompts in the grid of a window.

    Args:
        prompts: of the object.
        window: where.
        elsewhere: voxels (z, y, x) where users clicked on other objects; those outside are left
            out.
        others: boxes of other objects; those outside are left out, and all without a box.
    """
    clicks = tuple((window.to_grid(c.position), c.positive) for c in prompts.clicks)
    away = tuple(
        window.to_grid(p)
        for p in elsewhere
        if all(a <= c < b for a, c, b in zip(window.start, p, window.stop, strict=True))
    )
    box = prompts.box
    if box is None:
        return WindowPrompts(clicks=clicks, elsewhere=away)

    def edges(box: Box) -> tuple[Point, Point]:
        low = window.to_grid([a - 0.5 for a in box.start])
        return low, window.to_grid([b - 0.5 for b in box.stop])

    sides = (window.start, window.stop)
    near = [
        one
        for one in others
        if all(a < d and c < b for a, b, c, d in zip(one.start, one.stop, *sides, strict=True))
    ]
    middle = window.to_grid((box.middle, 0, 0))[0]
    return WindowPrompts(edges(box), middle, clicks, away, tuple(edges(one) for one in near))


def shifted(prompts: WindowPrompts, tile: tuple[slice, slice, slice]) -> WindowPrompts:
    """Prompts of a grid in the coordinates of one of its tiles."""
    z0, y0, x0 = (place.start for place in tile)

    def move(point: Point) -> Point:
        z, y, x = point
        return z - z0, y - y0, x - x0

    return moved(prompts, move)


def moved(prompts: WindowPrompts, move: Callable[[Point], Point]) -> WindowPrompts:
    """Prompts in another grid with parallel axes, ``move`` taking points from one to the other."""
    return WindowPrompts(
        None if prompts.box is None else (move(prompts.box[0]), move(prompts.box[1])),
        move((prompts.middle, 0, 0))[0],
        tuple((move(position), positive) for position, positive in prompts.clicks),
        tuple(move(position) for position in prompts.elsewhere),
        tuple((move(low), move(high)) for low, high in prompts.others),
    )


def normalise_window(image: Tensor) -> Tensor:
    """(B, D, H, W) of any scale -> z-scores of each window, clipped to [-3, 3]."""
    image = image.float()
    # What is nearly constant for images of 0..255, and for smaller ones in proportion.
    least = (1e-4 * image.abs().amax((1, 2, 3), keepdim=True)).clamp(1e-12, 1e-3)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    std = image.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return ((image - mean) / torch.maximum(std, least)).clamp_(-3, 3)


def _axes(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cell coordinates along z, y, x, shaped to broadcast to (D, H, W)."""
    D, H, W = image.shape[1:]
    z, y, x = (torch.arange(n, device=image.device, dtype=torch.float32) for n in (D, H, W))
    return z[:, None, None], y[None, :, None], x[None, None, :]


def _doubt(prompts: WindowPrompts, axes: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """How wrong a mask must be, 0..1: how deep in its error the newest click lies.

    Users click where most is wrong. The depth is measured by the mask's own thickness, the radius
    of the ball with as much surface for its volume, so that thin objects are soon in doubt.

    Args:
        prompts: in the mask's grid.
        axes: of that grid.
        mask: (D, H, W) of the round before, bool.
    """
    if prompts.box is None or not prompts.clicks:
        return axes[0].new_zeros(())  # nothing asks for it
    (z, y, x), positive = prompts.clicks[-1]
    distance: Tensor = sum(  # type: ignore[assignment]
        (a - p) ** 2 for a, p in zip(axes, (z, y, x), strict=True)
    )
    depth = torch.where(mask == positive, distance, torch.inf).amin().sqrt()
    # Three volumes over the surface, which steps along the grid make half as large again.
    radius = 4.5 * cells_a_face(mask)
    return (depth / radius.clamp_min(0.5) / _WRONG_DEPTH).clamp_max(1) ** 2


def cells_a_face(mask: Tensor) -> Tensor:
    """How thick a (D, H, W) bool mask is: its cells over the cell faces of its surface.

    A ball has 2/9 of its radius, a plate half its thickness. Where the mask ends with the grid it
    has no surface.
    """
    faces = sum(mask.diff(dim=axis).count_nonzero() for axis in range(3))
    return mask.count_nonzero() / torch.clamp_min(faces, 1)  # type: ignore[arg-type]


def _box_maps(
    prompts: WindowPrompts, axes: tuple[Tensor, Tensor, Tensor], has_previous: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shape prior (log-odds), box map and middle-slice map, each (D, H, W)."""
    z, y, x = axes
    size = (z.numel(), y.numel(), x.numel())
    if prompts.box is None:
        nothing = z.new_zeros(size)
        seeds = [position for position, positive in prompts.clicks if positive]
        if has_previous or not seeds:
            return nothing, nothing, nothing
        square = nothing + torch.inf
        for seed in seeds:
            dz, dy, dx = (
                ((a - c) / (_SPHERE_RADIUS * n)) ** 2
                for a, c, n in zip(axes, seed, size, strict=True)
            )
            torch.minimum(square, (dz + dy) + dx, out=square)
        radius = square.sqrt()
        prior = (_SPHERE_SLOPE * (1 - radius)).clamp(-_SPHERE_SLOPE, _SPHERE_SLOPE)
        return prior, nothing, nothing
    low, high = prompts.box
    offsets = [  # -1 and 1 on the box's faces, broadcastable
        (a - (lo + hi) / 2) / max((hi - lo) / 2, 0.5)
        for a, lo, hi in zip(axes, low, high, strict=True)
    ]
    dz, dy, dx = offsets
    radius = (dz**2 + dy**2 + dx**2).sqrt()
    prior = (_ELLIPSOID_SLOPE * (1 - radius)).clamp_(-_ELLIPSOID_SLOPE, _ELLIPSOID_SLOPE)
    in_plane = torch.maximum(dy.abs(), dx.abs())
    box = (1 - torch.maximum(dz.abs(), in_plane)).clamp_(-1, 1)
    near = torch.exp(-0.5 * ((z - prompts.middle) / (0.08 * (high[0] - low[0]) + 1)) ** 2)
    middle = near * (4 * (1 - in_plane)).clamp(-1, 1)
    return prior, box, middle


def _click_maps(
    prompts: WindowPrompts, axes: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive and negative click maps (0..1) and the clicks' log-odds, each (D, H, W)."""
    z, y, x = axes
    maps = {flag: z.new_zeros((z.numel(), y.numel(), x.numel())) for flag in (True, False)}
    evidence = torch.zeros_like(maps[True])
    for age, (position, positive) in enumerate(reversed(prompts.clicks)):
        gz, gy, gx = (
            torch.exp(-0.5 * ((a - p) / _CLICK_SIGMA) ** 2)
            for a, p in zip(axes, position, strict=True)
        )
        blob = (gz * gy) * gx
        weight = max(_CLICK_FLOOR, _CLICK_DECAY**age)
        torch.maximum(maps[positive], weight * blob, out=maps[positive])
        evidence.add_(blob, alpha=_CLICK_LOG_ODDS if positive else -_CLICK_LOG_ODDS)
    return maps[True], maps[False], evidence


def _clicks_elsewhere(prompts: WindowPrompts, axes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(D, H, W), 0..1: near clicks on other objects."""
    places = axes[0].new_tensor(prompts.elsewhere).reshape(-1, 3)
    return summed([bump(a, places[:, i], _CLICK_SIGMA) for i, a in enumerate(axes)]).clamp_max_(1)


def _boxes_elsewhere(
    prompts: WindowPrompts, axes: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Where boxes of other objects lie that are smaller than this one's, and larger ones.

    What lies in a smaller box is likely to be its object. A larger one may hold both; how many of
    them a place lies in tells which of several nested boxes this one is.

    Returns:
        (D, H, W), 0..0.5: deep in a smaller box. (D, H, W), 0..1: n / (n + 1) for n larger ones.
    """
    if prompts.box is None or not prompts.others:
        nothing = torch.zeros_like(axes[0] + axes[1] + axes[2])
        return nothing, nothing
    own = _volume(prompts.box)
    sorted_out = ([b for b in prompts.others if (_volume(b) > own) == big] for big in (False, True))
    smaller, larger = (axes[0].new_tensor(boxes).reshape(-1, 2, 3) for boxes in sorted_out)
    blobs, insides = [], []
    for i, axis in enumerate(axes):
        centre, half = _centre_and_half(smaller[:, :, i])
        blobs.append(bump(axis, centre, _BLOB_SIGMA * half[:, None]))
        centre, half = _centre_and_half(larger[:, :, i])
        offset = (axis.reshape(1, -1) - centre[:, None]) / half[:, None]
        insides.append(1 / (1 + offset**8))  # one half on the faces
    count = summed(insides)
    return _BLOB_HEIGHT * summed(blobs).clamp_max_(1), count / (count + 1)


def _volume(box: tuple[Point, Point]) -> float:
    """Of a box, in cells."""
    return math.prod(max(b - a, 1.0) for a, b in zip(*box, strict=True))


def _centre_and_half(edges: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) centres and half lengths of (n, 2) lower and upper edges, of a cell at least."""
    return edges.mean(1), ((edges[:, 1] - edges[:, 0]) / 2).clamp_min(0.5)


def bump(axis: Tensor, centres: Tensor, sigma: float | Tensor) -> Tensor:
    """(n, length of the axis) Gaussians of height 1 about (n,) centres."""
    return torch.exp(-0.5 * ((axis.reshape(1, -1) - centres[:, None]) / sigma) ** 2)


def summed(profiles: Sequence[Tensor]) -> Tensor:
    """(D, H, W) sum of n products of a profile along each axis, (n, D), (n, H) and (n, W)."""
    return torch.einsum("nz,ny,nx->zyx", *profiles)
