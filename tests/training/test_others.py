"""Clicks on other objects: how many in which round, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.balls import write_balls
from training.others import Cells
from training.volumes import load_folder


@pytest.mark.parametrize(
    ("boxed", "shares"), [(True, [0.4] * 5), (False, [1.0, 0.5, 0.5, 0.5, 0.5])]
)
def test_each_round_brings_so_many_clicks(tmp_path: Path, boxed: bool, shares: list[float]) -> None:
    """In a window of the volume's own voxels they lie in the object; the first one is deepest."""
    (volume, _) = load_folder(write_balls(tmp_path))
    seen, left_out = volume.objects
    window = Cells(np.eye(3) * 20, np.array([19.5, 19.5, 19.5]), 40)  # the other ball ends beyond
    rounds = window.clicks([seen] * 400, np.random.default_rng(0), 5, boxed)
    assert [len(places) / 400 for places in rounds] == pytest.approx(shares, abs=0.08)
    labels = volume.labels.numpy()
    for places in rounds:
        z, y, x = places.round().astype(int).T
        assert (labels[z, y, x] == seen.label).all()
    if not boxed:
        assert (rounds[0] == seen.deepest).all()
    else:
        assert np.ptp(np.concatenate(rounds), axis=0).min() > 3
    few = Cells(np.eye(3) * 8, np.array([14.5, 13.5, 13.5]), 16)
    assert not any(map(len, few.clicks([left_out] * 9, np.random.default_rng(0), 5, boxed)))
