"""Confidence intervals of means of few values."""

import math

import numpy as np
import pytest

from training.evaluation.intervals import mean_intervals, mean_of_known

CASES = np.repeat(np.arange(5), (6, 8, 5, 5, 2))
STRATA = [n == CASES for n in range(5)]


@pytest.mark.parametrize("strata", [*([s] for s in STRATA), STRATA], ids=[*"68552", "mean"])
def test_hold_the_true_mean_95_times_in_100(strata):
    """However few the cases of a modality, and however differently modalities scatter."""
    spread = np.array([0.06, 0.1, 0.05, 0.03, 0.01])[CASES]
    values = np.random.default_rng(0).normal(0.8, spread, (4000, len(CASES))).T
    held = np.mean([low <= 0.8 <= high for _, low, high, _ in mean_intervals(values, strata)])
    assert 0.93 <= held <= 0.97  # 4,000 samples: .95 is met within .01


def test_of_one_stratum_is_students():
    """Three values 1, 2, 3: standard error .577, 4.303 of it (tables of t, two degrees)."""
    (found,) = mean_intervals(np.array([[1.0], [np.nan], [2.0], [3.0]]), [np.ones(4, bool)])
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert found.count == 3


def test_mean_weighs_strata_alike():
    values = np.array([[0.0], [0.2], [0.4], [1.0], [1.2]])
    (found,) = mean_intervals(values, [np.arange(5) < 3, np.arange(5) >= 3])
    assert found.mean == pytest.approx((0.2 + 1.1) / 2)
    assert found.count == 5


def test_one_value_scatters_as_the_others_do():
    """Strata of 3 and 1 values: squared standard errors .04 / 3 and .04, two degrees each."""
    values = np.array([[0.0], [0.2], [0.4], [1.0]])
    (found,) = mean_intervals(values, [np.arange(4) < 3, np.arange(4) == 3])
    degrees = (0.04 / 3 + 0.04) ** 2 / ((0.04 / 3) ** 2 / 2 + 0.04**2 / 2)
    assert degrees == pytest.approx(3.2)
    assert found.high - found.mean == pytest.approx(
        3.071 * math.sqrt(0.04 / 3 + 0.04) / 2, rel=2e-3
    )


def test_without_anything_to_go_by():
    one, alike, none = mean_intervals(
        np.array([[0.5, 0.5, np.nan], [np.nan, 0.5, np.nan]]), [np.ones(2, bool)]
    )
    assert one[0] == 0.5 and one.count == 1
    assert math.isnan(one.low) and math.isnan(one.high)
    assert alike == (0.5, 0.5, 0.5, 2)
    assert math.isnan(none.mean) and math.isnan(none.low) and none.count == 0


def test_what_is_not_known_is_left_out_of_a_mean():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    np.testing.assert_array_equal(mean_of_known(values, 0), [2, 4, np.nan])
    np.testing.assert_array_equal(mean_of_known(values, 1), [1, 3.5])
