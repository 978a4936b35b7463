"""A case: one image with the prompts of its objects. The only reader and validator of input.

The input is the challenge's (CVPR 2025, Foundation Models for Interactive 3D Biomedical Image
Segmentation): ``imgs`` and ``spacing``; prompts as ``boxes`` and, from round 1 on, ``clicks`` and
``clicks_order``, one entry a class; and ``prev_pred``, the label map of the last round. What can be
repaired is repaired and noted, everything else is refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.npz import NpzError, NpzFile, one_line
from inference.object_prompts import (
    BOX_KEYS,
    MAX_CLICKS,
    Box,
    Click,
    ObjectPrompts,
    brief,
    entries,
    number,
    read_box,
    read_clicks,
    stored_clicks,
)

__all__ = ["Box", "Case", "CaseError", "Click", "ObjectPrompts", "load_case", "parse_case"]

MAX_CLASSES = 255
"""Labels of a uint8 label map, less the background."""

MAX_VOXELS = 1 << 30
"""Largest image read, 1024^3: its label maps alone take 1 GiB each."""

MODALITIES = ("CT", "MR", "PET", "US", "Microscopy")
"""That the challenge's files are named after."""

_ALIASES = {"MRI": "MR", "Ultrasound": "US", "Micro": "Microscopy"}  # other spellings
_MAX_INTENSITY = 1e12  # beyond it squares and their sums overflow float32
_SPACING_RANGE_MM = (1e-6, 1e6)  # a nanometre to a kilometre

_IMAGE = "a 3D array (D, H, W) of integers or floats"
_BOXES = f"a list of dicts with {', '.join(BOX_KEYS)} and z_mid, one a class"
_CLICKS = "a list of dicts with fg and bg, lists of (z, y, x), one a class"


class CaseError(ValueError):
    """Input that cannot be segmented; one line: which file, what was received, what is accepted."""


@dataclass(frozen=True)
class Case:
    """One image and its prompts.

    Attributes:
        name: file name, for messages and for the output.
        image: (D, H, W), any real dtype, finite, nominally 0..255.
        spacing_mm: voxel size (z, y, x).
        objects: one entry a label, ascending, labels 1..N.
        previous: (D, H, W) uint8 label map of the last round, or None.
        notes: what was repaired while reading, one sentence each.
    """

    name: str
    image: NDArray[np.generic]
    spacing_mm: tuple[float, float, float]
    objects: tuple[ObjectPrompts, ...]
    previous: NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()


def modality_of(name: str) -> str:
    """The one of :data:`MODALITIES` that a challenge file is named after.

    Of other names whatever stands before the first underscore.
    """
    prefix = name.split("_", 1)[0]
    return _ALIASES.get(prefix, prefix)


def load_case(path: Path | str) -> Case:
    """Read a case from an npz file in the challenge's format.

    Only the keys of a case are read: ``gts`` stays compressed where a file has one.

    Raises:
        CaseError: if the file cannot be read or holds nothing that can be segmented.
    """
    name = Path(path).name
    try:
        with NpzFile(path) as arrays:
            return parse_case(arrays, name)
    except NpzError as error:
        raise CaseError(str(error)) from None


def parse_case(arrays: Mapping[str, object], source: str) -> Case:
    """The case of arrays in the challenge's format, checked and repaired.

    Args:
        arrays: ``imgs`` (D, H, W), 0..255; ``spacing`` (x, y, z) in mm; ``boxes``, one dict a
            class of closed intervals ``z_min z_max z_mid z_mid_{x,y}_{min,max}``; ``clicks``, one
            dict a class with lists ``fg`` and ``bg`` of (z, y, x); ``clicks_order``, one sequence
            of ``"fg"``, ``"bg"`` or None a class; ``prev_pred`` (D, H, W). ``imgs`` and one of
            ``boxes`` and ``clicks`` must be there. Never written to; arrays that need no repair
            are not copied.
        source: name of the case, for messages.

    Raises:
        CaseError: if it holds nothing that can be segmented.
    """
    reader = _Reader(arrays, source)
    image = reader.image()
    spacing_mm = reader.spacing_mm()
    objects = reader.objects(image.shape)
    previous = reader.previous(image.shape, len(objects))
    if previous is None and all(prompts.is_empty for prompts in objects):
        raise reader.error(
            f"{len(objects)} classes without a usable box or click ({' '.join(reader.notes)})",
            "at least one box or click",
        )
    return Case(source, image, spacing_mm, objects, previous, tuple(reader.notes))


class _Reader:
    """Reads one case; ``notes`` gathers what was repaired."""

    def __init__(self, arrays: Mapping[str, object], source: str) -> None:
        self.arrays = arrays
        self.source = source
        self.notes: list[str] = []

    def error(self, received: str, accepted: str) -> CaseError:
        return CaseError(one_line(self.source, received, accepted))

    def image(self) -> NDArray[np.generic]:
        if "imgs" not in self.arrays:
            keys = ", ".join(str(key) for key in self.arrays) or "nothing"
            raise self.error(f"no imgs among its keys ({keys})", f"imgs, {_IMAGE}")
        image = self.arrays["imgs"]
        if not isinstance(image, np.ndarray) or image.dtype.kind not in "iuf":
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise self.error(f"imgs of type {kind}", _IMAGE)
        if image.ndim != 3 or image.size == 0:
            raise self.error(f"imgs of shape {image.shape}", f"{_IMAGE}, none of its sizes 0")
        if image.size > MAX_VOXELS:
            raise self.error(f"imgs of {image.size} voxels", f"at most {MAX_VOXELS}")
        image = np.ascontiguousarray(image, image.dtype.newbyteorder("="))
        # Smaller integers are never out of range.
        return self._finite(image) if image.dtype.kind == "f" or image.itemsize == 8 else image

    def _finite(self, image: NDArray[Any]) -> NDArray[Any]:
        """The image with NaN, infinities and absurd values replaced; no float128."""
        if image.dtype.itemsize > 8:
            image = image.astype(np.float64)
        limit = _MAX_INTENSITY
        if image.dtype.kind == "f":
            limit = min(limit, float(np.finfo(image.dtype).max))
        with np.errstate(invalid="ignore"):
            low, high = float(image.min()), float(image.max())  # NaN where there is any
        if -limit <= low and high <= limit:
            return image
        good = (-limit <= image) & (image <= limit)
        low, high = (image[good].min(), image[good].max()) if good.any() else (0, 0)
        self.notes.append(
            f"imgs: {good.size - np.count_nonzero(good)} of {good.size} voxels NaN, infinite or "
            f"beyond {limit:g} were set to {high:g} where positive, else to {low:g}."
        )
        return np.where(good, image, np.where(image > 0, high, low)).astype(image.dtype)

    def spacing_mm(self) -> tuple[float, float, float]:
        """(z, y, x): the file's order turned round, the only place where that is done."""
        stored = self.arrays.get("spacing")
        values = entries(stored)
        if values is None or len(values) != 3:
            received = "missing" if stored is None else f"not three numbers ({brief(stored)})"
            self.notes.append(f"spacing is {received}: 1 mm was taken.")
            return (1.0, 1.0, 1.0)
        sizes = [number(value) for value in values]
        low, high = _SPACING_RANGE_MM
        usable = [size for size in sizes if size is not None and low <= size <= high]
        other = max(usable, default=1.0)  # voxels a million times as long as wide there are none
        x, y, z = (size if size in usable else other for size in sizes)
        if [x, y, z] != sizes:
            said = f"spacing {brief(stored)} is unusable in part"
            self.notes.append(f"{said}: {other:g} mm was taken there.")
        return (z, y, x)

    def previous(self, shape: tuple[int, ...], classes: int) -> NDArray[np.uint8] | None:
        stored = self.arrays.get("prev_pred")
        if _is_nothing(stored):
            return None
        if not isinstance(stored, np.ndarray) or stored.dtype.kind not in "biuf":
            self.notes.append(f"prev_pred is no array of numbers ({brief(stored)}): left out.")
            return None
        if stored.shape != shape:
            self.notes.append(f"prev_pred has shape {stored.shape}, imgs has {shape}: left out.")
            return None
        labels = stored if stored.dtype.kind in "bui" else stored.astype(np.float64)
        with np.errstate(invalid="ignore"):
            inside = labels.min() >= 0 and labels.max() <= classes
            whole = labels.dtype.kind in "bui" or np.array_equal(labels, np.rint(labels))
        if inside and whole:
            return np.ascontiguousarray(stored, np.uint8)
        good = (labels >= 0) & (labels <= classes) & (labels == np.rint(labels))
        self.notes.append(
            f"prev_pred: {good.size - np.count_nonzero(good)} voxels with labels other than "
            f"0..{classes} were set to 0."
        )
        return np.where(good, labels, 0).astype(np.uint8)

    def objects(self, shape: tuple[int, ...]) -> tuple[ObjectPrompts, ...]:
        boxes = self._per_class("boxes", _BOXES)
        clicks = self._per_class("clicks", _CLICKS)
        if not boxes and not clicks:
            raise self.error("neither boxes nor clicks", f"boxes, {_BOXES}, or clicks, {_CLICKS}")
        classes = len(boxes or clicks)
        if boxes and clicks and len(boxes) != len(clicks):
            raise self.error(
                f"{len(boxes)} boxes, but clicks for {len(clicks)} classes", "one of each a class"
            )
        says = [self._about(label) for label in range(1, classes + 1)]
        stored = [stored_clicks(*pair) for pair in zip(clicks, says, strict=False)]
        count = sum(len(side) for sides in stored for side in sides)
        if count > MAX_CLICKS:  # counted unread: a pickle can refer to one long list many times
            raise self.error(f"{count} clicks", f"at most {MAX_CLICKS}")
        orders = self._orders(classes)
        objects = []
        for index, say in enumerate(says):
            box = read_box(boxes[index], shape, say) if boxes else None
            found = read_clicks(*stored[index], orders[index], shape, say) if clicks else ()
            objects.append(ObjectPrompts(index + 1, box, found))
        return tuple(objects)

    def _per_class(self, key: str, accepted: str) -> list[Any]:
        """The entries of ``boxes`` or ``clicks``, none where the key is absent or empty."""
        stored = self.arrays.get(key)
        if _is_nothing(stored):
            return []
        found = entries(stored)
        if found is None:
            raise self.error(f"{key} of type {brief(stored)}", accepted)
        if len(found) > MAX_CLASSES:
            raise self.error(f"{key} for {len(found)} classes", f"at most {MAX_CLASSES}")
        return list(found)

    def _orders(self, classes: int) -> list[Any]:
        stored = self.arrays.get("clicks_order")
        if _is_nothing(stored):
            return [None] * classes
        found = entries(stored)
        if found is None or len(found) != classes:
            count = brief(stored) if found is None else f"for {len(found)} classes"
            self.notes.append(f"clicks_order is {count}, not for {classes} classes: left out.")
            return [None] * classes
        return list(found)

    def _about(self, label: int) -> Callable[[str], None]:
        return lambda sentence: self.notes.append(f"class {label}: {sentence}.")


def _is_nothing(stored: object) -> bool:
    """True for what stands for an absent key: None, also in an array, and empty lists."""
    if isinstance(stored, np.ndarray) and stored.ndim == 0 and stored.dtype == np.dtype(object):
        stored = stored.item()
    if isinstance(stored, np.ndarray):
        return stored.size == 0
    return stored is None or (isinstance(stored, list | tuple) and not stored)
