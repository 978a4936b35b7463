"""Every repair of a stored box and of stored clicks, with what is said about it."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.object_prompts import (
    Box,
    Click,
    brief,
    entries,
    number,
    read_box,
    read_clicks,
    stored_box,
    stored_clicks,
)

SHAPE = (10, 20, 30)
GOOD = {"z_min": 2, "z_max": 6, "z_mid": 3, "z_mid_y_min": 4, "z_mid_y_max": 9}
GOOD |= {"z_mid_x_min": 5, "z_mid_x_max": 8}
READ = Box((2, 4, 5), (7, 10, 9), 3)


def without(*keys: str) -> dict[str, int]:
    return {key: value for key, value in GOOD.items() if key not in keys}


BOXES: dict[str, tuple[Any, Box | None, str | None]] = {
    "good": (GOOD, READ, None),
    "one voxel": (
        dict.fromkeys(GOOD, 7),
        Box((7, 7, 7), (8, 8, 8), 7),
        None,
    ),
    "the voxel at the far corner": (
        {"z_min": 9, "z_max": 9, "z_mid": 9, "z_mid_y_min": 19, "z_mid_y_max": 19}
        | {"z_mid_x_min": 29, "z_mid_x_max": 29},
        Box((9, 19, 29), (10, 20, 30), 9),
        None,
    ),
    "None": (None, None, "no box (None)"),
    "text": ("1 2", None, "no box ('1 2')"),
    "a number": (np.int64(3), None, "no box (3)"),
    "numbers": ([1, 2, 3], None, "no box ([1, 2, 3])"),
    "more numbers": (np.zeros(7), None, "no box (array of float64 (7,))"),
    "empty dict": (
        {},
        None,
        "no box (z_min missing, z_max missing, z_mid_y_min missing, z_mid_y_max missing, "
        "z_mid_x_min missing, z_mid_x_max missing)",
    ),
    "a key missing": (without("z_mid_x_max"), None, "no box (z_mid_x_max missing)"),
    "NaN": (GOOD | {"z_min": np.nan}, None, "no box (z_min nan)"),
    "infinite": (GOOD | {"z_max": np.float32(np.inf)}, None, "no box (z_max inf)"),
    "None as coordinate": (GOOD | {"z_max": None}, None, "no box (z_max None)"),
    "text as coordinate": (GOOD | {"z_max": "6"}, None, "no box (z_max '6')"),
    "bool as coordinate": (GOOD | {"z_min": True}, None, "no box (z_min True)"),
    "all zero": (dict.fromkeys(GOOD, 0), None, "no box (all zero)"),
    "all -1": (
        dict.fromkeys(GOOD, -1),
        None,
        "no box (it lies outside the volume of (10, 20, 30))",
    ),
    "outside": (
        GOOD | {"z_mid_x_min": 30, "z_mid_x_max": 35},
        None,
        "no box (it lies outside the volume of (10, 20, 30))",
    ),
    "too large": (
        GOOD | {"z_min": -3, "z_mid_y_max": 20, "z_mid_x_max": 10**30},
        Box((0, 4, 5), (7, 20, 30), 3),
        "box cut at the border of the volume",
    ),
    "reversed": (
        GOOD | {"z_min": 6, "z_max": 2, "z_mid_x_min": 8, "z_mid_x_max": 5},
        READ,
        "box its reversed sides swapped",
    ),
    "middle below": (
        GOOD | {"z_mid": 1},
        Box((2, 4, 5), (7, 10, 9), 2),
        "box z_mid moved into the z range, to 2",
    ),
    "middle above": (
        GOOD | {"z_mid": 99},
        Box((2, 4, 5), (7, 10, 9), 6),
        "box z_mid moved into the z range, to 6",
    ),
    "no middle": (
        without("z_mid"),
        Box((2, 4, 5), (7, 10, 9), 4),
        "box z_mid put at 4, half way",
    ),
    "middle NaN": (
        GOOD | {"z_mid": np.nan},
        Box((2, 4, 5), (7, 10, 9), 4),
        "box z_mid put at 4, half way",
    ),
    "fractions": (
        GOOD | {"z_mid_y_min": 3.5, "z_mid_y_max": 9.49},
        READ,
        "box rounded to whole voxels",
    ),
    "everything at once": (
        GOOD | {"z_min": 11.2, "z_max": 5, "z_mid": 1},
        Box((5, 4, 5), (10, 10, 9), 5),
        "box rounded to whole voxels, its reversed sides swapped, "
        "cut at the border of the volume, z_mid moved into the z range, to 5",
    ),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes(name: str) -> None:
    entry, expected, note = BOXES[name]
    said: list[str] = []
    assert read_box(entry, SHAPE, said.append) == expected
    assert said == ([] if note is None else [note])


CLICKS: dict[str, tuple[Any, tuple[tuple[tuple[int, int, int], bool], ...], list[str]]] = {
    "lists": ({"fg": [[1, 2, 3]], "bg": [[4, 5, 6]]}, (((1, 2, 3), True), ((4, 5, 6), False)), []),
    "tuples": ({"fg": ((1, 2, 3),)}, (((1, 2, 3), True),), []),
    "numpy integers": ({"bg": [list(np.array([4, 5, 6]))]}, (((4, 5, 6), False),), []),
    "an array": ({"fg": np.array([[1, 2, 3], [4, 5, 6]])}, (((1, 2, 3), True), ((4, 5, 6), True)),
        []),
    "an array of floats": ({"fg": np.array([[1.0, 2, 3]])}, (((1, 2, 3), True),), []),
    "an object array": ({"fg": np.array([[1, 2.0, np.int8(3)]], object)}, (((1, 2, 3), True),), []),
    "an empty array": ({"fg": np.empty((0, 3)), "bg": []}, (), []),
    "None": (None, (), []),
    "None for a side": ({"fg": None, "bg": [[4, 5, 6]]}, (((4, 5, 6), False),), []),
    "corners": ({"fg": [[9, 19, 29], [0, 0, 0]]}, (((9, 19, 29), True), ((0, 0, 0), True)), []),
    "no dict": ([[1, 2, 3]], (), ["clicks without fg and bg (list): left out"]),
    "other keys": ({"pos": [[1, 2, 3]]}, (), ["clicks without fg and bg (dict): left out"]),
    "text for a side": ({"fg": "1 2 3"}, (), ["clicks fg is no list ('1 2 3'): left out"]),
    "wrong length": (
        {"fg": [[1, 2], [1, 2, 3], [1, 2, 3, 4], [], 5, None, "abc", "123"]},
        (((1, 2, 3), True),),
        ["7 clicks without three finite coordinates were left out"],
    ),
    "flat": (
        {"fg": [1, 2, 3]},
        (),
        ["3 clicks without three finite coordinates were left out"],
    ),
    "NaN": (
        {"fg": [[np.nan, 2, 3], [1, 2, np.inf]]},
        (),
        ["2 clicks without three finite coordinates were left out"],
    ),
    "outside": (
        {"fg": [[10, 0, 0], [1, 2, 3], [0, -1, 0], [0, 0, 30]]},
        (((1, 2, 3), True),),
        ["3 clicks outside the volume were left out, [10, 0, 0] first"],
    ),
    "fractions": (
        {"fg": [[0.5, 1.49, 3]], "bg": [[-0.5, 0, 0]]},
        (((1, 1, 3), True), ((0, 0, 0), False)),
        ["2 clicks were rounded to whole voxels"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLICKS)
def test_clicks(name: str) -> None:
    entry, expected, notes = CLICKS[name]
    said: list[str] = []
    sides = stored_clicks(entry, said.append)
    assert read_clicks(*sides, None, SHAPE, said.append) == tuple(Click(*c) for c in expected)
    assert said == notes


FG = [(0, 0, 1), (0, 0, 2)]
BG = [(0, 0, 8), (0, 0, 9)]
ORDERS: list[tuple[Any, list[int], str | None]] = [
    (["fg", "bg", "fg", "bg"], [1, 8, 2, 9], None),
    (["bg", "bg", "fg", "fg"], [8, 9, 1, 2], None),
    (["bg", None, "fg", "", "bg", "fg"], [8, 1, 9, 2], None),
    (None, [1, 2, 8, 9], None),
    ([], [1, 2, 8, 9], None),
    (["bg"], [8, 1, 2, 9], "clicks_order ['bg'] contradicts 2 fg and 2 bg clicks"),
    (["bg", "fg", "fg", "fg"], [8, 1, 2, 9], "clicks_order ['bg', 'fg', 'fg', 'fg'] contradicts"),
    (["bg", "zz"], [8, 1, 2, 9], "clicks_order ['bg', 'zz'] contradicts 2 fg and 2 bg clicks"),
    (
        [np.zeros(2), np.array(None)],
        [1, 2, 8, 9],
        "clicks_order ['[0.0, 0.0]', 'array of object ()'] contradicts 2 fg",
    ),
    ([3, [4]], [1, 2, 8, 9], "clicks_order ['3', '[4]'] contradicts 2 fg and 2 bg clicks"),
    (["fg"] * 9, [1, 2, 8, 9], "clicks_order ['fg', 'fg', 'fg', 'fg', 'fg', ...] contradicts"),
]


@pytest.mark.parametrize("order, expected, note", ORDERS)
def test_orders(order: Any, expected: list[int], note: str | None) -> None:
    said: list[str] = []
    clicks = read_clicks(FG, BG, order, SHAPE, said.append)
    assert [click.position[2] for click in clicks] == expected
    assert all(click.positive == (click.position[2] < 5) for click in clicks)
    assert len(said) == (note is not None)
    assert note is None or (said[0].startswith(note) and said[0].endswith("the clicks were taken"))


def test_clicks_left_out_keep_the_order_of_the_others() -> None:
    said: list[str] = []
    clicks = read_clicks(
        [(99, 0, 0), (0, 0, 2)], [(0, 0, 8), "?"], ["fg", "bg", "bg", "fg"], SHAPE, said.append
    )
    assert clicks == (Click((0, 0, 8), False), Click((0, 0, 2), True))
    assert len(said) == 2


@given(st.lists(st.booleans(), max_size=12))
def test_a_consistent_order_is_followed(kinds: list[bool]) -> None:
    expected = tuple(Click((0, 0, i), positive) for i, positive in enumerate(kinds))
    sides = [[c.position for c in expected if c.positive == side] for side in (True, False)]
    order = ["fg" if positive else "bg" for positive in kinds]
    said: list[str] = []
    assert read_clicks(sides[0], sides[1], order, SHAPE, said.append) == expected
    assert said == []


def literal_box(mask: np.ndarray[Any, Any], padding: tuple[int, int]) -> dict[str, int]:
    """The organisers' rule, step by step over every voxel of the object."""
    zs = sorted({int(z) for z in np.where(mask)[0]})
    middle = zs[len(zs) // 2]
    ys, xs = np.where(mask[middle])
    _, height, width = mask.shape
    return {
        "z_min": zs[0],
        "z_max": zs[-1],
        "z_mid": middle,
        "z_mid_y_min": max(0, int(min(ys)) - padding[0]),
        "z_mid_y_max": min(height - 1, int(max(ys)) + padding[0]),
        "z_mid_x_min": max(0, int(min(xs)) - padding[1]),
        "z_mid_x_max": min(width - 1, int(max(xs)) + padding[1]),
    }


@pytest.mark.parametrize("density", [0.002, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_stored_box_is_the_organisers(density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 13, 11)) < density
    mask[rng.integers(9), rng.integers(13), rng.integers(11)] = True
    padding = (int(rng.integers(6)), int(rng.integers(6)))
    assert stored_box(mask, padding) == literal_box(mask, padding)
    whole = np.zeros((12, 17, 14), bool)
    whole[2:11, 1:14, 3:14] = mask
    box = stored_box(mask, padding, (2, 1, 3), whole.shape)
    assert box == literal_box(whole, padding)


def test_a_stored_box_is_read_back() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2:5, 3:9, 4:20] = True
    said: list[str] = []
    assert read_box(stored_box(mask), SHAPE, said.append) == Box((2, 3, 4), (5, 9, 20), 3)
    assert said == []


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(ValueError, match="received an empty mask"):
        stored_box(np.zeros((2, 3, 4), bool))


def test_lists_that_hold_themselves_are_survived() -> None:
    loop: list[Any] = []
    loop.append(loop)
    array = np.empty((), object)
    array[()] = array
    said: list[str] = []
    for thing in (loop, array, {"fg": loop, "bg": array}):
        assert read_box(thing, SHAPE, said.append) is None
        assert read_clicks(*stored_clicks(thing, said.append), thing, SHAPE, said.append) == ()
        brief(thing)
    assert entries(array) is None
    assert said


def test_one_long_list_referred_to_often_is_not_walked() -> None:
    """A small pickle can say this; copying or walking it every time would take gigabytes, hours."""
    long: list[Any] = [0] * 300_000
    entry = {"fg": long, "bg": np.zeros((100_000, 3))}
    position = {"fg": [long] * 1000, "bg": []}
    said: list[str] = []
    tracemalloc.start()
    kept = [stored_clicks(entry, said.append) for _ in range(255)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept[0][0]) == 300_000 and peak < 1_000_000
    started = time.process_time()
    sides = stored_clicks(position, said.append)
    assert read_clicks(*sides, long, SHAPE, said.append) == ()
    assert time.process_time() - started < 0.5


def test_numbers() -> None:
    assert [number(v) for v in (1, np.uint8(2), np.float16(0.5), np.array(3))] == [1, 2, 0.5, 3]
    nothing: list[Any] = [True, np.True_, "1", None, np.nan, -np.inf, 10**400, 1j, [1], np.ones(1)]
    assert [number(value) for value in nothing] == [None] * len(nothing)
