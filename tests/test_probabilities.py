"""How sure outlines are, and what is kept of objects."""

from __future__ import annotations

import numpy as np
import pytest

from inference.probabilities import (
    Probabilities,
    exclusive_probabilities,
    outline_uncertainty_mm,
)
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
    logits = np.full((4, 4, 4), 1e-4, np.float32)
    logits[2:] = -1e-4
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


def test_an_object_alone_has_the_logistic_function_of_its_logits():
    logits = np.linspace(-20, 20, 60, dtype=np.float32).reshape(3, 4, 5)
    (found,) = exclusive_probabilities([ObjectLogits(3, (5, 6, 7), logits)])
    assert found.dtype == np.float32
    assert np.allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_objects_share_a_voxel_with_each_other_and_with_none():
    random = np.random.default_rng(0)
    places = {1: ((0, 0, 0), (6, 7, 8)), 2: ((2, 1, 0), (4, 9, 5)), 3: ((20, 20, 20), (2, 2, 2))}
    results = [
        ObjectLogits(label, start, random.normal(0, 3, size).astype(np.float32))
        for label, (start, size) in places.items()
    ]
    odds = np.zeros((3, 22, 22, 22))
    for one, result in zip(odds, results, strict=True):
        one[result.place] = np.exp(result.logits)
    expected = odds / (1 + odds.sum(0))
    for one, result, found in zip(expected, results, exclusive_probabilities(results), strict=True):
        assert np.allclose(found, one[result.place], atol=1e-6)


def test_a_click_takes_all_from_the_most_certain_mask():
    sure = np.full((2, 3, 4), SURE, np.float32)
    clicked = np.full((2, 3, 4), -SURE, np.float32)
    clicked[1, 1, 1] = SURE + 1
    mask, click = exclusive_probabilities(
        [ObjectLogits(1, (4, 4, 4), sure), ObjectLogits(2, (4, 4, 4), clicked)]
    )
    assert (mask[1, 1, 1], click[1, 1, 1]) == pytest.approx((0, 1))
    assert (mask[0, 0, 0], click[0, 0, 0]) == pytest.approx((1, 0))


def test_objects_that_are_nowhere_change_nothing():
    some = ObjectLogits(2, (1, 1, 1), np.ones((2, 2, 2), np.float32))
    nothing, found = exclusive_probabilities([ObjectLogits.nothing(1), some])
    assert nothing.size == 0 and np.allclose(found, 1 / (1 + np.exp(-1)))
    (nothing,) = exclusive_probabilities([ObjectLogits.nothing(1)])
    assert nothing.size == 0


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
