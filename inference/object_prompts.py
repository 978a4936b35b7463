"""What a user says about one object, and how the challenge's files store it.

The functions here take single entries of ``boxes``, ``clicks`` and ``clicks_order`` as they come
out of a file, of any type, and never raise: what cannot be used is left out, and ``say`` is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

BOX_KEYS = ("z_min", "z_max", "z_mid_y_min", "z_mid_y_max", "z_mid_x_min", "z_mid_x_max")
"""What a stored box must hold, in (z, y, x); ``z_mid`` can be made up for."""


MAX_CLICKS = 10_000
"""Most clicks of one case, eight times five rounds of 255 classes."""

_SCALARS = (bool, int, float, str, bytes, np.generic)


class Click(NamedTuple):
    """One click: voxel index (z, y, x) and whether it marks the object (else background)."""

    position: tuple[int, int, int]
    positive: bool


@dataclass(frozen=True)
class Box:
    """A bounding box in voxels, half-open, (z, y, x).

    The z range is exact. The y and x ranges are those of slice ``middle`` only (padded by a few
    voxels): on other slices the object may leave them.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    middle: int


@dataclass(frozen=True)
class ObjectPrompts:
    """What a user said about one object: label 1..255, a box or none, clicks oldest first."""

    label: int
    box: Box | None = None
    clicks: tuple[Click, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True where nothing was said: the object keeps its last mask, if it has one."""
        return self.box is None and not self.clicks


def read_box(entry: object, shape: tuple[int, ...], say: Callable[[str], None]) -> Box | None:
    """The box of a stored dict of closed intervals, inside a volume of ``shape`` (D, H, W).

    Reversed sides are swapped, what lies outside is cut off, ``z_mid`` is moved into the z range.
    None for a class without a usable box: no dict, coordinates missing or not finite, all zero,
    or wholly outside.
    """
    fields = _fields(entry)
    if fields is None:
        say(f"no box ({brief(entry)})")
        return None
    numbers = [number(fields.get(key)) for key in BOX_KEYS]
    unusable = [
        f"{key} {brief(fields[key])}" if key in fields else f"{key} missing"
        for key, value in zip(BOX_KEYS, numbers, strict=True)
        if value is None
    ]
    if unusable:
        say(f"no box ({', '.join(unusable)})")
        return None
    sides = [_voxel(value) for value in numbers if value is not None]
    middle = number(fields.get("z_mid"))
    if not any(sides) and not middle:
        say("no box (all zero)")
        return None

    repairs = []
    if sides != numbers or (middle is not None and middle != _voxel(middle)):
        repairs.append("rounded to whole voxels")
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    if any(first > last for first, last in pairs):
        pairs = [(min(pair), max(pair)) for pair in pairs]
        repairs.append("its reversed sides swapped")
    if any(last < 0 or first >= size for (first, last), size in zip(pairs, shape, strict=True)):
        say(f"no box (it lies outside the volume of {shape})")
        return None
    start = tuple(max(first, 0) for first, _ in pairs)
    stop = tuple(min(last + 1, size) for (_, last), size in zip(pairs, shape, strict=True))
    if any(
        a != first or b != last + 1 for a, b, (first, last) in zip(start, stop, pairs, strict=True)
    ):
        repairs.append("cut at the border of the volume")
    if middle is None:
        slice_ = (start[0] + stop[0]) // 2
        repairs.append(f"z_mid put at {slice_}, half way")
    else:
        slice_ = min(max(_voxel(middle), start[0]), stop[0] - 1)
        if slice_ != _voxel(middle):
            repairs.append(f"z_mid moved into the z range, to {slice_}")
    if repairs:
        say(f"box {', '.join(repairs)}")
    z, y, x = zip(start, stop, strict=True)
    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]), slice_)


def stored_box(
    mask: NDArray[np.bool_],
    padding: tuple[int, int] = (0, 0),
    start: tuple[int, int, int] = (0, 0, 0),
    shape: tuple[int, ...] | None = None,
) -> dict[str, int]:
    """The dict of closed intervals that the challenge stores for an object.

    The organisers' rule (get_boxes.py of JunMa11/CVPR-MedSegFMCompetition): z exact; ``z_mid`` the
    middle of the slices that hold the object; in y and x the rectangle of that slice, padded. They
    draw one ``shift`` in 0..5 an object and pad by ``int(shift * size / 256)``.

    Args:
        mask: (d, h, w), not empty: the object in the volume or in a part of it.
        padding: voxels added on both sides in y and in x, cut off at the volume's border.
        start: the part's first voxel in the volume.
        shape: of the volume (D, H, W), where the mask is of a part.

    Raises:
        ValueError: if the mask is empty.
    """
    z = np.flatnonzero(mask.any(axis=(1, 2)))
    if not z.size:
        raise ValueError("received an empty mask; accepted: a mask with at least one voxel")
    middle = int(z[len(z) // 2])
    y, x = (np.flatnonzero(mask[middle].any(axis=axis)) for axis in (1, 0))
    _, height, width = mask.shape if shape is None else shape
    return {
        "z_min": start[0] + int(z[0]),
        "z_max": start[0] + int(z[-1]),
        "z_mid": start[0] + middle,
        "z_mid_y_min": max(start[1] + int(y[0]) - padding[0], 0),
        "z_mid_y_max": min(start[1] + int(y[-1]) + padding[0], height - 1),
        "z_mid_x_min": max(start[2] + int(x[0]) - padding[1], 0),
        "z_mid_x_max": min(start[2] + int(x[-1]) + padding[1], width - 1),
    }


def stored_clicks(entry: object, say: Callable[[str], None]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The foreground and background positions of one class as stored, unread."""
    if entry is None:
        return [], []
    fields = _fields(entry)
    if fields is None or (fields and "fg" not in fields and "bg" not in fields):
        say(f"clicks without fg and bg ({brief(entry)}): left out")
        return [], []
    sides: list[Sequence[Any]] = []
    for side in ("fg", "bg"):
        positions = [] if fields.get(side) is None else entries(fields[side])
        if positions is None:
            say(f"clicks {side} is no list ({brief(fields[side])}): left out")
        sides.append([] if positions is None else positions)
    return sides[0], sides[1]


def read_clicks(
    foreground: Sequence[Any],
    background: Sequence[Any],
    order: object,
    shape: tuple[int, ...],
    say: Callable[[str], None],
) -> tuple[Click, ...]:
    """The clicks of one class, oldest first.

    Args:
        foreground, background: stored positions, each (z, y, x).
        order: ``"fg"`` or ``"bg"`` for each click, None (or ``""``) for a round without one; None
            where no order is known. Where it contradicts the clicks it is followed as far as it
            goes; clicks it does not know come last, foreground first.
        shape: (D, H, W); clicks outside are left out.
        say: is told of every repair.
    """
    tokens = _order_tokens(order)
    if tokens and (tokens.count("fg"), tokens.count("bg")) != (len(foreground), len(background)):
        say(
            f"clicks_order {brief(tokens)} contradicts {len(foreground)} fg and "
            f"{len(background)} bg clicks: the clicks were taken"
        )
    left = {"fg": iter(foreground), "bg": iter(background)}
    nothing = object()
    ordered = [(next(left[t], nothing), t == "fg") for t in tokens if t in left]
    ordered = [pair for pair in ordered if pair[0] is not nothing]
    ordered += [(position, True) for position in left["fg"]]
    ordered += [(position, False) for position in left["bg"]]

    clicks = []
    unreadable = rounded = 0
    outside = []
    for stored, positive in ordered:
        values = entries(stored)
        numbers = [] if values is None or len(values) != 3 else [number(v) for v in values]
        if not numbers or None in numbers:
            unreadable += 1
            continue
        z, y, x = (_voxel(v) for v in numbers if v is not None)
        if all(0 <= index < size for index, size in zip((z, y, x), shape, strict=True)):
            clicks.append(Click((z, y, x), positive))
            rounded += [z, y, x] != numbers
        else:
            outside.append((z, y, x))
    if unreadable:
        say(f"{unreadable} clicks without three finite coordinates were left out")
    if outside:
        say(f"{len(outside)} clicks outside the volume were left out, {brief(outside[0])} first")
    if rounded:
        say(f"{rounded} clicks were rounded to whole voxels")
    return tuple(clicks)


def entries(value: object) -> Sequence[Any] | None:
    """A stored list, tuple or array as a sequence; None where it is nothing of the kind.

    An array of no dimension stands for the object in it, and a dict for a list of that dict.
    Nothing is copied: a pickle may refer to one long list many times.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return cast(Sequence[Any], value)
    return None


def number(value: object) -> float | None:
    """A finite number, or None for anything else (a bool is no number)."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def brief(value: object) -> str:
    """A value in a few characters, without walking through what it holds."""
    if isinstance(value, np.ndarray):
        if value.size > 3 or value.dtype.kind not in "biufU":
            return f"array of {value.dtype} {value.shape}"
        value = value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple) and all(isinstance(v, _SCALARS) for v in value[:5]):
        return f"[{', '.join(map(brief, value[:5]))}{', ...' * (len(value) > 5)}]"
    return (
        repr(value)[:30] if value is None or isinstance(value, _SCALARS) else type(value).__name__
    )


def _fields(entry: object) -> Mapping[Any, Any] | None:
    """The entry's named values: of a dict, or of a record of a structured array."""
    if isinstance(entry, np.ndarray) and entry.ndim == 0:
        entry = entry.item() if entry.dtype.names is None else entry[()]
    if isinstance(entry, np.void) and entry.dtype.names:
        return {name: entry[name] for name in entry.dtype.names}
    return entry if isinstance(entry, Mapping) else None


def _order_tokens(order: object) -> list[str]:
    """The named rounds of one class; rounds without a click are None or empty and fall out."""
    values = [order] if isinstance(order, str | bytes) else entries(order)
    tokens = []
    for value in values[:MAX_CLICKS] if values is not None else ():
        token = value.decode("latin1") if isinstance(value, bytes) else value
        if token is not None and not (isinstance(token, str) and not token):
            tokens.append(token if isinstance(token, str) else brief(token))
    return tokens


def _voxel(coordinate: float) -> int:
    """The voxel a coordinate falls into: voxel i covers [i - 0.5, i + 0.5)."""
    return math.floor(coordinate + 0.5)
