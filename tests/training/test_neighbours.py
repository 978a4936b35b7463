"""Other objects as an earlier look leaves them: about right, never on the object's own mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.augmentation import Chance
from training.neighbours import claimed, clicks_elsewhere


@pytest.fixture
def others() -> torch.Tensor:
    labels = torch.zeros(24, 24, 24, dtype=torch.int64)
    labels[2:10, 2:20, 2:20], labels[14:22, 4:12, 4:12] = 3, 7
    labels[23, 23, 20:] = 9  # too small to be clicked on
    return labels


def _chance(seed: int) -> Chance:
    return Chance(seed, torch.device("cpu"))


def test_claims_are_about_right_and_leave_the_objects_own_mask_alone(others: torch.Tensor) -> None:
    target, own = torch.zeros(2, 24, 24, 24, dtype=torch.bool)
    target[10:14], own[8:14, :12] = True, True
    overlaps, lost = [], []
    for seed in range(80):
        mask = claimed(others, target, own, _chance(seed))
        assert mask.dtype == torch.bool and not (mask & own).any()
        truth = (others > 0) & ~own & ~target
        found = mask & ~target
        overlaps.append(float(2 * (found & truth).sum() / (found.sum() + truth.sum())))
        lost.append(float(mask[target & ~own].float().mean()))
    assert 0.6 < np.median(overlaps) < 0.98
    assert min(overlaps) < 0.5, "at times they are badly wrong"
    assert min(lost) < 0.1 and max(lost) > 0.8, "the object may have lost little or nearly all"


def test_each_object_gets_at_most_one_click_inside_of_it(others: torch.Tensor) -> None:
    counts = []
    for seed in range(60):
        clicks = clicks_elsewhere(others, None, _chance(seed))
        labels = [int(others[tuple(int(c) for c in click)]) for click in clicks]
        assert set(labels) <= {3, 7} and len(set(labels)) == len(labels)
        counts.append(len(labels))
    assert set(counts) == {0, 1, 2}


def test_clicks_go_where_the_objects_own_mask_is_wrong(others: torch.Tensor) -> None:
    own = torch.zeros(24, 24, 24, dtype=torch.bool)
    own[2:10, 2:20, 16:20] = True  # a part of object 3
    hits = [
        own[tuple(int(c) for c in click)]
        for seed in range(60)
        for click in clicks_elsewhere(others, own, _chance(seed))
        if click[0] < 12
    ]
    assert np.mean(hits) > 0.9


def test_the_same_chance_gives_the_same(others: torch.Tensor) -> None:
    first, again = (claimed(others, others == 0, None, _chance(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert clicks_elsewhere(others, None, _chance(5)) == clicks_elsewhere(others, None, _chance(5))


def test_without_other_objects_there_is_nothing_to_click() -> None:
    nothing = torch.zeros(16, 16, 16, dtype=torch.int64)
    assert all(not clicks_elsewhere(nothing, None, _chance(seed)) for seed in range(10))
