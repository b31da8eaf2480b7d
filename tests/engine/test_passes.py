# SPDX-License-Identifier: Apache-2.0
"""Where rows wait and in how many passes they are seen changes no value; memory that runs out does not end it."""

import re
import warnings
from contextlib import contextmanager

import pytest
import torch

from mir_callback import Probe, evaluate_mir
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, ForwardError, NumericsError
from mir_callback.evaluation import hidden_states
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.hidden_states import GB, Budgets, pinned_bytes
from mir_callback.model.modality import ModalityMasks
from mir_callback.probe.adapters import AdaptedBatch, HuggingFaceAdapter
from tests import tiny_models
from tests.logs import logged
from tests.model.test_capture import FAMILIES
from tests.samples import pairs

COUNT = 7
LAYERS = 5
ROW = tiny_models.HIDDEN * 4  # bytes
VALUES = ("mir", "per_layer", "vision_outliers", "text_outliers", "num_vision_tokens", "num_text_tokens")


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(COUNT))


def values(report):
    return {name: getattr(report, name) for name in VALUES}


def one_layer(report):
    """Bytes that one layer's rows take."""
    return (report.num_vision_tokens + report.num_text_tokens) * ROW


class LiveAdapter(HuggingFaceAdapter):
    """Tells masks only in the forward, as adapters do whose models place image features themselves."""

    def encode(self, samples, max_text_tokens):
        adapted = super().encode(samples, max_text_tokens)
        ids = adapted.inputs["input_ids"]
        self._masks = {**getattr(self, "_masks", {}), ids.numpy().tobytes(): adapted.masks}
        return AdaptedBatch(adapted.inputs, None, adapted.token_ids)

    def _of(self, ids):
        masks = self._masks[ids.cpu().numpy().tobytes()]
        return ModalityMasks(masks.vision.to(ids.device), masks.text.to(ids.device))

    @contextmanager
    def live_masks(self, model):
        seen = {}
        hook = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
        try:
            yield lambda: self._of(seen["input_ids"])
        finally:
            hook.remove()


@pytest.mark.parametrize("build", FAMILIES)
def test_values_are_the_same_to_the_last_bit_in_any_number_of_passes(build, probe):
    model, processor = build()
    whole = evaluate_mir(model, probe, processor=processor)
    assert (whole.passes, whole.storage_device) == (1, "device")
    for layers, passes in ((1, 3), (2, 2), (3, 1)):
        budget = layers * one_layer(whole) / GB
        report = evaluate_mir(model, probe, processor=processor, capture_budget_gb=budget)
        assert report.passes == passes
        assert values(report) == values(whole)


@pytest.mark.parametrize(("fitting", "passes"), [(1.99, 5), (2, 5), (3, 3), (4, 2), (6, 1)])
def test_masks_that_only_a_forward_shows_keep_within_the_budget_too(probe, monkeypatch, fitting, passes):
    model, processor = tiny_models.llava(layers=LAYERS)
    adapter = LiveAdapter(model, processor)
    whole = evaluate_mir(model, probe, adapter=adapter)
    held = []
    append = hidden_states.HiddenStateStore.append

    def watched(self, *arguments):
        append(self, *arguments)
        held.append(self.held_bytes)

    monkeypatch.setattr(hidden_states.HiddenStateStore, "append", watched)
    budget = fitting * one_layer(whole)
    if fitting < 2:  # one layer, and room to join its parts
        with pytest.raises(ConfigError, match="capture_budget_gb=.*one decoder layer"):
            evaluate_mir(model, probe, adapter=adapter, capture_budget_gb=budget / GB)
        return
    report = evaluate_mir(model, probe, adapter=adapter, capture_budget_gb=budget / GB)
    assert values(report) == values(whole)
    assert report.passes == passes
    assert max(held) <= budget


def test_rows_that_wait_in_host_memory_give_the_same_value(probe, monkeypatch):
    model, processor = tiny_models.llava(layers=LAYERS)
    for adapter in (HuggingFaceAdapter(model, processor), LiveAdapter(model, processor)):
        whole = evaluate_mir(model, probe, adapter=adapter)
        layer = one_layer(whole)
        # As on a GPU with room for two layers: on the CPU host memory is the device, and so never a second place.
        limits = Budgets(2 * layer, 2 * LAYERS * layer, given=True)
        with monkeypatch.context() as patch:
            patch.setattr(hidden_states, "find_budgets", lambda *_, limits=limits: limits)
            evaluator = Evaluator(model, probe, adapter, MIRConfig())
            first, second = (evaluator.evaluate(model, progress=False) for _ in range(2))
        assert values(first) == values(second) == values(whole)
        assert (second.passes, second.storage_device) == (1, "host")


def test_passes_are_as_few_as_host_memory_allows(probe, monkeypatch):
    model, processor = tiny_models.llava(layers=LAYERS)
    whole = evaluate_mir(model, probe, processor=processor)
    on_host = sum(pinned_bytes(count * ROW) for count in (whole.num_vision_tokens, whole.num_text_tokens))
    limits = Budgets(one_layer(whole), 3 * on_host, given=True)
    monkeypatch.setattr(hidden_states, "find_budgets", lambda *_: limits)
    report = evaluate_mir(model, probe, processor=processor)
    assert values(report) == values(whole)
    assert (report.passes, report.storage_device) == (2, "host")


def test_error_before_any_forward_when_the_budget_is_too_small_for_one_layer(probe):
    model, processor = tiny_models.llava()
    layer = one_layer(evaluate_mir(model, probe, processor=processor))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ConfigError, match=r"capture_budget_gb=.*one decoder layer take .* GB .*at least"):
        evaluate_mir(model, probe, processor=processor, capture_budget_gb=(layer - 1) / GB)
    assert not calls


def test_error_names_the_layer_of_the_model_in_a_later_pass_too(probe):
    model, processor = tiny_models.llava()
    budget = one_layer(evaluate_mir(model, probe, processor=processor)) / GB
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="layer 2: .* vision tokens are NaN"):
        evaluate_mir(model, probe, processor=processor, capture_budget_gb=budget)


def test_hidden_states_wider_than_the_embeddings_are_kept_within_the_budget(probe):
    model, processor = tiny_models.llava()
    # The first layer's output is what a wider dtype comes from here; the embeddings stay as they are.
    whole = evaluate_mir(model, probe, processor=processor)
    layers = model.model.language_model.layers
    layers.double()
    layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: (tuple(a.double() for a in args), widened(kwargs)), with_kwargs=True
    )
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda _m, args, kwargs: (args, widened(kwargs)), with_kwargs=True)
    model.model.language_model.norm.double()
    model.lm_head.double()
    wide = evaluate_mir(model, probe, processor=processor)
    assert wide.dtype == "float64"
    report = evaluate_mir(model, probe, processor=processor, capture_budget_gb=2 * one_layer(whole) / GB)
    assert report.passes == 3
    assert values(report) == values(wide)
    with pytest.raises(ConfigError, match="capture_budget_gb=.*one decoder layer"):
        evaluate_mir(model, probe, processor=processor, capture_budget_gb=1.5 * one_layer(whole) / GB)


def widened(kwargs):
    found = {}
    for name, value in kwargs.items():
        if isinstance(value, tuple):
            found[name] = tuple(part.double() for part in value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = value.double()
        else:
            found[name] = value
    return found


def hungry(model, samples):
    """Let the model ask for more memory than there is, for more samples at once than this."""

    def ask(_module, _args, kwargs):
        if len(kwargs["input_ids"]) > samples:
            torch.empty(1 << 50)

    return model.register_forward_pre_hook(ask, with_kwargs=True)


@pytest.mark.parametrize("build", FAMILIES)
def test_batches_are_halved_until_a_forward_fits(build, probe):
    model, processor = build()
    expected = evaluate_mir(model, probe, processor=processor, batch_size=1)
    hungry(model, 1)
    with logged("Out of memory in a forward of the probe") as messages:
        report = evaluate_mir(model, probe, processor=processor, batch_size=6)
    assert [re.findall(r"batch_size=(\d)", message) for message in messages] == [["6", "3"], ["3", "1"]]
    assert report.batch_size == 1
    assert report.passes == 1
    assert values(report) == values(expected)


def test_a_batch_size_that_fits_is_remembered(probe):
    model, processor = tiny_models.llava()
    evaluator = Evaluator(model, probe, HuggingFaceAdapter(model, processor), MIRConfig(batch_size=4))
    hungry(model, 2)
    with logged("going on with batch_size=2"):
        evaluator.evaluate(model, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert evaluator.evaluate(model, progress=False).batch_size == 2


def test_memory_that_runs_out_in_a_later_pass_costs_that_pass_only(probe):
    model, processor = tiny_models.llava()
    whole = evaluate_mir(model, probe, processor=processor)
    forwards = []

    def ask(_module, _args, kwargs):
        forwards.append(len(kwargs["input_ids"]))
        if len(forwards) == 6:  # after two samples alone and together, two batches of four are the first pass
            torch.empty(1 << 50)

    model.register_forward_pre_hook(ask, with_kwargs=True)
    budget = one_layer(whole) / GB
    with logged("going on with batch_size=2"):
        report = evaluate_mir(model, probe, processor=processor, capture_budget_gb=budget)
    assert forwards == [1, 1, 2, 4, 3, 4, *[2, 2, 2, 1] * 2]
    assert report.passes == 3
    assert report.mir == pytest.approx(whole.mir, abs=1e-7)


def test_error_when_not_even_one_sample_fits(probe):
    model, processor = tiny_models.llava()
    hungry(model, 0)
    with logged("going on with batch_size=1"), pytest.raises(RuntimeError, match="can't allocate memory"):
        evaluate_mir(model, probe, processor=processor, batch_size=2)


def test_other_errors_of_a_forward_are_not_tried_again(probe):
    model, processor = tiny_models.llava()
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    model.register_forward_pre_hook(fail)
    with pytest.raises(ForwardError, match="RuntimeError: shapes do not match"):
        evaluate_mir(model, probe, processor=processor)
    assert len(calls) == 1


def test_the_report_says_how_much_memory_it_took(probe):
    model, processor = tiny_models.llava()
    held = []

    def hold(*_):
        held[:] = [torch.ones(200 * 2**20, dtype=torch.uint8)]

    model.register_forward_pre_hook(hold)
    model.register_forward_hook(lambda *_: held.clear())
    report = evaluate_mir(model, probe, processor=processor)
    assert 200 * 2**20 <= report.peak_memory_bytes < 500 * 2**20
