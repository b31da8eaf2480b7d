# SPDX-License-Identifier: Apache-2.0
"""The cost model of the benchmarks: it finds known rates again, and its terms behave as their reasons say."""

import dataclasses

import pytest
from cost_model import Rates, Shape, beyond_the_forward, fitted, forward_flops, terms
from hypothesis import given, settings
from hypothesis import strategies as st

PROBE = (100, 576, 900)
SMALL = Shape(4096, 32, 6.5e9, *PROBE)
RATES = Rates(0.1, 1e-15, 1e-12, 1e-14, 1e-12, 1e-14, 1e-12, 1e-11, 1e-5)

shapes = st.builds(
    Shape.llama,
    st.sampled_from([256, 512, 1024, 4096]),
    st.integers(1, 80),
    st.integers(1, 200),
    st.just(576),
    st.integers(1, 2000),
)


@given(st.lists(shapes, min_size=8, max_size=20, unique_by=lambda s: (s.hidden, s.layers, s.samples)), st.data())
@settings(max_examples=30, deadline=None)
def test_fit_says_what_was_measured_when_the_rates_are_those_of_the_model(shapes, data):
    rate = st.floats(1e-3, 1e3)
    known = Rates(
        fixed=data.draw(rate),
        number=1e-9 * data.draw(rate),
        product=1e-12 * data.draw(rate),
        cube=1e-11 * data.draw(rate),
    )
    seconds = [beyond_the_forward(shape, known) for shape in shapes]
    found = fitted(shapes, seconds)
    assert [beyond_the_forward(shape, found) for shape in shapes] == pytest.approx(seconds, rel=1e-6)


def test_one_process_pays_the_forward_and_what_is_beyond_it_and_sends_nothing():
    rates = dataclasses.replace(RATES, error_product=0.0, error_cube=0.0)
    found = terms(SMALL, rates, 1)
    assert found["messages"] == found["weights"] == 0.0
    assert sum(found.values()) == pytest.approx(
        rates.flop * forward_flops(SMALL, 100) + beyond_the_forward(SMALL, rates)
    )


@given(shapes, st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_no_term_but_messages_grows_when_ranks_are_added(shape, ranks):
    before, after = terms(shape, RATES, ranks), terms(shape, RATES, 2 * ranks)
    assert all(value >= 0.0 for value in before.values())
    for name in set(after) - {"messages", "weights"}:
        assert after[name] <= before[name]
    assert after["messages"] >= before["messages"]
    if ranks > 1:
        assert after["weights"] <= before["weights"]


def test_ranks_beyond_samples_and_layers_gain_nothing_but_latency():
    before, after = terms(SMALL, RATES, 128), terms(SMALL, RATES, 1024)
    assert {name for name in before if before[name] != after[name]} == {"messages"}


def test_standard_errors_cost_their_own_terms_and_messages_only():
    with_errors, without = terms(SMALL, RATES, 8), terms(SMALL, RATES, 8, errors=False)
    assert {name for name in without if without[name] != with_errors[name]} == {"standard errors", "messages"}
    assert without["standard errors"] == 0.0
