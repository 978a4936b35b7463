"""Are probabilities what they say? How often voxels of each probability belong to the object.

    python -m training.evaluation.reliability --cases VAL --cache DIR --out DIR [--weights FILE]

The protocol's rounds are held once, without post-processing, and kept as for the ablation of
post-processing, in the same ``--cache``. Writes ``reliability.csv`` and ``report.html``, the page
about all that the folder holds: in the folder of an evaluation the curves appear in its report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.case import MAX_CLASSES
from inference.model.weights import find_weights
from inference.probabilities import exclusive_probabilities
from training.evaluation.labelled_case import LabelledCase, load_labelled_case
from training.evaluation.recording import RecordedCase, load_record, record_folder, restrict
from training.evaluation.report import write_report
from training.evaluation.results import list_runs, write_csv
from training.evaluation.summary import MEAN_OF_MODALITIES, modality_in_tables

BINS = 10


def count_case(record: RecordedCase, case: LabelledCase) -> NDArray[np.float64]:
    """Shares of voxels, probabilities and true voxels of a case's objects by probability.

    Each object of each round counts as one, whatever its size; its voxels are those of its
    cut-out, which holds all that is above one half and little around it.

    Args:
        record: the rounds.
        case: with the same labels 1..N.

    Returns:
        (3, 10): per tenth of probability the sums over objects of the share of voxels in it, of
        their probabilities, and of those that are the object's; all zero without any object.
    """
    total = np.zeros((3, BINS))
    for objects in record.rounds.values():
        results = [result for _, result in objects]
        for result, chances in zip(results, exclusive_probabilities(results), strict=True):
            if not result.logits.size:
                continue
            probability = chances.ravel()
            truth = (case.reference.voxels[result.place] == result.label).ravel()
            tenth = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
            for row, weights in zip(total, (None, probability, truth), strict=True):
                row += np.bincount(tenth, weights, BINS) / truth.size
    return total


def reliability_rows(counts: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """The table of the curves.

    Args:
        counts: of each modality, as :func:`count_case` returns them, summed over cases.

    Returns:
        A row a modality and tenth, and the same of the modalities' mean: ``share`` of voxels,
        their mean ``probability``, the ``frequency`` of the object among them (both None where
        there is no voxel), and the modality's expected calibration ``error``, the mean distance of
        the two (Guo et al. 2017).

    Raises:
        ValueError: nothing was counted.
    """
    shares = {name: count / count[0].sum() for name, count in counts.items() if count[0].sum()}
    if not shares:
        raise ValueError("no object was found in any case; accepted: weights that find some")
    shares[MEAN_OF_MODALITIES] = np.mean(list(shares.values()), axis=0)
    rows = []
    for name, (share, probable, true) in shares.items():
        error = float(np.abs(probable - true).sum())
        for tenth in range(BINS):
            known = share[tenth] > 0
            rows.append(
                {
                    "modality": name,
                    "tenth": tenth,
                    "share": float(share[tenth]),
                    "probability": float(probable[tenth] / share[tenth]) if known else None,
                    "frequency": float(true[tenth] / share[tenth]) if known else None,
                    "error": error,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Record where needed, count and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.reliability", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--cases", type=Path, required=True, metavar="DIR", help="challenge files with gts")
    add("--cache", type=Path, required=True, metavar="DIR", help="where records are kept")
    add("--out", type=Path, required=True, metavar="DIR", help="where the table goes")
    add("--weights", default="default", metavar="FILE", help="bundle, or its name")
    add("--objects", type=int, default=MAX_CLASSES, metavar="N", help="most classes of a case")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        weights = find_weights(options.weights)
        records = record_folder(
            options.cases, options.cache, weights=weights, objects=options.objects
        )
        counts: dict[str, NDArray[np.float64]] = {}
        for path in records:
            record = load_record(path)
            case = restrict(load_labelled_case(options.cases / record.name), record.labels)
            name = modality_in_tables(record.name)
            counts[name] = counts.get(name, 0) + count_case(record, case)
        rows = reliability_rows(counts)
        write_csv(options.out / "reliability.csv", rows)
        write_report(options.out / "report.html", list_runs(options.out), {})
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows[::BINS]:
        print(f"{row['modality']}: expected calibration error {row['error']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
