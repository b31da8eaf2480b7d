# SPDX-License-Identifier: Apache-2.0
"""Curves of MIR over a run whose truth is known, and noise to lay over them.

A curve is a function of the part of the run done, in 0 to 1 and a little beyond. Families draw theirs at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]
Family = Callable[[np.random.Generator], Curve]

HORIZON = 0.1
_GRID = 2000  # points a run


def gain(curve: Curve) -> tuple[Array, Array]:
    """Parts of the run, 0 to 1, and how far the curve falls below itself within the next tenth of the run."""
    t = np.arange(round(_GRID * (1 + HORIZON)) + 1) / _GRID
    values = curve(t)
    ahead = round(_GRID * HORIZON)
    lowest = np.lib.stride_tricks.sliding_window_view(values, ahead + 1).min(axis=1)
    return t[: len(lowest)], values[: len(lowest)] - lowest


def settled(curve: Curve, worth: float) -> float:
    """From where on the next tenth of the run never brings ``worth`` again; 1 where that is never so."""
    t, gains = gain(curve)
    worthwhile = np.flatnonzero(gains >= worth)
    return 0.0 if len(worthwhile) == 0 else float(t[worthwhile[-1]])


def exponential(rng: np.random.Generator) -> Curve:
    """Falls and saturates."""
    depth, tau = rng.uniform(0.5, 1.5), rng.uniform(0.04, 0.15)
    return lambda t: 3 + depth * np.exp(-t / tau)


def power_law(rng: np.random.Generator) -> Curve:
    """Falls fast, with a long tail."""
    depth, start, power = rng.uniform(0.5, 1.5), rng.uniform(0.05, 0.15), rng.uniform(2, 4)
    return lambda t: 3 + depth * (1 + t / start) ** -power


def two_rates(rng: np.random.Generator) -> Curve:
    """A fast fall and a slow one."""
    fast, slow, depth, part = (
        rng.uniform(0.02, 0.05),
        rng.uniform(0.08, 0.18),
        rng.uniform(0.5, 1.5),
        rng.uniform(0.1, 0.4),
    )
    return lambda t: 3 + depth * ((1 - part) * np.exp(-t / fast) + part * np.exp(-t / slow))


def logistic(rng: np.random.Generator) -> Curve:
    """Stays up at first, falls, levels off."""
    depth, middle, width = rng.uniform(0.5, 1.2), rng.uniform(0.12, 0.25), rng.uniform(0.03, 0.06)
    return lambda t: 3 + depth / (1 + np.exp((t - middle) / width))


def rise_and_fall(rng: np.random.Generator) -> Curve:
    """A fresh projector: up by most of a unit within the first tenth of the run, then down below the start."""
    top, up, tau = rng.uniform(0.9, 1.4), rng.uniform(0.03, 0.06), rng.uniform(0.1, 0.16)
    start = rng.uniform(0.1, 0.3)
    return lambda t: 2 + top * np.exp(-t / tau) * (1 + t / tau) - (top - start) * np.exp(-t / up)


def corner(rng: np.random.Generator) -> Curve:
    """A straight fall that ends at once: the hardest for a rule that looks back."""
    depth, end = rng.uniform(0.5, 1.5), rng.uniform(0.25, 0.6)
    return lambda t: 3 + depth * np.maximum(1 - t / end, 0)


def flat_start(rng: np.random.Generator) -> Curve:
    """Level for up to 30 % of the run, as in a long warm-up of the learning rate, and only then falls."""
    start, depth, tau = rng.uniform(0.05, 0.3), rng.uniform(0.5, 1.2), rng.uniform(0.04, 0.1)
    return lambda t: 3 + depth * np.exp(-np.maximum(t - start, 0) / tau)


def late_logistic(rng: np.random.Generator) -> Curve:
    """As the logistic one, with its middle as late as 60 % of the run."""
    depth, middle, width = rng.uniform(0.5, 1.2), rng.uniform(0.25, 0.6), rng.uniform(0.03, 0.06)
    return lambda t: 3 + depth / (1 + np.exp((t - middle) / width))


def shelf_after_rise(rng: np.random.Generator) -> Curve:
    """A short rise, level until 10 to 20 % of the run, then falls below the start."""
    up, rise, shelf = rng.uniform(0.2, 0.6), rng.uniform(0.005, 0.015), rng.uniform(0.1, 0.2)
    depth, tau = rng.uniform(0.8, 1.4), rng.uniform(0.04, 0.1)
    return lambda t: 3 - up * np.exp(-t / rise) + depth * (np.exp(-np.maximum(t - shelf, 0) / tau) - 1)


def slow_exponential(rng: np.random.Generator) -> Curve:
    """Falls all through the run."""
    depth, tau = rng.uniform(0.8, 2.0), rng.uniform(0.35, 1.0)
    return lambda t: 3 + depth * np.exp(-t / tau)


def data_scale(rng: np.random.Generator) -> Curve:
    """Falls by as much with every tenfold of the data, as over the paper's data scales."""
    decade, start = rng.uniform(0.55, 1.5), rng.uniform(0.02, 0.1)
    return lambda t: 4.5 - decade * np.log10(1 + t / start)


def straight(rng: np.random.Generator) -> Curve:
    """Drifts down steadily."""
    return straight_by(rng.uniform(0.02, 0.12))


def straight_by(fall: float) -> Curve:
    """A steady fall by this much in a tenth of the run."""
    return lambda t: 4 - 10 * fall * t


def two_epochs(rng: np.random.Generator) -> Curve:
    """Falls in the first epoch, and further in the second; no shelf between them is longer than a tenth of the run."""
    depth, tau, drop, after = (
        rng.uniform(0.8, 1.5),
        rng.uniform(0.15, 0.25),
        rng.uniform(0.1, 0.3),
        rng.uniform(0.2, 0.4),
    )
    return lambda t: 3 + depth * np.exp(-t / tau) + drop * np.where(t > 0.5, np.exp(-(t - 0.5) / after), 1.0)


def second_fall(rng: np.random.Generator, shelf: float) -> Curve:
    """Falls, is level (gains less than 0.01 in a tenth) for ``shelf`` of the run, and falls again by as much as 0.3."""
    depth, tau, drop, after = (
        rng.uniform(0.5, 1.2),
        rng.uniform(0.03, 0.06),
        rng.uniform(0.1, 0.3),
        rng.uniform(0.05, 0.1),
    )
    begin = settled(lambda t: depth * np.exp(-t / tau), 0.01) + shelf
    return lambda t: 3 + depth * np.exp(-t / tau) + drop * np.where(t > begin, np.exp(-(t - begin) / after), 1.0)


def stepwise(rng: np.random.Generator, changes: Sequence[float], drop: tuple[float, float]) -> Curve:
    """Falls and levels off, and falls again by about 0.1 after each of the changes (parts of the run).

    ``drop`` is the range of how fast: a drop of the learning rate or a new epoch acts within a few percent of the run.
    """
    depth, tau = rng.uniform(0.5, 1.5), rng.uniform(0.03, 0.07)
    falls = [(at, rng.uniform(0.07, 0.2), rng.uniform(*drop)) for at in changes]
    return lambda t: (
        3 + depth * np.exp(-t / tau) - sum(by * (1 - np.exp(-np.maximum(t - at, 0) / fast)) for at, by, fast in falls)
    )


def drops(rng: np.random.Generator) -> Curve:
    """The learning rate drops after a third and after two thirds of the run."""
    return stepwise(rng, (1 / 3, 2 / 3), (0.01, 0.03))


def epochs(rng: np.random.Generator) -> Curve:
    """Three epochs, with a step of MIR at the beginning of the second and the third."""
    return stepwise(rng, (1 / 3, 2 / 3), (0.002, 0.02))


def decay(rng: np.random.Generator) -> Curve:
    """The learning rate is constant until 70 % of the run and then decays to zero (WSD)."""
    return stepwise(rng, (0.7,), (0.03, 0.06))


def level(rng: np.random.Generator) -> Curve:
    """Does not move at all."""
    return lambda t: np.full_like(t, 3.0)


SATURATING: dict[str, Family] = {
    "exponential": exponential,
    "power law": power_law,
    "two rates": two_rates,
    "logistic": logistic,
    "rise, then fall": rise_and_fall,
    "corner": corner,
    "flat start": flat_start,
    "late logistic": late_logistic,
    "rise, shelf, fall": shelf_after_rise,
}
FALLING: dict[str, Family] = {
    "slow exponential": slow_exponential,
    "data scale": data_scale,
    "straight": straight,
    "two epochs": two_epochs,
}
# With what the plan says of the changes: the parts of the run where they come, and the field of a record.
PLANNED: dict[str, tuple[Family, tuple[float, ...], str]] = {
    "drops of the learning rate": (drops, (1 / 3, 2 / 3), "next_drop"),
    "three epochs": (epochs, (1 / 3, 2 / 3), "next_epoch"),
    "decay at the end": (decay, (0.7,), "next_drop"),
}


def noise(rng: np.random.Generator, count: int, size: float, memory: float) -> Array:
    """(count,) Gaussian noise; each value keeps ``memory`` of the one before."""
    fresh = rng.standard_normal(count)
    values = np.empty(count)
    values[0] = fresh[0]
    for k in range(1, count):
        values[k] = memory * values[k - 1] + np.sqrt(1 - memory**2) * fresh[k]
    return size * values
