"""Means of a handful of cases, and what these tell of them: 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

_COVERAGE = 0.95


class MeanInterval(NamedTuple):
    """A mean and the ends of its 95 % confidence interval.

    Attributes:
        mean: NaN without a single value.
        low, high: NaN where nothing tells how far single values lie apart. Not held within the
            range of a score: of two cases they may lie beyond 0 and 1.
        count: values that it is the mean of.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_intervals(
    values: NDArray[np.float64], strata: Sequence[NDArray[np.bool_]]
) -> list[MeanInterval]:
    """Mean of the strata's means, with its interval, for each column of ``values``.

    Student's interval, of several strata with the degrees of freedom of Welch and Satterthwaite
    (Biometrics Bulletin 2, 1946): modalities have two to eight cases, too few for a bootstrap.
    A stratum of one value is taken to scatter as the others do on average. Rows are taken to be
    independent.

    Args:
        values: (rows, columns); NaN rows of a column are left out.
        strata: masks of rows, (rows,) each; those without a value in a column are left out.
    """
    return [_interval([column[m][~np.isnan(column[m])] for m in strata]) for column in values.T]


def mean_of_known(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The mean along an axis of what is not NaN; NaN where nothing is (``np.nanmean`` warns)."""
    means: NDArray[np.float64] = np.ma.masked_invalid(values).mean(axis).filled(np.nan)
    return means


def _interval(parts: Sequence[NDArray[np.float64]]) -> MeanInterval:
    parts = [part for part in parts if len(part)]
    if not parts:
        return MeanInterval(math.nan, math.nan, math.nan, 0)
    counts = np.array([len(part) for part in parts])
    mean = float(np.mean([part.mean() for part in parts]))
    freedom = counts - 1
    if not freedom.any():
        return MeanInterval(mean, math.nan, math.nan, len(parts))
    scatter = np.array([np.square(part - part.mean()).sum() for part in parts])
    pooled = scatter.sum() / freedom.sum()
    variance = np.where(freedom > 0, scatter / np.maximum(freedom, 1), pooled)
    freedom = np.where(freedom > 0, freedom, freedom.sum())
    squares = variance / counts  # squared standard errors of the strata's means
    if not squares.any():
        return MeanInterval(mean, mean, mean, int(counts.sum()))
    degrees = squares.sum() ** 2 / np.sum(squares**2 / freedom)
    reach = student_t.ppf((1 + _COVERAGE) / 2, degrees) * np.sqrt(squares.sum()) / len(parts)
    return MeanInterval(mean, float(mean - reach), float(mean + reach), int(counts.sum()))
