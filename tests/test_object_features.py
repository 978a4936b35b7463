"""Measurements of objects whose answers are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from inference.adaptive_steps import Region
from inference.object_features import measure
from tests.test_adaptive_steps import ISOTROPIC, ball

FLAT = np.zeros((24, 24, 24), np.uint8)


def test_shape_of_a_ball_in_any_voxels():
    features = measure(ball(7), FLAT, ISOTROPIC, 2)
    assert features.voxels == np.count_nonzero(ball(7) > 0)
    assert (features.voxel_mm, features.anisotropy) == (1, 1)
    assert 0.6 < features.sphericity < 0.7
    assert (features.scatter, features.clicks, features.boxed) == (0, 2, 0)
    # The same ball in slices three times as thick: every third slice of it.
    thick = measure(ball(7)[::3], FLAT[::3], Region((3.0, 1.0, 1.0), slices=(0, 8)), 0)
    assert thick.sphericity == pytest.approx(features.sphericity, rel=0.1)
    assert thick.voxel_mm == pytest.approx(3 ** (1 / 3))
    assert (thick.anisotropy, thick.boxed) == (3, 1)


def test_a_sheet_is_far_from_a_sphere():
    sheet = np.full((24, 24, 24), -1, np.float32)
    sheet[12] = 1
    assert measure(sheet, FLAT, ISOTROPIC, 0).sphericity < 0.3


def test_scatter_is_what_lies_outside_of_the_largest_component():
    logits = np.maximum(ball(6), ball(3, centre=(3, 3, 3)))
    small, large = (np.count_nonzero(ball(r) > 0) for r in (3, 6))
    assert measure(logits, FLAT, ISOTROPIC, 0).scatter == pytest.approx(small / (small + large))


def test_confidence():
    sure = measure(ball(6, inside=30.0).clip(-4, 30), FLAT, ISOTROPIC, 0)
    logits = np.where(ball(6) > 0, 30, -30).astype(np.float32)
    assert measure(logits, FLAT, ISOTROPIC, 0).expected_dice == pytest.approx(1, abs=1e-6)
    assert measure(logits, FLAT, ISOTROPIC, 0).unsure == 0
    doubtful = np.where(ball(6) > 0, 1, -1).astype(np.float32)
    features = measure(doubtful, FLAT, ISOTROPIC, 0)
    assert features.expected_dice < sure.expected_dice
    assert features.unsure == pytest.approx(24**3 / features.voxels)


def test_edges():
    random = np.random.default_rng(0)
    mask = ball(7) > 0
    crisp = np.where(mask, 160.0, 100.0) + random.normal(0, 5, mask.shape)
    features = measure(ball(7), crisp, ISOTROPIC, 0)
    assert features.contrast == pytest.approx(60 / 5, rel=0.1)
    assert features.noise == pytest.approx(1, rel=0.15)
    assert features.sharpness == pytest.approx(1, abs=0.05)
    inverted = measure(ball(7), 255 - crisp, ISOTROPIC, 0)
    assert inverted.contrast == pytest.approx(features.contrast)
    assert inverted.sharpness == pytest.approx(features.sharpness)
    elsewhere = measure(ball(4), crisp, ISOTROPIC, 0)
    assert abs(elsewhere.sharpness) < 2 or elsewhere.contrast < 1


@pytest.mark.parametrize("image", [FLAT, np.full(FLAT.shape, 1e12), np.eye(24)[None] * FLAT[:, :1]])
def test_everything_is_finite(image):
    image = np.broadcast_to(image, FLAT.shape)
    for logits in (ball(7), np.ones(FLAT.shape, np.float32), ball(0)):
        features = measure(logits, image, ISOTROPIC, 0)
        assert all(math.isfinite(v) for v in dataclasses.astuple(features))
