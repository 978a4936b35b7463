"""The intensity likelihood finds an object by its grey value, at any contrast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import ndimage

from inference.likelihood import Click, likelihood_log_odds, smooth


def _scene(contrast: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An off-centre cube in noise, and a ball-shaped prior that only roughly fits it."""
    axis = torch.arange(32.0) - 15.5
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    truth = torch.zeros(32, 32, 32, dtype=torch.bool)
    truth[8:22, 10:24, 9:23] = True
    image = truth * contrast + 0.4 * torch.randn(32, 32, 32)
    return image[None], truth, (4 * (1 - radius / 9)).clamp(-4, 4)[None]


def _odds(image: torch.Tensor, prior: torch.Tensor, clicks: Sequence[Click] = ()) -> torch.Tensor:
    """The log-odds where nothing but the prior tells of a mask."""
    n = len(image)
    return likelihood_log_odds(image, prior, prior.sigmoid(), [clicks] * n, torch.ones(n))


@pytest.mark.parametrize("contrast", [2.0, -2.0])
def test_the_object_is_found_bright_or_dark(contrast: float) -> None:
    image, truth, prior = _scene(contrast)

    def dice(mask: torch.Tensor) -> float:
        return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))

    assert dice(prior[0] > 0) < 0.85
    assert dice(_odds(image, prior)[0] > 0) > 0.9


def test_without_contrast_the_prior_stays() -> None:
    _, _, prior = _scene(0.0)
    flat = torch.zeros_like(prior)
    torch.testing.assert_close(_odds(flat, prior) > 0, prior > 0)


def test_windows_of_a_batch_do_not_see_each_other() -> None:
    one, _, prior = _scene(2.0)
    other, _, _ = _scene(-2.0)
    both = _odds(torch.cat((one, other)), torch.cat((prior, prior)))
    torch.testing.assert_close(both[0], _odds(one, prior)[0])
    torch.testing.assert_close(both[1], _odds(other, prior)[0])


def test_clicks_mend_the_histograms_of_a_wrong_mask() -> None:
    image, truth, _ = _scene(2.0)
    wrong = torch.zeros_like(image)
    wrong[0, 24:, :8] = 1.0  # none of the object
    clicks = (((10.0, 12.0, 11.0), True), ((26.0, 3.0, 16.0), False))

    def found(clicked: tuple[tuple[tuple[float, float, float], bool], ...], doubt: float) -> float:
        flat = torch.zeros_like(image)
        odds = likelihood_log_odds(image, flat, wrong, [clicked], torch.tensor([doubt]))[0]
        return float((odds[truth] > 0).float().mean())

    assert found(clicks, 1.0) > 0.8 > 0.4 > found((), 1.0)
    assert found(clicks[:1], 1.0) > 0.8, "a positive one alone"
    assert found(clicks, 0.0) == found((), 1.0), "of a mask that is right nothing is to be mended"


def test_clicks_outside_the_window_are_left_out() -> None:
    image, _, prior = _scene(2.0)
    clicks = [((-1.0, 5.0, 5.0), True), ((5.0, 5.0, 32.0), False)]
    assert torch.equal(_odds(image, prior, clicks), _odds(image, prior))
    at_the_border = [((0.0, 31.0, 0.0), True)]
    assert _odds(image, prior, at_the_border).isfinite().all()


@pytest.mark.parametrize("shape", [(9, 11, 13), (1, 8, 30)])
def test_smoothing_equals_scipy(shape: tuple[int, int, int]) -> None:
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = ndimage.gaussian_filter(volume, 0.8, mode="nearest", radius=2)
    np.testing.assert_allclose(smooth(torch.from_numpy(volume)[None], 0.8)[0], expected, atol=1e-5)
