"""What a training step is made of: does the network ever wait for its windows?

    python -m tests.benchmarks.bench_training [--windows 48] [--edge 48] [--batch 8]

CPU time of one thread, so that other work on the machine hardly counts. A window is drawn once and
stays for several rounds; every round draws its clicks and goes through the network, forward and
backward. The pipeline must make at least three windows in the time the network takes for one.
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
import torch

from inference.prompts import refiner_channels
from training.checkpoint import build_network
from training.click_simulation import next_clicks
from training.config import Config
from training.dataset import WindowDataset
from training.losses import segmentation_loss
from training.optimisation import Optimisation
from training.plan import Planner
from training.volumes import load_volumes
from training.windows import cut_windows

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SHARED_DATA", HERE.parents[2] / "shared" / "data"))
WANTED = 3.0


def cpu_ms(function: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return 1000 * float(np.median(times))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds a window of each part."""
    edge, batch = options.edge, options.batch
    config = Config(batch=batch, windows=((0.0, edge),))
    paths = sorted((DATA / "train").glob("*.npz"))[:: options.every]
    volumes = load_volumes(paths)
    maps = load_volumes(sorted((DATA / "label_maps").glob("*.npz"))[:2])
    dataset = WindowDataset(volumes + maps, config)
    found = {}
    begun = time.process_time()
    samples = dataset.draw(range(options.windows), edge)
    found["draw a window"] = 1000 * (time.process_time() - begun) / options.windows

    planner = Planner(dataset.store, config)
    rngs = [np.random.default_rng(i) for i in range(batch)]
    plans = [planner.plan(i, rng, edge) for i, rng in enumerate(rngs)]
    shown = [plan for plan in plans if plan.kind != "painted"]
    found["  of which cutting"] = cpu_ms(lambda: cut_windows(dataset.store, shown), 5) / len(shown)

    few = samples[:batch]
    images = torch.stack([s.image for s in few])
    targets = torch.stack([s.target for s in few])
    prompts = [s.prompts for s in few]
    masks = torch.zeros_like(images)
    torch.manual_seed(0)
    model = build_network(config)
    optimisation = Optimisation(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16)
    channels = refiner_channels(images, prompts, masks, [False] * batch)

    def step() -> torch.Tensor:
        optimisation.prepare(0, 0.0, 0.0)
        with autocast:
            logits = model(channels)
        segmentation_loss(logits, targets[:, None].float(), config).mean().backward()
        optimisation.unscale(scaler)
        optimisation.step(scaler)
        optimisation.update_average(1000)
        return logits

    predicted = step()[:, 0] > 0
    cells = [s.cell for s in few]
    chances = [0.5] * batch
    how = (config.clicks, config.click_slack)
    clicks = cpu_ms(lambda: next_clicks(predicted, targets, cells, chances, *how), 5)
    found["draw a click"] = clicks / batch
    rounds = (config.rounds + 1) / 2
    found["pipeline, a round"] = found["draw a window"] / rounds + found["draw a click"]
    inputs = cpu_ms(lambda: refiner_channels(images, prompts, masks, [False] * batch), 5)
    found["input channels, a round"] = inputs / batch
    found["network, a round"] = cpu_ms(step, options.steps) / batch
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=48, help="to draw")
    parser.add_argument("--edge", type=int, default=48, help="cells")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of the network")
    parser.add_argument("--every", type=int, default=4, help="training cases to load: every n-th")
    parser.add_argument("--bfloat16", action="store_true", help="of the network")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"no {DATA}: set SHARED_DATA to the folder of real data", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    options.bfloat16 |= bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    found = measure(options)
    consumer = found["network, a round"]
    print(f"{'part':28}{'CPU ms a window':>16}{'windows/s/core':>16}{'x network':>11}")
    rows = []
    for part, ms in found.items():
        rows.append([part, f"{ms:.2f}", f"{1000 / ms:.1f}", f"{consumer / ms:.2f}"])
        print(f"{part:28}{ms:16.2f}{1000 / ms:16.1f}{consumer / ms:11.2f}")
    ratio = consumer / found["pipeline, a round"]
    slowest = max((k for k in found if k.endswith("a round")), key=lambda k: found[k])
    print(f"the pipeline makes {ratio:.1f} windows while the network takes one; ", end="")
    print(f"the bottleneck is: {slowest.removesuffix(', a round')}")
    path = HERE / "results" / "training.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "cpu_ms", "windows_per_s_core", "ratio", "torch", "machine"])
        writer.writerows([*row, torch.__version__, platform.machine()] for row in rows)
    return 0 if ratio >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
