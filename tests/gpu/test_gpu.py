# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: its own ways to moments and distances, and training left alone on it. `make test-gpu`."""

import pytest
import torch

from mir_callback import Probe, evaluate_mir, modality_integration_rate
from mir_callback.metric import fixed_point, frechet
from mir_callback.metric.moments import moments_of
from tests import reference, tiny_models
from tests.clouds import CASES, generator
from tests.distributed.launch import run_ranks
from tests.distributed.train_worker import EVERY, STEPS
from tests.samples import pairs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ON_GPU = {"DS_ACCELERATOR": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rate_equals_float64_reference(case, dtype):
    vision, text = (rows.to(dtype) for rows in CASES[case](generator(0)))
    expected, _ = reference.rate([vision], [text])
    found = modality_integration_rate([vision.cuda()], [text.cuda()])
    assert found.mir == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spread", [2, 4, 6], ids="rows of condition 1e{}".format)
@pytest.mark.parametrize("alike", [False, True], ids=["other bases", "same basis"])
def test_wide_half_precision_rows_with_steep_spectra(spread, alike):
    rng = torch.Generator("cuda").manual_seed(3)
    dim = 512
    spectrum = torch.logspace(0, -spread, dim, device="cuda")
    bases = [torch.linalg.qr(torch.randn(dim, dim, generator=rng, device="cuda"))[0] for _ in range(2)]
    vision = (torch.randn(6000, dim, generator=rng, device="cuda") * spectrum @ bases[0]).bfloat16()
    text = (torch.randn(9000, dim, generator=rng, device="cuda") * spectrum * 1.1 @ bases[0 if alike else 1]).bfloat16()
    assert fixed_point.is_possible(vision)
    expected = modality_integration_rate([vision.double()], [text.double()])
    assert modality_integration_rate([vision], [text]).mir == pytest.approx(expected.mir, abs=1e-6)


def test_outliers_are_replaced_where_only_deterministic_algorithms_are_allowed():
    vision, text = (rows.cuda() for rows in CASES["with_outliers"](generator(0)))
    expected = modality_integration_rate([vision], [text]).mir
    torch.use_deterministic_algorithms(True)
    try:
        assert modality_integration_rate([vision], [text]).mir == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_polar_factor_is_the_way_taken(monkeypatch):
    vision, text = (moments_of(rows.cuda()) for rows in CASES["conditioned"](generator(0)))
    polar = frechet.frechet_from_moments(vision, text)
    monkeypatch.setattr(frechet, "_root_by_polar_factor", lambda left, right: None)
    other = frechet.frechet_from_moments(vision, text)
    assert polar.distance == pytest.approx(other.distance, rel=1e-9)
    assert polar.distance != other.distance


def test_value_of_a_model_on_the_gpu_equals_that_on_the_cpu():
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(7))
    on_cpu = evaluate_mir(model, probe, processor=processor)
    before = torch.cuda.get_rng_state()
    on_gpu = evaluate_mir(model.cuda(), probe, processor=processor)
    assert on_gpu.mir == pytest.approx(on_cpu.mir, abs=1e-5)
    assert torch.equal(before, torch.cuda.get_rng_state())
    half = evaluate_mir(model.bfloat16(), probe, processor=processor)
    assert half.dtype == "bfloat16"
    assert half.mir == pytest.approx(on_cpu.mir, abs=2e-2)


@pytest.mark.parametrize("setup", ["ddp", "2", "3"])
def test_training_is_the_same_to_the_last_bit(tmp_path, setup):
    plain, watched = (
        run_ranks(
            "tests.distributed.train_worker",
            tmp_path / watch,
            *(setup, watch, "cuda"),
            processes=torch.cuda.device_count(),
            environment=ON_GPU,
        )
        for watch in ("off", "on")
    )
    assert [entry[0] for entry in plain[0]["log"]] == list(range(1, STEPS + 1))
    for one, other in zip(plain, watched, strict=True):
        for field in ("log", "weights", "rng"):
            assert one[field] == other[field], field
        assert [record["step"] for record in other["history"]] == list(range(0, STEPS + 1, EVERY))
        assert set(other["gathered"].values()) == {0}
