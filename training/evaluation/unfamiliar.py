"""Training cases made unfamiliar: bent, shaded and noisy, so that no network knows them by heart.

    python -m training.evaluation.unfamiliar --cases TRAIN --out DIR

Networks do better on what they were trained on than on anything else, so what is chosen there
suits masks that are too good. Bent cases score about as held-out ones of their kind, and constants
of the engine can be fitted on them without a look at those.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from inference.nifti import renumbered
from training.augmentation import Chance
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.results import is_same_folder
from training.manifest import case_files, read_structures
from training.preprocess import save_case
from training.raw_case import challenge_boxes
from training.volumes import checked, to_bytes

_BEND = 0.025  # of an edge, standard deviation of the displacement at a knot
_KNOTS = 7
_GAMMA = 0.3  # standard deviation of its logarithm
_SHADING = 0.12
_NOISE = 4.0  # grey levels of 255


def unfamiliar(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], seed: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its labels bent alike, and the image's intensities changed.

    Args:
        image: (D, H, W) uint8.
        labels: (D, H, W) integers.
        seed: the same text gives the same changes.

    Returns:
        Both, of the same shape; a label may have lost all of its voxels. Intensities of 0 stay 0
        where no other one is near.
    """
    chance = Chance(zlib.crc32(seed.encode()), torch.device("cpu"))
    like = torch.empty(image.shape)
    at = np.indices(image.shape, np.float32)
    for axis, n in enumerate(image.shape):
        at[axis] += _BEND * n * chance.field(like, _KNOTS).numpy()
    values = ndimage.map_coordinates(image.astype(np.float32), at, order=1, mode="nearest")
    values = 255 * (values / 255) ** np.exp(chance.rng.normal(0, _GAMMA))
    values *= np.exp(_SHADING * chance.field(like).numpy())
    values += _NOISE * chance.noise(like).numpy() * (values > 0)
    bent = ndimage.map_coordinates(labels, at, order=0, mode="nearest")
    return values.round().clip(0, 255).astype(np.uint8), bent


def bend_case(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a challenge file made unfamiliar; labels that were lost leave no gap.

    Raises:
        ValueError: it is no labelled case of 0 to 255, or no label is left.
        OSError: it cannot be read.
    """
    case = load_labelled_case(path, boxes=False)
    checked(path.name, {**case.arrays, "gts": case.reference.voxels})
    image, labels = unfamiliar(to_bytes(case.arrays["imgs"]), case.reference.voxels, path.name)
    if not labels.any():
        raise ValueError(f"{path.name}: bending loses all labels; accepted: larger objects")
    labels = renumbered(labels)
    boxes = challenge_boxes(labels, path.name)
    return {"imgs": image, "gts": labels, "spacing": case.arrays["spacing"], "boxes": boxes}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write bent cases; returns the exit status, 1 if one is left out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=Path, required=True, help="challenge files with gts")
    parser.add_argument("--out", type=Path, required=True, help="where files of their names go")
    options = parser.parse_args(arguments)
    try:
        paths = case_files(options.cases)
        if not paths:
            raise ValueError(f"{options.cases}: no .npz; accepted: challenge files")
        read_structures(options.cases)  # or each case would tell what is wrong with it
        options.out.mkdir(parents=True, exist_ok=True)
        if is_same_folder(options.out, options.cases):
            raise ValueError(f"{options.out} is the folder of the cases, which would be replaced")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    status = 0
    for path in paths:
        try:
            save_case(options.out / path.name, bend_case(path))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
