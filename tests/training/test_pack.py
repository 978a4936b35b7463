"""One archive of cases: the same folders again, within a size, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.model.weights import read_weights
from inference.npz import NpzFile
from tests.conftest import CHECKOUT
from tests.training.balls import write_balls
from training.pack import main, pack
from training.volumes import load_volumes


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
    (folders[0] / "manifest.json").write_text("[]", encoding="utf-8")
    assert pack(folders, out, 1 << 20) == 8
    found = _unpacked(out)
    assert (out.parent / "train" / "manifest.json").read_text(encoding="utf-8") == "[]"
    assert not (out.parent / "maps" / "manifest.json").exists()
    assert sorted(found) == ["maps/LM_b.npz", "train/CT_a_0.npz", "train/CT_a_1.npz"]
    for name, arrays in found.items():
        with NpzFile(tmp_path / name) as file:
            assert sorted(arrays) == sorted(file)
            for key, value in arrays.items():
                assert np.array_equal(value, file[key]), (name, key)


def test_images_are_bytes_and_folders_keep_their_names(folders: list[Path], tmp_path: Path) -> None:
    """Whatever type the images had, and wherever the files really lie."""
    case = folders[0] / "CT_a_0.npz"
    with NpzFile(case) as file:
        arrays = dict(file)
    (tmp_path / "store").mkdir()
    elsewhere = tmp_path / "store" / case.name
    np.savez(elsewhere, allow_pickle=True, **(arrays | {"imgs": arrays["imgs"].astype(float)}))
    case.unlink()
    case.symlink_to(elsewhere)
    out = tmp_path / "there" / "data.tar.xz"
    out.parent.mkdir()
    assert pack(folders, out, 1 << 20) == 8
    found = _unpacked(out)["train/CT_a_0.npz"]["imgs"]
    assert found.dtype == np.uint8 and np.array_equal(found, arrays["imgs"])


def test_intensities_are_rounded_as_training_rounds_them(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    image = np.array([1.7, 99.9, 254.6, 255.0, 0.0, np.nan, 0.5, 1.5], np.float32).reshape(2, 2, 2)
    case = tmp_path / "train" / "MR_a_0.npz"
    np.savez(case, imgs=image, gts=np.ones(image.shape, np.uint8), spacing=[1.0, 1.0, 1.0])
    (tmp_path / "there").mkdir()
    assert pack([case.parent], tmp_path / "there" / "data.tar.xz", 1 << 20) == 8
    found = _unpacked(tmp_path / "there" / "data.tar.xz")["train/MR_a_0.npz"]["imgs"]
    assert found.ravel().tolist() == [2, 100, 255, 255, 0, 0, 0, 2]
    trained_on = load_volumes([case])[0].image
    assert trained_on is not None and np.array_equal(found, trained_on.numpy())


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
        assert np.array_equal(found["imgs"] == 0, file["imgs"] == 0), "background stays apart"
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
    assert main([str(folders[0]), str(tmp_path / "vall"), "--out", str(out)]) == 1
    assert f"{tmp_path / 'vall'}: no .npz file" in capsys.readouterr().err
    assert main([str(folders[0]), "--out", str(tmp_path / "x.zip")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/x.zip; accepted: a file named *.tar.xz\n"
    assert not (tmp_path / "x.zip").exists()
    for size in ("inf", "nan", "0"):
        with pytest.raises(SystemExit):
            main([str(folders[0]), "--out", str(out), "--mib", size])
        assert "accepted: a finite number above 0" in capsys.readouterr().err


def test_from_an_archive_to_weights_and_figures_in_one_command(tmp_path: Path) -> None:
    """And on again from where it was: an accelerator may be taken away at any moment.

    Before that the archive has nothing to judge by, which is left out then.
    """
    (tmp_path / "train").mkdir()
    write_balls(tmp_path / "train")
    (tmp_path / "train" / "maps").rename(tmp_path / "label_maps")
    (tmp_path / "val").mkdir()
    shutil.copy(tmp_path / "train" / "CT_balls_0.npz", tmp_path / "val")
    out, archive = tmp_path / "out", tmp_path / "data.tar.xz"
    command = ["sh", "training/accelerate.sh", str(archive), str(out), "60"]
    smaller = ["--max-steps", "1", "--device", "cpu", "--threads", "1"]
    smaller += ["--set", "batch=2", "workers=1", "windows=[[0.0,16]]"]
    environment = {**os.environ, "PYTHON": sys.executable}
    for steps, names in ((1, ("train", "label_maps")), (2, ("train", "label_maps", "val"))):
        pack([tmp_path / name for name in names], archive, 1 << 20)
        done = subprocess.run(
            [*command, *smaller],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        _, metadata = read_weights(out / "weights.safetensors")
        for part, share in (("refiner_training", 0.0), ("unboxed_training", 1.0)):
            told = json.loads(metadata[part])
            assert (told["steps"], told["config"]["no_box"]) == (steps, share)
        assert (out / "box" / "summary.csv").is_file() == ("val" in names)
    assert (out / "nobox" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"imgs": np.full((4, 5, 6), 1500.0)}, "imgs from 1500 to 1500; accepted: 0 to 255"),
        ({"gts": np.ones((4, 5), np.uint8)}, "received gts of uint8 and shape (4, 5)"),
        ({"spacing": None}, "holds ['imgs', 'gts']; accepted: npz with gts and spacing"),
    ],
)
def test_what_training_refuses_is_not_packed(
    change: dict[str, np.ndarray | None],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Clipped to 255 it would train the network on nonsense, far from where anyone looks."""
    case = tmp_path / "train" / "CT_a_0.npz"
    case.parent.mkdir()
    arrays = {
        "imgs": np.ones((4, 5, 6), np.uint8),
        "gts": np.ones((4, 5, 6), np.uint8),
        "spacing": np.ones(3),
    } | change
    np.savez(case, **{key: array for key, array in arrays.items() if array is not None})
    assert main([str(case.parent), "--out", str(tmp_path / "data.tar.xz")]) == 1
    error = capsys.readouterr().err
    assert said in error and "CT_a_0" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
