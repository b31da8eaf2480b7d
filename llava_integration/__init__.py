# SPDX-License-Identifier: Apache-2.0
"""Adapters for models of LLaVA's code bases. Importing this package registers them; mir_callback does so by itself."""

from typing import Any

from llava_integration import llava, tinyllava
from llava_integration.llava import LlavaNextAdapter, OriginalLlavaAdapter
from llava_integration.tinyllava import TinyLlavaAdapter
from mir_callback.probe.adapters import register_adapter

__all__ = ["LlavaNextAdapter", "OriginalLlavaAdapter", "TinyLlavaAdapter", "attach_mir"]

for _factory in (llava.make_adapter, tinyllava.make_adapter):
    register_adapter(_factory, fallback=True)


def __getattr__(name: str) -> Any:
    # Not imported above, because adapters are also used without a training loop.
    if name == "attach_mir":
        from mir_callback.integrations.huggingface import attach_mir

        return attach_mir
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
