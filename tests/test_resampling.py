"""Resampling: identity, round trips, constants, and agreement with known interpolators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from inference.geometry import Window
from inference.resampling import covered_cells, resample, to_tensor, window_cells
from tests.test_geometry import windows


def test_the_same_size_is_copied_exactly() -> None:
    volume = torch.randn(2, 5, 1, 7)
    assert torch.equal(resample(volume, (5, 1, 7)), volume)


def test_growing_equals_trilinear_interpolation() -> None:
    volume = torch.randn(2, 5, 3, 7)
    expected = F.interpolate(volume[:, None], size=[11, 4, 20], mode="trilinear")[:, 0]
    torch.testing.assert_close(resample(volume, (11, 4, 20)), expected)


def test_shrinking_by_whole_factors_is_the_mean_of_the_voxels() -> None:
    volume = torch.randn(1, 12, 6, 8)
    torch.testing.assert_close(resample(volume, (4, 3, 8)), F.avg_pool3d(volume, (3, 2, 1)))


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 1, 1), (30, 2, 9)])
def test_the_mean_survives_shrinking_by_any_factor(shape: tuple[int, int, int]) -> None:
    volume = torch.rand(1, 30, 7, 9)
    volume = volume.double()
    torch.testing.assert_close(resample(volume, shape).mean(), volume.mean())


@pytest.mark.parametrize("shape", [(3, 50, 4), (64, 1, 9)])
def test_constants_stay(shape: tuple[int, int, int]) -> None:
    torch.testing.assert_close(
        resample(torch.full((1, 9, 8, 7), 3.5), shape), torch.full((1, *shape), 3.5)
    )


def test_a_ramp_keeps_its_position_both_ways() -> None:
    """A shift of half a cell, the usual mistake, would move the middle of the ramp."""
    ramp = torch.arange(40.0)[None, :, None, None].expand(1, 40, 3, 3)
    for n in (13, 40, 97):
        there = resample(ramp, (n, 3, 3))
        assert abs(float(there.mean()) - 19.5) < 1e-4
        back = resample(there, (40, 3, 3))
        torch.testing.assert_close(back[0, 8:32], ramp[0, 8:32], atol=0.05, rtol=0)


def test_the_kept_part_equals_the_part_of_the_whole() -> None:
    volume = torch.randn(1, 9, 20, 7)
    keep = (slice(2, 5), slice(3, 4), slice(0, 7))
    whole = resample(volume, (18, 10, 7))
    torch.testing.assert_close(resample(volume, (18, 10, 7), keep), whole[(slice(None), *keep)])


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64, np.bool_]
)
def test_any_real_dtype_becomes_float32(dtype: type) -> None:
    voxels = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::-1]
    tensor = to_tensor(voxels)
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(tensor[0].numpy(), voxels.astype(np.float32))


def test_a_read_only_volume_is_taken_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    voxels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    voxels.setflags(write=False)
    assert np.array_equal(to_tensor(voxels)[0].numpy(), voxels)
    assert not recwarn.list


def test_thin_layers_keep_their_volume_and_a_block_its_half() -> None:
    block = torch.zeros(40, 40, 40)
    block[5:35, 5:35, 5:35] = 1
    z, y, x = torch.meshgrid(*[torch.arange(40.0)] * 3, indexing="ij")
    layers = ((0.8 * z + 0.5 * y + 0.33 * x) % 10 < 2.2).float()  # in cells of five voxels
    shares = resample(torch.stack([block, layers, 0.2 * layers]), (8, 8, 8))
    cells = covered_cells(shares)
    assert torch.equal(cells[0], shares[0] > 0.5)
    volume = float(shares[1].sum())
    assert (shares[1] > 0.5).sum() < 0.6 * volume
    assert 0.8 * volume < cells[1].sum() < 1.2 * volume
    assert not cells[2].any(), "a quarter at least"
    for one, share in zip(cells, shares, strict=True):
        assert torch.equal(covered_cells(share[None])[0], one), "each by itself"


@given(windows(), st.tuples(*[st.integers(1, 20)] * 3))
def test_a_window_shows_the_volume_as_if_it_went_on(
    window: Window, shape: tuple[int, int, int]
) -> None:
    """Its edge, or zeros; here the voxels beyond are made, in the product they never are."""
    volume = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    axes = [np.arange(a, b) for a, b in zip(window.start, window.stop, strict=True)]
    held = [np.clip(axis, 0, n - 1) for axis, n in zip(axes, shape, strict=True)]
    edges = volume[np.ix_(*held)]
    there = [(axis == clipped).astype(np.uint8) for axis, clipped in zip(axes, held, strict=True)]
    zeros = edges * np.einsum("z,y,x->zyx", *there)
    label = int(volume.flat[0])
    for expected, found in (
        (edges, window_cells(volume, window, edge=True)),
        (zeros, window_cells(volume, window)),
        (zeros == label, window_cells(volume, window, label=label)),
    ):
        whole = resample(to_tensor(expected.astype(np.float32)), window.shape)
        torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-5)


def test_an_array_may_be_turned_round() -> None:
    """Also along an axis of one voxel, of which NumPy says that it is in order."""
    volume = np.arange(20, dtype=np.float32).reshape(1, 4, 5)
    for turned in (volume[::-1], volume[:, ::-1], volume[:, :, ::-1]):
        assert np.array_equal(to_tensor(turned)[0].numpy(), turned)


@pytest.mark.parametrize("reach", [10**5, 10**12])
def test_windows_may_reach_anywhere(reach: int) -> None:
    """They would be volumes of 10^15 voxels and more."""
    volume = np.full((3, 4, 5), 7, np.uint8)
    window = Window((-reach,) * 3, (reach,) * 3, (8, 8, 8))
    cells = window_cells(volume, window, edge=True)
    torch.testing.assert_close(cells, torch.full((1, 8, 8, 8), 7.0))
    shares = window_cells(volume, window, label=7)
    assert float(shares.sum()) == pytest.approx(60 / (2 * reach / 8) ** 3)
    ramp = torch.arange(8.0)[None, :, None, None].expand(1, 8, 8, 8)
    part = resample(ramp, window.size, (slice(reach, reach + 3), slice(0, 1), slice(5, 6)))
    torch.testing.assert_close(part, torch.full((1, 3, 1, 1), 3.5), atol=1e-3, rtol=0)
