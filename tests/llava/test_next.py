# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT's adapter, against a stand-in always, and against the real repository where there is one.

For the latter, MIR_LLAVA_NEXT_PYTHON names the Python of an environment that runs it, and PYTHONPATH its checkout.
"""

import os
import sys

import pytest
import torch
from transformers import LlamaConfig

from llava_integration import LlavaNextAdapter, OriginalLlavaAdapter
from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.probe.adapters import find_adapter
from tests import reference, tiny_models
from tests.distributed.launch import run_process, run_ranks
from tests.llava import next_stand_in
from tests.llava.next_cases import CASES
from tests.samples import pairs

REAL = os.environ.get("MIR_LLAVA_NEXT_PYTHON")
SIZES = [(64, 32), (32, 64), (48, 48), (96, 24), (40, 50)]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for name, module in next_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def probe():
    found = pairs(len(SIZES))
    return Probe.from_pairs([(image.resize(size), text) for (image, text), size in zip(found, SIZES, strict=True)])


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_models.tokenizer({}, [])
    made.pad_token = None  # Llama 3's has none, and the collator takes 0
    return made


@pytest.fixture
def make_model(tokenizer):
    def make(kind=next_stand_in.LlavaStandIn, **settings):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
        values = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat", "mm_use_im_start_end": False}
        for name, value in {**values, **settings}.items():
            setattr(config, name, value)
        kind.__module__ = "llava.model"
        return kind(config).eval()

    return make


@torch.no_grad()
def step_by_step(model, tokenizer, probe):
    """MIR of one sample at a time, each as LLaVA-NeXT's own collator gives it, everything after the image text."""
    vision, text = [], []
    for sample in probe.samples:
        picture = sample.open_image()
        ids = next_stand_in.tokenizer_image_token(f"<image>{sample.text}\n", tokenizer, "pt")
        images = [next_stand_in.process_images([picture], None, model.config)[0]]
        states = model(
            ids[None], images=images, image_sizes=[picture.size], modalities=["image"], output_hidden_states=True
        ).hidden_states
        start = ids.tolist().index(next_stand_in.IMAGE)
        end = start + states[0].shape[1] - (len(ids) - 1)
        vision.append([state[0, start:end] for state in states[1:]])
        text.append([state[0, end:] for state in states[1:]])
    stacked = [[torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)]
    return reference.rate(*stacked)[0], len(stacked[0][0]), len(stacked[1][0])


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
@pytest.mark.parametrize("aspect", ["square", "anyres"])
def test_value_equals_one_sample_at_a_time_at_every_batch_size(make_model, tokenizer, probe, aspect, merge):
    model = make_model(image_aspect_ratio=aspect, mm_patch_merge_type=merge)
    expected, vision_tokens, text_tokens = step_by_step(model, tokenizer, probe)
    adapter = LlavaNextAdapter(model, tokenizer)
    for batch_size in (1, 3, 5):
        report = evaluate_mir(model, probe, adapter=adapter, batch_size=batch_size)
        assert (report.num_vision_tokens, report.num_text_tokens) == (vision_tokens, text_tokens)
        assert report.mir == pytest.approx(expected, abs=1e-6)


def test_model_is_told_apart_from_the_original_by_its_image_expansion(make_model, tokenizer):
    class Original(next_stand_in.LlavaStandIn):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
        ):
            raise NotImplementedError

    for kind, expected in ((next_stand_in.LlavaStandIn, LlavaNextAdapter), (Original, OriginalLlavaAdapter)):
        adapter = find_adapter(make_model(kind), tokenizer, prompt="qwen_1_5")
        assert type(adapter) is expected


def test_error_when_the_forward_takes_no_modalities(make_model, tokenizer):
    class WithoutModalities(next_stand_in.LlavaStandIn):
        def forward(self, input_ids=None, position_ids=None, images=None, image_sizes=None):
            raise NotImplementedError

    with pytest.raises(UnsupportedModelError, match=r"WithoutModalities.forward .*modalities"):
        LlavaNextAdapter(make_model(WithoutModalities), tokenizer)


def test_error_without_a_tokenizer(make_model):
    with pytest.raises(ConfigError, match="No tokenizer given"):
        LlavaNextAdapter(make_model(), None)


def test_template_that_needs_a_tokenizer_gets_the_runs_own(make_model, tokenizer, probe):
    adapter = LlavaNextAdapter(make_model(), tokenizer, prompt="llava_llama_3")
    prompt = tokenizer.decode(adapter.encode(probe.samples[:1], 8).token_ids[0].clamp(min=0))
    assert prompt.startswith("user")
    assert next_stand_in.TEMPLATES["llava_llama_3"].tokenizer == "its own"


@pytest.mark.parametrize("name", list(next_stand_in.TEMPLATES))
def test_a_conversation_written_out_gives_its_token_ids(make_model, tokenizer, probe, name):
    named = LlavaNextAdapter(make_model(), tokenizer, prompt=name)
    written = LlavaNextAdapter(make_model(), tokenizer, prompt=named.prompt)
    for one, other in zip(*(each.encode(probe.samples, 8).token_ids for each in (named, written)), strict=True):
        assert torch.equal(one, other)


def test_chat_is_the_runs_own_conversation_unless_that_is_of_pre_training(make_model, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="prompt='chat'.* pre-training.*qwen_1_5"):
        LlavaNextAdapter(make_model(), tokenizer, prompt="chat")
    own = next_stand_in.TEMPLATES["qwen_1_5"]
    monkeypatch.setattr(sys.modules["llava.conversation"], "default_conversation", own)
    chosen = [LlavaNextAdapter(make_model(), tokenizer, prompt=prompt).prompt for prompt in (None, "chat", "qwen_1_5")]
    assert len(set(chosen)) == 1
    assert "user" in chosen[0]
    assert LlavaNextAdapter(make_model(), tokenizer, prompt="plain").prompt == "{image}{text}\n"


@pytest.mark.parametrize("wrong", ["<image> {image}{text}", "<im_start>{image}{text}", "{text}", "v7"])
def test_error_for_a_prompt_that_the_code_base_does_not_have(make_model, tokenizer, wrong):
    with pytest.raises(ConfigError, match=f"prompt='{wrong}'"):
        LlavaNextAdapter(make_model(), tokenizer, prompt=wrong)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="MIR_LLAVA_NEXT_PYTHON names no environment with the real repository")
def test_value_equals_the_authors_procedure_when_the_models_are_real(tmp_path):
    assets = tmp_path / "assets"
    made = run_process(["-m", "tests.llava.next_assets", str(assets)], python=REAL)
    assert made.returncode == 0, made.stderr
    environment = {"HF_HUB_CACHE": str(assets / "hub"), "HF_HUB_OFFLINE": "1"}
    options = {"processes": None, "python": REAL, "environment": environment, "timeout": 1200}
    values = run_ranks("tests.llava.next_worker", tmp_path / "values", str(assets), **options)[0]
    assert set(values) == set(CASES)
    for case, found in values.items():
        assert len(set(found["vision_tokens"])) == 1, case
        assert found["ours"] == pytest.approx([found["authors"]] * 3, abs=1e-5), case
