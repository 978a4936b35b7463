"""What lies in a folder of results: left half done, damaged, or made from cases changed since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("shape", [(8, 24, 28), (4, 24, 28)])
def test_cases_changed_since_are_not_drawn(cases, shape):
    """A label less, or another shape, between two runs."""
    assert run(cases, "box", "--no-report") == 0
    write_npz(cases / "CT_a.npz", challenge_case(shape, 1 if shape[0] == 8 else 2))
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "Worst: CT_a.npz, not shown: the case has other labels" in page
    assert page.count("data:image/png") == 3


def test_a_label_map_that_is_damaged_is_not_drawn(cases):
    assert run(cases, "box", "--no-report") == 0
    segs = cases.parent / "out" / "box" / "CT_a.npz"
    segs.write_bytes(segs.read_bytes()[:40])
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert f"not shown: {segs}: damaged" in page
    np.savez(segs, segs=np.zeros((8, 24, 27), np.uint8))
    assert run(cases, "ellipsoid") == 0
    page = (cases.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "not shown: a label map of shape (8, 24, 27)" in page


@pytest.mark.parametrize("name", ["CT_a.json", "settings.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_damaged_is_told_by_its_name(cases, capsys, name, text):
    out = cases.parent / "out"
    assert run(cases, "box", "--no-report") == 0
    (out / "box" / name).write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert run(cases, "box", "--no-report") == 2
    said = capsys.readouterr().err
    assert str(out / "box" / name) in said and said.count("\n") == 1
