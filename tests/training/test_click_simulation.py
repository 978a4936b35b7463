"""Simulated boxes and clicks."""

from __future__ import annotations

import numpy as np
import pytest

from training.click_simulation import challenge_box, next_click


def test_the_box_is_exact_in_z_and_of_the_middle_slice_in_plane() -> None:
    mask = np.zeros((10, 20, 30), bool)
    mask[2, 1, 1] = mask[3, 5:8, 10:15] = mask[4, 18, 29] = True
    low, high, middle = challenge_box(mask, (0, 1.5, 2.0))
    assert middle == 3
    assert low == (1.5, 5 - 0.5 - 1.5, 10 - 0.5 - 2.0)
    assert high == (4.5, 7 + 0.5 + 1.5, 14 + 0.5 + 2.0)


def test_without_slack_the_click_is_the_deepest_point_of_the_largest_error() -> None:
    target = np.zeros((20, 20, 40), bool)
    target[5:14, 5:14, 5:14] = True  # missed: depth 5 in the middle
    predicted = np.zeros_like(target)
    predicted[2:5, 2:5, 30:33] = True  # a smaller false one
    click = next_click(predicted, target, (1, 1, 1), np.random.default_rng(0), slack=0)
    assert click == ((9.0, 9.0, 9.0), True)


def test_a_false_region_is_clicked_as_background() -> None:
    predicted = np.zeros((20, 20, 20), bool)
    predicted[4:9, 4:9, 4:9] = True
    position, positive = next_click(  # type: ignore[misc]
        predicted, np.zeros_like(predicted), (1, 1, 1), np.random.default_rng(0), slack=0
    )
    assert position == (6.0, 6.0, 6.0) and not positive


def test_depth_is_counted_in_voxels_and_not_in_cells() -> None:
    """Two arms of one error: the one wide in cells is thin in voxels."""
    target = np.zeros((30, 30, 30), bool)
    target[0:3, 0:25, 0:25] = True  # 3 cells of 5 voxels: 15 deep in voxels
    target[3:30, 0:5, 0:5] = True
    position, _ = next_click(  # type: ignore[misc]
        np.zeros_like(target), target, (5.0, 1.0, 1.0), np.random.default_rng(0), slack=0
    )
    assert position[0] == 1.0


def test_slack_varies_the_click_within_the_error() -> None:
    target = np.zeros((20, 20, 20), bool)
    target[4:16, 4:16, 4:16] = True
    rng = np.random.default_rng(0)
    places = {next_click(np.zeros_like(target), target, (1, 1, 1), rng)[0] for _ in range(30)}  # type: ignore[index]
    assert len(places) > 10
    assert all(target[tuple(int(v) for v in place)] for place in places)


def test_a_perfect_mask_gets_no_click() -> None:
    mask = np.ones((3, 3, 3), bool)
    assert next_click(mask, mask, (1, 1, 1), np.random.default_rng(0)) is None


@pytest.mark.parametrize("padding", [(0.0, 0.0, 0.0), (0.0, 3.0, 1.0)])
def test_one_voxel_has_a_box(padding: tuple[float, float, float]) -> None:
    mask = np.zeros((3, 3, 3), bool)
    mask[1, 2, 0] = True
    low, high, middle = challenge_box(mask, padding)
    assert middle == 1 and all(a < b for a, b in zip(low, high, strict=True))
