"""What each post-processing step is worth: alone, left out, all together, and chosen by rules.

    python -m training.evaluation.ablation --cases VAL --cache DIR --out DIR [--weights FILE]

Open loop: the challenge's protocol is held once with post-processing off, and every variant is then
applied to what the engine handed over in each round. So the clicks are the same for all variants,
and differences are paired by case. Held again with noise on the logits, so that the masks are as
poor as the paper's. Writes ``ablation_scores.csv`` (each case, round and variant),
``ablation.csv`` (differences with intervals, by modality and round) and ``ablation.md``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.case import Case
from inference.finishing import Finisher
from inference.geometry import Triple
from inference.model.weights import find_weights
from inference.policy import modality_of
from inference.postprocessing import OBJECT_STEPS, clean_object, resolve_overlaps
from inference.refinement import ObjectLogits, merge
from training.evaluation.degradation import degrade
from training.evaluation.label_map import LabelMap
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.metrics import Scores, score
from training.evaluation.recording import load_record, record_folder, restrict
from training.evaluation.results import write_csv
from training.evaluation.summary import bootstrap

#: The paper's fifth step: where two objects claim a voxel the lower label gets it.
PRIORITY = "priority"
PAPER = (*OBJECT_STEPS, PRIORITY)

#: Name of each variant: which of the paper's steps, or None for the rules.
VARIANTS: dict[str, tuple[str, ...] | None] = {
    "off": (),
    **{f"only {step}": (step,) for step in PAPER},
    **{f"paper without {step}": tuple(s for s in PAPER if s != step) for step in PAPER},
    "paper": PAPER,
    "auto": None,
}
#: Standard deviation of the noise on logits that makes masks as poor as the paper's (DSC 0.28).
PAPER_NOISE = 4.0
ALL_ROUNDS = "all rounds"
ALL_MODALITIES = "mean of modalities"
LARGEST_LOSS = 0.002  # DSC that rules may cost a modality, at most, at the interval's lower end

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One case to score: its record, the folder with its file, rounds and levels of noise."""

    record: Path
    cases: Path
    rounds: tuple[int, ...]
    levels: tuple[float, ...]


def apply_paper_steps(
    results: Iterable[ObjectLogits], shape: Triple, steps: Sequence[str]
) -> NDArray[np.uint8]:
    """Some of the paper's steps on the objects' own masks, merged into a label map.

    Without :data:`PRIORITY` the object of the highest logit gets a voxel; voxels that a step added
    have a logit barely above 0.
    """
    results = list(results)
    logits = {result.label: result for result in results}
    cleaned: list[tuple[int, tuple[slice, slice, slice], NDArray[np.bool_]]] = []
    for result in results:
        found = clean_object(result.logits > 0, result.start, shape, steps)
        if found is not None:
            cleaned.append((result.label, *found))
    if PRIORITY in steps:
        return resolve_overlaps(cleaned, np.zeros(shape, np.uint8))
    return merge((_with_mask(logits[label], *found) for label, *found in cleaned), shape)


def _with_mask(
    result: ObjectLogits, region: tuple[slice, slice, slice], mask: NDArray[np.bool_]
) -> ObjectLogits:
    """Logits over a region that are positive in the mask alone, as high as the engine's there."""
    logits = np.full(mask.shape, -1, np.float32)
    inner, outer = [], []
    for a, n, side in zip(result.start, result.logits.shape, region, strict=True):
        low, high = max(a, side.start), min(a + n, side.stop)
        inner.append(slice(low - side.start, max(high, low) - side.start))
        outer.append(slice(low - a, max(high, low) - a))
    logits[tuple(inner)] = result.logits[tuple(outer)]
    logits = np.where(mask, np.maximum(logits, 0.01), -1).astype(np.float32)
    z, y, x = (side.start for side in region)
    return ObjectLogits(result.label, (z, y, x), logits)


def score_case(task: Task) -> list[Row]:
    """Scores of all variants on one case: one row a level, round and variant."""
    record = load_record(task.record)
    case = restrict(load_labelled_case(task.cases / record.name), record.labels)
    D, H, W = case.reference.voxels.shape
    x, y, z = case.stored_spacing
    rows = []
    for level in task.levels:
        for turn in task.rounds:
            if turn not in record.rounds:
                continue
            prompts = tuple(one for one, _ in record.rounds[turn])
            results = [
                degrade(result, (D, H, W), level, f"{record.name} {turn} {result.label}")
                for _, result in record.rounds[turn]
            ]
            given = Case(record.name, case.arrays["imgs"], (z, y, x), prompts)
            known: dict[bytes, Scores] = {}  # many variants leave many masks as they are
            for name, steps in VARIANTS.items():
                if steps is None:
                    labels = Finisher("auto")(results, given)
                elif steps:
                    labels = apply_paper_steps(results, (D, H, W), steps)
                else:
                    labels = merge(results, (D, H, W))
                key = labels.tobytes()
                if key not in known:
                    known[key] = score(case.reference, LabelMap.of(labels), case.stored_spacing)
                rows.append(
                    {
                        "case": record.name,
                        "noise": level,
                        "round": turn,
                        "variant": name,
                        "dsc": known[key].mean_dsc,
                        "nsd": known[key].mean_nsd,
                    }
                )
    return rows


def summarise_ablation(rows: Sequence[Row]) -> list[Row]:
    """Mean and paired difference to ``off`` of each variant, by noise, modality, round and metric.

    Differences come with bootstrap 95 % intervals over cases; ``all rounds`` is the mean over a
    case's rounds, ``mean of modalities`` weighs the modalities alike.
    """
    table: list[Row] = []
    for level in dict.fromkeys(row["noise"] for row in rows):
        at_level = [row for row in rows if row["noise"] == level]
        rounds = sorted({row["round"] for row in at_level})
        cases = sorted({row["case"] for row in at_level})
        modality = np.array([modality_of(name) for name in cases])
        groups: dict[str, list[NDArray[np.bool_]]] = {
            name: [modality == name] for name in sorted(set(modality))
        }
        groups[ALL_MODALITIES] = [modality == name for name in sorted(set(modality))]
        for metric in ("dsc", "nsd"):
            scores = {variant: _by_round(at_level, variant, metric, cases) for variant in VARIANTS}
            for variant, values in scores.items():
                gains = values - scores["off"]
                for group, strata in groups.items():
                    columns = (*(_round_name(turn) for turn in rounds), ALL_ROUNDS)
                    means = bootstrap(_with_mean(values[:, rounds]), strata)
                    paired = bootstrap(_with_mean(gains[:, rounds]), strata)
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
    known = ~np.isnan(values)
    mean = np.where(known, values, 0).sum(1) / known.sum(1)
    return np.column_stack((values, mean))


def _round_name(turn: int) -> str:
    return f"click {turn}" if turn else "box"


def is_earned(table: Sequence[Row]) -> bool:
    """Whether the rules deserve to be the default.

    With the network as it is they cost no modality more than 0.002 DSC (lower end of the paired
    interval over all rounds), and gain in the mean of the modalities.
    """
    rows = [
        row
        for row in table
        if (row["noise"], row["variant"], row["round"], row["metric"])
        == (0.0, "auto", ALL_ROUNDS, "DSC")
    ]
    harmless = all(row["ci95_low"] >= -LARGEST_LOSS for row in rows)
    mean = next(row["gain"] for row in rows if row["modality"] == ALL_MODALITIES)
    return harmless and mean > 0


def format_ablation(table: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table a level of noise and metric; a row a variant, a column a modality."""
    parts = []
    for level in dict.fromkeys(float(row["noise"]) for row in table):
        for metric in ("DSC", "NSD"):
            rows = [
                row
                for row in table
                if float(row["noise"]) == level
                and row["metric"] == metric
                and row["round"] == ALL_ROUNDS
            ]
            modalities = list(dict.fromkeys(str(row["modality"]) for row in rows))
            quality = "the network as it is" if not level else f"noise {level:g} on its logits"
            counts = {str(row["modality"]): row["cases"] for row in rows}
            head = " | ".join(f"{name} ({counts[name]})" for name in modalities)
            lines = [
                f"{metric}, {quality}: difference to off in hundredths, mean over the rounds, with "
                "its 95 % interval",
                "",
                f"| | {head} |",
                "|---|" + "--:|" * len(modalities),
            ]
            for variant in VARIANTS:
                cells = []
                for name in modalities:
                    row = next(r for r in rows if r["variant"] == variant and r["modality"] == name)
                    cells.append(_cell(row, variant == "off"))
                lines.append(f"| {variant} | " + " | ".join(cells) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(row: Mapping[str, Any], absolute: bool) -> str:
    if absolute:
        return f"{float(row['mean']):.4f}"
    gain, low, high = (100 * float(row[key]) for key in ("gain", "ci95_low", "ci95_high"))
    return f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]"


def run_tasks(tasks: Sequence[Task], jobs: int, say: Callable[[str], None]) -> list[Row]:
    """Score all cases, ``jobs`` at a time."""
    rows: list[Row] = []
    if jobs == 1:
        for number, task in enumerate(tasks, 1):
            rows += score_case(task)
            say(f"{number}/{len(tasks)} {task.record.name}")
        return rows
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for task, found in zip(tasks, pool.map(score_case, tasks), strict=True):
            rows += found
            say(task.record.name)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Record where needed, score all variants and write the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.ablation", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--cases", type=Path, required=True, metavar="DIR", help="challenge files with gts")
    add("--cache", type=Path, required=True, metavar="DIR", help="where records are kept")
    add("--out", type=Path, required=True, metavar="DIR", help="where the tables go")
    add("--weights", default="default", metavar="FILE", help="bundle, or its name")
    add("--objects", type=int, default=255, metavar="N", help="most classes of a case")
    add("--rounds", type=int, nargs="+", default=[0, 1, 3, 5], metavar="N", help="0: the box round")
    add("--noise", type=float, nargs="+", default=[0.0, PAPER_NOISE], metavar="SD")
    add("--jobs", type=int, default=1, metavar="N", help="cases at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        records = record_folder(
            options.cases,
            options.cache,
            weights=find_weights(options.weights),
            objects=options.objects,
        )
        rounds, levels = tuple(options.rounds), tuple(options.noise)
        tasks = [Task(record, options.cases, rounds, levels) for record in records]
        rows = run_tasks(tasks, options.jobs, lambda line: print(line, flush=True))
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "ablation_scores.csv", rows)
        table = summarise_ablation(rows)
        write_csv(options.out / "ablation.csv", table)
        text = format_ablation(table)
        (options.out / "ablation.md").write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}")
    if 0.0 in levels:
        print(f"auto {'earns' if is_earned(table) else 'does not earn'} to be the default")
    return 0


if __name__ == "__main__":
    sys.exit(main())
