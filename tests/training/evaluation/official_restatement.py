"""The challenge's evaluator, restated literally and slowly: the oracle of ours.

Facts, not code: what `CVPR25_iter_eval.py` does to one case, step by step, on whole volumes, with
scipy's distance transform, a global random seed and every round's input through a file. Surface
distances come from the `surface-distance` package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import cc3d
import numpy as np
from scipy import integrate, ndimage
from surface_distance import metrics as surface_metrics


def surface_dice(mask, other, spacing, tolerance=2.0):
    """NSD by the package, which uses names that numpy 2 and scipy have retired."""
    for old, new in (("Inf", np.inf), ("NaN", np.nan)):
        if not hasattr(np, old):
            setattr(np, old, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where both are empty
        distances = surface_metrics.compute_surface_distances(mask, other, spacing)
        return surface_metrics.compute_surface_dice_at_tolerance(distances, tolerance)


def mean_dsc(gts, segs):
    """Per-class DSC and their mean."""
    return [
        surface_metrics.compute_dice_coefficient(gts == label, segs == label)
        for label in np.unique(gts)[1:]
    ]


def mean_nsd(gts, segs, spacing):
    """Per-class NSD."""
    return [surface_dice(gts == label, segs == label, spacing) for label in np.unique(gts)[1:]]


def depth(component, halve_above=60_000_000):
    """Distance of each voxel of the component to its outside, on the padded cut-out."""
    voxels = np.argwhere(component)
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    shape = high - low
    padding = np.maximum((shape * 0.25).astype(int), 1)
    cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inner = tuple(slice(p, p + n) for p, n in zip(padding, shape, strict=True))
    padded = np.zeros(shape + 2 * padding, np.uint8)
    padded[inner] = component[cut]
    if padded.size > halve_above:
        d, h, w = padded.shape
        even = np.zeros((d + d % 2, h + h % 2, w + w % 2), np.uint8)
        even[:d, :h, :w] = padded
        corners = [even[i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        distance = ndimage.distance_transform_edt(np.max(corners, axis=0))
        distance = distance.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    else:
        distance = ndimage.distance_transform_edt(padded)
    result = np.zeros(component.shape, distance.dtype)
    result[cut] = distance[inner]
    return result


def click(gts, segs, label, halve_above=60_000_000):
    """(position, kind) of the next click of one class, or None where it is perfect."""
    segs_class = (segs == label).astype(np.uint8)
    gts_class = (gts == label).astype(np.uint8)
    errors = (segs_class != gts_class).astype(np.uint8)
    if np.sum(errors) == 0:
        return None
    components = cc3d.connected_components(errors, connectivity=26)
    sizes = np.bincount(components.flat)
    sizes[0] = 0
    largest = components == np.argmax(sizes)
    distance = depth(largest, halve_above)
    distance *= largest
    if np.sum(distance) == 0:
        distance = largest
    state = np.random.get_state()
    np.random.seed(42)
    candidates = np.argwhere(distance == distance.max())
    position = tuple(candidates[np.random.choice(len(candidates))])
    np.random.set_state(state)
    return list(position), "fg" if gts_class[position] else "bg"


def evaluate(
    case_path: Path, folder: Path, predict: Callable[[Path, Path], None]
) -> tuple[dict[str, float], list[dict[str, list]], list[list[str | None]]]:
    """Run all rounds of one case.

    Args:
        case_path: npz with imgs, spacing, gts and perhaps boxes.
        folder: an empty one for inputs/ and outputs/.
        predict: reads inputs, writes outputs (the two folders), as the container does.

    Returns:
        The scores under the evaluator's column names, all clicks and their order by class.
    """
    inputs, outputs = folder / "inputs", folder / "outputs"
    inputs.mkdir(parents=True)
    outputs.mkdir()
    # Trusted: the project's own data, or written by the test itself.
    with np.load(case_path, allow_pickle=True) as file:
        case = {key: file[key] for key in file.files}
    gts = case.pop("gts")
    labels = np.unique(gts)[1:]
    clicks = [{"fg": [], "bg": []} for _ in labels]
    order = [[] for _ in labels]
    dscs, nsds = [], []
    result = {}
    written, read = outputs / case_path.name, inputs / case_path.name
    for turn in range(6):
        if turn == 0:
            if "boxes" not in case:
                dscs.append(0)
                nsds.append(0)
                result["DSC_1"], result["NSD_1"] = 0, 0
                continue
            np.savez_compressed(read, **case)
        else:
            segs = np.zeros_like(gts).astype(np.uint8)
            if written.is_file():
                with np.load(written) as file:
                    segs = file["segs"].astype(np.uint8)
            for index, label in enumerate(labels):
                found = click(gts, segs, label)
                if found is None:
                    order[index].append(None)
                else:
                    position, kind = found
                    clicks[index][kind].append(position)
                    order[index].append(kind)
            content = {
                "imgs": case["imgs"],
                "spacing": case["spacing"],
                "clicks": clicks,
                "clicks_order": order,
                "prev_pred": segs,
            }
            if "boxes" in case:
                content["boxes"] = case["boxes"]
            np.savez_compressed(read, **content)
        predict(inputs, outputs)
        segs = np.zeros_like(gts).astype(np.uint8)
        if written.is_file():
            with np.load(written) as file:
                segs = file["segs"]
        dsc = np.mean(mean_dsc(gts, segs))
        nsd = np.mean(mean_nsd(gts, segs, case["spacing"])) if dsc > 0.2 else 0.0
        dscs.append(dsc)
        nsds.append(nsd)
        result[f"DSC_{turn + 1}"], result[f"NSD_{turn + 1}"] = dsc, nsd
    for name, rounds in (("DSC", dscs), ("NSD", nsds)):
        area = integrate.cumulative_trapezoid(np.array(rounds[-5:]), np.arange(5))[-1]
        result[f"{name}_AUC"] = area
        result[f"{name}_Final"] = rounds[-1]
    return result, clicks, order
