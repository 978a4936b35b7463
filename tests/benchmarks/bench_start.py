"""What a start costs before the first voxel is read, beside ``import torch`` alone.

    python -m tests.benchmarks.bench_start [--runs 7]

Each command is a process of its own, all in turn so that a busy machine slows all of them;
the median counts. The challenge starts the program six times a case.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "python": "pass",
    "import torch": "import torch",
    "import torch and the entry point": "import torch, inference.predict",
    "import torch and all that a case needs": (
        "import torch, inference.predict, inference.case, inference.segmenter, inference.output"
    ),
}


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="processes a command")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.runs + 1):
        for name, code in COMMANDS.items():
            value = seconds(code)
            if turn:  # the first turn fills the disk's cache
                times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    results = CHECKOUT / "tests" / "benchmarks" / "results" / "start.csv"
    with results.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["command", "median_s", "over_torch_s", "runs", "torch", "cores"])
        print(f"{'command':42s} {'median s':>9s} {'over torch':>11s}")
        for name, median in medians.items():
            over = median - medians["import torch"]
            print(f"{name:42s} {median:9.2f} {over:+11.2f}")
            row = [name, f"{median:.3f}", f"{over:.3f}", options.runs]
            writer.writerow([*row, torch.__version__, os.cpu_count()])
    print(f"written to {results}")


if __name__ == "__main__":
    main()
