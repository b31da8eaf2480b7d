# SPDX-License-Identifier: Apache-2.0
"""What an evaluation costs on each rank, term by term: pure functions of sizes and rates.

With N tokens of a rank, d dimensions, K layers and W ranks, each rank pays for

- forward: its share of the samples, 2 P N + 2 K d sum(length^2) floating-point operations, at least one sample's;
- weights: under ZeRO-3, all weights once a batch over the link;
- rows: copying, norms and medians, N d K numbers;
- moments: N d^2 K products;
- solve: ceil(K / W) layers of d^3 each;
- standard errors: N d^2 K products again, and ceil(K / W) d^3;
- messages: two d x d scatters a layer to its owner, and two maps from it if standard errors are wanted, and their
  latencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and its probe.

    Attributes:
        hidden: width d.
        layers: K.
        parameters: of the decoder layers.
        samples: of the probe.
        vision: image tokens a sample.
        text: text tokens a sample.
    """

    hidden: int
    layers: int
    parameters: float
    samples: int
    vision: int
    text: int

    @classmethod
    def llama(cls, hidden: int, layers: int, samples: int, vision: int, text: int) -> Shape:
        """With the proportions of the first LLaMA: 4 d^2 of attention and 3 x 43/16 d^2 of feed-forward a layer."""
        return cls(hidden, layers, layers * (4 + 3 * 43 / 16) * hidden**2, samples, vision, text)

    @property
    def length(self) -> int:
        """Tokens a sample."""
        return self.vision + self.text


@dataclass(frozen=True)
class Rates:
    """Seconds that a machine needs for one of each.

    Attributes:
        fixed: an evaluation of nothing.
        flop: of the forward.
        number: of the rows, N d K of them.
        product: of the moments, N d^2 K of them.
        cube: of the solve, d^3 a layer.
        error_product: of the standard errors' pass over the rows; 0 where ``product`` has it in it.
        error_cube: of the maps, and of eigenvectors where they come from these; 0 where ``cube`` has it in it.
        byte: over the link between ranks.
        latency: of one collective, times log2 of the ranks.
    """

    fixed: float = 0.0
    flop: float = 0.0
    number: float = 0.0
    product: float = 0.0
    cube: float = 0.0
    error_product: float = 0.0
    error_cube: float = 0.0
    byte: float = 0.0
    latency: float = 0.0


COLLECTIVES_A_LAYER = 8
ROUNDS_OF_MEDIANS = 16


def forward_flops(shape: Shape, samples: int) -> float:
    """Of a causal forward over some samples."""
    tokens = samples * shape.length
    return 2.0 * shape.parameters * tokens + 2.0 * shape.layers * shape.hidden * samples * shape.length**2


def terms(shape: Shape, rates: Rates, ranks: int, *, errors: bool = True, zero3: bool = True) -> dict[str, float]:
    """Seconds of each part of an evaluation, on the rank with the most to do.

    Args:
        shape: the model and its probe.
        rates: of the machine.
        ranks: W.
        errors: with standard errors.
        zero3: weights are spread over the ranks and gathered for each batch of four samples.
    """
    mine = math.ceil(shape.samples / ranks)
    layers = math.ceil(shape.layers / ranks)
    tokens, square = mine * shape.length, shape.hidden**2
    spread = ranks > 1
    exchanged = shape.layers * square * (2 * 8 + (2 * 4 if errors else 0))
    collectives = shape.layers * COLLECTIVES_A_LAYER + ROUNDS_OF_MEDIANS
    products = tokens * square * shape.layers
    cubes = layers * shape.hidden * square
    return {
        "forward": rates.fixed + rates.flop * forward_flops(shape, mine),
        "weights": rates.byte * 2.0 * shape.parameters * math.ceil(mine / 4) if spread and zero3 else 0.0,
        "rows": rates.number * tokens * shape.hidden * shape.layers,
        "moments": rates.product * products,
        "solve": rates.cube * cubes,
        "standard errors": rates.error_product * products + rates.error_cube * cubes if errors else 0.0,
        "messages": rates.byte * exchanged + rates.latency * collectives * math.log2(ranks) if spread else 0.0,
    }


def beyond_the_forward(shape: Shape, rates: Rates) -> float:
    """Seconds of an evaluation on one process beyond those of its forward."""
    return float(rates.fixed + _counts(shape) @ np.array([rates.number, rates.product, rates.cube]))


def fitted(shapes: Sequence[Shape], seconds: Sequence[float]) -> Rates:
    """The rates, none negative, at which evaluations come nearest to what they took beyond their forwards.

    Args:
        shapes: what was run on one process.
        seconds: what each took beyond its forward; relative errors are what counts.

    Returns:
        ``fixed``, ``number``, ``product`` and ``cube``, the latter two with the standard errors' share.
    """
    counts = np.array([[1.0, *_counts(shape)] for shape in shapes])
    weights = 1.0 / np.asarray(seconds)
    scale = (counts * weights[:, None]).max(axis=0)
    found = nnls(counts * weights[:, None] / scale, np.ones(len(shapes)))[0] / scale
    return Rates(fixed=found[0], number=found[1], product=found[2], cube=found[3])


def _counts(shape: Shape) -> np.ndarray:
    """Numbers, products and cubes of an evaluation on one process."""
    numbers = shape.samples * shape.length * shape.hidden * shape.layers
    return np.array([numbers, numbers * shape.hidden, shape.layers * shape.hidden**3], dtype=float)
