"""The paper's post-processing against its literal SciPy restatement, on real neurites.

    python -m tests.benchmarks.bench_postprocessing [--largest 30] [--crop 160]

Two cases out of one connectomics label volume (512^3 voxels, 2,523 labels): a crop with all its
labels, and the largest labels at full size. Both must come out bit for bit the same. Both versions
compute in one thread, and seconds are CPU seconds: the literal version takes 25 minutes for the
largest labels, in which other work may come and go. ``--largest 5`` gives a first impression. The
peak is memory beyond the label map, read from Linux.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray

from inference.postprocessing import postprocess
from tests import literal_postprocessing as literal

HERE = Path(__file__).resolve().parent
STATUS = Path("/proc/self/status")
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


@dataclass(frozen=True)
class Run:
    """What one version made of one case, and at what cost.

    Attributes:
        seconds: of CPU time.
        peak_gb: memory at most, beyond what was there before; NaN where the system does not tell.
        result: the label map.
    """

    seconds: float
    peak_gb: float
    result: NDArray[np.generic]


def measured(
    function: Callable[[NDArray[np.generic]], NDArray[np.generic]], label_map: NDArray[np.generic]
) -> Run:
    before = resident_gb("VmRSS")
    if STATUS.exists():  # the peak starts anew from here
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    started = time.process_time()
    result = function(label_map)
    return Run(time.process_time() - started, resident_gb("VmHWM") - before, result)


def resident_gb(field: str) -> float:
    if not STATUS.exists():
        return math.nan
    lines = STATUS.read_text(encoding="ascii").splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return kilobytes * 1024 / 1e9


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
    print(f"{'':32s} {'':>6s} {'CPU seconds':^26s}  {'peak, GB':^14s}")
    print(
        f"{'case':32s} {'labels':>6s} {'literal':>10s} {'ours':>8s} {'ratio':>6s}  "
        f"{'literal':>7s} {'ours':>6s}  same"
    )
    for name, label_map in cases.items():
        ours = measured(postprocess, label_map)
        slow = measured(literal.postprocess, label_map)
        same = bool(np.array_equal(ours.result, slow.result))
        labels = len(np.unique(label_map[label_map > 0]))
        ratio = slow.seconds / ours.seconds
        print(
            f"{name:32s} {labels:6d} {slow.seconds:10.1f} {ours.seconds:8.2f} {ratio:6.1f}  "
            f"{slow.peak_gb:7.2f} {ours.peak_gb:6.2f}  {same}",
            flush=True,
        )
        rows.append(
            {
                "case": name,
                "labels": labels,
                "literal_cpu_s": f"{slow.seconds:.2f}",
                "ours_cpu_s": f"{ours.seconds:.3f}",
                "ratio": f"{ratio:.1f}",
                "literal_peak_gb": f"{slow.peak_gb:.3f}",
                "ours_peak_gb": f"{ours.peak_gb:.3f}",
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
