"""What an evaluation leaves behind: a file a case, the official CSV, and a summary with intervals.

The file of a case is written when the case is done, under a temporary name first. An interrupted
run continues from these files, and everything else is made from them.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.labelled_case import modality_of
from training.evaluation.metrics import area_under_curve
from training.evaluation.protocol import ROUNDS, CaseResult, official_row

METRICS = ("dsc", "nsd")
COLUMNS = ("box", *(f"click {n}" for n in range(1, ROUNDS)), "AUC", "Final")
_RESAMPLES = 2000
_DECILES = 10


class RunFolder:
    """Where one run of one predictor keeps its files.

    ``NAME_metrics.csv`` is the official table; ``NAME/`` holds a JSON and the last label map of
    each case, and ``settings.json``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Use ``folder``; files of other runs in it stay as they are."""
        self.name = name
        self.metrics_csv = folder / f"{name}_metrics.csv"
        self._cases = folder / name
        self._settings = self._cases / "settings.json"

    def open(self, settings: Mapping[str, Any], *, force: bool) -> None:
        """Start or continue a run.

        Args:
            settings: whatever the scores depend on; plain JSON values.
            force: forget the cases already done.

        Raises:
            ValueError: the folder holds cases of a run with other settings.
        """
        self._cases.mkdir(parents=True, exist_ok=True)
        if force:
            for path in self._cases.iterdir():
                path.unlink()
        if self._settings.is_file():
            before = json.loads(self._settings.read_text())
            differing = [k for k in {*before, *settings} if before.get(k) != settings.get(k)]
            if differing:
                changes = ", ".join(
                    f"{k} {before.get(k)!r} -> {settings.get(k)!r}" for k in sorted(differing)
                )
                raise ValueError(
                    f"{self._cases} holds a run with other settings ({changes}); accepted: the "
                    "same settings, another --out or --name, or --force to start over"
                )
        _write(self._settings, json.dumps(settings, indent=1).encode())

    def settings(self) -> dict[str, Any]:
        """What the run depends on."""
        return dict(json.loads(self._settings.read_text()))

    def save(self, result: CaseResult, segs: NDArray[np.uint8]) -> None:
        """Keep a finished case."""
        final = self._segs(result.name)
        part = final.with_name(f".{final.name}")
        with part.open("wb") as file:
            np.savez_compressed(file, segs=segs)
        part.replace(final)
        # Last: a case whose JSON exists is done.
        _write(self._json(result.name), json.dumps(result.to_json()).encode())

    def load(self, name: str) -> CaseResult | None:
        """A finished case, or None."""
        path = self._json(name)
        return CaseResult.from_json(json.loads(path.read_text())) if path.is_file() else None

    def load_segs(self, name: str) -> NDArray[np.uint8]:
        """The last label map of a finished case."""
        with np.load(self._segs(name)) as file:
            return np.asarray(file["segs"])

    def write_metrics(self, results: Iterable[CaseResult]) -> None:
        """Write the official table, sorted by case name."""
        rows = [official_row(result) for result in sorted(results, key=lambda r: r.name)]
        write_csv(self.metrics_csv, rows)

    def _json(self, name: str) -> Path:
        return self._cases / f"{name.removesuffix('.npz')}.json"

    def _segs(self, name: str) -> Path:
        return self._cases / f"{name.removesuffix('.npz')}.npz"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys; floats in full, so that reading gives them back exactly."""
    part = path.with_name(f".{path.name}")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


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


def case_table(results: Sequence[CaseResult]) -> Table:
    """One row a case: its mean over the classes; 0 throughout where it took too long."""
    scores = {
        metric: np.array([_columns(r, r.case_scores(metric)) for r in results], np.float64).reshape(
            -1, len(COLUMNS)
        )
        for metric in METRICS
    }
    modality = [modality_of(r.name) for r in results]
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
        [modality_of(r.name) for r, _ in every],
        [r.structures[i] for r, i in every],
        np.array([r.voxels[i] for r, i in every], np.int64),
        scores,
    )


def _columns(result: CaseResult, rounds: list[float]) -> list[float]:
    if result.seconds > result.seconds_allowed:
        rounds = [0.0] * len(rounds)
    first = rounds[0] if result.has_boxes else float("nan")
    return [first, *rounds[1:], area_under_curve(rounds), rounds[-1]]


def summarise(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Rows of ``summary.csv``: mean and bootstrap 95 % interval of each group, metric and column.

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
    groups.append(("all", "mean of modalities", cases, by_modality))
    groups += [
        ("modality", m, cases, [mask]) for m, mask in zip(modalities, by_modality, strict=True)
    ]
    names = [f"{m} {s}" for m, s in zip(objects.modality, objects.structure, strict=True)]
    groups += [("structure", s, objects, [np.array(names) == s]) for s in sorted(set(names))]
    for label, mask in _deciles(objects.voxels):
        groups.append(("object size", label, objects, [mask]))
    for grouping, group, table, strata in groups:
        for metric in METRICS:
            values = table.scores[metric]
            for column, (mean, low, high, count) in zip(
                COLUMNS, bootstrap(values, strata), strict=True
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


def bootstrap(
    values: NDArray[np.float64], strata: Sequence[NDArray[np.bool_]]
) -> list[tuple[float, float, float, int]]:
    """Mean, 95 % percentile interval and count of each column of ``values``.

    Args:
        values: (rows, columns); NaN rows of a column are left out.
        strata: masks of rows; the statistic is the mean of their means, each resampled by itself.
    """
    random = np.random.default_rng(0)
    result = []
    for column in values.T:
        parts = [column[mask][~np.isnan(column[mask])] for mask in strata]
        parts = [part for part in parts if len(part)]
        if not parts:
            result.append((math.nan, math.nan, math.nan, 0))
            continue
        draws = np.mean(
            [
                part[random.integers(len(part), size=(_RESAMPLES, len(part)))].mean(1)
                for part in parts
            ],
            axis=0,
        )
        low, high = np.quantile(draws, (0.025, 0.975))
        mean = np.mean([part.mean() for part in parts])
        result.append((float(mean), float(low), float(high), sum(map(len, parts))))
    return result


def format_table(results: Sequence[CaseResult]) -> str:
    """Modality by round, for a terminal: DSC and NSD of the box and of each click round."""
    table = case_table(results)
    modalities = sorted(set(table.modality))
    masks = {m: np.array(table.modality) == m for m in modalities}
    lines = []
    for metric in METRICS:
        header = "".join(f"{c:>9}" for c in COLUMNS)
        lines.append(f"{metric.upper():<22}{'cases':>6}{header}")
        means = []
        for modality in modalities:
            values = table.scores[metric][masks[modality]]
            means.append(_mean_rows(values))
            lines.append(_line(modality, len(values), means[-1]))
        if len(modalities) > 1:
            lines.append(_line("mean of modalities", len(results), _mean_rows(np.array(means))))
            lines.append(_line("mean of cases", len(results), _mean_rows(table.scores[metric])))
        lines.append("")
    return "\n".join(lines[:-1])


def _mean_rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, columns) -> (columns,) mean of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _line(name: str, count: int, values: NDArray[np.float64]) -> str:
    cells = "".join("        –" if np.isnan(v) else f"{v:9.4f}" for v in values)
    return f"{name:<22}{count:>6}{cells}"


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
