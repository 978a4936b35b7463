"""The paper's post-processing against its literal SciPy restatement, on real neurites.

    python -m tests.benchmarks.bench_postprocessing [--largest 30] [--crop 160]

Two cases out of one connectomics label volume (512^3 voxels, 2,523 labels): a crop with all its
labels, and the largest labels at full size. Both must come out bit for bit the same. The literal
version takes far longer a label at full size than ours: ``--largest 5`` gives a first impression.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from inference.postprocessing import postprocess
from tests import literal_postprocessing as literal

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SHARED_DATA", HERE.parents[2] / "shared" / "data"))


def largest_labels(label_map: NDArray[np.uint16], count: int) -> NDArray[np.uint8]:
    """The label map with its largest labels only, numbered from 1, largest first."""
    voxels = np.zeros(int(label_map.max()) + 1, np.int64)
    for plane in label_map:
        voxels += np.bincount(plane.reshape(-1), minlength=len(voxels))
    voxels[0] = 0
    number = np.zeros(len(voxels), np.uint8)
    number[np.argsort(-voxels)[:count]] = np.arange(1, count + 1)
    return number[label_map]


def timed(
    function: Callable[[NDArray[np.generic]], NDArray[np.generic]], label_map: NDArray[np.generic]
) -> tuple[float, NDArray[np.generic]]:
    started = time.perf_counter()
    result = function(label_map)
    return time.perf_counter() - started, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=30, help="labels at full size")
    parser.add_argument("--crop", type=int, default=160, help="edge of the crop in voxels")
    options = parser.parse_args()

    path = DATA / "labels_only" / "connectomics_cc3d_512.npz"
    if not path.is_file():
        print(f"no {path}: set SHARED_DATA to the folder of real data", file=sys.stderr)
        return 1
    with np.load(path) as file:
        volume = file["labels"]
    middle = slice((512 - options.crop) // 2, (512 + options.crop) // 2)
    cases = {
        f"crop of {options.crop}^3": np.ascontiguousarray(volume[middle, middle, middle]),
        f"{options.largest} largest labels of 512^3": largest_labels(volume, options.largest),
    }

    rows = []
    print(f"{'case':32s} {'labels':>6s} {'literal s':>10s} {'ours s':>8s} {'ratio':>7s}  same")
    for name, label_map in cases.items():
        ours_s, ours = timed(lambda labels: postprocess(labels, "paper"), label_map)
        literal_s, expected = timed(literal.postprocess, label_map)
        same = bool(np.array_equal(ours, expected))
        labels = len(np.unique(label_map[label_map > 0]))
        ratio = literal_s / ours_s
        print(f"{name:32s} {labels:6d} {literal_s:10.1f} {ours_s:8.2f} {ratio:7.1f}  {same}")
        rows.append(
            {
                "case": name,
                "labels": labels,
                "literal_s": f"{literal_s:.2f}",
                "ours_s": f"{ours_s:.3f}",
                "ratio": f"{ratio:.1f}",
                "identical": same,
                "numpy": np.__version__,
                "scipy": scipy.__version__,
                "machine": platform.machine(),
                "cores": os.cpu_count(),
            }
        )
    results = HERE / "results" / "postprocessing.csv"
    results.parent.mkdir(exist_ok=True)
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {results}")
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
