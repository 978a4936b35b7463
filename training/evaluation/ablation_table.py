"""The ablation's tables: what each variant of post-processing gains, by modality and by round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.intervals import mean_intervals, mean_of_known
from training.evaluation.summary import MEAN_OF_MODALITIES, modality_in_tables

#: Name of the variant all others are compared with, and of the fitted rules.
OFF, AUTO = "off", "auto"
ALL_ROUNDS = "all rounds"
LARGEST_LOSS = 0.002  # DSC that rules may cost a modality, at most, at the interval's lower end

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Text to be set as a table: the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table for a README."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self.header, *self.rows)]
        lines.insert(1, "|---|" + "--:|" * (len(self.header) - 1))
        return "\n".join((self.title, "", *lines, ""))


def summarise_ablation(rows: Sequence[Row]) -> list[Row]:
    """Mean and paired difference to ``off`` of each variant, by noise, modality, round and metric.

    Differences come with 95 % intervals over cases; ``all rounds`` is the mean over a
    case's rounds, ``mean of modalities`` weighs the modalities alike.

    Args:
        rows: one a case, noise, round and variant, with ``dsc`` and ``nsd``.
    """
    table: list[Row] = []
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for level in dict.fromkeys(row["noise"] for row in rows):
        at_level = [row for row in rows if row["noise"] == level]
        rounds = sorted({row["round"] for row in at_level})
        cases = sorted({row["case"] for row in at_level})
        modality = np.array([modality_in_tables(name) for name in cases])
        groups: dict[str, list[NDArray[np.bool_]]] = {
            name: [modality == name] for name in sorted(set(modality))
        }
        groups[MEAN_OF_MODALITIES] = [modality == name for name in sorted(set(modality))]
        columns = (*(_round_name(turn) for turn in rounds), ALL_ROUNDS)
        for metric in ("dsc", "nsd"):
            scores = {variant: _by_round(at_level, variant, metric, cases) for variant in variants}
            for variant, values in scores.items():
                gains = values - scores[OFF]
                for group, strata in groups.items():
                    means = mean_intervals(_with_mean(values[:, rounds]), strata)
                    paired = mean_intervals(_with_mean(gains[:, rounds]), strata)
                    for column, (mean, *_), (gain, low, high, count) in zip(
                        columns, means, paired, strict=True
                    ):
                        table.append(
                            {
                                "noise": level,
                                "variant": variant,
                                "modality": group,
                                "round": column,
                                "metric": metric.upper(),
                                "mean": mean,
                                "gain": gain,
                                "ci95_low": low,
                                "ci95_high": high,
                                "cases": count,
                            }
                        )
    return table


def _by_round(
    rows: Sequence[Row], variant: str, metric: str, cases: Sequence[str]
) -> NDArray[np.float64]:
    """(cases, rounds) scores of a variant, NaN where a round was not held."""
    values = np.full((len(cases), 1 + max(row["round"] for row in rows)), np.nan)
    index = {name: i for i, name in enumerate(cases)}
    for row in rows:
        if row["variant"] == variant:
            values[index[row["case"]], row["round"]] = row[metric]
    return values


def _with_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """One column more: the mean of the others, as far as they are known."""
    return np.column_stack((values, mean_of_known(values, 1)))


def _round_name(turn: int) -> str:
    return f"click {turn}" if turn else "box"


def is_earned(table: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rules deserve to be the default.

    With the network as it is they cost no modality more than 0.002 DSC (lower end of the paired
    interval over all rounds, which takes two cases), and gain in the mean of the modalities.
    """
    rows = [
        row
        for row in table
        if (row["noise"], row["variant"], row["round"], row["metric"])
        == (0.0, AUTO, ALL_ROUNDS, "DSC")
    ]
    harmless = all(row["ci95_low"] >= -LARGEST_LOSS for row in rows)
    mean = next(row["gain"] for row in rows if row["modality"] == MEAN_OF_MODALITIES)
    return harmless and mean > 0


def ablation_tables(table: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Tables to be read: for each noise and metric one by modality and one by round.

    Args:
        table: rows of :func:`summarise_ablation`, also as text, out of a CSV.
    """
    tables = []
    for level in dict.fromkeys(float(row["noise"]) for row in table):
        quality = "the network as it is" if not level else f"noise {level:g} on its logits"
        for metric in ("DSC", "NSD"):
            rows = [
                row for row in table if float(row["noise"]) == level and row["metric"] == metric
            ]
            title = f"{metric}, {quality}, {{}}: {OFF}, and differences to it in hundredths"
            by_modality = [row for row in rows if row["round"] == ALL_ROUNDS]
            by_round = [row for row in rows if row["modality"] == MEAN_OF_MODALITIES]
            tables.append(_table(title.format("mean over the rounds"), by_modality, "modality"))
            tables.append(_table(title.format(MEAN_OF_MODALITIES), by_round, "round"))
    return tables


def digest(table: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for a README: a table a noise, DSC by modality and the mean NSD.

    Differences are bold where their interval leaves 0 out; the paper's chain and the rules have
    their intervals.
    """
    parts = []
    for level in dict.fromkeys(float(row["noise"]) for row in table):
        rows = {
            (str(row["variant"]), str(row["modality"]), str(row["metric"])): row
            for row in table
            if float(row["noise"]) == level and row["round"] == ALL_ROUNDS
        }
        modalities = list(dict.fromkeys(modality for _, modality, _ in rows))
        columns = [*((modality, "DSC") for modality in modalities), (MEAN_OF_MODALITIES, "NSD")]
        heads = [f"{name} ({rows[OFF, name, metric]['cases']})" for name, metric in columns]
        quality = "The network as it is" if not level else f"Noise {level:g} on its logits"
        lines = [
            f"| {quality}: DSC | {' | '.join(heads[:-2])} | mean | mean NSD |",
            "|---|" + "--:|" * len(columns),
        ]
        for variant in dict.fromkeys(name for name, *_ in rows):
            cells = (_short_cell(rows[variant, *column]) for column in columns)
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _short_cell(row: Mapping[str, Any]) -> str:
    if row["variant"] == OFF:
        return f"{float(row['mean']):.3f}"
    gain, low, high = (100 * float(row[key]) for key in ("gain", "ci95_low", "ci95_high"))
    text = f"**{gain:+.2f}**" if low > 0 or high < 0 else f"{gain:+.2f}"
    return text + _ends(low, high) if row["variant"] in ("paper", AUTO) else text


def _table(title: str, rows: Sequence[Mapping[str, Any]], across: str) -> Table:
    """A row a variant, a column a value of ``across``."""
    cells = {(str(row["variant"]), str(row[across])): row for row in rows}
    columns = list(dict.fromkeys(column for _, column in cells))
    variants = list(dict.fromkeys(variant for variant, _ in cells))
    header = (f"{column} ({cells[OFF, column]['cases']})" for column in columns)
    lines = ((name, *(_cell(cells[name, column]) for column in columns)) for name in variants)
    return Table(title, ("", *header), tuple(lines))


def _cell(row: Mapping[str, Any]) -> str:
    if row["variant"] == OFF:
        return f"{float(row['mean']):.4f}"
    gain, low, high = (100 * float(row[key]) for key in ("gain", "ci95_low", "ci95_high"))
    return f"{gain:+.2f}{_ends(low, high)}"


def _ends(low: float, high: float) -> str:
    """An interval; nothing where a single case tells none."""
    return "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
