"""Dice of training, by dataset, kind of prompt and round, summed over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.distributed import World

_MEMORY = 0.98  # of the running Dice, a step
#: What objects that are made up count as, by a plan's kind, and those of label maps.
SYNTHETIC = {"supervoxel": "Synthetic_supervoxel", "shape": "Synthetic_shape"}
PAINTED = "Painted"


class Scores:
    """Sums of Dice since the last line of the log, and a running mean of each dataset.

    Args:
        sources: names of the datasets, modality first.
        rounds: later ones count as the last.
    """

    def __init__(self, sources: Sequence[str], rounds: int) -> None:
        """Start with nothing."""
        self._names = {name: i for i, name in enumerate([*sources, *SYNTHETIC.values()])}
        self._sums = torch.zeros(len(self._names) + 1, 2, rounds, 2, dtype=torch.float64)
        self._step = torch.zeros(len(self._names) + 1, 2, dtype=torch.float64)
        self.running: dict[str, float] = {}

    def add(self, source: str, boxed: bool, round_: int, dice: float) -> None:
        """Count one object's Dice in one round; label maps share a row."""
        row = self._names.get(source, len(self._names))
        place = (row, int(boxed), min(round_, self._sums.shape[2] - 1))
        for i, value in enumerate((dice, 1.0)):
            self._sums[(*place, i)] += value
            self._step[row, i] += value

    def end_step(self, world: World) -> None:
        """Move the running means by what all processes saw in this step."""
        total = world.sum(self._step).tolist()
        for name, i in self._names.items():
            dice, count = total[i]
            if count:
                before = self.running.get(name, 0.5)
                self.running[name] = _MEMORY * before + (1 - _MEMORY) * dice / count
        self._step.zero_()

    def table(self, world: World) -> dict[str, float]:
        """Means since the last call: ``dice``, ``round 0``, ..., ``CT box 0``, and so on."""
        sums = world.sum(self._sums)
        self._sums = torch.zeros_like(self._sums)
        found = {"dice": _mean(sums)}
        for i in range(sums.shape[2]):
            found[f"round {i}"] = _mean(sums[:, :, i])
        modalities: dict[str, list[int]] = {}
        for name, row in [*self._names.items(), (PAINTED, len(self._names))]:
            modalities.setdefault(name.split("_")[0], []).append(row)
        for modality, rows in modalities.items():
            for kind in (0, 1):
                for i in range(sums.shape[2]):
                    value = _mean(sums[rows, kind, i])
                    if value == value:  # not NaN: there were any
                        found[f"{modality} {('click', 'box')[kind]} {i}"] = value
        return found


def _mean(sums: Tensor) -> float:
    """Mean of (..., 2) sums and counts; NaN where nothing was counted."""
    total, count = sums.reshape(-1, 2).sum(0).tolist()
    return total / count if count else float("nan")
