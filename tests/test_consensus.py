"""One object out of looks of different size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from inference.consensus import best_threshold, consensus
from inference.refinement import ObjectLogits

SHAPE = (9, 10, 11)


@st.composite
def looks(draw: st.DrawFn) -> list[ObjectLogits]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.tuples(*[st.integers(0, n - 1) for n in SHAPE]))
        size = tuple(draw(st.integers(0, n - a)) for a, n in zip(start, SHAPE, strict=True))
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        centre = draw(st.floats(-6, 6))
        found.append(ObjectLogits(4, start, rng.normal(centre, 3, size).astype(np.float32)))
    return found


def _pasted(look: ObjectLogits, fill: float) -> np.ndarray:
    whole = np.full(SHAPE, fill, np.float32)
    if look.logits.size:
        whole[look.place] = look.logits
    return whole


@settings(max_examples=60)
@given(looks(), st.lists(st.floats(0.5, 3), min_size=3, max_size=3))
def test_the_voxels_taken_have_the_largest_expected_dice(
    several: list[ObjectLogits], weights: list[float]
) -> None:
    weights = weights[: len(several)]
    result = consensus(several, weights)
    assert result.label == 4
    mask = _pasted(result, -1) > 0
    each = [expit(_pasted(look, -np.inf)) for look in several]
    mean = np.average(each, axis=0, weights=weights)

    def expected(mask: np.ndarray) -> float:
        return float(2 * mean[mask].sum() / max(mask.sum() + mean.sum(), 1e-9))

    others = [expected(mean > t) for t in np.linspace(0.1, 0.5, 81)]
    assert expected(mask) >= max(others) - 0.01
    assert not mask[mean < 0.098].any() and mask[mean > 0.502].all()


def test_looks_that_agree_keep_their_object_and_doubt_takes_more_than_half() -> None:
    sure = np.full(SHAPE, -9, np.float32)
    sure[2:7, 2:7, 2:7] = 9
    one = consensus([ObjectLogits(1, (0, 0, 0), sure)] * 3, [1, 2, 1])
    np.testing.assert_array_equal(one.logits > 0, sure > 0)
    doubtful = np.full(SHAPE, -0.8, np.float32)  # a probability of .31 everywhere
    assert (consensus([ObjectLogits(1, (0, 0, 0), doubtful)], [1]).logits > 0).all()


def test_a_look_that_found_nothing_counts_as_any() -> None:
    empty = ObjectLogits(2, (0, 0, 0), np.zeros((0, 0, 0), np.float32))
    assert consensus([empty, empty], [1, 1]).logits.size == 0
    half = np.zeros((2, 2, 2), np.float32)  # a probability of one half
    both = consensus([empty, ObjectLogits(2, (3, 4, 5), half)], [1, 1])
    assert both.start == (3, 4, 5)
    odds = np.exp(both.logits.astype(np.float64))
    threshold = best_threshold(np.full((2, 2, 2), 0.25, np.float32))
    np.testing.assert_allclose(odds, (0.25 / 0.75) / (threshold / (1 - threshold)), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-4, 1.0])
def test_thresholds_stay_within_their_limits(value: float) -> None:
    assert 0.1 <= best_threshold(np.full((4, 4, 4), value, np.float32)) <= 0.5
