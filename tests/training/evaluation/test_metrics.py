"""DSC and NSD against the surface-distance package, where that is defined, and beyond."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from tests.training.evaluation import official_restatement as official
from training.evaluation import surface_dice
from training.evaluation.label_map import LabelMap
from training.evaluation.metrics import (
    area_under_curve,
    as_spacing,
    score,
)

SPACINGS = [
    (3.0, 2.0, 1.0),
    (1.0, 1.0, 1.0),
    np.float32([0.4, 0.4, 0.4]),  # in float32 five voxels are 2 mm, in float64 a little more
    np.float32([0.8, 0.8, 2.0]),
    (0.01, 0.01, 0.01),
    (3.27, 0.976562, 0.976562),
    (0.05, 0.3, 5.0),
    (12.0, 9.0, 7.0),
]


def nsd(mask, other, spacing, tolerance_mm=2.0):
    maps = [LabelMap.of(one.astype(np.uint8)) for one in (mask, other)]
    mm = as_spacing(spacing)
    surfaces = [surface_dice.find_surface(m.voxels, 1, m.boxes.get(1), mm) for m in maps]
    return surface_dice.surface_dice(*surfaces, mm, tolerance_mm)


def blobs(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(rng.normal(size=shape), sigma) > 0.05


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("tolerance", [2.0, 1.0, 0.0])
def test_nsd_is_the_packages(spacing, tolerance):
    rng = np.random.default_rng(int(1000 * sum(spacing)) + int(tolerance))
    for sigma in (0, 0.7, 2):
        shape = tuple(rng.integers(1, 26, 3))
        mask = blobs(rng, shape, sigma)
        for other in (blobs(rng, shape, sigma), mask ^ (rng.random(shape) < 0.02), mask):
            expected = official.surface_dice(mask, other, spacing, tolerance)
            found = nsd(mask, other, spacing, tolerance)
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("spacing", [(3.0, 2.0, 1.0), (0.2, 0.4, 0.3)])
def test_nsd_of_far_and_tiny_objects(spacing):
    """One voxel each, at every kind of distance, also out of the tolerance's reach."""
    for offset in [(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 1, 1), (0, 5, 0), (9, 0, 9), (19, 19, 19)]:
        mask, other = np.zeros((2, 20, 20, 20), bool)
        mask[0, 0, 0] = True
        other[offset] = True
        expected = official.surface_dice(mask, other, spacing)
        assert nsd(mask, other, spacing) == pytest.approx(expected, abs=1e-12)


def test_nsd_searches_large_balls_by_tree(monkeypatch):
    """Both ways of searching the ball agree, and the tree is used where the ball is large."""
    calls = []
    by_tree = surface_dice._within_by_tree

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return by_tree(*arguments)

    monkeypatch.setattr(surface_dice, "_within_by_tree", counted)
    rng = np.random.default_rng(3)
    shape = (40, 40, 60)
    mask = np.zeros(shape, bool)
    mask[10:20, 10:30, 5:25] = True
    other = np.roll(mask, 14, axis=2) ^ (blobs(rng, shape, 1) & (rng.random(shape) < 0.01))
    for spacing in ((0.25, 0.25, 0.25), (0.1, 0.4, 0.2)):
        expected = official.surface_dice(mask, other, spacing)
        assert nsd(mask, other, spacing) == pytest.approx(expected, abs=1e-9)
    assert len(calls) == 4
    assert min(calls) > 0


def test_nsd_of_empty_masks():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    assert nsd(full, empty, (1, 1, 1)) == 0
    assert nsd(empty, full, (1, 1, 1)) == 0
    assert math.isnan(nsd(empty, empty, (1, 1, 1)))
    assert official.surface_dice(full, empty, (1, 1, 1)) == 0


@pytest.mark.parametrize("spacing", [(3.0, 2.0, 1.0), np.float32([0.4, 0.4, 2.0])])
def test_score_is_the_restatements(spacing):
    rng = np.random.default_rng(5)
    shape = (18, 25, 30)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, 2, 2, 2)) > 0.03
    reference = np.array([0, 1, 3, 7], np.uint8)[smooth[0] + 2 * smooth[1]]
    wrong = np.roll(reference, (1, -1, 2), (0, 1, 2))
    wrong[:4] = 9  # a label the reference has not
    for prediction in (wrong, reference, np.zeros_like(reference)):
        found = score(LabelMap.of(reference), LabelMap.of(prediction), as_spacing(spacing))
        expected = official.mean_dsc(reference, prediction)
        assert found.dsc == tuple(expected)
        assert found.mean_dsc == np.mean(expected)
        if found.mean_dsc > 0.2:
            nsd = official.mean_nsd(reference, prediction, spacing)
            assert found.nsd == pytest.approx(nsd, abs=1e-9)
        else:
            assert set(found.nsd) == {0.0}


def test_nsd_is_zero_up_to_a_dsc_of_a_fifth():
    """The challenge's threshold: at 0.2 exactly NSD is still 0."""
    reference, prediction = np.zeros((2, 1, 1, 20), np.uint8)
    reference[..., :10] = 1
    prediction[..., 9:] = 1  # 2 * 1 / 21
    found = score(LabelMap.of(reference), LabelMap.of(prediction), (1.0, 1.0, 1.0))
    assert found.nsd == (0.0,)
    reference[..., 2:] = 0
    prediction[:] = 0
    prediction[..., 1:9] = 1  # 2 * 1 / 10
    found = score(LabelMap.of(reference), LabelMap.of(prediction), (1.0, 1.0, 1.0))
    assert found.dsc == (0.2,)
    assert found.nsd == (0.0,)
    prediction[..., 8] = 0  # 2 * 1 / 9
    found = score(LabelMap.of(reference), LabelMap.of(prediction), (1.0, 1.0, 1.0))
    assert found.nsd[0] > 0


def test_area_under_curve():
    assert area_under_curve([1, 1, 1, 1, 1]) == 4
    assert area_under_curve([0.5, 0.1, 0.2, 0.3, 0.4, 0.6]) == pytest.approx(1.25)
    with pytest.raises(ValueError, match="4 rounds"):
        area_under_curve([1, 1, 1, 1])


@pytest.mark.parametrize("spacing", [(1, 1), (1, 0, 1), (1, -2, 1), (1, math.nan, 1)])
def test_spacing_that_is_none(spacing):
    with pytest.raises(ValueError, match="accepted: three positive numbers"):
        as_spacing(spacing)


def test_label_map():
    labels = np.zeros((4, 5, 6), np.int64)
    labels[1:3, 2, 0:4] = 3
    labels[3, 4, 5] = 300
    found = LabelMap.of(labels)
    assert found.labels == [3, 300]
    assert found.boxes[3] == (slice(1, 3), slice(2, 3), slice(0, 4))
    assert found.voxels.dtype == np.uint16
    assert LabelMap.of(labels.astype(np.float32)).labels == [3, 300]
    for wrong in (labels - 1, labels + 0.5, labels[0]):
        with pytest.raises(ValueError, match="accepted"):
            LabelMap.of(wrong)
