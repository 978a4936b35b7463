"""Losses of a binary segmentation, one value a sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import Config

#: A logit that costs nothing where there is no object.
ABSENT = -20.0
_AXES = (1, 2, 3, 4)
_BAND = 2  # cells on either side of the surface


def segmentation_loss(logits: Tensor, target: Tensor, config: Config) -> Tensor:
    """The configured sum of Dice, cross-entropy, focal and boundary terms.

    Args:
        logits: (B, 1, D, H, W) float32.
        target: the same shape, 0 or 1.
        config: its weights ``dice``, ``cross_entropy``, ``focal`` and ``boundary``.

    Returns:
        (B,) losses.
    """
    loss = logits.new_zeros(logits.shape[0])
    if config.dice:
        loss = loss + config.dice * dice_loss(logits, target)
    if config.cross_entropy or config.boundary:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if config.cross_entropy:
            loss = loss + config.cross_entropy * entropy.mean(_AXES)
        if config.boundary:
            band = boundary_band(target)
            near = (entropy * band).sum(_AXES) / band.sum(_AXES).clamp_min(1)
            loss = loss + config.boundary * near
    if config.focal:
        loss = loss + config.focal * focal_loss(logits, target, config.focal_gamma)
    return loss


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016: squares in the denominator), (B,) in 0..1."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum(_AXES)
    total = probability.square().sum(_AXES) + target.sum(_AXES)
    return 1 - (2 * overlap + 1) / (total + 1)


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Focal loss (Lin et al. 2017) without class weights: (B,).

    Cross-entropy of each cell times (1 - probability of its true class) to the power of gamma.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((1 - (-entropy).exp()).clamp_min(0) ** gamma * entropy).mean(_AXES)


def boundary_band(target: Tensor) -> Tensor:
    """Cells within two cells of the surface of (B, 1, D, H, W) 0/1 masks, as 0/1."""
    mask = target > 0.5
    return (_swollen(mask) & _swollen(~mask)).to(target.dtype)


def _swollen(mask: Tensor) -> Tensor:
    """A mask's cells and those within a cube about them: a pooling, but much faster on a CPU."""
    for axis in (2, 3, 4):
        wide, edge = mask.clone(), mask.shape[axis]
        for shift in range(1, min(_BAND, edge - 1) + 1):
            left, right = (0, edge - shift), (shift, edge - shift)
            wide.narrow(axis, *right).logical_or_(mask.narrow(axis, *left))
            wide.narrow(axis, *left).logical_or_(mask.narrow(axis, *right))
        mask = wide
    return mask


def iou_loss(predicted: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Squared error of a predicted intersection over union (Kirillov et al. 2023): (B,).

    Args:
        predicted: (B, 1), the network's guess.
        logits: (B, 1, D, H, W); their mask is what the guess is about.
        target: the same shape, 0 or 1.
    """
    with torch.no_grad():
        mask, truth = logits > 0, target > 0.5
        both, either = (mask & truth).sum(_AXES), (mask | truth).sum(_AXES)
        true = both / either.clamp_min(1)
    return (predicted[:, 0].float() - true).square()


def dice_score(mask: Tensor, target: Tensor) -> Tensor:
    """Dice similarity coefficient of (B, D, H, W) bool masks: (B,), 1 for two empty ones."""
    both = (mask & target).sum((1, 2, 3))
    total = mask.sum((1, 2, 3)) + target.sum((1, 2, 3))
    return torch.where(total > 0, 2 * both / total.clamp_min(1), torch.ones_like(both).float())
