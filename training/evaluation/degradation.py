"""Logits made worse on purpose, to see what post-processing does for a weaker network."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inference.geometry import Triple
from inference.refinement import SURE, ObjectLogits

_LARGEST_LOGIT = 4.0  # a network that errs is not sure either
_MARGIN = 0.25  # of each edge, so that errors also lie outside of what the engine drew
_SCALES = (0.8, 0.12)  # of the noise: in voxels, and as a share of the region's edges


def degrade(result: ObjectLogits, volume: Triple, level: float, seed: str) -> ObjectLogits:
    """An object's logits with noise of two scales: ragged edges and specks, and wrong parts.

    Args:
        result: what the engine gives.
        volume: size of the volume.
        level: standard deviation of each of the two parts of the noise; 0 leaves all as it is.
        seed: the same text gives the same noise.

    Returns:
        Logits over a region a quarter larger on every side; clicks keep theirs.
    """
    if level == 0 or not result.logits.size:
        return result
    size = result.logits.shape
    before = [min(a, round(n * _MARGIN)) for a, n in zip(result.start, size, strict=True)]
    after = [
        min(d - a - n, round(n * _MARGIN))
        for a, n, d in zip(result.start, size, volume, strict=True)
    ]
    logits = np.pad(
        result.logits,
        list(zip(before, after, strict=True)),
        constant_values=-_LARGEST_LOGIT,
    )
    noise = sum(_noise(logits.shape, scale, seed) for scale in _SCALES)
    noisy = logits.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT) + np.float32(level) * noise
    noisy = np.where(np.abs(logits) > SURE, logits, noisy).astype(np.float32)
    z, y, x = (a - b for a, b in zip(result.start, before, strict=True))
    return ObjectLogits(result.label, (z, y, x), noisy)


def _noise(shape: tuple[int, ...], scale: float, seed: str) -> NDArray[np.float32]:
    """Gaussian noise of unit variance, blurred by ``scale`` voxels or, below 0.5, edges."""
    random = np.random.default_rng(zlib.crc32(f"{seed} {scale}".encode()))
    if scale >= 0.5:
        sigma = [scale] * 3
        field = random.standard_normal(shape, np.float32)
        blurred = ndimage.gaussian_filter(field, sigma)
    else:  # one value a correlation length, interpolated
        knots = max(2, round(1 / scale))
        field = random.standard_normal((knots,) * 3, np.float32)
        zoom = [n / knots for n in shape]
        blurred = ndimage.zoom(field, zoom, order=1, grid_mode=True, mode="nearest")
    return np.asarray(blurred / max(float(blurred.std()), 1e-6), np.float32)
