# SPDX-License-Identifier: Apache-2.0
"""One evaluation on a live model, on one process (tests/distributed has more)."""

import dataclasses
import math

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from mir_callback import Probe, evaluate_mir, metric, modality_integration_rate
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, ForwardError, NumericsError, UnsupportedModelError
from mir_callback.evaluation import evaluate
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.record import DESCRIBED_FIELDS, EvalRecord
from tests import reference, tiny_models
from tests.model.test_capture import FAMILIES
from tests.samples import pairs

COUNT = 10


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(COUNT), matched=True)


def test_value_equals_the_definition_on_the_models_own_hidden_states(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    assert str(report).startswith(f"MIR {report.mir:.4f} +- {report.mir_se:.4f} (3 layers, ")
    assert "\n" not in str(report)
    vision, text = reference.hidden_rows(model, processor, pairs(COUNT))
    expected, distances = reference.rate(vision, text)
    assert report.mir == pytest.approx(expected, abs=1e-6)
    assert report.mir == pytest.approx(modality_integration_rate(vision, text).mir, abs=1e-8)
    assert report.per_layer == pytest.approx(distances, rel=1e-5)
    assert (report.num_vision_tokens, report.num_text_tokens) == (len(vision[0]), len(text[0]))
    assert report.num_samples == COUNT
    assert report.dtype == "float32"
    assert report.world_size == 1
    assert report.seconds > 0
    assert report.probe_fingerprint == probe.fingerprint


def test_outliers_reported_are_those_the_rule_replaces(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    vision, _ = reference.hidden_rows(model, processor, pairs(COUNT))
    replaced = [
        int((reference.without_outliers(rows.double().numpy()) != rows.double().numpy()).any(axis=1).sum())
        for rows in vision
    ]
    assert report.vision_outliers == replaced
    assert sum(replaced) > 0


@pytest.mark.parametrize("build", FAMILIES)
def test_batch_size_does_not_change_the_value(build, probe):
    model, processor = build()
    values = [evaluate_mir(model, probe, processor=processor, batch_size=size).mir for size in (1, 3, 10)]
    assert values == pytest.approx([values[0]] * 3, abs=1e-6)


def test_padding_side_does_not_change_the_value(probe):
    model, processor = tiny_models.llava()
    right = evaluate_mir(model, probe, processor=processor).mir
    processor.tokenizer.padding_side = "left"
    assert evaluate_mir(model, probe, processor=processor).mir == pytest.approx(right, abs=1e-6)


def test_fewer_tokens_than_dimensions_equals_the_reference():
    model, processor = tiny_models.llava()
    few = [(pairs(1)[0][0], "the text tokens drift"), (pairs(2)[1][0], "or come")]
    report = evaluate_mir(model, Probe.from_pairs(few), processor=processor)
    assert report.num_text_tokens < tiny_models.HIDDEN
    assert report.mir == pytest.approx(reference.rate(*reference.hidden_rows(model, processor, few))[0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_any_float_dtype_are_measured_in_it(probe, dtype):
    model, processor = tiny_models.llava()
    single = evaluate_mir(model, probe, processor=processor).mir
    # One sample at a time: the length a batch is padded to moves the last digits of bfloat16.
    report = evaluate_mir(model.to(dtype), probe, processor=processor, batch_size=1)
    assert report.dtype == str(dtype).removeprefix("torch.")
    expected, _ = reference.rate(*reference.hidden_rows(model, processor, pairs(COUNT)))
    assert report.mir == pytest.approx(expected, abs=1e-6)
    assert report.mir != pytest.approx(single, abs=1e-7) or dtype is torch.float64


def test_autocast_around_an_evaluation_reaches_its_forwards_only(probe):
    model, processor = tiny_models.llava()
    with torch.autocast("cpu", torch.bfloat16):
        around = evaluate_mir(model, probe, processor=processor)
    plain = evaluate_mir(model, probe, processor=processor)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    inside = evaluate_mir(model, probe, processor=processor)
    assert (around.mir, around.mir_se, around.influences) == (inside.mir, inside.mir_se, inside.influences)
    assert around.mir != pytest.approx(plain.mir, abs=1e-7)


def test_paper_fast_is_another_number_and_says_so(probe):
    model, processor = tiny_models.llava()
    fast = evaluate_mir(model, probe, processor=processor, root="paper_fast")
    vision, text = reference.hidden_rows(model, processor, pairs(COUNT))
    assert fast.root == "paper_fast"
    assert fast.mir == pytest.approx(reference.rate(vision, text, reference.frechet_paper_fast)[0], abs=1e-6)
    assert fast.mir != evaluate_mir(model, probe, processor=processor).mir


def test_evaluation_leaves_the_model_as_it_was(probe):
    model, processor = tiny_models.llava(dropout=0.5)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    first = evaluate_mir(model, probe, processor=processor)
    assert torch.equal(torch.rand(3), expected)
    second = evaluate_mir(model, probe, processor=processor)
    assert first.mir == second.mir
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_goes_on_after_an_evaluation(probe):
    model, processor = tiny_models.llava()
    evaluate_mir(model, probe, processor=processor)
    image, words = pairs(1)[0]
    inputs = processor(images=[[image]], text=["<image>" + words], return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_progress_is_shown_when_it_takes_long(probe, monkeypatch, capsys):
    model, processor = tiny_models.llava()
    evaluate_mir(model, probe, processor=processor)
    assert "MIR:" not in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "_BAR_DELAY_SECONDS", 0.0)
    evaluate_mir(model, probe, processor=processor)
    assert "MIR:" in capsys.readouterr().err
    evaluate_mir(model, probe, processor=processor, progress=False)
    assert "MIR:" not in capsys.readouterr().err


def test_report_gives_the_fields_of_a_record(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor, vision_gain=True)
    record = EvalRecord.from_dict({"step": 3, **report.to_fields()})
    assert not record.unknown
    assert EvalRecord.from_line(record.to_line()) == record
    whole = dataclasses.asdict(report)
    assert record.per_layer_se == pytest.approx(whole.pop("per_layer_se"), rel=1e-4)
    for name, exact in whole.pop("companions").items():
        assert record.companions[name] == pytest.approx(exact, rel=1e-4), name
    assert {name: record[name] for name in whole} == whole


def test_record_without_a_value_says_why(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    nothing = dataclasses.replace(report, mir=-math.inf, scale_free_mir=-math.inf).to_fields()
    assert (nothing["mir"], nothing["scale_free_mir"]) == (None, None)
    assert nothing["error"] == "the distance of every layer is zero, so MIR is -inf"


def test_evaluator_is_defined_by_what_makes_values_comparable(probe):
    model, processor = tiny_models.llava()
    evaluator = Evaluator(model, probe, HuggingFaceAdapter(model, processor), MIRConfig(root="paper_fast"))
    fields = evaluator.evaluate(model).to_fields()
    assert evaluator.definition == {name: fields[name] or "" for name in DESCRIBED_FIELDS}
    assert fields["first_sample"] == "[16 x <image>]the model reads an inumber 385"
    given = HuggingFaceAdapter(model, processor, vision_ids="3")
    evaluator = Evaluator(model, probe, given, MIRConfig(vision_ids="3"))
    assert evaluator.definition["vision_ids"] == "3"
    with pytest.raises(ConfigError, match="vision_ids=None: HuggingFaceAdapter has '3'"):
        Evaluator(model, probe, given, MIRConfig())


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"batch_size": True}, {"capture_budget_gb": -1}, {"every": 5}])
def test_error_when_an_option_breaks_its_rule_or_is_none_of_an_evaluation(probe, option):
    model, processor = tiny_models.llava()
    with pytest.raises(ConfigError, match=next(iter(option))):
        evaluate_mir(model, probe, processor=processor, **option)


def test_tokens_fingerprint_tells_tokenizations_apart(probe):
    model, processor = tiny_models.llava()
    first = evaluate_mir(model, probe, processor=processor, batch_size=2)
    again = evaluate_mir(model, probe, processor=processor, batch_size=5)
    cut = evaluate_mir(model, dataclasses.replace(probe, max_text_tokens=4), processor=processor)
    assert first.tokens_fingerprint == again.tokens_fingerprint != cut.tokens_fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_error_names_layer_and_modality_when_states_are_not_finite(probe, value):
    model, processor = tiny_models.llava()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(NumericsError, match="layer 2: .* 160 of 160 vision tokens"):
        evaluate_mir(model, probe, processor=processor)
    assert all(not module._forward_hooks for module in model.model.language_model.layers)


def test_error_when_model_or_probe_is_something_else(probe):
    model, processor = tiny_models.llava()
    with pytest.raises(ConfigError, match="probe .* str"):
        evaluate_mir(model, "probe.zip", processor=processor)
    with pytest.raises(ConfigError, match="model .* int"):
        evaluate_mir(3, probe, processor=processor)


def test_error_before_any_forward_when_something_does_not_fit(probe):
    model, processor = tiny_models.llava()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ConfigError, match="Found no processor"):
        evaluate_mir(model, probe)
    with pytest.raises(ConfigError, match="root .*'sqrtm'"):
        evaluate_mir(model, probe, processor=processor, root="sqrtm")
    with pytest.raises(UnsupportedModelError, match="has no vision tokens"):
        evaluate_mir(model.model.language_model, probe, processor=processor)
    model.config.image_token_index = 5
    with pytest.raises(ConfigError, match=r"none of the model's image tokens \(5\)"):
        evaluate_mir(model, probe, processor=processor)
    assert calls == []


def test_error_names_samples_and_quotes_the_models_own_when_its_forward_fails(probe):
    model, processor = tiny_models.llava()
    processor.image_processor.size = {"shortest_edge": 64}
    processor.image_processor.crop_size = {"height": 64, "width": 64}
    with pytest.raises(ForwardError, match=r"samples pair \d: ValueError: Input image size") as caught:
        evaluate_mir(model, probe, processor=processor, batch_size=3)
    assert str(caught.value.__cause__) in str(caught.value)
    assert all(not module._forward_hooks for module in model.model.language_model.layers)


def test_samples_are_forwarded_one_by_one_when_the_model_takes_no_batch(probe, caplog):
    def refuse(_module, args, kwargs):
        if (kwargs.get("pixel_values", args[0] if args else None)).shape[0] > 1:
            raise RuntimeError("one image, please")

    model, processor = tiny_models.llava()
    expected = evaluate_mir(model, probe, processor=processor).mir
    model.model.vision_tower.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level("INFO", "mir_callback"):
        report = evaluate_mir(model, probe, processor=processor, batch_size=3)
    assert report.batch_size == 1
    assert report.mir == pytest.approx(expected, abs=1e-6)
    assert "one sample of the probe per forward" in caplog.text
    assert "one image, please" in caplog.text


def test_standard_error_is_that_of_the_samples_influences(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    spread = torch.tensor(report.influences, dtype=torch.float64).var() / COUNT
    assert report.mir_se == pytest.approx(spread.sqrt().item(), rel=0.05)  # but for what a draw decides otherwise
    assert 0 < report.mir_se < 1
    assert sum(report.influences) == pytest.approx(0.0, abs=1e-5)
    assert len(report.per_layer_se) == len(report.per_layer)


def test_influence_tells_what_leaving_a_sample_out_would_change(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    without = [
        evaluate_mir(
            model,
            Probe.from_pairs([pair for other, pair in enumerate(pairs(COUNT)) if other != sample]),
            processor=processor,
            standard_error=False,
        ).mir
        for sample in range(COUNT)
    ]
    changes = torch.tensor([report.mir - value for value in without])
    # To first order: with ten samples the rest is not small, but the order of the samples is the same.
    expected = torch.tensor(report.influences) / (COUNT - 1)
    assert torch.corrcoef(torch.stack([changes, expected]))[0, 1] > 0.9


def test_companions_explain_the_distance(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor)
    vision, text = reference.hidden_rows(model, processor, pairs(COUNT))
    found = report.companions
    for layer, (vision_rows, text_rows) in enumerate(zip(vision, text, strict=True)):
        parts = found["mean_part"][layer], found["covariance_part"][layer]
        assert sum(parts) == pytest.approx(report.per_layer[layer], rel=1e-9)
        scaled = vision_rows * (text_rows.norm(dim=1).mean() / vision_rows.norm(dim=1).mean())
        assert found["scale_free"][layer] == pytest.approx(reference.rate([scaled], [text_rows])[1][0], rel=1e-5)
        assert min(parts) >= 0
        lengths = vision_rows.norm(dim=1).mean() / text_rows.norm(dim=1).mean()
        assert found["norm_ratio"][layer] == pytest.approx(lengths.item(), rel=1e-5)
        rows = metric.rate.replace_outliers(vision_rows).double(), metric.rate.replace_outliers(text_rows).double()
        cosine = torch.cosine_similarity(rows[0].mean(dim=0), rows[1].mean(dim=0), dim=0)
        assert found["cosine"][layer] == pytest.approx(cosine.item(), rel=1e-5)
        for name, cloud in (("vision_rank", rows[0]), ("text_rank", rows[1])):
            values = torch.linalg.svdvals(cloud - cloud.mean(dim=0)).square()
            assert found[name][layer] == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-5)
    assert report.scale_free_mir == pytest.approx(math.log10(sum(found["scale_free"])), abs=1e-12)


def test_no_standard_error_where_there_is_none(probe):
    model, processor = tiny_models.llava()
    for options in ({"standard_error": False}, {"root": "paper_fast"}):
        report = evaluate_mir(model, probe, processor=processor, **options)
        assert (report.mir_se, report.per_layer_se, report.influences) == (None, None, None)
    alone = evaluate_mir(model, Probe.from_pairs(pairs(1)), processor=processor)
    assert alone.mir_se is None


@torch.no_grad()
def test_probe_loss_is_that_of_the_models_own_logits(probe):
    model, processor = tiny_models.llava()
    report = evaluate_mir(model, probe, processor=processor, probe_loss=True, batch_size=3)
    total, count = 0.0, 0
    for image, words in pairs(COUNT):
        inputs = processor(images=[[image]], text=[processor.image_token + words], return_tensors="pt")
        ids = inputs["input_ids"][0]
        first = int((ids == model.config.image_token_id).nonzero()[-1]) + 1
        chances = model.eval()(**inputs).logits[0].double().log_softmax(dim=-1)
        total -= chances[first:-1].gather(1, ids[first + 1 :, None]).sum().item()
        count += len(ids) - first - 1
    assert report.probe_loss == pytest.approx(total / count, rel=1e-6)
    assert report.mir == evaluate_mir(model, probe, processor=processor, batch_size=3).mir


def test_a_model_that_returns_no_logits_is_measured_but_for_its_losses(probe, monkeypatch):
    # As with fused losses: the output head is never called.
    model, processor = tiny_models.llava()
    expected = evaluate_mir(model, probe, processor=processor).mir

    def forward(self, logits_to_keep=0, **inputs):
        self.model(**inputs)
        return LlavaCausalLMOutputWithPast()

    monkeypatch.setattr(type(model), "forward", forward)
    assert evaluate_mir(model, probe, processor=processor).mir == expected
    for option in ("probe_loss", "vision_gain"):
        with pytest.raises(UnsupportedModelError, match=f"no logits.* {option}=False"):
            evaluate_mir(model, Probe.from_pairs(pairs(2), matched=True), processor=processor, **{option: True})


def test_probe_loss_is_refused_when_the_adapter_tells_no_text_ids(probe):
    model, processor = tiny_models.llava()

    class Silent(HuggingFaceAdapter):
        def encode(self, samples, max_text_tokens):
            return dataclasses.replace(super().encode(samples, max_text_tokens), text_ids=None)

    adapter = Silent(model, processor)
    with pytest.raises(ConfigError, match="probe_loss .* Silent"):
        evaluate_mir(model, probe, adapter=adapter, probe_loss=True)


def test_an_output_layer_that_is_the_token_embedding_is_left_alone(probe):
    model, processor = tiny_models.llava()
    expected = evaluate_mir(model, probe, processor=processor).mir
    model.get_output_embeddings = model.get_input_embeddings
    assert evaluate_mir(model, probe, processor=processor).mir == pytest.approx(expected, abs=1e-9)
