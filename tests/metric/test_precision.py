# SPDX-License-Identifier: Apache-2.0
"""MIR to 1e-6 where digits get lost: common means, massive dimensions, bad conditioning, clouds that are all but equal.

References are independent of us: `tests/reference.py`, which never forms a covariance; forty digits; closed forms.
"""

import mpmath
import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mir_callback import frechet_distance, modality_integration_rate
from mir_callback.errors import NumericsError
from mir_callback.metric import matrix_sqrt
from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_moments
from mir_callback.metric.rate import replace_outliers
from mir_callback.metric.tokens import OutlierRule, compute_row_norms
from tests import reference
from tests.clouds import generator

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIM = 128
TOLERANCE = 1e-6


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def basis(rng, dim):
    return torch.linalg.qr(normal(rng, dim, dim))[0]


def token_rows(rng, count, spread, turn, mean):
    """Rows like hidden states: a spectrum, long and short rows, samples of 60 rows that go together, a common mean."""
    samples = normal(rng, -(-count // 60), len(spread)).repeat_interleave(60, dim=0)[:count]
    lengths = torch.exp(0.15 * normal(rng, count, 1))
    return (normal(rng, count, len(spread)) + 0.5 * samples) * lengths * spread @ turn + mean


def distance_of(vision, text, **options):
    return frechet_from_moments(GaussianPair(compute_moments(vision), compute_moments(text), **options))


def with_mean_share(share):
    """Clouds whose common mean carries this share of the energy of their rows."""

    def clouds(rng):
        spread = torch.arange(1, DIM + 1).double().pow(-0.5)
        length = (share / (1 - share) * spread.square().sum() * 1.25).sqrt()
        mean = normal(rng, DIM)
        mean *= length / mean.norm()
        turn = basis(rng, DIM)
        return (
            token_rows(rng, 900, spread, turn, mean),
            token_rows(rng, 700, 0.9 * spread, basis(rng, DIM), 0.98 * mean),
        )

    return clouds


def massive(rng):
    """Two dimensions of a thousand times the others, almost constant."""
    vision, text = with_mean_share(0.2)(rng)
    for rows, others in ((vision, 1.0), (text, 1.02)):
        for dim in (7, 55):
            size = 1000.0 * rows.std() * others
            rows[:, dim] = size * (1 + 0.001 * normal(rng, len(rows)))
    return vision, text


def conditioned(condition, alike):
    """Covariances of a condition number, in one basis or two."""

    def clouds(rng):
        spread = torch.logspace(0, -0.5 * np.log10(condition), DIM, dtype=torch.float64)
        turn = basis(rng, DIM)
        other = turn if alike else basis(rng, DIM)
        zero = torch.zeros(DIM, dtype=torch.float64)
        return token_rows(rng, 900, spread, turn, zero), token_rows(rng, 700, 1.1 * spread, other, zero)

    return clouds


def few(vision, text):
    """Fewer rows than dimensions."""

    def clouds(rng):
        first, second = with_mean_share(0.5)(rng)
        return first[:vision], second[:text]

    return clouds


CASES = {
    "benign": with_mean_share(0.01),
    "mean 97 %": with_mean_share(0.97),
    "mean 99.7 %": with_mean_share(0.997),
    "massive": massive,
    **{
        f"cond {condition:.0e}, {'one basis' if alike else 'two bases'}": conditioned(condition, alike)
        for condition in (3e4, 6e5, 3e8)
        for alike in (True, False)
    },
    "N < d": few(60, 90),
    "N_v < d": few(60, 700),
    "N_t < d": few(900, 60),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rate_equals_the_reference_when_digits_are_at_risk(case, dtype):
    vision, text = (rows.to(dtype) for rows in CASES[case](generator(17)))
    expected, _ = reference.rate([vision], [text])
    assert modality_integration_rate([vision], [text]).mir == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("share", [0.2, 0.997])
@pytest.mark.parametrize("condition", [10.0, 1e6])
@pytest.mark.parametrize("aligned", [True, False])
def test_rate_of_many_layers_equals_the_reference_from_bfloat16(aligned, condition, share):
    rng = generator(23)
    vision, text = [], []
    for layer in range(6):
        spread = torch.logspace(0, -0.5 * np.log10(condition), DIM, dtype=torch.float64)
        mean, turn = share / (1 - share) * normal(rng, DIM), basis(rng, DIM)
        mean[3] += 300.0
        ratio = 1.02 if aligned else 10.0 / (layer + 1)
        other = turn if aligned else basis(rng, DIM)
        rows = token_rows(rng, 1100, ratio * spread, turn, mean), token_rows(rng, 900, spread, other, mean)
        rows[0][::150] *= 30.0
        rows[1][::200] *= 30.0
        vision.append(rows[0].bfloat16())
        text.append(rows[1].bfloat16())
    expected, distances = reference.rate(vision, text)
    found = modality_integration_rate(vision, text)
    assert found.mir == pytest.approx(expected, abs=TOLERANCE)
    assert found.per_layer == pytest.approx(distances, rel=2e-6)


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("count", [700, 60], ids=["N > d", "N < d"])
@pytest.mark.parametrize("condition", [1e2, 3e8])
def test_clouds_that_are_all_but_equal_keep_their_distance(condition, count, step):
    # vision = P text with P = I + step K symmetric and positive: P is the optimal map, so that the distance is the mean
    # squared length of its moves. Rows of float64 and every trace cancel to step^2; a difference of traces would end at
    # 1e-16 of them.
    rng = generator(29)
    spread = torch.logspace(0, -0.5 * np.log10(condition), DIM, dtype=torch.float64)
    text = token_rows(rng, count, spread, basis(rng, DIM), 3.0 * normal(rng, DIM))
    move = normal(rng, DIM, DIM) / DIM**0.5
    move = step * (move + move.T) / 4
    moved = text @ move
    gap = moved.mean(dim=0)
    expected = float(gap.square().sum() + (moved - gap).square().sum() / (count - 1))
    found = distance_of(text + moved, text)
    assert abs(found.raw - expected) <= found.rounding
    assert found.distance == pytest.approx(expected, rel=1e-7)


def exact_distance(vision, text):
    """With forty digits, from the definition."""
    with mpmath.workdps(40):
        means, covariances = [], []
        for rows in (vision, text):
            matrix = mpmath.matrix(rows.tolist())
            mean = [mpmath.fsum(matrix[:, j]) / matrix.rows for j in range(matrix.cols)]
            centred = mpmath.matrix(matrix.rows, matrix.cols)
            for i in range(matrix.rows):
                for j in range(matrix.cols):
                    centred[i, j] = matrix[i, j] - mean[j]
            means.append(mean)
            covariances.append(centred.T * centred / (matrix.rows - 1))
        values, vectors = mpmath.eigsy(covariances[0])
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        inner = mpmath.eigsy(root * covariances[1] * root, eigvals_only=True)
        gap = mpmath.fsum((a - b) ** 2 for a, b in zip(*means, strict=True))
        traces = mpmath.fsum(covariance[i, i] for covariance in covariances for i in range(covariance.rows))
        return float(gap + traces - 2 * mpmath.fsum(mpmath.sqrt(max(value, 0)) for value in inner))


@pytest.mark.parametrize("noise", [1e-1, 1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("rows", [30, 5], ids=["N > d", "N < d"])
@pytest.mark.parametrize("decades", [0, 4])
def test_error_stays_within_its_estimate_when_noise_is_all_that_separates_two_clouds(decades, rows, noise):
    rng = generator(31)
    text = normal(rng, rows, 7) * torch.logspace(0, -decades, 7, dtype=torch.float64) + 5.0
    vision = text + noise * normal(rng, rows, 7)
    expected = exact_distance(vision, text)
    found = distance_of(vision, text)
    assert abs(found.raw - expected) <= found.rounding
    if noise >= 1e-7:
        assert found.distance == pytest.approx(expected, rel=2e-6)


def test_alignment_is_only_asked_where_traces_cancel(monkeypatch):
    called = []
    monkeypatch.setattr(matrix_sqrt, "_procrustes", lambda *_: called.append(1) or (1.0, 0.0))
    vision, text = CASES["benign"](generator(0))
    frechet_distance(vision, text)
    assert not called
    frechet_distance(vision, vision + 1e-9 * text[:1])
    assert called


def test_distance_and_maps_come_from_the_same_eigenvectors(monkeypatch):
    vision, text = CASES["benign"](generator(0))
    without = distance_of(vision, text)
    monkeypatch.setattr(matrix_sqrt, "eigvalsh", None)  # to be called by nobody
    assert distance_of(vision, text, need_maps=True).distance == pytest.approx(without.distance, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_way_that_a_gpu_takes_leads_to_the_same_distance(case, monkeypatch):
    vision, text = CASES[case](generator(0))
    usual = distance_of(vision, text)
    monkeypatch.setattr(GaussianPair, "on_gpu", True)
    calls = []
    find = matrix_sqrt.find_polar_factor
    monkeypatch.setattr(matrix_sqrt, "find_polar_factor", lambda matrix: calls.append(1) or find(matrix))
    found = distance_of(vision, text)
    assert found.distance == pytest.approx(usual.distance, rel=1e-9)
    assert calls == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_is_an_outlier_when_all_norms_are_equal_but_for_rounding(dtype):
    # The same entries in every row, in another order in a few of them: equal norms, but often not to the last bit.
    for seed in range(20):
        rng = generator(seed)
        row = normal(rng, DIM).to(dtype)
        others = [row[torch.randperm(DIM, generator=rng)] for _ in range(20)]
        norms = compute_row_norms(torch.stack([row] * 400 + others))
        assert not OutlierRule.from_norms(norms, dtype).outliers(norms).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("massive", [1.0, 300.0])
def test_no_row_is_an_outlier_behind_a_norm_layer_whose_weights_are_equal(dtype, massive):
    states = normal(generator(1), 4000, 1024)
    states[:, 7] *= massive
    layer = torch.nn.LayerNorm(1024, eps=0.0, dtype=dtype)
    torch.nn.init.constant_(layer.weight, 0.37)
    rows = layer(states.to(dtype)).detach()
    assert replace_outliers(rows) is rows


def test_no_row_is_an_outlier_behind_a_norm_layer_that_computes_in_float32():
    layer = LlamaRMSNorm(64, eps=0.0).double()
    rows = layer(normal(generator(2), 4000, 64)).detach()
    assert replace_outliers(rows) is rows


def test_distance_that_float64_cannot_hold_is_refused():
    for count in (50, 4):  # more and fewer rows than dimensions
        vision, text = (1e80 * normal(generator(seed), count, 8) for seed in (1, 2))
        with pytest.raises(NumericsError, match="not finite"):
            frechet_distance(vision, text)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_that_stands_out_of_equal_norms_is_an_outlier(dtype):
    rows = torch.ones(50, DIM, dtype=dtype)
    rows[7] *= 1 + 16 * torch.finfo(dtype).eps if dtype != torch.float64 else 1 + 1e-6
    norms = compute_row_norms(rows)
    assert OutlierRule.from_norms(norms, dtype).outliers(norms).nonzero().flatten().tolist() == [7]
