# SPDX-License-Identifier: Apache-2.0
"""Attention that was replaced for packed sequences is measured right or refused by name."""

from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import find_decoder
from mir_callback.model.packing import find_packed_attention
from tests import tiny_models
from tests.model.packed_attention import (
    PackedTrainingAttention,
    failing_forward,
    flattened_forward,
    kept_lengths_forward,
    mask_as_it_is,
    registered_attention,
    restarting_forward,
    single_lengths_forward,
    unpadding_forward,
    varlen,
)
from tests.samples import pairs

PROBE = Probe.from_pairs(pairs(4))


def flatten_qwen(monkeypatch, model):
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLAttention, "forward", flattened_forward)
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(modeling_qwen2_5_vl, name, mask_as_it_is)


def flatten_llama(monkeypatch, model):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", flattened_forward)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask_as_it_is)


def subclass(monkeypatch, model):
    for layer in find_decoder(model).layers:
        layer.self_attn.__class__ = PackedTrainingAttention


def instances(monkeypatch, model):
    for layer in find_decoder(model).layers:
        layer.self_attn.forward = MethodType(kept_lengths_forward, layer.self_attn)
        layer.self_attn.cu_seqlens = torch.tensor([0, 3, 9], dtype=torch.int32)  # of the last training step


def restart(monkeypatch, model):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", restarting_forward)


def register(monkeypatch, model):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", registered_attention)
    for config in (model.config.vision_config, model.model.vision_tower.config):
        config._attn_implementation = "eager"


def unpad(monkeypatch, model):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", unpadding_forward)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask_as_it_is)


def value(model, processor, batch_size=4):
    return evaluate_mir(model, PROBE, processor=processor, batch_size=batch_size).mir


@pytest.mark.parametrize(
    ("build", "patch"),
    [
        (tiny_models.qwen2_5_vl, flatten_qwen),
        (tiny_models.llava, flatten_llama),
        (tiny_models.llava, subclass),
        (tiny_models.llava, instances),
        (tiny_models.llava, restart),
        (tiny_models.llava, register),
        (tiny_models.llava, unpad),
    ],
)
def test_value_under_packed_attention_is_that_without_it(build, patch, monkeypatch):
    model, processor = build()
    expected = value(model, processor)
    patch(monkeypatch, model)
    report = evaluate_mir(model, PROBE, processor=processor, batch_size=4)
    assert report.batch_size == 1
    assert report.mir == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("patch", [flatten_llama, instances])
@torch.no_grad()
def test_a_mask_of_padding_would_give_another_number_without_an_error(patch, monkeypatch):
    """Why there has to be a search: without lengths, a forward of one sample goes wrong silently."""
    model, processor = tiny_models.llava()
    (image, text), *_ = pairs(1)
    inputs = processor(images=[[image]], text=["<image>" + text], return_tensors="pt")
    expected = model.eval()(**inputs).logits
    patch(monkeypatch, model)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


def test_training_is_left_as_it_was(monkeypatch):
    model, processor = tiny_models.llava()
    instances(monkeypatch, model)
    attention = find_decoder(model).layers[0].self_attn
    kept, hooks = attention.cu_seqlens, len(attention._forward_pre_hooks)
    value(model, processor)
    assert attention.cu_seqlens is kept
    assert len(attention._forward_pre_hooks) == hooks


@pytest.mark.parametrize("forward", [single_lengths_forward, failing_forward])
def test_refused_by_name_when_attention_sees_something_else_than_one_sequence(forward, monkeypatch):
    model, processor = tiny_models.llava()
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", mask_as_it_is)
    with pytest.raises(UnsupportedModelError, match=rf"{forward.__name__} \(.*packed_attention\.py\)"):
        value(model, processor)


def fused_norm(self, hidden_states):
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fused_rotary(q, k, cos, sin, unsqueeze_dim=1):
    return ORIGINAL_ROTARY(q, k, cos, sin, unsqueeze_dim)


ORIGINAL_ROTARY = modeling_llama.apply_rotary_pos_emb


def test_other_replacements_are_no_packed_attention(monkeypatch):
    model, _ = tiny_models.llava()
    assert find_packed_attention(find_decoder(model)) is None
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", fused_norm)  # as Liger's
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", fused_rotary)
    for module in find_decoder(model).layers[0].modules():
        add_hook_to_module(module, ModelHook())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert find_packed_attention(find_decoder(adapted)) is None


def positions_in_space(_layer, args, kwargs):
    """What glm4v_moe and ernie4_5_vl_moe hand their layers: (3, B, S), which don't count up in an image."""
    positions = torch.arange(kwargs["hidden_states"].shape[1] if not args else args[0].shape[1])
    return args, {**kwargs, "position_ids": torch.stack([positions // 9, positions // 3, positions % 3])[:, None]}


@pytest.mark.parametrize("in_space", [False, True])
@pytest.mark.parametrize("build", [tiny_models.llava, tiny_models.qwen2_5_vl, tiny_models.idefics3])
def test_flash_attention_of_transformers_takes_no_sample_for_several(build, in_space, monkeypatch):
    """Its own function reads positions of a single sample that don't count up as those of several."""
    model, processor = build()
    expected = value(model, processor)
    lengths = []

    def one(q, k, v, causal=True, softmax_scale=None, **_):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2)

    def several(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, **options):
        lengths.append(len(cu_seqlens_q) - 1)
        return varlen(q, k, v, cu_seqlens_q, **options)

    functions = {"_flash_fn": one, "_flash_varlen_fn": several}
    functions |= {"_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input}
    functions |= {"_process_flash_kwargs_fn": flash._lazy_define_process_function(several)}
    for name, function in {**functions, "_loaded_implementation": "flash_attention_2"}.items():
        monkeypatch.setattr(flash, name, function)
    for layer in find_decoder(model).layers:
        layer.self_attn.config._attn_implementation = "flash_attention_2"
        if in_space:
            layer.register_forward_pre_hook(positions_in_space, with_kwargs=True)
    assert value(model, processor, batch_size=1) == pytest.approx(expected, abs=1e-6)
    assert not lengths, "a single sample was taken for several"
    assert value(model, processor, batch_size=2) == pytest.approx(expected, abs=1e-6)
    assert set(lengths) == {2}, "padding was not taken away"
