# SPDX-License-Identifier: Apache-2.0
"""Models and samples that the real LLaVA package cannot take: the same refusal on every rank, before any forward."""

import re

import pytest

from tests.distributed.launch import run_ranks
from tests.llava.conftest import PYTHON


@pytest.fixture(scope="module")
def refusals(assets, tmp_path_factory):
    """What each of two ranks was told."""
    return run_ranks("tests.llava.refusal_worker", tmp_path_factory.mktemp("refusals"), str(assets), python=PYTHON)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("delayed", "UnsupportedModelError: .*tiny-clip-vit of LlavaLlamaForCausalLM .*load_model"),
        ("no tower", "UnsupportedModelError: LlavaLlamaForCausalLM .*vision_tower"),
        ("mpt", "UnsupportedModelError: .*LlavaMptForCausalLM has no position_ids"),
        ("truncated", "ProbeError: .*no vision tokens"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_on_every_rank(refusals, case, message):
    for rank in refusals:
        assert re.match(message, rank[case])


def test_published_mpt_fails_without_us(refusals):
    assert "missing 1 required positional argument: 'images'" in refusals[0]["mpt by itself"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("<image>", "The text of pair 1 .*'<image>'"),
        ("<im_patch>", "The text of pair 1 .*'<im_patch>'"),
        ("<im_start>", "The text of pair 1 .*'<im_start>'"),
        ("</s>", "The text of pair 1 .*'</s>'"),
        ("<s>", "The text of pair 1 .*'<s>'"),
        ("one pixel high", "LLaVA's process_images failed on the image of pair 1 .*'square'"),
        ("no pinpoints", "LLaVA's process_images failed on the image of pair 1 .*'anyres'"),
        ("folder", r"There is no folder .*elsewhere \(images\)"),
    ],
)
def test_a_bad_sample_of_one_rank_is_an_error_on_every_rank(refusals, case, message):
    assert re.match(f"ProbeError: {message}", refusals[1][case])
    # An anyres model without pinpoints takes no image of any rank: each names its own.
    assert re.match(
        f"ProbeError: (rank 1 failed: ProbeError: )?{message.replace('pair 1', 'pair [01]')}", refusals[0][case]
    )


@pytest.mark.parametrize("case", ["unknown character", "one pixel high, padded"])
def test_what_llava_takes_is_not_refused(refusals, case):
    assert [rank[case] for rank in refusals] == ["no error"] * 2
