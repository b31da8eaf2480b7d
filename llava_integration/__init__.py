# SPDX-License-Identifier: Apache-2.0
"""MIR in LLaVA code bases as they are, with one line before `trainer.train()`: :func:`attach_mir`."""

from llava_integration.attach import attach_mir
from llava_integration.llava import LlavaNextAdapter, OriginalLlavaAdapter
from llava_integration.tinyllava import TinyLlavaAdapter

__all__ = ["LlavaNextAdapter", "OriginalLlavaAdapter", "TinyLlavaAdapter", "attach_mir"]
