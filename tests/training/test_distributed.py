"""Two processes do what one of twice the batch does, also after one of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.training.balls import TINY_SAM, config, write_balls
from training.checkpoint import build_network, load_checkpoint
from training.run_log import read_log
from training.train import main

#: Trains, and leaves a file of the threads that are still there when it ends.
PROCESS = """
import os, sys
from pathlib import Path
from training.train import main

code = main(sys.argv[2:])
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
Path(sys.argv[1], "threads-" + os.environ["RANK"]).write_text("".join(names))
sys.exit(code)
"""
STEPS = 20
CLOSE = 1e-5


def _command(tmp_path: Path, name: str, **values: Any) -> list[str]:
    common = {"steps": STEPS, "log_steps": 5, "warmup_steps": 0, "checkpoint_minutes": 0.0}
    settings = config(**common, **values)
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")
    paths = ["--config", path, "--data", tmp_path, "--out", tmp_path / name]
    return [*map(str, paths), "--device", "cpu", "--threads", "1"]


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Two processes under torchrun, restarted once if one of them dies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", "1", "--nproc-per-node", "2", *arguments]
    # With a store shared by all attempts, processes may look for those of the one before.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment["PYTHONPATH"] = str(Path.cwd())
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)


def _workers(parent: int) -> list[int]:
    """Processes that another one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


REFINER = {"accumulate": 2, "hard": 1.0, "lr": 1e-3}
# Adam makes steps as long as the rate out of the rounding of gradients that are zero.
SAM = {"network": "sam_med3d", "sam": TINY_SAM, "rounds": 5, "pointless_rounds": 2, "lr": 1e-4}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds its processes in /proc")
@pytest.mark.parametrize(
    ("values", "killed"), [(REFINER, True), (SAM, False)], ids=["refiner-killed", "sam"]
)
def test_two_processes_equal_one_of_twice_the_batch(
    tmp_path: Path, one_thread: None, values: dict[str, Any], killed: bool
) -> None:
    write_balls(tmp_path)
    command = _command(tmp_path, "two", **values, batch=2)
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    two = _start([str(script), str(tmp_path), *command, "--resume"])
    checkpoint = tmp_path / "two" / "checkpoint.pt"
    try:
        if killed:
            while not checkpoint.exists():
                assert two.poll() is None, "it ended before its first checkpoint"
                time.sleep(0.01)
            os.kill(_workers(two.pid)[0], signal.SIGKILL)
            assert load_checkpoint(checkpoint)["step"] < STEPS
        assert main(_command(tmp_path, "one", **values, batch=4)) == 0
        assert two.wait() == 0
    finally:
        two.terminate()
        two.wait()
    # Those of the group would sooner or later abort a process at its very end.
    for rank in (0, 1):
        assert "gloo" not in (tmp_path / f"threads-{rank}").read_text(encoding="utf-8")
    alone = load_checkpoint(tmp_path / "one" / "checkpoint.pt")
    both = load_checkpoint(checkpoint)
    assert both["step"] == STEPS and both["windows"] == alone["windows"]
    torch.manual_seed(0)
    start = build_network(config(**values)).state_dict()
    moved = 0.0
    for name, value in alone["model"].items():
        torch.testing.assert_close(both["model"][name], value, rtol=0, atol=CLOSE, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 50 * CLOSE, "weights that hardly moved would prove nothing"
    lines = [read_log(tmp_path / name / "log.csv") for name in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [5, 10, 15, 20]
    last = [line[-1] for line in lines]
    assert last[0]["dice"] == pytest.approx(last[1]["dice"], abs=2e-3)
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], abs=2e-3)
