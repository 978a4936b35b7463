"""Raw images become cases voxel by voxel, whatever their format; refusals are said and logged."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from inference.case import load_case
from inference.nifti import to_image
from inference.object_prompts import stored_box
from tests.conftest import CHECKOUT
from tests.phantoms import challenge_case
from tests.test_nifti import DIRECTIONS, SIZE, SPACING, blobs, write_series
from training.evaluation.labelled_case import load_labelled_case
from training.preprocess import main
from training.raw_case import challenge_boxes, read_names
from training.volumes import load_folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "preprocess.csv").open(encoding="utf-8", newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=True) as file:  # written by the test itself
        return dict(file)


def scan(labels: sitk.Image) -> sitk.Image:
    """An image on the labels' grid whose every voxel differs, in Hounsfield units."""
    values = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE[::-1]) - 300
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(labels)
    return image


def write(path: Path, image: sitk.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Images, labels, out: one case ``a`` that lies oblique."""
    images, labels, out = (tmp_path / name for name in ("images", "labels", "out"))
    seg = blobs(DIRECTIONS["oblique sagittal"])
    write(images / "a.nii.gz", scan(seg))
    write(labels / "a.nii.gz", seg)
    return images, labels, out


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
    assert case.has_boxes


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
    table.write_text("file\np1/ct.nii.gz\n", encoding="utf-8")
    assert run(table, tmp_path / "out", "--modality", "CT") == 2


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


def test_refusals_are_one_line_each_and_the_rest_is_done(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels, out = folders
    seg = blobs(DIRECTIONS["LPS"])
    shifted = sitk.Image(seg)
    shifted.SetOrigin((0.0, 0.0, 0.0))
    coarse = sitk.Image(seg)
    coarse.SetSpacing((3.0, 2.0, 1.5))
    for name, other in {
        "direction": blobs(DIRECTIONS["RAS"]),
        "origin": shifted,
        "spacing": coarse,
        "size": seg[1:, :, :],
        "empty": seg * 0,
        "fraction": sitk.Cast(seg, sitk.sitkFloat32) * 0.5,
    }.items():
        write(images / f"{name}.nii.gz", scan(seg))
        write(labels / f"{name}.nii.gz", other)
    write(images / "flat.nii.gz", seg * 0)
    write(labels / "flat.nii.gz", seg)
    write(images / "alone.nii.gz", scan(seg))
    write(images / "two.nii.gz", scan(seg))
    write(labels / "two.nii.gz", seg)
    write(labels / "two.nrrd", seg)
    write(images / "twice.nii.gz", scan(seg))
    write(images / "twice.mha", scan(seg))
    write(labels / "twice.nii.gz", seg)
    write(labels / "cut.nii.gz", seg)
    (images / "cut.nii.gz").write_bytes((images / "a.nii.gz").read_bytes()[:200])
    write(labels / "text.nii.gz", seg)
    (images / "text.nrrd").write_text("NRRD, says nothing", encoding="utf-8")
    (images / "folder").mkdir()
    write(labels / "folder.nii.gz", seg)
    (images / "README.txt").write_text("no image", encoding="utf-8")
    np.savez(images / "raw.npz", imgs=np.zeros((2, 3, 4)), spacing=[1.0, -1.0, 1.0])
    np.savez(labels / "raw.npz", gts=np.ones((2, 3, 4)))

    assert run(images, out, "--labels", labels, "--modality", "CT") == 1
    captured = capsys.readouterr()
    assert "1 converted, 0 already there, 14 refused" in captured.out
    expected = {
        "direction": "labels/direction.nii.gz: received a label map with direction",
        "origin": "received a label map with origin",
        "spacing": "received a label map with spacing",
        "size": "received a label map with size",
        "empty": "received 0 labels []; accepted: 1 to 255 whole numbers",
        "fraction": "accepted: 1 to 255 whole numbers",
        "flat": "received an image of one value after the CT window 400,40",
        "alone": "labels in labels: none named alone; accepted: one",
        "two": "labels in labels: two.nii.gz, two.nrrd; accepted: one",
        "twice": "2 images (twice.mha, twice.nii.gz)",
        "cut": "cut.nii.gz: received damaged gzip data",
        "text": "text.nrrd: cannot be read as an image",
        "folder": "received 0 DICOM series; accepted: one",
        "raw": "received spacing [ 1. -1. 1.]; accepted: 3 positive numbers",
    }
    lines = [line for line in captured.err.splitlines() if line.startswith("refused ")]
    assert len(lines) == len(expected)
    logged = rows(out)
    assert logged["CT_own_a"]["status"] == "done"
    for name, reason in expected.items():
        row = logged[f"CT_own_{name}"]
        assert row["status"] == "refused" and reason in row["reason"], (name, row["reason"])
        assert sum(f"refused CT_own_{name}: " in line for line in lines) == 1
    assert sorted(p.name for p in out.iterdir()) == [
        "CT_own_a.npz",
        "manifest.json",
        "preprocess.csv",
    ]


def test_a_stopped_run_goes_on(folders: tuple[Path, Path, Path]) -> None:
    """Nothing is done twice, what changed is done again, and half a row is no row."""
    images, labels, out = folders
    for name in "bcd":
        shutil.copy(images / "a.nii.gz", images / f"{name}.nii.gz")
        shutil.copy(labels / "a.nii.gz", labels / f"{name}.nii.gz")
    words = [images, out, "--labels", labels, "--modality", "CT"]
    assert run(*words) == 0
    table = out / "preprocess.csv"
    whole = table.read_text(encoding="utf-8")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.npz")}
    assert run(*words) == 0
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.npz")} == before

    # Killed while it wrote the row of d, and c's file was not there yet.
    lines = whole.splitlines(keepends=True)
    table.write_text("".join([*lines[:3], lines[4][: len(lines[4]) // 2]]), encoding="utf-8")
    (out / "CT_own_c.npz").unlink()
    write(labels / "a.nii.gz", blobs(DIRECTIONS["oblique sagittal"]) == 21)
    assert run(*words) == 0
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.glob("*.npz")}
    changed = {name for name in before if after[name][0] != before[name][0]}
    assert changed == {"CT_own_a.npz", "CT_own_c.npz", "CT_own_d.npz"}
    for name in changed - {"CT_own_a.npz"}:
        assert after[name][1] == before[name][1], "the same input gives the same bytes"
    assert arrays(out / "CT_own_a.npz")["gts"].max() == 1
    assert [row["status"] for row in rows(out).values()] == ["done"] * 4


def test_other_settings_convert_again(folders: tuple[Path, Path, Path]) -> None:
    images, _, out = folders
    assert run(images, out, "--modality", "CT") == 0
    soft = arrays(out / "CT_own_a.npz")["imgs"]
    assert run(images, out, "--modality", "CT", "--window", "bone") == 0
    assert not np.array_equal(soft, arrays(out / "CT_own_a.npz")["imgs"])


def test_processes_give_the_same_files(folders: tuple[Path, Path, Path]) -> None:
    images, labels, out = folders
    for name in "bc":
        shutil.copy(images / "a.nii.gz", images / f"{name}.nii.gz")
        shutil.copy(labels / "a.nii.gz", labels / f"{name}.nii.gz")
    (images / "bad.nii.gz").write_bytes(b"no image")
    words = ["--labels", labels, "--modality", "CT", "--boxes"]
    assert run(images, out, *words) == 1
    assert run(images, out.with_name("again"), *words, "--jobs", 2) == 1
    for path in out.iterdir():
        assert path.read_bytes() == out.with_name("again").joinpath(path.name).read_bytes()


def test_cases_are_held_out_and_stay_where_they_are(folders: tuple[Path, Path, Path]) -> None:
    images, labels, out = folders
    names = "abcdefghij"

    def convert(count: int, share: float) -> tuple[set[str], set[str]]:
        for name in names[1:count]:
            shutil.copy(images / "a.nii.gz", images / f"{name}.nii.gz")
            shutil.copy(labels / "a.nii.gz", labels / f"{name}.nii.gz")
        words = [images, out, "--labels", labels, "--modality", "CT", "--hold-out", share]
        assert run(*words) == 0
        train, val = ({p.stem[-1] for p in (out / part).glob("*.npz")} for part in ("train", "val"))
        for part, there in (("train", train), ("val", val)):
            listed = json.loads((out / part / "manifest.json").read_text(encoding="utf-8"))
            assert {entry["file"][-5] for entry in listed} == there
        return train, val

    train, val = convert(5, 0.2)
    assert (len(train), len(val)) == (4, 1)
    more_train, more_val = convert(10, 0.2)
    assert (len(more_train), len(more_val)) == (8, 2)
    assert train <= more_train and val <= more_val


@pytest.mark.parametrize(
    "text",
    ['{"21": "liver"}', '{"liver": 21}', '{"labels": {"background": 0, "liver": 21}}'],
)
def test_names_in_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(text, encoding="utf-8")
    assert read_names(path)[21] == "liver"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[]"),
        ("a.json", "{"),
        ("a.json", '{"a": [1, 2]}'),
        ("a.json", '{"a": 1, "b": 1}'),
        ("a.csv", "number,name\n1,a\n"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.(json|csv): (cannot be read as names|received 2)"):
        read_names(tmp_path / name)


def test_what_cannot_start_ends_with_2(
    tmp_path: Path, folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, _, out = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "preprocess.csv").write_text("a,b\n", encoding="utf-8")
    for words, message in (
        ([tmp_path / "no", out], "no such folder"),
        ([tmp_path / "empty", out], "no image in it"),
        ([images, tmp_path / "other"], "accepted: a table of training.preprocess"),
        ([images, out, "--labels", tmp_path / "no"], "no such folder"),
        ([images, out, "--names", tmp_path / "no.csv"], "No such file"),
    ):
        assert run(*words, "--modality", "CT") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for words, message in (
        (["--modality", "MR", "--window", "soft"], "--window is for CT"),
        (["--modality", "CT", "--window", "0,40"], "with W above 0"),
        (["--modality", "CT", "--dataset", "a_b"], "letters, digits and hyphens"),
        (["--modality", "CT", "--hold-out", "1"], "a share from 0 up to 1"),
        (["--modality", "CT", "--jobs", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as raised:
            run(images, out, *words)
        assert raised.value.code == 2 and message in capsys.readouterr().err


def test_a_killed_run_leaves_whole_cases_and_goes_on(folders: tuple[Path, Path, Path]) -> None:
    """Killed at an arbitrary moment: every npz can be read, and the rest follows."""
    images, labels, out = folders
    for i in range(40):
        shutil.copy(images / "a.nii.gz", images / f"b{i:02}.nii.gz")
        shutil.copy(labels / "a.nii.gz", labels / f"b{i:02}.nii.gz")
    words = ["--labels", str(labels), "--modality", "CT"]
    command = [sys.executable, "-m", "training.preprocess", str(images), str(out), *words]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(out.glob("*.npz"))) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.wait()
    there = sorted(out.glob("*.npz"))
    assert 3 <= len(there) < 41
    for path in there:
        assert set(arrays(path)) == {"imgs", "gts", "spacing"}
    assert run(images, out, *words) == 0
    assert run(images, out.with_name("whole"), *words) == 0
    expected = sorted(out.with_name("whole").glob("*.npz"))
    assert [p.read_bytes() for p in sorted(out.glob("*.npz"))] == [p.read_bytes() for p in expected]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert rows(out).keys() == rows(out.with_name("whole")).keys()
    assert {row["status"] for row in rows(out).values()} == {"done"}
