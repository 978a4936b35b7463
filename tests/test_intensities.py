"""Intensities are rescaled to 0..255 by a window, or by percentiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inference.intensities import CT_WINDOWS, parse_window, to_uint8


@pytest.mark.parametrize(
    "name, low, high",
    [("soft", -160, 240), ("lung", -910, 590), ("brain", 0, 80), ("bone", -500, 1300)],
)
def test_ct_windows(name: str, low: int, high: int) -> None:
    values = np.array([[[-2000, low, low + (high - low) // 5, high, 3000]]], np.int16)
    assert to_uint8(values, CT_WINDOWS[name]).ravel().tolist() == [0, 0, 51, 255, 255]


@pytest.mark.parametrize("text, window", [("lung", (1500, -160)), (" 350, -4.5e1", (350, -45))])
def test_a_window_as_text(text: str, window: tuple[float, float]) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["liver", "", "400", "400,40,3", "a,b", "0,40", "-400,40"])
def test_a_window_of_no_meaning(text: str) -> None:
    with pytest.raises(ValueError, match=f"^received the window '{text}'; accepted: soft, lung"):
        parse_window(text)


@pytest.mark.parametrize("text", ["inf,40", "nan,40", "400,-inf", "400,nan"])
def test_a_window_without_end(text: str) -> None:
    with pytest.raises(ValueError, match=r"W,L with W above 0$"):
        parse_window(text)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.float64])
def test_percentiles(dtype: Any) -> None:
    values = np.arange(2001).astype(dtype).reshape(3, 23, 29)
    image = to_uint8(values)
    low, high = 10, 1990  # 0.5 and 99.5 % of 0..2000
    expected = np.rint((np.clip(values.astype(float), low, high) - low) * 255 / (high - low))
    np.testing.assert_array_equal(image, expected)


def test_intensities_that_are_no_numbers() -> None:
    values = np.array([[[0, 100, np.nan, np.inf, -np.inf]]], np.float32)
    assert to_uint8(values, (100, 50)).ravel().tolist() == [0, 255, 0, 255, 0]
    assert to_uint8(values).ravel().tolist() == [0, 255, 0, 255, 0]
    assert not to_uint8(np.full((2, 3, 4), np.nan)).any()
    assert not to_uint8(np.full((2, 3, 4), 7)).any()


def test_what_is_bright_may_be_smaller_than_a_percentile() -> None:
    values = np.zeros((40, 40, 40), np.float32)
    values[10:16, 10:16, 10:16] = 1000
    values[0, 0, 0] = np.nan
    image = to_uint8(values)
    assert (image[10:16, 10:16, 10:16] == 255).all() and np.count_nonzero(image) == 6**3


def test_a_window_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^received a window of width -1; accepted: a positive"):
        to_uint8(np.zeros((1, 1, 1)), (-1, 0))
