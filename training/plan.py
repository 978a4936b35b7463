"""Plans of windows: which object, seen how. Numbers only; ``windows.py`` cuts them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from inference.geometry import Triple, Window, window_around
from training.config import Config
from training.volumes import LabelledVolume, Point, TrainingObject, VolumeStore

Kind = Literal["real", "painted", "supervoxel", "shape"]

_PUBLIC_SPACING_MM = 1.5  # windows of public SAM-Med3D checkpoints; inference/coarse.py
_PUBLIC_MARGIN = 1.2  # a larger object gets a coarser window, this much larger than it


@dataclass(frozen=True)
class Plan:
    """How one window is cut.

    A cell's place in its window is ``u`` in -1..1 along each axis, edge to edge; it shows the
    volume at ``scale @ (turn @ u + bend(u)) + origin``, in voxels (z, y, x).

    Attributes:
        kind: what the object is.
        volume: index in the store.
        label: of the object; 0 where it is made up.
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
        zoomed: whether a mask is given, the window showing a part of the object.
        seed: of everything random that follows.
    """

    kind: Kind
    volume: int
    label: int
    edge: int
    scale: NDArray[np.float64]
    turn: NDArray[np.float64]
    origin: NDArray[np.float64]
    bend: NDArray[np.float32] | None
    cell: Point
    boxed: bool
    box: tuple[Point, Point, float] | None
    padding: Point
    zoomed: bool
    seed: int


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
        if config.sampling == "balanced" and not self._shares.sum():
            raise ValueError(f"no volume of a modality in {sorted(weights)}; found {sorted(tree)}")
        if not self._objects:
            raise ValueError("no volume with an image; accepted: npz files with imgs and gts")

    @property
    def objects(self) -> int:
        """Objects of an epoch."""
        return len(self._objects)

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
        seen = whole.objects[index]
        order = (0, 1, 2)
        shown_upright = whole.modality in ("CT", "MR")
        # Runs without it keep their windows.
        upright = shown_upright and config.upright > 0 and rng.random() < config.upright
        if rng.random() < config.permute and not upright:
            z, y, x = (int(a) for a in rng.permutation(3))
            order = (z, y, x)
        view = _View(whole, seen, order, rng)
        made_up = kind in ("supervoxel", "shape")
        zoomed = False
        if config.network == "sam_med3d" and config.sam.windows == "1.5mm":
            window = _public_window(view, edge)
        else:
            window = self._window(view, boxed, edge, rng)
            large = max(window.size) > 1.25 * edge
            refining = config.network == "refiner" and not made_up
            zoomed = refining and boxed and large and rng.random() < config.zoom
            if zoomed:
                window = _zoom(window, view, edge, rng)
            elif not boxed and not made_up and rng.random() < 0.6:
                window = _about_click(view, edge, rng)
        size = np.array(window.size, float)
        scale = np.zeros((3, 3))
        for axis in range(3):
            scale[order[axis], axis] = size[axis] / 2
        centre = np.array(window.start) + size / 2 - 0.5
        origin = np.empty(3)
        origin[list(order)] = centre
        flips = (rng.random(3) < config.flip) & (not upright)
        turn, bend = np.diag(np.where(flips, -1.0, 1.0)), None
        warped = not zoomed and rng.random() < config.warp
        if warped:
            turn = _rotation(rng) @ turn
            bend = rng.normal(0, 0.035, (3, 4, 4, 4)).astype(np.float32)
        z, y, x = (p / c for p, c in zip(view.padding, window.cell, strict=True))
        box = None if warped or made_up else _flipped(view.box(window), flips, edge)
        return Plan(
            kind,
            volume,
            0 if made_up else seen.label,
            edge,
            scale,
            turn,
            origin,
            bend,
            window.cell,
            boxed,
            box,
            (z, y, x),
            zoomed,
            int(rng.integers(2**62)),
        )

    def _window(self, view: _View, boxed: bool, edge: int, rng: np.random.Generator) -> Window:
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
        return _cube(centre, edges, edge, view.spacing_mm, scale)


class _View:
    """An object with its axes permuted: ``order`` names the volume's axis of each axis here."""

    def __init__(
        self, volume: LabelledVolume, seen: TrainingObject, order: Triple, rng: np.random.Generator
    ) -> None:
        self._seen, self._order = seen, order
        self.spacing_mm = self._turned(volume.spacing_mm)
        shape = self._turned(volume.labels.shape)
        # The challenge's random padding: 0..5 px for a 256 px image, proportionally else.
        y, x = (float(rng.integers(0, 6)) * n / 256 for n in shape[1:])
        self.padding = (0.0, y, x)
        low, high, middle = seen.boxes[order[0]]
        padded = (self._turned(low), self._turned(high))
        z0, y0, x0 = (c - p for c, p in zip(padded[0], self.padding, strict=True))
        z1, y1, x1 = (c + p for c, p in zip(padded[1], self.padding, strict=True))
        self.edges = ((z0, y0, x0), (z1, y1, x1), middle)

    def _turned(self, values: tuple[float, ...]) -> Point:
        z, y, x = (values[axis] for axis in self._order)
        return z, y, x

    @property
    def size_mm(self) -> list[float]:
        """Edges of the object's bounding box."""
        size = [b - a for a, b in zip(self._seen.start, self._seen.stop, strict=True)]
        return [n * mm for n, mm in zip(self._turned(tuple(size)), self.spacing_mm, strict=True)]

    @property
    def centre(self) -> list[float]:
        """Of the bounding box, as an edge coordinate: voxel 0 lies between 0 and 1."""
        middle = [(a + b) / 2 for a, b in zip(self._seen.start, self._seen.stop, strict=True)]
        return list(self._turned(tuple(middle)))

    @property
    def deepest(self) -> Point:
        return self._turned(self._seen.deepest)

    @property
    def surface(self) -> NDArray[np.int32]:
        return self._seen.surface[:, list(self._order)]

    def box(self, window: Window) -> tuple[Point, Point, float]:
        """The challenge's box in a window's cells."""
        low, high, middle = self.edges
        return window.to_grid(low), window.to_grid(high), window.to_grid((middle, 0, 0))[0]


def _cube(
    centre: list[float], edges: list[float], cells: int, spacing_mm: Point, scale: float = 1.0
) -> Window:
    """``window_around`` a box given by its centre and edges."""
    return window_around(
        [c - e / 2 for c, e in zip(centre, edges, strict=True)],
        [c + e / 2 for c, e in zip(centre, edges, strict=True)],
        (cells, cells, cells),
        spacing_mm,
        scale,
    )


def _about_click(view: _View, edge: int, rng: np.random.Generator) -> Window:
    """A cube in millimetres about an object's deepest point: the first look without a box.

    It may be smaller than the object: then the prediction has to reach its border, so that
    inference knows to look further.
    """
    cube = max(view.size_mm) * float(np.exp(rng.uniform(np.log(0.4), np.log(4.0))))
    edges = [cube / mm for mm in view.spacing_mm]
    centre = [
        p + float(rng.uniform(-0.1, 0.1)) * e for p, e in zip(view.deepest, edges, strict=True)
    ]
    return _cube(centre, edges, edge, view.spacing_mm)


def _public_window(view: _View, edge: int) -> Window:
    """The cube at 1.5 mm about the object that public SAM-Med3D checkpoints see.

    Of an object too large for it, a coarser cube, as ``inference/coarse.py`` chooses it.
    """
    cube = max(_PUBLIC_SPACING_MM * edge, _PUBLIC_MARGIN * max(view.size_mm))
    start, stop = [], []
    for centre, mm in zip(view.centre, view.spacing_mm, strict=True):
        n = max(1, round(cube / mm))
        start.append(round(centre - n / 2))
        stop.append(start[-1] + n)
    return Window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]), (edge, edge, edge))


def _zoom(window: Window, view: _View, edge: int, rng: np.random.Generator) -> Window:
    """A finer window about a random surface voxel, as the second pass sees it."""
    surface = view.surface
    point = surface[rng.integers(len(surface))].tolist()
    share = float(rng.uniform(0.3, 0.75))
    edges = [round(min(max(s * share, edge), s)) for s in window.size]
    low = [round(p - e * float(rng.uniform(0.25, 0.75))) for p, e in zip(point, edges, strict=True)]
    high = [a + e for a, e in zip(low, edges, strict=True)]
    return Window((low[0], low[1], low[2]), (high[0], high[1], high[2]), window.shape)


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
