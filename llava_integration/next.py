# SPDX-License-Identifier: Apache-2.0
"""Models of LLaVA-VL/LLaVA-NeXT (LLaVA-NeXT, LLaVA-OneVision), whose package is called `llava` too.

Its image expansion goes by what its own collator hands over, and that is what the adapter gives it: images as a list
whatever their shapes (of a stacked batch the newline feature of `spatial_unpad` would be missing), the size of every
image, and for every sample the word "image" (rows beyond the words given are dropped).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from llava_integration.original import OriginalLlavaAdapter
from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import unwrap


class LlavaNextAdapter(OriginalLlavaAdapter):
    """Encodes samples as LLaVA-NeXT's own training code does, and observes its image expansion.

    Args:
        model: the model, bare or wrapped.
        tokenizer: the run's tokenizer.
        conversation: name of a conversation template ("plain", "qwen_1_5", ...), by default the run's own; see
            :class:`OriginalLlavaAdapter`.

    Raises:
        ConfigError: no tokenizer, an unknown template.
        UnsupportedModelError: the model has no vision tower, does not expand images as LLaVA does, or its forward takes
            no modalities.
    """

    _for_llava_next = True

    def __init__(self, model: nn.Module, tokenizer: Any, *, conversation: str | None = None) -> None:
        super().__init__(model, tokenizer, conversation=conversation)
        kind = type(unwrap(model))
        if "modalities" not in inspect.signature(kind.forward).parameters:
            raise UnsupportedModelError(
                f"{kind.__name__}.forward must take modalities, which LLaVA-NeXT's own collator gives it, got one "
                "without; use LlavaQwen, LlavaLlama or LlavaMixtral, or write an adapter"
            )

    def _image_inputs(self, pixels: list[Tensor], pictures: list[Any]) -> dict[str, Any]:
        """One image a sample: (3, H, W), or (T, 3, H, W) in tiles."""
        return {
            "images": pixels,
            "image_sizes": [picture.size for picture in pictures],
            "modalities": ["image"] * len(pictures),
        }

    def _conversation(self) -> Any:
        """Llama 3's template asks a tokenizer for its words, and loses its own when copied."""
        conversation = super()._conversation()
        conversation.tokenizer = self._tokenizer
        return conversation
