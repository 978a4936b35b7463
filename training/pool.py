"""The refiner's objects in training: each with its prompts and its mask, from round to round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.appearance import intensity_log_odds
from inference.look import BLURRING_CELL
from inference.model.refiner import CHANNELS
from inference.prompts import WindowPrompts, refiner_channels
from inference.refinement import BOX_ALONE
from inference.second_pass import FIRST_PASS
from training.augmentation import Chance, perturb_mask
from training.click_simulation import next_clicks
from training.config import Config
from training.dataset import Sample, WindowDataset
from training.losses import ABSENT, dice_score
from training.surroundings import Surroundings

_SHAPE = CHANNELS.index("ellipsoid")
#: Log-odds at the ellipsoid's centre, and everywhere, that draw a poor first mask towards it.
_DRAWN, _SWOLLEN = 5.0, 0.4
_SAVED = [field.name for field in dataclasses.fields(Sample) if field.name != "prompts"]

#: Where an object comes from, whether it has a box, the round and its Dice.
Score = tuple[str, bool, int, float]


@dataclass
class _Place:
    """One object of the pool: how far its interaction is."""

    number: int  # of the window
    sample: Sample
    mask: Tensor | None  # in the first window, of a close look as well
    close: Tensor | None  # a close look's own one where cells of the first window lose what is thin
    left: int  # rounds, the next one included
    round: int


@dataclass(frozen=True)
class Batch:
    """What the network is shown in a round of B objects, and what it should say.

    Attributes:
        channels: (B, C, D, H, W) float32, its input.
        targets: (B, D, H, W) bool.
        beyond: (B, D, H, W) bool, which cells lie beyond the volume. Nothing is asked of the
            network there, and nothing it says there counts.
    """

    channels: Tensor
    targets: Tensor
    beyond: Tensor


class Pool:
    """Objects in places, each one round further at every turn.

    A turn of a row of places is :meth:`first_pass`, :meth:`batch` and :meth:`advance`, in this
    order; what the network says in between comes from whoever has the network. The next click
    comes from what it says, and an object leaves after its last round or once it is perfect. All
    chance follows from the seed, the window's number and the round.

    Args:
        dataset: where objects come from.
        config: of the run.
        slots: of the places here among those of all processes.
        total: places of all processes.
    """

    def __init__(
        self, dataset: WindowDataset, config: Config, slots: Sequence[int], total: int
    ) -> None:
        """Start with empty places."""
        self._dataset, self._config, self._total = dataset, config, total
        self.drawn = dict.fromkeys(slots, 0)  # objects so far
        self._places: dict[int, _Place] = {}
        self._turn: list[_Place] = []
        self._first: dict[int, Tensor] = {}  # logits in first windows, by the windows' numbers
        self._shape = torch.empty(0)

    def first_pass(self, row: Sequence[int], edge: int, dice: Mapping[str, float]) -> Tensor | None:
        """Begin a turn: the input for the first windows of those that are close looks.

        Args:
            row: places.
            edge: of the windows in cells.
            dice: mean Dice of each dataset so far.

        Returns:
            (n, C, D, H, W), or None if no place holds a close look.
        """
        self._fill(row, edge, dice)
        self._turn = [self._places[slot] for slot in row]
        close = [(p, p.sample.around) for p in self._turn if p.sample.around is not None]
        if not close:
            return None
        prompts = [around.prompts(p.sample.prompts) for p, around in close]
        images = torch.stack([around.image for _, around in close])
        masks = [torch.zeros_like(a.inside) if p.mask is None else p.mask for p, a in close]
        return _channels(images, prompts, masks)

    def batch(self, first: Tensor | None) -> Batch:
        """The turn's round.

        Args:
            first: (n, D, H, W) float32, what the network says to :meth:`first_pass`.
        """
        close = [p.number for p in self._turn if p.sample.around is not None]
        self._first = {} if first is None else dict(zip(close, first, strict=True))
        images = torch.stack([p.sample.image for p in self._turn])
        masks, coarse = [], torch.zeros_like(images)
        for place, logits in zip(self._turn, coarse, strict=True):
            sample, mask = place.sample, place.mask
            if sample.around is not None:
                before = self._first[place.number]
                seen = sample.around.shown(before, images.shape[1])
                mask = _begun(place, sample.around, before, seen)
                if self._config.refiner.coarse:
                    logits.copy_(seen)
            masks.append(torch.zeros_like(sample.target) if mask is None else mask)
        channels = _channels(images, [p.sample.prompts for p in self._turn], masks, coarse)
        targets = torch.stack([p.sample.target for p in self._turn])
        beyond = ~torch.stack([p.sample.inside for p in self._turn])
        self._shape = channels[:, _SHAPE].masked_fill(beyond, ABSENT)
        return Batch(channels, targets, beyond)

    def advance(self, logits: Tensor) -> list[Score]:
        """Score the turn's round, and make the mask and the click that the next one begins with.

        Args:
            logits: (B, D, H, W) float32, what the network says to :meth:`batch`, ``ABSENT`` beyond
                the volume.
        """
        places, config = self._turn, self._config
        targets = torch.stack([place.sample.target for place in places])
        rngs = [
            np.random.default_rng((config.seed, 3, place.number, place.round)) for place in places
        ]
        silent = [bool(rng.random() < config.no_click) for rng in rngs]
        dice = dice_score(logits > 0, targets).tolist()
        left = [self._left(*one) for one in zip(places, logits, strict=True)]
        predicted = torch.stack(
            [self._mask(*one) for one in zip(places, left, self._shape, strict=True)]
        )
        clicks = next_clicks(
            predicted,
            targets,
            [place.sample.cell for place in places],
            [float(rng.random()) for rng in rngs],
            config.clicks,
            config.click_slack,
        )
        withheld = [bool(rng.random() < config.no_mask) for rng in rngs]
        scores = [
            (place.sample.source, place.sample.prompts.box is not None, place.round, score)
            for place, score in zip(places, dice, strict=True)
        ]
        for place, mask, click, quiet, unseen in zip(
            places, predicted, clicks, silent, withheld, strict=True
        ):
            sample = place.sample
            place.mask, place.close = mask, None
            if sample.around is not None:
                first = self._first[place.number] + BOX_ALONE * (place.round == 0)
                before = (first > 0) & sample.around.inside
                place.mask = sample.around.taught(before, mask) & sample.around.inside
                cells = zip(sample.cell, sample.around.size, strict=True)
                if max(close / size for close, size in cells) > BLURRING_CELL:
                    place.close = mask & sample.inside
            if place.round < len(sample.elsewhere):
                told = (*sample.prompts.elsewhere, *sample.elsewhere[place.round])
                sample.prompts = dataclasses.replace(sample.prompts, elsewhere=told)
            place.left -= 1
            place.round += 1
            if click is None:
                place.left = 0
            elif not quiet:
                clicks = (*sample.prompts.clicks, click)
                sample.prompts = dataclasses.replace(sample.prompts, clicks=clicks)
                if place.left and unseen:
                    place.mask = place.close = None
        return scores

    def _fill(self, row: Sequence[int], edge: int, dice: Mapping[str, float]) -> None:
        """Draw objects for the places of those that have left."""
        empty = [
            slot
            for slot in row
            if slot not in self._places
            or self._places[slot].left < 1
            or self._places[slot].sample.image.shape[0] != edge
        ]
        if not empty:
            return
        numbers = [self.drawn[slot] * self._total + slot for slot in empty]
        with torch.autocast(self._dataset.store.device.type, enabled=False):
            samples = self._dataset.draw(numbers, edge, dice=dice)
        for slot, number, sample in zip(empty, numbers, samples, strict=True):
            self.drawn[slot] += 1
            rng = np.random.default_rng((self._config.seed, 2, number))
            rounds = 1 if sample.wide else int(rng.integers(1, self._config.rounds + 1))
            self._places[slot] = _Place(
                number, sample, None, None, rounds, 0 if sample.prompts.box else 1
            )

    def _left(self, place: _Place, logits: Tensor) -> Tensor:
        """Logits that leave a round, as in inference: not the network's last word alone."""
        around = place.sample.around
        if around is not None:
            first = around.shown(self._first[place.number], logits.shape[0])
            logits = logits.lerp(first, FIRST_PASS)
        return logits + BOX_ALONE if place.round == 0 else logits

    def _mask(self, place: _Place, logits: Tensor, shape: Tensor) -> Tensor:
        """The mask that a round leaves, now and then a poor one."""
        rng = np.random.default_rng((self._config.seed, 4, place.number, place.round))
        if rng.random() >= self._config.poor_mask:
            if place.sample.beside is None or rng.random() >= self._config.tell_apart:
                return logits > 0
            return logits + _intensity_evidence(place.sample, logits > 0) > 0
        if place.round == 0:
            return logits + _DRAWN * shape + _SWOLLEN > 0
        chance = Chance(int(rng.integers(2**62)), logits.device)
        return perturb_mask(logits > 0, chance) & place.sample.inside

    def state(self) -> dict[str, Any]:
        """Everything the next turn depends on, as plain values and tensors."""
        pool = {}
        for slot, place in self._places.items():
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
        return {"total": self._total, "drawn": self.drawn, "pool": pool}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all processes; where they do not fit, from new objects.

        They do not with another number of places, or if samples knew less when they were saved.

        Args:
            states: of :meth:`state`, one a process of the run that saved them.
        """
        saved = [list(entry["sample"]) for state in states for entry in state["pool"].values()]
        drawn = {slot: n for state in states for slot, n in state["drawn"].items()}
        fits = bool(states) and states[0]["total"] == self._total and set(drawn) >= set(self.drawn)
        if not fits or any(names != _SAVED for names in saved):
            self.drawn = dict.fromkeys(self.drawn, objects_drawn(states, self._total))
            return
        device = self._dataset.store.device
        self.drawn = {slot: drawn[slot] for slot in self.drawn}
        for state in states:
            for slot, entry in state["pool"].items():
                if slot not in self.drawn:
                    continue
                values = {k: _moved(v, device) for k, v in entry["sample"].items()}
                if values["around"] is not None:
                    around = {k: _moved(v, device) for k, v in values["around"].items()}
                    values["around"] = Surroundings(**around)
                sample = Sample(prompts=WindowPrompts(**entry["prompts"]), **values)
                mask, close = (_moved(entry.get(name), device) for name in ("mask", "close"))
                self._places[slot] = _Place(
                    entry["number"], sample, mask, close, entry["left"], entry["round"]
                )


def objects_drawn(states: Sequence[Mapping[str, Any]], total: int) -> int:
    """Objects that each of ``total`` places may leave out, as a run's places had them before."""
    seen = max((s["total"] * max(s["drawn"].values()) for s in states), default=0)
    return -(-int(seen) // total)


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


def _intensity_evidence(sample: Sample, mask: Tensor) -> Tensor:
    """Log-odds that inference adds where objects side by side tell each other apart."""
    assert sample.beside is not None
    prompts = sample.prompts
    labels = torch.where(mask, 1, sample.beside)
    evidence = intensity_log_odds(
        sample.image.cpu().numpy(),
        labels.cpu().numpy(),
        [place for place, positive in prompts.clicks if positive],
        len(prompts.clicks),
        prompts.box is not None,
    )
    return torch.from_numpy(evidence).to(mask.device)


def _channels(
    images: Tensor,
    prompts: list[WindowPrompts],
    masks: list[Tensor],
    coarse: Tensor | None = None,
) -> Tensor:
    """The network's input, made as inference makes it: in float32, empty masks unknown."""
    shown = torch.stack(masks)
    known = shown.flatten(1).any(1).tolist()
    with torch.autocast(images.device.type, enabled=False):
        return refiner_channels(images, prompts, shown.float(), known, coarse)


def _own(value: Any) -> Any:
    return value.clone().cpu() if isinstance(value, Tensor) else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
