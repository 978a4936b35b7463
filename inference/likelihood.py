"""A training-free segmentation: a soft shape prior times an intensity likelihood.

Foreground and background intensity histograms of a window are re-estimated from the current soft
mask a few times (expectation-maximisation with non-parametric classes, as in GrabCut's colour
models, Rother et al. 2004, without its graph cut). It costs milliseconds, needs no weights, adapts
to any contrast, and so complements a trained network, which gets it as an input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 64
_ITERATIONS = 6
_CLIP = 3.0  # one voxel's intensity may not outweigh the shape prior by more
_SIGMA = 0.8  # grid cells


def likelihood_log_odds(image: Tensor, prior: Tensor, mask: Tensor | None = None) -> Tensor:
    """Posterior log-odds of the object in each window.

    Args:
        image: (B, D, H, W) intensities, nominally within [-3, 3] (z-normalised).
        prior: (B, D, H, W) prior log-odds from box and clicks.
        mask: (B, D, H, W) soft mask in [0, 1] to estimate the first histograms from; without it
            they come from the prior.

    Returns:
        (B, D, H, W) log-odds: the prior plus the smoothed log-likelihood ratio, clipped to +-3.
    """
    B = image.shape[0]
    bins = ((image + 3) * (_BINS / 6)).long().clamp_(0, _BINS - 1)
    # Histograms need no more than every other cell along each axis.
    few_bins = bins[:, ::2, ::2, ::2].reshape(B, -1)
    few_bins = few_bins + _BINS * torch.arange(B, device=image.device)[:, None]
    few_prior = prior[:, ::2, ::2, ::2].reshape(B, -1)
    few_mask = (
        few_prior.sigmoid() if mask is None else mask[:, ::2, ::2, ::2].reshape(B, -1).float()
    )
    total = _histogram(few_bins, torch.ones_like(few_mask))
    ratio = torch.zeros_like(total)
    for _ in range(_ITERATIONS):
        inside = _histogram(few_bins, few_mask)
        ratio = _log_ratio(inside, total - inside)
        few_mask = (few_prior + ratio.reshape(-1)[few_bins]).sigmoid()
    offset = _BINS * torch.arange(B, device=image.device)[:, None, None, None]
    llr = ratio.reshape(-1)[bins + offset]
    return prior + smooth(llr, _SIGMA)


def _histogram(bins: Tensor, weights: Tensor) -> Tensor:
    """(B, N) bin numbers (row b offset by b * 64) and weights -> (B, 64) sums."""
    B = bins.shape[0]
    sums = torch.bincount(bins.reshape(-1), weights.reshape(-1), minlength=B * _BINS)
    return sums.reshape(B, _BINS).to(weights.dtype)


def _log_ratio(inside: Tensor, outside: Tensor) -> Tensor:
    """(B, 64) histograms -> (B, 64) clipped log-likelihood ratios of smoothed densities."""
    kernel = inside.new_tensor([[[1.0, 4.0, 6.0, 4.0, 1.0]]]) / 16
    both = torch.stack((inside, outside.clamp_min(0)), 1).reshape(-1, 1, _BINS)
    both = F.conv1d(F.pad(both, (2, 2), mode="replicate"), kernel).reshape(-1, 2, _BINS)
    density = both / both.sum(-1, keepdim=True).clamp_min(1e-6) + 1e-4
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
