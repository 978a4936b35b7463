"""Means over cases, modalities and objects, on results whose scores are known."""

from __future__ import annotations

import pytest

from training.evaluation import report
from training.evaluation.comparison import compare
from training.evaluation.protocol import CaseResult, Round
from training.evaluation.results import RunFolder
from training.evaluation.summary import (
    COLUMNS,
    modality_in_tables,
    modality_rows,
    stress_rows,
    summarise,
)

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


def test_names_without_a_modality_are_one():
    names = ["CT_a.npz", "MRI_a.npz", "patient1_a.npz", "scan.npz", "_x.npz"]
    assert [modality_in_tables(name) for name in names] == ["CT", "MR", "other", "other", "other"]
    results = [result(f"patient{n}_a.npz", n / 10) for n in range(6)]
    assert [name for name, *_ in modality_rows(results, "dsc")] == ["other"]


def test_each_modality_counts_alike_in_the_mean(tmp_path):
    """One CT of 0.2, three MR of 0.8: 0.5, and not the 0.65 of the cases."""
    results = [result("CT_a.npz", 0.2), *(result(f"MR_{c}.npz", 0.8) for c in "abc")]
    means = {name: values[FINAL] for name, _, values in modality_rows(results, "dsc")}
    assert means == pytest.approx(
        {"CT": 0.2, "MR": 0.8, "mean of modalities": 0.5, "mean of cases": 0.65}
    )
    finals = {
        row["group"]: row["mean"]
        for row in summarise(results)
        if (row["metric"], row["round"]) == ("DSC", "Final") and row["grouping"] == "all"
    }
    assert finals == pytest.approx({"cases": 0.65, "mean of modalities": 0.5})
    overview = report._overview({"box": results})
    assert overview.count("<td>0.5000</td>") == 2 * 7 and "<td>0.6500</td>" not in overview


def test_objects_are_told_by_tenths_of_their_sizes():
    results = [result(f"CT_{n}.npz", n / 20, voxels=100 * n) for n in range(1, 21)]
    tenths = {
        row["group"]: row["mean"]
        for row in summarise(results)
        if (row["grouping"], row["metric"], row["round"]) == ("object size", "DSC", "Final")
    }
    assert len(tenths) == 10
    assert tenths["100-200 voxels"] == pytest.approx(0.075)
    assert tenths["1900-2000 voxels"] == pytest.approx(0.975)


def test_counts_are_whole_and_scores_have_four_digits(tmp_path):
    runs = [RunFolder(tmp_path, name) for name in ("ours", "theirs")]
    for run, dsc in zip(runs, (0.75, 0.5), strict=True):
        run.write_metrics([result("CT_a.npz", dsc)])
    page = report._differences("ours", compare(*(run.metrics_csv for run in runs)))
    cells = "".join(f"<td>{cell}</td>" for cell in ("DSC_AUC", 1, "1.0000", 1, 0, "1.0000"))
    assert cells in page
