"""Losses of a binary segmentation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice (sigmoid, squared prediction) plus binary cross-entropy, one value a sample.

    Args:
        logits: (B, 1, D, H, W) float32.
        target: the same shape, 0 or 1.

    Returns:
        (B,) losses.
    """
    axes = (1, 2, 3, 4)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(axes)
    total = probability.square().sum(axes) + target.sum(axes)
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return dice + F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(axes)
