"""Post-processing steps on one object's logits, with lengths in mm and guarantees.

1. ``threshold``: cut probabilities below one half, where masks are known to come out too small.
2. ``trim``: what lies beyond the slices of the box does not belong to the object.
3. ``islands``: components much smaller than the largest are noise.
4. ``cavities``: background enclosed by the object belongs to it.
5. ``gaps``: morphological closing.
6. ``smooth``: Gaussian blur of the probabilities.

Each takes an ``amount``: log-odds for the threshold, else a share. Lengths are shares of the
object's equivalent diameter, in mm, so that a nucleus and a liver are treated alike and anisotropic
voxels alike along all axes. Whatever the step and amount: a click's voxel stays as the click has
it; the component that holds a foreground click or the box centre is never deleted; a hole that
holds a background click is never filled, not even in part; a structure thinner than the smoothing
kernel is never smoothed away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray

from inference.case import ObjectPrompts
from inference.geometry import Triple
from inference.logits import Logits, probability
from inference.neighbours import dilated, shut_in
from inference.refinement import SURE, ObjectLogits

Mask = NDArray[np.bool_]

#: Logit of a voxel that a step adds or, negative, takes away: enough to be in or out, too little to
#: outvote another object that the network is sure of.
_BARELY = np.float32(0.01)
#: Voxels: no Gaussian need reach further along a shorter axis.
_FAR = 64
#: Half the full width at half maximum of a Gaussian of standard deviation 1.
_HALF_WIDTH = math.sqrt(2 * math.log(2))
_MASS_BEYOND = 3.0  # standard deviations at which the Gaussian is cut off


@dataclass(frozen=True)
class Region:
    """One object's surroundings, in the voxels of its own cut-out.

    Attributes:
        spacing_mm: (z, y, x).
        positive: foreground clicks in the cut-out.
        negative: background clicks in it.
        centre: of the box, None without a box or where it lies outside.
        slices: first and one past the last slice of the box, None without a box.
    """

    spacing_mm: tuple[float, float, float]
    positive: tuple[Triple, ...] = ()
    negative: tuple[Triple, ...] = ()
    centre: Triple | None = None
    slices: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, result: ObjectLogits, prompts: ObjectPrompts, spacing_mm: tuple[float, float, float]
    ) -> Region:
        """What the prompts say in the cut-out of ``result``."""
        size = result.logits.shape

        def moved(points: list[Triple]) -> tuple[Triple, ...]:
            shifted = [
                (z - result.start[0], y - result.start[1], x - result.start[2])
                for z, y, x in points
            ]
            return tuple(
                p for p in shifted if all(0 <= i < n for i, n in zip(p, size, strict=True))
            )

        newest = {click.position: click.positive for click in prompts.clicks}
        positive = moved([position for position, fg in newest.items() if fg])
        negative = moved([position for position, fg in newest.items() if not fg])
        box = prompts.box
        if box is None:
            return cls(spacing_mm, positive, negative)
        z, y, x = ((a + b - 1) // 2 for a, b in zip(box.start, box.stop, strict=True))
        centre = moved([(z, y, x)])
        slices = (box.start[0] - result.start[0], box.stop[0] - result.start[0])
        return cls(spacing_mm, positive, negative, centre[0] if centre else None, slices)

    @property
    def anchors(self) -> tuple[Triple, ...]:
        """Voxels whose component is never deleted."""
        return self.positive if self.centre is None else (*self.positive, self.centre)

    def reach(self, share: float, mask: Mask) -> tuple[float, float, float]:
        """``share`` of a mask's equivalent diameter, in voxels along each axis.

        Along a short axis :data:`_FAR` is the most, along others their length: where voxels are a
        million times as long as wide, it would be millions.
        """
        volume = np.count_nonzero(mask) * math.prod(self.spacing_mm)
        length = share * 2 * (volume * 3 / (4 * math.pi)) ** (1 / 3)
        pairs = zip(self.spacing_mm, mask.shape, strict=True)
        z, y, x = (min(length / spacing, max(n, _FAR)) for spacing, n in pairs)
        return z, y, x


def apply_step(name: str, logits: Logits, region: Region, amount: float) -> Logits:
    """Apply one step.

    Args:
        name: of :data:`STEPS`.
        logits: (d, h, w) float32, positive where the object is. Left as they are.
        region: what is known about the cut-out.
        amount: above 0; what it means depends on the step.

    Returns:
        (d, h, w) float32, the input itself where nothing changed.

    Raises:
        ValueError: an unknown step, or an amount that is not above 0.
    """
    if name not in STEPS:
        raise ValueError(f"step {name!r}; accepted: {', '.join(STEPS)}")
    if not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"step {name} by {amount}; accepted: a finite amount above 0")
    before = logits > 0
    if not before.any():
        return logits
    after = STEPS[name](logits, before, region, amount)
    _guard(before, after, region)
    if name == "gaps":
        _keep_clicked_gaps(before, after, region)
    changed = before != after
    if not changed.any():
        return logits
    changed &= np.abs(logits) <= SURE  # beyond are clicks
    result = logits.copy()
    result[changed] = np.where(after[changed], _BARELY, -_BARELY)
    return result


def _threshold(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Cut at a probability whose log-odds are minus ``amount``."""
    return logits > -amount


def _trim(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Keep the box's slices and ``amount`` times as many more, half of them on either side."""
    after = mask.copy()
    if region.slices is not None:
        first, last = region.slices
        margin = int(amount * (last - first) / 2)
        after[: max(first - margin, 0)] = False
        after[max(last + margin, 0) :] = False
    return after


def _islands(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Keep components of at least ``amount`` times the largest one's volume; 26-connected."""
    components, count = cc3d.connected_components(
        mask.view(np.uint8), connectivity=26, return_N=True
    )
    if count < 2:
        return mask
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"]
    stays = voxels >= amount * voxels[1:].max()
    stays[np.argmax(voxels[1:]) + 1] = True
    for anchor in region.anchors:
        stays[components[anchor]] = True
    stays[0] = False
    kept: Mask = stays[components]
    return kept


def _cavities(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Fill enclosed background of up to ``amount`` times the object's volume, face-connected."""
    components, count = cc3d.connected_components(
        (~mask).view(np.uint8), connectivity=6, return_N=True
    )
    enclosed = shut_in(components, count)
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"]
    enclosed &= voxels <= amount * np.count_nonzero(mask)
    filled: Mask = mask | enclosed[components]
    return filled


def _gaps(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Close with a cuboid of ``amount`` times the object's diameter to every side."""
    edges = zip(region.reach(amount, mask), mask.shape, strict=True)
    z, y, x = (min(round(edge), n) for edge, n in edges)  # further off there is nothing to join
    if not z + y + x:
        return mask
    padded = np.pad(mask, [(z, z), (y, y), (x, x)])  # closing never takes a voxel away
    closed = ~dilated(~dilated(padded, (z, y, x)), (z, y, x))
    return closed[z : z + mask.shape[0], y : y + mask.shape[1], x : x + mask.shape[2]] | mask


def _smooth(logits: Logits, mask: Mask, region: Region, amount: float) -> Mask:
    """Blur probabilities; the standard deviation is ``amount`` times the object's diameter."""
    from scipy import ndimage  # a fifth of a second that few objects are worth

    sigma = region.reach(amount, mask)
    blurred = ndimage.gaussian_filter(
        probability(logits), sigma, mode="nearest", truncate=_MASS_BEYOND
    )
    after: Mask = blurred > 0.5
    z, y, x = (round(_HALF_WIDTH * s) for s in sigma)
    if (mask & ~after).any():
        padded = np.pad(mask, [(z, z), (y, y), (x, x)], mode="edge")  # cut faces stay as they are
        opened = dilated(~dilated(~padded, (z, y, x)), (z, y, x))
        size = mask.shape
        after |= mask & ~opened[z : z + size[0], y : y + size[1], x : x + size[2]]
    return after


#: The steps, in the order they are applied.
STEPS: dict[str, Callable[[Logits, Mask, Region, float], Mask]] = {
    "threshold": _threshold,
    "trim": _trim,
    "islands": _islands,
    "cavities": _cavities,
    "gaps": _gaps,
    "smooth": _smooth,
}


def _guard(before: Mask, after: Mask, region: Region) -> None:
    """Undo, in ``after``, what no step may do."""
    for click in region.positive:
        after[click] = before[click]
    for click in region.negative:
        after[click] = before[click]
    lost = [anchor for anchor in region.anchors if before[anchor] and not after[anchor]]
    if lost:
        components = cc3d.connected_components(before.view(np.uint8), connectivity=26)
        for anchor in lost:
            own = components == components[anchor]
            if not (after & own).any():
                after |= own
            after[anchor] = True  # a later step may find the component grown together with others
    if not region.negative or not (after & ~before).any():
        return
    background, count = cc3d.connected_components(
        (~before).view(np.uint8), connectivity=6, return_N=True
    )
    enclosed = shut_in(background, count)
    for click in region.negative:
        number = background[click]
        if number and enclosed[number]:
            after[background == number] = False


def _keep_clicked_gaps(before: Mask, after: Mask, region: Region) -> None:
    """Undo what closing filled in one piece about a background click."""
    clicks = [click for click in region.negative if not before[click]]
    if not clicks:
        return
    added = after & ~before
    for click in clicks:
        added[click] = True  # it holds the piece together
    pieces = cc3d.connected_components(added.view(np.uint8), connectivity=26)
    for click in clicks:
        after[pieces == pieces[click]] = False
