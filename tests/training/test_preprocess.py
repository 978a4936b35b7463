"""Raw images become cases voxel by voxel, whatever their format and layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from inference.case import load_case
from inference.nifti import to_image
from inference.object_prompts import stored_box
from tests.phantoms import challenge_case
from tests.test_nifti import DIRECTIONS, SIZE, SPACING, blobs, write_series
from tests.training.raw_images import arrays, rows, run, scan, write
from training.evaluation.labelled_case import load_labelled_case
from training.raw_case import challenge_boxes
from training.volumes import load_folder


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "nrrd", "mha", "mhd"])
def test_every_format_and_orientation_keeps_its_voxels(tmp_path: Path, ending: str) -> None:
    images, labels, out = (tmp_path / name for name in ("images", "labels", "out"))
    names = ["LPS", "RAS", "left-handed", "sagittal", "oblique", "oblique flipped"]
    segs = {name.replace(" ", "-"): blobs(DIRECTIONS[name]) for name in names}
    for name, seg in segs.items():
        write(images / f"{name}.{ending}", scan(seg))
        write(labels / f"{name}.{ending}", seg)
    window = "1000,200"
    words = [images, out, "--labels", labels, "--modality", "CT", "--window", window, "--boxes"]
    assert run(*words) == 0
    for name, seg in segs.items():
        case = arrays(out / f"CT_own_{name}.npz")
        assert set(case) == {"imgs", "spacing", "gts", "boxes"}
        # Turned back, labels and intensities lie where they lay.
        source = sitk.ReadImage(str(images / f"{name}.{ending}"))
        numbers = np.searchsorted([0, 21, 23], sitk.GetArrayFromImage(seg))
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(to_image(case["gts"], source)), numbers
        )
        values = sitk.GetArrayFromImage(source)
        expected = np.rint((np.clip(values, -300, 700) + 300.0) * (255 / 1000))
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(to_image(case["imgs"], source)), expected
        )
        loaded = load_case(out / f"CT_own_{name}.npz")
        assert loaded.notes == ()
        by_size = dict(zip(SIZE, SPACING, strict=True))
        assert loaded.spacing_mm == pytest.approx([by_size[n] for n in loaded.image.shape])
        np.testing.assert_allclose(case["spacing"], loaded.spacing_mm[::-1])
    logged = rows(out)
    assert logged["CT_own_RAS"]["orientation"] == "RAS"
    assert logged["CT_own_LPS"]["orientation"] == "LPS"
    direction = json.loads(logged["CT_own_oblique-flipped"]["direction"])
    np.testing.assert_allclose(direction, DIRECTIONS["oblique flipped"].ravel(), atol=1e-5)


def test_a_dicom_series_is_a_case(tmp_path: Path) -> None:
    seg = blobs(DIRECTIONS["oblique"])
    (tmp_path / "dicom").mkdir()
    write_series(tmp_path / "dicom" / "patient 1", scan(seg), "1.2.3.4")
    write(tmp_path / "labels" / "patient 1.nrrd", seg)
    words = [tmp_path / "dicom", tmp_path / "out", "--modality", "CT"]
    assert run(*words, "--labels", tmp_path / "labels") == 0
    case = arrays(tmp_path / "out" / "CT_own_patient-1.npz")
    assert np.bincount(case["gts"].ravel())[1:].tolist() == [3 * 5 * 2, 5 * 2 * 3]


def test_default_windows(folders: tuple[Path, Path, Path]) -> None:
    """CT in the soft tissue window, others from percentile to percentile."""
    images, _, out = folders
    assert run(images, out, "--modality", "CT") == 0
    assert run(images, out, "--modality", "MR") == 0
    values = np.arange(np.prod(SIZE)) - 300.0
    soft = np.rint((np.clip(values, -160, 240) + 160) * (255 / 400))
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = np.rint((np.clip(values, low, high) - low) * (255 / (high - low)))
    for modality, expected in (("CT", soft), ("MR", clipped)):
        case = arrays(out / f"{modality}_own_a.npz")
        assert set(case) == {"imgs", "spacing"}, "no labels, no gts"
        np.testing.assert_array_equal(np.sort(case["imgs"].ravel()), expected)


def test_training_and_evaluation_read_what_was_made(folders: tuple[Path, Path, Path]) -> None:
    images, labels, out = folders
    names = labels.parent / "names.csv"
    names.write_text("label,name\n21,liver\n22,spleen\n", encoding="utf-8")
    words = [images, out, "--labels", labels, "--modality", "MR", "--dataset", "Site-1"]
    assert run(*words, "--boxes", "--names", names) == 0
    (volume,) = load_folder(out)
    assert (volume.name, volume.modality, volume.source) == ("MR_Site-1_a", "MR", "MR_Site-1")
    assert [found.label for found in volume.objects] == [1, 2]
    case = load_labelled_case(out / "MR_Site-1_a.npz")
    assert case.structures == ("liver", "label 23")
    assert "boxes" in case.arrays


def test_one_file_a_structure(tmp_path: Path) -> None:
    """Named by their files; a lesion inside an organ keeps its voxels; empty masks are no label."""
    seg = blobs(DIRECTIONS["RAS"])
    write(tmp_path / "images" / "a_0000.nii.gz", scan(seg))
    organ = np.zeros(SIZE[::-1], np.uint8)
    organ[1:8, 1:8, 1:6] = 1
    lesion = np.zeros_like(organ)
    lesion[3:5, 3:6, 2:4] = 255
    for name, mask in (("organ", organ), ("lesion", lesion), ("absent", np.zeros_like(organ))):
        image = sitk.GetImageFromArray(mask)
        image.CopyInformation(seg)
        write(tmp_path / "labels" / "a" / f"{name}.nii.gz", image)
    words = [tmp_path / "images", tmp_path / "out", "--modality", "CT"]
    assert run(*words, "--labels", tmp_path / "labels") == 0
    gts = arrays(tmp_path / "out" / "CT_own_a_0000.npz")["gts"]
    assert np.bincount(gts.ravel())[1:].tolist() == [12, 7 * 7 * 5 - 12]
    row = rows(tmp_path / "out")["CT_own_a_0000"]
    assert json.loads(row["structures"]) == {"1": "lesion", "2": "organ"}
    assert row["notes"] == "12 voxels lie in two structures and were given to the smaller"

    image = sitk.GetImageFromArray(lesion // 255 + organ)
    image.CopyInformation(seg)
    write(tmp_path / "labels" / "a" / "lesion.nii.gz", image)
    assert run(*words, "--labels", tmp_path / "labels") == 1
    assert "accepted: one structure a file" in rows(tmp_path / "out")["CT_own_a_0000"]["reason"]
    assert not (tmp_path / "out" / "CT_own_a_0000.npz").exists(), "it is out of date"


def test_a_table_says_which_belong_together(tmp_path: Path) -> None:
    seg = blobs(DIRECTIONS["LPS"])
    for name in ("p1", "p2"):
        write(tmp_path / name / "ct.nii.gz", scan(seg))
        write(tmp_path / name / "segmentations" / "thing.nii.gz", seg == 21)
    table = tmp_path / "cases.csv"
    table.write_text(
        "image,labels,case\np1/ct.nii.gz,p1/segmentations,p1\np2/ct.nii.gz,,p2\n", encoding="utf-8"
    )
    assert run(table, tmp_path / "out", "--modality", "CT") == 0
    assert arrays(tmp_path / "out" / "CT_own_p1.npz")["gts"].sum() == 30
    assert "gts" not in arrays(tmp_path / "out" / "CT_own_p2.npz")
    for text in ("file\np1/ct.nii.gz\n", "case,image\np1,p1/ct.nii.gz\np2\n"):
        table.write_text(text, encoding="utf-8")
        assert run(table, tmp_path / "out", "--modality", "CT") == 2


@pytest.mark.parametrize(("image", "label"), [(2e-4, -2e-4), (-2e-4, 2e-4), (0, 2e-4), (0, 0)])
def test_labels_are_turned_as_their_image_is(tmp_path: Path, image: float, label: float) -> None:
    """Near 45 degrees rounding decides which axis is which."""
    for name, ending, off in (("images", "nii.gz", image), ("labels", "nrrd", label)):
        c, s = np.cos(np.pi / 4 + off), np.sin(np.pi / 4 + off)
        seg = blobs(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]))
        write(tmp_path / name / f"a.{ending}", seg)
    labels = ["--labels", tmp_path / "labels"]
    assert run(tmp_path / "images", tmp_path / "out", *labels, "--modality", "MR") == 0
    case = arrays(tmp_path / "out" / "MR_own_a.npz")
    assert case["gts"].any() and np.array_equal(case["imgs"] > 0, case["gts"] > 0)


def test_labels_and_cases_may_lie_among_the_images(tmp_path: Path) -> None:
    seg = blobs(DIRECTIONS["LPS"])
    write(tmp_path / "a.mha", scan(seg))
    write(tmp_path / "labels" / "a.mha", seg)
    words = [tmp_path, tmp_path / "out", "--labels", tmp_path / "labels", "--modality", "CT"]
    assert run(*words) == run(*words) == 0
    assert list(rows(tmp_path / "out")) == ["CT_own_a"]


def test_a_raw_npz_is_a_case(tmp_path: Path) -> None:
    source = challenge_case((6, 12, 10), 2, "MR", boxes=False)
    gts = np.array([0, 7, 300], np.int16)[source["gts"]]
    raw = source["imgs"].astype(np.float32) * 3.5 - 100
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "a.npz", imgs=raw, gts=gts, spacing=[1.0, 2.0, 3.0])
    assert run(tmp_path / "images", tmp_path / "out", "--modality", "MR", "--boxes") == 0
    case = arrays(tmp_path / "out" / "MR_own_a.npz")
    np.testing.assert_array_equal(case["gts"], source["gts"])
    assert (case["imgs"].dtype, case["imgs"].min(), case["imgs"].max()) == (np.uint8, 0, 255)
    assert case["spacing"].tolist() == [1.0, 2.0, 3.0]
    assert rows(tmp_path / "out")["MR_own_a"]["structures"] == '{"1": "label 7", "2": "label 300"}'
    np.savez(tmp_path / "images" / "b.npz", imgs=raw > 200, gts=gts, spacing=[1.0, 2.0, 3.0])
    assert run(tmp_path / "images", tmp_path / "out", "--modality", "MR") == 0
    case = arrays(tmp_path / "out" / "MR_own_b.npz")
    np.testing.assert_array_equal(case["imgs"], 255 * (raw > 200))


def test_boxes_are_the_challenges(tmp_path: Path) -> None:
    """Exact in z; one shift of 0..5 an object, times size / 256, in y and x; cut at the border."""
    labels = np.zeros((5, 256, 512), np.uint8)
    labels[1:4, 100:120, 200:240] = 1
    labels[0:2, 0:9, 500:512] = 2
    shifts = set()
    for seed in range(40):
        first, second = challenge_boxes(labels, f"case {seed}")
        exact = [stored_box(labels == label) for label in (1, 2)]
        shift = exact[0]["z_mid_y_min"] - first["z_mid_y_min"]
        shifts.add(shift)
        padding = (shift, 2 * shift)
        assert first == stored_box(labels == 1, padding)
        assert (second["z_min"], second["z_max"]) == (0, 1)
        assert (second["z_mid_y_min"], second["z_mid_x_max"]) == (0, 511)
    assert shifts == {0, 1, 2, 3, 4, 5}
    assert challenge_boxes(labels, "a").tolist() == challenge_boxes(labels, "a").tolist()
