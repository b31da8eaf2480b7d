# SPDX-License-Identifier: Apache-2.0
"""The scale-free distance: that of the vision rows scaled to the mean norm of the text rows."""

import numpy as np
import pytest
import torch

from mir_callback.metric import matrix_sqrt
from mir_callback.metric.frechet import compute_companions, frechet_from_moments
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_moments
from mir_callback.metric.rate import replace_outliers
from mir_callback.metric.tokens import compute_row_norms
from tests import reference
from tests.clouds import CASES, generator


def scale_free(vision, text, root="exact"):
    """As in an evaluation, of rows."""
    lengths = [compute_row_norms(rows).mean().item() for rows in (vision, text)]
    moments = [compute_moments(replace_outliers(rows), 1.0 / lengths[1]) for rows in (vision, text)]
    pair = GaussianPair(*moments)
    return compute_companions(pair, root, frechet_from_moments(pair, root).distance, *lengths)["scale_free"]


def expected(vision, text, distance=reference.frechet):
    """Each modality by its own mean norm, from the definition."""
    rows = [reference.to_numpy(each) for each in (vision, text)]
    scaled = [each / np.sqrt((each**2).sum(axis=1)).mean() for each in rows]
    equal = [reference.EQUAL[each.dtype] for each in (vision, text)]
    return max(0.0, distance(*map(reference.without_outliers, scaled, equal)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_distance_equals_the_reference_and_no_factor_of_vision_rows_changes_it(case, dtype):
    vision, text = (rows.to(dtype) for rows in CASES[case](generator(3)))
    value = expected(vision, text)
    for factor in (1.0, 2.0**-12, 2.0**10):  # powers of two, exact in any dtype
        assert scale_free(factor * vision, text) == pytest.approx(value, rel=3e-6)
    fast = expected(vision, text, reference.frechet_paper_fast)
    for factor in (1.0, 2.0**10):
        assert scale_free(factor * vision, text, "paper_fast") == pytest.approx(fast, rel=3e-6)


@pytest.mark.parametrize("noise", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_nearly_the_same_cloud_at_another_length_keeps_its_digits(noise, factor):
    # As the distance of A x from x, with a symmetric A near one, it is the squared length of the moves.
    rng = generator(8)
    text = torch.randn(400, 24, generator=rng, dtype=torch.float64) * torch.logspace(0, -2, 24, dtype=torch.float64)
    text += 1.0
    move = torch.randn(24, 24, generator=rng, dtype=torch.float64)
    moved = text @ (noise * (move + move.T))
    gap = moved.mean(dim=0)
    value = float(gap.square().sum() + (moved - gap).square().sum() / 399)
    pair = GaussianPair(compute_moments(factor * (text + moved)), compute_moments(text))
    found = frechet_from_moments(pair, vision_scale=1.0 / factor)
    assert abs(found.raw - value) <= found.rounding
    assert found.distance == pytest.approx(value, rel=1e-6)


def test_no_method_is_repeated_for_a_second_scale(monkeypatch):
    calls = []
    for name in ("eigvalsh", "gram"):
        own = getattr(matrix_sqrt, name)
        monkeypatch.setattr(matrix_sqrt, name, lambda matrix, name=name, own=own: calls.append(name) or own(matrix))
    vision, text = CASES["offset"](generator(0))
    scale_free(vision, text)
    assert calls == ["gram", "eigvalsh"]


def test_vision_rows_of_zeros_stay_zeros():
    text = CASES["equal"](generator(0))[1]
    cleaned = reference.without_outliers(reference.to_numpy(text / compute_row_norms(text).mean()))
    zeros = reference.frechet(np.zeros((9, text.shape[1])), cleaned)
    assert scale_free(torch.zeros_like(text[:9]), text) == pytest.approx(zeros, rel=1e-9)
