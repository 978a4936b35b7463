"""What an object's window shows of the objects beside it, as other users would leave them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.augmentation import Chance, perturb_mask

_SMALLEST = 8  # cells of an object that is clicked on
_SHIFT = 0.05  # of the window's edge: how far off other masks are, where they are off


def claimed(others: Tensor, target: Tensor, mask: Tensor | None, chance: Chance) -> Tensor:
    """What a label map of an earlier look gives to other objects.

    Some objects are missing, borders are off, and at times a mask is off as a whole. What the
    object itself still lacks is often another's: where many share a box, few get it all at first.

    Args:
        others: (D, H, W) labels of the other objects, 0 for none.
        target: (D, H, W) bool, the object.
        mask: (D, H, W) bool, what the same label map gives to the object itself, or None.
        chance: decides.

    Returns:
        (D, H, W) bool, disjoint from ``mask``.
    """
    found = others > 0
    if chance.happens(0.3):
        kept = torch.from_numpy(chance.rng.random(int(others.max()) + 1) > 0.3)
        found &= kept.to(others.device)[others]
    if chance.happens(0.3):
        steps = [round(float(s)) for s in chance.rng.normal(0, _SHIFT, 3) * max(found.shape)]
        found = found.roll(steps, (0, 1, 2))
    taken = perturb_mask(found, chance)
    if chance.happens(0.15):
        taken |= chance.field(taken.float(), 3) > chance.between(0.6, 1.8)
    if chance.happens(0.5):
        taken |= target & (chance.field(taken.float(), 3) > chance.between(-1.5, 1.0))
    return taken if mask is None else taken & ~mask


def clicks_elsewhere(
    others: Tensor, mask: Tensor | None, chance: Chance
) -> tuple[tuple[float, float, float], ...]:
    """Positive clicks on other objects: at most one each, as a round of all objects brings.

    They lie where the object's own mask is wrong, else rather inside than at a border.

    Args:
        others: (D, H, W) labels of the other objects, 0 for none.
        mask: (D, H, W) bool, the object's own mask so far, or None.
        chance: decides.
    """
    labels = others.float()[None]
    inner = (F.max_pool3d(labels, 3, 1, 1) == -F.max_pool3d(-labels, 3, 1, 1))[0]
    worth = chance.noise(labels[0]) + 2 * inner
    if mask is not None:
        worth = worth + 4 * (mask & (others > 0))
    flat, values = others.flatten(), worth.flatten()
    best = values.new_full((int(flat.max()) + 1,), -torch.inf)
    best = best.scatter_reduce(0, flat, values, "amax")
    large = torch.bincount(flat) >= _SMALLEST
    large[0] = False
    places = ((values == best[flat]) & large[flat]).nonzero()[:, 0].tolist()
    share = chance.between(0.2, 0.9)
    _, H, W = others.shape
    return tuple(
        (float(place // (H * W)), float(place // W % H), float(place % W))
        for place in places
        if chance.happens(share)
    )
