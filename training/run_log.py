"""The log of a run: a CSV file, lines on the terminal, a progress bar, TensorBoard."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inference.whole_file import replacing

#: Columns of ``log.csv`` before those of the rounds, ``dice_0`` and so on.
COLUMNS = ("step", "epoch", "minutes", "windows", "lr", "loss", "dice", "skipped")


class RunLog:
    """Writes what a run does; of several processes only the first does so.

    Args:
        folder: gets ``log.csv`` and, if wanted, TensorBoard's event files.
        rounds: columns of Dice by round.
        step: the run goes on from; later lines of an interrupted run are dropped.
        total: steps of the whole run, for the progress bar.
        tensorboard: write event files too.

    Raises:
        ValueError: TensorBoard is wanted but not installed.
    """

    def __init__(
        self, folder: Path, rounds: int, step: int, total: int, tensorboard: bool = False
    ) -> None:
        """Open the files; lines up to ``step`` stay."""
        self._path, self._rounds = folder / "log.csv", rounds
        self._bar: Any = tqdm(
            total=total, initial=step, unit="step", disable=not sys.stderr.isatty(), smoothing=0.1
        )
        kept = [row for row in read_log(self._path) if row["step"] <= step] if step else []
        names = [*COLUMNS, *(f"dice_{i}" for i in range(rounds))]
        with replacing(self._path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text)
            writer.writerow(names)
            # The run may have had another number of rounds so far.
            writer.writerows([_cell(row.get(n, math.nan)) for n in names] for row in kept)
            text.flush()
            text.detach()
        self._events = _event_writer(folder, step) if tensorboard else None
        self._by_round: dict[str, str] = {}

    def step(self, loss: float, dice: float) -> None:
        """Move the progress bar by a step; Dice by round is that of the last line."""
        self._bar.set_postfix(
            loss=f"{loss:.3f}", dice=f"{dice:.3f}", **self._by_round, refresh=False
        )
        self._bar.update()

    def line(self, values: Mapping[str, float], table: Mapping[str, float]) -> None:
        """Write a line.

        Args:
            values: of :data:`COLUMNS`.
            table: of ``Scores.table``.
        """
        rounds = [table.get(f"round {i}", math.nan) for i in range(self._rounds)]
        self._by_round = {"rounds": " ".join(f"{v:.2f}" for v in rounds if math.isfinite(v))}
        with self._path.open("a", encoding="utf-8", newline="") as file:
            cells = [*(values[name] for name in COLUMNS), *rounds]
            csv.writer(file).writerow([_cell(v) for v in cells])
        if self._events is not None:
            for name, value in [*values.items(), *table.items()]:
                if math.isfinite(value):
                    self._events.add_scalar(name.replace(" ", "/"), value, int(values["step"]))
            self._events.flush()
        head = (
            f"step {values['step']:.0f} epoch {values['epoch']:.2f} "
            f"minutes {values['minutes']:.1f} windows {values['windows']:.0f} "
            f"lr {values['lr']:.2e} loss {values['loss']:.3f} dice {values['dice']:.3f}"
        )
        if values["skipped"]:
            head += f" skipped {values['skipped']:.0f}"
        details = [f"{k} {v:.3f}" for k, v in table.items() if k != "dice" and math.isfinite(v)]
        self._bar.write(" | ".join([head, *details]))

    def close(self) -> None:
        """Finish the progress bar and TensorBoard's file."""
        self._bar.close()
        if self._events is not None:
            self._events.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a ``log.csv``; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) if cell else math.nan for name, cell in row.items()}
            for row in csv.DictReader(file)
            # One of other columns, or cut off by a kill.
            if None not in row and None not in row.values()
        ]


def _cell(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:.0f}" if value == int(value) else f"{value:.6g}"


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is true, but TensorBoard is not installed; accepted: false, or "
            "pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=step)
