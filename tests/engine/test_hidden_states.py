# SPDX-License-Identifier: Apache-2.0
"""Rows that are kept within a limit are complete, the right ones, and never more than allowed."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mir_callback.evaluation.hidden_states import HiddenStateStore

DIM = 3
ROW = DIM * 4  # bytes


@st.composite
def forwards(draw):
    """States of every layer (n, d) and positions of some batches."""
    layers, batches = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = []
    for _ in range(batches):
        length = draw(st.integers(1, 8))
        vision = torch.rand(length, generator=rng) < 0.5
        states = [torch.randn(length, DIM, generator=rng) for _ in range(layers)]
        found.append((states, (vision.nonzero()[:, 0], (~vision).nonzero()[:, 0])))
    return layers, found


def expected_rows(batches, layer):
    return tuple(torch.cat([states[layer][where[i]] for states, where in batches]) for i in (0, 1))


def filled(store, batches):
    for states, where in batches:
        for layer, state in enumerate(states):
            store.append(layer, state, where)
            yield store


@given(forwards(), st.integers(0, 50 * ROW), st.booleans(), st.booleans(), st.booleans())
def test_what_is_kept_is_whole_and_within_the_limit(case, limit, known, on_host, keep_first):
    layers, batches = case
    capacity = tuple(len(rows) for rows in expected_rows(batches, 0))
    need = sum(capacity) * ROW
    store = HiddenStateStore(
        range(layers),
        limit=limit,
        keep_first=keep_first,
        capacity=capacity if known else None,
        on_host=on_host,
    )
    for after in filled(store, batches):
        assert after.held_bytes <= (max(limit, need) if keep_first else limit)
    store.finish()
    joining = 0 if known or on_host else 1
    fitting = layers if (layers + joining) * need <= limit else max(0, limit // need - joining)
    # Parts that are not joined yet may have cost a layer more while their number was not known.
    assert len(store.kept) <= max(fitting, int(keep_first))
    if known:
        assert len(store.kept) == max(fitting, int(keep_first))
    assert (len(store.kept) == 0) <= (not keep_first)
    for layer in store.kept:
        assert all(map(torch.equal, store.take(layer), expected_rows(batches, layer)))


@given(forwards(), st.integers(0, 4))
def test_only_layers_asked_for_are_kept(case, start):
    layers, batches = case
    store = HiddenStateStore(range(min(start, layers), layers))
    for _ in filled(store, batches):
        pass
    store.finish()
    store.drop_from(layers - 1)
    assert list(store.kept) == list(range(min(start, layers), layers - 1))
    for layer in store.kept:
        assert all(map(torch.equal, store.take(layer), expected_rows(batches, layer)))
    assert store.held_bytes == 0


@contextmanager
def room_for(megabytes):
    """The process may not grow by more than this, as on a full machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def wide_state(value):
    """(262144, 80), whose rows take 80 MiB when they are copied."""
    return torch.full((1, 80), float(value)).expand(2**18, 80)


def fill_four_layers(known):
    """What is kept of four layers where there is room for two, and whether its rows are right."""
    half = torch.arange(2**18).chunk(2)
    store = HiddenStateStore(range(4), capacity=(2**17, 2**17) if known else None)
    with room_for(168):
        for layer in range(4):
            store.append(layer, wide_state(layer), half)
        store.finish()
    kept = list(store.kept)
    return kept, all(rows.shape == (2**17, 80) and bool((rows == i).all()) for i in kept for rows in store.take(i))


@pytest.mark.parametrize("known", [True, False])
def test_the_last_layers_are_dropped_when_memory_really_runs_out(known, fresh_process):
    # Where rows have to be joined, room for that is needed too.
    assert fresh_process.submit(fill_four_layers, known).result(120) == ([0, 1] if known else [0], True)


def fill_without_room():
    """What is kept where not even one layer fits, and what is said of it in the end."""
    half = torch.arange(2**18).chunk(2)
    store = HiddenStateStore(range(2), capacity=(2**17, 2**17))
    with room_for(8):
        for _ in range(2):
            for layer in range(2):
                store.append(layer, wide_state(layer), half)
    try:
        store.finish()
    except RuntimeError as error:
        return list(store.kept), str(error)
    return list(store.kept), "nothing"


def test_nothing_is_raised_before_the_end_when_not_even_one_layer_fits(fresh_process):
    kept, said = fresh_process.submit(fill_without_room).result(120)
    assert kept == []
    assert "can't allocate memory" in said


def test_error_when_fewer_rows_come_than_announced():
    store = HiddenStateStore(range(1), capacity=(3, 1))
    store.append(0, torch.zeros(3, DIM), (torch.tensor([0]), torch.tensor([1])))
    store.finish()
    with pytest.raises(RuntimeError, match="1 rows, .* 3"):
        store.take(0)
