"""Reading a case and saving its label map, against numpy.

    python -m tests.benchmarks.bench_io [--shape 300 512 512] [--classes 100] [--repeats 3]

Each measurement is a process of its own: the best wall and CPU times of the repeats, and the most
memory the process ever held, Python and numpy included (``start`` holds just that). Ratios are of
CPU times, which other work on the machine changes less. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from inference.case import load_case
from inference.output import save_segmentation
from tests.phantoms import challenge_case, write_npz

HERE = Path(__file__).resolve().parent
KEYS = ("imgs", "spacing", "boxes", "clicks", "clicks_order", "prev_pred")


def read_with_numpy(path: Path) -> dict[str, object]:
    with np.load(path, allow_pickle=True) as arrays:
        return {key: arrays[key] for key in KEYS}


def actions(folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name; the label map to save is read outside the measurement."""
    case, saved = folder / "case.npz", folder / "saved.npz"
    label_map = np.load(folder / "label_map.npy", mmap_mode="r")
    return {
        "start": lambda: None,
        "load numpy": lambda: read_with_numpy(case),
        "load ours": lambda: load_case(case),
        "save numpy": lambda: np.savez_compressed(saved, segs=label_map),
        "save ours": lambda: save_segmentation(saved, label_map),
    }


def measure(folder: Path, name: str, repeats: int) -> None:
    """In the process of one measurement: print seconds, peak MB and the saved file's bytes."""
    action = actions(folder)[name]
    wall, cpu = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    # getrusage's maximum outlives exec: it would be that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e6
    saved = folder / "saved.npz"
    print(min(wall), min(cpu), peak, saved.stat().st_size if name.startswith("save") else 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1], options.repeats)
        return 0

    shape = tuple(options.shape)
    found: dict[str, tuple[float, float, float, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = challenge_case(shape, options.classes, clicks=3, previous=True)
        np.save(folder / "label_map.npy", case.pop("gts"))
        write_npz(folder / "case.npz", case)
        size = case["imgs"].nbytes
        del case
        for action in actions(folder):
            command = [sys.executable, "-m", __spec__.name, "--repeats", str(options.repeats)]
            output = subprocess.run(
                [*command, "--measure", str(folder), action],
                stdout=subprocess.PIPE,
                encoding="utf-8",
                check=True,
            ).stdout.split()
            found[action] = (*map(float, output[:3]), int(output[3]))

    rows = []
    text = "x".join(map(str, shape))
    print(f"{text}, {options.classes} classes; imgs and prev_pred of {size / 1e6:.0f} MB each")
    print(f"{'':12s}  wall s   CPU s  numpy / it  peak MB  file MB")
    for action, (wall, cpu, peak, file_bytes) in found.items():
        reference = found.get(f"{action.split()[0]} numpy", (0.0, 0.0))[1]
        ratio = f"{reference / cpu:.2f}" if reference else ""
        size_mb = f"{file_bytes / 1e6:.2f}" if file_bytes else ""
        print(f"{action:12s} {wall:7.3f} {cpu:7.3f} {ratio:>11s} {peak:8.0f} {size_mb:>8s}")
        rows.append(
            {
                "shape": text,
                "classes": options.classes,
                "action": action,
                "wall_s": f"{wall:.4f}",
                "cpu_s": f"{cpu:.4f}",
                "numpy_over_it": ratio,
                "peak_mb": f"{peak:.0f}",
                "file_mb": size_mb,
                "numpy": np.__version__,
                "machine": platform.machine(),
                "cores": os.cpu_count(),
            }
        )
    results = HERE / "results" / "io.csv"
    results.parent.mkdir(exist_ok=True)
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
