"""``sh predict.sh`` as a cold process on large cases: seconds and memory beside the time limit.

    python -m tests.benchmarks.bench_predict [--runs 3] [--image sammed3d:latest]

With ``--image`` it is a container as the challenge starts it, and the memory is the container's.
The challenge allows 90 s a class, summed over the starts of a case: six, so 15 s a class a start,
or where there are no boxes five, so 18.
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
RESULTS = CHECKOUT / "tests" / "benchmarks" / "results"
#: Shape, classes, rounds of clicks; without clicks there are boxes.
CASES = {
    "120x512x512, 3 boxes": ((120, 512, 512), 3, 0),
    "300x512x512, 100 boxes": ((300, 512, 512), 100, 0),
    "28x3473x448, 1 click": ((28, 3473, 448), 1, 1),
}

#: Runs in the container; where the peak is depends on the version of the control groups.
SCRIPT = """sh predict.sh >/dev/null || exit
cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"""


def measure_container(folder: Path, image: str) -> tuple[float, float]:
    """As :func:`measure`, of one container."""
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out").chmod(0o777)
    command = ["docker", "run", "--rm", "--network", "none", "-v", f"{folder}:/workspace/inputs:ro"]
    command += ["-v", f"{folder}/out:/workspace/outputs", image, "sh", "-c", SCRIPT]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return time.perf_counter() - started, int(done.stdout) / 1e9


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


def limit_s(classes: int, clicks: int) -> float:
    """What the challenge allows a start; without clicks there are boxes."""
    return 90.0 / (5 if clicks else 6) * classes


def main() -> None:
    """Measure all cases, print a table, write CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="processes a case")
    parser.add_argument("--image", help="measure containers of this image")
    options = parser.parse_args()
    rows = [["case", "median_s", "peak_gb", "limit_s", "share_of_limit", "runs", "torch", "cores"]]
    print(f"{'case':24s} {'median s':>9s} {'peak GB':>8s} {'limit s':>8s} {'share':>6s}")
    for name, (shape, classes, clicks) in CASES.items():
        case = challenge_case(shape, classes, boxes=not clicks, clicks=clicks, gts=False)
        with tempfile.TemporaryDirectory() as folder:
            write_npz(Path(folder) / "CT_large.npz", case).chmod(0o644)
            Path(folder).chmod(0o755)  # a container's user is another
            runs = [
                measure_container(Path(folder), options.image)
                if options.image
                else measure(Path(folder))
                for _ in range(options.runs)
            ]
        seconds = statistics.median(run[0] for run in runs)
        peak = max(run[1] for run in runs)
        limit = limit_s(classes, clicks)
        print(f"{name:24s} {seconds:9.1f} {peak:8.2f} {limit:8.0f} {seconds / limit:6.1%}")
        row = [name, f"{seconds:.2f}", f"{peak:.2f}", f"{limit}", f"{seconds / limit:.4f}"]
        rows.append([*row, f"{options.runs}", torch.__version__, f"{os.cpu_count()}"])
    results = RESULTS / ("predict_image.csv" if options.image else "predict.csv")
    with results.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"written to {results}")


if __name__ == "__main__":
    main()
