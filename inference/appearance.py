"""Objects of one case tell each other apart by their intensities.

Networks see one object at a time and know of the others only their boxes and where users clicked on
them. Put side by side, the objects say more: a first label map gives each of them, and all that
lies between them, a histogram of intensities, and a voxel rare in one of them and common outside
speaks against it. Tissue segmentation iterates such steps (Wells et al. 1996, Ashburner and Friston
2005); here is one, and the networks' logits are its spatial prior. Clicks are samples of an object
that no wrong mask can spoil. Tissues that share a box come apart by it; objects that look like
their surroundings stay as they were: intensities count as far as they depend on which object a
voxel is of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from inference.case import Case
from inference.likelihood import CLICK_BINS, NEIGHBOURS, smooth
from inference.refinement import SURE, ObjectLogits, hull, merge

_BINS = 64
_KERNEL = np.array([0.055, 0.245, 0.4, 0.245, 0.055])  # Gaussian of 1.2 bins
_WIDE_KERNEL = np.exp(-0.5 * (np.arange(-9, 10) / CLICK_BINS) ** 2)
# Constants from here to _CLICKS_FOR_HALF are fitted on training cases.
_CLICKED = 0.5  # share of clicks, however many, in a histogram: they lie where a mask was wrong
_FLOOR = 2e-4  # of a density: what was never seen in a small object may still be there
_CLIP = 5.0  # log-odds that intensities say at most
_SIGMA = 0.7  # voxels: single ones are noise
_TRUST = 1.75  # how much of them counts where nothing but the object decides on the intensity
#: Clicks after which an object without a box counts half as much as one with a box.
_CLICKS_FOR_HALF = 2.0
_MOST_VOXELS = 2**28  # of all logits together, 1 GiB: more are not held at once


def with_intensity_evidence(results: Iterable[ObjectLogits], case: Case) -> Iterator[ObjectLogits]:
    """The objects' logits with what intensities say added.

    Args:
        results: of all objects of a case. They are held together, so where they have more than
            2^28 voxels, or there are fewer than two, they come out as they were.
        case: what they were made from.

    Yields:
        The same objects in the same order, on the same boxes of voxels. Clicked voxels are left
        alone.
    """
    stream = iter(results)
    held: list[ObjectLogits] = []
    for result in stream:
        held.append(result)
        if sum(one.logits.size for one in held) > _MOST_VOXELS:
            break
    else:
        shown = [(one.start, one.stop) for one in held if one.logits.size]
        if len(shown) > 1:
            yield from _weighed(held, case, *hull(shown))
            return
    yield from held
    yield from stream


def _weighed(
    held: list[ObjectLogits],
    case: Case,
    low: tuple[int, int, int],
    high: tuple[int, int, int],
) -> Iterator[ObjectLogits]:
    region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    D, H, W = (b - a for a, b in zip(low, high, strict=True))
    trusts = {o.label: _trust(o.box is not None, len(o.clicks)) for o in case.objects}
    bins = _binned(case.image[region])
    places = {
        o.label: [np.subtract(c.position, low) for c in o.clicks if c.positive]
        for o in case.objects
    }
    clicked = {label: _clicked(some, bins) for label, some in places.items()}
    counts = _histograms(merge((_seen_from(low, one) for one in held), (D, H, W)), bins)
    ratios, contrast = _log_ratios(counts, clicked), _contrast(counts)
    for one in held:
        trust = trusts[one.label] * contrast
        if not one.logits.size or not trust:
            yield one
            continue
        evidence = trust * _evidence(ratios[one.label], bins[one.place_in(low)])
        free = np.abs(one.logits) <= SURE  # beyond are clicks, and nothing else may get there
        logits = np.where(free, np.clip(one.logits + evidence, -SURE, SURE), one.logits)
        yield ObjectLogits(one.label, one.start, logits)


def _seen_from(low: tuple[int, int, int], one: ObjectLogits) -> ObjectLogits:
    """The same object in an image that begins at a voxel of this one."""
    if not one.logits.size:
        return one
    z, y, x = (a - b for a, b in zip(one.start, low, strict=True))
    return ObjectLogits(one.label, (z, y, x), one.logits)


def intensity_log_odds(
    image: NDArray[np.generic],
    labels: NDArray[np.uint8],
    positive: Sequence[Sequence[float]],
    clicks: int,
    boxed: bool,
) -> NDArray[np.float32]:
    """What :func:`with_intensity_evidence` adds to the logits of one object of a window.

    Args:
        image: (D, H, W) intensities of any scale.
        labels: (D, H, W), 1 where the object was found, 0 where no object is, else another one's.
        positive: (z, y, x) of the object's positive clicks, in cells.
        clicks: how many it has of either sign.
        boxed: whether it has a box.

    Returns:
        (D, H, W) log-odds.
    """
    bins = _binned(image)
    places = [np.round(place).astype(int) for place in positive]
    counts = _histograms(labels, bins)
    ratios = _log_ratios(counts, {1: _clicked(places, bins)})
    return _trust(boxed, clicks) * _contrast(counts) * _evidence(ratios[1], bins)


def _evidence(ratios: NDArray[np.float32], bins: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An object's (bins,) log-ratios at the (D, H, W) bins of voxels, smoothed."""
    of_voxels = torch.from_numpy(ratios[bins])
    evidence: NDArray[np.float32] = smooth(of_voxels[None], _SIGMA)[0].numpy()
    return evidence


def _trust(boxed: bool, clicks: int) -> float:
    """How much an object's intensities count: without a box the less, the fewer its clicks."""
    return _TRUST if boxed else _TRUST * clicks / (clicks + _CLICKS_FOR_HALF)


def _binned(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Intensities as numbers of bins between the first and the last percentile."""
    step = max(1, round((image.size / 1e6) ** (1 / 3)))
    few = image[::step, ::step, ::step].astype(np.float32)
    low, high = np.percentile(few, (1, 99))
    bins = np.empty(image.shape, np.uint8)
    scale = (_BINS - 1) / max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-12)
    for plane, out in zip(image, bins, strict=True):
        out[:] = np.clip((plane.astype(np.float32) - low) * scale, 0, _BINS - 1)
    return bins


def _clicked(places: Sequence[NDArray[np.integer]], bins: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, bins) densities about positive clicks: of the voxel and its six neighbours.

    Args:
        places: (z, y, x) voxels of a region; those outside are left out.
        bins: (D, H, W) numbers of bins there.
    """
    found = []
    for place in places:
        if (place >= 0).all() and (place < bins.shape).all():
            near = np.clip(place + np.array(NEIGHBOURS), 0, np.array(bins.shape) - 1)
            found.append(np.bincount(bins[tuple(near.T)], minlength=_BINS) / len(near))
    return np.array(found).reshape(-1, _BINS)


def _histograms(labels: NDArray[np.uint8], bins: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(256, bins) voxels of each label and bin, of (D, H, W) labels and numbers of bins."""
    counts = np.zeros(256 * _BINS, np.int64)
    for plane, values in zip(labels, bins, strict=True):
        counts += np.bincount(
            (plane.astype(np.intp) * _BINS + values).ravel(), minlength=counts.size
        )
    return counts.reshape(256, _BINS).astype(float)


def _contrast(counts: NDArray[np.float64]) -> float:
    """How far intensities depend on the object, 0..1, of (256, bins) voxels of labels.

    The mean of two shares of variance: what is between the objects' means, of that and what is
    within objects (eta squared, objects counting alike); and what is between an object's mean and
    that of label 0, averaged over objects. Fetal tissues have both, organs the first, nuclei the
    second, cells that look like each other and like what is between them neither. All objects of a
    case have one value, or those of a larger one would win wherever they meet.
    """
    n = counts.sum(1)
    mean = counts @ np.arange(_BINS) / np.maximum(n, 1)
    variance = counts @ np.arange(_BINS) ** 2 / np.maximum(n, 1) - mean**2
    found = np.flatnonzero(n[1:]) + 1
    if not len(found):
        return 0.0
    step = (mean[found] - mean[0]) ** 2 * (n[0] > 0)
    alone = step / np.maximum(step + variance[found] + variance[0], 1e-6)
    between, within = mean[found].var(), variance[found].mean()
    return float(alone.mean() + between / max(between + within, 1e-6)) / 2


def _log_ratios(
    counts: NDArray[np.float64], clicked: Mapping[int, NDArray[np.float64]]
) -> NDArray[np.float32]:
    """(256, bins) log of each label's density over that of label 0, clipped.

    Args:
        counts: (256, bins) voxels.
        clicked: (n, bins) of a label: densities about its n clicks. Masks may be wrong, clicks
            are not; but the next ones lie where intensities or the network misled, and are not
            typical, so all of them count as much as the mask does.
    """
    density = _smoothed(counts, _KERNEL)
    density /= np.maximum(density.sum(1, keepdims=True), 1e-6)
    for label, about in clicked.items():
        if len(about):
            share = _CLICKED if density[label].any() else 1.0
            clicks = _smoothed(about.mean(0), _WIDE_KERNEL)
            density[label] = (1 - share) * density[label] + share * clicks / clicks.sum()
    density += _FLOOR
    ratios: NDArray[np.float32] = np.log(density / density[0]).astype(np.float32)
    return ratios.clip(-_CLIP, _CLIP)


def _smoothed(histograms: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., bins) convolved with a symmetric kernel, their last bins going on."""
    half = len(kernel) // 2
    sides = [(0, 0)] * (histograms.ndim - 1) + [(half, half)]
    longer = np.pad(histograms, sides, mode="edge")
    found: NDArray[np.float64] = sliding_window_view(longer, len(kernel), -1) @ kernel
    return found
