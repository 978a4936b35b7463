"""Two runs on the same cases, compared case by case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from training.evaluation.results import read_csv

COMPARED = ("DSC_1", "DSC_AUC", "DSC_Final", "NSD_1", "NSD_AUC", "NSD_Final")
_NEEDED = {"CaseName", *COMPARED, "RunningTime_1", "TotalRunningTime", "runtime_upperbound"}
_ROUND_OFF = 1e-9  # differences of less are no differences


@dataclass(frozen=True)
class Difference:
    """One column of two official tables, paired by case.

    Attributes:
        column: of the official table.
        cases: in both tables, with their scores.
        ours, theirs: (N,) scores of these cases.
    """

    column: str
    cases: tuple[str, ...]
    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean of ours minus theirs."""
        return float(np.mean(self.ours - self.theirs))

    @property
    def better(self) -> int:
        """Cases in which ours scores higher."""
        return int(np.count_nonzero(self.ours - self.theirs > _ROUND_OFF))

    @property
    def worse(self) -> int:
        """Cases in which ours scores lower."""
        return int(np.count_nonzero(self.theirs - self.ours > _ROUND_OFF))

    @property
    def p_value(self) -> float:
        """Two-sided sign test, ties left out; NaN where all cases are ties."""
        decided = self.better + self.worse
        if not decided:
            return math.nan
        return float(stats.binomtest(self.better, decided, 0.5).pvalue)


def read_metrics(path: Path) -> dict[str, dict[str, str]]:
    """Rows of an official table by case.

    Raises:
        ValueError: a column is missing.
        OSError: it cannot be read.
    """
    rows = read_csv(path)
    missing = _NEEDED - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: no columns {sorted(missing)}; accepted: a metrics CSV")
    return {row["CaseName"]: row for row in rows}


def compare(ours: Path, theirs: Path) -> list[Difference]:
    """Compare two official tables on the cases they share.

    A case without a box round in either has a placeholder there, which is not compared: columns of
    that round are about the other cases, and left out where there are none.

    Raises:
        ValueError: no case in common, or a column is missing.
    """
    mine, other = read_metrics(ours), read_metrics(theirs)
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        raise ValueError(f"{ours} and {theirs} have no case in common")
    boxed = [c for c in shared if all(float(t[c]["RunningTime_1"]) > 0 for t in (mine, other))]
    return [
        _difference(column, cases, mine, other)
        for column in COMPARED
        if (cases := boxed if column.endswith("_1") else shared)
    ]


def format_differences(differences: Sequence[Difference]) -> str:
    """A table for a terminal."""
    lines = [f"{'':<11}{'cases':>6}{'mean diff':>11}{'better':>8}{'worse':>7}{'sign test p':>13}"]
    for d in differences:
        p = "–" if math.isnan(d.p_value) else f"{d.p_value:.4f}"
        lines.append(
            f"{d.column:<11}{len(d.cases):>6}{d.mean:>+11.4f}{d.better:>8}{d.worse:>7}{p:>13}"
        )
    return "\n".join(lines)


def _counted(row: Mapping[str, str], column: str) -> float:
    """A score as it counts: 0 where the case took too long."""
    late = float(row["TotalRunningTime"]) > float(row["runtime_upperbound"])
    return 0.0 if late else float(row[column])


def _difference(
    column: str,
    cases: Sequence[str],
    mine: Mapping[str, Mapping[str, str]],
    other: Mapping[str, Mapping[str, str]],
) -> Difference:
    ours, theirs = (
        np.array([_counted(table[case], column) for case in cases]) for table in (mine, other)
    )
    return Difference(column, tuple(cases), ours, theirs)
