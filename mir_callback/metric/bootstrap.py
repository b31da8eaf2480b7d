# SPDX-License-Identifier: Apache-2.0
"""What the 3-sigma rule would do on other draws of the probe: a bootstrap over samples, of row norms alone.

Influences are derivatives, and take the rows that the rule replaces as given. But its limit depends on all rows: where
many lie near it, another draw replaces others, and the distance jumps. So samples are drawn with replacement, the rule
is applied anew to each draw, and the rows it decides otherwise change the distance by the difference of their influence
functions. No distance is solved again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mir_callback.metric.tokens import SIGMAS, OutlierRule

DRAWS = 1000
_QUANTILES = 256  # between which the median of a draw is interpolated
BINS = 32  # of norms between the lowest and the highest limit, inside which rows count as evenly spread


@lru_cache(maxsize=4)
def draw_weights(count: int) -> Tensor:
    """How often each of ``count`` samples is in each draw, (DRAWS, count) float64; always the same. Ranks: pure."""
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    return torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


@dataclass(frozen=True)
class ResampledRule:
    """The 3-sigma rule of one modality in one layer, on the probe as it is and on every draw.

    Attributes:
        limits: (2, 1 + DRAWS) float64. First row: the largest norm that is kept, second row: minus the smallest. The
            first column is of the probe as it is.
    """

    limits: Tensor

    @classmethod
    def from_norms(cls, norms: Tensor, samples: Tensor, count: int, rule: OutlierRule) -> ResampledRule:
        """From the norms (N,) float64 of all rows, the sample of each, (N,) int64, and their rule. Ranks: pure."""
        weights = draw_weights(count).to(norms.device)
        centred = norms - rule.median
        order = centred.argsort(stable=True)
        ordered, of = centred[order], samples[order]
        size = min(_QUANTILES, len(norms))
        part = torch.arange(len(norms), device=norms.device) * size // len(norms)
        counts = torch.bincount(of * size + part, minlength=count * size).reshape(count, size).double()
        below = (weights @ counts).cumsum(dim=1)
        rows = below[:, -1].clamp_min(2.0)
        half = 0.5 * rows[:, None]
        index = torch.searchsorted(below, half).clamp_max(size - 1)
        before = torch.nn.functional.pad(below, (1, 0)).gather(1, index)
        share = (half - before) / (below.gather(1, index) - before).clamp_min(1.0)
        edges = ordered[(torch.arange(size + 1, device=norms.device) * len(norms) // size).clamp_max(len(norms) - 1)]
        medians = (edges[index] + share.clamp(0.0, 1.0) * (edges[index + 1] - edges[index]))[:, 0]
        sums = torch.zeros(count, 2, dtype=torch.float64, device=norms.device)
        sums.index_add_(0, samples, torch.stack([centred, centred.square()], dim=1))
        total, squares = (weights @ sums).unbind(dim=1)
        spread = ((squares - total.square() / rows) / (rows - 1.0)).clamp_min(0.0).sqrt()
        reach = (SIGMAS * spread).clamp_min(rule.rounding)
        moved = torch.stack([rule.median + medians + reach, reach - rule.median - medians])
        own = moved.new_tensor([[rule.median + rule.limit], [rule.limit - rule.median]])
        return cls(torch.cat([own, moved], dim=1))

    def _places(self, signed: Tensor) -> Tensor:
        """Where values (2, N) lie between the lowest and highest limit of each side, in bins; 0 if limits are equal."""
        low, high = self.limits.amin(dim=1, keepdim=True), self.limits.amax(dim=1, keepdim=True)
        return BINS * torch.where(high > low, (signed - low) / (high - low), 0.0)

    def undecided(self, norms: Tensor) -> Tensor:
        """Whether rows with these norms (N,) are kept on some draws and replaced on others, (N,) bool. Ranks: pure."""
        position = self._places(torch.stack([norms, -norms]))
        return ((position > 0.0) & (position <= BINS)).any(dim=0)

    def tabulate(self, norms: Tensor, effects: Tensor, samples: Tensor, count: int) -> Tensor:
        """Effects of keeping rows instead of replacing them, (N,) float64, added up by norm and sample.

        Returns (2, BINS, count) float64; add the tables of the ranks. Ranks: pure.
        """
        position = self._places(torch.stack([norms, -norms]))
        table = effects.new_zeros(2 * BINS * count)
        for side, place in enumerate(position):
            inside = (place > 0.0) & (place <= BINS)
            bins = (place[inside].ceil().long() - 1) + side * BINS
            table.index_add_(0, bins * count + samples[inside], effects[inside])
        return table.reshape(2, BINS, count)

    def effects(self, table: Tensor) -> Tensor:
        """Effect of the rows that each draw decides otherwise, (DRAWS,) float64, from the table of all rows."""
        weights = draw_weights(table.shape[-1]).to(table)
        position = self._places(self.limits).to(table.device)
        found = table.new_zeros(DRAWS)
        for of_bins, place in zip(table, position, strict=True):
            kept = torch.nn.functional.pad((weights @ of_bins.T).cumsum(dim=1), (1, 0))  # below each edge
            found += _interpolate(kept, place[1:]) - _interpolate(kept, place[:1].expand(DRAWS))
        return found


def project(draws: Tensor, count: int) -> Tensor:
    """Influence of each of ``count`` samples on a value, (count,) float64 with sum zero, from draws (DRAWS,) of it.

    The covariance with how often a sample is drawn: the derivative of the value's mean over draws, also where the value
    itself jumps. Ranks: pure.
    """
    weights = draw_weights(count)
    return count * ((weights - weights.mean(dim=0)).T @ (draws - draws.mean())) / DRAWS


def compare_spreads(draws: Tensor) -> Tensor:
    """Standard deviation of the second over that of the first row of draws (..., 2, DRAWS), (...,). Ranks: pure.

    1 where the first is zero. Both are of the same draws, so where the rows agree it is exactly 1.
    """
    fixed, anew = draws.std(dim=-1).unbind(dim=-1)
    return torch.where(fixed > 0.0, anew / fixed, 1.0)


def _interpolate(kept: Tensor, place: Tensor) -> Tensor:
    """Values of rows (DRAWS, BINS + 1) at one place each, (DRAWS,)."""
    left = place.floor().clamp(0, BINS - 1).long()[:, None]
    lower, upper = kept.gather(1, left)[:, 0], kept.gather(1, left + 1)[:, 0]
    return lower + (place - left[:, 0]) * (upper - lower)
