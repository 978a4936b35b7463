"""What a start costs, phase by phase, beside ``import torch``: the challenge makes six a case.

    python -m tests.benchmarks.bench_start [--runs 7] [--image sammed3d:latest]

With ``--image`` all of it happens in containers, as in the challenge. Each run is a process (and a
container) of its own; medians of wall time and of CPU time, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

#: Runs in the process that is measured; prints wall and CPU seconds of each phase as JSON.
PROBE = """
import json, os, sys, time
phases = {}
# On the wall it started when the parent says; CPU time counts from there by itself, a process
# starts with none.
wall, cpu = time.time(), time.process_time()
phases["interpreter"] = [wall - float(sys.argv[1]), cpu]
def lap(name):
    global wall, cpu
    phases[name] = [time.time() - wall, time.process_time() - cpu]
    wall, cpu = time.time(), time.process_time()
import torch
lap("import torch")
from inference import predict
import inference.case, inference.finishing, inference.memory, inference.output, inference.segmenter
lap("our imports")
predict.load(predict.make_parser().parse_args(["--device", "cpu"]))
lap("weights")
import numpy as np
from inference.case import Box, Case, ObjectPrompts
from inference.segmenter import Segmenter
image = np.random.default_rng(0).integers(0, 255, (48, 64, 64), dtype=np.uint8)
objects = (ObjectPrompts(1, Box((10, 10, 10), (38, 50, 50), 24)),)
case = Case("probe", image, (1.0, 1.0, 1.0), objects)
segmenter = Segmenter.from_files(device="cpu")
lap("")
segmenter.segment_case(case)
lap("first inference")
segmenter.segment_case(case)
lap("second inference")
del phases[""]
print(json.dumps({"phases": phases, "torch": torch.__version__}))
"""

#: What is ours: neither the container's nor torch's. Inference itself is what a start is for.
OURS = ("interpreter", "our imports", "weights", "first over second")


def measure(image: str | None) -> tuple[dict[str, list[float]], str]:
    """Wall and CPU seconds of each phase of one start, and the version of torch."""
    command = [sys.executable]
    phases: dict[str, list[float]] = {}
    if image is not None:
        docker = ["docker", "run", "--rm", "--network", "none", image]
        started = time.perf_counter()
        subprocess.run([*docker, "true"], check=True)
        phases["container"] = [time.perf_counter() - started, float("nan")]
        command = [*docker, "python"]
    # A shell notes the time: with a container its start is counted above. It must not become the
    # interpreter, whose CPU time would count what the engine did in the same process before.
    script = f'{"python" if image else sys.executable} -P -c "$0" "$(date +%s.%N)" || exit'
    command = [*command[:-1], "sh", "-c", script, PROBE]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    if image is not None:
        command[command.index(image) : command.index(image)] = ["-e", "PYTHONPATH=/workspace"]
    done = subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True)
    found = json.loads(done.stdout)
    phases |= found["phases"]
    first, second = phases["first inference"], phases["second inference"]
    phases["first over second"] = [a - b for a, b in zip(first, second, strict=True)]
    return phases, found["torch"]


def main() -> None:
    """Measure, print a table, write CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="starts")
    parser.add_argument("--image", help="measure in containers of this image")
    options = parser.parse_args()
    measure(options.image)  # fills the disk's cache
    runs = []
    for _ in range(options.runs):
        phases, version = measure(options.image)
        runs.append(phases)
    medians = {
        name: [statistics.median(run[name][kind] for run in runs) for kind in (0, 1)]
        for name in runs[0]
    }
    medians["ours, in all"] = [
        statistics.median(sum(run[name][kind] for name in OURS) for run in runs) for kind in (0, 1)
    ]
    torch_wall, _ = medians["import torch"]
    place = "image" if options.image else "process"
    results = CHECKOUT / "tests" / "benchmarks" / "results" / f"start_{place}.csv"
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        header = ["phase", "wall_s", "cpu_s", "wall_over_import_torch"]
        writer.writerow([*header, "runs", "torch", "cores"])
        print(f"{'phase':20s} {'wall s':>7s} {'CPU s':>7s} {'of torch':>9s}")
        for name, (wall, cpu) in medians.items():
            print(f"{name:20s} {wall:7.3f} {cpu:7.3f} {wall / torch_wall:9.2f}")
            row = [name, f"{wall:.4f}", f"{cpu:.4f}", f"{wall / torch_wall:.3f}"]
            writer.writerow([*row, options.runs, version, os.cpu_count()])
    print(f"written to {results}")


if __name__ == "__main__":
    main()
