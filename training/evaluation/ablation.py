"""What each post-processing step is worth: alone, left out, all together, and chosen by rules.

    python -m training.evaluation.ablation --cases VAL --cache DIR --out DIR [--weights FILE]

Open loop: the challenge's protocol is held once with post-processing off, and every variant is then
applied to what the engine handed over in each round. So the clicks are the same for all variants,
and differences are paired by case. Held again with noise on the logits, so that the masks are as
poor as the paper's. Writes ``ablation_scores.csv`` (each case, round and variant),
``ablation.csv`` (differences with intervals, by modality and round), ``ablation.md`` (the same to
be read) and ``report.html``, the page about all that the folder holds: in the folder of an
evaluation the tables appear in its report. ``--document README.md`` puts a digest there.

Records are kept in ``--cache``, by the content of the weights and of the code.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.case import MAX_CLASSES, Case
from inference.finishing import Finisher, paper_masks
from inference.geometry import Triple
from inference.model.weights import find_weights, sha256_of
from inference.postprocessing import OBJECT_STEPS, resolve_overlaps
from inference.refinement import ObjectLogits, merge
from training.evaluation.ablation_table import (
    AUTO,
    OFF,
    Row,
    ablation_tables,
    digest,
    is_earned,
    summarise_ablation,
)
from training.evaluation.degradation import degrade
from training.evaluation.label_map import LabelMap
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.metrics import Scores, score
from training.evaluation.protocol import ROUNDS
from training.evaluation.recording import load_record, record_folder, restrict
from training.evaluation.report import write_report
from training.evaluation.results import list_runs, write_csv
from training.marked_text import replace_marked, split_marked

#: The paper's fifth step: where two objects claim a voxel the lower label gets it.
PRIORITY = "priority"
PAPER = (*OBJECT_STEPS, PRIORITY)

#: Name of each variant: which of the paper's steps, or None for the rules.
VARIANTS: dict[str, tuple[str, ...] | None] = {
    OFF: (),
    **{f"only {step}": (step,) for step in PAPER},
    **{f"paper without {step}": tuple(s for s in PAPER if s != step) for step in PAPER},
    "paper": PAPER,
    AUTO: None,
}
#: What the digest lies between.
BEGIN = "<!-- ablation: begin (written by training.evaluation.ablation) -->"
END = "<!-- ablation: end -->"
#: Standard deviation of the noise on logits that makes masks about as poor as the paper's: a mean
#: DSC of 0.33, where the paper has 0.28.
PAPER_NOISE = 4.0


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
    logits = {result.label: result for result in results}
    cleaned = paper_masks(logits.values(), shape, steps)
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
            given = Case(record.name, case.arrays["imgs"], case.spacing_mm, prompts)
            known: dict[bytes, Scores] = {}  # many variants leave many masks as they are
            for name, steps in VARIANTS.items():
                if steps is None:
                    labels = Finisher(AUTO)(results, given)
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
                        "objects": len(record.labels),
                        "noise": level,
                        "round": turn,
                        "variant": name,
                        "dsc": known[key].mean_dsc,
                        "nsd": known[key].mean_nsd,
                    }
                )
    return rows


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
    add("--objects", type=int, default=MAX_CLASSES, metavar="N", help="most classes of a case")
    add("--rounds", type=int, nargs="+", default=[0, 1, 3, 5], metavar="N", help="0: the box round")
    add("--noise", type=float, nargs="+", default=[0.0, PAPER_NOISE], metavar="SD")
    add("--document", type=Path, metavar="MD", help="also put a digest between its markers")
    add("--jobs", type=int, default=1, metavar="N", help="cases at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}; accepted: at least 1")
    try:
        unknown = sorted(set(options.rounds) - set(range(ROUNDS)))
        if unknown:
            raise ValueError(f"--rounds {unknown[0]}; accepted: 0 (the box round) to {ROUNDS - 1}")
        if options.document is not None:
            split_marked(options.document, BEGIN, END)  # now, not after hours of work
        options.out.mkdir(parents=True, exist_ok=True)
        weights = find_weights(options.weights)
        records = record_folder(
            options.cases, options.cache, weights=weights, objects=options.objects
        )
        rounds, levels = tuple(options.rounds), tuple(options.noise)
        tasks = [Task(record, options.cases, rounds, levels) for record in records]
        rows = run_tasks(tasks, options.jobs, lambda line: print(line, flush=True))
        if not rows:
            raise ValueError(f"--rounds 0: no case has boxes; accepted: also 1 to {ROUNDS - 1}")
        write_csv(options.out / "ablation_scores.csv", rows)
        table = summarise_ablation(rows)
        write_csv(options.out / "ablation.csv", table)
        text = "\n".join(found.markdown() for found in ablation_tables(table))
        objects = max(row["objects"] for row in rows)
        head = (
            f"Weights `{sha256_of(weights)[:12]}`, {len(records)} cases with up to {objects} "
            "objects each; means over\nthe rounds; differences to off in hundredths."
        )
        (options.out / "ablation.md").write_text(f"{head}\n\n{text}", encoding="utf-8")
        write_report(options.out / "report.html", list_runs(options.out), {})
        if options.document is not None:
            replace_marked(options.document, BEGIN, END, f"{head}\n\n{digest(table)}")
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}")
    if 0.0 in levels:
        print(f"{AUTO} {'earns' if is_earned(table) else 'does not earn'} to be the default")
    return 0


if __name__ == "__main__":
    sys.exit(main())
