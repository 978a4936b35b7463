"""What the objects of labelled cases are like: cheap statistics, or an encoder's embeddings."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from inference.case import modality_of
from inference.geometry import window_around
from inference.model.sam_med3d import SamMed3D, load_sam_med3d
from inference.npz import NpzFile
from inference.precision import choose_device
from inference.refinement import BOX_SCALE
from inference.resampling import window_cells
from inference.sam_stage import SamStage
from training.augmentation import masked_z_scores
from training.manifest import case_files, read_structures
from training.volumes import SMALLEST_OBJECT, checked

FEATURES = (
    "log voxels",
    "log share of the volume",
    "share of its bounding box",
    "log elongation",
    "log flatness",
    "log surface of a unit volume",
    "log ratio of spacings",
    "mean intensity",
    "spread of intensities",
    "mean intensity around",
    "spread around",
    "overlap of the histograms",
)
"""Of an object, in order; intensities are those of the case, 0..255."""

_MARGIN = 0.2  # of its bounding box on each side: what counts as around an object
_BINS = 16


@dataclass(frozen=True)
class DescribedObject:
    """One label of a case.

    Attributes:
        label: its value.
        structure: its name in the folder's ``manifest.json``, or empty.
        voxels: its volume.
        features: (n,) float64.
    """

    label: int
    structure: str
    voxels: int
    features: NDArray[np.float64]


@dataclass(frozen=True)
class DescribedCase:
    """A labelled case and its objects; named ``MODALITY_DATASET_...``."""

    name: str
    objects: tuple[DescribedObject, ...]

    @property
    def modality(self) -> str:
        """CT, MR, PET, US or Microscopy."""
        return modality_of(self.name)

    @property
    def dataset(self) -> str:
        """The second part of the name."""
        return self.name.partition("_")[2].partition("_")[0]


def describe_folder(
    folder: Path, jobs: int = 1, embeddings: Path | None = None, device: str = "cpu"
) -> list[DescribedCase]:
    """Describe every labelled case of a folder, by name.

    Args:
        folder: challenge files with ``gts``.
        jobs: cases at a time, of statistics.
        embeddings: SAM-Med3D weights whose image embeddings describe the objects instead.
        device: where to compute embeddings.

    Raises:
        ValueError: there is no labelled case, or a file or the manifest cannot be read as one.
    """
    paths = case_files(folder)
    if not paths:
        raise ValueError(f"{folder}: no .npz file; accepted: a folder of labelled cases")
    names = read_structures(folder)
    named = [names.get(path.name, {}) for path in paths]
    if embeddings is not None:
        model = load_sam_med3d(embeddings)
        stage = SamStage(model, choose_device(device))
        embedder = functools.partial(embed, model, stage)
        cases = [
            _describe(path, of_case, embedder) for path, of_case in zip(paths, named, strict=True)
        ]
    elif jobs == 1:
        cases = list(map(_describe, paths, named))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=spawn) as pool:
            cases = list(pool.map(_describe, paths, named, chunksize=4))
    cases = [case for case in cases if case.objects]
    if not cases:
        raise ValueError(f"{folder}: no labelled object in {len(paths)} files")
    return cases


def _describe(
    path: Path,
    names: Mapping[str, str],
    embedder: functools.partial[NDArray[np.float64]] | None = None,
) -> DescribedCase:
    with NpzFile(path) as file:
        arrays = {key: file[key] for key in ("imgs", "gts", "spacing") if key in file}
    if len(arrays) < 3:
        raise ValueError(f"{path} holds {list(arrays)}; accepted: npz with imgs, gts and spacing")
    image = arrays["imgs"]
    labels, (z, y, x) = checked(path.stem, arrays)
    objects = []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        voxels = int((labels[place] == label).sum())
        if voxels < SMALLEST_OBJECT:
            continue
        if embedder is not None:
            features = embedder(image, labels == label, place, (z, y, x))
        else:
            features = statistics(image, labels, label, place, (z, y, x))
        objects.append(DescribedObject(label, names.get(str(label), ""), voxels, features))
    return DescribedCase(path.stem, tuple(objects))


def statistics(
    image: NDArray[np.generic],
    labels: NDArray[np.integer],
    label: int,
    place: tuple[slice, ...],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """Size, shape and contrast of an object.

    Args:
        image: (D, H, W), 0..255.
        labels: (D, H, W).
        label: the object.
        place: its bounding box.
        spacing_mm: (z, y, x).

    Returns:
        (12,) float64 in the order of ``FEATURES``.
    """
    margins = [max(1, round(_MARGIN * (part.stop - part.start))) for part in place]
    wide = tuple(
        slice(max(part.start - m, 0), part.stop + m) for part, m in zip(place, margins, strict=True)
    )
    mask = labels[wide] == label
    values = np.clip(np.nan_to_num(image[wide].astype(np.float64)), 0, 255)
    voxels = int(mask.sum())
    edges = sorted((p.stop - p.start) * s for p, s in zip(place, spacing_mm, strict=True))
    padded = np.pad(mask, 1)
    faces = sum(int(np.diff(padded, axis=axis).sum()) for axis in range(3))
    inside, around = values[mask], values[~mask]
    if not around.size:
        around = inside
    histograms = [np.histogram(v, _BINS, (0, 256))[0] / v.size for v in (inside, around)]
    return np.array(
        [
            np.log(voxels),
            np.log(voxels / labels.size),
            voxels / np.prod([p.stop - p.start for p in place]),
            np.log(edges[2] / edges[1]),
            np.log(edges[1] / edges[0]),
            np.log(faces / voxels ** (2 / 3)),
            np.log(max(spacing_mm) / min(spacing_mm)),
            inside.mean(),
            inside.std(),
            around.mean(),
            around.std(),
            np.sqrt(histograms[0] * histograms[1]).sum(),  # Bhattacharyya coefficient
        ]
    )


def embed(
    model: SamMed3D,
    stage: SamStage,
    image: NDArray[np.generic],
    mask: NDArray[np.bool_],
    place: Sequence[slice],
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.float64]:
    """The image embedding's mean over an object, in the window in which it would be segmented.

    Args:
        model: SAM-Med3D.
        stage: it in its windows, on its device.
        image, mask: (D, H, W).
        place: the object's bounding box.
        spacing_mm: (z, y, x).

    Returns:
        (prompt_width,) float64.
    """
    starts, stops = [part.start for part in place], [part.stop for part in place]
    region = window_around(starts, stops, stage.shape, spacing_mm, BOX_SCALE)
    window = stage.window(region, spacing_mm)
    device = next(model.parameters()).device
    cells = window_cells(image, window, device)
    with torch.inference_mode():
        embedding = model.encode_image(masked_z_scores(cells)[None])[0]  # (C, g, g, g)
        g = embedding.shape[1]
        weights = window_cells(mask, dataclasses.replace(window, shape=(g, g, g)), device)
        pooled = (embedding * weights).sum((1, 2, 3)) / weights.sum().clamp_min(1e-6)
    return pooled.double().cpu().numpy()
