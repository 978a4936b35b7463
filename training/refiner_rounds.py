"""How the refiner is trained: a round of a batch of objects at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Config
from training.dataset import WindowDataset
from training.losses import ABSENT, segmentation_loss
from training.pool import Batch, Pool
from training.scores import Scores
from training.workers import Workers


class RefinerRounds:
    """The network's part of rounds whose objects are in a :class:`Pool`, here or in workers.

    Args:
        network: the refiner, perhaps wrapped for several processes.
        dataset: where objects come from; on a CPU for workers.
        config: of the run.
        slots: of this process's places among those of all processes, a forward pass a row. With
            workers, a worker a row, and whichever are ready make a forward pass.
        total: places of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: WindowDataset,
        config: Config,
        slots: Sequence[Sequence[int]],
        total: int,
    ) -> None:
        """Start without objects."""
        self._network, self._config, self._slots = network, config, slots
        self._objects: Pool | Workers
        if config.workers:
            self._objects = Workers(dataset, config, slots, total)
        else:
            places = [slot for row in slots for slot in row]
            self._objects = Pool(dataset, config, places, total)
        self.samples: dict[str, Tensor] = {}

    def loss(
        self, part: int, step: int, progress: float, dice: Mapping[str, float], scores: Scores
    ) -> Tensor:
        """One forward pass: a round of some objects.

        Args:
            part: which row of the places, if there are no workers.
            step: steps so far (objects remember by themselves).
            progress: share of the run so far: it decides the window's edge.
            dice: mean Dice of each dataset so far.
            scores: are added to.

        Returns:
            The mean loss; the clicks of the next round are already drawn, or being drawn.

        Raises:
            ValueError: there is no window to show, or a worker has ended.
        """
        edge = [size for start, size in self._config.windows if start <= progress][-1]
        objects = self._objects
        if isinstance(objects, Workers):
            device = next(self._network.parameters()).device
            batch = objects.batch(edge, dice, self._predict, device)
        else:
            first = objects.first_pass(self._slots[part], edge, dice)
            batch = objects.batch(None if first is None else self._predict(first))
        loss, logits = self._round(batch)
        for score in objects.advance(logits):
            scores.add(*score)
        return loss

    def _predict(self, channels: Tensor) -> Tensor:
        """(B, D, H, W) float32 logits, without gradients."""
        with torch.no_grad():
            logits: Tensor = self._network(_laid_out(channels))[:, 0]
        return logits.float()

    def _round(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss and (B, D, H, W) logits of a round."""
        logits = self._network(_laid_out(batch.channels)).float()
        logits = logits.masked_fill(batch.beyond[:, None], ABSENT)
        targets = batch.targets[:, None].float()
        loss = segmentation_loss(logits, targets, self._config).mean()
        logits = logits.detach()[:, 0]
        self.samples = {
            "image": batch.channels[:, 0],
            "target": batch.targets,
            "mask": logits > 0,
        }
        return loss, logits

    def state(self) -> dict[str, Any]:
        """What the next step depends on, as plain values and tensors."""
        return self._objects.state()

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all processes; where they do not fit, from new objects."""
        self._objects.load(states)

    def close(self) -> None:
        """End what runs besides this process; a later pass begins with new objects."""
        if isinstance(self._objects, Workers):
            self._objects.close()


def _laid_out(channels: Tensor) -> Tensor:
    """The input as it lies best in memory.

    On a CPU that computes in float32 oneDNN's convolutions take the channels of a cell together,
    and all activations follow: a step takes nine tenths of the time. In bfloat16 PyTorch's gradient
    of group normalisation takes four times as long in that order.
    """
    device = channels.device.type
    if device != "cpu" or torch.is_autocast_enabled(device):
        return channels
    return channels.contiguous(memory_format=torch.channels_last_3d)
