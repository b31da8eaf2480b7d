# SPDX-License-Identifier: Apache-2.0
"""Attention for packed sequences, as training code puts it in the place of transformers': re-made with a plain kernel.

The replacements are those of Qwen-VL's and InternVL's training code and of ms-swift, written from their descriptions;
`varlen` stands for flash-attention's function of the same arguments.
"""

import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, softmax_scale=None, **_):
    """Causal attention within each of several sequences, q, k, v (T, heads, d); rows in none of them stay zero."""
    bounds, result = cu_seqlens_q.tolist(), torch.zeros_like(q)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        q_, k_, v_ = (each[start:stop].transpose(0, 1) for each in (q, k, v))
        out = functional.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, scale=softmax_scale)
        result[start:stop] = out.transpose(0, 1)
    return result


def heads(self, hidden_states, position_embeddings):
    """Queries, keys and values, (B, S, heads, d)."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    return [each.transpose(1, 2) for each in (q, k, v)]


def flattened_attention(q, k, v, attention_mask):
    cu_seqlens = attention_mask
    return varlen(q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


def flattened_forward(self, hidden_states, attention_mask=None, position_embeddings=None, **_):
    """As in qwen-vl-finetune with data_flatten: the mask is the cumulative lengths."""
    out = flattened_attention(*heads(self, hidden_states, position_embeddings), attention_mask)
    return self.o_proj(out.reshape(hidden_states.shape)), None


def mask_as_it_is(attention_mask=None, **_):
    return attention_mask


class PackedTrainingAttention(modeling_llama.LlamaAttention):
    """As in InternVL's packed training: a subclass in the place of the class, which replaces an inner method."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
        out = self._flash(*heads(self, hidden_states, position_embeddings), attention_mask)
        return self.o_proj(out.reshape(hidden_states.shape)), None

    def _flash(self, q, k, v, attention_mask):
        assert len(q) == 1
        lengths = attention_mask.squeeze(0)
        return varlen(q[0], k[0], v[0], cu_seqlens_q=lengths, cu_seqlens_k=lengths)


def kept_lengths_forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
    """As in InternVL's later training code: lengths that the training loop left in the module go first."""
    if self.cu_seqlens is not None:
        attention_mask = self.cu_seqlens
    q, k, v = heads(self, hidden_states, position_embeddings)
    cu_seqlens = attention_mask.squeeze(0)
    return self.o_proj(varlen(q[0], k[0], v[0], cu_seqlens).reshape(hidden_states.shape)), None


def restarting_forward(self, hidden_states, position_embeddings=None, position_ids=None, **_):
    """As ms-swift's padding_free on older transformers: sequences begin where positions restart."""
    q, k, v = heads(self, hidden_states, position_embeddings)
    starts = (position_ids.flatten() == 0).nonzero()[:, 0].int()
    cu_seqlens = functional.pad(starts, (0, 1), value=position_ids.numel())
    out = varlen(*(each.flatten(0, 1) for each in (q, k, v)), cu_seqlens)
    return self.o_proj(out.reshape(hidden_states.shape)), None


def registered_attention(module, query, key, value, attention_mask, **_):
    out = flattened_attention(*(each.transpose(1, 2) for each in (query, key, value)), attention_mask)
    return out[None], None


def unpadding_forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
    """As in older training code of LLaVA and FastChat: a mask of padding, read as such."""
    q, k, v = heads(self, hidden_states, position_embeddings)
    mask = torch.ones(q.shape[:2]) if attention_mask is None else attention_mask
    cu_seqlens = functional.pad(mask.sum(dim=1).cumsum(0), (1, 0)).int()
    out = torch.zeros_like(q)
    out[mask.bool()] = varlen(*(each[mask.bool()] for each in (q, k, v)), cu_seqlens)
    return self.o_proj(out.reshape(hidden_states.shape)), None


def single_lengths_forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
    """The mask as the length of each sequence: another meaning again, which nobody can know."""
    q, k, v = heads(self, hidden_states, position_embeddings)
    lengths = torch.ones(q.shape[1]) if attention_mask is None else attention_mask.flatten()
    out = varlen(q[0], k[0], v[0], cu_seqlens_q=functional.pad(lengths.cumsum(0), (1, 0)).int())
    return self.o_proj(out.reshape(hidden_states.shape)), None


def failing_forward(self, hidden_states, position_embeddings=None, attention_mask=None, cu_seq_lens_q=None, **_):
    raise KeyError(f"{cu_seq_lens_q}")
