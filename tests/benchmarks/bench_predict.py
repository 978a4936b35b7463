"""``sh predict.sh`` as a cold process on large cases: seconds and memory beside the time limit.

    python -m tests.benchmarks.bench_predict [--runs 3]

The challenge allows 90 s a class, summed over the six starts of a case: 15 s a class a start.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.phantoms import challenge_case, write_npz

CHECKOUT = Path(__file__).resolve().parents[2]
CASES = {
    "120x512x512, 3 boxes": ((120, 512, 512), 3),
    "300x512x512, 100 boxes": ((300, 512, 512), 100),
}


def measure(folder: Path) -> tuple[float, float]:
    """Seconds of one cold process on a folder of one case, and its peak memory in GB."""
    command = ["sh", str(CHECKOUT / "predict.sh"), "--inputs", str(folder)]
    command += ["--outputs", str(folder / "out"), "--threads", "2"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHON": sys.executable}
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure both cases, print a table, write CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="processes a case")
    options = parser.parse_args()
    results = CHECKOUT / "tests" / "benchmarks" / "results" / "predict.csv"
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["case", "median_s", "peak_gb", "limit_s", "share_of_limit", "runs", "torch", "cores"]
        )
        print(f"{'case':24s} {'median s':>9s} {'peak GB':>8s} {'limit s':>8s} {'share':>6s}")
        for name, (shape, classes) in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                write_npz(Path(folder) / "CT_large.npz", challenge_case(shape, classes, gts=False))
                runs = [measure(Path(folder)) for _ in range(options.runs)]
            seconds = statistics.median(run[0] for run in runs)
            peak = max(run[1] for run in runs)
            limit = 15.0 * classes
            print(f"{name:24s} {seconds:9.1f} {peak:8.2f} {limit:8.0f} {seconds / limit:6.1%}")
            row = [name, f"{seconds:.2f}", f"{peak:.2f}", limit, f"{seconds / limit:.4f}"]
            writer.writerow([*row, options.runs, torch.__version__, os.cpu_count()])
    print(f"written to {results}")


if __name__ == "__main__":
    main()
