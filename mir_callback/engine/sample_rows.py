# SPDX-License-Identifier: Apache-2.0
"""Which sample of the probe each row belongs to, on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback import collectives

VISION, TEXT = 0, 1  # columns of the counts


@dataclass(frozen=True)
class SampleRows:
    """How many rows each sample has, and so which rows are whose. The same on every rank.

    Sample i is rank (i mod W)'s, see `share_of_rank`; a rank's rows lie in the order of its samples.

    Attributes:
        counts: for each rank (n_r, 2) int64 on the CPU, the vision and text rows of each of its samples.
    """

    counts: list[Tensor]

    @classmethod
    def shared(cls, mine: Tensor) -> SampleRows:
        """From this rank's counts (n_r, 2). Ranks: collective."""
        return cls(
            [torch.tensor(part, dtype=torch.int64).reshape(-1, 2) for part in collectives.gather_objects(mine.tolist())]
        )

    @property
    def num_samples(self) -> int:
        """Samples of the whole probe."""
        return sum(len(part) for part in self.counts)

    def totals(self, modality: int) -> Tensor:
        """Rows of each sample, (num_samples,) int64, in the probe's own order."""
        found = torch.zeros(self.num_samples, dtype=torch.int64)
        for rank, part in enumerate(self.counts):
            found[self._samples_of(rank)] = part[:, modality]
        return found

    def of_rank(self, rank: int, modality: int) -> Tensor:
        """Sample of each of a rank's rows, (n,) int64."""
        return torch.repeat_interleave(self._samples_of(rank), self.counts[rank][:, modality])

    def of_all_ranks(self, modality: int) -> Tensor:
        """Sample of each row of all ranks, in rank order, (N,) int64."""
        return torch.cat([self.of_rank(rank, modality) for rank in range(len(self.counts))])

    def _samples_of(self, rank: int) -> Tensor:
        return torch.arange(len(self.counts[rank])) * len(self.counts) + rank
