# SPDX-License-Identifier: Apache-2.0
"""The parts of one layer's distance on a GPU, each beside its plain float64 way, with what the fast way costs in MIR.

    python benchmarks/parts.py --dim 4096 --vision 57600 --text 90000

Rows are bfloat16 with the spectra named in the table, lognormal norms, and 0.3 % of long rows. Moments and solve are
timed alternately with float64 products and with eigenvalues. The last two columns: how far the layer's MIR is from that
of float64 moments, and the bound that the solver gives for its own error.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mir_callback.metric.frechet import FrechetResult, frechet_from_moments
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_scatter, moments_from_scatter, sum_rows
from mir_callback.metric.tokens import compute_lower_medians, compute_row_norms, iterate_in_float64

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "power law i^-0.5": lambda i: i.float().pow(-0.5),
    "steep, 1 to 1e-4": lambda i: torch.logspace(0, -4, len(i), device=i.device),
    "a third of the dimensions": lambda i: (i <= len(i) // 3).float() * i.float().pow(-0.5),
}


def rows(count: int, spectrum: Tensor, basis: Tensor, rng: torch.Generator) -> Tensor:
    """(count, d) bfloat16."""
    dim = len(spectrum)
    made = torch.cat(
        [
            torch.randn(min(8192, count - start), dim, generator=rng, device="cuda") * spectrum @ basis
            for start in range(0, count, 8192)
        ]
    )
    made *= torch.exp(0.15 * torch.randn(count, 1, generator=rng, device="cuda"))
    return made.bfloat16()


def scatter_in_float64(cloud: Tensor, mean: Tensor) -> Tensor:
    """What `compute_scatter` computes, by float64 products."""
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=cloud.device)
    for chunk in iterate_in_float64(cloud):
        centred = chunk - mean
        scatter.addmm_(centred.T, centred)
    return scatter


def solve(covariances: Sequence[Tensor], means: Sequence[Tensor]) -> FrechetResult:
    """Our distance: factors, the polar factor of their product, its bound."""
    # A scatter of two rows is their covariance; it is overwritten.
    vision, text = (
        moments_from_scatter(2, *each) for each in zip(means, (c.clone() for c in covariances), strict=True)
    )
    return frechet_from_moments(GaussianPair(vision, text))


def solve_by_eigenvalues(covariances: Sequence[Tensor], means: Sequence[Tensor]) -> float:
    """The distance through the eigenvalues of A S A^T in float64."""
    vision, text = covariances
    upper = torch.linalg.cholesky(vision).T
    values = torch.linalg.eigvalsh(upper @ text @ upper.T).clamp_min(0.0)
    gap = (means[0] - means[1]).square().sum()
    return (gap + vision.trace() + text.trace() - 2.0 * values.sqrt().sum()).item()


def milliseconds(*calls: Callable[[], Any], repeats: int) -> list[float]:
    """Medians of calls made alternately, after one warm-up."""
    taken: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for times, call in zip(taken, calls, strict=True):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if repeat:
                times.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(times) for times in taken]


def line(name: str, alike: bool, options: argparse.Namespace) -> str:
    """One row of the table."""
    rng = torch.Generator("cuda").manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(options.dim, options.dim, generator=rng, device="cuda"))[0] for _ in range(2)]
    spectrum = SPECTRA[name](torch.arange(1, options.dim + 1, device="cuda"))
    clouds = [
        rows(options.vision, spectrum, bases[0], rng),
        rows(options.text, 1.05 * spectrum, bases[0 if alike else 1], rng),
    ]
    means = [sum_rows(cloud) / len(cloud) for cloud in clouds]

    def covariances(scatter: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return [scatter(cloud, mean).div_(len(cloud) - 1) for cloud, mean in zip(clouds, means, strict=True)]

    exact, fast = covariances(scatter_in_float64), covariances(compute_scatter)
    reference = solve(exact, means).distance
    found = solve(fast, means)
    norms, medians = milliseconds(
        lambda: [compute_row_norms(cloud) for cloud in clouds],
        lambda: [compute_lower_medians(cloud) for cloud in clouds],
        repeats=options.repeats,
    )
    ours, plain = milliseconds(
        lambda: covariances(compute_scatter), lambda: covariances(scatter_in_float64), repeats=options.repeats
    )
    polar, eigen = milliseconds(
        lambda: solve(exact, means), lambda: solve_by_eigenvalues(exact, means), repeats=options.repeats
    )
    base = ((means[0] - means[1]).square().sum() + sum(each.trace() for each in exact)).item()
    return (
        f"| {name}, {'one basis' if alike else 'two bases'} | {reference / base:.3g} | {norms:.1f} | {medians:.1f} "
        f"| {ours:.1f} | {plain:.1f} | {plain / ours:.1f} | {polar:.1f} | {eigen:.1f} | {eigen / polar:.1f} "
        f"| {abs(math.log10(found.distance / reference)):.1e} "
        f"| {math.log10(1.0 + found.rounding / found.distance):.1e} |"
    )


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vision", type=int, default=57600, help="vision rows")
    parser.add_argument("--text", type=int, default=90000, help="text rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    lines = [
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"d = {options.dim}, {options.vision} vision and {options.text} text rows in bfloat16; milliseconds, medians "
        f"of {options.repeats} alternating runs",
        "",
        "| rows | FD / base | norms | medians | moments | in float64 | ratio | solve | eigenvalues | ratio "
        "| MIR off by | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(name, alike, options) for name in SPECTRA for alike in (False, True)),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(["`" + " ".join(["python", *sys.argv]) + "`", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
