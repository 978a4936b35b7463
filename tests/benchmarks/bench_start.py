"""What a start costs before the first voxel is read, beside ``import torch`` alone.

    python -m tests.benchmarks.bench_start [--runs 7]

Each command is a process of its own, all in turn so that a busy machine slows all of them; medians
of wall time and of CPU time, which a busy machine hardly changes. The challenge starts the program
six times a case.
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


def cost(code: str) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{code!r} ended with {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure, print a table, write CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="processes a command")
    options = parser.parse_args()
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(options.runs + 1):
        for name, code in COMMANDS.items():
            both = cost(code)
            if turn:  # the first turn fills the disk's cache
                costs[name].append(both)
    medians = {
        name: tuple(statistics.median(kind) for kind in zip(*both, strict=True))
        for name, both in costs.items()
    }
    torch_wall, torch_cpu = medians["import torch"]
    results = CHECKOUT / "tests" / "benchmarks" / "results" / "start.csv"
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        header = ["command", "wall_s", "wall_over_torch_s", "cpu_s", "cpu_over_torch_s"]
        writer.writerow([*header, "runs", "torch", "cores"])
        print(
            f"{'command':40s} {'wall s':>7s} {'over torch':>11s} {'CPU s':>7s} {'over torch':>11s}"
        )
        for name, (wall, cpu) in medians.items():
            values = [wall, wall - torch_wall, cpu, cpu - torch_cpu]
            print("{:40s} {:7.2f} {:+11.2f} {:7.2f} {:+11.2f}".format(name, *values))
            row = [name, *(f"{value:.3f}" for value in values)]
            writer.writerow([*row, options.runs, torch.__version__, os.cpu_count()])
    print(f"written to {results}")


if __name__ == "__main__":
    main()
