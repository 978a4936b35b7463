"""Simulated boxes and clicks, against exact distances and components."""

from __future__ import annotations

import cc3d
import edt
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from training.click_simulation import (
    challenge_box,
    error_depth,
    largest_component,
    next_clicks,
)

CELL = (1.0, 1.0, 1.0)


def _clicks(
    predicted: NDArray[np.bool_],
    target: NDArray[np.bool_],
    cell: tuple[float, float, float] = CELL,
    count: int = 1,
    rule: str = "deep",
    slack: float = 0.3,
) -> list[tuple[tuple[float, float, float], bool] | None]:
    """Clicks of the same pair of masks, drawn with evenly spread chances."""
    pair = (torch.from_numpy(np.stack([m] * count)) for m in (predicted, target))
    chances = [(i + 0.5) / count for i in range(count)]
    return next_clicks(*pair, [cell] * count, chances, rule, slack)


def _errors(count: int) -> NDArray[np.bool_]:
    """Errors as networks make them: shells between two shapes, and specks."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        smooth = ndimage.gaussian_filter(rng.standard_normal((40, 36, 32)), 5)
        target = smooth > np.quantile(smooth, 0.75)
        other = smooth + 0.6 * ndimage.gaussian_filter(rng.standard_normal((40, 36, 32)), 3)
        found.append(target != (other > np.quantile(other, 0.7)))
    return np.stack(found)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    components = cc3d.connected_components(mask.view(np.uint8), connectivity=26)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = components == sizes.argmax()
    return largest


def test_the_box_is_exact_in_z_and_of_the_middle_slice_in_plane() -> None:
    mask = np.zeros((10, 20, 30), bool)
    mask[2, 1, 1] = mask[3, 5:8, 10:15] = mask[4, 18, 29] = True
    low, high, middle = challenge_box(mask, (0, 1.5, 2.0))
    assert middle == 3
    assert low == (1.5, 5 - 0.5 - 1.5, 10 - 0.5 - 2.0)
    assert high == (4.5, 7 + 0.5 + 1.5, 14 + 0.5 + 2.0)


@pytest.mark.parametrize("padding", [(0.0, 0.0, 0.0), (0.0, 3.0, 1.0)])
def test_one_voxel_has_a_box(padding: tuple[float, float, float]) -> None:
    mask = np.zeros((3, 3, 3), bool)
    mask[1, 2, 0] = True
    low, high, middle = challenge_box(mask, padding)
    assert middle == 1 and all(a < b for a, b in zip(low, high, strict=True))


def test_without_slack_the_click_is_the_deepest_point_of_the_largest_error() -> None:
    target = np.zeros((20, 20, 40), bool)
    target[5:14, 5:14, 5:14] = True  # missed: depth 5 in the middle
    predicted = np.zeros_like(target)
    predicted[2:5, 2:5, 30:33] = True  # a smaller false one
    assert _clicks(predicted, target, slack=0) == [((9.0, 9.0, 9.0), True)]


def test_the_largest_error_is_clicked_though_another_one_is_deeper() -> None:
    target = np.zeros((24, 40, 40), bool)
    target[2:5] = True  # 4800 cells, 2 deep
    target[12:21, 10:19, 10:19] = True  # 729 cells, 5 deep
    ((position, positive),) = _clicks(np.zeros_like(target), target, slack=0)  # type: ignore[misc]
    assert position[0] == 3.0 and positive


def test_a_false_region_is_clicked_as_background() -> None:
    predicted = np.zeros((20, 20, 20), bool)
    predicted[4:9, 4:9, 4:9] = True
    clicks = _clicks(predicted, np.zeros_like(predicted), slack=0)
    assert clicks == [((6.0, 6.0, 6.0), False)]


def test_depth_is_counted_in_voxels_and_not_in_cells() -> None:
    """Two arms of one error: the one wide in cells is thin in voxels."""
    target = np.zeros((30, 30, 30), bool)
    target[0:3, 0:25, 0:25] = True  # 3 cells of 5 voxels: 7.5 deep
    target[3:30, 0:5, 0:5] = True  # 5 cells of 1 voxel: 2.5 deep
    ((position, _),) = _clicks(np.zeros_like(target), target, (5.0, 1.0, 1.0), slack=0)  # type: ignore[misc]
    assert position[0] == 1.0


def test_slack_varies_the_click_within_the_error() -> None:
    target = np.zeros((20, 20, 20), bool)
    target[4:16, 4:16, 4:16] = True
    clicks = _clicks(np.zeros_like(target), target, count=30)
    places = [tuple(int(v) for v in click[0]) for click in clicks if click]
    assert len(set(places)) == 30
    assert all(target[place] for place in places)


def test_random_clicks_reach_every_part_of_the_error() -> None:
    target = np.zeros((20, 20, 20), bool)
    target[2:10, 2:10, 2:10] = True
    predicted = np.zeros_like(target)
    predicted[15:, 15:, 15:] = True
    clicks = _clicks(predicted, target, count=200, rule="random")
    assert all(c is not None and c[1] == target[tuple(int(v) for v in c[0])] for c in clicks)
    wrong = sum(not c[1] for c in clicks if c)
    assert wrong == pytest.approx(200 * 125 / (125 + 512), abs=3)


def test_a_perfect_mask_gets_no_click() -> None:
    mask = np.ones((4, 4, 4), bool)
    assert _clicks(mask, mask) == [None]
    assert _clicks(mask, mask, rule="random") == [None]


def test_clicks_lie_in_the_exact_largest_component() -> None:
    """At half resolution parts that nearly touch count as one; the click hardly minds."""
    errors = _errors(20)
    masks = torch.from_numpy(errors)
    exact = [_largest(mask) for mask in errors]
    found = largest_component(masks).numpy()
    assert not (found & ~errors).any()
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in zip(found, exact, strict=True)]
    assert np.median(overlaps) > 0.9
    clicks = next_clicks(torch.zeros_like(masks), masks, [CELL] * 20, [0.5] * 20, "deep", 0.3)
    inside = [
        mask[tuple(int(v) for v in click[0])]
        for click, mask in zip(clicks, exact, strict=True)
        if click
    ]
    assert len(inside) == 20 and np.mean(inside) >= 0.95


def test_odd_sizes_lose_nothing_at_the_border() -> None:
    mask = torch.zeros(2, 7, 9, 5, dtype=torch.bool)
    mask[0, 6, 8, 4] = True
    assert torch.equal(largest_component(mask), mask)


@pytest.mark.parametrize("cell", [CELL, (2.5, 0.8, 0.8), (0.5, 1.7, 1.0)])
def test_the_deepest_cells_are_deep_by_exact_distances(cell: tuple[float, float, float]) -> None:
    errors = _errors(12)
    whole = largest_component(torch.from_numpy(errors))
    depth = error_depth(whole, [cell] * len(errors)).numpy()
    shares = []
    for ours, mask in zip(depth, whole.numpy(), strict=True):
        assert ((ours > 0) == mask).all()
        exact = edt.edt(np.ascontiguousarray(mask), anisotropy=cell, black_border=True)
        shares.append(exact[ours == ours.max()].mean() / exact.max())
    assert np.mean(shares) > 0.85
