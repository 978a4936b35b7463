"""The simulated user against the literal restatement of the challenge's."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import ndimage

from tests.training.evaluation import official_restatement as official
from training.evaluation import clicks
from training.evaluation.clicks import next_click
from training.evaluation.label_map import LabelMap


def assert_same_click(reference, prediction, label=1, **how):
    expected = official.click(reference, prediction, label, **how)
    found = next_click(LabelMap.of(reference), LabelMap.of(prediction), label)
    if expected is None:
        assert found is None
    else:
        position, kind = expected
        assert found is not None
        assert found.position == tuple(position)
        assert found.positive == (kind == "fg")


@hypothesis.given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9]),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_noise_with_many_equal_components(shape, seed, density):
    """Which of equally large components, and which of equally deep voxels."""
    rng = np.random.default_rng(seed)
    reference = (rng.random(shape) < 0.3).astype(np.uint8)
    prediction = reference ^ (rng.random(shape) < density).astype(np.uint8)
    assert_same_click(reference, prediction)


@pytest.mark.parametrize("sigma", [0.8, 2.0, 4.0])
def test_smooth_errors(sigma):
    rng = np.random.default_rng(int(10 * sigma))
    for _ in range(8):
        shape = tuple(rng.integers(5, 45, 3))
        reference, prediction = (
            ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, sigma, sigma, sigma)) > 0
        ).astype(np.uint8)
        assert_same_click(3 * reference, 3 * prediction, label=3)


def test_no_click_where_nothing_is_wrong():
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 1:3, 2] = 2
    assert next_click(LabelMap.of(labels), LabelMap.of(labels), 2) is None
    assert next_click(LabelMap.of(labels), LabelMap.of(labels), 1) is None


@pytest.mark.parametrize("threshold", [40, 500])
def test_large_components_are_halved(monkeypatch, threshold):
    """The rule for components over 60 million voxels, at a size that can be tested."""
    monkeypatch.setattr(clicks, "_HALVED_ABOVE", threshold)
    rng = np.random.default_rng(threshold)
    for sigma in (0, 0.7, 2):
        for _ in range(12):
            shape = tuple(rng.integers(2, 24, 3))
            noise = rng.normal(size=(2, *shape))
            smooth = ndimage.gaussian_filter(noise, (0, sigma, sigma, sigma)) if sigma else noise
            reference, prediction = (smooth > 0.02).astype(np.uint8)
            assert_same_click(reference, prediction, halve_above=threshold)


def test_components_longer_than_float32_counts(monkeypatch):
    """Longer ones than squared distances are exact for go through scipy, with the same result."""
    monkeypatch.setattr(clicks, "_EXACT_EDGE", 8)
    rng = np.random.default_rng(0)
    reference = np.zeros((9, 20, 12), np.uint8)
    reference[1:8, 2:18, 1:11] = 1
    prediction = reference & (rng.random(reference.shape) < 0.1)
    assert_same_click(reference, prediction)


def test_the_global_random_state_is_left_alone():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    next_click(LabelMap.of(labels), LabelMap.of(np.zeros_like(labels)), 1)
    assert (np.random.get_state()[1] == before).all()
