"""A run that fails is no measurement, and takes no earlier one away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import bench_predict


def test_a_failed_container_ends_as_it_did(tmp_path: Path) -> None:
    (tmp_path / "predict.sh").write_text("exit 1\n", encoding="utf-8")
    done = subprocess.run(["sh", "-c", bench_predict.SCRIPT], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize("options", [[], ["--image", "absent"]], ids=["process", "container"])
def test_a_failed_run_leaves_the_figures_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    for name in ("predict.csv", "predict_image.csv"):
        (tmp_path / name).write_text("before", encoding="utf-8")
    for name in ("docker", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(bench_predict, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_predict, "CASES", {"small": ((6, 8, 10), 1, 0)})
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "argv", ["bench_predict", *options])
    with pytest.raises((SystemExit, subprocess.CalledProcessError)):
        bench_predict.main()
    for name in ("predict.csv", "predict_image.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == "before"


def test_the_limit_is_higher_where_there_are_no_boxes() -> None:
    assert bench_predict.limit_s(classes=3, clicks=0) == 45.0
    assert bench_predict.limit_s(classes=1, clicks=1) == 18.0
