"""The paper's post-processing (section 2.2) as one would write it with SciPy: the oracle.

One label after the other over the whole volume, no shortcut. ``inference.postprocessing`` states
what the paper leaves open and how it is settled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def remove_small_components(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    components, _ = ndimage.label(mask)
    keep = np.bincount(components.reshape(-1)) >= 64
    keep[0] = False
    return keep[components]


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ndimage.binary_fill_holes(mask)


def close_gaps(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # Padded, because SciPy's erosion takes what lies beyond an array for background even after
    # the dilation has reached there, and would strip objects at the border of a layer.
    return ndimage.binary_closing(np.pad(mask, 1), np.ones((3, 3, 3)))[1:-1, 1:-1, 1:-1]


def smooth(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ndimage.gaussian_filter(mask.astype(np.float64), sigma=0.8) > 0.5


def clean_object(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return smooth(close_gaps(fill_holes(remove_small_components(mask))))


def postprocess(label_map: NDArray[np.generic]) -> NDArray[np.generic]:
    result = np.zeros_like(label_map)
    for label in np.unique(label_map[label_map > 0]):
        mask = clean_object(label_map == label)
        result[mask & (result == 0)] = label  # ascending: the lower label has priority
    return result
