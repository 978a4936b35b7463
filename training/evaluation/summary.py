"""Scores by modality, structure, object size and round, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.case import MODALITIES, modality_of
from training.evaluation.intervals import mean_intervals, mean_of_known
from training.evaluation.metrics import area_under_curve
from training.evaluation.protocol import ROUNDS, CaseResult

METRICS = ("dsc", "nsd")
COLUMNS = ("box", *(f"click {n}" for n in range(1, ROUNDS)), "AUC", "Final")
MEAN_OF_MODALITIES, MEAN_OF_CASES = "mean of modalities", "mean of cases"
_DECILES = 10


@dataclass(frozen=True)
class Table:
    """Scores of comparable things (cases or objects): one row each, by metric.

    Attributes:
        modality: of each row.
        structure: of each row; empty for cases.
        voxels: volume of each row's object; 0 for cases.
        scores: metric -> (rows, 8) in the order of ``COLUMNS``; NaN without a box round.
    """

    modality: list[str]
    structure: list[str]
    voxels: NDArray[np.int64]
    scores: dict[str, NDArray[np.float64]]


def modality_in_tables(name: str) -> str:
    """The modality of a case, by its file name; ``other`` where that begins with none."""
    modality = modality_of(name)
    return modality if modality in MODALITIES else "other"


def case_table(results: Sequence[CaseResult]) -> Table:
    """One row a case: its mean over the classes; 0 throughout where it took too long."""
    scores = {
        metric: np.array([_columns(r, r.case_scores(metric)) for r in results], np.float64).reshape(
            -1, len(COLUMNS)
        )
        for metric in METRICS
    }
    modality = [modality_in_tables(r.name) for r in results]
    return Table(modality, [""] * len(results), np.zeros(len(results), np.int64), scores)


def object_table(results: Sequence[CaseResult]) -> Table:
    """One row an object: a class of a case."""
    every = [(r, i) for r in results for i in range(len(r.labels))]
    scores = {
        metric: np.array(
            [_columns(r, r.class_scores(metric, i)) for r, i in every], np.float64
        ).reshape(-1, len(COLUMNS))
        for metric in METRICS
    }
    return Table(
        [modality_in_tables(r.name) for r, _ in every],
        [r.structures[i] for r, i in every],
        np.array([r.voxels[i] for r, i in every], np.int64),
        scores,
    )


def _columns(result: CaseResult, rounds: list[float]) -> list[float]:
    rounds = result.counted(rounds)
    first = rounds[0] if result.has_boxes else float("nan")
    return [first, *rounds[1:], area_under_curve(rounds), rounds[-1]]


def summarise(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Rows of ``summary.csv``: mean and its 95 % interval of each group, metric and column.

    Groups are all cases, the mean of the modalities' means, each modality (a row a case), each
    structure and each decile of object size (a row an object).
    """
    cases, objects = case_table(results), object_table(results)
    rows = []
    groups: list[tuple[str, str, Table, list[NDArray[np.bool_]]]] = []
    everything = np.ones(len(results), bool)
    modalities = sorted(set(cases.modality))
    by_modality = [np.array(cases.modality) == m for m in modalities]
    groups.append(("all", "cases", cases, [everything]))
    groups.append(("all", MEAN_OF_MODALITIES, cases, by_modality))
    groups += [
        ("modality", m, cases, [mask]) for m, mask in zip(modalities, by_modality, strict=True)
    ]
    names = [
        f"{m} {s or 'unnamed'}" for m, s in zip(objects.modality, objects.structure, strict=True)
    ]
    groups += [("structure", s, objects, [np.array(names) == s]) for s in sorted(set(names))]
    for label, mask in _deciles(objects.voxels):
        groups.append(("object size", label, objects, [mask]))
    for grouping, group, table, strata in groups:
        for metric in METRICS:
            values = table.scores[metric]
            for column, (mean, low, high, count) in zip(
                COLUMNS, mean_intervals(values, strata), strict=True
            ):
                if count:
                    rows.append(
                        {
                            "grouping": grouping,
                            "group": group,
                            "metric": metric.upper(),
                            "round": column,
                            "mean": mean,
                            "ci95_low": low,
                            "ci95_high": high,
                            "n": count,
                        }
                    )
    return rows


def _deciles(voxels: NDArray[np.int64]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Objects by tenth of the size distribution, smallest first; fewer groups for few objects."""
    edges = np.unique(np.quantile(voxels, np.linspace(0, 1, _DECILES + 1)))
    bins = np.clip(np.searchsorted(edges, voxels, side="right") - 1, 0, max(len(edges) - 2, 0))
    groups = []
    for number in range(max(len(edges) - 1, 1)):
        mask = bins == number
        if mask.any():
            groups.append((f"{voxels[mask].min()}-{voxels[mask].max()} voxels", mask))
    return groups


def modality_rows(
    results: Sequence[CaseResult], metric: str
) -> list[tuple[str, int, NDArray[np.float64]]]:
    """Name, number of cases and means (in the order of ``COLUMNS``) of each modality, then of all.

    Args:
        results: any number of cases.
        metric: ``dsc`` or ``nsd``.
    """
    table = case_table(results)
    values = table.scores[metric]
    rows = []
    for modality in sorted(set(table.modality)):
        of_it = values[np.array(table.modality) == modality]
        rows.append((modality, len(of_it), mean_of_known(of_it, 0)))
    if len(rows) > 1:
        means = np.array([mean for _, _, mean in rows])
        rows.append((MEAN_OF_MODALITIES, len(results), mean_of_known(means, 0)))
        rows.append((MEAN_OF_CASES, len(results), mean_of_known(values, 0)))
    return rows


def format_table(results: Sequence[CaseResult]) -> str:
    """Modality by round, for a terminal: DSC and NSD of the box and of each click round."""
    blocks = []
    for metric in METRICS:
        lines = [f"{metric.upper():<20}{'cases':>6}" + "".join(f"{c:>9}" for c in COLUMNS)]
        for name, count, values in modality_rows(results, metric):
            cells = "".join("        –" if np.isnan(v) else f"{v:9.4f}" for v in values)
            lines.append(f"{name:<20}{count:>6}{cells}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def stress_rows(runs: Mapping[str, Sequence[CaseResult]]) -> list[dict[str, Any]]:
    """Runs with sloppy prompts (``NAME@VARIANT``) beside the exact one: what a user loses.

    Only cases of both runs count; scores are means over cases. Without boxes the box column is
    that of the first click in both.
    """
    rows: list[dict[str, Any]] = []
    for name, results in runs.items():
        base, _, variant = name.partition("@")
        if not variant or base not in runs:
            continue
        exact = {r.name: r for r in runs[base]}
        pairs = [(r, exact[r.name]) for r in results if r.name in exact]
        if not pairs:
            continue
        row: dict[str, Any] = {"run": base, "prompts": variant, "cases": len(pairs)}
        for metric in METRICS:
            for column, turn in (("first", None), ("final", -1)):
                scores = []
                for one, other in pairs:
                    turn_held = turn if turn is not None else int(not one.has_boxes)
                    scores.append(
                        [r.counted(r.case_scores(metric))[turn_held] for r in (one, other)]
                    )
                mean, mean_exact = np.mean(scores, axis=0)
                row[f"{metric.upper()}_{column}"] = float(mean)
                row[f"{metric.upper()}_{column}_loss"] = float(mean_exact - mean)
        rows.append(row)
    return rows


def format_stress(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal."""
    header = f"{'':<34}{'DSC first':>10}{'loss':>8}{'final':>8}{'loss':>8}"
    lines = [header + f"{'NSD first':>11}{'loss':>8}{'final':>8}{'loss':>8}"]
    for row in rows:
        values = [
            row[f"{m.upper()}_{c}{k}"]
            for m in METRICS
            for c in ("first", "final")
            for k in ("", "_loss")
        ]
        widths = (10, 8, 8, 8, 11, 8, 8, 8)
        cells = "".join(f"{v:{w}.4f}" for v, w in zip(values, widths, strict=True))
        lines.append(f"{row['run'] + ' ' + row['prompts']:<34}{cells}")
    return "\n".join(lines)
