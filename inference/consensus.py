"""One object out of several looks at it, where nothing tells its size.

A first click may mean a gland, the lobe it lies in or the whole organ, and a network shown a window
of one size expects an object of that size. Looks at several sizes, averaged as probabilities, say
how sure each voxel is whatever the size; the voxels taken are those that together have the largest
expected Dice. With much doubt that is more than the voxels above one half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from inference.logits import probability
from inference.refinement import ObjectLogits, hull

#: Logit below which a look has nothing to say about a voxel.
FLOOR = -2.0
_BINS = 1000
_LEAST = 0.1  # a voxel less probable than this is not taken, whatever is expected of it


def consensus(looks: Sequence[ObjectLogits], weights: Sequence[float]) -> ObjectLogits:
    """Logits above zero where the voxels of largest expected Dice are.

    Args:
        looks: of one object, at least one, each down to :data:`FLOOR`; outside of its box of voxels
            a look says that the object is absent.
        weights: how much each of them counts, above 0.

    Returns:
        On the smallest box around all looks: log-odds of the mean probability, less those of the
        chosen threshold. A single look's threshold is chosen, too.
    """
    label = looks[0].label
    boxes = [(look.start, look.stop) for look in looks if look.logits.size]
    if not boxes:
        return ObjectLogits.nothing(label)
    low, high = hull(boxes)
    mean = np.zeros([b - a for a, b in zip(low, high, strict=True)], np.float32)
    for look, weight in zip(looks, weights, strict=True):
        if look.logits.size:
            mean[look.place_in(low)] += weight * probability(look.logits)
    mean /= sum(weights)
    threshold = best_threshold(mean)
    np.clip(mean, 1e-6, 1 - 1e-6, out=mean)
    np.log(mean / (1 - mean), out=mean)
    mean -= np.log(threshold / (1 - threshold))
    return ObjectLogits(label, low, mean)


def best_threshold(probabilities: NDArray[np.float32]) -> float:
    """The threshold whose mask has the largest expected Dice, 0.1 to 0.5.

    The expected Dice of a mask M is taken to be 2 sum_M p / (|M| + sum p), exact but for the
    covariance of numerator and denominator, which for masks of many voxels does not matter.

    Args:
        probabilities: any shape, 0..1.
    """
    bins = (probabilities.ravel() * _BINS).astype(np.int16)
    counts = np.bincount(bins, minlength=_BINS + 1)
    sums = np.bincount(bins, probabilities.ravel(), minlength=_BINS + 1)
    taken, probable = np.cumsum(counts[::-1])[::-1], np.cumsum(sums[::-1])[::-1]
    expected = 2 * probable / (taken + probable[0] + 1e-9)
    first, last = int(_LEAST * _BINS), _BINS // 2
    return float(first + expected[first : last + 1].argmax()) / _BINS
