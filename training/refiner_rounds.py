"""How the refiner is trained: a pool of objects, each one round further at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.appearance import intensities_say
from inference.look import BLURRING_CELL
from inference.model.refiner import CHANNELS
from inference.prompts import WindowPrompts, refiner_channels
from training.augmentation import Chance, perturb_mask
from training.click_simulation import next_clicks
from training.config import Config
from training.dataset import Sample, WindowDataset
from training.losses import dice_score, segmentation_loss
from training.scores import Scores
from training.surroundings import Surroundings

_SHAPE = CHANNELS.index("ellipsoid")
#: Log-odds at the ellipsoid's centre, and everywhere, that draw a poor first mask towards it.
_DRAWN, _SWOLLEN = 5.0, 0.7
_ABSENT = -20.0  # a logit that costs nothing where there is no object
_SAVED = [field.name for field in dataclasses.fields(Sample) if field.name != "prompts"]


@dataclass
class _Place:
    """One object of the pool: how far its interaction is."""

    number: int  # of the window
    sample: Sample
    mask: Tensor | None  # in the first window, of a close look as well
    close: Tensor | None  # a close look's own one where cells of the first window lose what is thin
    left: int  # rounds, the next one included
    round: int


class RefinerRounds:
    """A pool of objects: every step is one round of each.

    The next click comes from the step's own output; an object leaves after its last round or once
    it is perfect. All chance follows from the seed, the window's number and the round.

    Args:
        network: the refiner, perhaps wrapped for several processes.
        dataset: where objects come from.
        config: of the run.
        slots: of this process's places among those of all processes, a forward pass a row.
        total: places of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: WindowDataset,
        config: Config,
        slots: list[list[int]],
        total: int,
    ) -> None:
        """Start with an empty pool."""
        self._network, self._dataset, self._config = network, dataset, config
        self._slots, self._total = slots, total
        self._drawn = {slot: 0 for row in slots for slot in row}  # objects so far
        self._pool: dict[int, _Place] = {}
        self.samples: dict[str, Tensor] = {}

    def loss(
        self, part: int, step: int, progress: float, dice: Mapping[str, float], scores: Scores
    ) -> Tensor:
        """One forward pass: a round of each object of a row of the pool.

        Args:
            part: which row.
            step: steps so far (the pool remembers by itself).
            progress: share of the run so far: it decides the window's edge.
            dice: mean Dice of each dataset so far.
            scores: are added to.

        Returns:
            The mean loss; the clicks of the next round are already drawn.
        """
        edge = [size for start, size in self._config.windows if start <= progress][-1]
        row = self._slots[part]
        self._fill(row, edge, dice)
        places = [self._pool[slot] for slot in row]
        images = torch.stack([p.sample.image for p in places])
        targets = torch.stack([p.sample.target for p in places])
        first = self._first_pass(places)
        masks, coarse = [], torch.zeros_like(images)
        for place, logits in zip(places, coarse, strict=True):
            sample, mask = place.sample, place.mask
            if sample.around is not None:
                seen = sample.around.shown(first[place.number], edge)
                mask = _begun(place, sample.around, first[place.number], seen)
                if self._config.refiner.coarse:
                    logits.copy_(seen)
            masks.append(torch.zeros_like(sample.target) if mask is None else mask)
        channels = _channels(images, [p.sample.prompts for p in places], masks, coarse)
        # Beyond the volume nothing is asked of the network, and nothing it says there counts.
        beyond = ~torch.stack([p.sample.inside for p in places])
        logits = self._network(channels).float().masked_fill(beyond[:, None], _ABSENT)
        losses = segmentation_loss(logits, targets[:, None].float(), self._config)
        said = logits.detach()[:, 0]
        shape = channels[:, _SHAPE].masked_fill(beyond, _ABSENT)
        self._advance(places, said, targets, shape, first, scores)
        self.samples = {"image": images, "target": targets, "mask": said > 0}
        return losses.mean()

    def _first_pass(self, places: list[_Place]) -> dict[int, Tensor]:
        """Logits (D, H, W) in the first windows of those that are close looks, by their number."""
        close = [(p, p.sample.around) for p in places if p.sample.around is not None]
        if not close:
            return {}
        prompts = [around.prompts(p.sample.prompts) for p, around in close]
        images = torch.stack([around.image for _, around in close])
        masks = [torch.zeros_like(a.inside) if p.mask is None else p.mask for p, a in close]
        with torch.no_grad():
            logits = self._network(_channels(images, prompts, masks)).float()[:, 0]
        return {p.number: one for (p, _), one in zip(close, logits, strict=True)}

    def _fill(self, row: list[int], edge: int, dice: Mapping[str, float]) -> None:
        """Draw objects for the places of those that have left."""
        empty = [
            slot
            for slot in row
            if slot not in self._pool
            or self._pool[slot].left < 1
            or self._pool[slot].sample.image.shape[0] != edge
        ]
        if not empty:
            return
        numbers = [self._drawn[slot] * self._total + slot for slot in empty]
        with torch.autocast(self._dataset.store.device.type, enabled=False):
            samples = self._dataset.draw(numbers, edge, dice=dice)
        for slot, number, sample in zip(empty, numbers, samples, strict=True):
            self._drawn[slot] += 1
            rng = np.random.default_rng((self._config.seed, 2, number))
            rounds = 1 if sample.wide else int(rng.integers(1, self._config.rounds + 1))
            self._pool[slot] = _Place(
                number, sample, None, None, rounds, 0 if sample.prompts.box else 1
            )

    def _advance(
        self,
        places: list[_Place],
        logits: Tensor,
        targets: Tensor,
        shape: Tensor,
        first: Mapping[int, Tensor],
        scores: Scores,
    ) -> None:
        """Score a round, and make the mask and the click that the next one begins with."""
        rngs = [
            np.random.default_rng((self._config.seed, 3, place.number, place.round))
            for place in places
        ]
        silent = [bool(rng.random() < self._config.no_click) for rng in rngs]
        dice = dice_score(logits > 0, targets).tolist()
        predicted = torch.stack(
            [self._mask(*one) for one in zip(places, logits, shape, strict=True)]
        )
        clicks = next_clicks(
            predicted,
            targets,
            [place.sample.cell for place in places],
            [float(rng.random()) for rng in rngs],
            self._config.clicks,
            self._config.click_slack,
        )
        withheld = [bool(rng.random() < self._config.no_mask) for rng in rngs]
        for place, mask, click, quiet, unseen, score in zip(
            places, predicted, clicks, silent, withheld, dice, strict=True
        ):
            sample = place.sample
            scores.add(sample.source, sample.prompts.box is not None, place.round, score)
            place.mask, place.close = mask, None
            if sample.around is not None:
                before = (first[place.number] > 0) & sample.around.inside
                place.mask = sample.around.taught(before, mask) & sample.around.inside
                cells = zip(sample.cell, sample.around.size, strict=True)
                if max(close / size for close, size in cells) > BLURRING_CELL:
                    place.close = mask & sample.inside
            place.left -= 1
            place.round += 1
            if click is None:
                place.left = 0
            elif not quiet:
                known = sample.prompts.clicks
                sample.prompts = dataclasses.replace(
                    sample.prompts, clicks=(*known, click), elsewhere=sample.elsewhere
                )
                if place.left and unseen:
                    place.mask = place.close = None

    def _mask(self, place: _Place, logits: Tensor, shape: Tensor) -> Tensor:
        """The mask that a round leaves, now and then a poor one."""
        rng = np.random.default_rng((self._config.seed, 4, place.number, place.round))
        if rng.random() >= self._config.poor_mask:
            if place.sample.beside is None or rng.random() >= self._config.tell_apart:
                return logits > 0
            return logits + _said(place.sample, logits > 0) > 0
        if place.round == 0:
            return logits + _DRAWN * shape + _SWOLLEN > 0
        chance = Chance(int(rng.integers(2**62)), logits.device)
        return perturb_mask(logits > 0, chance) & place.sample.inside

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, as plain values and tensors."""
        pool = {}
        for slot, place in self._pool.items():
            if place.left < 1:
                continue
            # Shared tensors of a batch would each be saved whole.
            sample = {name: _own(getattr(place.sample, name)) for name in _SAVED}
            if place.sample.around is not None:
                around = vars(place.sample.around)
                sample["around"] = {name: _own(value) for name, value in around.items()}
            pool[slot] = {
                "number": place.number,
                "sample": sample,
                "prompts": dataclasses.asdict(place.sample.prompts),
                "mask": _own(place.mask),
                "close": _own(place.close),
                "left": place.left,
                "round": place.round,
            }
        return {"total": self._total, "drawn": self._drawn, "pool": pool}

    def load(self, states: list[dict[str, Any]]) -> None:
        """Go on from the states of all processes; where they do not fit, from new objects.

        They do not with another number of places, or if samples knew less when they were saved.

        Args:
            states: of :meth:`state`, one a process of the run that saved them.
        """
        device = self._dataset.store.device
        drawn = {slot: n for state in states for slot, n in state["drawn"].items()}
        saved = [list(entry["sample"]) for state in states for entry in state["pool"].values()]
        if not states or states[0]["total"] != self._total or any(s != _SAVED for s in saved):
            seen = max((s["total"] * max(s["drawn"].values()) for s in states), default=0)
            self._drawn = dict.fromkeys(self._drawn, -(-seen // self._total))
            return
        self._drawn = {slot: drawn[slot] for slot in self._drawn}
        for state in states:
            for slot, entry in state["pool"].items():
                if slot not in self._drawn:
                    continue
                values = {k: _moved(v, device) for k, v in entry["sample"].items()}
                if values["around"] is not None:
                    around = {k: _moved(v, device) for k, v in values["around"].items()}
                    values["around"] = Surroundings(**around)
                sample = Sample(prompts=WindowPrompts(**entry["prompts"]), **values)
                mask, close = (_moved(entry.get(name), device) for name in ("mask", "close"))
                self._pool[slot] = _Place(
                    entry["number"], sample, mask, close, entry["left"], entry["round"]
                )


def _begun(place: _Place, around: Surroundings, first: Tensor, seen: Tensor) -> Tensor:
    """The mask that a close look begins with: as in inference (``Look.as_fine_as_before``).

    Args:
        place: whose close look it is.
        around: the window that it lies in.
        first: (D, H, W) logits there.
        seen: (D, H, W) the same logits in the close look's cells.
    """
    mask = (seen > 0) & place.sample.inside
    if place.mask is None or place.close is None or not bool(place.mask.any()):
        return mask
    changed = ((first > 0) & around.inside) != place.mask
    return torch.where(around.shown(changed.float(), seen.shape[0]) > 0.5, mask, place.close)


def _said(sample: Sample, mask: Tensor) -> Tensor:
    """Log-odds that inference adds where objects side by side tell each other apart."""
    assert sample.beside is not None
    prompts = sample.prompts
    labels = torch.where(mask, 1, sample.beside)
    said = intensities_say(
        sample.image.cpu().numpy(),
        labels.cpu().numpy(),
        [place for place, positive in prompts.clicks if positive],
        len(prompts.clicks),
        prompts.box is not None,
    )
    return torch.from_numpy(said).to(mask.device)


def _channels(
    images: Tensor,
    prompts: list[WindowPrompts],
    masks: list[Tensor],
    coarse: Tensor | None = None,
) -> Tensor:
    """The network's input, made as inference makes it: in float32, empty masks unknown.

    On a CPU that computes in float32 it lies in memory as oneDNN's convolutions take it, and all
    activations follow: a step takes nine tenths of the time. In bfloat16 PyTorch's gradient of
    group normalisation takes four times as long in that order.
    """
    shown = torch.stack(masks)
    known = shown.flatten(1).any(1).tolist()
    device = images.device.type
    last = device == "cpu" and not torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        channels = refiner_channels(images, prompts, shown.float(), known, coarse)
    return channels.contiguous(memory_format=torch.channels_last_3d) if last else channels


def _own(value: Any) -> Any:
    return value.clone().cpu() if isinstance(value, Tensor) else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
