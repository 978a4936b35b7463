"""Every variant of the challenge's input, and every repair of it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.case import Box, Case, Click, ObjectPrompts, load_case, modality_of, parse_case
from tests.npz_bytes import archive, npy
from tests.phantoms import challenge_case, objects, small_case, write_npz

BOX = {"z_min": 1, "z_max": 3, "z_mid": 2, "z_mid_y_min": 4, "z_mid_y_max": 9}
BOX |= {"z_mid_x_min": 5, "z_mid_x_max": 8}


def small(image: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    """A case of one box that fits any image."""
    return {"imgs": image, "spacing": np.ones(3), "boxes": objects(dict.fromkeys(BOX, 1))} | changes


def test_modalities_are_named_by_files() -> None:
    names = ("MRI_x.npz", "Ultrasound_a_b.npz", "Micro_1.npz", "PET_x.npz", "scan.npz")
    assert [modality_of(name) for name in names] == ["MR", "US", "Microscopy", "PET", "scan.npz"]


# --- what is read ---------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    arrays = challenge_case((6, 20, 16), 3, clicks=3, previous=True, spacing_xyz=(0.5, 0.7, 3.0))
    case = load_case(write_npz(tmp_path / "CT_1.npz", arrays))
    assert case.name == "CT_1.npz"
    assert case.notes == ()
    assert case.spacing_mm == (3.0, 0.7, 0.5)  # z, y, x
    assert case.image.dtype == np.uint8
    np.testing.assert_array_equal(case.image, arrays["imgs"])
    np.testing.assert_array_equal(case.previous, arrays["prev_pred"])
    for label, (found, box, clicks) in enumerate(
        zip(case.objects, arrays["boxes"], arrays["clicks"], strict=True), start=1
    ):
        assert found.label == label
        assert found.box == Box(
            (box["z_min"], box["z_mid_y_min"], box["z_mid_x_min"]),
            (box["z_max"] + 1, box["z_mid_y_max"] + 1, box["z_mid_x_max"] + 1),
            box["z_mid"],
        )
        assert found.clicks == (
            Click(tuple(clicks["fg"][0]), True),
            Click(tuple(clicks["bg"][0]), False),
            Click(tuple(clicks["fg"][1]), True),
        )


def test_a_closed_box_holds_exactly_its_object(tmp_path: Path) -> None:
    arrays = challenge_case((6, 20, 16), 1)
    box = parse_case(arrays, "a").objects[0].box
    assert box is not None
    mask = arrays["gts"] == 1
    z = np.flatnonzero(mask.any((1, 2)))
    assert (box.start[0], box.stop[0]) == (z[0], z[-1] + 1)
    place = tuple(map(slice, box.start, box.stop))
    assert mask[box.middle].sum() == mask[place][box.middle - box.start[0]].sum()


def test_arrays_that_need_no_repair_are_not_copied() -> None:
    arrays = small_case()
    case = parse_case(arrays, "a")
    assert np.shares_memory(case.image, arrays["imgs"])
    assert case.previous is not None and np.shares_memory(case.previous, arrays["prev_pred"])


def test_the_arguments_are_never_written_to() -> None:
    image = np.full((2, 3, 4), np.nan, np.float32)
    arrays = small(image, prev_pred=np.full((2, 3, 4), 9, np.uint8), spacing=np.zeros(3))
    copies = {key: value.copy() for key, value in arrays.items()}
    parse_case(arrays, "a")
    for key, value in copies.items():
        np.testing.assert_array_equal(arrays[key], value)


def test_gts_are_not_even_decompressed(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", small_case())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("gts.npy").header_offset
        size = archive.getinfo("gts.npy").compress_size
    data = bytearray(path.read_bytes())
    data[offset + 50 : offset + 30 + size] = bytes(size - 20)  # rubbish where gts were
    path.write_bytes(data)
    assert load_case(path).notes == ()


DTYPES = ["u1", "i1", "<u2", ">u2", "<i2", ">i4", "u8", "i8", "f2", "<f4", ">f4", "f8", "g"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_order", ["C", "F"])
def test_every_number_type_and_memory_order(tmp_path: Path, dtype: str, memory_order: Any) -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    image = np.array(values, dtype, order=memory_order)
    case = load_case(write_npz(tmp_path / "a.npz", small(image)))
    np.testing.assert_array_equal(case.image, values)
    assert case.image.dtype.isnative and case.image.flags.c_contiguous
    assert case.image.dtype.itemsize <= 8
    assert case.image.dtype.kind == np.dtype(dtype).kind


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol(tmp_path: Path, protocol: int, kind: int) -> None:
    arrays = small_case()
    path = tmp_path / "a.npz"
    path.write_bytes(archive(kind, **{k: npy(a, protocol) for k, a in arrays.items()}))
    assert load_case(path).objects == parse_case(arrays, "a").objects


FIRST = Click((3, 4, 5), True)
SECOND = Click((0, 1, 2), False)
THIRD = Click((1, 1, 1), True)
CLICKS = [{"fg": [[3, 4, 5], [1, 1, 1]], "bg": [[0, 1, 2]]}, {"fg": [], "bg": []}]

ORDERS = {
    "list": [["fg", "bg", "fg"], []],
    "list with None for a class": [["fg", "bg", "fg"], None],
    "list with None for a round": [["fg", "bg", None, "fg"], [None] * 4],
    "object array": objects(["fg", "bg", "fg"], []),
    "object array of rounds": np.array([["fg", "bg", "fg"], [None] * 3], dtype=object),
    "string array": np.array([["fg", "bg", "fg"], ["", "", ""]]),
    "bytes array": np.array([[b"fg", b"bg", b"fg"], [b"", b"", b""]]),
    "array in an array": np.array(objects(np.array(["fg", "bg", "fg"]), np.array([])), object),
    "tuple": (("fg", "bg", "fg"), ()),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_form_of_clicks_order(tmp_path: Path, name: str) -> None:
    arrays = small_case(clicks=np.array(CLICKS), clicks_order=ORDERS[name])
    case = parse_case(arrays, "a")
    assert case.notes == ()
    assert [prompts.clicks for prompts in case.objects] == [(FIRST, SECOND, THIRD), ()]
    if isinstance(ORDERS[name], np.ndarray):
        assert load_case(write_npz(tmp_path / "a.npz", arrays)).objects == case.objects


NO_ORDER = {
    "absent": None,
    "None": np.array(None),
    "a list of None": [None, None],
    "an empty array": np.array([]),
    "no rounds": np.empty((2, 0)),
}


@pytest.mark.parametrize("name", NO_ORDER)
def test_without_an_order_foreground_comes_first(name: str) -> None:
    case = parse_case(small_case(clicks=np.array(CLICKS), clicks_order=NO_ORDER[name]), "a")
    assert case.notes == ()
    assert case.objects[0].clicks == (FIRST, THIRD, SECOND)


def test_one_string_a_class_is_an_order_too() -> None:
    clicks = [{"fg": [[1, 1, 1]]}, {"bg": [[0, 1, 2]]}]
    case = parse_case(small_case(clicks=clicks, clicks_order=np.array(["fg", "bg"])), "a")
    assert case.notes == ()
    assert [prompts.clicks for prompts in case.objects] == [(THIRD,), (SECOND,)]


ABSENT: list[Any] = [None, np.array(None), np.array([]), np.array([], object), []]


@pytest.mark.parametrize("empty", ABSENT, ids=repr)
def test_boxes_alone(empty: Any) -> None:
    case = parse_case(small_case(clicks=empty, clicks_order=empty, prev_pred=empty), "a")
    assert case.notes == ()
    assert case.previous is None
    assert all(prompts.box is not None and not prompts.clicks for prompts in case.objects)


@pytest.mark.parametrize("empty", ABSENT, ids=repr)
def test_clicks_alone(empty: Any) -> None:
    case = parse_case(small_case(boxes=empty), "a")
    assert case.notes == ()
    assert all(prompts.box is None and len(prompts.clicks) == 2 for prompts in case.objects)


READ = Box((1, 4, 5), (4, 10, 9), 2)

BOXES = {
    "dicts of int": [BOX, BOX],
    "dicts of numpy scalars": np.array([{k: np.int64(v) for k, v in BOX.items()}] * 2),
    "dicts of whole floats": [{k: np.float32(v) for k, v in BOX.items()}] * 2,
    "dicts of arrays of no dimension": [{k: np.array(v) for k, v in BOX.items()}] * 2,
    "a tuple": (BOX, BOX),
    "records of ints": np.array([tuple(BOX.values())] * 2, [(k, "i4") for k in BOX]),
    "records of floats": np.array([tuple(BOX.values())] * 2, [(k, "f8") for k in BOX]),
    "with keys of others": [BOX | {"name": "liver"}] * 2,
}


@pytest.mark.parametrize("name", BOXES)
def test_every_form_of_boxes(tmp_path: Path, name: str) -> None:
    arrays = small_case(boxes=BOXES[name])
    case = parse_case(arrays, "a")
    assert case.notes == ()
    assert [prompts.box for prompts in case.objects] == [READ, READ]
    if isinstance(BOXES[name], np.ndarray):
        assert load_case(write_npz(tmp_path / "a.npz", arrays)).objects == case.objects


@pytest.mark.parametrize("boxes", [BOX, np.array(BOX), objects(BOX), [BOX]])
def test_one_class(boxes: Any) -> None:
    case = parse_case(small_case(boxes=boxes, clicks=None, clicks_order=None), "a")
    assert case.objects == (ObjectPrompts(1, READ),)


def test_255_classes() -> None:
    case = parse_case(small_case(boxes=[BOX] * 255, clicks=None), "a")
    assert [prompts.label for prompts in case.objects] == list(range(1, 256))


# --- what is repaired -----------------------------------------------------------------------------


def only_note(case: Case) -> str:
    assert len(case.notes) == 1, case.notes
    return case.notes[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_nan_and_infinity_in_the_image(dtype: Any) -> None:
    image = np.arange(60, dtype=dtype).reshape(3, 4, 5)
    image[0, 0, :4] = np.nan, np.inf, -np.inf, 7
    case = parse_case(small(image), "a")
    assert case.image[0, 0].tolist() == [4, 59, 4, 7, 4]
    np.testing.assert_array_equal(case.image[1:], image[1:])
    assert only_note(case).startswith("imgs: 3 of 60 voxels NaN, infinite or beyond ")
    assert only_note(case).endswith(" were set to 59 where positive, else to 4.")


def test_absurd_values_in_the_image() -> None:
    image = np.zeros((2, 3, 4))
    image[0, 0, :3] = 1e300, -1e300, 200
    case = parse_case(small(image), "a")
    assert case.image[0, 0].tolist() == [200, 0, 200, 0]
    assert "2 of 24 voxels" in only_note(case)


@pytest.mark.parametrize("value", [-(1 << 63), 1 << 62])
def test_integers_may_be_absurd_too(value: int) -> None:
    image = np.arange(24).reshape(2, 3, 4)
    image[1, 1, 1] = value
    case = parse_case(small(image), "a")
    assert (case.image[1, 1, 1], case.image.dtype) == (0 if value < 0 else 23, np.int64)
    assert "1 of 24 voxels" in only_note(case)
    assert parse_case(small(np.arange(24).reshape(2, 3, 4)), "a").notes == ()


def test_an_image_without_any_finite_value_is_black() -> None:
    case = parse_case(small(np.full((2, 3, 4), np.nan, np.float32)), "a")
    assert not case.image.any()
    assert "24 of 24 voxels" in only_note(case)


SPACINGS: dict[str, tuple[Any, tuple[float, float, float], str]] = {
    "missing": (None, (1, 1, 1), "spacing is missing: 1 mm was taken."),
    "zero": (
        np.array([0.5, 0, 3]),
        (3, 3, 0.5),
        "spacing [0.5, 0.0, 3.0] is unusable in part: 3 mm was taken there.",
    ),
    "negative": (
        np.array([0.5, 2, -3]),
        (2, 2, 0.5),
        "spacing [0.5, 2.0, -3.0] is unusable in part: 2 mm was taken there.",
    ),
    "NaN": (
        [np.nan, 2, 3],
        (3, 2, 3),
        "spacing [nan, 2, 3] is unusable in part: 3 mm was taken there.",
    ),
    "too small": (
        np.array([1, 1e-30, 1]),
        (1, 1, 1),
        "spacing [1.0, 1e-30, 1.0] is unusable in part: 1 mm was taken there.",
    ),
    "two numbers": (
        np.array([1, 2]),
        (1, 1, 1),
        "spacing is not three numbers ([1, 2]): 1 mm was taken.",
    ),
    "a matrix": (
        np.eye(4),
        (1, 1, 1),
        "spacing is not three numbers (array of float64 (4, 4)): 1 mm was taken.",
    ),
    "one number": (
        np.array(2.0),
        (1, 1, 1),
        "spacing is not three numbers (2.0): 1 mm was taken.",
    ),
    "text": (
        np.array(["1", "2", "3"]),
        (1, 1, 1),
        "spacing ['1', '2', '3'] is unusable in part: 1 mm was taken there.",
    ),
}


@pytest.mark.parametrize("name", SPACINGS)
def test_spacing_is_repaired(name: str) -> None:
    stored, expected, note = SPACINGS[name]
    case = parse_case(small_case(spacing=stored), "a")
    assert case.spacing_mm == expected
    assert case.notes == (note,)


@pytest.mark.parametrize("spacing", [(1, 2, 3), [1.0, 2.0, 3.0], objects(1, 2.0, np.float32(3))])
def test_other_forms_of_spacing_are_read(spacing: Any) -> None:
    case = parse_case(small_case(spacing=spacing), "a")
    assert (case.spacing_mm, case.notes) == ((3.0, 2.0, 1.0), ())


@pytest.mark.parametrize("dtype", ["bool", "i1", "u2", "i8", "f4"])
def test_previous_label_maps_of_other_types(dtype: str) -> None:
    previous = np.zeros((6, 20, 16), dtype)
    previous[2:4] = 1
    case = parse_case(small_case(prev_pred=previous), "a")
    assert case.notes == ()
    assert case.previous is not None and case.previous.dtype == np.uint8
    np.testing.assert_array_equal(case.previous, previous)


@pytest.mark.parametrize(
    "previous, note",
    [
        (np.zeros((5, 20, 16), np.uint8), "has shape (5, 20, 16), imgs has (6, 20, 16): left out."),
        (np.zeros((6, 20, 16), complex), "(array of complex128 (6, 20, 16)): left out."),
        (np.full((6, 20, 16), "a"), "(array of <U1 (6, 20, 16)): left out."),
        ([1, 2], "prev_pred is no array of numbers ([1, 2]): left out."),
    ],
)
def test_unusable_previous_label_maps_are_left_out(previous: Any, note: str) -> None:
    case = parse_case(small_case(prev_pred=previous), "a")
    assert case.previous is None
    assert only_note(case).endswith(note)


@pytest.mark.parametrize("dtype, wrong", [("u1", 3), ("i2", -1), ("f4", 0.5), ("f8", np.nan)])
def test_unknown_labels_of_the_previous_round_are_background(dtype: str, wrong: float) -> None:
    previous = np.zeros((6, 20, 16), dtype)
    previous[2] = 2
    expected = previous.astype(np.uint8)
    previous[3, :2, :2] = wrong
    case = parse_case(small_case(prev_pred=previous), "a")
    assert case.previous is not None
    np.testing.assert_array_equal(case.previous, expected)
    assert only_note(case) == "prev_pred: 4 voxels with labels other than 0..2 were set to 0."


def test_clicks_order_for_another_number_of_classes_is_left_out() -> None:
    case = parse_case(small_case(clicks=np.array(CLICKS), clicks_order=[["fg", "bg", "fg"]]), "a")
    assert case.objects[0].clicks == (FIRST, THIRD, SECOND)
    assert only_note(case) == "clicks_order is for 1 classes, not for 2 classes: left out."


def test_a_class_without_a_box_does_not_stop_the_others() -> None:
    case = parse_case(small_case(boxes=[None, BOX], clicks=None, prev_pred=None), "a")
    assert case.objects == (ObjectPrompts(1), ObjectPrompts(2, READ))
    assert only_note(case) == "class 1: no box (None)."


def test_no_prompt_is_fine_where_the_last_round_left_a_mask() -> None:
    clicks: Any = [{"fg": [], "bg": []}] * 2
    case = parse_case(small_case(boxes=None, clicks=clicks, clicks_order=None), "a")
    assert case.previous is not None
    assert all(prompts.is_empty for prompts in case.objects)
