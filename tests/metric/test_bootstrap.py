# SPDX-License-Identifier: Apache-2.0
"""The standard error knows that another probe would have other outliers."""

import numpy as np
import pytest
import torch

from mir_callback.metric.bootstrap import DRAWS, ResampledRule, compare_spreads, draw_weights, project
from mir_callback.metric.tokens import OutlierRule
from tests import clouds, reference
from tests.metric.draws import DIM, IMAGE, SAMPLES, WORDS, draw, longer, pareto
from tests.metric.solving import evaluate_rows


def rate(vision, text):
    return reference.rate([vision.flatten(0, 1)], [text.flatten(0, 1)])[0]


@pytest.mark.parametrize(
    ("lengths", "where"),
    [
        (longer(0.0, 1.0), "images"),
        (longer(0.05, 3.0), "images"),
        (longer(0.05, 4.0), "images"),
        (longer(0.1, 3.0), "images"),
        (longer(0.1, 4.0), "images"),
        (longer(0.2, 3.0), "images"),
        (pareto(3.0), "images"),
        (longer(0.08, 3.0), "both"),
        (longer(0.2, 3.0), "both"),
        (pareto(3.0), "both"),
    ],
    ids=[
        "none",
        "5 % x3",
        "5 % x4",
        "10 % x3",
        "10 % x4",
        "20 % x3",
        "Pareto",
        "8 % x3 both",
        "20 % x3 both",
        "Pareto both",
    ],
)
def test_standard_error_is_the_deviation_over_redrawn_probes_when_outliers_change(lengths, where):
    values = [rate(*draw(seed, lengths, where)) for seed in range(200)]
    errors = [evaluate_rows(*draw(1000 + seed, lengths, where))[1]["mir_se"] for seed in range(40)]
    assert 0.8 <= np.mean(errors) / np.std(values, ddof=1) <= 1.35


def second_model(rows):
    """Other vision rows of the same samples."""
    vision, text = rows
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=clouds.generator(2)).double())[0]
    return 0.9 * (0.8 * vision + 0.2 * vision @ turn), text


@pytest.mark.parametrize("where", ["images", "texts", "both"])
def test_error_of_a_difference_on_one_probe_knows_that_outliers_change(where):
    differences, errors = [], []
    for seed in range(200):
        rows = draw(seed, longer(0.1, 4.0), where)
        differences.append(rate(*rows) - rate(*second_model(rows)))
        if seed < 40:
            influences = [evaluate_rows(*each)[1]["influences"] for each in (rows, second_model(rows))]
            errors.append(np.subtract(*influences).std(ddof=1) / SAMPLES**0.5)
    assert 0.75 <= np.mean(errors) / np.std(differences, ddof=1) <= 1.35


def test_projection_gives_back_the_influences_of_what_is_linear_in_the_draws():
    influences = torch.randn(SAMPLES, generator=clouds.generator(5)).double()
    influences -= influences.mean()
    found = project(draw_weights(SAMPLES) @ influences / SAMPLES, SAMPLES)
    assert abs(found.sum().item()) < 1e-9
    assert torch.corrcoef(torch.stack([found, influences]))[0, 1] > 0.9


def test_ratio_says_where_outliers_decide_the_error():
    calm, jumping = (
        [evaluate_rows(*draw(seed, longer(share, 4.0), "images"))[1]["outlier_se_ratio"] for seed in range(10)]
        for share in (0.0, 0.1)
    )
    assert np.median(calm) < 1.3
    assert np.median(jumping) > 1.6


def test_error_is_that_of_the_influences_when_no_row_is_near_the_limit():
    rng = clouds.generator(0)
    vision, text = (torch.randn(SAMPLES, count, DIM, generator=rng).double() for count in (IMAGE, WORDS))
    vision, text = (rows / rows.norm(dim=-1, keepdim=True) * lengths for rows, lengths in ((vision, 3.0), (text, 1.0)))
    _, found = evaluate_rows(vision, text)
    assert found["outlier_se_ratio"] == 1.0
    assert found["mir_se"] == pytest.approx(np.std(found["influences"], ddof=1) / SAMPLES**0.5, rel=1e-4)


def test_limits_are_those_of_the_rows_drawn():
    rng = clouds.generator(3)
    samples = torch.arange(30).repeat_interleave(torch.randint(1, 40, (30,), generator=rng))
    norms = torch.rand(30, generator=rng).double()[samples] + torch.rand(len(samples), generator=rng).double() ** 2
    rule = OutlierRule.from_norms(norms, torch.float64)
    found = ResampledRule.from_norms(norms, samples, 30, rule).limits
    assert found[:, 0].tolist() == [rule.median + rule.limit, rule.limit - rule.median]
    for index in range(0, DRAWS, 97):
        drawn = torch.cat([norms[samples == sample].repeat(int(n)) for sample, n in enumerate(draw_weights(30)[index])])
        expected = OutlierRule.from_norms(drawn, torch.float64)
        step = 0.02 * drawn.std().item()  # between the quantiles
        assert found[0, 1 + index].item() == pytest.approx(expected.median + expected.limit, abs=step)
        assert found[1, 1 + index].item() == pytest.approx(expected.limit - expected.median, abs=step)


def test_effects_are_those_of_the_rows_decided_otherwise():
    rng = clouds.generator(4)
    samples = torch.arange(40).repeat_interleave(200)
    norms = torch.exp(0.5 * torch.randn(8000, generator=rng).double())
    effects = 1.0 + 0.3 * torch.randn(8000, generator=rng).double()
    rule = OutlierRule.from_norms(norms, torch.float64)
    resampled = ResampledRule.from_norms(norms, samples, 40, rule)
    near = resampled.undecided(norms)
    assert 0 < int(near.sum()) < 4000
    halves = [near & (samples % 2 == half) for half in range(2)]  # as two ranks add them up
    table = sum(resampled.tabulate(norms[half], effects[half], samples[half], 40) for half in halves)
    weights = draw_weights(40)[:, samples]
    upper, lower = resampled.limits[0, 1:, None], -resampled.limits[1, 1:, None]
    kept = ((norms <= upper) & (norms >= lower)).double()
    expected = (weights * effects * (kept - (~rule.outliers(norms)).double())).sum(dim=1)
    found = resampled.effects(table)
    # Rows count as evenly spread inside a bin.
    assert found.std().item() == pytest.approx(expected.std().item(), rel=0.1)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.98


def test_spreads_of_draws_that_never_differ_compare_as_one():
    assert compare_spreads(torch.zeros(3, 2, DRAWS)).tolist() == [1.0, 1.0, 1.0]
