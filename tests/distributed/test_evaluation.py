# SPDX-License-Identifier: Apache-2.0
"""The value does not depend on the number of ranks; what fails on one rank fails on all, and nobody waits for ever."""

import pytest

from tests.distributed.evaluate_worker import GOOD, good_value
from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return run_ranks("tests.distributed.evaluate_worker", folder, processes=request.param, timeout=180)


def test_value_is_that_of_one_process(ranks):
    for name, options in GOOD.items():
        alone = good_value(**options)
        # In bfloat16 the hidden states themselves change with the length a batch is padded to.
        tolerance = 1e-4 if alone["dtype"] == "bfloat16" else 1e-6
        for rank in ranks:
            report = rank["good"][name]
            assert report["mir"] == pytest.approx(alone["mir"], abs=tolerance), name
            assert report["per_layer"] == pytest.approx(alone["per_layer"], rel=10 * tolerance), name
            assert report["world_size"] == len(ranks)
            for field in ("mir_se", "influences"):  # from float32 products; None for one sample and for paper_fast
                expected = alone[field]
                near = expected if expected is None else pytest.approx(expected, rel=1e-3, abs=10 * tolerance)
                assert report[field] == near, (name, field)
            for field in ("scale_free_mir", "vision_gain", "vision_gain_se", "vision_gain_influences"):
                expected = alone[field]
                near = expected if expected is None else pytest.approx(expected, abs=10 * tolerance)
                assert report[field] == near, (name, field)
            for name_of, values in alone["companions"].items():
                assert report["companions"][name_of] == pytest.approx(values, rel=100 * tolerance), (name, name_of)
            for field in ("num_vision_tokens", "num_text_tokens", "tokens_fingerprint", "dtype"):
                assert report[field] == alone[field], (name, field)


def test_every_rank_reports_the_same_value(ranks):
    for rank in ranks[1:]:
        assert rank["good"] == ranks[0]["good"]


EXPECTED = {
    "different_probe": ("ConfigError: probe_fingerprint differs between ranks", None),
    "different_batch_size": ("ConfigError: batch_size differs between ranks", None),
    "unmatched_on_rank_1": ("ConfigError: rank 1 failed: ConfigError: vision_gain", "ConfigError: vision_gain"),
    "processor_fails_on_rank_1": (
        "ConfigError: rank 1 failed: ConfigError: LlavaProcessor",
        "ConfigError: LlavaProcessor",
    ),
    "memory_runs_out_on_rank_1": ("RemoteError: rank 1 failed: RuntimeError: out of memory", "RuntimeError: out of"),
    "forward_fails_on_rank_1": ("ForwardError: rank 1 failed: ForwardError: ", "ForwardError: MIR"),
    "fails_with_an_error_of_its_own_on_rank_1": (
        "ConfigError: rank 1 failed: LocalError: nobody knows this class",
        "LocalError: nobody",
    ),
    "nan_on_rank_1": ("NumericsError: layer 3: hidden states", None),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_failure_on_one_rank_ends_the_evaluation_on_all(ranks, case):
    elsewhere, on_rank_1 = EXPECTED[case]
    for number, rank in enumerate(ranks):
        expected = on_rank_1 if number == 1 and on_rank_1 else elsewhere
        assert rank["bad"][case].startswith(expected), rank["bad"][case]
