"""What a run needs: measured in one step, reckoned for all of them."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from tests.training.balls import TINY_SAM, config, write_balls
from training.checkpoint import build_network
from training.dataset import WindowDataset
from training.needs import _ON_CPU, Step, main, measure_step, report
from training.peak_memory import peak_bytes
from training.trainer import Trainer
from training.volumes import load_folder

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors here are too small for two

SAM = {"network": "sam_med3d", "sam": TINY_SAM, "rounds": 2}


def test_a_step_is_measured_and_the_run_reckoned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(**SAM, epochs=3, batch=2, accumulate=1, sampling="epochs")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")
    data = str(write_balls(tmp_path))
    assert main(["--config", str(path), "--data", data, "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "a step of 1:" in said and "a step of 2:" in said
    assert "batch 2 x 1, 6 steps of 2 windows (4 objects an epoch)" in said
    assert main(["--config", str(path), "--data", str(tmp_path / "gone")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_step_is_measured_without_workers(tmp_path: Path) -> None:
    """What they do would count for nothing."""
    step = measure_step(config(batch=8, workers=4), load_folder(write_balls(tmp_path)), 1)
    assert step.windows == 1 and not multiprocessing.active_children()


def test_memory_before_the_step_does_not_count(tmp_path: Path) -> None:
    volumes = load_folder(write_balls(tmp_path))
    np.ones(100_000_000)  # 800 MB, as reading many files at once may take
    before = peak_bytes() / 1e9
    assert measure_step(config(batch=1), volumes, 1).peak_gb < before - 0.2


def test_the_reckoning() -> None:
    """240 steps of 24 windows of 10 TFLOP at 100 TFLOP/s: 576 seconds."""
    settings = config(**SAM, epochs=240, batch=12, accumulate=2, sampling="epochs")
    one = Step(windows=1, seconds=9.0, cpu_seconds=15.0, flops=10**13, peak_gb=3.0)
    two = Step(windows=2, seconds=18.0, cpu_seconds=30.0, flops=2 * 10**13, peak_gb=3.5)
    said = report(settings, one, two, objects=24, tflops=100.0)
    assert "so 2.50 GB anyway and 0.50 GB a window" in said
    assert "240 steps of 24 windows" in said
    assert "memory 8.5 GB" in said
    assert f"0.06 EFLOP: {576 / 86400:.2g} days at 100 TFLOP/s" in said
    assert f"{240 * 24 * 15 / 86400:.0f} days on one core" in said


def test_steps_are_those_that_training_takes(tmp_path: Path) -> None:
    """3 objects of 1.5 rounds, 4 a step: two steps an epoch, and not one."""
    settings = config(rounds=2, batch=4, accumulate=1, epochs=10)
    volumes = load_folder(write_balls(tmp_path))
    volumes[1] = dataclasses.replace(volumes[1], objects=volumes[1].objects[:1])
    dataset = WindowDataset(volumes, settings)
    trainer = Trainer(build_network(settings), dataset, settings, tmp_path)
    assert (dataset.objects, trainer.steps) == (3, 20)
    step = Step(windows=1, seconds=1.0, cpu_seconds=1.0, flops=1, peak_gb=1.0)
    said = report(settings, step, step, objects=3, tflops=1.0)
    assert "batch 4 x 1, 20 steps of 4 windows" in said


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--threads", "-1", "at least 1"),
        ("--threads", "0", "at least 1"),
        ("--objects", "-5", "at least 1"),
        ("--tflops", "0", "a finite number above 0"),
        ("--tflops", "nan", "a finite number above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], option: str, value: str, accepted: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--config", "no.yaml", "--data", "no", option, value])
    said = capsys.readouterr().err
    assert raised.value.code == 2 and f"error: {option} {value}" in said and accepted in said


def test_attention_on_a_cpu_is_counted() -> None:
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    with counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * 2 * 64 * 64 * 16  # heads, two operations, rows, columns, terms
    assert counter.get_total_flops() == 7 * product  # two on the way there, five back
