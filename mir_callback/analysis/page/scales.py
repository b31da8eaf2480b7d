# SPDX-License-Identifier: Apache-2.0
"""Scales: from values to places in a chart, with round numbers to label them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

Kind = Literal["linear", "log", "log1p"]
_FEWEST_TICKS = 3
_LEAST_POWER = -300.0  # of ten, on a logarithmic scale: floats end not far below


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to 0..1.

    Attributes:
        low: value at 0.
        high: value at 1; above ``low``.
        kind: "linear", "log", or "log1p", which has a place for zero.
    """

    low: float
    high: float
    kind: Kind = "linear"

    def __call__(self, values: np.ndarray | list[float]) -> np.ndarray:
        """Places of values, (n,) float64; those outside the scale lie outside 0..1, those it cannot show are NaN."""
        low, high = self._inner(np.array([self.low, self.high]))
        places: np.ndarray = (self._inner(np.asarray(values, dtype=float)) - low) / (high - low)
        return places

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` round values as (place, label)."""
        values = self._round_values(count)
        return [(float(place), short(value)) for place, value in zip(self(list(values)), values, strict=True)]

    def _inner(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "log":
                return np.where(values > 0, np.log10(np.where(values > 0, values, 1.0)), np.nan)
            return np.log1p(values) if self.kind == "log1p" else values

    def _round_values(self, count: int) -> list[float]:
        if self.kind != "linear":
            # 1, 2, 5 of each decade where that is not too many, or else the powers of ten, if need be not all of them.
            fine, coarse = self._of_decades((1.0, 2.0, 5.0)), self._of_decades((1.0,))
            if len(coarse) >= _FEWEST_TICKS and len(fine) > 1.5 * count:
                return coarse[:: math.ceil(len(coarse) / (1.5 * count))]
            if len(fine) >= _FEWEST_TICKS:
                return fine
        return self._inside(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))

    def _of_decades(self, digits: tuple[float, ...]) -> list[float]:
        from_zero = self.kind == "log1p"
        low = max(self.low, 1.0) if from_zero else self.low
        values = [float(value) for value in LogLocator(subs=digits, numticks=99).tick_values(low, self.high)]
        found = self._inside(value for value in values if value >= low)
        return [0.0, *found] if from_zero and self.low <= 0 else found

    def _inside(self, values: Iterable[float]) -> list[float]:
        slack = 1e-9 * (self.high - self.low) if self.kind == "linear" else 0.0
        return [float(value) for value in values if self.low - slack <= value <= self.high + slack]


def scale_of(values: Iterable[float | None], kind: Kind = "linear", padding: float = 0.06) -> Scale:
    """A scale on which all values have a place, with room at both ends.

    Args:
        values: None, NaN and infinite ones do not count; nor do those up to zero on a logarithmic scale.
        kind: see :class:`Scale`; "log" becomes "linear" where no value is positive.
        padding: room at either end, as a part of the whole.
    """
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    if kind == "log":
        positive = [value for value in finite if value > 0]
        if not positive:
            return scale_of(finite, "linear", padding)
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = padding * (high - low) if low < high else 0.15
        return Scale(10 ** max(low - room, _LEAST_POWER), 10 ** (high + room), "log")
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = padding * (high - low)
    if low == high:
        room = max(0.05 * abs(low), 0.5 if padding == 0 else 0.05)
    return Scale(low - room if kind == "linear" else low, high + room, kind)


def short(value: float) -> str:
    """A round number as short as a tick label should be: 0.05, 1200, 25k, 3M."""
    text = f"{value:.6g}"
    for least, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            text = f"{value / unit:g}{letter}"
            break
    return text.replace("-", "\N{MINUS SIGN}")


def precise(value: float | None, digits: int = 4) -> str:
    """A measured number with its first digits; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")
