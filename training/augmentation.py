"""Random changes of a window's intensities, and masks as a first look would leave them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inference.likelihood import smooth
from inference.resampling import resample
from training.config import Config


class Chance:
    """Random numbers of one window: few and small ones by NumPy, fields on the device.

    Args:
        seed: everything follows from it.
        device: where fields are made. Another kind of device makes other ones.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        """Seed both generators."""
        self.rng = np.random.default_rng(seed)
        self._generator = torch.Generator(device).manual_seed(seed)

    def noise(self, like: Tensor) -> Tensor:
        """Independent standard normal numbers of the shape of ``like``."""
        return torch.randn(like.shape, generator=self._generator, device=like.device)

    def field(self, like: Tensor, knots: int = 4) -> Tensor:
        """Smooth field of the shape of ``like`` (D, H, W), about unit variance."""
        coarse = torch.randn(
            (1, knots, knots, knots), generator=self._generator, device=like.device
        )
        D, H, W = like.shape
        return resample(coarse, (D, H, W))[0]

    def happens(self, probability: float) -> bool:
        """True with a probability."""
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        """A number of the uniform distribution."""
        return float(self.rng.uniform(low, high))


def change_intensities(image: Tensor, config: Config, chance: Chance) -> Tensor:
    """Gamma, inversion, low resolution, blur, shading and noise on a (D, H, W) window.

    The result is scaled to 0..1 of the window's range.
    """
    low, high = torch.aminmax(image)
    image = (image - low) / (high - low).clamp_min(1e-3)
    if chance.happens(config.gamma):
        image = image ** float(np.exp(chance.rng.normal(0, 0.35)))
    if chance.happens(config.inversion):
        image = 1 - image
    if chance.happens(config.low_resolution):
        z, y, x = (max(8, round(n * chance.between(0.35, 1))) for n in image.shape)
        D, H, W = image.shape
        image = resample(resample(image[None], (z, y, x)), (D, H, W))[0]
    if chance.happens(config.blur):
        image = smooth(image[None], chance.between(0.4, 1.2))[0]
    if chance.happens(config.shading):
        image = image * (0.3 * chance.field(image)).exp()
    if chance.happens(config.noise):
        image = image + chance.between(0, 0.12) * chance.noise(image)
    return image


def perturb_mask(mask: Tensor, chance: Chance) -> Tensor:
    """A coarse segmentation of a (D, H, W) bool mask: at fewer cells, with noise.

    Every other one is poor: it swells here and shrinks there, and may have lost what is thin.
    """
    z, y, x = (max(6, round(n * chance.between(0.3, 0.9))) for n in mask.shape)
    coarse = resample(mask[None].float(), (z, y, x))[0]
    if chance.happens(0.5):
        coarse = smooth(coarse[None], chance.between(0.5, 2.0))[0]
        coarse = coarse * (chance.between(0, 1) * chance.field(coarse, 6)).exp()
    coarse = coarse + chance.between(0, 0.5) * smooth(chance.noise(coarse)[None], 1.0)[0]
    D, H, W = mask.shape
    return resample(coarse[None], (D, H, W))[0] > chance.between(0.3, 0.7)


def masked_z_scores(images: Tensor) -> Tensor:
    """Z-scores of (B, D, H, W) windows over their voxels above 0, as SAM-Med3D was trained.

    Over all of a window's voxels where fewer than two are above 0.
    """
    inside = images > 0
    inside |= (inside.sum((1, 2, 3), keepdim=True) < 2).expand_as(inside)
    count = inside.sum((1, 2, 3), keepdim=True)
    mean = (images * inside).sum((1, 2, 3), keepdim=True) / count
    centred = images - mean
    variance = (centred.square() * inside).sum((1, 2, 3), keepdim=True) / count
    return centred / variance.sqrt().clamp_min(1e-6)
