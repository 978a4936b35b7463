"""Reliability: made-up probabilities whose truth is known, and the way into the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from inference.case import ObjectPrompts
from inference.refinement import ObjectLogits
from tests.phantoms import challenge_case, write_npz
from tests.training.evaluation.test_ablation import StandIn
from training.evaluation import recording
from training.evaluation.label_map import LabelMap
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.recording import RecordedCase
from training.evaluation.reliability import BINS, count_case, main, reliability_rows
from training.evaluation.results import read_csv
from training.evaluation.summary import MEAN_OF_MODALITIES


def _count(folder: Path, probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of one object whose cut-out is the volume but for a slice before it."""
    case = challenge_case((6, 12, 14), 1, "CT", seed=0)
    loaded = load_labelled_case(write_npz(folder / "CT_a_1.npz", case))
    labels = np.zeros((6, 12, 14), np.uint8)
    labels[1:][truth] = 1
    labels[0, 0, 0] = 1
    loaded = dataclasses.replace(loaded, reference=LabelMap.of(labels))
    logits = np.log(probability / (1 - probability)).astype(np.float32)
    result = ObjectLogits(1, (1, 0, 0), logits)
    return count_case(RecordedCase("CT_a_1", (1,), {0: [(ObjectPrompts(1), result)]}), loaded)


def test_probabilities_that_are_what_they_say_have_no_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.01, 0.99, (5, 12, 14))
    truth = rng.random(probability.shape) < probability
    count = _count(tmp_path, probability, truth)
    assert count.shape == (3, BINS) and count[0].sum() == pytest.approx(1)
    rows = reliability_rows({"CT": count})
    assert rows[0]["error"] < 0.1
    for row in rows[:BINS]:
        assert row["tenth"] / 10 <= row["probability"] <= row["tenth"] / 10 + 0.1
        assert row["frequency"] == pytest.approx(row["probability"], abs=0.2)


def test_being_too_sure_shows(tmp_path: Path) -> None:
    probability = np.full((5, 12, 14), 0.95)
    truth = np.arange(5 * 12 * 14).reshape(5, 12, 14) % 2 == 0
    rows = reliability_rows({"CT": _count(tmp_path, probability, truth)})
    assert rows[0]["error"] == pytest.approx(0.45, abs=1e-3)
    assert rows[9]["frequency"] == pytest.approx(0.5) and rows[9]["share"] == pytest.approx(1)
    assert rows[0]["probability"] is None and rows[0]["share"] == 0


def test_the_mean_of_modalities_counts_each_alike() -> None:
    few, many = np.zeros((3, BINS)), np.zeros((3, BINS))
    few[:, 9], many[:, 9] = (1, 0.9, 1.0), (100, 90, 50)
    rows = reliability_rows({"CT": few, "MR": many, "PET": np.zeros((3, BINS))})
    assert {row["modality"] for row in rows} == {"CT", "MR", MEAN_OF_MODALITIES}
    (mean,) = (r for r in rows if r["modality"] == MEAN_OF_MODALITIES and r["tenth"] == 9)
    assert mean["frequency"] == pytest.approx(0.75)


def test_the_command_writes_the_table_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, out = tmp_path / "cases", tmp_path / "out"
    cases.mkdir()
    write_npz(cases / "CT_a_1.npz", challenge_case((12, 30, 28), 2, "CT", seed=1))
    write_npz(cases / "PET_b_1.npz", challenge_case((12, 30, 28), 1, "PET", seed=2))
    monkeypatch.setattr(recording.Segmenter, "from_files", lambda *_, **__: StandIn())
    arguments = ["--cases", str(cases), "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert main(arguments) == 0
    assert "PET: expected calibration error 0." in capsys.readouterr().out
    rows = read_csv(out / "reliability.csv")
    assert len(rows) == 3 * BINS
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Reliability of probabilities" in page and "<svg" in page
    assert main([*arguments[:1], str(tmp_path / "none"), *arguments[2:]]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setattr(recording.Segmenter, "from_files", None)  # no work before the refusal
    arguments = ["--cases", str(cases), "--cache", str(tmp_path / "other"), "--out", __file__]
    assert main(arguments) == 2
    assert "File exists" in capsys.readouterr().err
