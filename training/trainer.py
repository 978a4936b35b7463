"""The training loop, the same for the refiner and for SAM-Med3D."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.model.refiner import Refiner
from inference.model.sam_med3d import SamMed3D
from inference.precision import autocast
from inference.whole_file import replacing
from training.checkpoint import PREFIX, load_checkpoint, save_checkpoint
from training.config import Config
from training.dataset import WindowDataset
from training.distributed import World, without_sync
from training.optimisation import Optimisation
from training.refiner_rounds import RefinerRounds
from training.run_log import RunLog
from training.sam_rounds import SamInteraction, SamRounds
from training.scores import Scores

_SAMPLES = 6  # windows kept for plots


class Trainer:
    """Trains a network on the windows of a data set.

    A step is ``accumulate`` forward and backward passes of ``batch`` windows in each process. All
    chance follows from the seed and from numbers of windows, rounds and steps, so a run that goes
    on from a checkpoint does what it would have done, and two processes do what one of twice the
    batch does.

    Args:
        model: a refiner or SAM-Med3D, on its device.
        dataset: on the same device; on a CPU for workers.
        config: of the run.
        out: folder of checkpoint and log.
        world: the processes; this one alone by default.
    """

    def __init__(
        self,
        model: Refiner | SamMed3D,
        dataset: WindowDataset,
        config: Config,
        out: Path,
        world: World | None = None,
    ) -> None:
        """Prepare optimiser, average and windows; nothing runs yet."""
        device = next(model.parameters()).device
        self.model, self.config, self._out = model, config, out
        self._world = world or World(0, 1, device)
        self._device = device
        self._optimisation = Optimisation(model, config)
        self._scaler = torch.amp.GradScaler(
            device.type, enabled=_precision(config, device)[0] is torch.float16
        )
        total = config.batch * config.accumulate * self._world.size
        row, rows = config.batch, config.accumulate
        if config.workers:
            row, rows = config.worker_places, config.workers
        places = row * rows * self._world.size
        slots = [
            [(part * self._world.size + self._world.rank) * row + i for i in range(row)]
            for part in range(rows)
        ]
        self._rounds: RefinerRounds | SamRounds
        if isinstance(model, Refiner):
            network = self._world.wrap(model)
            self._rounds = RefinerRounds(network, dataset, config, slots, places)
        else:
            # Without points or without a box, some embeddings are not asked.
            network = self._world.wrap(SamInteraction(model, config), unused=True)
            self._rounds = SamRounds(network, dataset, config, slots, places)
        self._network = network
        self._windows_a_step = total
        self._steps_an_epoch = steps_an_epoch(config, dataset.objects, self._world.size)
        self.steps = config.epochs * self._steps_an_epoch or config.steps
        self.scores = Scores(dataset.sources, config.rounds)
        self.step, self.minutes, self.windows, self.skipped = 0, 0.0, 0, 0
        self._skipped_in_a_row = 0
        self._losses: list[float] = []

    @property
    def average(self) -> dict[str, Tensor]:
        """The exponential moving average of the weights: what is exported."""
        return self._optimisation.average

    @property
    def epoch(self) -> float:
        """Passes over all objects so far; the refiner's by its mean number of rounds."""
        return self.step / self._steps_an_epoch

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0..1."""
        limit = self.config.minutes
        spent = self.minutes / limit if limit else 0.0
        return min(1.0, max(self.step / self.steps, spent))

    def run(self, max_steps: int | None = None) -> None:
        """Train to the end of the schedule, or for ``max_steps`` more steps of it.

        Writes ``log.csv``, ``samples.npz`` and, every ``checkpoint_minutes`` and at the end,
        ``checkpoint.pt``.

        Raises:
            FloatingPointError: too many steps in a row without a finite loss and gradient.
        """
        config, world = self.config, self._world
        log = None
        if world.first:
            log = RunLog(self._out, config.rounds, self.step, self.steps, config.tensorboard)
        begun, before, saved, first = time.monotonic(), self.minutes, self.minutes, self.step
        last = math.inf if max_steps is None else self.step + max_steps
        try:
            while self.progress < 1 and self.step < last:
                self.take_step()
                self.minutes = world.from_first(before + (time.monotonic() - begun) / 60)
                if log is not None:
                    log.step(self._losses[-1] if self._losses else math.nan, self._mean_dice())
                if self.step % config.log_steps == 0:
                    self._write(log)
                if self.minutes - saved >= config.checkpoint_minutes:
                    self.save()
                    saved = self.minutes
            if self.step > first and self.step % config.log_steps:
                self._write(log)
            self.save()
        finally:
            if log is not None:
                log.close()
            if isinstance(self._rounds, RefinerRounds):
                self._rounds.close()

    def take_step(self) -> None:
        """One optimiser step, left out where loss or gradient are not finite."""
        config = self.config
        self._rate = self._optimisation.prepare(self.step, self.progress, self.epoch)
        self.model.train()
        total = torch.zeros((), device=self._device)
        dtype, enabled = _precision(config, self._device)
        for part in range(config.accumulate):
            with without_sync(self._network, part + 1 < config.accumulate):
                with torch.autocast(self._device.type, dtype, enabled=enabled):
                    loss = self._rounds.loss(
                        part, self.step, self.progress, self.scores.running, self.scores
                    )
                loss = loss / config.accumulate
                self._scaler.scale(loss).backward()
                total += loss.detach()
        norm = self._optimisation.unscale(self._scaler)
        # The same in every process: gradients are summed, too. Where a logit overflows the loss is
        # not finite and its gradient is.
        if bool(torch.isfinite(norm)) and bool(torch.isfinite(self._world.sum(total.clone()))):
            self._optimisation.step(self._scaler)
            self._skipped_in_a_row = 0
            self._losses.append(float(total))
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
        self._scaler.update()
        self.step += 1
        self.windows += self._windows_a_step
        self.scores.end_step(self._world)
        if self._skipped_in_a_row:
            if self._skipped_in_a_row >= config.most_skipped:
                raise FloatingPointError(
                    f"{self._skipped_in_a_row} steps in a row without a finite loss and gradient, "
                    f"the last one {self.step}: lower lr (now {self._rate:.2e}), or set "
                    "precision=float32; the last checkpoint is from before"
                )
            return
        with torch.no_grad():
            self._optimisation.update_average(self.step)

    def _mean_dice(self) -> float:
        running = self.scores.running.values()
        return sum(running) / len(running) if running else math.nan

    def _write(self, log: RunLog | None) -> None:
        """A line of the log; every process takes part in the sums."""
        table = self.scores.table(self._world)
        mean = float(np.mean(self._losses)) if self._losses else math.nan
        loss = float(self._world.sum(torch.tensor(mean))) / self._world.size
        self._losses.clear()
        if log is not None:
            values = {
                "step": self.step,
                "epoch": self.epoch,
                "minutes": self.minutes,
                "windows": self.windows,
                "lr": self._rate,
                "loss": loss,
                "dice": table["dice"],
                "skipped": self.skipped,
            }
            log.line(values, table)

    def save(self) -> None:
        """Write ``checkpoint.pt`` and ``samples.npz``; every process must take part."""
        rounds = self._world.gather(self._rounds.state())
        if self._world.first:
            model = self.model
            state = {
                "model": model.state_dict(),
                "average": self.average,
                "optimisers": self._optimisation.state(),
                "scaler": self._scaler.state_dict(),
                "step": self.step,
                "minutes": self.minutes,
                "windows": self.windows,
                "skipped": self.skipped,
                "skipped_in_a_row": self._skipped_in_a_row,
                "running": dict(self.scores.running),
                "rounds": rounds,  # the generators' states are numbers of windows and rounds
                "config": self.config.to_dict(),
                PREFIX[self.config.network]: _shape(model),
            }
            save_checkpoint(self._out / "checkpoint.pt", state)
            self._save_samples()
        self._world.wait()

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`, also of another number of processes.

        Raises:
            ValueError: it is no checkpoint, or of another network or optimiser.
        """
        state = load_checkpoint(path, self._device)
        shape = PREFIX[self.config.network]
        if shape not in state:
            raise ValueError(f"{path}: no checkpoint of a {self.config.network}")
        wanted = _shape(self.model)
        other = {key: value for key, value in state[shape].items() if wanted.get(key) != value}
        if other:
            accepted = {key: wanted.get(key) for key in other}
            raise ValueError(
                f"{path}: of another {self.config.network}, {other}; accepted: {accepted}"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # of another version, configured alike
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: of another {self.config.network}: {reason}") from None
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        # Earlier checkpoints knew one optimiser.
        self._optimisation.load(state.get("optimisers") or [state["optimiser"]])
        self.step, self.minutes = state["step"], state["minutes"]
        self.windows = state["windows"]
        self.skipped = state.get("skipped", 0)
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.scores.running = dict(state.get("running", {}))
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        self._rounds.load(state.get("rounds", []))

    def _save_samples(self) -> None:
        """The middle slice of some windows of the last pass, for ``plots.py``."""
        shown = self._rounds.samples
        if not shown:
            return
        targets = shown["target"][:_SAMPLES].cpu()
        middle = targets.sum((2, 3)).argmax(1).tolist()  # the slice that shows most of each
        slices = {
            name: np.stack(
                [one[z].float().cpu().numpy() for one, z in zip(stack, middle, strict=False)]
            )
            for name, stack in shown.items()
        }
        with replacing(self._out / "samples.npz") as file:
            np.savez_compressed(file, **slices)  # type: ignore[arg-type]


def steps_an_epoch(config: Config, objects: int, processes: int = 1) -> int:
    """Optimiser steps of a pass over all objects; the refiner's by its mean number of rounds."""
    shown = (config.rounds + 1) / 2 if config.network == "refiner" else 1
    return math.ceil(objects * shown / (config.batch * config.accumulate * processes))


def _precision(config: Config, device: torch.device) -> tuple[torch.dtype, bool]:
    """The number format of autocast, and whether it is on.

    Raises:
        ValueError: bfloat16 is asked for where it computes wrong gradients.
    """
    if config.network == "refiner":
        coarsest = min(edge for _, edge in config.windows) // config.refiner.stride
    else:
        coarsest = config.sam.image_size // config.sam.patch_size
    # oneDNN's bfloat16 kernel leaves the gradient of a 3^3 convolution's weights unwritten where
    # the grid is smaller than the kernel (PyTorch 2.13).
    broken = device.type == "cpu" and coarsest < 3
    if config.precision == "bfloat16" and broken:
        raise ValueError(
            f"precision is bfloat16 with a coarsest grid of {coarsest}^3 cells; accepted on a CPU: "
            "float32, or larger windows"
        )
    if config.precision == "float32" or (config.precision == "auto" and broken):
        return torch.bfloat16, False
    if config.precision == "auto":
        context = autocast(device)
        return context.fast_dtype, context._enabled
    return getattr(torch, config.precision), True


def _shape(model: Refiner | SamMed3D) -> dict[str, Any]:
    """The network's configuration as plain values."""
    return dataclasses.asdict(model.config)
