"""Runs learn, go on where they were, and stop where they should."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.training.balls import TINY_SAM, config, trainer
from training.checkpoint import load_checkpoint
from training.run_log import read_log
from training.train import main
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors here are too small for two

SAM: dict[str, Any] = {
    "network": "sam_med3d",
    "sam": TINY_SAM,
    "batch": 2,
    "rounds": 4,
    "pointless_rounds": 2,
    "iou": 0.1,
    "lr_prompts": 1e-4,
}


def _trainer(folder: Path, out: Path, **values: Any) -> Trainer:
    return trainer(folder, out, **{"steps": 8, "lr": 1e-3, "warmup_steps": 2, **values})


def _weights(out: Path) -> dict[str, Tensor]:
    state = load_checkpoint(out / "checkpoint.pt")
    return {f"{part}.{k}": v for part in ("model", "average") for k, v in state[part].items()}


def _assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_short_run_learns(folder: Path, tmp_path: Path, optimizer: str) -> None:
    values = {"optimizer": optimizer, "lr": 0.01, "synthetic": 0.0}
    run = _trainer(folder, tmp_path / "run", steps=60, log_steps=10, **values)
    run.run()
    lines = read_log(tmp_path / "run" / "log.csv")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["dice"] > lines[0]["dice"]
    slices = np.load(tmp_path / "run" / "samples.npz")
    assert slices["image"].shape == slices["mask"].shape == (4, 16, 16)


@pytest.mark.parametrize(
    "values",
    [{"accumulate": 2, "hard": 1.0, "no_mask": 0.5}, {"optimizer": "muon"}, SAM],
    ids=["refiner", "muon", "sam"],
)
def test_an_interrupted_run_gives_the_same_weights(
    folder: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    whole = _trainer(folder, tmp_path / "whole", **values)
    whole.run()
    _trainer(folder, tmp_path / "parts", **values).run(max_steps=3)
    again = _trainer(folder, tmp_path / "parts", **values)
    again.resume(tmp_path / "parts" / "checkpoint.pt")
    assert again.step == 3
    again.run()
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "parts"))


def test_a_killed_run_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    settings = config(steps=30, log_steps=2, checkpoint_minutes=0.0)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")

    def command(out: str) -> list[str]:
        paths = ["--config", tmp_path / "c.yaml", "--data", folder, "--out", tmp_path / out]
        return [*map(str, paths), "--threads", "1", "--device", "cpu", "--resume"]

    assert main(command("whole")) == 0
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train", *command("killed")], stdout=subprocess.DEVNULL
    )
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(checkpoint)["step"] < 30
    assert main(command("killed")) == 0
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "killed"))
    steps = [line["step"] for line in read_log(tmp_path / "killed" / "log.csv")]
    assert steps == list(range(2, 31, 2)), "no line twice, none missing"


def test_earlier_checkpoints_of_the_refiner_are_resumed(folder: Path, tmp_path: Path) -> None:
    """Those that knew neither windows' numbers nor pools."""
    run = _trainer(folder, tmp_path / "run")
    run.run(max_steps=2)
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    kept = ("model", "average", "optimiser", "step", "minutes", "windows", "config", "refiner")
    state["optimiser"] = state["optimisers"][0]
    torch.save({k: state[k] for k in kept}, path)
    again = _trainer(folder, tmp_path / "run")
    again.resume(path)
    again.run()
    assert (again.step, again.windows) == (8, 32)


def test_objects_saved_by_an_earlier_version_give_way_to_new_ones(
    folder: Path, tmp_path: Path
) -> None:
    _trainer(folder, tmp_path / "run").run(max_steps=2)
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    (rounds,) = state["rounds"]
    assert rounds["pool"]
    for entry in rounds["pool"].values():
        del entry["sample"]["inside"]
    torch.save(state, path)
    again = _trainer(folder, tmp_path / "run")
    again.resume(path)
    again.run()
    assert (again.step, again.windows) == (8, 32)


def test_another_number_of_places_starts_with_new_objects(folder: Path, tmp_path: Path) -> None:
    _trainer(folder, tmp_path / "run").run(max_steps=2)
    wider = _trainer(folder, tmp_path / "run", batch=6)
    wider.resume(tmp_path / "run" / "checkpoint.pt")
    wider.run()
    assert wider.windows == 2 * 4 + 6 * 6


def test_a_checkpoint_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    _trainer(folder, tmp_path / "run").run(max_steps=1)
    with pytest.raises(ValueError, match="no checkpoint of a sam_med3d"):
        _trainer(folder, tmp_path / "sam", **SAM).resume(tmp_path / "run" / "checkpoint.pt")
    deeper = {"refiner": {"channels": [16, 16], "blocks": [2, 1], "window": 16}}
    with pytest.raises(ValueError, match=r"another refiner, .*'blocks': \(1, 1\).* accepted"):
        _trainer(folder, tmp_path / "deep", **deeper).resume(tmp_path / "run" / "checkpoint.pt")
    shown = {"refiner": {"channels": [16, 16], "blocks": [1, 1], "window": 16, "coarse": True}}
    with pytest.raises(ValueError, match=r"'coarse': False.* accepted: .*'coarse': True"):
        _trainer(folder, tmp_path / "shown", **shown).resume(tmp_path / "run" / "checkpoint.pt")
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    del state["model"][next(iter(state["model"]))]
    torch.save(state, tmp_path / "earlier.pt")
    with pytest.raises(ValueError, match=r"of another refiner: .*Missing key"):
        _trainer(folder, tmp_path / "run").resume(tmp_path / "earlier.pt")
    torch.save({"some": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        _trainer(folder, tmp_path / "run").resume(tmp_path / "other.pt")
    (tmp_path / "other.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a checkpoint"):
        _trainer(folder, tmp_path / "run").resume(tmp_path / "other.pt")


def test_steps_without_a_finite_loss_are_skipped_and_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _trainer(folder, tmp_path / "run", most_skipped=3, steps=20, log_steps=1)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    loss = run._rounds.loss
    poisoned = {1, 4, 5, 6}

    def poison(part: int, step: int, *rest: Any) -> Tensor:
        value = loss(part, step, *rest)
        if step == 1:  # as of a logit that overflows: its gradient is finite
            return value + math.inf
        return value * (math.nan if step in poisoned else 1.0)

    monkeypatch.setattr(run._rounds, "loss", poison)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* the last one 7: lower lr"):
        run.run()
    assert run.skipped == 4
    assert read_log(tmp_path / "run" / "log.csv")[-1]["skipped"] == 3
    after = run.model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in after)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_small_grid_is_never_trained_in_bfloat16_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    """Its convolutions' gradients would be wrong; a grid of 2^3 cells shows it."""
    values = {"windows": [[0.0, 8]], "steps": 4}
    run = _trainer(folder, tmp_path / "run", precision="auto", **values)
    run.run()
    assert run.skipped == 0
    with pytest.raises(ValueError, match=r"coarsest grid of 2\^3 cells; accepted on a CPU"):
        _trainer(folder, tmp_path / "b", precision="bfloat16", **values).run()


def test_epochs_say_how_long_a_run_is(folder: Path, tmp_path: Path) -> None:
    run = _trainer(folder, tmp_path / "run", **SAM, epochs=5, sampling="epochs")
    assert run.steps == 5 * 2, "four objects, two a step"
    run.run()
    assert run.epoch == 5 and run.windows == 20


def test_the_average_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    run = _trainer(folder, tmp_path / "none", ema=0.0)
    run.run(max_steps=3)
    for name, value in run.model.state_dict().items():
        assert torch.equal(run.average[name], value)
    slow = _trainer(folder, tmp_path / "slow", ema=0.999)
    slow.run(max_steps=3)
    assert any(not torch.equal(slow.average[k], v) for k, v in slow.model.state_dict().items())


def test_minutes_end_a_run(folder: Path, tmp_path: Path) -> None:
    run = _trainer(folder, tmp_path / "run", steps=100_000, minutes=0.01)
    run.run()
    assert run.progress == 1 and run.step < 100_000


def test_the_command_line_reports_faults_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    for arguments, message in (
        (["--set", "nonsense=1"], "configuration received"),
        (["--init", "nowhere"], "no weights 'nowhere'"),
        (["--data", str(tmp_path / "gone")], "holds no labelled volume"),
    ):
        assert main([*common, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_line_starts_from_weights_and_a_case_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(__file__).parents[2] / "weights" / "default.safetensors"
    cases = tmp_path / "cases.txt"
    cases.write_text("CT_balls_1\n", encoding="utf-8")
    settings = ["steps=2", "batch=1", "windows=[[0.0,48]]", "no_box=0.0", "log_steps=1"]
    settings.append("refiner.coarse=true")  # as the weights
    arguments = ["--data", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--cases", str(cases), "--init", str(weights), "--set", *settings]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 volumes, 2 objects" in said and "step 2" in said
    assert main([*arguments, "--resume"]) == 0
    assert "going on from step 2" in capsys.readouterr().out
