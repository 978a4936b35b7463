"""Whatever the input, a case is valid or refused with a CaseError: nothing else is raised."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inference.case import Case, CaseError, load_case, parse_case
from inference.object_prompts import BOX_KEYS
from tests.npz_bytes import archive, npy
from tests.phantoms import challenge_case, objects

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(CaseError):
        load_case(path)


WHOLE = challenge_case((2, 8, 6), clicks=2, previous=True)


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=5)


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Some bytes replaced."""
    result = bytearray(content)
    for position, value in changes:
        result[position % len(result)] = value
    return bytes(result)


@QUICK
@given(CHANGES, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), st.floats(0.9, 1))
def test_mutated_files_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], kind: int, part: float
) -> None:
    content = archive(kind, **{key: npy(array) for key, array in WHOLE.items()})
    content = content[: round(part * len(content))] if part < 0.95 else content
    read_or_refused(tmp_path, changed(content, changes))


@QUICK
@given(CHANGES, st.sampled_from(["imgs", "spacing", "boxes", "clicks", "prev_pred"]))
def test_mutated_members_with_a_right_checksum(
    tmp_path: Path, changes: list[tuple[int, int]], key: str
) -> None:
    """Damage that zip's checksum does not catch: the npy headers and pickles are reached."""
    members = {k: npy(array) for k, array in WHOLE.items()}
    members[key] = changed(members[key], changes)
    read_or_refused(tmp_path, archive(zipfile.ZIP_STORED, **members))


def read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "a.npz"
    path.write_bytes(content)
    try:
        assert_valid(load_case(path))
    except CaseError as error:
        assert str(error).startswith("a.npz: received ") and str(error).isprintable()


NUMBERS = st.one_of(
    st.integers(-5, 40), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)
THINGS = st.recursive(
    st.one_of(NUMBERS, hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_side=3))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["fg", "bg", *BOX_KEYS, "z_mid"]), inner, max_size=7),
        st.lists(inner, max_size=3).map(lambda entries: objects(*entries)),
        inner.map(lambda entry: np.array(objects(entry), object).reshape(())),
    ),
    max_leaves=12,
)
DICTS = st.lists(
    st.dictionaries(st.sampled_from(["fg", "bg", *BOX_KEYS, "z_mid"]), st.one_of(NUMBERS, THINGS)),
    max_size=3,
)


@QUICK
@given(
    st.fixed_dictionaries(
        {"imgs": st.just(np.zeros((4, 5, 6), np.uint8))},
        optional={
            key: st.one_of(THINGS, DICTS)
            for key in ("spacing", "boxes", "clicks", "clicks_order", "prev_pred")
        },
    )
)
def test_any_object_is_read_or_refused(arrays: dict[str, Any]) -> None:
    try:
        assert_valid(parse_case(arrays, "a"))
    except CaseError as error:
        assert str(error).startswith("a: received ") and str(error).isprintable()


BOX_DICTS = st.fixed_dictionaries(
    {key: st.one_of(st.integers(-4, 12), st.floats(-4, 12)) for key in (*BOX_KEYS, "z_mid")}
)
CLICK_DICTS = st.fixed_dictionaries(
    {side: st.lists(st.tuples(*[st.integers(-2, 8)] * 3), max_size=4) for side in ("fg", "bg")}
)


@QUICK
@given(st.lists(st.tuples(BOX_DICTS, CLICK_DICTS, st.lists(st.sampled_from(["fg", "bg", None])))))
def test_likely_prompts_give_valid_objects(classes: list[Any]) -> None:
    keys = ("boxes", "clicks", "clicks_order")
    arrays: dict[str, Any] = {key: [entry[i] for entry in classes] for i, key in enumerate(keys)}
    arrays["imgs"] = np.zeros((4, 5, 6), np.uint8)
    try:
        case = parse_case(arrays, "a")
    except CaseError:
        return
    assert_valid(case)
    for prompts, (_, clicks, _) in zip(case.objects, classes, strict=True):
        for side, positive in (("fg", True), ("bg", False)):
            inside = [
                p
                for p in clicks[side]
                if all(0 <= i < n for i, n in zip(p, (4, 5, 6), strict=True))
            ]
            assert [c.position for c in prompts.clicks if c.positive == positive] == inside


def assert_valid(case: Case) -> None:
    """What the rest of the program counts on."""
    assert case.image.ndim == 3 and case.image.size and case.image.flags.c_contiguous
    assert np.isfinite(case.image).all()
    assert all(0 < size < np.inf for size in case.spacing_mm)
    assert [prompts.label for prompts in case.objects] == list(range(1, len(case.objects) + 1))
    for prompts in case.objects:
        if prompts.box is not None:
            for start, stop, size in zip(
                prompts.box.start, prompts.box.stop, case.image.shape, strict=True
            ):
                assert 0 <= start < stop <= size
            assert prompts.box.start[0] <= prompts.box.middle < prompts.box.stop[0]
        for click in prompts.clicks:
            assert all(0 <= i < n for i, n in zip(click.position, case.image.shape, strict=True))
    if case.previous is not None:
        assert case.previous.dtype == np.uint8 and case.previous.shape == case.image.shape
        assert case.previous.max() <= len(case.objects)
    assert all("\n" not in note for note in case.notes)
