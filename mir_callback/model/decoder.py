# SPDX-License-Identifier: Apache-2.0
"""Find the language model's decoder layers inside a Hugging Face vision-language model.

No path is hard-coded: families put the decoder under `model.language_model`, `model.text_model`,
`language_model.model` and others. The rule: call `get_decoder()` until it returns the module itself, then take the
ModuleList, preferably named `layers`, with as many members as the text configuration has hidden layers.

A model that is not transformers' says where they are with :func:`decoder_at`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mir_callback.errors import UnsupportedModelError

_NOT_TEXT = ("vision", "visual", "audio", "image", "qformer", "perceiver", "vq")


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a model, whose hidden states are captured."""

    model: nn.Module  # the unwrapped top-level model
    path: str  # name of the layer list in `model`, for messages
    layers: tuple[nn.Module, ...]  # the decoder layers, in order
    siblings: tuple[nn.Module, ...]  # the other children of the layer list's parent, the final norm among them
    embedding: nn.Module | None  # of the tokens, by whose output vision positions without image features are known
    hidden_size: int  # width d of the hidden states


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside `torch.compile`, DDP, a DeepSpeed engine or PEFT. Ranks: pure.

    PEFT's adapters are inside the modules of the model returned, so its forward includes them.
    """
    current: Any = model
    while True:
        if isinstance(getattr(current, "_orig_mod", None), nn.Module):
            current = current._orig_mod
        elif isinstance(getattr(current, "module", None), nn.Module):
            current = current.module
        elif hasattr(current, "peft_config") and hasattr(current, "get_base_model"):
            current = current.get_base_model()
        else:
            found: nn.Module = current
            return found


def not_compiled(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, which runs its hooks; any other module itself. Ranks: pure."""
    inner: Any = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def text_config(model: nn.Module) -> Any:
    """The language model's part of ``model.config``. Ranks: pure."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Hugging Face config. Pass a transformers vision-language model."
        )
    if not hasattr(config, "get_text_config"):  # older transformers
        return getattr(config, "text_config", config)
    try:
        return config.get_text_config(decoder=True)
    except TypeError:  # older transformers have no `decoder` argument
        return config.get_text_config()


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of a Hugging Face vision-language model, bare or wrapped. Ranks: pure.

    Raises UnsupportedModelError if there is no such layer list, or the model has no configuration.
    """
    top = unwrap(model)
    config = text_config(top)
    wanted = getattr(config, "num_hidden_layers", None)
    root = _decoder_root(top)
    if wanted is None:
        raise UnsupportedModelError(
            f"{type(top).__name__} has no decoder layers that its config tells of (num_hidden_layers of its language "
            "model). MIR needs a decoder-only language model."
        )
    found = [
        (name, module)
        for name, module in root.named_modules()
        if name and isinstance(module, nn.ModuleList) and len(module) == wanted
        if not any(word in name.lower() for word in _NOT_TEXT)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(root).__name__} in {type(top).__name__} has no ModuleList of {wanted} decoder layers. MIR needs a "
            "decoder-only language model with all its layers in one ModuleList; a stage of a pipeline has only some."
        )
    # `layers` first, then nearest the top.
    name, layers = min(found, key=lambda item: (item[0].split(".")[-1] != "layers", item[0].count("."), item[0]))
    owner = root.get_submodule(name.rpartition(".")[0])
    siblings = tuple(not_compiled(child) for child in owner.children() if child is not layers)
    path = next((name for name, module in top.named_modules() if module is layers), "layers")
    embedding = getattr(top, "get_input_embeddings", lambda: None)()
    embedding = not_compiled(embedding) if isinstance(embedding, nn.Module) else None
    return Decoder(top, path, tuple(map(not_compiled, layers)), siblings, embedding, int(config.hidden_size))


def decoder_at(model: nn.Module, layers: str, *, embedding: str, hidden_size: int) -> Decoder:
    """The decoder of a model of any kind, from the names of its modules. Ranks: pure.

    Args:
        model: the model, bare or wrapped.
        layers: name of the ModuleList, ModuleDict or Sequential of its decoder layers, e.g. "decoder.blocks". Each
            takes hidden states (B, S, d) first and returns them, alone or first in a tuple; the final norm is beside
            them.
        embedding: name of the token embedding.
        hidden_size: d.

    Raises:
        UnsupportedModelError: the model has no such module.
    """
    top = unwrap(model)
    found = {name: module for name, module in top.named_modules() if name in (layers, embedding)}
    for name in (layers, embedding):
        if name not in found:
            raise UnsupportedModelError(f"{type(top).__name__} has no module {name!r}, which its adapter names.")
    if not isinstance(found[layers], nn.ModuleList | nn.ModuleDict | nn.Sequential) or not len(found[layers]):
        raise UnsupportedModelError(
            f"{layers!r} of {type(top).__name__}, which its adapter names, is a {type(found[layers]).__name__}; name "
            "the ModuleList, ModuleDict or Sequential of the decoder layers."
        )
    owner = top.get_submodule(layers.rpartition(".")[0])
    siblings = tuple(not_compiled(child) for child in owner.children() if child is not found[layers])
    inner = tuple(map(not_compiled, found[layers].children()))
    return Decoder(top, layers, inner, siblings, not_compiled(found[embedding]), hidden_size)


def _decoder_root(top: nn.Module) -> nn.Module:
    """`get_decoder()`, repeated until it returns the module itself."""
    module: Any = top
    while callable(getattr(module, "get_decoder", None)):
        below = module.get_decoder()
        if below is None or below is module:
            break
        module = below
    root: nn.Module = module
    return root
