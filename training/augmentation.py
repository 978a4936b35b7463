"""Random changes of a window: shape first (image and mask together), then intensities."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inference.likelihood import smooth
from inference.resampling import resample


def warp(image: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rotate, shear, scale and bend (D, H, W) image and mask about the window's centre.

    Returns the image with edges repeated and the soft mask in 0..1 with zeros outside.
    """
    angles = rng.normal(0, 0.25, 3)
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    matrix = matrix @ (np.eye(3) + rng.normal(0, 0.06, (3, 3)))
    theta = torch.zeros(1, 3, 4, device=image.device)
    theta[0, :, :3] = torch.from_numpy(matrix)
    size = tuple(image.shape)
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
    bend = torch.from_numpy(rng.normal(0, 0.035, (3, 4, 4, 4)).astype(np.float32))
    grid = grid + resample(bend.to(image.device), size).permute(1, 2, 3, 0)
    warped = F.grid_sample(image[None, None], grid, padding_mode="border", align_corners=False)
    inside = F.grid_sample(mask[None, None], grid, padding_mode="zeros", align_corners=False)
    return warped[0, 0], inside[0, 0]


def change_intensities(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Gamma, inversion, low resolution, blur, shading and noise on a (D, H, W) window.

    The result is scaled to 0..1 of the window's range.
    """
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp_min(1e-3)
    if rng.random() < 0.5:
        image = image ** float(np.exp(rng.normal(0, 0.35)))
    if rng.random() < 0.12:
        image = 1 - image
    if rng.random() < 0.15:
        shape = [
            max(8, round(n * f)) for n, f in zip(image.shape, rng.uniform(0.35, 1, 3), strict=True)
        ]
        size = tuple(image.shape)
        image = resample(resample(image[None], (shape[0], shape[1], shape[2])), size)[0]
    if rng.random() < 0.15:
        image = smooth(image[None], float(rng.uniform(0.4, 1.2)))[0]
    if rng.random() < 0.2:
        image = image * (0.3 * _field(image, rng)).exp()
    if rng.random() < 0.25:
        image = image + float(rng.uniform(0, 0.12)) * _noise(image, rng)
    return image


def paint(labels: Tensor, rng: np.random.Generator) -> Tensor:
    """A synthetic image of a (D, H, W) integer label window (after SynthSeg, Billot et al. 2023).

    Each label gets a random mean and texture; then shading, blur and noise. Returns 0..1 floats.
    """
    count = int(labels.max()) + 1
    means = torch.from_numpy(rng.uniform(0, 1, count).astype(np.float32)).to(labels.device)
    spread = torch.from_numpy(rng.uniform(0, 0.12, count).astype(np.float32)).to(labels.device)
    if rng.random() < 0.5:
        means[0], spread[0] = 0.0, 0.01
    index = labels.long()
    image = means[index] + spread[index] * _noise(means[index], rng)
    image = image * (0.25 * _field(image, rng)).exp()
    image = smooth(image[None], float(rng.uniform(0.3, 1.0)))[0]
    return image + float(rng.uniform(0, 0.06)) * _noise(image, rng)


def perturb_mask(mask: Tensor, cells: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
    """A plausible coarse segmentation of a (D, H, W) 0/1 mask: at ``cells`` cells, with noise."""
    size = tuple(mask.shape)
    coarse = resample(mask[None].float(), cells)[0]
    coarse = coarse + float(rng.uniform(0, 0.5)) * smooth(_noise(coarse, rng)[None], 1.0)[0]
    return (resample(coarse[None], size)[0] > float(rng.uniform(0.3, 0.7))).float()


def _noise(like: Tensor, rng: np.random.Generator) -> Tensor:
    noise = rng.standard_normal(tuple(like.shape), dtype=np.float32)
    return torch.from_numpy(noise).to(like.device)


def _field(like: Tensor, rng: np.random.Generator) -> Tensor:
    """Smooth random field of the shape of ``like``, about unit variance."""
    knots = torch.from_numpy(rng.standard_normal((1, 4, 4, 4), dtype=np.float32))
    return resample(knots.to(like.device), tuple(like.shape))[0]
