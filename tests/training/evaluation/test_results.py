"""What lies in a folder of results: left half done, damaged, or made from cases changed since."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.phantoms import challenge_case, write_npz
from training.evaluation import evaluate
from training.evaluation.evaluate import main
from training.evaluation.results import read_csv


@pytest.fixture
def cases(tmp_path) -> Path:
    folder = tmp_path / "cases"
    folder.mkdir()
    write_npz(folder / "CT_a.npz", challenge_case((8, 24, 28), 2))
    return folder


def run(cases: Path, predictor: str, *more: str) -> int:
    out = str(cases.parent / "out")
    return main(["--cases", str(cases), "--out", out, "--predictor", predictor, *more])


def test_an_interrupted_force_leaves_no_table_of_cases_that_are_gone(cases, monkeypatch):
    def interrupted(*_):
        raise OSError("no space left")

    table = cases.parent / "out" / "box_metrics.csv"
    assert run(cases, "box", "--no-report") == 0
    before = table.read_bytes()
    monkeypatch.setattr(evaluate, "_evaluate", interrupted)
    assert run(cases, "box", "--no-report", "--force") == 2
    assert not table.exists()
    monkeypatch.undo()
    table.write_bytes(before)  # as older versions left it
    assert run(cases, "ellipsoid") == 0
    assert {row["run"] for row in read_csv(table.with_name("summary.csv"))} == {"ellipsoid"}
