"""Image files that ITK would read or write otherwise than their users mean, without a word."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from inference.nifti import main
from inference.nifti_files import ENDINGS, read_volume
from inference.output import save_segmentation
from inference.tiff_pages import check_pages
from tests.test_nifti import DIRECTIONS, SIZE, image_of, write_series

NOISE = np.random.default_rng(0).integers(1, 9999, SIZE[::-1], dtype=np.int16)


def write(path: Path, array: np.ndarray[Any, Any], direction: str = "oblique") -> Path:
    sitk.WriteImage(image_of(array, DIRECTIONS[direction]), str(path))
    return path


def to_nifti(tmp_path: Path, image: Path, out: Path) -> int:
    """Status of a result's way back; the result has one voxel of class 2."""
    label_map = np.zeros(sitk.DICOMOrient(read_volume(image), "LPS").GetSize()[::-1], np.uint8)
    label_map[3, 2, 1] = 2
    save_segmentation(tmp_path / "segs.npz", label_map)
    return main(["to-nifti", str(tmp_path / "segs.npz"), str(image), str(out)])


def voxels(image: sitk.Image) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = sitk.GetArrayFromImage(image)
    return array


def test_an_uncompressed_file_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    """ITK takes its voxels, or zeros where it is of another size."""
    path = write(tmp_path / "a.nii.gz", NOISE)
    write(tmp_path / "a.nii", NOISE[:5] * 0 + 1)
    assert np.array_equal(voxels(read_volume(path)), NOISE)
    assert (voxels(read_volume(tmp_path / "a.nii")) == 1).all()


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)[:348]


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("codes", [(1, 2), (1, 4), (0, 2), (2, 0), (0, 0)])
def test_both_transforms_of_a_header_come_back(
    tmp_path: Path, ending: str, codes: tuple[int, int]
) -> None:
    """Programs differ in which one they go by; ITK writes one of them twice."""
    path = write(tmp_path / "a.nii", NOISE)
    content = bytearray(path.read_bytes())
    struct.pack_into("<2h", content, 252, *codes)
    cos, sin = np.cos(0.2), np.sin(0.2)
    srow = (3 * cos, -2 * sin, 0, -5, 3 * sin, 2 * cos, 0, -10, 0, 0, 1, 7)
    struct.pack_into("<12f", content, 280, *srow)
    path.write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    if ending == "nii.gz":
        path = path.rename(tmp_path / "a.nii.gz")
    out = tmp_path / f"out.{ending}"
    assert to_nifti(tmp_path, path, out) == 0
    before, after = header_of(path), header_of(out)
    for part in (slice(76, 108), slice(123, 124), slice(252, 328)):
        assert before[part] == after[part]
    found, source = read_volume(out), read_volume(path)
    for what in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(found, f"Get{what}")() == getattr(source, f"Get{what}")()
    assert int((voxels(found) == 2).sum()) == 1


def test_a_result_does_not_replace_its_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    (tmp_path / "link.nii.gz").symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "link.nii.gz"):
        assert to_nifti(tmp_path, path, out) == 1
        assert "is the image itself" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("image", "out"),
    [("a.hdr", "a.img"), ("a.img", "a.hdr"), ("a.nii.gz", "a.nii"), ("a.nii", "a.nii.gz")],
)
def test_a_result_does_not_share_its_images_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image: str, out: str
) -> None:
    """Of two files as which one image is read."""
    path = write(tmp_path / image, NOISE)
    assert to_nifti(tmp_path, path, tmp_path / out) == 1
    assert f"{image}, and what has one name but for its ending" in capsys.readouterr().err
    assert np.array_equal(voxels(read_volume(path)), NOISE)
    elsewhere = tmp_path / "folder" / out
    assert to_nifti(tmp_path, path, elsewhere) == 0
    assert to_nifti(tmp_path, path, elsewhere) == 0  # once more, over itself
    if image.startswith("a.nii"):
        assert to_nifti(tmp_path, path, tmp_path / "folder" / image) == 1


@pytest.mark.parametrize("ending", ["png", "tif", "vtk", "gipl", "dcm", "npz"])
def test_formats_that_would_lose_the_result_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    assert to_nifti(tmp_path, path, tmp_path / f"out.{ending}") == 1
    assert f"out.{ending}: accepted: a name ending in .nii.gz" in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.nii.gz", "segs.npz"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_formats_that_are_accepted_keep_it(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    out = tmp_path / f"out{ending}"
    assert to_nifti(tmp_path, path, out) == 0
    found, source = read_volume(out), read_volume(path)
    for what in ("Size", "Spacing", "Origin", "Direction"):
        received, expected = (getattr(one, f"Get{what}")() for one in (found, source))
        np.testing.assert_allclose(received, expected, atol=1e-5)
    assert np.argwhere(voxels(sitk.DICOMOrient(found, "LPS")) == 2).tolist() == [[3, 2, 1]]


@pytest.mark.parametrize("name", ["A.NII", "A.NII.GZ", "a.hdr", "a.img", "a.img.gz"])
def test_half_a_file_of_any_name_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower(), NOISE).rename(tmp_path / name)
    assert np.array_equal(voxels(read_volume(path)), NOISE)
    data = path if path.suffix != ".hdr" else path.with_suffix(".img")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{data.name}: received .*; accepted: a whole file"):
        read_volume(path)


def test_half_a_stack_of_pages_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", NOISE)
    assert np.array_equal(voxels(read_volume(path)), NOISE)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.tif: received .* fewer than its pages take"):
        read_volume(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_pages_are_followed_to_the_last(tmp_path: Path, order: str, big: bool) -> None:
    """Of files by the published layout: two pages of one entry each."""
    mark = {"<": b"II", ">": b"MM"}[order]
    if big:
        head, form, entry = struct.pack(order + "3HQ", 43, 8, 0, 16), order + "Q20xQ", 28 + 8
    else:
        head, form, entry = struct.pack(order + "HI", 42, 8), order + "H12xI", 14 + 4
    first = len(mark) + len(head)
    path = tmp_path / "a.tif"

    def write_pages(last: int) -> bytes:
        second = first + entry
        whole = mark + head + struct.pack(form, 1, second) + struct.pack(form, 1, last)
        path.write_bytes(whole)
        return whole

    whole = write_pages(0)
    check_pages(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="accepted: a whole file"):
        check_pages(path)
    if big:
        write_pages(2**64 - 1)
        with pytest.raises(ValueError, match="accepted: a whole file"):
            check_pages(path)
    write_pages(first)
    with pytest.raises(ValueError, match="in a circle"):
        check_pages(path)
    path.write_bytes(b"no TIFF at all")
    check_pages(path)


@pytest.mark.parametrize("name", ["a.vtk", "a.gipl"])
def test_formats_whose_halves_nobody_notices_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, NOISE)
    with pytest.raises(ValueError, match="nothing tells whether such a file is whole; accepted: N"):
        read_volume(path)


def test_the_systems_last_error_is_no_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mha", NOISE)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"File cannot be read: .*a\.mha for reading"):
        read_volume(path)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        ((0.0, 0.32, 1.0), r"shifted sideways by 0\.32 mm each; accepted: an upright stack"),
        ((0.0, 0.0, 0.0), "11 slices, most at one place; accepted: one slice a place"),
    ],
)
def test_a_series_that_is_no_upright_stack_is_refused(
    tmp_path: Path, shift: tuple[float, float, float], message: str
) -> None:
    """ITK would make one of it: with a tilted gantry, or from a series over time."""
    image = image_of(NOISE, np.eye(3))
    write_series(tmp_path / "dicom", image, "1.2.3")
    for z in range(SIZE[2]):
        path = tmp_path / "dicom" / f"1.2.3-{99 - z:02}.dcm"
        part = sitk.ReadImage(str(path))
        place = np.array(image.GetOrigin()) + z * np.array(shift)
        part.SetMetaData("0020|0032", "\\".join(f"{v:.6f}" for v in place))
        part.SetMetaData("0020|000e", "1.2.3")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.Execute(part)
    warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "dicom")
    assert sitk.ProcessObject.GetGlobalWarningDisplay() == warnings


@pytest.mark.parametrize("window", ["400,nan", "inf,0", "400,-inf"])
def test_windows_that_are_no_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], window: str
) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    with pytest.raises(SystemExit):
        main(["to-npz", str(path), str(tmp_path / "CT_a.npz"), f"--window={window}"])
    assert "or W,L with W above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [("CT_a", [], True), ("CT_a", ["--window", "soft"], False), ("MR_a", [], False)],
)
def test_a_ct_without_a_window_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str], told: bool
) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    assert main(["to-npz", str(path), str(tmp_path / f"{name}.npz"), *words]) == 0
    assert ("a CT without --window" in capsys.readouterr().err) == told


def test_a_case_without_prompts_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.nii.gz", NOISE)
    assert main(["to-npz", str(path), str(tmp_path / "CT_a.npz")]) == 0
    assert "nothing to segment in it yet" in capsys.readouterr().err
