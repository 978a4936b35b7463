"""Windows with their objects and prompts, made from volumes on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inference.prompts import WindowPrompts
from inference.refinement import bounding_box
from inference.resampling import covered_cells
from training.augmentation import Chance, change_intensities
from training.click_simulation import challenge_box, next_clicks
from training.config import Config
from training.plan import Plan, Planner, Point
from training.scores import PAINTED, SYNTHETIC
from training.surroundings import Surroundings
from training.synthesis import paint, random_shape, supervoxel
from training.volumes import LabelledVolume, VolumeStore
from training.windows import cut_windows

_SMALLEST_TARGET = 8  # cells
_ATTEMPTS = 100
_FAR = 7919  # windows further on; a prime, which is no multiple of an epoch


@dataclass
class Sample:
    """One object in one window, as it is first shown.

    Attributes:
        image: (D, H, W) float32 intensities of any scale.
        target: (D, H, W) bool.
        inside: (D, H, W) bool, which cells lie in the volume. Beyond it the image goes on as its
            edge, and nobody knows whether the object does.
        prompts: a box, or a first click.
        elsewhere: for each round to come, in cells, where the user clicks on other objects.
        beside: (D, H, W) uint8, other objects of the volume by numbers from 2 on, else 0; None
            where no other one has prompts.
        around: of a close look, the window in which the object was first looked at, or None.
        cell: edge lengths of a cell in voxels.
        wide: whether it is a first look at a whole volume, which is over after its round.
        source: where the object comes from, for the log.
    """

    image: Tensor
    target: Tensor
    inside: Tensor
    prompts: WindowPrompts
    elsewhere: tuple[tuple[Point, ...], ...]
    beside: Tensor | None
    around: Surroundings | None
    cell: Point
    wide: bool
    source: str


class WindowDataset:
    """Draws windows; each follows from the configuration's seed and the window's number alone.

    Args:
        volumes: with images, and label maps to be painted.
        config: the shares of everything.
        device: where volumes live and windows are made.

    Raises:
        ValueError: there is nothing to draw.
    """

    def __init__(
        self, volumes: Sequence[LabelledVolume], config: Config, device: torch.device | str = "cpu"
    ) -> None:
        """Move the volumes to the device."""
        self._config = config
        self.store = VolumeStore(volumes, device)
        self._planner = Planner(self.store, config)

    @property
    def objects(self) -> int:
        """Objects of an epoch."""
        return self._planner.objects

    @property
    def sources(self) -> list[str]:
        """Names of the datasets, modality first."""
        return self._planner.sources

    @property
    def never_shown(self) -> list[str]:
        """Datasets that balanced sampling leaves out, since their modality has no weight."""
        return self._planner.never_shown

    def draw(
        self,
        numbers: Sequence[int],
        edge: int,
        boxed: bool | None = None,
        dice: Mapping[str, float] | None = None,
    ) -> list[Sample]:
        """The windows of these numbers.

        Args:
            numbers: of windows; the same one gives the same window.
            edge: cells along each axis.
            boxed: whether objects come with a box; by ``config.no_box`` if None.
            dice: mean Dice of each dataset so far, where hard ones are preferred.

        Raises:
            ValueError: no window of a number shows enough of its object.
        """
        samples: dict[int, Sample] = {}
        waiting = list(range(len(numbers)))
        for attempt in range(_ATTEMPTS):
            plans = []
            for i in waiting:
                # In an epoch an object that is too small to show gives way to another one.
                number = numbers[i] if attempt < 4 else numbers[i] + _FAR * attempt
                rng = np.random.default_rng((self._config.seed, 1, numbers[i], attempt))
                plans.append(self._planner.plan(number, rng, edge, boxed, dice))
            for i, sample in zip(waiting, self._make(plans), strict=True):
                if sample is not None:
                    samples[i] = sample
            waiting = [i for i in waiting if i not in samples]
            if not waiting:
                return [samples[i] for i in range(len(numbers))]
        raise ValueError(
            f"no window of {edge}^3 cells shows {_SMALLEST_TARGET} cells of an object after "
            f"{_ATTEMPTS} attempts; accepted: larger objects"
        )

    def _make(self, plans: Sequence[Plan]) -> list[Sample | None]:
        """Cut the plans' windows; None where too little of the object ended up inside."""
        samples: list[Sample | None] = [None] * len(plans)
        for painted in (False, True):
            chosen = [i for i, plan in enumerate(plans) if (plan.kind == "painted") == painted]
            if not chosen:
                continue
            few = [plans[i] for i in chosen]
            images, shares, inside = cut_windows(self.store, few, shown=not painted)
            chances = [Chance(plan.seed, images.device) for plan in few]
            tasks = [
                self._task(*one)
                for one in zip(few, images, covered_cells(shares), inside, chances, strict=True)
            ]
            sizes = torch.stack([target.sum() for _, target, _ in tasks]).tolist()
            for i, plan, task, chance, size in zip(chosen, few, tasks, chances, sizes, strict=True):
                if size >= _SMALLEST_TARGET:
                    samples[i] = self._prompted(plan, *task, chance)
        return samples

    def _task(
        self, plan: Plan, image: Tensor, mask: Tensor, inside: Tensor, chance: Chance
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image and object of one window, and where both are known."""
        if plan.kind == "painted":
            image = paint(image, chance)
        elif plan.kind == "supervoxel":
            mask = supervoxel(image, chance) & inside
        elif plan.kind == "shape":
            labels, mask = random_shape(image, chance)
            image, inside = paint(labels, chance), torch.ones_like(mask)
        changed = ("gamma", "inversion", "low_resolution", "blur", "shading", "noise")
        if any(getattr(self._config, name) for name in changed):
            image = change_intensities(image, self._config, chance)
        return image, mask, inside

    def _surroundings(self, plan: Plan, around: Plan) -> Surroundings:
        """The window that a plan's one lies in, its intensities changed alike."""
        images, shares, inside = cut_windows(self.store, [around])
        chance = Chance(plan.seed, images.device)
        image, _, inside_one = self._task(around, images[0], shares[0], inside[0], chance)
        return Surroundings(image, inside_one, *plan.within(around))

    def _beside(self, plan: Plan) -> Tensor | None:
        """Other objects in a plan's window, if objects side by side are told apart there."""
        prompted = len(plan.others) or any(map(len, plan.elsewhere))
        if not self._config.tell_apart or not plan.label or not prompted:
            return None
        (labels,), _, _ = cut_windows(self.store, [plan], shown=False)
        labels[(labels == plan.label) | (labels == plan.also)] = 0
        found, numbers = labels.unique(return_inverse=True)
        numbers += int(found[0] > 0)  # no cell is free
        return torch.where(numbers > 0, numbers + 1, 0).clamp_max(255).to(torch.uint8)

    def _prompted(
        self, plan: Plan, image: Tensor, target: Tensor, inside: Tensor, chance: Chance
    ) -> Sample:
        """Add the first prompts, and what a close look lies in."""
        real = self.store.volumes[plan.volume].source
        source = PAINTED if plan.kind == "painted" else SYNTHETIC.get(plan.kind, real)
        elsewhere = tuple(_outside(target, places) for places in plan.elsewhere)
        around = None if plan.around is None else self._surroundings(plan, plan.around)
        sample = Sample(
            image=image,
            target=target,
            inside=inside,
            prompts=WindowPrompts(),
            elsewhere=elsewhere,
            beside=self._beside(plan),
            around=around,
            cell=plan.cell,
            wide=plan.wide,
            source=source,
        )
        if plan.boxed:
            low, high, middle = plan.box or _box(target, inside, plan.padding)
            if chance.happens(self._config.sloppy_box):
                low, high = _sloppy(low, high, chance)
            others = tuple((_point(a), _point(b)) for a, b in plan.others.tolist())
            sample.prompts = WindowPrompts((low, high), middle, others=others)
        else:
            (click,) = next_clicks(
                torch.zeros_like(target)[None],
                target[None],
                [plan.cell],
                [float(chance.rng.random())],
                self._config.clicks,
                self._config.click_slack,
            )
            assert click is not None
            sample.prompts = WindowPrompts(
                clicks=(click,), elsewhere=elsewhere[0] if elsewhere else ()
            )
        return sample


def _box(target: Tensor, inside: Tensor, padding: Point) -> tuple[Point, Point, float]:
    """The challenge's box, padded as far as there is an image, as ``View.edges_of`` pads one."""
    low, high, middle = challenge_box(target.cpu().numpy(), padding)
    seen = bounding_box(inside.cpu().numpy())
    assert seen is not None  # the object lies in it
    low = _point([max(a, b - 0.5) for a, b in zip(low, seen[0], strict=True)])
    high = _point([min(a, b - 0.5) for a, b in zip(high, seen[1], strict=True)])
    return low, high, middle


def _point(values: Sequence[float]) -> Point:
    z, y, x = values
    return z, y, x


def _outside(target: Tensor, places: NDArray[np.float64]) -> tuple[Point, ...]:
    """Those of (n, 3) cells that are not the object's: a deformation may have moved it there.

    Cells beyond the window are none of its.
    """
    cells = torch.from_numpy(places).round().long().to(target.device)
    last = torch.tensor(target.shape, device=target.device) - 1
    within = ((cells >= 0) & (cells <= last)).all(1)
    z, y, x = torch.minimum(cells.clamp_min(0), last).unbind(1)
    own = (target[z, y, x] & within).cpu().numpy()
    return tuple(_point(place) for place in places[~own].tolist())


def _sloppy(low: Point, high: Point, chance: Chance) -> tuple[Point, Point]:
    """A box whose faces are off by about a sixteenth of its edges."""
    faces = []
    for a, b in zip(low, high, strict=True):
        off = np.clip(chance.rng.normal(0, 0.06, 2), -0.2, 0.2) * (b - a)
        faces.append((a + float(off[0]), b + float(off[1])))
    (z0, z1), (y0, y1), (x0, x1) = faces
    return (z0, y0, x0), (z1, y1, x1)
