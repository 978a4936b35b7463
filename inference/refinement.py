"""Where to look and how to put results together: windows, zooming, click guarantees, merging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from inference.case import Click, ObjectPrompts
from inference.geometry import Triple, Window, window_around
from inference.resampling import resample

#: Region of interest in boxes (DCM's recipe).
BOX_SCALE = 1.8
#: A region grows by this factor while the prediction touches its border (nnInteractive's AutoZoom).
ZOOM = 1.5
#: First looks at an object of unknown size: edges in longest edges of the volume (chosen on
#: training cases, where looking beyond the volume finds large objects best).
FIRST_LOOKS = (0.7, 1.4)
#: Log-odds added everywhere before the first click: masks are too small then (chosen on training
#: cases).
BOX_ALONE = 0.3
_BARELY = 0.01  # log-odds of a voxel that is just one of the object's
_LAST = 1.0  # log-odds of a mask that nothing is said about any more
_CLICK_MARGIN = 3  # voxels between a click and the region's border
_TOUCHING = 6  # cells of a face that a prediction must hold to touch it
#: Largest size of a network's logit once there are clicks: theirs go beyond, newer ones further.
SURE = 100.0


@dataclass(frozen=True)
class ObjectLogits:
    """One object's logits on a box of voxels; outside of it the object is absent.

    Attributes:
        label: 1..N.
        start: first voxel (z, y, x) of the box.
        logits: (d, h, w) float32.
    """

    label: int
    start: Triple
    logits: NDArray[np.float32]

    @classmethod
    def nothing(cls, label: int) -> ObjectLogits:
        """Those of an object that is nowhere."""
        return cls(label, (0, 0, 0), np.zeros((0, 0, 0), np.float32))

    @property
    def stop(self) -> Triple:
        """One past the last voxel of the box."""
        z, y, x = (a + n for a, n in zip(self.start, self.logits.shape, strict=True))
        return z, y, x

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """The box of voxels in the volume."""
        return self.place_in((0, 0, 0))

    def place_in(self, origin: Triple) -> tuple[slice, slice, slice]:
        """The box of voxels in an array whose first voxel is ``origin`` of the volume."""
        z, y, x = (
            slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True)
        )
        return z, y, x


def bounding_box(mask: NDArray[np.bool_]) -> tuple[Triple, Triple] | None:
    """Half-open bounding box of a (D, H, W) mask, or None where it is empty."""
    low, high = [], []
    part = mask
    for axis in range(3):  # project, cut, go on: later axes see less
        other = tuple(a for a in range(3) if a != axis)
        where = np.flatnonzero(part.any(axis=other))
        if not where.size:
            return None
        low.append(int(where[0]))
        high.append(int(where[-1]) + 1)
        part = part[(slice(None),) * axis + (slice(low[-1], high[-1]),)]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def bounding_boxes(labels: NDArray[np.uint8]) -> dict[int, tuple[Triple, Triple]]:
    """Half-open bounding box of each label of a (D, H, W) label map, in one pass."""
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    found = {}
    for label, (count, edges) in enumerate(
        zip(statistics["voxel_counts"], statistics["bounding_boxes"], strict=True)
    ):
        if label and count:
            z0, z1, y0, y1, x0, x1 = (int(edge) for edge in edges)
            found[label] = (z0, y0, x0), (z1 + 1, y1 + 1, x1 + 1)
    return found


def last_mask(labels: NDArray[np.uint8], label: int, box: tuple[Triple, Triple]) -> ObjectLogits:
    """A label's mask as logits that any object that is sure of a voxel outvotes.

    Args:
        labels: (D, H, W).
        label: of the object.
        box: its half-open bounding box.
    """
    z, y, x = (slice(a, b) for a, b in zip(*box, strict=True))
    mask = labels[z, y, x] == label
    return ObjectLogits(label, box[0], np.where(mask, _LAST, -_LAST).astype(np.float32))


def click_voxels(clicks: Sequence[Click], positive: bool = False) -> list[tuple[Triple, Triple]]:
    """Half-open box of each click's voxel; of positive ones alone, if wanted."""
    places = [click.position for click in clicks if click.positive or not positive]
    return [((z, y, x), (z + 1, y + 1, x + 1)) for z, y, x in places]


def first_windows(
    prompts: ObjectPrompts,
    previous: tuple[Triple, Triple] | None,
    volume: Triple,
    spacing_mm: tuple[float, float, float],
    shape: Triple,
    looks: Sequence[float] = FIRST_LOOKS,
) -> list[Window]:
    """The windows an object is first looked for in.

    With a box: 1.8 x the box. Without one: 1.8 x the previous mask. Where there is none either the
    size of the object is unknown: cubes about the clicks, one for each of ``looks``. All clicks and
    the previous mask lie inside.

    Args:
        prompts: of the object; not empty.
        previous: bounding box of the object's previous mask, or None.
        volume: size of the volume.
        spacing_mm: (z, y, x).
        shape: cells of a window.
        looks: edges of cubes in longest edges of the volume, in millimetres.
    """
    points = click_voxels(prompts.clicks)
    positive = click_voxels(prompts.clicks, positive=True)
    if prompts.box is not None:
        box = prompts.box
        windows = [window_around(box.start, box.stop, shape, spacing_mm, BOX_SCALE)]
    elif previous is not None:
        windows = [window_around(*hull([previous, *positive]), shape, spacing_mm, BOX_SCALE)]
    else:
        low, high = hull(positive or points)
        longest = max(n * s for n, s in zip(volume, spacing_mm, strict=True))
        windows = []
        for share in looks:
            half = [share * longest / s / 2 for s in spacing_mm]
            low_edges = [a - h for a, h in zip(low, half, strict=True)]
            high_edges = [b + h for b, h in zip(high, half, strict=True)]
            windows.append(window_around(low_edges, high_edges, shape, spacing_mm))
    inside = [(a, b, _CLICK_MARGIN) for a, b in points]
    if previous is not None:
        inside.append((*previous, 1))
    return [_extend(window, inside) for window in windows]


def grown_window(window: Window, touched: Sequence[tuple[bool, bool]], volume: Triple) -> Window:
    """The window, 1.5 times as long on the axes whose faces are touched, moved out on those faces.

    Args:
        window: the current one.
        touched: per axis whether the prediction touches the lower and the upper face.
        volume: size of the volume; no face is moved further outside than a tenth of the window.
    """
    start, stop = list(window.start), list(window.stop)
    for axis, (lower, upper) in enumerate(touched):
        step = max(1, round(window.size[axis] * (ZOOM - 1) / (1 + (lower and upper))))
        beyond = max(1, window.size[axis] // 10)
        if lower:
            start[axis] = min(start[axis], max(start[axis] - step, -beyond))
        if upper:
            stop[axis] = max(stop[axis], min(stop[axis] + step, volume[axis] + beyond))
    return Window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]), window.shape)


def touched_faces(
    mask: NDArray[np.bool_], window: Window, volume: Triple
) -> tuple[tuple[bool, bool], ...]:
    """Per axis, whether at least six cells of a mask lie on the lower / upper face.

    Faces at or beyond the border of the volume do not count: there is nothing more to see.
    """
    faces = []
    for axis in range(3):
        first, last = mask.take(0, axis), mask.take(-1, axis)
        faces.append(
            (
                bool(first.sum() >= _TOUCHING and window.start[axis] > 0),
                bool(last.sum() >= _TOUCHING and window.stop[axis] < volume[axis]),
            )
        )
    return tuple(faces)


def to_voxels(
    logits: Tensor, window: Window, label: int, volume: Triple, floor: float = 0.0
) -> ObjectLogits:
    """Logits of a window's grid at the voxels of the volume, cut to where they exceed a floor.

    What fills cells of the volume but half of no voxel keeps its most probable voxel.
    """
    box = bounding_box((logits > floor).cpu().numpy())
    if box is None:
        return ObjectLogits.nothing(label)
    keep, start = [], []
    for a, b, cell, w, s, n in zip(
        box[0], box[1], window.cell, window.start, window.size, volume, strict=True
    ):
        # One cell around, since interpolation spreads that far; then only what the volume has.
        low = max(int((a - 1) * cell) - 1, -w, 0)
        high = min(int(np.ceil((b + 1) * cell)) + 1, n - w, s)
        if high <= low:  # all of it beyond the volume
            return ObjectLogits.nothing(label)
        keep.append(slice(low, high))
        start.append(w + low)
    place = (keep[0], keep[1], keep[2])
    voxels = resample(logits[None], window.size, place)[0].cpu().numpy()
    best = float(voxels.max())
    if best <= 0 and bool((logits[window.inside(volume)] > 0).any()):
        voxels += np.float32(_BARELY) - np.float32(best)
    return ObjectLogits(label, (start[0], start[1], start[2]), voxels)


def honour_clicks(result: ObjectLogits, clicks: Sequence[Click]) -> ObjectLogits:
    """Logits in which every click has its way: its voxel is far above or below zero.

    A newer click outvotes an older one on the same voxel; of two objects' clicks the one that has
    more of its own before it.
    """
    if not clicks:
        return result
    positive = click_voxels(clicks, positive=True)
    own = [(result.start, result.stop)] if result.logits.size else []
    if not own and not positive:
        return result
    low, high = hull([*own, *positive])
    size = tuple(b - a for a, b in zip(low, high, strict=True))
    logits = result.logits
    if size != logits.shape:
        logits = np.full(size, -SURE, np.float32)
        if own:
            logits[result.place_in(low)] = result.logits
    np.clip(logits, -SURE, SURE, out=logits)
    for age, click in enumerate(clicks):
        index = tuple(p - a for p, a in zip(click.position, low, strict=True))
        if all(0 <= i < n for i, n in zip(index, size, strict=True)):
            logits[index] = (SURE + 1 + age) * (1 if click.positive else -1)
    return ObjectLogits(result.label, low, logits)


def merge(results: Iterable[ObjectLogits], shape: Triple) -> NDArray[np.uint8]:
    """One label map out of competing objects: the highest logit above zero wins a voxel.

    The order of the objects does not matter, except that the first one wins an exact tie. They
    are taken one at a time, so an iterator keeps one object's logits in memory.
    """
    labels = np.zeros(shape, np.uint8)
    best = np.zeros(shape, np.float32)
    for result in results:
        if not result.logits.size:
            continue
        place = result.place
        wins = result.logits > best[place]
        best[place][wins] = result.logits[wins]
        labels[place][wins] = result.label
    return labels


def hull(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Triple, Triple]:
    """Smallest box around boxes."""
    low = np.min([a for a, _ in boxes], axis=0)
    high = np.max([b for _, b in boxes], axis=0)
    return (int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2]))


def _extend(window: Window, boxes: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> Window:
    """The window with its faces moved out so that boxes lie inside with a margin each."""
    start, stop = list(window.start), list(window.stop)
    for low, high, margin in boxes:
        for axis in range(3):
            start[axis] = min(start[axis], low[axis] - margin)
            stop[axis] = max(stop[axis], high[axis] + margin)
    return Window((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]), window.shape)
