"""Medical image files: read as they lie, or refused, and written whole.

Any format that SimpleITK reads and a folder with a DICOM series come in; formats that keep
geometry and labels go out. This and ``nifti`` are the only modules that import SimpleITK.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.nifti_header import check_whole, copy_transforms
from inference.tiff_pages import check_pages

if TYPE_CHECKING:
    import SimpleITK as sitk

#: What is written: formats that keep 8-bit labels, spacing, origin and direction.
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".img", ".img.gz")
#: Of these ITK reads a truncated file without an error, its rest being whatever memory held.
_UNCHECKED = (".vtk", ".gipl", ".gipl.gz")
_UNEVEN = 0.05  # of the distance of slices, also sideways


def read_volume(path: Path | str, series: str | None = None) -> sitk.Image:
    """Read a 3D scalar volume, as it lies in the file.

    Args:
        path: an image file, or a folder that holds a DICOM series.
        series: which series (its UID) of a folder that holds several.

    Raises:
        ValueError: if it cannot be read or is no 3D scalar volume; one line.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    try:
        str(path).encode()  # ITK would end the process
    except UnicodeEncodeError:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ValueError(f"{name}: accepted: names in UTF-8") from None
    if path.name.lower().endswith(_UNCHECKED):
        raise ValueError(
            f"{path}: nothing tells whether such a file is whole; accepted: NIfTI, NRRD, MetaImage "
            "and others that SimpleITK reads"
        )
    check_whole(path)
    if path.name.lower().endswith((".tif", ".tiff")):
        check_pages(path)
    try:
        image = _read_series(path, series) if path.is_dir() else _read_file(path)
    except RuntimeError as error:
        # The last line about the file: some formats add the system's last error, whatever it was.
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((k for k in reversed(lines) if k and not k.startswith("Reason:")), "")
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from None
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    components = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() != 3 or components != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise ValueError(
            f"{path}: received {image.GetPixelIDTypeAsString()} of size {image.GetSize()} with "
            f"{components} components; accepted: one real number a voxel, 3D"
        )
    return image


def check_output(out: Path, image: Path) -> None:
    """Refuse a file that would lose the result, or that the result was made from.

    Some formats are two files of one name, and where ``.nii`` and ``.nii.gz`` of one name lie side
    by side ITK takes the header of one and the voxels of the other.

    Raises:
        ValueError: its ending is none of :data:`ENDINGS`, it is ``image``, or has the name of it
            or of another NIfTI file but for the ending.
        OSError: one of them cannot be looked at.
    """
    stem = _stem(out, ENDINGS)
    if stem is None:
        raise ValueError(f"{out}: accepted: a name ending in {', '.join(ENDINGS)}")
    if out.exists() and out.samefile(image):
        raise ValueError(f"{out} is the image itself, which the result would replace")
    beside = image.is_file() and image.parent.resolve() == out.parent.resolve()
    twin = {".nii": ".nii.gz", ".nii.gz": ".nii"}.get(out.name[len(stem) :].lower())
    clash = None
    if beside and _stem(image, (".hdr.gz", *ENDINGS)) == stem:
        clash = image
    elif twin is not None and out.with_name(stem + twin).exists():
        clash = out.with_name(stem + twin)
    if clash is not None:
        raise ValueError(
            f"{out}: beside {clash}, and what has one name but for its ending is read as one "
            "image; accepted: another name"
        )


def _stem(path: Path, endings: Sequence[str]) -> str | None:
    """A file's name without the one of these endings that it has; None without any."""
    name = path.name.lower()
    return next((path.name[: -len(end)] for end in endings if name.endswith(end)), None)


def write_volume(image: sitk.Image, out: Path, source: Path) -> None:
    """Write an image file, or the two of a format that has a header of its own, whole or not.

    Args:
        image: 3D scalar.
        out: its ending names the format.
        source: file or folder whose geometry the image has; from one NIfTI file to another both
            of its transforms are kept, though ITK reads one of them.
    """
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as folder:
        sitk.WriteImage(image, str(Path(folder, out.name)), useCompression=True)
        copy_transforms(source, Path(folder, out.name))
        written = sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name)
        for path in written:  # a header last: it names the other one
            path.replace(out.parent / path.name)


def _read_file(path: Path) -> sitk.Image:
    import SimpleITK as sitk

    name = path.name
    if not name.lower().endswith(".nii.gz") or not path.with_name(name[:-3]).exists():
        return sitk.ReadImage(str(path))
    # Of two files of one name ITK takes the header of this one and the voxels of the other.
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, name)
        alone.symlink_to(path.resolve())
        return sitk.ReadImage(str(alone))


def _read_series(folder: Path, series: str | None) -> sitk.Image:
    """A DICOM series; refused where its slices are no upright stack, which ITK would make of it."""
    import SimpleITK as sitk

    with _without_warnings():  # what they are about is refused below
        found = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if series is None and len(found) == 1:
            series = found[0]
        if series not in found:
            received = f"series {series}" if series else f"{len(found)} DICOM series"
            choice = f" (choose one of {', '.join(found)})" if found else ""
            raise ValueError(f"{folder}: received {received}; accepted: one DICOM series{choice}")
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
        positions = []
        reader = sitk.ImageFileReader()
        for name in files:
            reader.SetFileName(name)
            reader.ReadImageInformation()
            positions.append(reader.GetOrigin()[:3])
        normal = np.array(reader.GetDirection()).reshape(3, -1)[:, 2]
        _check_stack(folder, files, np.array(positions), normal)
        return sitk.ReadImage(files)


def _check_stack(
    folder: Path, files: Sequence[str], positions: np.ndarray, normal: np.ndarray
) -> None:
    """Refuse slices at one place, apart by unequal steps, or shifted sideways (N, 3)."""
    moves = np.diff(positions, axis=0)
    steps = np.linalg.norm(moves, axis=1)
    if not steps.size:
        return
    typical = float(np.median(steps))
    if not typical:
        raise ValueError(
            f"{folder}: received {len(files)} slices, most at one place; accepted: one slice a "
            "place (is it a series over time?)"
        )
    if np.ptp(steps) > _UNEVEN * typical:
        widest = int(steps.argmax())
        raise ValueError(
            f"{folder}: received slices {typical:g} mm apart, but {steps[widest]:g} mm "
            f"between {Path(files[widest]).name} and {Path(files[widest + 1]).name}; accepted: "
            "evenly spaced slices (are some missing?)"
        )
    sideways = float(np.linalg.norm(moves - np.outer(moves @ normal, normal), axis=1).max())
    if sideways > _UNEVEN * typical:
        raise ValueError(
            f"{folder}: received slices {typical:.3g} mm apart that are shifted sideways by "
            f"{sideways:.3g} mm each; accepted: an upright stack (with a tilted gantry, resample "
            "it first)"
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """ITK's own, which go to stderr past Python."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
