"""Curves of a run: written, marked where the rate steps, refused without a log."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest

from training.plots import draw, main, rate_steps
from training.run_log import COLUMNS, RunLog, read_log


def _log(folder: Path, rates: list[float]) -> None:
    log = RunLog(folder, rounds=3, step=0, total=len(rates))
    for i, rate in enumerate(rates, start=1):
        values = {"step": i, "epoch": i * 10.0, "minutes": i, "windows": 4 * i, "lr": rate}
        values |= {"loss": 2.0 / i, "dice": 1 - 1 / (i + 1), "skipped": 0}
        log.line(values, {"dice": 0.5, "round 0": 0.4, "round 2": 0.6, "CT box 0": 0.4})
    log.close()


def test_curves_and_samples_are_drawn(tmp_path: Path) -> None:
    _log(tmp_path, [8e-4] * 12 + [8e-5] * 6 + [8e-6] * 2)
    disc = np.hypot(*(np.indices((24, 24)) - 12)) < 6
    stack = np.stack([disc, ~disc]).astype(np.float32)
    empty = np.zeros_like(stack)
    np.savez(tmp_path / "samples.npz", image=stack * 90, target=stack, mask=empty)
    written = draw(tmp_path)
    assert [path.name for path in written] == ["dice.png", "loss.png", "samples.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_steps_of_the_rate_are_found_and_slopes_are_not(tmp_path: Path) -> None:
    _log(tmp_path, [8e-4] * 12 + [8e-5] * 6 + [8e-6] * 2)
    assert rate_steps(read_log(tmp_path / "log.csv")) == [130, 190]
    _log(tmp_path, [1e-3 * 0.4**i for i in range(20)])
    assert rate_steps(read_log(tmp_path / "log.csv")) == []


def test_a_run_that_goes_on_drops_later_lines(tmp_path: Path) -> None:
    _log(tmp_path, [1e-3] * 5)
    RunLog(tmp_path, rounds=3, step=3, total=9).close()
    lines = read_log(tmp_path / "log.csv")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["dice_0"] == 0.4 and np.isnan(lines[0]["dice_1"])


def test_a_run_goes_on_with_another_number_of_rounds(tmp_path: Path) -> None:
    _log(tmp_path, [1e-3] * 2)
    for rounds in (2, 5):
        RunLog(tmp_path, rounds=rounds, step=2, total=9).close()
        lines = read_log(tmp_path / "log.csv")
        assert [line["step"] for line in lines] == [1, 2]
        assert [line["dice_0"] for line in lines] == [0.4, 0.4]
        assert [*lines[0]] == [*COLUMNS, *(f"dice_{i}" for i in range(rounds))]


def test_the_progress_bar_shows_loss_dice_by_round_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    log = RunLog(tmp_path, rounds=2, step=0, total=4)
    values = dict.fromkeys(COLUMNS, 1.0)
    log.line(values, {"dice": 0.5, "round 0": 0.4, "round 1": 0.6})
    for _ in range(3):
        time.sleep(0.11)
        log.step(0.25, 0.5)
    log.close()
    said = terminal.getvalue().split("\r")[-1]
    assert "3/4" in said and "dice=0.500, loss=0.250, rounds=0.40 0.60" in said
    assert "<00:00" in said, "seconds left"


def test_tensorboards_files_hold_the_same(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, rounds=1, step=0, total=1, tensorboard=True)
    values = {"step": 1, "epoch": 1, "minutes": 1, "windows": 4, "lr": 0.1}
    log.line(values | {"loss": 0.25, "dice": 0.5, "skipped": 0}, {"CT box 0": 0.75})
    log.close()
    found = events.EventAccumulator(str(tmp_path)).Reload()
    assert found.Scalars("loss")[0].value == 0.25
    assert found.Scalars("CT/box/0")[0].value == 0.75


def test_a_folder_without_a_log_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no log.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n", "no column epoch, lr, loss, dice, dice_0"),
        (b"a,b\n1,x\n", "could not convert"),
        (b"a,b\n1," + b"x" * 140_000, "field larger"),
        (b"\x93NUMPY", "codec can't decode"),
    ],
)
def test_a_log_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str
) -> None:
    (tmp_path / "log.csv").write_bytes(text)
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'log.csv'}: ") and said.count("\n") == 1
    assert message in said and said.endswith("accepted: the log of a run\n")


def test_samples_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _log(tmp_path, [1e-3] * 2)
    samples = tmp_path / "samples.npz"
    samples.write_bytes(b"PK\x03\x04junk")
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "samples.npz: received a file that is a damaged" in said and said.count("\n") == 1
    np.savez(samples, image=np.zeros((1, 4, 4)), target=np.zeros((1, 4, 5)))
    assert main([str(tmp_path)]) == 1
    assert "[(1, 4, 4), (1, 4, 5), (0,)]; accepted" in capsys.readouterr().err
