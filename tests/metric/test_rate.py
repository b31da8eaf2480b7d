# SPDX-License-Identifier: Apache-2.0
"""The rate against an independent float64 reference, and properties that must always hold."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback import frechet_distance, modality_integration_rate
from mir_callback.errors import ConfigError, NumericsError
from mir_callback.metric import frechet, rate
from tests import reference
from tests.clouds import CASES, DIM, equal, generator, offset
from tests.logs import logged

TOLERANCE = 1e-6


def layers_of(case, seed, dtype, count=2):
    rng = generator(seed)
    drawn = [CASES[case](rng) for _ in range(count)]
    return [vision.to(dtype) for vision, _ in drawn], [text.to(dtype) for _, text in drawn]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rate_equals_float64_reference(case, dtype):
    vision, text = layers_of(case, seed=3, dtype=dtype)
    result = modality_integration_rate(vision, text)
    expected, distances = reference.rate(vision, text)
    assert result.mir == pytest.approx(expected, abs=TOLERANCE)
    assert result.per_layer == pytest.approx(distances, rel=3e-6)
    assert result.root == "exact"


@pytest.mark.parametrize("case", ["equal", "offset", "massive_constant", "with_outliers"])
def test_rate_equals_scipy_sqrtm_when_clouds_are_well_conditioned(case):
    vision, text = layers_of(case, seed=5, dtype=torch.float64)
    expected, _ = reference.rate(vision, text, reference.frechet_by_sqrtm)
    assert modality_integration_rate(vision, text).mir == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_paper_fast_equals_its_analytic_value(case):
    vision, text = layers_of(case, seed=7, dtype=torch.float32)
    result = modality_integration_rate(vision, text, root="paper_fast")
    expected, distances = reference.rate(vision, text, reference.frechet_paper_fast)
    assert result.mir == pytest.approx(expected, abs=TOLERANCE)
    assert result.per_layer == pytest.approx(distances, rel=1e-6)
    assert result.root == "paper_fast"


def test_paper_fast_differs_from_exact_when_clouds_are_aligned():
    # Equal-norm clouds of d = 256, as described in docs/metric.md: the last term all but vanishes in fast mode.
    rng = generator(0)
    clouds = [torch.randn(5000, 256, generator=rng, dtype=torch.float64) for _ in range(2)]
    exact, fast = (modality_integration_rate([clouds[0]], [clouds[1]], root=root) for root in ("exact", "paper_fast"))
    assert fast.mir - exact.mir > 1.0


def test_clipping_more_than_rounding_is_reported_when_paper_fast_goes_negative():
    # Spread along one shared direction, vision far longer: tr(S_v S_t) exceeds both traces together.
    rng = generator(1)
    direction = torch.zeros(8, dtype=torch.float64)
    direction[0] = 1.0
    text = torch.randn(300, 1, generator=rng, dtype=torch.float64) * direction
    vision = 5 * torch.randn(300, 1, generator=rng, dtype=torch.float64) * direction
    with logged("layer 1: root='paper_fast' gave a negative distance"):
        assert modality_integration_rate([vision], [text], root="paper_fast").per_layer == [0.0]


def test_rate_is_minus_infinity_when_clouds_are_identical():
    vision, _ = layers_of("equal", seed=1, dtype=torch.float32)
    result = modality_integration_rate(vision, vision)
    assert result.per_layer == [0.0, 0.0]
    assert result.mir == -math.inf


@pytest.mark.parametrize("case", CASES)
def test_identical_clouds_have_no_distance_at_any_conditioning(case):
    vision, _ = CASES[case](generator(2))
    assert frechet_distance(vision, vision.clone()) == 0.0


def test_all_equal_rows_are_a_mean_gap_only():
    vision, text = torch.full((5, 4), 2.0), torch.full((6, 4), 1.0)
    assert frechet_distance(vision, text) == 4.0
    assert modality_integration_rate([vision], [text]).per_layer == [pytest.approx(1.0)]


def test_distance_equals_closed_form_for_diagonal_gaussians():
    # Orthonormal +-sigma rows have exactly diagonal covariances: FD = sum (m_v - m_t)^2 + (s_v - s_t)^2.
    dim, count = 6, 12
    signs = torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    unit = signs * math.sqrt((count - 1) / 2)
    sv, st_ = torch.linspace(0.5, 3, dim).double(), torch.linspace(2, 1, dim).double()
    gap = torch.arange(dim).double()
    expected = float((gap**2).sum() + ((sv - st_) ** 2).sum())
    assert frechet_distance(unit * sv + gap, unit * st_) == pytest.approx(expected, rel=1e-12)


clouds = st.builds(
    lambda seed, rows, dim, scale: scale * torch.randn(rows, dim, generator=generator(seed), dtype=torch.float64),
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.just(12),
    st.floats(1e-3, 1e3),
)


@given(clouds, clouds)
@settings(max_examples=60, deadline=None)
def test_distance_is_symmetric_non_negative_and_matches_the_reference(vision, text):
    distance = frechet_distance(vision, text)
    assert distance >= 0.0
    assert distance == pytest.approx(frechet_distance(text, vision), rel=1e-7)
    size = float(vision.square().mean() + text.square().mean())
    assert distance == pytest.approx(reference.frechet(vision.numpy(), text.numpy()), rel=1e-6, abs=1e-10 * size)


@given(clouds, clouds, st.floats(1e-4, 1e4))
@settings(max_examples=30, deadline=None)
def test_rate_does_not_change_when_all_rows_are_scaled_together(vision, text, factor):
    plain = modality_integration_rate([vision], [text])
    scaled = modality_integration_rate([vision * factor], [text * factor])
    assert scaled.mir == pytest.approx(plain.mir, abs=1e-6)


@given(clouds, clouds, st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_rate_does_not_change_when_rows_are_shuffled_or_rotated(vision, text, seed):
    rng = generator(seed)
    shuffled = vision[torch.randperm(len(vision), generator=rng)]
    assert modality_integration_rate([shuffled], [text]).mir == pytest.approx(
        modality_integration_rate([vision], [text]).mir, abs=1e-7
    )
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=torch.float64))[0]
    assert frechet_distance(vision @ rotation, text @ rotation) == pytest.approx(
        frechet_distance(vision, text), rel=1e-6
    )


@pytest.mark.parametrize("case", ["with_outliers", "few_vision_rows", "rank_deficient"])
def test_rows_of_two_dtypes_that_want_gradients_are_measured_and_left_as_they_are(case):
    vision, text = CASES[case](generator(4))
    vision, text = vision.bfloat16().requires_grad_(), text.float().requires_grad_()
    before = vision.detach().clone(), text.detach().clone()
    expected, _ = reference.rate([vision], [text])
    assert modality_integration_rate([vision], [text]).mir == pytest.approx(expected, abs=TOLERANCE)
    assert torch.equal(vision, before[0])
    assert torch.equal(text, before[1])


@pytest.mark.parametrize("module", [rate, frechet])
def test_examples_of_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def good():
    vision, text = equal(generator(0))
    return vision, text


def test_error_names_layer_modality_and_count_when_rows_are_not_finite():
    vision, text = good()
    broken = text.clone()
    broken[3, 5] = math.inf
    broken[9, 0] = math.nan
    with pytest.raises(NumericsError, match="layer 2, text .* 2 of 500 rows"):
        modality_integration_rate([vision, vision], [text, broken])


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        (torch.ones(1, 3), torch.ones(4, 3), "vision has 1 rows"),
        (torch.ones(4, 3), torch.ones(0, 3), "text has 0 rows"),
        (torch.ones(4, 3), torch.ones(4, 2), "vision rows have width 3 and text rows 2"),
        (torch.ones(4), torch.ones(4, 2), r"vision is a torch.float32 tensor \(4,\)"),
        (torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64), "text is a torch.int64 tensor"),
        ([[1.0]], torch.ones(4, 2), "vision is a list"),
    ],
)
def test_error_names_the_field_when_rows_are_malformed(vision, text, message):
    with pytest.raises(NumericsError, match=message):
        frechet_distance(vision, text)
    with pytest.raises(NumericsError, match=f"layer 1, {message}|{message}"):
        modality_integration_rate([vision], [text])


def test_error_when_mean_text_norm_is_zero():
    with pytest.raises(NumericsError, match="mean norm of the text tokens is 0.0"):
        modality_integration_rate([torch.ones(4, 2)], [torch.zeros(4, 2)])


def test_error_when_root_is_unknown():
    vision, text = good()
    with pytest.raises(ConfigError, match="root .*exact, paper_fast.*'fast'"):
        modality_integration_rate([vision], [text], root="fast")


def test_error_when_rows_are_not_given_layer_by_layer():
    vision, text = good()
    with pytest.raises(NumericsError, match="vision is a Tensor.*list"):
        modality_integration_rate(vision, text)


def test_error_when_layer_counts_differ_or_are_zero():
    vision, text = offset(generator(0))
    with pytest.raises(NumericsError, match="vision has 2 decoder layers and text has 1"):
        modality_integration_rate([vision, vision], [text])
    with pytest.raises(NumericsError, match="vision has 0 decoder layers"):
        modality_integration_rate([], [])


def test_dimension_of_cases_is_what_their_names_claim():
    vision, text = CASES["few_rows"](generator(0))
    assert max(len(vision), len(text)) < DIM
    covariance = torch.cov(CASES["conditioned"](generator(0))[0].T)
    values = torch.linalg.eigvalsh(covariance)
    assert 1e7 < float(values[-1] / values[0]) < 1e10
