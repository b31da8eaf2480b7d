# SPDX-License-Identifier: Apache-2.0
"""Parts that tiny models of several families share."""

from __future__ import annotations

from typing import Any

from tests import tiny_models
from tests.tiny_models import HIDDEN, LAYERS

TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def sizes(tok: Any) -> dict[str, Any]:
    """The text configuration of a tiny decoder."""
    return {
        "vocab_size": len(tok),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }


def ids(tok: Any, **tokens: str) -> dict[str, int]:
    """The ids of tokens, under the names of a configuration's fields."""
    return {field: tok.convert_tokens_to_ids(token) for field, token in tokens.items()}


def without_video(kind: type) -> Any:
    """A processor class without its video part, which would need torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


tokenizer = tiny_models.tokenizer
