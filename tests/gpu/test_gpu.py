# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: its own ways to moments and distances, and training left alone on it. `make test-gpu`."""

import pytest
import torch

from mir_callback import Probe, evaluate_mir, modality_integration_rate
from mir_callback.config import MIRConfig
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.hidden_states import GB, HiddenStateStore, find_budgets
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.metric import matrix_sqrt
from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.influence import compute_transport_maps
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_moments, suits_fixed_point
from tests import reference, tiny_models
from tests.clouds import CASES, generator
from tests.distributed.launch import run_ranks
from tests.distributed.train_worker import EVERY, STEPS
from tests.engine.test_passes import LiveAdapter
from tests.logs import logged
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
    assert suits_fixed_point(vision)
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
    vision, text = (compute_moments(rows.cuda()) for rows in CASES["conditioned"](generator(0)))
    polar = frechet_from_moments(GaussianPair(vision, text))
    monkeypatch.setattr(matrix_sqrt, "find_polar_factor", lambda cross: None)
    other = frechet_from_moments(GaussianPair(vision, text))
    assert polar.distance == pytest.approx(other.distance, rel=1e-9)
    assert polar.distance != other.distance


def test_value_of_a_model_on_the_gpu_equals_that_on_the_cpu():
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(7))
    on_cpu = evaluate_mir(model, probe, processor=processor)
    before = torch.cuda.get_rng_state()
    on_gpu = evaluate_mir(model.cuda(), probe, processor=processor)
    assert on_gpu.mir == pytest.approx(on_cpu.mir, abs=1e-5)
    assert on_gpu.mir_se == pytest.approx(on_cpu.mir_se, rel=1e-3)
    assert on_gpu.influences == pytest.approx(on_cpu.influences, rel=1e-2, abs=1e-5)
    assert torch.equal(before, torch.cuda.get_rng_state())
    half = evaluate_mir(model.bfloat16(), probe, processor=processor)
    assert half.dtype == "bfloat16"
    assert half.mir == pytest.approx(on_cpu.mir, abs=2e-2)


@pytest.mark.parametrize("case", ["equal", "offset", "conditioned", "massive_constant"])
def test_maps_for_standard_errors_need_no_eigenvectors(case):
    vision, text = (compute_moments(rows.cuda()) for rows in CASES[case](generator(0)))
    found = compute_transport_maps(GaussianPair(vision, text))
    expected = compute_transport_maps(GaussianPair(*(compute_moments(rows) for rows in CASES[case](generator(0)))))
    for rows, one, other in zip(CASES[case](generator(0)), found, expected, strict=True):
        centred = rows - rows.mean(dim=0)
        values = [(centred @ form.factor.double().cpu().T).square().sum(dim=1) for form in (one, other)]
        assert values[0].numpy() == pytest.approx(values[1].numpy(), rel=1e-3)


def test_rows_that_wait_in_pinned_memory_give_the_same_value_to_the_last_bit(monkeypatch):
    model, processor = tiny_models.llava(layers=5)
    probe = Probe.from_pairs(pairs(7))
    model.cuda()
    whole = evaluate_mir(model, probe, processor=processor)
    assert (whole.storage_device, whole.passes) == ("device", 1)
    layer = (whole.num_vision_tokens + whole.num_text_tokens) * tiny_models.HIDDEN * 4
    blocks = []
    empty = HiddenStateStore._empty

    def noted(self, count, state):
        blocks.append(empty(self, count, state))
        return blocks[-1]

    monkeypatch.setattr(HiddenStateStore, "_empty", noted)
    parted = evaluate_mir(model, probe, processor=processor, capture_budget_gb=2 * layer / GB)
    assert (parted.storage_device, parted.passes) == ("host", 1)
    assert parted.per_layer == whole.per_layer
    assert all(block.is_pinned() for block in blocks)
    assert len(blocks) == 2 * 5


def test_rows_of_unknown_number_wait_in_pinned_memory_once_they_are_known(monkeypatch):
    model, processor = tiny_models.llava(layers=5)
    adapter = LiveAdapter(model.cuda(), processor)
    probe = Probe.from_pairs(pairs(7))
    whole = evaluate_mir(model, probe, adapter=adapter)
    budget = 3 * (whole.num_vision_tokens + whole.num_text_tokens) * tiny_models.HIDDEN * 4 / GB
    evaluator = Evaluator(model, probe, adapter, MIRConfig(capture_budget_gb=budget))
    first, second = (evaluator.evaluate(model, progress=False) for _ in range(2))
    assert first.per_layer == second.per_layer == whole.per_layer
    assert (second.storage_device, second.passes) == ("host", 1)


def test_rows_on_their_way_to_the_host_are_there_before_they_come_back():
    torch.manual_seed(0)
    store = HiddenStateStore(range(3), capacity=(3000, 1000), on_host=True)
    states = [torch.randn(4000, 2048, device="cuda") for _ in range(3)]
    expected = [(state[:3000].clone(), state[3000:].clone()) for state in states]
    where = torch.arange(3000, device="cuda"), torch.arange(3000, 4000, device="cuda")
    for layer, state in enumerate(states):
        store.append(layer, state, where)
        state.fill_(-1.0)  # as models overwrite their activations
    store.finish()
    for layer in range(3):
        assert all(map(torch.equal, store.take(layer), expected[layer]))


def test_batches_are_halved_when_the_gpu_runs_out_of_memory():
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(7))
    expected = evaluate_mir(model.cuda(), probe, processor=processor, batch_size=1)

    def ask(_module, _args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            torch.empty(1 << 45, device="cuda")

    model.register_forward_pre_hook(ask, with_kwargs=True)
    with logged("going on with batch_size=1"):
        report = evaluate_mir(model, probe, processor=processor, batch_size=2)
    assert report.batch_size == 1
    assert report.per_layer == expected.per_layer


def test_peak_memory_is_seen_and_torchs_own_statistics_are_left_alone():
    cuda = torch.device("cuda")
    high = torch.empty(2**28, device=cuda, dtype=torch.uint8)
    del high
    before = torch.cuda.max_memory_allocated()
    peak = PeakMemory(cuda)
    held = torch.empty(2**26, device=cuda, dtype=torch.uint8)
    peak.sample()
    del held
    assert 2**26 <= peak.sample() < 2**27
    assert torch.cuda.max_memory_allocated() == before
    peak = PeakMemory(cuda)
    del_soon = torch.empty(2**29, device=cuda, dtype=torch.uint8)
    del del_soon
    assert peak.sample() >= 2**29  # above all before, so exact without a sample


def test_what_is_free_is_known_to_the_default_budget():
    free, total = torch.cuda.mem_get_info()
    budgets = find_budgets(torch.device("cuda"), None, 1)
    assert 0.4 * free < budgets.device <= 0.5 * total
    assert budgets.host > 0


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
