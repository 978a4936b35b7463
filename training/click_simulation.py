"""Simulated users: boxes by the challenge's rule and clicks in the error region."""

from __future__ import annotations

import cc3d
import edt
import numpy as np
from numpy.typing import NDArray

from inference.object_prompts import stored_box

Triple = tuple[float, float, float]


def challenge_box(
    mask: NDArray[np.bool_], padding: Triple = (0.0, 0.0, 0.0)
) -> tuple[Triple, Triple, float]:
    """The challenge's box of a mask: exact in z, the rectangle of the middle slice in y and x.

    Args:
        mask: (D, H, W), not empty.
        padding: voxels added on both sides (z is ignored by the rule; pass 0).

    Returns:
        Lower edges, upper edges (z, y, x; edges lie at voxel centre +- 0.5) and the middle slice.
    """
    box = stored_box(mask)
    first = np.array([box["z_min"], box["z_mid_y_min"], box["z_mid_x_min"]])
    last = np.array([box["z_max"], box["z_mid_y_max"], box["z_mid_x_max"]])
    z0, y0, x0 = (first - 0.5 - np.array(padding)).tolist()
    z1, y1, x1 = (last + 0.5 + np.array(padding)).tolist()
    return (z0, y0, x0), (z1, y1, x1), float(box["z_mid"])


def next_click(
    predicted: NDArray[np.bool_],
    target: NDArray[np.bool_],
    cell: Triple,
    rng: np.random.Generator,
    slack: float = 0.3,
) -> tuple[Triple, bool] | None:
    """A click near the deepest point of the largest error component (26-connected).

    The organisers click the deepest point itself; training takes any cell within ``slack`` of its
    depth, since people do not click the exact centre either.

    Args:
        predicted, target: (D, H, W) masks.
        cell: edge lengths of a grid cell in voxels, so that depth is counted in voxels.
        rng: source of the choice.
        slack: 0 for the deepest point, 1 for anywhere in the component.

    Returns:
        (z, y, x) and whether the click is positive, or None where nothing is wrong.
    """
    errors = predicted != target
    if not errors.any():
        return None
    components = cc3d.connected_components(errors, connectivity=26)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest = components == sizes.argmax()
    box = np.argwhere(largest)
    low, high = box.min(0), box.max(0) + 1
    part = np.ascontiguousarray(largest[tuple(map(slice, low, high))])
    depth = edt.edt(part, anisotropy=cell, black_border=True)
    near = np.argwhere(depth >= (1 - slack) * depth.max())
    z, y, x = (int(v) for v in near[rng.integers(len(near))] + low)
    return (float(z), float(y), float(x)), bool(target[z, y, x])
