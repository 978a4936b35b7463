"""Plans of windows: which object, seen how. Numbers only; ``windows.py`` cuts them."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from inference.geometry import Window
from training.config import Config
from training.others import Cells
from training.view import View, about_box, about_click, first_look, public_window, zoomed_window
from training.volumes import LabelledVolume, Point, TrainingObject, VolumeStore, joined

Kind = Literal["real", "painted", "supervoxel", "shape"]

#: Of the objects without a box, so many are seen in a window as large as the volume, and so many
#: about a click in one that suits them better; the others in one about their bounding box.
_UNBOXED_SHARES = (0.45, 0.25)
_SEEN_BESIDE = 0.9  # of the other objects of a volume, where they have prompts


@dataclass(frozen=True)
class Plan:
    """How one window is cut.

    A cell's place in its window is ``u`` in -1..1 along each axis, edge to edge; it shows the
    volume at ``scale @ (turn @ u + bend(u)) + origin``, in voxels (z, y, x).

    Attributes:
        kind: what the object is.
        volume: index in the store.
        label: of the object; 0 where it is made up.
        also: of its other part, of two objects taken for one; else 0.
        edge: cells along each axis.
        scale: (3, 3) a permutation times half the window's size in voxels.
        turn: (3, 3) flips, rotation and shear.
        origin: (3,) the window's centre.
        bend: (3, 4, 4, 4) displacements at the knots of an elastic deformation, or None.
        cell: edge lengths of a cell in voxels, along the window's own axes.
        boxed: whether the user draws a box.
        box: in cells: lower edges, upper edges, middle slice; None where the box must be taken
            from the mask.
        padding: of a box taken from the mask, in cells.
        around: of a close look at a part of the object: the first look at all of it.
        wide: whether it is a first look at the whole volume, which inference takes but once.
        elsewhere: for each round to come, (n, 3) in cells, where the user clicks on other objects.
        others: (n, 2, 3) in cells, lower and upper edges of other objects' boxes.
        seed: of everything random that follows.
    """

    kind: Kind
    volume: int
    label: int
    also: int
    edge: int
    scale: NDArray[np.float64]
    turn: NDArray[np.float64]
    origin: NDArray[np.float64]
    bend: NDArray[np.float32] | None
    cell: Point
    boxed: bool
    box: tuple[Point, Point, float] | None
    padding: Point
    around: Plan | None
    wide: bool
    elsewhere: tuple[NDArray[np.float64], ...]
    others: NDArray[np.float64]
    seed: int

    def within(self, around: Plan) -> tuple[Point, Point]:
        """Where the first cell lies in the cells of a window with parallel axes, and their size."""
        onto = np.linalg.inv(around.scale @ around.turn)
        size = np.diag(onto @ self.scale @ self.turn) * (around.edge / self.edge)
        centre = (onto @ (self.origin - around.origin) + 1) * (around.edge / 2) - 0.5
        z, y, x = centre - size * (self.edge - 1) / 2
        dz, dy, dx = size
        return (float(z), float(y), float(x)), (float(dz), float(dy), float(dx))


class Planner:
    """Draws objects and decides how they are looked at, as inference looks at them.

    Args:
        store: the volumes; those without an image are painted.
        config: the shares of everything.

    Raises:
        ValueError: balanced sampling, and no volume of a modality with a weight.
    """

    def __init__(self, store: VolumeStore, config: Config) -> None:
        """Group the volumes by modality and dataset."""
        self._store, self._config = store, config
        real = [i for i, v in enumerate(store.volumes) if v.image is not None]
        self._label_maps = [i for i, v in enumerate(store.volumes) if v.image is None]
        self._objects = [(i, j) for i in real for j in range(len(store.volumes[i].objects))]
        tree: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i in real:
            tree[store.volumes[i].modality][store.volumes[i].source].append(i)
        weights = dict(config.modality_weights)
        self.sources: list[str] = []
        self._members: list[list[int]] = []
        shares = []
        for modality, sources in tree.items():
            # A dataset counts by the root of its objects: neither one big set nor one lone volume
            # may fill the modality.
            sizes = {
                s: sum(len(store.volumes[i].objects) for i in members) ** 0.5
                for s, members in sources.items()
            }
            for source, members in sources.items():
                shares.append(weights.get(modality, 0.0) * sizes[source] / sum(sizes.values()))
                self.sources.append(source)
                self._members.append(members)
        self._shares = np.array(shares)
        if not self._objects:
            raise ValueError("no volume with an image; accepted: npz files with imgs and gts")
        if config.sampling == "balanced" and not self._shares.sum():
            wanted = sorted(name for name, weight in weights.items() if weight)
            raise ValueError(f"no volume of a modality in {wanted}; found {sorted(tree)}")

    @property
    def objects(self) -> int:
        """Objects of an epoch."""
        return len(self._objects)

    @property
    def never_shown(self) -> list[str]:
        """Datasets whose objects are never drawn."""
        if self._config.sampling == "epochs":
            return []
        return [s for s, share in zip(self.sources, self._shares, strict=True) if not share]

    def plan(
        self,
        number: int,
        rng: np.random.Generator,
        edge: int,
        boxed: bool | None = None,
        dice: Mapping[str, float] | None = None,
    ) -> Plan:
        """The plan of one window.

        Args:
            number: of the window in the run: its place in an epoch.
            rng: of this window alone.
            edge: cells along each axis.
            boxed: whether there is a box; drawn by ``config.no_box`` if None.
            dice: mean Dice of each dataset so far, for the preference of hard ones.
        """
        config = self._config
        chance = float(rng.random())
        if boxed is None:
            boxed = bool(rng.random() >= config.no_box)
        kinds: tuple[tuple[Kind, float], ...] = (
            ("painted", config.synthetic * bool(self._label_maps)),
            ("supervoxel", config.supervoxels),
            ("shape", config.shapes),
        )
        kind: Kind = "real"
        for name, share in kinds:
            if 0 <= chance < share:
                kind = name
            chance -= share
        if kind == "painted":
            volume = self._label_maps[rng.integers(len(self._label_maps))]
            index = int(rng.integers(len(self._store.volumes[volume].objects)))
        elif config.sampling == "epochs":
            epoch, place = divmod(number, len(self._objects))
            order = np.random.default_rng((config.seed, epoch)).permutation(len(self._objects))
            volume, index = self._objects[int(order[place])]
        else:
            members = self._members[rng.choice(len(self._members), p=self._weights(dice))]
            volume = members[rng.integers(len(members))]
            index = int(rng.integers(len(self._store.volumes[volume].objects)))
        return self._look(kind, volume, index, rng, edge, boxed)

    def _weights(self, dice: Mapping[str, float] | None) -> NDArray[np.float64]:
        """Probability of each dataset; the worse the Dice so far, the likelier."""
        shares = self._shares
        if self._config.hard and dice:
            known = [dice.get(source, 0.5) for source in self.sources]
            shares = shares * (1.1 - np.array(known)) ** self._config.hard
        weights: NDArray[np.float64] = shares / shares.sum()
        return weights

    def _look(
        self, kind: Kind, volume: int, index: int, rng: np.random.Generator, edge: int, boxed: bool
    ) -> Plan:
        config, whole = self._config, self._store.volumes[volume]
        made_up = kind in ("supervoxel", "shape")
        seen = whole.objects[index]
        # No number is drawn where `joined` is 0, so that runs without it keep their random numbers;
        # the same goes for `upright`.
        if config.joined > 0 and not made_up and rng.random() < config.joined:
            seen = _with_neighbour(whole, seen, rng)
        shown_upright = whole.modality in ("CT", "MR")
        upright = shown_upright and config.upright > 0 and rng.random() < config.upright
        order = (0, 1, 2)
        if rng.random() < config.permute and not upright:
            z, y, x = (int(a) for a in rng.permutation(3))
            order = (z, y, x)
        view = View(whole, seen, order, rng)
        window, whole_window, wide = self._choose_window(kind, view, boxed, edge, rng)
        scale, origin = _of_window(window, order)
        flips, turn, bend = self._turn_and_bend(upright, whole_window is not None, rng)
        z, y, x = (p / c for p, c in zip(view.padding, window.cell, strict=True))
        known = bend is None and not made_up
        seed = int(rng.integers(2**62))
        chance = np.random.default_rng((seed, 1))
        beside = [] if made_up else self._objects_beside(whole, seen, chance)
        cells = Cells(scale @ turn, origin, edge)
        if whole_window is not None:  # inference shows a close look all that is said in it
            cells = cells.within(whole_window, view)
        plan = Plan(
            kind=kind,
            volume=volume,
            label=0 if made_up else seen.label,
            also=0 if made_up else seen.also,
            edge=edge,
            scale=scale,
            turn=turn,
            origin=origin,
            bend=bend,
            cell=window.cell,
            boxed=boxed,
            box=_flipped(view.box(window), flips, edge) if known else None,
            padding=(z, y, x),
            around=None,
            wide=wide,
            elsewhere=cells.clicks(beside, chance, config.rounds - 1, boxed),
            others=cells.boxes(beside, view, window.cell, chance),
            seed=seed,
        )
        if whole_window is None:
            return plan
        scale, origin = _of_window(whole_window, order)
        around = dataclasses.replace(plan, scale=scale, origin=origin, cell=whole_window.cell)
        return dataclasses.replace(plan, around=around)

    def _choose_window(
        self, kind: Kind, view: View, boxed: bool, edge: int, rng: np.random.Generator
    ) -> tuple[Window, Window | None, bool]:
        """The window; of a close look, the one it lies in; whether it is a look at all there is."""
        config = self._config
        if config.network == "sam_med3d" and config.sam.windows == "1.5mm":
            return public_window(view, edge), None, False
        window = self._window(view, boxed, edge, rng)
        large = max(window.size) > 1.25 * edge
        refining = config.network == "refiner" and kind == "real"
        if refining and large and rng.random() < config.zoom:
            return zoomed_window(window, view, edge, rng), window, False
        if not boxed and kind in ("real", "painted"):
            first, near = _UNBOXED_SHARES
            share = rng.random()
            if share < first:
                return first_look(view, edge, rng), None, True
            if share < first + near:
                return about_click(view, edge, rng), None, False
        return window, None, False

    def _turn_and_bend(
        self, upright: bool, close: bool, rng: np.random.Generator
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float32] | None]:
        """Which axes are flipped; ``turn`` and ``bend`` of a plan, none but flips close up."""
        flips = rng.random(3) < self._config.flip
        flips[:2] &= not upright  # left and right look alike
        turn = np.diag(np.where(flips, -1.0, 1.0))
        if close or rng.random() >= self._config.warp:
            return flips, turn, None
        turn = _rotation(rng) @ turn
        return flips, turn, rng.normal(0, 0.035, (3, 4, 4, 4)).astype(np.float32)

    def _objects_beside(
        self, whole: LabelledVolume, seen: TrainingObject, chance: np.random.Generator
    ) -> list[TrainingObject]:
        """Other objects that have prompts, too, if there are to be any."""
        if chance.random() >= self._config.others:
            return []
        known = chance.random(len(whole.objects)) < _SEEN_BESIDE
        own = (seen.label, seen.also)
        return [o for o, k in zip(whole.objects, known, strict=True) if k and o.label not in own]

    def _window(self, view: View, boxed: bool, edge: int, rng: np.random.Generator) -> Window:
        """A window about a box: as inference chooses it, with jitter; freer without a box."""
        low, high, _ = view.edges
        centre = [(a + b + 1) / 2 for a, b in zip(low, high, strict=True)]
        size = [b - a for a, b in zip(low, high, strict=True)]
        if boxed:
            scale = float(rng.uniform(*self._config.box_scale))
            factors, shift = np.exp(rng.normal(0, 0.05, 3)), 0.06
        else:
            scale = float(np.exp(rng.uniform(np.log(1.2), np.log(4.0))))
            factors, shift = np.exp(rng.normal(0, 0.2, 3)), 0.15
        edges = [s * float(f) for s, f in zip(size, factors, strict=True)]
        centre = [
            c + float(rng.uniform(-shift, shift)) * s for c, s in zip(centre, size, strict=True)
        ]
        return about_box(centre, edges, edge, view.spacing_mm, scale)


def _with_neighbour(
    volume: LabelledVolume, seen: TrainingObject, rng: np.random.Generator
) -> TrainingObject:
    """An object joined with one whose bounding box meets its own; alone if there is none.

    Such objects have parts of several tissues and leave the box of their middle slice far more
    often than single ones, in real images.
    """
    low, high = np.array(seen.start), np.array(seen.stop)
    near = [
        o
        for o in volume.objects
        if o is not seen and (low <= o.stop).all() and (o.start <= high).all()
    ]
    return joined(volume, seen, near[rng.integers(len(near))]) if near else seen


def _of_window(
    window: Window, order: tuple[int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``scale`` and ``origin`` of a plan's window, the volume's axis of each axis given."""
    size = np.array(window.size, float)
    scale, origin = np.zeros((3, 3)), np.empty(3)
    for axis in range(3):
        scale[order[axis], axis] = size[axis] / 2
    origin[list(order)] = np.array(window.start) + size / 2 - 0.5
    return scale, origin


def _rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """Three small rotations and a shear."""
    matrix = np.eye(3)
    for axis, angle in enumerate(rng.normal(0, 0.25, 3)):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    sheared: NDArray[np.float64] = matrix @ (np.eye(3) + rng.normal(0, 0.06, (3, 3)))
    return sheared


def _flipped(
    box: tuple[Point, Point, float], flips: NDArray[np.bool_], edge: int
) -> tuple[Point, Point, float]:
    """The box as it lies in a window of ``edge`` cells whose axes are flipped where said."""
    low, high, middle = list(box[0]), list(box[1]), box[2]
    for axis in np.flatnonzero(flips):
        low[axis], high[axis] = edge - 1 - high[axis], edge - 1 - low[axis]
    if flips[0]:
        middle = edge - 1 - middle
    return (low[0], low[1], low[2]), (high[0], high[1], high[2]), middle
