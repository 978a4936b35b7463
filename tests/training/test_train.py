"""What stops a run of training is told in one line, and leaves earlier files as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.training.balls import config
from training.checkpoint import load_checkpoint
from training.train import main
from training.trainer import Trainer


def command(folder: Path, *more: str, **values: object) -> list[str]:
    """Arguments of a run of six steps; its configuration is written anew."""
    settings = config(**{"steps": 6, **values})
    (folder / "c.yaml").write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")
    paths = ["--config", folder / "c.yaml", "--data", folder, "--out", folder / "out"]
    return [*map(str, paths), "--device", "cpu", *more]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that ends with status 1."""
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("switch", "value", "accepted"),
    [
        ("--threads", "-1", "accepted: at least 1"),
        ("--threads", "0", "accepted: at least 1"),
        ("--device", "gpu", "accepted: cpu, or cuda"),
        ("--device", "meta", "accepted: cpu, or cuda"),
        ("--device", "cuda:99", "accepted: cpu, or cuda"),
    ],
)
def test_wrong_switches_are_refused_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], switch: str, value: str, accepted: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command(folder), switch, value])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{value}; {accepted}" in last


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ([1.0, 2.0], "spacing [1.0, 2.0]; accepted: three positive numbers"),
        ([1.0, 0.0, 1.0], "spacing [1.0, 0.0, 1.0]; accepted: three positive numbers"),
        (None, "CT_bad.npz: received a file that"),
    ],
)
def test_a_case_that_cannot_be_read_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spacing: list[float] | None,
    expected: str,
) -> None:
    path = folder / "CT_bad.npz"
    cells = np.ones((9, 9, 9), np.uint8)
    np.savez(path, imgs=cells, gts=cells, spacing=[1.0] * 3 if spacing is None else spacing)
    if spacing is None:
        path.write_bytes(path.read_bytes()[:1000])
    said = refused(command(folder), capsys)
    assert "CT_bad" in said and expected in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"imgs": np.linspace(-1000, 400, 8**3).reshape(8, 8, 8)}, "imgs from -1000 to 400"),
        ({"imgs": np.linspace(0, 1, 8**3).reshape(8, 8, 8)}, "imgs from 0 to 1"),
        ({"imgs": np.full((8, 8, 8), 300, np.uint16)}, "imgs from 300 to 300"),
        ({"gts": np.ones((8, 8), np.uint8)}, "gts of uint8 and shape (8, 8)"),
        ({"gts": np.ones((0, 8, 8), np.uint8)}, "gts of uint8 and shape (0, 8, 8)"),
        ({"gts": np.full((8, 8, 8), "liver")}, "gts of <U5 and shape (8, 8, 8)"),
        ({"spacing": np.array(["1", "1", "1"])}, "spacing of <U1 and shape (3,)"),
    ],
)
def test_arrays_that_training_would_spoil_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, np.ndarray], said: str
) -> None:
    good = np.zeros((8, 8, 8), np.uint8)
    good[2:6, 2:6, 2:6] = 1
    arrays = {"imgs": good * 100, "gts": good, "spacing": np.ones(3)} | changed
    np.savez(folder / "CT_odd_1.npz", **arrays)
    line = refused(command(folder), capsys)
    assert f"CT_odd_1: {'' if 'imgs' in changed else 'received '}{said}; accepted: " in line


def test_a_run_that_is_there_is_not_begun_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder)) == 0
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    assert "is there already; accepted: --resume, or another" in refused(command(folder), capsys)
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before
    assert main([*command(folder), "--resume"]) == 0


def test_label_maps_are_without_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*command(folder), "--label-maps", str(folder)], capsys)
    assert f"{folder}: CT_balls_0 has imgs; accepted: label maps alone" in line


def test_what_a_run_began_with_stands_in_its_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder)) == 0
    (folder / "out").rename(folder / "first")
    start = str(folder / "first" / "checkpoint.pt")
    np.savez(folder / "OCT_eye_1.npz", **np.load(folder / "CT_balls_0.npz"))
    assert main([*command(folder), "--init", start]) == 0
    said = capsys.readouterr().out
    assert "never shown, their modality having no weight: OCT_eye" in said
    assert yaml.safe_load((folder / "out" / "config.yaml").read_text())["init"] == start


def test_an_interruption_is_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    assert main(command(folder)) == 130
    assert capsys.readouterr().err == "interrupted; --resume goes on from the last checkpoint\n"


def test_hidden_files_are_no_cases(folder: Path) -> None:
    (folder / "._CT_balls_0.npz").write_bytes(b"macOS")
    assert main(command(folder)) == 0


def test_a_full_disk_leaves_the_checkpoint_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    assert main(command(folder, "--max-steps", "2")) == 0
    part = folder / "out" / ".checkpoint.pt.part"
    part.symlink_to("/dev/full")
    assert "No space left on device" in refused(command(folder, "--resume"), capsys)
    assert load_checkpoint(folder / "out" / "checkpoint.pt")["step"] == 2
    assert not part.is_symlink()


def test_what_a_killed_save_left_is_gone_after_the_next_one(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / ".checkpoint.pt.part").write_bytes(b"half of")
    assert main(command(folder, "--max-steps", "1")) == 0
    left = {path.name for path in (folder / "out").iterdir()}
    assert left == {"checkpoint.pt", "config.yaml", "log.csv", "samples.npz"}


def test_a_refused_resume_leaves_the_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, "--max-steps", "1")) == 0
    before = (folder / "out" / "config.yaml").read_bytes()
    other = {"channels": [16, 32], "blocks": [1, 1], "window": 16}
    assert "of another refiner" in refused(command(folder, "--resume", refiner=other), capsys)
    assert (folder / "out" / "config.yaml").read_bytes() == before


def test_too_little_shared_memory_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    said = refused(command(folder, workers=2), capsys)
    assert "0 of 2 workers" in said and "larger /dev/shm" in said


def test_a_full_gpu_is_told_and_other_faults_are_not_hidden(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, max_steps: int | None = None) -> None:
        raise faults.pop()

    faults = [RuntimeError("a fault"), torch.OutOfMemoryError("CUDA out of memory.\nTried to")]
    monkeypatch.setattr(Trainer, "run", fail)
    assert "a smaller batch" in refused(command(folder), capsys)
    with pytest.raises(RuntimeError, match="a fault"):
        main(command(folder))
