"""Draw a run: ``python -m training.plots RUN`` writes curves and sample predictions beside its log.

``dice.png`` and ``loss.png`` are the paper's Figures 3 and 4: Dice and loss against epochs, with
the steps of the learning rate marked; ``samples.png`` shows windows of the last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from inference.npz import NpzFile
from training.run_log import read_log

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_DRAWN = ("epoch", "lr", "loss", "dice", "dice_0")  # columns of the log
_STEP = 2.0  # a rate that falls to less than a half from one line to the next makes a mark


def draw(run: Path) -> list[Path]:
    """Draw what there is of a run.

    Args:
        run: folder with ``log.csv`` and perhaps ``samples.npz``.

    Returns:
        The pictures written.

    Raises:
        ValueError: the log is missing, empty or of something else, or the samples are damaged.
    """
    log = run / "log.csv"
    try:
        lines = read_log(log)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{log}: {error}; accepted: the log of a run") from None
    if not lines:
        raise ValueError(f"{run}: no log.csv with a line in it; accepted: the --out of a run")
    if missing := [name for name in _DRAWN if name not in lines[0]]:
        raise ValueError(f"{log}: no column {', '.join(missing)}; accepted: the log of a run")
    written = [
        _curve(lines, "dice", "Dice similarity coefficient", run / "dice.png"),
        _curve(lines, "loss", "loss", run / "loss.png"),
    ]
    if (run / "samples.npz").is_file():
        written.append(_samples(run / "samples.npz", run / "samples.png"))
    return written


def rate_steps(lines: Sequence[dict[str, float]]) -> list[float]:
    """Epochs at which the learning rate fell by a step, not by a slope or at its end."""
    pairs = itertools.pairwise(line for line in lines if line["lr"] > 0)
    falls = [(b["epoch"], a["lr"] / b["lr"]) for a, b in pairs]
    return [epoch for epoch, fall in falls if fall > _STEP] if len(falls) < 2 or _few(falls) else []


def _few(falls: Sequence[tuple[float, float]]) -> bool:
    """Whether the rate is constant but for its steps."""
    return sum(fall > 1.001 for _, fall in falls) <= max(3, len(falls) // 10)


def _curve(lines: Sequence[dict[str, float]], name: str, title: str, path: Path) -> Path:
    """One quantity against epochs; Dice also by round, first and last."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    epochs = [line["epoch"] for line in lines]
    axes.plot(epochs, [line[name] for line in lines], color="C0", label="all rounds")
    if name == "dice":
        rounds = [key for key in lines[0] if key.startswith("dice_")]
        for key, style in ((rounds[0], ":"), (rounds[-1], "--")):
            values = [line[key] for line in lines]
            if not all(math.isnan(v) for v in values):
                label = f"round {key.removeprefix('dice_')}"
                axes.plot(epochs, values, style, color="C0", linewidth=1, label=label)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, loc="lower right")
    for epoch in rate_steps(lines):
        axes.axvline(epoch, color="0.6", linestyle="--", linewidth=1)
        axes.annotate("lr", (epoch, 1.0), xycoords=("data", "axes fraction"), ha="center")
    axes.set(xlabel="epoch", ylabel=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _samples(source: Path, path: Path) -> Path:
    """The middle slice of each window with the outlines of object and prediction."""
    with NpzFile(source) as file:
        stacks = [file.get(name, np.empty(0)) for name in ("image", "target", "mask")]
    shapes = [stack.shape for stack in stacks]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3 or 0 in shapes[0]:
        raise ValueError(
            f"{source}: received image, target, mask of {shapes}; accepted: the samples of a run"
        )
    images, targets, masks = stacks
    count = len(images)
    figure, grid = plt.subplots(
        1, count, figsize=(2.2 * count, 2.5), layout="constrained", squeeze=False
    )
    for axes, image, target, mask in zip(grid[0], images, targets, masks, strict=True):
        axes.imshow(image, cmap="gray")
        _outline(axes, target, "C2")
        _outline(axes, mask, "C3")
        axes.set_axis_off()
    figure.suptitle("object (green) and prediction (red)", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _outline(axes: Axes, mask: np.ndarray, colour: str) -> None:
    if mask.min() < mask.max():
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and draw; 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m training.plots", description=__doc__)
    parser.add_argument("run", type=Path, help="the --out of a run")
    options = parser.parse_args(arguments)
    try:
        for path in draw(options.run):
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
