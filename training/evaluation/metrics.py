"""Scores of a label map against its reference: DSC and NSD of each class, and over the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.evaluation.label_map import Crop, LabelMap, intersection
from training.evaluation.surface_dice import Spacing, find_surface, surface_dice

TOLERANCE_MM = 2.0
CLICK_ROUNDS = 5
#: What the rounds of a case may take together, a class; where they take longer its scores are 0.
SECONDS_PER_CLASS = 90
# The challenge sets the NSD of a case to 0 where its mean DSC is not above this.
_NSD_NEEDS_DSC = 0.2


@dataclass(frozen=True)
class Scores:
    """Scores of one case in one round, one entry a class, in ascending order of the labels."""

    dsc: tuple[float, ...]
    nsd: tuple[float, ...]

    @property
    def mean_dsc(self) -> float:
        """Mean DSC over the classes."""
        return float(np.mean(self.dsc))

    @property
    def mean_nsd(self) -> float:
        """Mean NSD over the classes."""
        return float(np.mean(self.nsd))


def as_spacing(spacing: Sequence[float] | NDArray[np.generic]) -> Spacing:
    """Three positive numbers, as exactly the floats they are."""
    values = [float(s) for s in spacing]
    if len(values) != 3 or not all(np.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"spacing {values}; accepted: three positive numbers")
    return values[0], values[1], values[2]


def score(reference: LabelMap, prediction: LabelMap, spacing: Spacing) -> Scores:
    """Score every class of the reference as the challenge does.

    Args:
        reference: the true labels; each of its labels is a class.
        prediction: same shape; labels the reference has not are ignored.
        spacing: mm along the arrays' axes. The challenge's evaluator passes the file's (x, y, z)
            spacing unpermuted, and so must whoever wants its figures.

    Returns:
        DSC of each class, and its NSD at 2 mm: 0 for all where the mean DSC is 0.2 or less.
    """
    labels = reference.labels
    dsc = tuple(_class_dice(reference, prediction, label) for label in labels)
    if not np.mean(dsc) > _NSD_NEEDS_DSC:
        return Scores(dsc, (0.0,) * len(labels))
    nsd = []
    for label in labels:
        true, found = (
            find_surface(m.voxels, label, m.boxes.get(label), spacing)
            for m in (reference, prediction)
        )
        nsd.append(surface_dice(true, found, spacing, TOLERANCE_MM))
    return Scores(dsc, tuple(nsd))


def area_under_curve(rounds: Sequence[float]) -> float:
    """Trapezoid over the scores of the five click rounds, the last five of ``rounds``; 0..4."""
    if len(rounds) < CLICK_ROUNDS:
        raise ValueError(f"{len(rounds)} rounds; accepted: at least {CLICK_ROUNDS}")
    return float(np.trapezoid(np.asarray(rounds[-CLICK_ROUNDS:], np.float64)))


def _class_dice(reference: LabelMap, prediction: LabelMap, label: int) -> float:
    ours, theirs = reference.boxes[label], prediction.boxes.get(label)
    both = intersection(ours, theirs)
    common = 0
    if both is not None:
        inside = prediction.voxels[both] == label
        inside &= reference.voxels[both] == label
        common = int(np.count_nonzero(inside))
    total = _volume(reference, label, ours) + _volume(prediction, label, theirs)
    return float(2 * common / total)


def _volume(labels: LabelMap, label: int, box: Crop | None) -> int:
    return 0 if box is None else int(np.count_nonzero(labels.voxels[box] == label))
