# SPDX-License-Identifier: Apache-2.0
"""Influences are derivatives, and their spread is that of repeated probes."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from mir_callback.evaluation.report import find_errors
from mir_callback.evaluation.solve import LayerResult
from mir_callback.metric.bootstrap import DRAWS
from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.influence import (
    SampleSums,
    compute_influences,
    compute_maps_by_polar_factor,
    compute_mir_influences,
    compute_row_influences,
    compute_standard_error,
    compute_transport_maps,
)
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_moments
from mir_callback.metric.tokens import compute_row_norms, compute_text_scale
from tests import clouds, reference
from tests.metric.solving import evaluate_rows

SAMPLES = 12


def sample_of_rows(count):
    """Unequal shares, some samples with few rows, in order."""
    bounds = np.linspace(0, 1, SAMPLES + 1) ** 1.5 * count
    return torch.from_numpy(np.searchsorted(bounds[1:-1], np.arange(count), side="right"))


def evaluate(vision, text, vision_samples, text_samples, samples):
    """Distance and influences of one layer."""
    norms = compute_row_norms(text)
    scale = compute_text_scale(norms)
    of_vision, of_text = compute_moments(vision, scale), compute_moments(text, scale)
    distance = frechet_from_moments(GaussianPair(of_vision, of_text)).distance
    maps = compute_transport_maps(GaussianPair(of_vision, of_text, need_maps=True))
    means = [rows.mean(dim=0) for rows in (vision, text)]
    gap = means[0] - means[1]
    values = [
        compute_row_influences(vision, means[0], gap, maps[0], len(vision), scale),
        compute_row_influences(text, means[1], -gap, maps[1], len(text), scale),
        scale * norms,
    ]
    of = [vision_samples, text_samples, text_samples]
    sums = [torch.zeros(samples).double().index_add_(0, *pair) for pair in zip(of, values, strict=True)]
    counts = [torch.bincount(each, minlength=samples) for each in of[:2]]
    return distance, compute_influences(SampleSums(*sums, *counts), distance)


def weighted_distance(vision, text, vision_weights, text_weights):
    """Independent of ours: FD of weighted rows through QR factors, text-scaled by their weighted mean norm."""
    factors, means = [], []
    for rows, weights in ((vision, vision_weights), (text, text_weights)):
        mean = np.average(rows, axis=0, weights=weights)
        spread = (rows - mean) * np.sqrt(weights / weights.sum() * len(rows) / (len(rows) - 1))[:, None]
        factors.append(np.linalg.qr(spread, mode="r"))
        means.append(mean)
    root = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + sum((factor**2).sum() for factor in factors) - 2 * root
    return distance / np.average(np.sqrt((text**2).sum(axis=1)), weights=text_weights) ** 2


def test_influences_have_the_precision_of_float64():
    sums = torch.rand(3, SAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(1, SAMPLES + 1)
    found = compute_influences(SampleSums(*sums, rows, rows + 3), distance=2.0)
    expected = compute_influences(SampleSums(*sums, rows.double(), rows.double() + 3), distance=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize(
    "case", ["equal", "offset", "conditioned", "few_rows", "few_vision_rows", "few_text_rows", "massive_constant"]
)
def test_influence_is_the_derivative_by_the_weight_of_a_sample(case):
    vision, text = clouds.CASES[case](clouds.generator(3))
    vision_samples, text_samples = sample_of_rows(len(vision)), sample_of_rows(len(text))
    distance, found = evaluate(vision, text, vision_samples, text_samples, SAMPLES)
    rows = reference.to_numpy(vision), reference.to_numpy(text)
    step, slopes = 1e-5, []
    for sample in range(SAMPLES):
        moved = []
        for sign in (1, -1):
            weights = [1 + sign * step * (of == sample).numpy() for of in (vision_samples, text_samples)]
            moved.append(weighted_distance(*rows, *weights))
        slopes.append((moved[0] - moved[1]) / (2 * step))
    assert distance == pytest.approx(weighted_distance(*rows, *(np.ones(len(part)) for part in rows)), rel=1e-9)
    expected = SAMPLES * np.array(slopes)
    assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", clouds.CASES)
def test_influences_are_finite_and_add_up_to_zero(case):
    vision, text = clouds.CASES[case](clouds.generator(4))
    _, found = evaluate(vision, text, sample_of_rows(len(vision)), sample_of_rows(len(text)), SAMPLES)
    assert torch.isfinite(found).all()
    assert found.sum().item() == pytest.approx(0.0, abs=1e-9 * found.abs().sum().item())


def test_maps_of_either_side_agree_when_modalities_change_places():
    vision, text = clouds.CASES["offset"](clouds.generator(5))
    of_vision, of_text = compute_moments(vision), compute_moments(text)
    there, back = (compute_transport_maps(GaussianPair(*pair)) for pair in ((of_vision, of_text), (of_text, of_vision)))
    for one, other in zip(there, reversed(back), strict=True):
        found, expected = ((root.T @ root).numpy() for root in (one.factor, other.factor))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("case", ["equal", "offset", "conditioned", "massive", "massive_constant", "with_outliers"])
def test_maps_by_polar_factor_give_every_row_the_same(case):
    vision, text = clouds.CASES[case](clouds.generator(6))
    of_vision, of_text = compute_moments(vision), compute_moments(text)
    found = compute_maps_by_polar_factor(GaussianPair(of_vision, of_text))
    assert found is not None
    expected = compute_transport_maps(GaussianPair(of_vision, of_text))
    for rows, moments, one, other in zip((vision, text), (of_vision, of_text), found, expected, strict=True):
        values = [((rows - moments.mean) @ form.factor.double().T).square().sum(dim=1) for form in (one, other)]
        assert values[0].numpy() == pytest.approx(values[1].numpy(), rel=1e-3)


def test_maps_by_polar_factor_are_declined_when_a_cloud_has_no_cholesky_factor():
    for case in ("few_rows", "few_vision_rows", "few_text_rows", "rank_deficient"):
        vision, text = (compute_moments(rows) for rows in clouds.CASES[case](clouds.generator(6)))
        assert compute_maps_by_polar_factor(GaussianPair(vision, text)) is None


def draw(rng, samples, dim, vision_scale, turned):
    """A probe of samples with effects of their own, power-law spectra and log-normal lengths."""
    spread = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.6
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=clouds.generator(1), dtype=torch.float64))[0]

    def tokens(count):
        own = 0.5 * torch.randn(samples, 1, dim, generator=rng, dtype=torch.float64)
        each = torch.randn(samples, count, dim, generator=rng, dtype=torch.float64)
        length = torch.exp(0.2 * torch.randn(samples, count, 1, generator=rng, dtype=torch.float64))
        return ((own + each) * length * spread).flatten(0, 1)

    vision = tokens(12) @ basis if turned else tokens(12)
    return vision_scale * (vision + 0.1), tokens(18)


@pytest.mark.parametrize(
    ("vision_scale", "turned", "samples"),
    [(15.0, True, 100), (1.0, True, 100), (2.0, False, 100), (2.0, True, 40)],
    ids=["vision far longer", "equal lengths", "aligned bases", "forty samples"],
)
def test_standard_error_is_the_deviation_over_repeated_probes(vision_scale, turned, samples):
    dim, values, errors = 48, [], []
    of = [torch.arange(samples).repeat_interleave(count) for count in (12, 18)]
    for repeat in range(150):
        clouds_drawn = draw(clouds.generator(1000 + repeat), samples, dim, vision_scale, turned)
        distance, found = evaluate(*clouds_drawn, *of, samples)
        values.append(np.log10(distance))
        errors.append(compute_standard_error(compute_mir_influences(found[None], [distance])).item())
    assert 0.9 <= np.mean(errors) / np.std(values, ddof=1) <= 1.35


@pytest.mark.parametrize("factor", [1e20, 1e-23])
def test_error_does_not_depend_on_the_size_of_hidden_states(factor):
    vision, text = (rows.float().reshape(40, -1, 48) for rows in draw(clouds.generator(7), 40, 48, 2.0, True))
    (expected, usual), (mir, found) = (evaluate_rows(vision * by, text * by) for by in (1.0, factor))
    assert mir == pytest.approx(expected, abs=1e-6)
    for name in ("mir_se", "per_layer_se", "outlier_se_ratio"):
        assert found[name] == pytest.approx(usual[name], rel=1e-3)


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-5])
def test_error_is_that_of_the_jackknife_when_clouds_are_nearly_equal(difference):
    samples, rng = 25, clouds.generator(8)
    # Few different rows, with norms that are equal in one modality and nearly so in the other: none is ever replaced.
    patterns = torch.randn(64, 32, generator=rng).double().sign()
    chosen = torch.randint(64, (samples, 12), generator=rng)  # each sample has some of the patterns
    chosen = chosen.gather(1, torch.randint(12, (samples, 40), generator=rng))
    moved = patterns @ (torch.eye(32) + difference * torch.randn(32, 32, generator=rng)).double()
    text, vision = patterns[chosen], moved[chosen]
    whole, found = evaluate_rows(vision, text)
    left_out = [
        reference.rate([torch.cat([*vision[:one], *vision[one + 1 :]])], [torch.cat([*text[:one], *text[one + 1 :]])])
        for one in range(samples)
    ]
    jackknife = np.std([mir for mir, _ in left_out]) * (samples - 1) ** 0.5
    assert whole < 2 * np.log10(difference) + 1.5
    assert found["mir_se"] == pytest.approx(jackknife, rel=0.1)


def test_errors_that_are_not_finite_are_none():
    draws = torch.zeros(2, DRAWS, dtype=torch.float64)
    layers = [
        LayerResult(1.0, {}, torch.tensor(values, dtype=torch.float64), draws, 0, 0, "float32")
        for values in ([1.0, -1.0], [math.nan, 0.0])
    ]
    assert set(find_errors(layers).values()) == {None}
    assert find_errors(layers[:1])["mir_se"] > 0.0
