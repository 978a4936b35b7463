"""Labelled volumes: read from challenge files, their objects measured, all kept on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import edt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from inference.case import modality_of
from inference.geometry import Triple
from inference.npz import NpzFile
from inference.refinement import hull
from training.click_simulation import challenge_box
from training.evaluation.label_map import as_labels
from training.evaluation.metrics import as_spacing
from training.manifest import case_files

SMALLEST_OBJECT = 8  # voxels
_LARGEST_LABEL = 32767
_TRAINED_ON = ("gts", "spacing", "imgs")  # the last where there is one
_SURFACE_VOXELS = 64  # kept of each object
_COARSEST = 32  # a pyramid ends where no axis is longer
_SEED = 17  # of which surface voxels are kept

Point = tuple[float, float, float]


@dataclass(frozen=True)
class TrainingObject:
    """One object of a volume, in voxels (z, y, x).

    Attributes:
        label: its value in the label map.
        start, stop: half-open bounding box.
        boxes: the challenge's box for each choice of the slice axis: lower edges, upper edges
            (voxel centre +- 0.5), middle slice.
        deepest: about the voxel deepest inside, in millimetres.
        surface: (N, 3) some of its outermost voxels.
        also: the label of its other part, of two objects taken for one; else 0.
    """

    label: int
    start: Triple
    stop: Triple
    boxes: tuple[tuple[Point, Point, float], ...]
    deepest: Triple
    surface: NDArray[np.int32]
    also: int = 0


@dataclass(frozen=True)
class LabelledVolume:
    """A volume with its objects; ``image`` is None for a label map without an image.

    Attributes:
        name: file name without suffix.
        image: (D, H, W) uint8.
        labels: (D, H, W) uint8, or int16 where there are more than 255.
        spacing_mm: (z, y, x).
        objects: those of at least eight voxels, by label.
    """

    name: str
    image: Tensor | None
    labels: Tensor
    spacing_mm: Point
    objects: tuple[TrainingObject, ...]

    @property
    def modality(self) -> str:
        """The one its file is named after."""
        return modality_of(self.name)

    @property
    def source(self) -> str:
        """Modality and dataset, the first two parts of the file name."""
        return "_".join([self.modality, *self.name.split("_")[1:2]])


def load_volumes(paths: Sequence[Path]) -> list[LabelledVolume]:
    """Read challenge npz files with ``gts``; those without an object are left out.

    Raises:
        ValueError: a file is damaged or has no ``gts`` or ``spacing`` of use; none has an object.
    """
    # Most of it is done outside of Python's lock.
    with ThreadPoolExecutor() as pool:
        volumes = [volume for volume in pool.map(_load_volume, paths) if volume.objects]
    if not volumes:
        raise ValueError(f"no labelled object in {len(paths)} files; accepted: npz files with gts")
    return volumes


def _load_volume(path: Path) -> LabelledVolume:
    with NpzFile(path) as file:
        arrays = {key: file[key] for key in _TRAINED_ON if key in file}
    kept, (z, y, x) = checked(path.stem, arrays)
    voxels = torch.from_numpy(to_bytes(arrays["imgs"])) if "imgs" in arrays else None
    objects = []
    for label, place in enumerate(ndimage.find_objects(kept), start=1):
        if place is None:
            continue
        mask = kept[place] == label
        if mask.sum() >= SMALLEST_OBJECT:
            start = (place[0].start, place[1].start, place[2].start)
            objects.append(_measured(label, mask, start, (z, y, x)))
    return LabelledVolume(path.stem, voxels, torch.from_numpy(kept), (z, y, x), tuple(objects))


def load_folder(folder: Path, cases: Sequence[str] | None = None) -> list[LabelledVolume]:
    """Read the labelled volumes of a folder, all or those whose names are listed.

    Args:
        folder: holds challenge npz files.
        cases: file names, with or without ``.npz``.

    Raises:
        ValueError: there is none, a listed one is missing, or :func:`load_volumes` refuses.
    """
    paths = case_files(folder)
    if cases is not None:
        wanted = {Path(name).name.removesuffix(".npz") for name in cases}
        missing = sorted(wanted - {path.stem for path in paths})
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(wanted)} listed cases, {missing[0]} first"
            )
        paths = [path for path in paths if path.stem in wanted]
    if not paths:
        raise ValueError(f"{folder} holds no labelled volume; accepted: npz files with gts")
    return load_volumes(paths)


def to_bytes(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Intensities as they are trained on: whole numbers 0..255, what is no number being 0."""
    clipped = np.clip(np.nan_to_num(image.astype(np.float32)), 0, 255)
    voxels: NDArray[np.uint8] = clipped.round().astype(np.uint8)
    return voxels


def checked(
    name: str, arrays: Mapping[str, NDArray[np.generic]]
) -> tuple[NDArray[np.unsignedinteger | np.int16], Point]:
    """What training takes of a case's arrays, for whoever else judges what it may be trained on.

    Args:
        name: of the case.
        arrays: ``gts``, ``spacing`` and, if there are any, ``imgs``; others are not looked at.

    Returns:
        (D, H, W) labels, uint8 or int16, and the spacing (z, y, x).

    Raises:
        ValueError: one is missing, or arrays of other kinds, shapes or ranges.
    """
    given = {key: arrays[key] for key in _TRAINED_ON if key in arrays}
    if not {"gts", "spacing"} <= set(given):
        raise ValueError(f"{name} holds {list(arrays)}; accepted: npz with gts and spacing")
    for key, array in given.items():
        fits = key == "spacing" or array.ndim == 3
        if array.dtype.kind not in "biuf" or not array.size or not fits:
            raise ValueError(
                f"{name}: received {key} of {array.dtype} and shape {array.shape}; accepted: "
                "numbers, imgs and gts (D, H, W)"
            )
    try:
        x, y, z = as_spacing(given["spacing"].reshape(-1))
        kept = np.ascontiguousarray(as_labels(given["gts"]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if kept.dtype == np.uint16:
        if kept.max() > _LARGEST_LABEL:
            raise ValueError(f"{name}: label {kept.max()}; accepted: up to {_LARGEST_LABEL}")
        kept = kept.astype(np.uint8 if kept.max() < 256 else np.int16)  # torch has no uint16
    image = given.get("imgs")
    if image is not None:
        if image.shape != kept.shape:
            raise ValueError(f"{name}: imgs {image.shape} and gts {kept.shape} differ in shape")
        low, high = np.nanmin(image), np.nanmax(image)
        fractions = image.dtype.kind == "f" and 0 < high <= 1
        if low < 0 or high > 255 or fractions:
            raise ValueError(
                f"{name}: imgs from {low:g} to {high:g}; accepted: 0 to 255, which "
                "training.preprocess makes of any image"
            )
    return kept, (z, y, x)


def _measured(
    label: int, mask: NDArray[np.bool_], start: Triple, spacing_mm: Point
) -> TrainingObject:
    """What windows and prompts need to know of an object, ``mask`` being its bounding box."""
    stop = tuple(a + n for a, n in zip(start, mask.shape, strict=True))
    boxes = []
    for axis in range(3):
        low, high, middle = challenge_box(np.moveaxis(mask, axis, 0))
        edges = []
        for corner in (low, high):
            back = list(corner[1:])
            back.insert(axis, corner[0])
            edges.append(tuple(c + s for c, s in zip(back, start, strict=True)))
        boxes.append((edges[0], edges[1], middle + start[axis]))
    steps = [max(1, n // 48) for n in mask.shape]
    few = np.ascontiguousarray(mask[:: steps[0], :: steps[1], :: steps[2]])
    if not few.any():  # a thin object between the steps
        few, steps = np.ascontiguousarray(mask), [1, 1, 1]
    apart = [n * mm for n, mm in zip(steps, spacing_mm, strict=True)]
    depth = edt.edt(few, anisotropy=apart, black_border=True)
    found = np.unravel_index(int(depth.argmax()), depth.shape)
    deepest = tuple(int(i) * n + a for i, n, a in zip(found, steps, start, strict=True))
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    rng = np.random.default_rng((_SEED, label, len(surface)))
    chosen = surface[rng.permutation(len(surface))[:_SURFACE_VOXELS]] + np.array(start)
    return TrainingObject(
        label,
        start,
        stop,  # type: ignore[arg-type]
        tuple(boxes),
        deepest,  # type: ignore[arg-type]
        chosen.astype(np.int32),
    )


def joined(volume: LabelledVolume, one: TrainingObject, other: TrainingObject) -> TrainingObject:
    """Two objects of a volume as one."""
    start, stop = hull([(one.start, one.stop), (other.start, other.stop)])
    part = volume.labels[tuple(map(slice, start, stop))].numpy()
    mask = (part == one.label) | (part == other.label)
    both = _measured(one.label, mask, start, volume.spacing_mm)
    return dataclasses.replace(both, also=other.label)


@dataclass(frozen=True)
class Level:
    """One resolution of a volume's pyramid.

    Attributes:
        offset: of its first voxel in the store's buffers.
        shape: (D, H, W).
        factor: voxels of the volume along an edge of one of its voxels, per axis.
    """

    offset: int
    shape: Triple
    factor: Triple


class VolumeStore:
    """Volumes of any sizes in one buffer on the device, as bytes, each with its pyramid.

    A window much larger than its grid is read from a coarser level, where every voxel is the mean
    of those it covers (for labels: the most frequent, background winning ties), as inference
    averages the voxels of a cell. Levels halve the axes of finest spacing until all are alike.

    Attributes:
        volumes: those with an image first.
        images: (N,) uint8, all levels of all images.
        labels: (M,) uint8 or int16, the same places and, behind them, volumes without an image.
        levels: of each volume, finest first.
    """

    def __init__(self, volumes: Sequence[LabelledVolume], device: torch.device | str) -> None:
        """Build the pyramids and move everything to ``device``."""
        self.volumes = [v for v in volumes if v.image is not None]
        self.volumes += [v for v in volumes if v.image is None]
        kind = torch.int16 if any(v.labels.dtype == torch.int16 for v in volumes) else torch.uint8
        images, labels, self.levels = [], [], []
        offset = 0
        for volume in self.volumes:
            levels = []
            for image, label, factor in _pyramid(volume):
                D, H, W = label.shape
                levels.append(Level(offset, (D, H, W), factor))
                offset += label.numel()
                labels.append(label.to(kind).reshape(-1))
                if image is not None:
                    images.append(image.reshape(-1))
            self.levels.append(tuple(levels))
        self.images = torch.cat(images).to(device) if images else torch.zeros(1, dtype=torch.uint8)
        self.labels = torch.cat(labels).to(device)

    @property
    def device(self) -> torch.device:
        """Where the voxels lie."""
        return self.labels.device

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return self.images.nbytes + self.labels.nbytes


def _pyramid(volume: LabelledVolume) -> list[tuple[Tensor | None, Tensor, Triple]]:
    """Levels of a volume, finest first: image, labels, factor per axis."""
    image, labels, factor = volume.image, volume.labels, (1, 1, 1)
    levels = [(image, labels, factor)]
    while max(labels.shape) > _COARSEST:
        spacing = [f * s for f, s in zip(factor, volume.spacing_mm, strict=True)]
        # An axis of few voxels is left alone, whatever its spacing.
        long = [s for s, n in zip(spacing, labels.shape, strict=True) if n > 2]
        axes = [
            axis for axis in range(3) if labels.shape[axis] > 2 and spacing[axis] < 1.5 * min(long)
        ]
        image = None if image is None else _halve(image, axes, _mean)
        labels = _halve(labels, axes, _majority)
        z, y, x = (f * (1 + (a in axes)) for a, f in enumerate(factor))
        factor = (z, y, x)
        levels.append((image, labels, factor))
    return levels


def _halve(
    volume: Tensor, axes: Sequence[int], combine: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """(D, H, W) with some axes at half the resolution; odd ones are completed by their edge."""
    for axis in axes:
        if volume.shape[axis] % 2:
            volume = torch.cat([volume, volume.narrow(axis, volume.shape[axis] - 1, 1)], axis)
    parts = [volume]
    for axis in axes:
        index = (slice(None),) * axis
        parts = [p[(*index, slice(i, None, 2))] for p in parts for i in (0, 1)]
    return combine(parts)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.int16)
    for part in parts:
        total += part
    return ((total + len(parts) // 2) // len(parts)).to(parts[0].dtype)


def _majority(parts: Sequence[Tensor]) -> Tensor:
    """The most frequent value at each place; the smallest of equally frequent ones."""
    best = parts[0].clone()
    most = torch.zeros_like(best, dtype=torch.uint8)
    for candidate in parts:
        count = torch.zeros_like(most)
        for other in parts:
            count += candidate == other
        better = (count > most) | ((count == most) & (candidate < best))
        best = torch.where(better, candidate, best)
        most = torch.maximum(most, count)
    return best
