"""One raw image with its labels: where they lie, and the challenge case made of them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inference.intensities import to_uint8
from inference.nifti import (
    axial_labels,
    orientation_of,
    renumbered,
    to_case,
)
from inference.nifti_files import read_volume
from inference.npz import NpzFile
from inference.object_prompts import stored_box
from training.box_padding import box_padding

#: Longest first, so that ``a.nii.gz`` is ``a``.
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")

_CHANNEL = re.compile(r"_0000$")  # nnU-Net's first channel: its label map goes without


@dataclass(frozen=True)
class RawCase:
    """An image to be converted.

    Attributes:
        name: what its files are called, without endings.
        image: a file, or a folder with a DICOM series.
        labels: a label map, or a folder with one file a structure; None without labels.
        problem: why it cannot be converted, found while listing; empty where nothing was.
    """

    name: str
    image: Path
    labels: Path | None = None
    problem: str = ""


@dataclass(frozen=True)
class Conversion:
    """How images are converted.

    Attributes:
        modality: CT, MR, PET, US or Microscopy.
        window: width and level in Hounsfield units, or None for percentiles.
        boxes: whether a box a class is stored, by the challenge's rule.
        names: structure by label of a label map.
    """

    modality: str
    window: tuple[float, float] | None = None
    boxes: bool = False
    names: Mapping[int, str] = field(default_factory=dict)

    def fingerprint(self, case: RawCase) -> str:
        """Differs when a case must be converted again: other settings, or files that changed."""
        files = [*_files_of(case.image), *(_files_of(case.labels) if case.labels else [])]
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        names = sorted(self.names.items())
        text = json.dumps([asdict(self) | {"names": names}, stamps])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def list_cases(
    images: Path, labels: Path | None = None, skip: Iterable[Path] = ()
) -> list[RawCase]:
    """The images of a folder, or of a table, each with its labels.

    Args:
        images: a folder of image files and of folders with a DICOM series each; or a CSV file with
            the columns ``image``, ``labels`` and, where file names do not tell cases apart,
            ``case``. Paths of a table are relative to it.
        labels: folder with a label map of the same name for each image (without nnU-Net's
            ``_0000``), or a folder of that name with one file a structure.
        skip: folders that are no images, should they lie among them.

    Raises:
        ValueError: nothing is there, or the table lacks a column.
    """
    if images.is_file():
        cases = _read_table(images)
    else:
        others = {folder.resolve() for folder in (*skip, *([labels] if labels else []))}
        cases = [
            RawCase(_stem(path), path)
            if labels is None
            else _with_labels(RawCase(_stem(path), path), labels)
            for path in _entries(images)
            if path.resolve() not in others
        ]
    if not cases:
        raise ValueError(
            f"{images}: no image in it; accepted: files *{', *'.join(ENDINGS)} and folders with a "
            "DICOM series, or a CSV file"
        )
    by_name: dict[str, list[RawCase]] = {}
    for case in cases:
        by_name.setdefault(case.name, []).append(case)
    listed = []
    for name, group in sorted(by_name.items()):
        if len(group) > 1:
            files = ", ".join(case.image.name for case in group)
            group = [RawCase(name, group[0].image, None, f"{len(group)} images ({files})")]
        listed += group
    return listed


def _entries(folder: Path) -> list[Path]:
    """Images of a folder: files of a known ending, and folders."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or path.name.endswith(ENDINGS))
    )


def _stem(path: Path) -> str:
    """The name of a case: no ending, and nothing in it that a file name would not bear."""
    ending = "" if path.is_dir() else next((e for e in ENDINGS if path.name.endswith(e)), "")
    return re.sub(r"[^\w.-]", "-", path.name.removesuffix(ending))


def _with_labels(case: RawCase, folder: Path) -> RawCase:
    names = {case.name, _CHANNEL.sub("", case.name)}
    found = [path for path in _entries(folder) if _stem(path) in names]
    if len(found) == 1:
        return RawCase(case.name, case.image, found[0])
    what = ", ".join(path.name for path in found) or f"none named {case.name}"
    return RawCase(case.name, case.image, None, f"labels in {folder.name}: {what}; accepted: one")


def _read_table(table: Path) -> list[RawCase]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{table}: cannot be read as a table ({error}); accepted: a folder of images, or CSV "
            "with the columns image, labels, case"
        ) from None
    if rows and "image" not in rows[0]:
        raise ValueError(f"{table}: columns {list(rows[0])}; accepted: image, labels, case")
    cases = []
    for line, row in enumerate(rows, start=2):
        if not row["image"]:
            raise ValueError(f"{table}: line {line} names no image")
        image = table.parent / row["image"]
        labels = table.parent / row["labels"] if row.get("labels") else None
        name = re.sub(r"[^\w.-]", "-", row.get("case") or _stem(image))
        cases.append(RawCase(name, image, labels))
    return cases


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def convert(case: RawCase, how: Conversion) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Make a challenge case of a raw one.

    Volumes are turned to axial slices, never resampled; a ``.npz`` (``imgs`` in (z, y, x),
    ``spacing`` in x, y, z, maybe ``gts``) is taken to hold axial slices already. Where structures
    of several files overlap, the smallest one gets the voxel, so that a lesion in an organ lasts.

    Returns:
        The arrays ``imgs`` (uint8), ``spacing`` (x, y, z, mm) and, with labels, ``gts`` (labels
        1..N) and perhaps ``boxes``; and what is worth keeping: shape, spacing, how the image lies,
        the name of each label.

    Raises:
        ValueError: the case cannot be converted; one line says why.
        OSError: a file cannot be read.
    """
    if case.problem:
        raise ValueError(case.problem)
    notes: list[str] = []
    if case.image.suffix == ".npz":
        arrays, labels, lies = _convert_npz(case, how)
    else:
        image = read_volume(case.image)
        arrays = to_case(image, how.window)
        lies = {
            "orientation": orientation_of(image),
            "origin": [round(v, 6) for v in image.GetOrigin()],
            "direction": [round(v, 9) for v in image.GetDirection()],
        }
        labels = None
        if case.labels is not None and case.labels.is_dir():
            files = [path for path in _entries(case.labels) if path.is_file()]
            masks = ((p, _naming(p, axial_labels, read_volume(p), image)) for p in files)
            labels, names = _merged(masks, case.labels, arrays["imgs"].shape, notes)
        elif case.labels is not None:
            labels = _naming(case.labels, axial_labels, read_volume(case.labels), image)
    if arrays["imgs"].min() == arrays["imgs"].max():
        window = f"the CT window {how.window[0]:g},{how.window[1]:g}" if how.window else "clipping"
        raise ValueError(f"{case.image}: received an image of one value after {window}")
    record: dict[str, Any] = {
        "shape": list(arrays["imgs"].shape),
        "spacing_xyz_mm": [round(float(v), 6) for v in arrays["spacing"]],
        **lies,
        "structures": {},
    }
    if labels is not None:
        arrays["gts"] = _naming(case.labels or case.image, renumbered, labels)
        present = np.unique(labels)
        if case.labels is None or not case.labels.is_dir():
            names = {int(v): how.names.get(int(v), f"label {int(v)}") for v in present}
        kept = [names[int(value)] for value in present[present != 0]]
        record["structures"] = {str(i): name for i, name in enumerate(kept, start=1)}
        if how.boxes:
            arrays["boxes"] = challenge_boxes(arrays["gts"], case.name)
    record["notes"] = "; ".join(notes)
    return arrays, record


def _convert_npz(
    case: RawCase, how: Conversion
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None, dict[str, Any]]:
    """A raw npz: intensities of any range, maybe with labels of any numbers."""
    with NpzFile(case.image) as file:
        volume, spacing = file.get("imgs"), file.get("spacing")
        labels = file.get("gts")
    if case.labels is not None:
        if case.labels.suffix != ".npz":
            raise ValueError(f"{case.labels}: accepted for an image in npz: labels in npz")
        with NpzFile(case.labels) as file:
            labels = file.get("gts")
        if labels is None:
            raise ValueError(f"{case.labels}: accepted: the key gts")
    if volume is None or spacing is None:
        raise ValueError(f"{case.image}: accepted: the keys imgs and spacing (x, y, z)")
    if volume.dtype == bool:
        volume = volume.view(np.uint8)
    if volume.ndim != 3 or volume.size == 0 or volume.dtype.kind not in "iuf":
        raise ValueError(
            f"{case.image}: received imgs of {volume.dtype} {volume.shape}; accepted: real, (D,H,W)"
        )
    if (
        spacing.shape != (3,)
        or spacing.dtype.kind not in "iuf"
        or not ((spacing > 0) & np.isfinite(spacing)).all()
    ):
        raise ValueError(f"{case.image}: received spacing {spacing}; accepted: 3 positive numbers")
    if labels is not None and (labels.shape != volume.shape or labels.dtype.kind not in "biuf"):
        raise ValueError(
            f"{case.labels or case.image}: received gts of {labels.dtype} {labels.shape}; "
            f"accepted: real, {volume.shape}"
        )
    arrays: dict[str, NDArray[Any]] = {
        "imgs": to_uint8(volume, how.window),
        "spacing": spacing.astype(np.float64),
    }
    return arrays, labels, {"orientation": "as stored", "origin": None, "direction": None}


def _naming(path: Path, function: Any, *arguments: Any) -> Any:
    """The function's result; what it refuses is said of the file."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _merged(
    masks: Iterable[tuple[Path, NDArray[Any]]],
    folder: Path,
    shape: tuple[int, ...],
    notes: list[str],
) -> tuple[NDArray[np.uint16], dict[int, str]]:
    """A label map of one mask a structure, numbered as they come, smaller ones on top."""
    parts = []
    names: dict[int, str] = {}
    for number, (path, mask) in enumerate(masks, start=1):
        values = np.unique(mask)
        if len(values[values != 0]) > 1:
            raise ValueError(
                f"{path}: received values {values[:5].tolist()}; accepted: one structure a file, "
                "0 and another value"
            )
        names[number] = _stem(path)
        inside = mask != 0
        place = ndimage.find_objects(inside.view(np.uint8))
        if place:  # cut out, since a hundred whole masks fill a memory
            parts.append((int(inside.sum()), number, place[0], inside[place[0]].copy()))
    if not parts:
        raise ValueError(f"{folder}: received {len(names)} files without a labelled voxel")
    labels = np.zeros(shape, np.uint16)
    covered = 0
    for _, number, place, inside in sorted(parts, key=lambda part: (-part[0], part[1])):
        covered += int((labels[place][inside] != 0).sum())
        labels[place][inside] = number
    if covered:
        notes.append(f"{covered} voxels lie in two structures and were given to the smaller")
    hidden = [names[n] for _, n, place, _ in parts if not (labels[place] == n).any()]
    if hidden:
        notes.append(f"nothing is left of {', '.join(hidden)}")
    return labels, names


def challenge_boxes(labels: NDArray[np.uint8], seed: str) -> NDArray[np.object_]:
    """A box for each label 1..N by the organisers' rule, its random padding included.

    Args:
        labels: (D, H, W), every label 1..N present.
        seed: the same text gives the same padding; 0..5 voxels of a 256 wide image, an object.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    _, height, width = labels.shape
    boxes = np.empty(int(labels.max()), object)
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        assert place is not None, "labels are 1..N"
        z, y, x = (part.start for part in place)
        padding = box_padding(random, height, width)
        boxes[label - 1] = stored_box(labels[place] == label, padding, (z, y, x), labels.shape)
    return boxes


def read_names(path: Path) -> dict[int, str]:
    """A table of structures by label.

    Args:
        path: CSV with the columns ``label`` and ``name``; or JSON that maps labels to names or
            names to labels, by itself or under ``labels`` (nnU-Net's ``dataset.json``).

    Raises:
        ValueError: it is neither, or two names have one label.
    """
    pairs: Sequence[tuple[Any, Any]]
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text)
            values = values.get("labels", values)
            pairs = [(v, k) if isinstance(v, int) else (k, v) for k, v in values.items()]
        else:
            pairs = [(row["label"], row["name"]) for row in csv.DictReader(text.splitlines())]
        names = {int(label): str(name) for label, name in pairs}
    except (ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path}: cannot be read as names of labels ({type(error).__name__}: {error}); "
            "accepted: CSV with label,name, or JSON of labels and names"
        ) from None
    if len(names) != len(pairs):
        raise ValueError(f"{path}: received {len(pairs)} names for {len(names)} labels")
    return names
