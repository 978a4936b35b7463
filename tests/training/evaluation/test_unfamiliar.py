"""Cases bent so that no network knows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.balls import write_balls
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.unfamiliar import main, unfamiliar


def test_image_and_labels_are_bent_alike_and_by_the_seed() -> None:
    z, y, x = np.indices((40, 44, 48))
    ball = ((z - 20) ** 2 + (y - 22) ** 2 + (x - 24) ** 2 < 14**2).astype(np.uint8)
    image = (150 * ball + 50).astype(np.uint8)
    bent, labels = unfamiliar(image, ball, "a")
    assert bent.shape == labels.shape == ball.shape and bent.dtype == labels.dtype == np.uint8
    both = 2 * np.count_nonzero(labels & ball) / (labels.sum(dtype=int) + ball.sum(dtype=int))
    assert 0.7 < both < 0.98, "moved, but not away"
    # The ball stays the brighter part, and exactly where the labels say: shading is smooth.
    inside, outside = bent[labels == 1].astype(float), bent[labels == 0].astype(float)
    threshold = (np.median(inside) + np.median(outside)) / 2
    assert np.mean((bent > threshold) == labels) > 0.97
    again = unfamiliar(image, ball, "a")
    assert all(np.array_equal(a, b) for a, b in zip(again, (bent, labels), strict=True))
    assert not np.array_equal(unfamiliar(image, ball, "b")[1], labels)


def test_what_is_empty_stays_empty() -> None:
    image = np.zeros((20, 20, 20), np.uint8)
    image[:, :, 15:] = 200
    bent, _ = unfamiliar(image, image // 200, "a")
    assert not bent[:, :, :8].any()


def test_bent_cases_can_be_evaluated_and_faults_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases").mkdir()
    cases = write_balls(tmp_path / "cases")
    (cases / "CT_broken.npz").write_bytes(b"no archive")
    gts = np.ones((9, 9, 9), np.uint8)
    np.savez(cases / "CT_raw.npz", imgs=np.full((9, 9, 9), 900.0), gts=gts, spacing=[1, 1, 1])
    np.savez(cases / "CT_short.npz", imgs=gts[:8], gts=gts, spacing=[1, 1, 1])
    np.savez(cases / "CT_share.npz", imgs=np.full((9, 9, 9), 0.5), gts=gts, spacing=[1, 1, 1])
    many = np.arange(9**3, dtype=np.uint16).reshape(9, 9, 9) % 257
    np.savez(cases / "CT_many.npz", imgs=gts, gts=many, spacing=[1, 1, 1])
    out = tmp_path / "out"
    assert main(["--cases", str(cases), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    faulty = {f"CT_{name}.npz" for name in ("broken", "raw", "short", "share", "many")}
    assert all(name in error for name in faulty) and error.count("\n") == len(faulty)
    assert "900; accepted: 0 to 255" in error and "0.5; accepted: 0 to 255" in error
    assert "CT_many.npz: 256 labels; accepted: at most 255" in error
    names = {path.name for path in cases.glob("*.npz")} - faulty
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        case = load_labelled_case(out / name)
        before = load_labelled_case(cases / name)
        assert "boxes" in case.arrays and case.reference.labels == before.reference.labels
    assert main(["--cases", str(out / "nowhere"), "--out", str(out)]) == 1
    assert "no .npz" in capsys.readouterr().err


def test_a_case_whose_labels_are_all_lost_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases").mkdir()
    gts = np.zeros((20, 24, 28), np.uint8)
    gts[10, 12, 14] = 1
    for number in range(12):  # bending moves the voxel: of some of them nothing is left
        path = tmp_path / "cases" / f"CT_one_{number}.npz"
        np.savez(path, imgs=gts + 90, gts=gts, spacing=[1, 1, 1])
    assert main(["--cases", str(tmp_path / "cases"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told and all("bending loses all labels; accepted" in line for line in told)
    written = list((tmp_path / "out").iterdir())
    assert len(written) == 12 - len(told)
    assert all(load_labelled_case(path).reference.labels == [1] for path in written)


def test_what_cannot_start_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases").mkdir()
    cases = write_balls(tmp_path / "cases")
    before = {path.name: path.read_bytes() for path in cases.glob("*.npz")}
    (tmp_path / "link").symlink_to(cases)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out, message in (
        (cases, "is the folder of the cases"),
        (tmp_path / "link", "is the folder of the cases"),
        (tmp_path / "file", "File exists"),
    ):
        assert main(["--cases", str(cases), "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in cases.glob("*.npz")} == before
    (cases / "manifest.json").write_text('{"CT": 1}', encoding="utf-8")
    assert main(["--cases", str(cases), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
