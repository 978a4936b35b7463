"""What the network is sure of, beside the label map: probabilities and where outlines may move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.neighbours import pairs
from inference.refinement import SURE, ObjectLogits, hull

_TENTHS = 10.0  # steps of the outline's uncertainty a millimetre


class Probabilities:
    """Collects arrays to be saved, while objects pass on their way to the label map.

    Args:
        spacing_mm: (z, y, x) of the volume.
    """

    def __init__(self, spacing_mm: tuple[float, float, float]) -> None:
        self._spacing_mm = spacing_mm
        self._noted: list[ObjectLogits] = []
        self._outlines: dict[int, NDArray[np.uint8]] = {}

    def watch(self, results: Iterable[ObjectLogits]) -> Iterator[ObjectLogits]:
        """Note every object and pass it on; what was noted in an earlier attempt is forgotten."""
        self._noted.clear()
        self._outlines.clear()
        for result in results:
            self._note(result)
            yield result

    def _note(self, result: ObjectLogits) -> None:
        halved: NDArray[Any] = result.logits.astype(np.float16)  # all objects are held together
        self._noted.append(ObjectLogits(result.label, result.start, halved))
        moves = outline_uncertainty_mm(result.logits, self._spacing_mm)
        tenths = np.minimum(np.ceil(moves * _TENTHS), 255).astype(np.uint8)
        self._outlines[result.label] = tenths

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Keys and arrays of an output file, ``segs`` apart.

        ``regions`` (N, 7) int32: label, then first and one past the last voxel (z, y, x) of the
        cut-out that the label's arrays cover; beyond it the probability is 0.
        ``probability_K`` (d, h, w) uint8, 255 for certain: class K as the network and the clicks
        have it and intensities tell it from the others, one of several classes or none
        (:func:`exclusive_probabilities`), before post-processing.
        ``outline_K`` (d, h, w) uint8: 0 but at the voxels on the inside of class K's outline,
        where it is how far the outline moves, in tenths of a millimetre, at least 1 and at most
        255, if the network's log-odds were one off.
        """
        noted = sorted(self._noted, key=lambda result: result.label)
        regions = [(result.label, *result.start, *result.stop) for result in noted]
        arrays: dict[str, NDArray[Any]] = {
            "regions": np.array(regions, np.int32).reshape(-1, 7),
        }
        for result, chances in zip(noted, exclusive_probabilities(noted), strict=True):
            arrays[f"probability_{result.label}"] = np.rint(255 * chances).astype(np.uint8)
            arrays[f"outline_{result.label}"] = self._outlines[result.label]
        return arrays


def exclusive_probabilities(results: Sequence[ObjectLogits]) -> Iterator[NDArray[np.float32]]:
    """Probabilities of objects of which a voxel has one or none.

    Logits tell each object from its absence, whatever else is there, so where objects share a box
    the logistic functions of several may be near 1. The product of these binary models, normalised
    over what a voxel can be (Hinton 2002), gives an object of odds o the probability
    o / (1 + sum of all odds). One object alone keeps what the logistic function gives.

    Args:
        results: all objects of a case, logits of any floating-point type.

    Yields:
        Of each (d, h, w) float32, 0..1. Clicked voxels are certain.
    """
    shown = [(result.start, result.stop) for result in results if result.logits.size]
    low, high = hull(shown or [((0, 0, 0), (0, 0, 0))])
    total = np.zeros(np.subtract(high, low), np.float32)  # log-odds of none: 0
    for result in results:
        part = total[result.place_in(low)]
        np.logaddexp(part, _certain(result.logits), out=part)
    for result in results:
        yield np.exp(_certain(result.logits) - total[result.place_in(low)])


def _certain(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Logits as float32, clicks beyond what any mask has."""
    values = logits.astype(np.float32)
    values[values > SURE] *= 2
    return values


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
