"""Made-up tasks: painted label maps, supervoxels of real images as objects, random shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from inference.likelihood import smooth
from inference.resampling import resample
from training.augmentation import Chance

_SEEDS = 20  # supervoxels of a window
_MAX_LABELS = 12  # of a random label map


def paint(labels: Tensor, chance: Chance) -> Tensor:
    """A synthetic image of a (D, H, W) integer label window (after SynthSeg, Billot et al. 2023).

    Each label gets a random mean and texture; then shading, blur and noise, and sometimes the
    resolution of thick slices. Returns about 0..1 floats.
    """
    rng, index = chance.rng, labels.long()
    count = int(index.max()) + 1
    means = torch.from_numpy(rng.uniform(0, 1, count).astype(np.float32)).to(labels.device)
    spread = torch.from_numpy(rng.uniform(0, 0.12, count).astype(np.float32)).to(labels.device)
    if chance.happens(0.5):
        means[0], spread[0] = 0.0, 0.01
    image = means[index]
    image = image + spread[index] * chance.noise(image)
    image = image * (0.25 * chance.field(image)).exp()
    image = smooth(image[None], chance.between(0.3, 1.0))[0]
    if chance.happens(0.2):
        image = _thick_slices(image, int(rng.integers(3)), chance)
    return image + chance.between(0, 0.06) * chance.noise(image)


def supervoxel(image: Tensor, chance: Chance) -> Tensor:
    """A supervoxel about the middle of a real (D, H, W) image, as a bool mask.

    One step of the clustering of SLIC (Achanta et al. 2012): every cell goes to the seed nearest
    in place and intensity together; the place is bent by a smooth field, so that borders without
    an edge in the image are not planes. ScribblePrompt (Wong et al. 2024) trains on such objects.
    """
    rng, device = chance.rng, image.device
    size = np.array(image.shape)
    z_scores = (image - image.mean()) / image.std().clamp_min(1e-3)
    z_scores = smooth(z_scores[None], 0.8)[0].clamp(-3, 3)
    reach = chance.between(0.2, 0.32)  # about the radius of a supervoxel, in windows
    seeds = rng.uniform(0.05, 0.95, (_SEEDS, 3))
    seeds[0] = 0.5 + rng.normal(0, 0.03, 3)
    far = np.linalg.norm(seeds - seeds[0], axis=1) > reach
    far[0] = True
    seeds = seeds[far]
    weight = chance.between(0.3, 1.2)  # of intensities
    axes = []
    for axis, n in enumerate(image.shape):
        shape = [1, 1, 1]
        shape[axis] = n
        place = (torch.arange(n, device=device).reshape(shape) + 0.5) / n
        axes.append(place / reach + 0.25 * chance.field(image))
    best, own = None, None
    for seed in seeds:
        cell = tuple(np.minimum((seed * size).astype(int), size - 1))
        distance = weight * (z_scores - z_scores[cell]).square()
        for axis, place in zip(axes, seed, strict=True):
            distance = distance + (axis - place / reach).square()
        if own is None:
            own = best = distance
        best = torch.minimum(best, distance)  # type: ignore[type-var]
    assert own is not None and best is not None
    return (own <= best) & (own < 4)


def random_shape(like: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
    """A random label map and one of its objects, both of the shape of ``like`` (D, H, W).

    Either the largest of several smooth noise fields (as SynthMorph, Hoffmann et al. 2022), cut to
    a blob, or a bent tube among such fields.

    Returns:
        Integer labels and the bool mask of the object; every label is to be painted as one.
    """
    rng = chance.rng
    count = int(rng.integers(3, _MAX_LABELS))
    knots = int(rng.integers(3, 9))
    fields = torch.stack([chance.field(like, knots) for _ in range(count)])
    labels = fields.argmax(0)
    axes = [2 * (torch.arange(n, device=like.device) + 0.5) / n - 1 for n in like.shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    if chance.happens(0.5):
        radii = chance.rng.uniform(0.3, 0.65, 3)
        wobble = 0.3 * chance.field(like, 5)
        distance = ((z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2).sqrt()
        mask = distance + wobble < 1
        if chance.happens(0.5):
            mask &= labels == labels[tuple(n // 2 for n in like.shape)]
    else:
        mask = _tube((z, y, x), chance)
    return torch.where(mask, count, labels), mask


def _tube(axes: tuple[Tensor, Tensor, Tensor], chance: Chance) -> Tensor:
    """A tube of varying radius along a curve through the middle of the window."""
    rng = chance.rng
    order = rng.permutation(3)
    along, first, second = (axes[i] for i in order)
    length = chance.between(0.4, 0.7)
    centres = []
    for _ in range(2):
        amplitude, turns, phase = rng.uniform(0.05, 0.35), rng.uniform(0.5, 2.5), rng.uniform(0, 6)
        centres.append(amplitude * (torch.sin(turns * 3 * along + phase) - np.sin(phase)))
    radius = chance.between(0.06, 0.2) * (1 + 0.3 * torch.sin(chance.between(1, 6) * along))
    distance = (first - centres[0]).square() + (second - centres[1]).square()
    return (distance < radius.square()) & (along.abs() < length)


def _thick_slices(image: Tensor, axis: int, chance: Chance) -> Tensor:
    """The image as if its slices across one axis were several cells thick."""
    few = list(image.shape)
    few[axis] = max(6, round(few[axis] * chance.between(0.2, 0.6)))
    D, H, W = image.shape
    return resample(resample(image[None], (few[0], few[1], few[2])), (D, H, W))[0]
