"""How sure outlines are, and what is kept of objects."""

from __future__ import annotations

import numpy as np
import pytest

from inference.probabilities import Probabilities, outline_uncertainty_mm
from inference.refinement import SURE, ObjectLogits


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_a_ramp_moves_by_its_slope_in_mm(axis, slope):
    spacing_mm = (3.0, 2.0, 1.0)
    ramp = (np.arange(12) - 5.5) * spacing_mm[axis] * slope
    logits = np.moveaxis(np.broadcast_to(ramp.clip(-9, 9), (7, 8, 12)), 2, axis)
    moves = outline_uncertainty_mm(logits.astype(np.float32), spacing_mm)
    expected = np.zeros(logits.shape)
    place = [slice(None)] * 3
    place[axis] = 6  # the first voxel on the inside
    expected[tuple(place)] = 1 / slope
    assert np.allclose(moves, expected, rtol=1e-5)


def test_flat_logits_are_as_unsure_as_can_be_and_nothing_overflows():
    logits = np.full((4, 4, 4), 1e-6, np.float32)
    logits[2:] = -1e-6
    collector = Probabilities((1.0, 1.0, 1.0))
    list(collector.watch([ObjectLogits(1, (0, 0, 0), logits)]))
    arrays = collector.arrays()
    assert (arrays["outline_1"][1] == 255).all()
    assert not arrays["outline_1"][[0, 2, 3]].any()
    assert (arrays["probability_1"][:2] == 128).all()
    assert (arrays["probability_1"][2:] == 127).all()


def test_clicks_are_certain():
    logits = np.full((3, 3, 3), -2, np.float32)
    logits[1, 1, 1], logits[0, 0, 0] = SURE + 1, -SURE - 2
    collector = Probabilities((1.0, 1.0, 1.0))
    list(collector.watch([ObjectLogits(7, (0, 0, 0), logits)]))
    probability = collector.arrays()["probability_7"]
    assert (probability[1, 1, 1], probability[0, 0, 0]) == (255, 0)


def test_a_second_attempt_replaces_the_first_and_objects_pass_through():
    results = [ObjectLogits(label, (0, 0, label), np.ones((2, 1, 3))) for label in (2, 9)]
    collector = Probabilities((1.0, 1.0, 1.0))
    next(collector.watch(results))
    assert list(collector.watch(results[1:])) == results[1:]
    arrays = collector.arrays()
    assert list(arrays) == ["regions", "probability_9", "outline_9"]
    assert arrays["regions"].tolist() == [[9, 0, 0, 9, 2, 1, 12]]


def test_no_object_no_array():
    assert Probabilities((1.0, 1.0, 1.0)).arrays()["regions"].shape == (0, 7)
