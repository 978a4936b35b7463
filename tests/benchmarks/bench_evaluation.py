"""One round of the challenge's evaluation against its literal restatement, on one large case.

    python -m tests.benchmarks.bench_evaluation [--shape 200 512 512] [--classes 10]

Scores every class of a case and finds its next click, both ways, in one process. Scores and clicks
must be the same. The prediction is the reference with its classes moved, thinned and speckled, as
predictions are wrong.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from tests.phantoms import challenge_case
from tests.training.evaluation import official_restatement as official
from training.evaluation.clicks import next_click
from training.evaluation.label_map import LabelMap
from training.evaluation.metrics import as_spacing, score

HERE = Path(__file__).resolve().parent


def spoil(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A plausible wrong prediction."""
    rng = np.random.default_rng(0)
    wrong = np.roll(labels, (2, -5, 7), (0, 1, 2))
    wrong[::9] = np.where(rng.random(wrong[::9].shape) < 0.3, 0, wrong[::9])
    speckle = rng.random(labels.shape, np.float32) < 1e-5
    wrong[speckle] = rng.integers(1, labels.max() + 1, np.count_nonzero(speckle))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 512, 512))
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()
    spacing = as_spacing((1.0, 1.0, 1.0))
    labels = challenge_case(tuple(options.shape), options.classes)["gts"]
    wrong = spoil(labels)
    classes = range(1, options.classes + 1)

    started = time.perf_counter()
    reference, prediction = LabelMap.of(labels), LabelMap.of(wrong)
    indexed = time.perf_counter() - started
    found = score(reference, prediction, spacing)
    scored = time.perf_counter() - started - indexed
    ours = [next_click(reference, prediction, label) for label in classes]
    seconds = time.perf_counter() - started

    started = time.perf_counter()
    dsc = official.mean_dsc(labels, wrong)
    nsd = official.mean_nsd(labels, wrong, spacing)
    literal_scored = time.perf_counter() - started
    theirs = [official.click(labels, wrong, label) for label in classes]
    literal_seconds = time.perf_counter() - started

    same = (
        list(found.dsc) == dsc
        and np.allclose(found.nsd, nsd, rtol=0, atol=1e-9)
        and [(c.position, c.positive) for c in ours if c]
        == [(tuple(position), kind == "fg") for position, kind in filter(None, theirs)]
    )
    shape = "x".join(map(str, options.shape))
    print(f"evaluation of {shape}, {options.classes} classes, one round, one process")
    print(f"{'':12}{'literal':>10}{'ours':>10}{'ratio':>8}")
    clicked, literal_clicked = seconds - indexed - scored, literal_seconds - literal_scored
    print(f"{'index':12}{'':>10}{indexed:9.2f}s")
    for name, slow, fast in (
        ("scores", literal_scored, scored),
        ("clicks", literal_clicked, clicked),
        ("all", literal_seconds, seconds),
    ):
        print(f"{name:12}{slow:9.2f}s{fast:9.2f}s{slow / fast:7.1f}x")
    print("scores and clicks identical" if same else "SCORES OR CLICKS DIFFER")

    target = HERE / "results" / "evaluation.csv"
    target.parent.mkdir(exist_ok=True)
    row = {
        "shape": shape,
        "classes": options.classes,
        "literal_s": f"{literal_seconds:.3f}",
        "ours_s": f"{seconds:.3f}",
        "ratio": f"{literal_seconds / seconds:.2f}",
        "identical": same,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
