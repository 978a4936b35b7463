"""One archive of cases: the same folders again, within a size, or nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from inference.npz import NpzFile
from training.pack import main, pack


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two cases of noise, with a box each, and a label map."""
    rng = np.random.default_rng(0)
    for name in ("train", "maps"):
        (tmp_path / name).mkdir()
    labels = np.zeros((32, 48, 64), np.uint8)
    labels[4:9, 5:11, 6:13] = 1
    boxes = np.array([{"z_min": 4, "z_max": 8}], dtype=object)
    for k in range(2):
        image = rng.integers(0, 256, labels.shape).astype(np.uint8)
        np.savez_compressed(
            tmp_path / "train" / f"CT_a_{k}.npz",
            imgs=image,
            gts=labels,
            spacing=[1.0, 1.0, 2.0],
            boxes=boxes,
        )
    np.savez_compressed(tmp_path / "maps" / "LM_b.npz", gts=labels, spacing=[1.0, 1.0, 1.0])
    return [tmp_path / "train", tmp_path / "maps"]


def _unpacked(archive: Path) -> dict[str, dict[str, np.ndarray]]:
    subprocess.run(["tar", "xf", archive.name], cwd=archive.parent, check=True)
    found = {}
    for path in sorted(archive.parent.glob("*/*.npz")):
        with NpzFile(path) as file:
            found[f"{path.parent.name}/{path.name}"] = dict(file)
    return found


def test_what_fits_comes_back_as_it_was(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "there" / "data.tar.xz"
    out.parent.mkdir()
    assert pack(folders, out, 1 << 20) == 8
    found = _unpacked(out)
    assert sorted(found) == ["maps/LM_b.npz", "train/CT_a_0.npz", "train/CT_a_1.npz"]
    for name, arrays in found.items():
        with NpzFile(tmp_path / name) as file:
            assert sorted(arrays) == sorted(file)
            for key, value in arrays.items():
                assert np.array_equal(value, file[key]), (name, key)


def test_what_does_not_fit_loses_the_lowest_bits_of_intensities(
    folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "there" / "data.tar.xz"
    out.parent.mkdir()
    whole = 2 * 32 * 48 * 64
    assert pack(folders, out, int(whole * 0.82)) == 6
    assert out.stat().st_size <= whole * 0.82
    found = _unpacked(out)["train/CT_a_0.npz"]
    with NpzFile(folders[0] / "CT_a_0.npz") as file:
        off = found["imgs"].astype(int) - file["imgs"]
        assert np.abs(off).max() == 2 and abs(off.mean()) < 0.6
        assert np.array_equal(found["gts"], file["gts"])


def test_what_never_fits_leaves_nothing(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data.tar.xz"
    assert main([*map(str, folders), "--out", str(out), "--mib", "0.001"]) == 1
    error = capsys.readouterr().err
    assert "at 5 bits a voxel; accepted: 1048" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*data.tar.xz*"))
    assert main([str(folders[0]), str(folders[0]), "--out", str(out)]) == 1
    assert "names that differ" in capsys.readouterr().err
