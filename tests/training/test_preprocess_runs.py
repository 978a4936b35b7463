"""Runs of preprocessing: refusals are said and logged, stopped ones go on, cases are held out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.conftest import CHECKOUT
from tests.test_nifti import DIRECTIONS, blobs
from tests.training.raw_images import arrays, rows, run, scan, write
from training.preprocess import COLUMNS
from training.raw_case import read_names


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
    other = os.fsencode(images) + b"/caf\xe9.nii.gz"  # a name that is no text
    Path(os.fsdecode(other)).write_bytes((images / "a.nii.gz").read_bytes())
    Path(os.fsdecode(os.fsencode(labels) + b"/caf\xe9.nii.gz")).write_bytes(b"")

    assert run(images, out, "--labels", labels, "--modality", "CT") == 1
    captured = capsys.readouterr()
    assert "1 converted, 0 already there, 15 refused" in captured.out
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
    assert len(lines) == len(expected) + 1
    assert sum("accepted: names in UTF-8" in line for line in lines) == 1
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


def test_a_case_is_never_made_of_another_image(
    folders: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a good nor a damaged one of the same name, from wherever the command is run."""
    images, _, out = folders
    words = [out, "--modality", "CT"]
    monkeypatch.chdir(images.parent)
    assert run(images.name, *words) == 0
    table, case = (out / "preprocess.csv").read_text(encoding="utf-8"), out / "CT_own_a.npz"
    content = case.read_bytes()
    for folder, content_of_a in (("b/images", (images / "a.nii.gz").read_bytes()), ("c", b"no")):
        other = images.parent / folder
        other.mkdir(parents=True)
        (other / "a.nii.gz").write_bytes(content_of_a)
        monkeypatch.chdir(other.parent)  # where "images" is another folder
        assert run(other.name, *words) == 1
        captured = capsys.readouterr()
        assert captured.err == (
            f"refused CT_own_a: {other.name}/a.nii.gz: the case was made of {images}/a.nii.gz; "
            "accepted: another --dataset or name\n"
        )
        assert "0 converted, 0 already there, 1 refused" in captured.out
        assert case.read_bytes() == content
        assert (out / "preprocess.csv").read_text(encoding="utf-8") == table
    other = images.parent / "b" / "images"
    assert run(other, *words, "--dataset", "b") == 0
    images.rename(images.with_name("moved"))  # moved, it is the same image
    assert run(images.with_name("moved"), *words) == 0
    assert sorted(rows(out)) == ["CT_b_a", "CT_own_a"]


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


def test_one_case_is_left_to_train_on(folders: tuple[Path, Path, Path]) -> None:
    images, labels, out = folders
    words = [images, out, "--labels", labels, "--modality", "CT", "--hold-out"]
    assert run(*words, 0.2) == 0
    assert [path.parent.name for path in out.rglob("*.npz")] == ["train"]
    shutil.copy(images / "a.nii.gz", images / "b.nii.gz")
    shutil.copy(labels / "a.nii.gz", labels / "b.nii.gz")
    assert run(*words, 0.9) == 0
    assert sorted(path.parent.name for path in out.rglob("*.npz")) == ["train", "val"]


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
    image, wide = images / "a.nii.gz", tmp_path / "wide.csv"
    wide.write_text(f"label,name\n1,{'x' * 140_000}\n", encoding="utf-8")
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "preprocess.csv").write_text(
        f"{','.join(COLUMNS)}\n{'x' * 140_000}\n", encoding="utf-8"
    )
    for words, message in (
        ([tmp_path / "no", out], "no such folder"),
        ([image, out], "a.nii.gz: cannot be read as a table"),
        ([wide, out], "wide.csv: cannot be read as a table (field larger"),
        ([images, out, "--names", image], "a.nii.gz: cannot be read as names of labels"),
        ([images, out, "--names", wide], "wide.csv: cannot be read as names of labels"),
        ([images, tmp_path / "long"], "preprocess.csv: field larger"),
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
        (["--modality", "CT", "--window=-400,40"], "with W above 0"),
        (["--modality", "CT", "--window", "inf,40"], "received the window 'inf,40'"),
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
