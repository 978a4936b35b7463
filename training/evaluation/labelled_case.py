"""A labelled case: the arrays of a challenge file, and the reference kept apart from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.case import MAX_CLASSES
from inference.npz import NpzFile
from training.evaluation.label_map import LabelMap
from training.evaluation.metrics import as_spacing
from training.evaluation.surface_dice import Spacing
from training.manifest import read_structures


@dataclass(frozen=True)
class LabelledCase:
    """One case to be scored.

    Attributes:
        name: file name, ``.npz`` included.
        arrays: what a predictor may see of the file: everything but the reference.
        reference: the true labels, renumbered 1..N in ascending order of the file's: class n is
            entry n of the boxes, and so every predictor numbers it.
        stored_spacing: as the file has it, (x, y, z) mm; the challenge's NSD takes it unpermuted.
        structures: name of each class as a ``manifest.json`` beside the case gives it, or empty.
    """

    name: str
    arrays: Mapping[str, NDArray[Any]]
    reference: LabelMap
    stored_spacing: Spacing
    structures: tuple[str, ...]

    @property
    def spacing_mm(self) -> Spacing:
        """The spacing along the arrays' axes, (z, y, x)."""
        x, y, z = self.stored_spacing
        return z, y, x


def load_labelled_case(
    path: Path, references: Path | None = None, *, boxes: bool = True
) -> LabelledCase:
    """Read a case and its reference.

    Args:
        path: challenge file; ``gts`` in it unless ``references`` is given.
        references: folder with a file of the same name that holds ``gts``.
        boxes: False drops the boxes, as for the challenge's cases that come without.

    Raises:
        ValueError: no reference, nothing labelled, more labels than a label map of uint8 can
            hold, shapes or numbers of classes that differ; a manifest that is none.
    """
    with NpzFile(path) as file:
        arrays = {key: file[key] for key in file if key != "gts"}
        labels = file["gts"] if "gts" in file and references is None else None
    if references is not None:
        with NpzFile(references / path.name) as file:
            labels = file.get("gts")
    if labels is None:
        raise ValueError(f"{path.name}: no gts; evaluation needs the reference labels")
    image, spacing = (arrays.get(key) for key in ("imgs", "spacing"))
    if image is None or spacing is None:
        raise ValueError(f"{path.name}: holds {sorted(arrays)}; accepted: imgs and spacing")
    if labels.shape != image.shape:
        raise ValueError(f"{path.name}: gts of shape {labels.shape}, imgs of {image.shape}")
    reference = LabelMap.of(labels)
    stored = reference.labels
    if not stored:
        raise ValueError(f"{path.name}: no labelled voxel")
    if len(stored) > MAX_CLASSES:
        raise ValueError(f"{path.name}: {len(stored)} labels; accepted: at most {MAX_CLASSES}")
    if not boxes:
        arrays.pop("boxes", None)
    if "boxes" in arrays and arrays["boxes"].shape[:1] != (len(stored),):
        shape = arrays["boxes"].shape
        raise ValueError(f"{path.name}: boxes of shape {shape}, {len(stored)} classes")
    named = read_structures(path.parent).get(path.name, {})
    return LabelledCase(
        path.name,
        arrays,
        _renumbered(reference),
        as_spacing(spacing.reshape(-1)),
        tuple(named.get(str(label), "") for label in stored),
    )


def _renumbered(reference: LabelMap) -> LabelMap:
    """The same classes as 1..N."""
    stored = reference.labels
    numbers = range(1, len(stored) + 1)
    if stored == list(numbers):
        return reference
    number = np.zeros(stored[-1] + 1, np.uint8)
    number[stored] = numbers
    boxes = {new: reference.boxes[old] for new, old in zip(numbers, stored, strict=True)}
    return LabelMap(number[reference.voxels], boxes)
