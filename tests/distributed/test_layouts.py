# SPDX-License-Identifier: Apache-2.0
"""Samples with and without images on ranks that gather weights together: the same forwards on all."""

import pytest

from mir_callback import Probe, evaluate_mir
from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.distributed.layouts_worker import unlike_calls, values_while_routed
from tests.layouts import mixed


@pytest.mark.slow
def test_texts_alone_are_measured_under_zero_3_as_in_one_process(tmp_path):
    first, second = run_ranks("tests.distributed.layouts_worker", tmp_path, "trained")
    assert [record["step"] for record in first] == [0, 1, 2]
    assert [record["mir"] for record in first] == [record["mir"] for record in second]
    model, processor = tiny_models.llava()
    alone = evaluate_mir(model, Probe.from_samples(mixed(8)), processor=processor, text_only="count")
    assert first[0]["mir"] == pytest.approx(alone.mir, abs=1e-6)
    assert first[0]["num_samples"] == 8


def test_ranks_forward_the_same_where_sharded_modules_are_called_for_each_image_or_by_what_is_in_a_sample(tmp_path):
    first, second = run_ranks("tests.distributed.layouts_worker", tmp_path, "evaluated")
    assert first == second
    model, processor, probe = unlike_calls()
    alone = evaluate_mir(model, probe, processor=processor).mir
    assert first["one by one"] == pytest.approx([alone, alone], abs=1e-6)
    before, routed, again = values_while_routed()
    assert first["routed"] == pytest.approx([before, routed, again], abs=1e-6)
    assert abs(before - routed) > 1e-4
    assert (tmp_path / "output.txt").read_text().count("each forwards the whole probe") == 3
