"""Images to cases and back: intensities, axes, prompts, and the exact geometry of the source."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from inference.case import Click, load_case, parse_case
from inference.nifti import (
    main,
    to_case,
    to_image,
)
from inference.nifti_files import read_volume
from inference.nifti_header import check_whole
from inference.object_prompts import stored_box
from inference.output import save_segmentation
from tests.phantoms import challenge_case

SIZE = (7, 9, 11)  # x, y, z
SPACING = (3.0, 2.0, 1.0)


def rotation(seed: int, most: float = np.pi) -> np.ndarray[Any, Any]:
    """A random rotation by at most an angle (Rodrigues' formula)."""
    rng = np.random.default_rng(seed)
    x, y, z = (axis := rng.normal(size=3)) / np.linalg.norm(axis)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = rng.uniform(0, most)
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * (K @ K)


DIRECTIONS: dict[str, np.ndarray[Any, Any]] = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "flipped": np.diag([-1.0, -1.0, -1.0]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": rotation(0, 0.5),
    "oblique sagittal": rotation(1, 0.5) @ np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "oblique flipped": rotation(2, 0.5) @ np.diag([-1.0, 1.0, -1.0]),
    **{f"any rotation {seed}": rotation(seed) for seed in range(10, 20)},
}


def image_of(array: np.ndarray[Any, Any], direction: np.ndarray[Any, Any]) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin((-120.5, 33.25, 1000.125))
    image.SetDirection(direction.ravel().tolist())
    return image


def blobs(direction: np.ndarray[Any, Any]) -> sitk.Image:
    """A label map with labels 21 and 23: boxes of no symmetry."""
    labels = np.zeros(SIZE[::-1], np.uint8)
    labels[1:4, 2:7, 1:3] = 21
    labels[5:10, 1:3, 3:6] = 23
    return image_of(labels, direction)


def positions(image: sitk.Image) -> np.ndarray[Any, Any]:
    """Physical coordinates (x, y, z) of every voxel, as (z, y, x, 3); from the header's meaning."""
    z, y, x = np.indices(image.GetSize()[::-1])
    index = np.stack([x, y, z], -1) * np.array(image.GetSpacing())
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return index @ direction.T + np.array(image.GetOrigin())


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_label_map_comes_back_exactly(name: str) -> None:
    source = blobs(DIRECTIONS[name])
    case = to_case(source, labels=source)
    back = to_image(case["gts"], source)
    for what in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(back, f"Get{what}")() == getattr(source, f"Get{what}")()
    expected = np.searchsorted([0, 21, 23], sitk.GetArrayFromImage(source))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), expected)


@pytest.mark.parametrize("name", [name for name in DIRECTIONS if "any" not in name])
def test_a_case_lies_left_back_head(name: str) -> None:
    """Along each axis of the case the physical coordinate it stands for grows."""
    plain = image_of(np.zeros(SIZE[::-1], np.float32), DIRECTIONS[name])
    where = positions(plain)
    for axis, coordinate in ((0, 2), (1, 1), (2, 0)):
        source = image_of(where[..., coordinate].astype(np.float32), DIRECTIONS[name])
        low, high = where[..., coordinate].min(), where[..., coordinate].max()
        image = to_case(source, (high - low, (high + low) / 2))["imgs"].astype(int)
        assert (np.diff(image, axis=axis) > 0).all()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_spacing_goes_with_its_axis(name: str) -> None:
    source = blobs(DIRECTIONS[name])
    case = parse_case(to_case(source, labels=source), "a")
    by_size = dict(zip(SIZE, SPACING, strict=True))
    assert case.spacing_mm == tuple(by_size[n] for n in case.image.shape)
    assert case.notes == ()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_boxes_and_clicks_are_turned_with_the_image(name: str) -> None:
    source = blobs(DIRECTIONS[name])
    truth = to_case(source, labels=source)
    case = to_case(
        source,
        boxes=[(1, 2, 2, 6, 1, 3), (3, 5, 1, 2, 5, 9)],
        clicks=[(2, "fg", (3, 1, 5)), (2, "bg", (1, 2, 1)), (1, "fg", (2, 6, 3))],
    )
    assert list(case["boxes"]) == list(truth["boxes"])
    assert list(truth["boxes"]) == [stored_box(truth["gts"] == label) for label in (1, 2)]
    objects = parse_case(case, "a").objects
    at = [[truth["gts"][click.position] for click in prompts.clicks] for prompts in objects]
    assert at == [[1], [2, 1]]
    assert [click.positive for click in objects[1].clicks] == [True, False]


def test_clicks_alone_make_as_many_classes_as_they_name() -> None:
    case = parse_case(to_case(blobs(np.eye(3)), clicks=[(3, "fg", (6, 8, 10))]), "a")
    assert [prompts.clicks for prompts in case.objects] == [(), (), (Click((10, 8, 6), True),)]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha", "mhd"])
def test_command_line_there_and_back(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = blobs(DIRECTIONS["oblique sagittal"])
    image, seg = tmp_path / f"image.{ending}", tmp_path / f"seg.{ending}"
    sitk.WriteImage(sitk.Cast(source, sitk.sitkInt16) * 10 - 300, str(image))
    sitk.WriteImage(source, str(seg))
    case_path = tmp_path / "my" / "cases" / "CT_1.npz"  # folders that are not there are made
    words = ["to-npz", image, case_path, "--window", "400,-100", "--labels", seg]
    assert main([str(word) for word in words]) == 0
    assert "class 2: label 23, 30 voxels" in capsys.readouterr().out

    case = load_case(case_path)
    assert case.notes == ()
    assert len(case.objects) == 2
    gts = np.load(case_path)["gts"]
    assert set(np.unique(case.image[gts == 0])) == {0}
    assert set(np.unique(case.image[gts == 2])) == {round((-70 + 300) * 255 / 400)}

    save_segmentation(tmp_path / "segs.npz", gts)
    out = tmp_path / "my" / "results" / f"out.{ending}"
    assert main(["to-nifti", str(tmp_path / "segs.npz"), str(image), str(out)]) == 0
    back, original = sitk.ReadImage(str(out)), sitk.ReadImage(str(image))
    for what in ("Size", "Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(
            getattr(back, f"Get{what}")(), getattr(original, f"Get{what}")(), atol=1e-5
        )
    expected = np.searchsorted([0, 21, 23], sitk.GetArrayFromImage(source))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), expected)


def test_prompts_on_the_command_line(tmp_path: Path) -> None:
    sitk.WriteImage(blobs(np.eye(3)), str(tmp_path / "a.nii.gz"))
    words = f"to-npz {tmp_path}/a.nii.gz {tmp_path}/MR_a.npz --box 1 2 2 6 1 3 --box 3 5 1 2 5 9"
    assert main([*words.split(), "--click", "2", "bg", "0", "8", "10"]) == 0
    first, second = load_case(tmp_path / "MR_a.npz").objects
    assert first.box is not None and second.box is not None
    assert (first.box.start, first.box.stop) == ((1, 2, 1), (4, 7, 3))
    assert second.clicks == (Click((10, 8, 0), False),)


def write_series(folder: Path, image: sitk.Image, uid: str) -> None:
    """A DICOM series, one file a slice."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    tags = {
        "0008|0060": "CT",
        "0020|000d": "1.2.3",
        "0020|000e": uid,
        "0020|0037": "\\".join(f"{v:.9f}" for v in direction[:, :2].T.ravel()),
    }
    for z in range(image.GetSize()[2]):
        part = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags["0020|0032"] = "\\".join(f"{v:.6f}" for v in position)
        tags["0020|0013"] = str(z)
        tags["0008|0018"] = f"{uid}.{z + 1}"
        for key, value in tags.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{99 - z:02}.dcm"))
        writer.Execute(part)


def test_a_dicom_series_is_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labels = blobs(DIRECTIONS["oblique"])
    image = sitk.Cast(labels, sitk.sitkInt16) * 10
    image.CopyInformation(labels)
    write_series(tmp_path / "dicom", image, "1.2.3.4")
    found = read_volume(tmp_path / "dicom")
    assert found.GetSize() == image.GetSize()
    np.testing.assert_allclose(found.GetSpacing(), SPACING, atol=1e-4)
    np.testing.assert_allclose(found.GetDirection(), image.GetDirection(), atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(image))
    case = to_case(found, labels=labels)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(to_image(case["gts"], found)) > 0, sitk.GetArrayFromImage(labels) > 0
    )

    write_series(tmp_path / "dicom", image, "1.2.3.5")
    with pytest.raises(ValueError, match=r"received 2 DICOM series; .*choose one of 1\.2\.3\."):
        read_volume(tmp_path / "dicom")
    assert read_volume(tmp_path / "dicom", "1.2.3.5").GetSize() == image.GetSize()


def test_a_series_with_a_gap_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ITK would spread the slices that are left over the whole range."""
    image = sitk.Cast(blobs(DIRECTIONS["oblique"]), sitk.sitkInt16)
    write_series(tmp_path / "dicom", image, "1.2.3.4")
    (tmp_path / "dicom" / "1.2.3.4-95.dcm").unlink()
    message = r"slices 1 mm apart, but 2 mm between 1\.2\.3\.4-96\.dcm and 1\.2\.3\.4-94\.dcm"
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "dicom")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha"])
def test_a_file_cut_short_is_refused(tmp_path: Path, ending: str) -> None:
    """ITK would fill a NIfTI file up with zeros."""
    noise = np.random.default_rng(0).integers(0, 9999, SIZE[::-1], dtype=np.int16)
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(image_of(noise, np.eye(3)), str(path), useCompression=ending != "nii")
    content = path.read_bytes()
    assert read_volume(path).GetSize() == SIZE
    for share in (0.05, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match=rf"a\.{ending}: (received|cannot be read)") as error:
            read_volume(path)
        assert "\n" not in str(error.value)


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 9999, SIZE[::-1], dtype=np.int16)
    path = tmp_path / "a.nii.gz"
    sitk.WriteImage(image_of(noise, np.eye(3)), str(path))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(ValueError, match="received damaged gzip data"):
        read_volume(path)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
def test_headers_promise_bytes(tmp_path: Path, order: str, version: int) -> None:
    """A header of either version and byte order, by the field's published offsets."""
    header = bytearray(348 if version == 1 else 540)
    struct.pack_into(f"{order}i", header, 0, len(header))
    if version == 1:
        struct.pack_into(f"{order}8h", header, 40, 3, 7, 5, 4, 1, 1, 1, 1)
        struct.pack_into(f"{order}h", header, 72, 16)
        struct.pack_into(f"{order}f", header, 108, 352)
    else:
        struct.pack_into(f"{order}8q", header, 16, 3, 7, 5, 4, 1, 1, 1, 1)
        struct.pack_into(f"{order}h", header, 14, 16)
        struct.pack_into(f"{order}q", header, 168, 544)
    whole = bytes(header) + bytes(4 + 7 * 5 * 4 * 2)
    path = tmp_path / "a.nii"
    path.write_bytes(whole)
    check_whole(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{len(whole) - 1} bytes .* promises {len(whole)};"):
        check_whole(path)


def test_a_fourth_axis_of_one_is_no_matter(tmp_path: Path) -> None:
    volume = blobs(np.eye(3))
    sitk.WriteImage(sitk.JoinSeries([volume]), str(tmp_path / "a.nii.gz"))
    assert read_volume(tmp_path / "a.nii.gz").GetSize() == SIZE


VOLUME = image_of(np.zeros(SIZE[::-1], np.int16), np.eye(3))
FLOAT = sitk.Cast(VOLUME, sitk.sitkFloat32)
BAD_IMAGES: dict[str, tuple[sitk.Image, str]] = {
    "2D": (VOLUME[:, :, 0], r"received 16-bit signed integer of size \(7, 9\)"),
    "4D": (sitk.JoinSeries([VOLUME, VOLUME]), r"of size \(7, 9, 11, 2\)"),
    "vectors": (sitk.Compose(VOLUME, VOLUME, VOLUME), "with 3 components; accepted: one real"),
    "complex": (sitk.RealAndImaginaryToComplex(FLOAT, FLOAT), "complex of 32-bit float"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_volume_is_refused(tmp_path: Path, name: str) -> None:
    image, message = BAD_IMAGES[name]
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "a.nii")


def test_errors_are_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, seg, other = (str(tmp_path / name) for name in ("a.nii", "seg.nii", "other.nii"))
    sitk.WriteImage(VOLUME, image)
    sitk.WriteImage(blobs(np.eye(3)), seg)
    sitk.WriteImage(blobs(DIRECTIONS["RAS"]), other)
    (tmp_path / "bad.nii").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    save_segmentation(tmp_path / "segs.npz", challenge_case()["gts"])
    np.savez(tmp_path / "b.npz", gts=np.zeros((2, 3, 4)))
    np.savez(tmp_path / "i.npz", segs=np.full((2, 3, 4), 300, np.int16))
    np.savez(tmp_path / "p.npz", segs=np.full(SIZE[::-1], 2, np.uint8))
    np.savez(tmp_path / "f.npz", segs=np.full((2, 3, 4), 0.7))
    np.savez(tmp_path / "o.npz", segs=np.array([{}], object))
    out = str(tmp_path / "CT.npz")
    commands = {
        f"to-npz {tmp_path}/no.nii {out}": "no such file or folder",
        f"to-npz {tmp_path}/bad.nii {out}": "cannot be read as an image (",
        f"to-npz {tmp_path}/empty {out}": "received 0 DICOM series; accepted: one",
        f"to-npz {image} {tmp_path}/CT.nii": "accepted: a name ending in .npz",
        f"to-npz {image} {out} --labels {other}": "received a label map with direction",
        f"to-npz {image} {out} --labels {image}": "received 0 labels []; accepted: 1 to 255",
        f"to-npz {image} {out} --box 0 7 0 1 0 1": "received voxel (7, 1, 1)",
        f"to-npz {image} {out} --click 1 up 0 0 0": "received a click 'up' on class 1",
        f"to-npz {image} {out} --click 1 fg 0 0 x": "received --click 1 fg 0 0 x; accepted",
        f"to-npz {image} {out} --labels {seg} --click 3 fg 0 0 0": "classes 1 to 2",
        f"to-nifti {tmp_path}/segs.npz {image} {seg}": "received a label map of shape",
        f"to-nifti {tmp_path}/b.npz {image} {seg}": "received keys ['gts']; accepted: segs",
        f"to-npz {image} {out} --previous {tmp_path}/segs.npz": "received a label map of shape",
        f"to-npz {image} {out} --previous {tmp_path}/b.npz": "b.npz: received keys ['gts']",
        f"to-npz {image} {out} --previous {tmp_path}/p.npz --box 0 1 0 1 0 1": "1 boxes and a p",
        f"to-npz {image} {out} --click 256 fg 0 0 0": "0 boxes, clicks on class 256; accepted",
        f"to-nifti {tmp_path}/i.npz {image} {seg}": "segs of int16 and shape (2, 3, 4); accepted",
        f"to-nifti {tmp_path}/f.npz {image} {seg}": "segs of float64 and shape (2, 3, 4); accepted",
        f"to-nifti {tmp_path}/o.npz {image} {seg}": "segs of object and shape (1,); accepted",
        f"to-nifti {image} {image} {seg}": "a.nii: received a file that is no zip archive",
    }
    for command, message in commands.items():
        assert main(command.split()) == 1, command
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (command, error)
    assert not Path(out).exists()


def test_a_file_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.nii", "out.nii.gz"):
        sitk.WriteImage(blobs(np.eye(3)), str(tmp_path / name))
    case, image, out = (str(tmp_path / name) for name in ("CT.npz", "a.nii", "out.nii.gz"))
    assert main(["to-npz", image, case]) == 0
    segs = np.zeros(SIZE[::-1], np.int64)
    np.savez(tmp_path / "segs.npz", segs=segs)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    def full_too(_: sitk.Image, path: str, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez_compressed", full)
        patched.setattr(sitk, "WriteImage", full_too)
        assert main(["to-npz", image, case]) == 1
        assert main(["to-nifti", str(tmp_path / "segs.npz"), image, out]) == 1
    assert capsys.readouterr().err.count("No space left") == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["to-nifti", str(tmp_path / "segs.npz"), image, out]) == 0
    assert not sitk.GetArrayFromImage(sitk.ReadImage(out)).any()


@pytest.mark.parametrize("window", ["liver", "400,40,3", "-400,40", "inf,40"])
def test_a_window_of_no_meaning_is_refused(window: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["to-npz", "a.nii", "b.npz", f"--window={window}"])
    refused = f"--window: received the window '{window}'; accepted: soft, lung, brain, bone or W,L"
    assert refused in " ".join(capsys.readouterr().err.split())


def test_simpleitk_is_loaded_by_use_only() -> None:
    code = "import sys, inference.nifti; sys.exit('SimpleITK' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
