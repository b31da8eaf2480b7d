# SPDX-License-Identifier: Apache-2.0
"""Which ranks share samples, from what each of them says of its groups."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.errors import UnsupportedModelError
from mir_callback.model.parallelism import RankGroups, assign_share, find_share
from tests import tiny_models

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def mesh_groups(sizes, dims):
    """For every rank of a mesh, its rows along some dimensions."""
    places = list(itertools.product(*map(range, sizes)))

    def row(place, dim):
        return tuple(rank for rank, other in enumerate(places) if (*other[:dim], *other[dim + 1 :]) == place)

    def rest(place, dim):
        return (*place[:dim], *place[dim + 1 :])

    return [frozenset((f"dim {dim}", row(rest(place, dim), dim)) for dim in dims) for place in places]


@settings(deadline=None)
@given(SIZES, st.data())
def test_each_part_of_the_samples_has_one_leader_and_all_ranks_along_the_sharded_dimensions(sizes, data):
    sharded = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    apart = [dim for dim in range(len(sizes)) if dim not in sharded]
    known = data.draw(st.booleans())
    everyone = [
        RankGroups(model, wrapper if known else frozenset())
        for model, wrapper in zip(mesh_groups(sizes, sharded), mesh_groups(sizes, apart), strict=True)
    ]
    shares = [assign_share(everyone, rank) for rank in range(len(everyone))]
    parts = {}
    for place, share in zip(itertools.product(*map(range, sizes)), shares, strict=True):
        parts.setdefault(tuple(place[dim] for dim in apart), set()).add(share.part)
    assert sorted(parts.values()) == [{part} for part in range(len(parts))]
    assert {share.parts for share in shares} == {len(parts)}
    assert sorted(share.part for share in shares if share.leads) == list(range(len(parts)))


def test_groups_that_contradict_one_another_are_refused_on_every_rank():
    everyone = [RankGroups(frozenset({("tp", ranks)}), frozenset()) for ranks in ((0, 1), (0, 1), (1, 2))]
    for rank in range(3):
        with pytest.raises(UnsupportedModelError, match=r"rank 2 .* ranks \[1, 2\] \(tp\), but rank 1"):
            assign_share(everyone, rank)


def test_ranks_that_nothing_connects_are_refused_where_a_wrapper_names_the_others():
    halves = [RankGroups(frozenset(), frozenset({("FSDP", ranks)})) for ranks in ((0, 1), (0, 1), (2, 3), (2, 3))]
    with pytest.raises(UnsupportedModelError, match=r"\[0, 1\] and \[2, 3\].*\(FSDP\)"):
        assign_share(halves, 0)


def test_a_model_on_one_process_is_measured_whole():
    share = find_share(tiny_models.llava()[0])
    assert (share.part, share.parts, share.leads) == (0, 1, True)


def test_a_stage_of_a_pipeline_is_refused():
    model, _ = tiny_models.llava()
    model._pp_stage = type("Stage", (), {"pp_rank": 1, "pp_size": 2})()
    with pytest.raises(UnsupportedModelError, match="stage 2 of 2"):
        find_share(model)
