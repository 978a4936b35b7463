"""Intensities of scanners and microscopes as the challenge's images have them: 0..255."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

CT_WINDOWS = {"soft": (400, 40), "lung": (1500, -160), "brain": (80, 40), "bone": (1800, 400)}
"""Width and level in Hounsfield units, as the challenge's images were made."""

PERCENTILES = (0.5, 99.5)
"""What other modalities are clipped to (the challenge's too)."""


def parse_window(text: str) -> tuple[float, float]:
    """Width and level of a CT window from its name or ``W,L``.

    Raises:
        ValueError: it is neither, or no range: the width must be positive, both numbers finite.
    """
    if text in CT_WINDOWS:
        return CT_WINDOWS[text]
    try:
        width, level = map(float, text.split(","))
        if not (math.isfinite(width) and math.isfinite(level) and width > 0):
            raise ValueError
    except ValueError:
        accepted = f"{', '.join(CT_WINDOWS)} or W,L with W above 0"
        raise ValueError(f"received the window {text!r}; accepted: {accepted}") from None
    return width, level


def to_uint8(volume: NDArray[Any], window: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Rescale intensities to 0..255, the range of the challenge's images.

    Args:
        volume: any shape, real; voxels that are not finite become the end of the range they lie
            at, NaN the lower one.
        window: width and level of a CT window; None clips to ``PERCENTILES`` of the finite voxels,
            or not at all where these are one value: what is bright may be small.

    Raises:
        ValueError: if the window's width is not positive.
    """
    if window is None:
        finite = volume[np.isfinite(volume)] if volume.dtype.kind == "f" else volume
        low, high = np.percentile(finite, PERCENTILES) if finite.size else (0.0, 0.0)
        if low == high and finite.size:
            low, high = float(finite.min()), float(finite.max())
    else:
        width, level = window
        low, high = level - width / 2, level + width / 2
        if not width > 0:
            raise ValueError(f"received a window of width {width}; accepted: a positive width")
    result = np.zeros(volume.shape, np.uint8)
    if high > low:
        for source, target in zip(volume, result, strict=True):  # by slices: float64 is eight times
            scaled = (np.clip(source.astype(np.float64), low, high) - low) * (255 / (high - low))
            target[...] = np.rint(np.nan_to_num(scaled))
    return result
