"""Raw images for tests of preprocessing, and how its results are read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from tests.test_nifti import SIZE
from training.preprocess import main


def run(*words: object) -> int:
    return main([str(word) for word in words])


def rows(out: Path) -> dict[str, dict[str, str]]:
    table = out / "preprocess.csv"
    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=True) as file:  # written by the test itself
        return dict(file)


def scan(labels: sitk.Image) -> sitk.Image:
    """An image on the labels' grid whose every voxel differs, in Hounsfield units."""
    values = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE[::-1]) - 300
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(labels)
    return image


def write(path: Path, image: sitk.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path
