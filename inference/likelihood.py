"""A training-free segmentation: a soft shape prior times an intensity likelihood.

Foreground and background intensity histograms of a window are re-estimated from the current soft
mask a few times (expectation-maximisation with non-parametric classes, as in GrabCut's colour
models, Rother et al. 2004, without its graph cut). Clicks are samples of either side that no wrong
mask can spoil. It costs milliseconds, needs no weights, adapts to any contrast, and so complements
a trained network, which gets it as an input channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Click = tuple[tuple[float, float, float], bool]

_BINS = 64
_ITERATIONS = 6
_CLIP = 3.0  # one voxel's intensity may not outweigh the shape prior by more
_SIGMA = 0.8  # grid cells
#: Positive and negative clicks that say as much of a histogram as a doubtful mask does (fitted on
#: training cases): an object is more alike within itself than all that is around it.
_CLICKS_WORTH = (0.5, 1.5)
#: Sigma, in bins, of what clicks sample: they are few. And the voxels that each of them samples.
CLICK_BINS = 3.0
NEIGHBOURS = ((0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))


def likelihood_log_odds(
    image: Tensor,
    prior: Tensor,
    mask: Tensor,
    clicks: Sequence[Sequence[Click]],
    doubt: Tensor,
) -> Tensor:
    """Posterior log-odds of the object in each window.

    Args:
        image: (B, D, H, W) intensities, nominally within [-3, 3] (z-normalised).
        prior: (B, D, H, W) prior log-odds from box and clicks.
        mask: (B, D, H, W) soft mask in [0, 1] to estimate the first histograms from.
        clicks: of each window, ((z, y, x) in cells, positive): their cells and the six around each
            go into the histograms, the more of them the more. Those outside are left out.
        doubt: (B,) in 0..1, how much clicks count beside the mask.

    Returns:
        (B, D, H, W) log-odds: the prior plus the smoothed log-likelihood ratio, clipped to +-3.
    """
    B = image.shape[0]
    bins = (image + 3).mul_(_BINS / 6).int().clamp_(0, _BINS - 1)
    # Histograms need no more than every other cell along each axis.
    few_bins = bins[:, ::2, ::2, ::2].reshape(B, -1).long()
    few_bins += _BINS * torch.arange(B, device=image.device)[:, None]
    few_prior = prior[:, ::2, ::2, ::2].reshape(B, -1)
    few_mask = mask[:, ::2, ::2, ::2].reshape(B, -1).float()
    total = _histogram(few_bins, torch.ones_like(few_mask))
    click_density, count = _clicked(bins, clicks)
    count *= doubt[:, None, None]
    share = count / (count + count.new_tensor(_CLICKS_WORTH)[:, None])
    ratio = torch.zeros_like(total)
    for _ in range(_ITERATIONS):
        inside = _histogram(few_bins, few_mask)
        ratio = _log_ratio(inside, total - inside, click_density, share)
        few_mask = (few_prior + ratio.reshape(-1)[few_bins]).sigmoid()
    llr = torch.stack(
        [one.index_select(0, at.flatten()) for one, at in zip(ratio, bins, strict=True)]
    )
    return smooth(llr.reshape(image.shape), _SIGMA).add_(prior)


def _histogram(bins: Tensor, weights: Tensor) -> Tensor:
    """(B, N) bin numbers (row b offset by b * 64) and weights -> (B, 64) sums."""
    B = bins.shape[0]
    sums = torch.bincount(bins.reshape(-1), weights.reshape(-1), minlength=B * _BINS)
    return sums.reshape(B, _BINS).to(weights.dtype)


def _clicked(bins: Tensor, clicks: Sequence[Sequence[Click]]) -> tuple[Tensor, Tensor]:
    """Densities (B, 2, 64) about positive and negative clicks, and their numbers (B, 2, 1)."""
    B = bins.shape[0]
    click_density, count = torch.zeros((B, 2, _BINS)), torch.zeros((B, 2, 1))
    last = torch.tensor(bins.shape[1:]) - 1
    for i, some in enumerate(clicks):
        for side, wanted in enumerate((True, False)):
            places = torch.tensor([p for p, positive in some if positive == wanted])
            cells = places.reshape(-1, 3).round().long()
            cells = cells[((cells >= 0) & (cells <= last)).all(1)]
            if not len(cells):
                continue
            near = (cells[:, None] + torch.tensor(NEIGHBOURS)).reshape(-1, 3)
            z, y, x = torch.minimum(near.clamp_min(0), last).to(bins.device).unbind(1)
            click_density[i, side] = torch.bincount(bins[i, z, y, x].cpu(), minlength=_BINS)
            count[i, side] = len(cells)
    radius = round(3 * CLICK_BINS)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / CLICK_BINS) ** 2)
    padded = F.pad(click_density.reshape(-1, 1, _BINS), (radius, radius), mode="replicate")
    click_density = F.conv1d(padded, kernel[None, None]).reshape(B, 2, _BINS)
    click_density /= click_density.sum(-1, keepdim=True).clamp_min(1e-6)
    return click_density.to(bins.device), count.to(bins.device)


def _log_ratio(inside: Tensor, outside: Tensor, click_density: Tensor, share: Tensor) -> Tensor:
    """Clipped log-likelihood ratios (B, 64) of smoothed densities.

    Args:
        inside, outside: (B, 64) histograms.
        click_density, share: of clicks (:func:`_clicked`) and how much of the histograms they
            replace.
    """
    kernel = inside.new_tensor([[[1.0, 4.0, 6.0, 4.0, 1.0]]]) / 16
    both = torch.stack((inside, outside.clamp_min(0)), 1).reshape(-1, 1, _BINS)
    both = F.conv1d(F.pad(both, (2, 2), mode="replicate"), kernel).reshape(-1, 2, _BINS)
    density = both / both.sum(-1, keepdim=True).clamp_min(1e-6)
    density = torch.lerp(density, click_density, share) + 1e-4
    return (density[:, 0] / density[:, 1]).log().clamp(-_CLIP, _CLIP)


def smooth(volume: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of (B, D, H, W), ``sigma`` in cells, edges replicated."""
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, device=volume.device, dtype=volume.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (1, 2, 3):
        n = volume.shape[axis]
        first, last = volume.narrow(axis, 0, 1), volume.narrow(axis, n - 1, 1)
        padded = torch.cat([first] * radius + [volume] + [last] * radius, dim=axis)
        # Shifted sums beat a 1-channel conv3d on a CPU.
        total = padded.narrow(axis, 0, n) * kernel[0]
        for i in range(1, 2 * radius + 1):
            total.add_(padded.narrow(axis, i, n), alpha=float(kernel[i]))
        volume = total
    return volume
