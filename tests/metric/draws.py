# SPDX-License-Identifier: Apache-2.0
"""Random probes whose samples have tokens of different lengths, as rows of one layer."""

from collections.abc import Callable

import torch

DIM, SAMPLES, IMAGE, WORDS = 24, 100, 8, 12
SPREAD = torch.arange(1, DIM + 1).double() ** -0.6
TURN = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)).double())[0]
Lengths = Callable[[torch.Generator], torch.Tensor]
Rows = tuple[torch.Tensor, torch.Tensor]


def longer(share: float, factor: float) -> Lengths:
    """A share of the samples has tokens of so many times the length."""
    return lambda rng: torch.where(torch.rand(SAMPLES, 1, 1, generator=rng) < share, factor, 1.0).double()


def pareto(index: float) -> Lengths:
    """Lengths of samples follow a Pareto law."""
    return lambda rng: torch.rand(SAMPLES, 1, 1, generator=rng).double() ** (-1 / index)


def draw(seed: int, lengths: Lengths, where: str = "images", size: float = 2.0) -> Rows:
    """Vision and text rows, (SAMPLES, tokens, DIM); lengths are of "images", "texts" or "both", ``size`` of all vision.

    Samples have effects of their own, and every token a length of its own.
    """
    rng = torch.Generator().manual_seed(seed)
    of_samples, one = lengths(rng), torch.ones(SAMPLES, 1, 1).double()

    def tokens(count: int, long: bool) -> torch.Tensor:
        own, each = (torch.randn(SAMPLES, number, DIM, generator=rng).double() for number in (1, count))
        noise = torch.exp(0.2 * torch.randn(SAMPLES, count, 1, generator=rng).double())
        return (0.5 * own + each) * noise * SPREAD * (of_samples if long else one)

    vision = tokens(IMAGE, where != "texts") @ TURN
    return size * (vision + 0.1), tokens(WORDS, where != "images")
