"""What is nearly as likely as not: drawn before the first click, and where it was drawn before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.case import Box, Click, ObjectPrompts
from inference.model.refiner import Refiner, RefinerConfig
from inference.segmenter import Segmenter

BOX = Box((10, 10, 10), (30, 26, 22), 20)


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    """One whose network is unsure: below zero, but not by much, in the box; far below beyond it."""

    def unsure(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(channels[:, 0], -9.0)
        logits[..., 12:20, 12:20, 12:20] = -0.2
        return logits

    monkeypatch.setattr(Segmenter, "_network", unsure)
    segmenter = Segmenter(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))
    segmenter.set_image(np.zeros((40, 40, 40), np.uint8), (1.0, 1.0, 1.0))
    return segmenter


def _drawn(segmenter: Segmenter, clicks: int, previous: NDArray[np.uint8] | None = None) -> int:
    """Voxels of the object's mask, without those of its clicks."""
    points = tuple(Click((20, 18, 12 + i), True) for i in range(clicks))
    (result,) = segmenter.segment([ObjectPrompts(1, BOX, points)], previous)
    return int((result.logits > 0).sum()) - clicks


def test_what_is_nearly_as_likely_as_not_counts_until_there_is_a_click(
    segmenter: Segmenter,
) -> None:
    assert _drawn(segmenter, 0) > 0
    assert _drawn(segmenter, 1) == 0
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[12:28, 12:24, 12:20] = 1
    assert _drawn(segmenter, 0, mask) == _drawn(segmenter, 1, mask) == 0


def test_after_some_clicks_it_counts_where_the_last_round_found_it(segmenter: Segmenter) -> None:
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[12:28, 12:24, 12:20] = 1
    assert _drawn(segmenter, 5) == 0
    assert _drawn(segmenter, 5, mask) > 100
