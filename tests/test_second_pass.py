"""The second pass: what it is shown, and what both passes find together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference.case import Box, ObjectPrompts
from inference.model.refiner import CHANNELS, Refiner, RefinerConfig
from inference.segmenter import Segmenter


@pytest.mark.parametrize(("second", "expected"), [(-0.2, 0.2), (-3.5, -2.0), (7.0, 5.0)])
def test_the_first_pass_has_a_third_of_the_say(
    monkeypatch: pytest.MonkeyPatch, second: float, expected: float
) -> None:
    """It says 1 in the middle of the window, -9 elsewhere; the second one says something else."""
    asked = []

    def network(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        first = channels.shape[-1] == 32
        asked.append(first)
        logits = torch.full_like(channels[:, 0], -9.0)
        n = channels.shape[-1]
        inner = slice(n // 4, n - n // 4)
        logits[:, inner, inner, inner] = 1.0 if first else second
        return logits

    monkeypatch.setattr(Segmenter, "_network", network)
    segmenter = Segmenter(Refiner(RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32)))
    segmenter.set_image(np.zeros((96, 96, 96), np.uint8), (1.0, 1.0, 1.0))
    monkeypatch.setattr("inference.segmenter.BOX_ALONE", 0.0)
    box = Box((16, 16, 16), (80, 80, 80), 48)
    (result,) = segmenter.segment([ObjectPrompts(1, box)])
    assert asked == [True, False]
    if expected < 0:
        assert not result.logits.size, "absent"
    else:
        z, y, x = (48 - start for start in result.start)
        assert result.logits[z, y, x] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("coarse", [False, True])
def test_the_second_pass_is_shown_the_logits_of_the_first(
    monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    """Where it was trained so: 1 in the middle, -9 elsewhere, clamped to 6, in thirds."""
    seen = []

    def network(self: Segmenter, refiner: Refiner, channels: torch.Tensor) -> torch.Tensor:
        seen.append(channels[0, CHANNELS.index("coarse_logits")])
        logits = torch.full_like(channels[:, 0], -9.0)
        n = channels.shape[-1]
        inner = slice(n // 4, n - n // 4)
        logits[:, inner, inner, inner] = 1.0
        return logits

    monkeypatch.setattr(Segmenter, "_network", network)
    config = RefinerConfig(channels=(8, 8), blocks=(1, 1), window=32, coarse=coarse)
    segmenter = Segmenter(Refiner(config))
    segmenter.set_image(np.zeros((96, 96, 96), np.uint8), (1.0, 1.0, 1.0))
    list(segmenter.segment([ObjectPrompts(1, Box((16, 16, 16), (80, 80, 80), 48))]))
    first, second = seen
    assert not first.any()
    if coarse:
        middle = len(second) // 2
        assert second[middle, middle, middle] == pytest.approx(1 / 3)
        assert second[0, 0, 0] == -2
    else:
        assert not second.any()
