"""Post-processing equals the literal SciPy restatement bit for bit, step by step and as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from inference import postprocessing
from tests import literal_postprocessing as literal

STEPS = ["remove_small_components", "fill_holes", "close_gaps", "smooth"]
THIN_SHAPES = [(1, 40, 40), (40, 1, 30), (30, 40, 1), (2, 33, 35), (1, 1, 70), (3, 3, 90)]


def blobs(shape: tuple[int, ...], labels: int, seed: int, scale: float = 2.0) -> np.ndarray:
    """Smooth random regions that touch each other and the border, some of them specks."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), scale) for _ in range(labels + 1)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def speckled(label_map: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Some voxels replaced by random labels: holes, specks and ragged edges."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, label_map.max() + 1, label_map.shape, dtype=label_map.dtype)
    return np.where(rng.random(label_map.shape) < share, noise, label_map)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("shape", [(37, 50, 41), *THIN_SHAPES])
def test_each_step_equals_scipy(step, share, shape):
    mask = speckled(blobs(shape, 1, seed=1), share, seed=2) > 0
    before = mask.copy()
    result = getattr(postprocessing, step)(mask)
    assert result.dtype == bool
    assert np.array_equal(result, getattr(literal, step)(mask))
    assert np.array_equal(mask, before), "the input is left as it is"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(9, 10, 11), (1, 1, 1), (1, 8, 9)])
def test_each_step_on_uniform_masks(step, value, shape):
    mask = np.full(shape, value)
    assert np.array_equal(getattr(postprocessing, step)(mask), getattr(literal, step)(mask))


@pytest.mark.parametrize("labels", [1, 3, 40])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("shape", [(40, 35, 45), *THIN_SHAPES])
def test_pipeline_equals_scipy(labels, share, shape):
    label_map = speckled(blobs(shape, labels, seed=labels), share, seed=3)
    assert np.array_equal(postprocessing.postprocess(label_map), literal.postprocess(label_map))


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 24)] * 3),
    labels=st.integers(1, 6),
    scale=st.floats(0.5, 4.0),
    share=st.floats(0.0, 0.3),
    seed=st.integers(0, 2**16),
)
def test_pipeline_equals_scipy_on_anything(shape, labels, scale, share, seed):
    label_map = speckled(blobs(shape, labels, seed, scale), share, seed + 1)
    assert np.array_equal(postprocessing.postprocess(label_map), literal.postprocess(label_map))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_memory_orders(dtype, order):
    label_map = np.asarray(blobs((20, 24, 28), 5, seed=5).astype(dtype), order=order)
    result = postprocessing.postprocess(label_map)
    assert result.dtype == dtype
    assert np.array_equal(result, literal.postprocess(label_map))


def test_read_only_and_strided_input():
    label_map = blobs((30, 48, 40), 4, seed=6)[::2, ::-1, 4:]
    label_map.flags.writeable = False
    assert np.array_equal(postprocessing.postprocess(label_map), literal.postprocess(label_map))


def test_real_label_maps(shared_data: Path):
    folder = shared_data / "label_maps"
    for name, crop in (
        ("LM_synthseg_head_01.npz", np.s_[60:124, 60:140, 60:140]),
        ("LM_pymskt_knee.npz", np.s_[:, 40:140, 40:140]),
    ):
        with np.load(folder / name) as file:
            label_map = np.unique(file["gts"][crop], return_inverse=True)[1].astype(np.uint8)
        assert label_map.max() >= 3
        assert np.array_equal(postprocessing.postprocess(label_map), literal.postprocess(label_map))


def test_dozens_of_real_neurites(shared_data: Path):
    with np.load(shared_data / "labels_only" / "connectomics_cc3d_512.npz") as file:
        label_map = file["labels"][200:264, 200:280, 200:296]
    assert len(np.unique(label_map)) == 50
    result = postprocessing.postprocess(label_map)
    assert result.dtype == label_map.dtype
    assert np.array_equal(result, literal.postprocess(label_map))


def test_components_of_64_voxels_stay_and_of_63_go():
    label_map = np.zeros((20, 20, 20), np.uint8)
    label_map[1:5, 1:5, 1:5] = 1
    label_map[8:12, 8:12, 8:12] = 2
    label_map[8, 8, 8] = 0
    label_map[14:18, 14:18, 14:18] = 3
    label_map[14, 14, 14] = 1  # another label inside: 63 voxels of label 3, and 1 of label 1
    kept = postprocessing.remove_small_components(label_map)
    assert np.count_nonzero(kept) == 64
    assert (kept[1:5, 1:5, 1:5] == 1).all()


def test_minimum_size_is_a_parameter():
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 1:4] = True
    assert postprocessing.remove_small_components(mask, minimum_voxels=3).sum() == 3
    assert postprocessing.remove_small_components(mask, minimum_voxels=4).sum() == 0


def test_closing_keeps_what_touches_the_border():
    mask = np.zeros((12, 12, 12), bool)
    mask[:, :5, :] = True
    assert np.array_equal(postprocessing.close_gaps(mask), mask)


def test_values_too_near_one_half_are_decided_in_double_precision(monkeypatch):
    mask = speckled(blobs((40, 40, 40), 1, seed=7), 0.4, seed=8) > 0
    expected = literal.smooth(mask)
    doubled = []
    scipy_filter = ndimage.gaussian_filter

    def counted(tile, sigma):
        doubled.append(tile.dtype)
        return scipy_filter(tile, sigma)

    monkeypatch.setattr(postprocessing.ndimage, "gaussian_filter", counted)
    # Single precision spoilt by up to 1e-4: only the second look can give SciPy's answer.
    blur = postprocessing._blur
    noise = np.random.default_rng(9)
    monkeypatch.setattr(
        postprocessing,
        "_blur",
        lambda tile: (v := blur(tile)) + noise.uniform(-1e-4, 1e-4, v.shape).astype(np.float32),
    )
    monkeypatch.setattr(postprocessing, "_ROUNDING", 1e-4)
    assert np.array_equal(postprocessing.smooth(mask), expected)
    assert doubled
    assert set(doubled) == {np.dtype(np.float64)}


def test_single_precision_is_as_exact_as_claimed():
    mask = speckled(blobs((64, 64, 64), 1, seed=10), 0.5, seed=11) > 0
    reach = postprocessing.RADIUS
    inner = (slice(reach, -reach),) * 3
    exact = ndimage.gaussian_filter(mask.astype(np.float64), postprocessing.SIGMA_VOXELS)[inner]
    assert np.abs(postprocessing._blur(mask) - exact).max() < postprocessing._ROUNDING


def test_lower_label_has_priority_in_any_order():
    like = np.zeros((2, 2, 2), np.uint8)
    whole = (slice(0, 2),) * 3
    one, two = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    one[0] = True
    for objects in ([(1, whole, one), (2, whole, two)], [(2, whole, two), (1, whole, one)]):
        label_map = postprocessing.resolve_overlaps(objects, like)
        assert (label_map[0] == 1).all()
        assert (label_map[1] == 2).all()
        assert not like.any()


def test_nothing_in_nothing_out():
    assert not postprocessing.postprocess(np.zeros((4, 4, 4), np.uint8)).any()


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match=r"uint8 of shape \(2, 2\)"):
        postprocessing.postprocess(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(0, 4, 4\)"):
        postprocessing.postprocess(np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"float32.*unsigned"):
        postprocessing.postprocess(np.zeros((2, 2, 2), np.float32))
    for step in STEPS[1:]:
        with pytest.raises(ValueError, match=r"uint8.*bool"):
            getattr(postprocessing, step)(np.zeros((2, 2, 2), np.uint8))
