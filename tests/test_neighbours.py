"""Growth by cuboids, and background that is shut in."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from inference.neighbours import dilated, shut_in


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(0, 15)] * 3))
def test_dilation_is_by_a_cuboid(shape, reach):
    mask = np.random.default_rng(0).random(shape) < 0.05
    size = [2 * steps + 1 for steps in reach]
    expected = ndimage.maximum_filter(mask.view(np.uint8), size, mode="constant") > 0
    assert np.array_equal(dilated(mask, reach), expected)


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 7)] * 3), st.integers(0, 99))
def test_background_is_shut_in_if_filling_holes_fills_it(shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.7
    background, count = ndimage.label(~mask)
    filled = shut_in(background, count)[background]
    assert np.array_equal(mask | filled, ndimage.binary_fill_holes(mask))
