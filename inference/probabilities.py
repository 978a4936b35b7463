"""What the network is sure of, beside the label map: probabilities and where outlines may move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.logits import probability
from inference.neighbours import pairs
from inference.refinement import ObjectLogits

_TENTHS = 10.0  # steps of the outline's uncertainty a millimetre


class Probabilities:
    """Collects arrays to be saved, while objects pass on their way to the label map.

    Args:
        spacing_mm: (z, y, x) of the volume.
    """

    def __init__(self, spacing_mm: tuple[float, float, float]) -> None:
        self._spacing_mm = spacing_mm
        self._regions: dict[int, tuple[int, ...]] = {}
        self._arrays: dict[str, NDArray[np.uint8]] = {}

    def watch(self, results: Iterable[ObjectLogits]) -> Iterator[ObjectLogits]:
        """Note every object and pass it on; what was noted in an earlier attempt is forgotten."""
        self._regions.clear()
        self._arrays.clear()
        for result in results:
            self._note(result)
            yield result

    def _note(self, result: ObjectLogits) -> None:
        self._regions[result.label] = (result.label, *result.start, *result.stop)
        of_255 = np.rint(255 * probability(result.logits)).astype(np.uint8)
        self._arrays[f"probability_{result.label}"] = of_255
        moves = outline_uncertainty_mm(result.logits, self._spacing_mm)
        tenths = np.minimum(np.ceil(moves * _TENTHS), 255).astype(np.uint8)
        self._arrays[f"outline_{result.label}"] = tenths

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Keys and arrays of an output file, ``segs`` apart.

        ``regions`` (N, 7) int32: label, then first and one past the last voxel (z, y, x) of the
        cut-out that the label's arrays cover; beyond it the probability is 0.
        ``probability_K`` (d, h, w) uint8, 255 for certain: class K as the network and the clicks
        have it and intensities tell it from the others, before post-processing and before one of
        several gets a voxel.
        ``outline_K`` (d, h, w) uint8: 0 but at the voxels on the inside of class K's outline,
        where it is how far the outline moves, in tenths of a millimetre, at least 1 and at most
        255, if the network's log-odds were one off.
        """
        regions = [self._regions[label] for label in sorted(self._regions)]
        arrays: dict[str, NDArray[Any]] = {
            "regions": np.array(regions, np.int32).reshape(-1, 7),
        }
        for label in sorted(self._regions):
            for kind in ("probability", "outline"):
                arrays[f"{kind}_{label}"] = self._arrays[f"{kind}_{label}"]
        return arrays


def outline_uncertainty_mm(
    logits: NDArray[np.float32], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float32]:
    """How far an object's outline moves if its log-odds are one off: 1 / |gradient|.

    Args:
        logits: (d, h, w) float32, positive where the object is.
        spacing_mm: (z, y, x).

    Returns:
        (d, h, w) float32, mm, above 0 at the object's voxels with a face neighbour outside of it
        (within the cut-out), 0 elsewhere.
    """
    mask = logits > 0
    steepness = np.zeros(logits.shape, np.float32)
    outline = np.zeros(logits.shape, bool)
    clipped = logits.clip(-10, 10)  # a click's logit is no measure of steepness
    for axis, spacing in enumerate(spacing_mm):
        if logits.shape[axis] < 2:
            continue
        low, high = pairs(3, axis)
        # The steeper of the two sides: across the outline, not along it.
        change = np.abs(clipped[high] - clipped[low]) / np.float32(spacing)
        differs = mask[high] != mask[low]
        outline[high] |= differs
        outline[low] |= differs
        along = np.zeros(logits.shape, np.float32)
        along[high] = change
        np.maximum(along[low], change, out=along[low])
        steepness += np.square(along)
    outline &= mask
    moves = np.zeros(logits.shape, np.float32)
    moves[outline] = 1 / np.maximum(np.sqrt(steepness[outline]), 1e-3)
    return moves
