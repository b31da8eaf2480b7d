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
        (
            "delayed",
            "UnsupportedModelError: the vision tower of LlavaLlamaForCausalLM must be loaded, got .*tiny-clip-vit",
        ),
        ("no tower", "UnsupportedModelError: LlavaLlamaForCausalLM must be a LLaVA model with a vision tower and"),
        ("mpt", "UnsupportedModelError: the forward of LlavaMptForCausalLM must take position_ids"),
        ("truncated", "ProbeError: every probe sample must have vision tokens after the model has placed its images"),
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
        ("<image>", "probe text of pair 1 must be plain text, got '<image>' in it"),
        ("<im_patch>", "probe text of pair 1 must be plain text, got '<im_patch>' in it"),
        ("<im_start>", "probe text of pair 1 must be plain text, got '<im_start>' in it"),
        ("</s>", "probe text of pair 1 must be plain text, got the control token '</s>' in it"),
        ("<s>", "probe text of pair 1 must be plain text, got the control token '<s>' in it"),
        ("one pixel high", "probe image of pair 1 must pass LLaVA's process_images with image_aspect_ratio='square'"),
        ("no pinpoints", "probe image of pair 1 must pass LLaVA's process_images with image_aspect_ratio='anyres'"),
        ("folder", "images must be an existing folder, got .*elsewhere"),
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
