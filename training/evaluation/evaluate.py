"""Command line: score a predictor on a folder of labelled cases, as the challenge does.

Writes ``OUT/NAME_metrics.csv`` with the challenge's columns; ``OUT/summary.csv`` and
``OUT/report.html`` are about all runs in the folder. Prints a table of modality by round. Exit
status: 0 all predictions came back, 1 some failed, 2 nothing could start.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from inference.finishing import DEFAULT, POSTPROCESSING
from inference.model.weights import find_weights, sha256_of
from training.evaluation.code_version import code_of
from training.evaluation.comparison import (
    Difference,
    compare,
    format_differences,
    read_metrics,
)
from training.evaluation.labelled_case import load_labelled_case
from training.evaluation.metrics import area_under_curve
from training.evaluation.perturbation import VARIANTS, BoxesError, PromptVariant
from training.evaluation.predictors import (
    Predictor,
    PredictorChoice,
    build_predictor,
    check_choice,
    image_id,
)
from training.evaluation.protocol import CaseResult, run_case
from training.evaluation.results import CASE_REFUSED, RunFolder, list_runs, write_csv
from training.evaluation.summary import format_stress, format_table, stress_rows, summarise
from training.manifest import case_files, read_structures

#: A case's result and last label map, or why it could not be read.
_Outcome = tuple[CaseResult, NDArray[np.uint8]] | str


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.evaluate", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--cases", type=Path, required=True, metavar="DIR", help="folder of npz cases with gts")
    add("--references", type=Path, metavar="DIR", help="folder of npz with gts, if cases have none")
    add("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    add(
        "--predictor",
        default="segmenter",
        help="comma-separated: segmenter, command (see --command), image (see --image), and the "
        "baselines box, ellipsoid, likelihood, random-walker, geodesic; all: segmenter and "
        "baselines (default: %(default)s)",
    )
    add("--name", help="name of the run (default: the predictor's)")
    add("--weights", metavar="FILE", help="segmenter: weights, as for predict.sh")
    add("--sam", metavar="FILE", help="segmenter: SAM-Med3D checkpoint, as for predict.sh")
    add("--refiner", choices=("on", "off"), default="on", help="segmenter: as for predict.sh")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="segmenter: device")
    add(
        "--postprocess",
        choices=POSTPROCESSING,
        default=DEFAULT,
        help="segmenter: as for predict.sh (default: %(default)s)",
    )
    add("--command", help="command line to evaluate, with {inputs} and {outputs} for its folders")
    add("--image", help="name of the container image to evaluate")
    add("--no-boxes", action="store_true", help="drop the boxes of every case")
    add("--prompts", default="exact", help=f"imperfect prompts: all, {', '.join(VARIANTS)}")
    add("--limit", type=int, metavar="N", help="only N cases, spread over the sorted list")
    add("--jobs", type=int, default=1, metavar="N", help="cases at a time (default: %(default)s)")
    add("--compare", type=Path, metavar="CSV", help="another run's metrics, compared case by case")
    add(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html (default: yes)",
    )
    add("--force", action="store_true", help="start over, also if settings differ from last time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}; accepted: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    options = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    failures = 0
    try:
        variants = _variants(options.prompts)
        paths = _list_cases(options.cases, options.limit)
        read_structures(options.cases)  # or each case would tell what is wrong with it
        kinds = _kinds(options.predictor)
        if options.name is not None:
            _check_name(options.name, kinds)
        runs = _plan(kinds, variants, options)
        _check_comparison(options.compare, [run for *_, run in runs], paths)
        options.out.mkdir(parents=True, exist_ok=True)
        differences = {}
        for choice, variant, run in runs:
            run.open(_settings(choice, options, variant), force=options.force)
            results, unread = _evaluate(run, paths, choice, options, variant)
            failures += unread
            if not results:
                raise ValueError(f"cases folder {options.cases}: no case that can be evaluated")
            run.write_metrics(results)
            failures += _print_results(run, results)
            if options.compare is not None:
                differences[run.name] = compare(run.metrics_csv, options.compare)
                print(f"against {options.compare}\n{format_differences(differences[run.name])}")
        _write_pages(options, differences)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failures else 0


def _kinds(text: str) -> list[str]:
    """Names of predictors; ``all`` is the segmenter and every baseline."""
    if text != "all":
        return text.split(",")
    from training.evaluation.baselines import BASELINES

    return ["segmenter", *BASELINES]


def _check_name(name: str, kinds: Sequence[str]) -> None:
    if len(kinds) > 1:
        raise ValueError(f"--name {name!r} for {len(kinds)} predictors; accepted: one")
    if not name or name.startswith(".") or set(name) & set("/\\@\0"):
        raise ValueError(
            f"--name {name!r}; accepted: a file's name without a dot at its start, / or @"
        )


def _variants(text: str) -> list[PromptVariant]:
    names = list(VARIANTS) if text == "all" else text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"prompts {name!r}; accepted: all, {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in names]


def _list_cases(folder: Path, limit: int | None) -> list[Path]:
    paths = case_files(folder)
    if not paths:
        raise ValueError(f"cases folder {folder}: no .npz file")
    if any(path.name == CASE_REFUSED for path in paths):
        raise ValueError(
            f"{folder / CASE_REFUSED}: its result would replace the settings of the run; accepted: "
            "any other name"
        )
    if limit is not None and limit < len(paths):
        if limit < 1:
            raise ValueError(f"limit {limit}; accepted: at least 1")
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, limit).round().astype(int)]
    return paths


def _choice(kind: str, options: argparse.Namespace) -> PredictorChoice:
    if kind != "segmenter":
        return PredictorChoice(kind, command=options.command, image=options.image)
    refiner = options.refiner == "on"
    sam = find_weights(options.sam) if options.sam else None
    weights = None
    if options.weights or refiner or sam is None:
        weights = find_weights(options.weights or "default")
    return PredictorChoice(
        kind,
        weights=weights,
        sam=sam,
        refiner=refiner,
        device=options.device,
        postprocess=options.postprocess,
    )


def _plan(
    kinds: Sequence[str], variants: Sequence[PromptVariant], options: argparse.Namespace
) -> list[tuple[PredictorChoice, PromptVariant, RunFolder]]:
    """All runs; what would stop one of them after hours is found here."""
    choices = {kind: _choice(kind, options) for kind in kinds}
    for choice in choices.values():
        check_choice(choice, options.jobs)
    inputs = [folder for folder in (options.cases, options.references) if folder is not None]
    runs = []
    for kind, variant in itertools.product(kinds, variants):
        name = options.name or kind
        if variant.name != "exact":
            name = f"{name}@{variant.name}"
        run = RunFolder(options.out, name)
        run.keep_apart(*inputs)
        runs.append((choices[kind], variant, run))
    return runs


def _check_comparison(table: Path | None, runs: Sequence[RunFolder], paths: Sequence[Path]) -> None:
    """Read the table to compare with, unless it is one of those still to be written."""
    if table is None or table.resolve() in [run.metrics_csv.resolve() for run in runs]:
        return
    if not read_metrics(table).keys() & {path.name for path in paths}:
        raise ValueError(f"{table} has no case in common with the cases to evaluate")


def _settings(
    choice: PredictorChoice, options: argparse.Namespace, variant: PromptVariant
) -> dict[str, Any]:
    """What the scores depend on, weights, image and code by content."""
    settings = asdict(choice)
    for key in ("weights", "sam"):
        if settings[key] is not None:
            settings[key] = sha256_of(settings[key])
    if choice.kind == "image" and choice.image is not None:
        settings["image"] = f"{choice.image} {image_id(choice.image)}"
    references = str(options.references.resolve()) if options.references else ""
    cases = {"cases": str(options.cases.resolve()), "references": references}
    code = {"code": code_of(choice.kind)}
    return {**settings, **cases, "boxes": not options.no_boxes, "prompts": variant.name, **code}


def _evaluate(
    run: RunFolder,
    paths: list[Path],
    choice: PredictorChoice,
    options: argparse.Namespace,
    variant: PromptVariant,
) -> tuple[list[CaseResult], int]:
    """All cases, those already done from their files; a bar with the running means.

    Returns:
        The results, and how many cases could not be read.
    """
    results, unread = [], 0
    for path in paths:
        sources = [path, *([options.references / path.name] if options.references else [])]
        if (done := run.load(path.name, sources)) is not None:
            results.append(done)
    known = {result.name for result in results}
    left = [path for path in paths if path.name not in known]
    if known:
        print(f"{run.name}: {len(known)} of {len(paths)} cases already done", flush=True)
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=len(paths), initial=len(known), unit="case", desc=run.name, disable=not on_terminal
    ) as bar:
        for outcome in _run_all(left, choice, options, variant):
            if isinstance(outcome, str):
                unread += 1
                bar.write(f"error: {outcome}", file=sys.stderr)
                continue
            result, segs = outcome
            run.save(result, segs)
            results.append(result)
            for turn, held in enumerate(result.rounds):
                if held is not None and held.error is not None:
                    bar.write(f"{result.name} round {turn}: {held.error}", file=sys.stderr)
            counted = [r.counted(r.case_scores("dsc")) for r in results]
            auc = np.mean([area_under_curve(scores) for scores in counted])
            final = np.mean([scores[-1] for scores in counted])
            running = f"mean DSC_AUC {auc:.4f} DSC_Final {final:.4f}"
            bar.set_postfix_str(running)
            bar.update()
            if not on_terminal:
                print(
                    f"{len(results)}/{len(paths)} {result.name}: {result.seconds:.2f} s, "
                    f"DSC {_chain(result, 'dsc')}, NSD {_chain(result, 'nsd')}; {running}",
                    flush=True,
                )
    return results, unread


def _chain(result: CaseResult, metric: str) -> str:
    """Scores of all rounds in short."""
    held = zip(result.rounds, result.case_scores(metric), strict=True)
    return " ".join("–" if r is None else f"{value:.3f}" for r, value in held)


def _run_all(
    paths: list[Path], choice: PredictorChoice, options: argparse.Namespace, variant: PromptVariant
) -> Iterator[_Outcome]:
    if not paths:
        return
    how = (options.references, not options.no_boxes, variant)
    if options.jobs == 1:
        predictor = build_predictor(choice)
        for path in paths:
            yield _run_one(path, predictor, *how)
        return
    with ProcessPoolExecutor(
        options.jobs,
        # A fork would share torch's threads and locks with the parent.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(choice, options.jobs),
    ) as pool:
        try:
            # Nobody else keeps the tasks: with each goes its label map.
            for task in as_completed([pool.submit(_run_in_worker, path, *how) for path in paths]):
                yield task.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of {options.jobs} processes ended before its case was done, as for lack of "
                "memory; cases done are kept: run it again with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _run_one(
    path: Path, predictor: Predictor, references: Path | None, boxes: bool, variant: PromptVariant
) -> _Outcome:
    try:
        case = load_labelled_case(path, references, boxes=boxes)
    except (ValueError, OSError) as error:  # one bad case must not end the run
        reason = " ".join(str(error).split())
        return reason if path.name in reason else f"{path.name}: {reason}"
    try:
        return run_case(case, predictor, variant)
    except BoxesError as error:
        return f"{path.name}: {error}"


_worker_predictor: Predictor


def _start_worker(choice: PredictorChoice, jobs: int) -> None:
    global _worker_predictor
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _worker_predictor = build_predictor(choice)


def _run_in_worker(
    path: Path, references: Path | None, boxes: bool, variant: PromptVariant
) -> _Outcome:
    return _run_one(path, _worker_predictor, references, boxes, variant)


def _print_results(run: RunFolder, results: list[CaseResult]) -> int:
    """Print the table of a run; returns the number of failed predictions."""
    print(f"\n{run.name}\n{format_table(results)}")
    late = [r.name for r in results if r.is_late]
    if late:
        print(f"over the time limit, counted as 0 above: {', '.join(sorted(late))}")
    failed = [r.name for r in results for held in r.rounds if held is not None and held.error]
    if failed:
        print(f"{len(failed)} predictions failed, in {', '.join(sorted(set(failed)))}")
    print(f"{sum(r.seconds for r in results):.1f} s of prediction; {run.metrics_csv}", flush=True)
    return len(failed)


def _write_pages(
    options: argparse.Namespace, differences: Mapping[str, Sequence[Difference]]
) -> None:
    """The tables and the page about all runs in the folder."""
    runs = list_runs(options.out)
    found = {run.name: results for run in runs if (results := run.results())}
    rows = [{"run": name, **row} for name, results in found.items() for row in summarise(results)]
    write_csv(options.out / "summary.csv", rows)
    stressed = stress_rows(found)
    if stressed:
        write_csv(options.out / "stress.csv", stressed)
        print(f"\n{format_stress(stressed)}")
    if options.report:
        from training.evaluation.report import write_report

        write_report(options.out / "report.html", runs, differences)
        print(options.out / "report.html")


if __name__ == "__main__":
    sys.exit(main())
