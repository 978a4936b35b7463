"""Means over cases, modalities and objects, on results whose scores are known."""

from __future__ import annotations

import pytest

from training.evaluation.comparison import compare
from training.evaluation.protocol import CaseResult, Round
from training.evaluation.results import RunFolder
from training.evaluation.summary import COLUMNS, modality_rows, stress_rows

FINAL = COLUMNS.index("Final")


def result(name: str, dsc: float, *, seconds: float = 1.0, voxels: int = 10) -> CaseResult:
    """A case of one class that scores the same in all rounds."""
    rounds = (Round(seconds, None, (dsc,), (dsc,)),) * 6
    return CaseResult(name, (1,), ("",), (voxels,), (4, 4, 4), True, rounds, ((),))


def test_late_cases_count_as_zero_in_all_that_is_told(tmp_path):
    late, good = result("CT_a.npz", 0.9, seconds=31), result("CT_b.npz", 0.5)
    assert modality_rows([late, good], "dsc")[-1][2][FINAL] == pytest.approx(0.25)
    exact = [result("CT_a.npz", 0.9), good]
    [row] = stress_rows({"box": exact, "box@one-click": [late, good]})
    assert (row["DSC_final"], row["NSD_first_loss"]) == pytest.approx((0.25, 0.45))
    runs = [RunFolder(tmp_path, name) for name in ("late", "exact")]
    for run, results in zip(runs, ([late, good], exact), strict=True):
        run.write_metrics(results)
    differences = compare(*(run.metrics_csv for run in runs))
    assert {round(d.mean, 9) for d in differences if not d.column.endswith("AUC")} == {-0.45}
