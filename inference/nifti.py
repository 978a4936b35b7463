"""Medical image files to cases and label maps back to medical image files.

    python -m inference.nifti to-npz IMAGE CASE.npz [--window bone] [--labels SEG | --box ...]
        [--click ...] [--previous SEGS.npz]
    python -m inference.nifti to-nifti SEGS.npz IMAGE OUT.nii.gz

IMAGE is whatever SimpleITK reads (NIfTI, NRRD, MHA, ...) or a folder with a DICOM series. A case
holds axial slices, the way scanners store them: the volume is turned to the LPS orientation (x to
the left, y to the back, z to the head) by permuting and flipping axes. Nothing is resampled, so
label maps turn back exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inference.case import MAX_CLASSES, modality_of
from inference.intensities import CT_WINDOWS, PERCENTILES, parse_window, to_uint8
from inference.nifti_files import check_output, read_volume, write_volume
from inference.npz import NpzFile
from inference.object_prompts import stored_box
from inference.predict import run_program
from inference.whole_file import replacing

if TYPE_CHECKING:
    import SimpleITK as sitk

AXIAL = "LPS"
"""Orientation of a case: its x to the left, y to the back, z to the head."""

_TOLERANCE = 1e-3  # mm, and of direction cosines: headers hold float32


def to_case(
    image: sitk.Image,
    window: tuple[float, float] | None = None,
    labels: sitk.Image | None = None,
    boxes: Sequence[Sequence[int]] = (),
    clicks: Sequence[tuple[int, str, tuple[int, int, int]]] = (),
    previous: NDArray[np.uint8] | None = None,
) -> dict[str, NDArray[Any]]:
    """A case in the challenge's format from an image and prompts.

    Args:
        image: 3D scalar.
        window: see ``to_uint8``.
        labels: label map on the image's grid: ``gts``, its labels renumbered 1..N in ascending
            order, and a box a class, by the challenge's rule without padding. Excludes ``boxes``.
        boxes: one a class: x_min, x_max, y_min, y_max, z_min, z_max, both ends inside, voxel
            indices of ``image`` counted from 0.
        clicks: class, ``"fg"`` or ``"bg"``, and voxel index (x, y, z) of ``image``; oldest first.
        previous: ``prev_pred``, the result of the case that held all prompts but the newest.

    Raises:
        ValueError: if labels or ``previous`` lie on another grid, there are more than 255, a prompt
            is outside, or ``previous`` has a class that there is no box of while others have one.
    """
    before = 0 if previous is None else int(previous.max(initial=0))
    named = max((before, *(label for label, _, _ in clicks)))
    if max(len(boxes), named) > MAX_CLASSES:
        received = f"{len(boxes)} boxes, clicks on class {named}"
        raise ValueError(f"received {received}; accepted: classes 1 to {MAX_CLASSES}")
    turned = _turned(image, AXIAL)
    case: dict[str, NDArray[Any]] = {
        "imgs": to_uint8(_array(turned), window),
        "spacing": np.array(turned.GetSpacing()),
    }
    if previous is not None:
        _check_shape(previous, turned)
        case["prev_pred"] = previous
    stored: list[dict[str, int]] = []
    if labels is not None:
        case["gts"] = renumbered(axial_labels(labels, image))
        classes = range(1, int(case["gts"].max()) + 1)
        stored = [stored_box(case["gts"] == label) for label in classes]
    for x0, x1, y0, y1, z0, z1 in boxes:
        corners = [_turned_index(image, turned, corner) for corner in ((x0, y0, z0), (x1, y1, z1))]
        low, high = (tuple(map(end, *corners)) for end in (min, max))
        box = {"z_min": low[0], "z_max": high[0], "z_mid": (low[0] + high[0] + 1) // 2}
        box |= {"z_mid_y_min": low[1], "z_mid_y_max": high[1]}
        stored.append(box | {"z_mid_x_min": low[2], "z_mid_x_max": high[2]})
    if stored and before > len(stored):
        raise ValueError(
            f"received {len(stored)} boxes and a previous result of {before} classes; "
            "accepted: a box of every class, or none"
        )
    if stored:
        case["boxes"] = np.array(stored, dtype=object)
    if clicks:
        count = len(stored) or named
        positions: list[dict[str, list[list[int]]]] = [{"fg": [], "bg": []} for _ in range(count)]
        orders: list[list[str]] = [[] for _ in range(count)]
        for label, side, index in clicks:
            if not 1 <= label <= count or side not in ("fg", "bg"):
                raise ValueError(
                    f"received a click {side!r} on class {label}; accepted: fg or bg, classes 1 "
                    f"to {count}; where one class has a box, every class needs one"
                )
            positions[label - 1][side].append(list(_turned_index(image, turned, index)))
            orders[label - 1].append(side)
        case["clicks"] = np.array(positions, dtype=object)
        case["clicks_order"] = np.empty(count, dtype=object)
        case["clicks_order"][:] = orders
    return case


def to_image(label_map: NDArray[np.uint8], source: sitk.Image) -> sitk.Image:
    """The label map of a case in the exact geometry of the image the case was made from.

    Args:
        label_map: (D, H, W), the grid of ``to_case``.
        source: what ``to_case`` was given.

    Raises:
        ValueError: if the label map has another shape than the source, once turned.
    """
    import SimpleITK as sitk

    turned = _turned(source, AXIAL)
    _check_shape(label_map, turned)
    image = sitk.GetImageFromArray(label_map)
    image.CopyInformation(turned)
    result = _turned(image, orientation_of(source))
    _check_same_grid(source, result)
    result.CopyInformation(source)  # without the rounding of the origin on the way
    return result


def orientation_of(image: sitk.Image) -> str:
    """Where its axes point, nearest to: ``"RAS"`` for x to the right, y to the front, z up."""
    import SimpleITK as sitk

    direction = image.GetDirection()
    code: str = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction)
    return code


def axial_labels(labels: sitk.Image, image: sitk.Image) -> NDArray[Any]:
    """A label map as (D, H, W) in the grid of ``to_case(image)``, labels as they are.

    Raises:
        ValueError: if it lies on another grid than the image.
    """
    import SimpleITK as sitk

    _check_same_grid(image, labels)
    # Tilted by 45 degrees, the last digit of a direction would decide how each of them is turned.
    alike = sitk.Image(labels)
    alike.CopyInformation(image)
    return _array(_turned(alike, AXIAL))


def _turned(image: sitk.Image, orientation: str) -> sitk.Image:
    import SimpleITK as sitk

    return sitk.DICOMOrient(image, orientation)


def _array(image: sitk.Image) -> NDArray[Any]:
    """(D, H, W) = (z, y, x)."""
    import SimpleITK as sitk

    array: NDArray[Any] = sitk.GetArrayFromImage(image)
    return array


def _turned_index(
    image: sitk.Image, turned: sitk.Image, index: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The voxel (z, y, x) of the turned image for voxel (x, y, z) of the image."""
    if not all(0 <= i < n for i, n in zip(index, image.GetSize(), strict=True)):
        size = image.GetSize()
        raise ValueError(f"received voxel {index} (x, y, z, from 0); the image has {size} voxels")
    x, y, z = turned.TransformPhysicalPointToIndex(image.TransformIndexToPhysicalPoint(index))
    return int(z), int(y), int(x)


def renumbered(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Labels 1..N in ascending order of those there are; ValueError for none or over 255."""
    values = np.unique(labels)
    names = values[values != 0]
    if not 1 <= len(names) <= 255 or not np.array_equal(names, np.rint(names)) or names[0] < 0:
        raise ValueError(
            f"received {len(names)} labels {names[:5].tolist()}; accepted: 1 to 255 whole numbers"
        )
    table = np.concatenate([[0], names])
    return np.searchsorted(table, labels).astype(np.uint8)


def _check_shape(label_map: NDArray[np.uint8], turned: sitk.Image) -> None:
    if label_map.shape != turned.GetSize()[::-1]:
        raise ValueError(
            f"received a label map of shape {label_map.shape}; accepted: "
            f"{turned.GetSize()[::-1]}, the shape of the image in axial slices"
        )


def _check_same_grid(image: sitk.Image, other: sitk.Image) -> None:
    for name in ("Size", "Spacing", "Origin", "Direction"):
        expected, received = (getattr(i, f"Get{name}")() for i in (image, other))
        if not np.allclose(expected, received, rtol=0, atol=_TOLERANCE):
            raise ValueError(
                f"received a label map with {name.lower()} {received}; "
                f"accepted: that of the image, {expected}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error (one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.nifti",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    forth = commands.add_parser("to-npz", help="make a case of an image and prompts")
    forth.add_argument("image", type=Path, help="image file or folder with a DICOM series")
    forth.add_argument("case", type=Path, help="the npz file to write, named MODALITY_...")
    forth.add_argument(
        "--window",
        type=_window,
        metavar="|".join(CT_WINDOWS) + "|W,L",
        help="CT only, and needed there: window by name, or width and level in HU; without it "
        f"intensities are clipped to percentiles {PERCENTILES[0]} and {PERCENTILES[1]}",
    )
    prompts = forth.add_mutually_exclusive_group()
    prompts.add_argument(
        "--labels", type=Path, help="label map: stored as gts, with a box made of each label"
    )
    prompts.add_argument(
        "--box",
        type=int,
        nargs=6,
        action="append",
        default=[],
        metavar=("X0", "X1", "Y0", "Y1", "Z0", "Z1"),
        help="box of the next class: first and last voxel along each axis of IMAGE, counted from "
        "0; all of the object from feet to head, otherwise its extent in the middle axial slice",
    )
    forth.add_argument(
        "--click",
        nargs=5,
        action="append",
        default=[],
        metavar=("CLASS", "fg|bg", "X", "Y", "Z"),
        help="a click inside (fg) or outside (bg) of a class: voxel of IMAGE, counted from 0; "
        "oldest first",
    )
    forth.add_argument(
        "--previous",
        type=Path,
        metavar="SEGS",
        help="npz file with segs: the result of the round before, which the new clicks correct",
    )
    back = commands.add_parser("to-nifti", help="give a result the geometry of its image")
    back.add_argument("segs", type=Path, help="npz file with segs")
    back.add_argument("image", type=Path, help="the image the case was made from")
    back.add_argument("out", type=Path, help="file to write; its ending names the format")
    for command in (forth, back):
        command.add_argument("--series", help="UID of the series, if a folder holds several")
    options = parser.parse_args(arguments)
    try:
        (_to_npz if options.command == "to-npz" else _to_nifti)(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _window(text: str) -> tuple[float, float]:
    try:
        return parse_window(text)
    except ValueError as error:  # of whose text argparse would say nothing
        raise argparse.ArgumentTypeError(str(error)) from None


def _click(words: Sequence[str]) -> tuple[int, str, tuple[int, int, int]]:
    try:
        label, x, y, z = (int(word) for word in (words[0], *words[2:]))
    except ValueError:
        raise ValueError(
            f"received --click {' '.join(words)}; accepted: CLASS fg|bg X Y Z, whole numbers"
        ) from None
    return label, words[1], (x, y, z)


def _to_npz(options: argparse.Namespace) -> None:
    if options.case.suffix != ".npz":
        raise ValueError(f"received the output {options.case}; accepted: a name ending in .npz")
    image = read_volume(options.image, options.series)
    labels = read_volume(options.labels) if options.labels else None
    clicks = [_click(words) for words in options.click]
    previous = _read_segs(options.previous) if options.previous else None
    case = to_case(image, options.window, labels, options.box, clicks, previous)
    if modality_of(options.case.name) == "CT" and options.window is None:
        said = "the networks know CT in one of the windows that --help names"
        print(f"{options.case}: a CT without --window: {said}", file=sys.stderr)
    if not {"boxes", "clicks"} & set(case):
        print(f"{options.case}: nothing to segment in it yet (--box, --click)", file=sys.stderr)
    options.case.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.case) as file:
        np.savez_compressed(file, allow_pickle=True, **case)
    shape = "x".join(map(str, case["imgs"].shape))
    x, y, z = case["spacing"]
    print(f"{options.case}: {shape} (z,y,x), spacing {z:g}x{y:g}x{x:g} mm")
    if labels is not None:
        names = np.unique(_array(labels))
        for label, name in enumerate(names[names != 0], start=1):
            print(f"class {label}: label {name:g}, {np.sum(case['gts'] == label)} voxels")


def _read_segs(path: Path) -> NDArray[np.uint8]:
    with NpzFile(path) as arrays:
        if "segs" not in arrays:
            hint = " (a case, not a result?)" if "imgs" in arrays else ""
            raise ValueError(f"{path}: received keys {list(arrays)}; accepted: segs{hint}")
        label_map = arrays["segs"]
    labels: NDArray[Any] = label_map
    if labels.dtype != np.uint8 and labels.dtype.kind in "biuf":
        with np.errstate(invalid="ignore"):
            labels = labels.astype(np.uint8)
    if labels.dtype != np.uint8 or not np.array_equal(labels, label_map):
        kind = f"segs of {label_map.dtype} and shape {label_map.shape}"
        raise ValueError(f"{path}: received {kind}; accepted: whole numbers 0 to 255")
    return labels


def _to_nifti(options: argparse.Namespace) -> None:
    check_output(options.out, options.image)
    source = read_volume(options.image, options.series)
    labels = _read_segs(options.segs)
    image = to_image(labels, source)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_volume(image, options.out, options.image)
    print(f"{options.out}: {image.GetSize()} (x,y,z), {int(labels.max())} classes")


if __name__ == "__main__":
    run_program(main)
