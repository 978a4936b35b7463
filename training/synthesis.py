"""Made-up tasks: painted label maps, supervoxels of real images as objects, random shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inference.likelihood import smooth
from inference.resampling import resample
from training.augmentation import Chance

_SEEDS = 20  # supervoxels of a window
_MAX_LABELS = 12  # of a random label map
_BEADS = 40  # balls that a tube is made of


def paint(labels: Tensor, chance: Chance) -> Tensor:
    """A synthetic image of a (D, H, W) integer label window (after SynthSeg, Billot et al. 2023).

    Each label gets a random mean and texture; then shading, blur and noise, and sometimes the
    resolution of thick slices. In every other image some labels are of two tissues. Returns about
    0..1 floats.
    """
    rng, index = chance.rng, labels.long()
    if chance.happens(0.5):
        index = with_two_tissues(index, chance)
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


def with_two_tissues(index: Tensor, chance: Chance) -> Tensor:
    """Labels of which some have a rim of another one, as bones, or two parts, as what is dissected.

    About a quarter of the labels get a rim of one cell, and a quarter two parts.

    Args:
        index: (D, H, W) int64 labels.
        chance: draws which, and where parts meet.

    Returns:
        (D, H, W) int64; what is painted alike has one number, and no two labels share one.
    """
    count = int(index.max()) + 1
    shares = torch.from_numpy(chance.rng.random(count).astype(np.float32)).to(index.device)[index]
    padded = F.pad(index[None].float(), (1, 1, 1, 1, 1, 1), mode="replicate")
    most, least = (F.max_pool3d(sign * padded, 3, 1)[0] for sign in (1, -1))
    rim = (most != -least) & (shares < 0.25)
    part = (chance.field(index.float()) > 0) & (shares > 0.75)
    return index + count * (rim | part)


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
    a blob, or a bent tube among such fields; a quarter of them look like one of the fields.

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
    alike = int(rng.integers(count)) if chance.happens(0.25) else count
    return torch.where(mask, alike, labels), mask


def _tube(axes: tuple[Tensor, Tensor, Tensor], chance: Chance) -> Tensor:
    """A tube of varying radius along a cubic Bezier curve: straight, bent or a hook."""
    rng = chance.rng
    ends = rng.normal(size=(4, 3)) * rng.uniform(0.3, 1, 3)
    t = np.linspace(0, 1, _BEADS)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    curve = weights @ ends
    curve -= (curve.min(0) + curve.max(0)) / 2
    curve *= chance.between(0.4, 0.7) / curve.max()
    radii = chance.between(0.06, 0.2) * (1 + 0.3 * np.sin(chance.between(1, 6) * t[:, 0]))
    mask = torch.zeros_like(axes[0], dtype=torch.bool)
    for centre, radius in zip(curve, radii, strict=True):
        parts = [(axis - c).square() for axis, c in zip(axes, centre, strict=True)]
        mask |= parts[0] + parts[1] + parts[2] < radius**2
    return mask


def _thick_slices(image: Tensor, axis: int, chance: Chance) -> Tensor:
    """The image as if its slices across one axis were several cells thick."""
    few = list(image.shape)
    few[axis] = max(6, round(few[axis] * chance.between(0.2, 0.6)))
    D, H, W = image.shape
    return resample(resample(image[None], (few[0], few[1], few[2])), (D, H, W))[0]
