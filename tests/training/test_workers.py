"""Objects in processes of their own are those that the network's process would have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT
from tests.training.balls import config, trainer
from training.checkpoint import load_checkpoint
from training.dataset import WindowDataset
from training.run_log import read_log
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors here are too small for two


def _trainer(folder: Path, out: Path, **values: Any) -> Trainer:
    changed = {"steps": 6, "lr": 1e-3, "warmup_steps": 0, "log_steps": 1, "zoom": 0.5, **values}
    return trainer(folder, out, **changed)


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_log(out / "log.csv")]


def test_one_worker_makes_the_objects_of_a_run_without(folder: Path, tmp_path: Path) -> None:
    """Its channels have half precision; all else is the same, poor masks and close looks too."""
    values = {"batch": 4, "poor_mask": 0.3, "tell_apart": 0.5, "others": 1.0, "rounds": 3}
    here, there = tmp_path / "here", tmp_path / "there"
    _trainer(folder, here, **values).run()
    run = _trainer(folder, there, workers=1, **values)
    run.run()
    assert run.windows == 24
    assert _losses(there) == pytest.approx(_losses(here), rel=2e-3)
    assert len(set(_losses(there))) == 6
    scored = [read_log(out / "log.csv") for out in (here, there)]
    # A worker says with its next objects how the last ones were.
    for before, after in zip(scored[0], scored[1][1:], strict=False):
        assert after["dice"] == pytest.approx(before["dice"], abs=0.01)


def test_whichever_are_ready_make_a_pass(folder: Path, tmp_path: Path) -> None:
    """And another edge of windows, once its time has come."""
    out = tmp_path / "run"
    run = _trainer(folder, out, workers=3, batch=16, windows=[[0.0, 16], [0.5, 32]], steps=8)
    run.run()
    assert run.windows == 8 * 16 and run.skipped == 0
    assert run._rounds.samples["target"].shape == (16, 32, 32, 32)
    assert all(0 < row["loss"] < 3 for row in read_log(out / "log.csv"))


def test_a_run_goes_on_with_new_objects(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = _trainer(folder, out, workers=2, batch=8, rounds=1)
    first.run(max_steps=3)
    (before,) = load_checkpoint(out / "checkpoint.pt")["rounds"]
    again = _trainer(folder, out, workers=2, batch=8, rounds=1)
    again.resume(out / "checkpoint.pt")
    again.run()
    (after,) = load_checkpoint(out / "checkpoint.pt")["rounds"]
    assert again.step == 6 and before["pool"] == after["pool"] == {}
    assert before["drawn"].keys() == after["drawn"].keys() == set(range(16))
    assert min(after["drawn"].values()) > max(before["drawn"].values()) > 0


def test_a_finished_run_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _trainer(folder, out, log_steps=4).run()
    written = (out / "log.csv").read_text()
    again = _trainer(folder, out, log_steps=4)
    again.resume(out / "checkpoint.pt")
    again.run()
    assert again.step == 6 and (out / "log.csv").read_text() == written


def test_what_a_worker_cannot_do_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*arguments: object, **more: object) -> None:
        raise ValueError("no window of 16^3 cells shows 8 cells")

    monkeypatch.setattr(WindowDataset, "draw", draw)
    run = _trainer(folder, tmp_path / "run", workers=1, batch=4)
    with pytest.raises(ValueError, match="a worker failed: ValueError: no window of 16"):
        run.run()


def test_a_worker_that_is_killed_ends_the_run(folder: Path, tmp_path: Path) -> None:
    run = _trainer(folder, tmp_path / "run", workers=1, batch=4, steps=1000)
    run.take_step()
    workers = run._rounds._objects._workers  # type: ignore[union-attr]
    workers[0].process.kill()
    workers[0].process.join()
    with pytest.raises(ValueError, match="a worker"):
        run.run()
    assert not run._rounds._objects._workers  # type: ignore[union-attr]


#: Takes a step, says who its workers are, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from tests.training.test_workers import _trainer

run = _trainer(Path(sys.argv[1]), Path(sys.argv[1]) / "run", workers=3, batch=4)
run.take_step()
print(*(worker.process.pid for worker in run._rounds._objects._workers), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_the_process_they_work_for(folder: Path) -> None:
    """However that ends: nobody is left to end them."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    said = folder / "said"
    with (
        said.open("w") as errors,
        subprocess.Popen(
            command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        workers = process.stdout.readline().split()
        process.kill()
    try:
        assert len(workers) == 3
        last = time.monotonic() + 60
        while any(map(_runs, workers)):
            assert time.monotonic() < last, "workers outlive the process they work for"
            time.sleep(0.05)
    finally:
        for worker in filter(_runs, workers):
            os.kill(int(worker), signal.SIGKILL)
    assert "Traceback" not in said.read_text(encoding="utf-8")


def _runs(process: str) -> bool:
    """Whether a process is there and not merely waiting to be forgotten."""
    try:
        status = Path("/proc", process, "stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "values", [{"workers": 1, "batch": 16}, {"workers": 1, "network": "sam_med3d"}, {"workers": -1}]
)
def test_too_few_workers_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="workers is"):
        config(**values)
