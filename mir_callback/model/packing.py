# SPDX-License-Identifier: Apache-2.0
"""Attention that was replaced for packed sequences, which may take a mask of padding for something else.

Training code that packs several samples into one sequence replaces the attention of transformers' decoder layers by a
function for sequences of several lengths. Some of these take `attention_mask` for the cumulative lengths: a mask of
padding then gives another number, and no error. Such a replacement is found by what it is: a function in the decoder
layers, or in the places where transformers looks attention up, that is defined elsewhere than the layers and handles
lengths of sequences. It is measured with one sample a batch, without padding, and the lengths where it reads them; a
trial shows that it takes the sample for one sequence.

Other replacements handle no lengths of sequences: fused norms and losses, adapters, quantized layers, wrappers around
a forward. They get ordinary batches.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback import distributed
from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import Decoder, text_config

_LENGTHS = ("cu_seq", "cu_lens", "varlen", "seqlens", "seq_lens")  # as kernels for several lengths call them
_CUMULATIVE = "cu_"
_MASK = "attention_mask"
# What leaves the numbers of a tensor as they are.
_SAME_NUMBERS = ("squeeze", "view", "reshape", "flatten", "to", "int", "long", "contiguous", "clone", "type", "detach")
# Where transformers' layers look attention up, beside their own file and the registry.
_SHARED = ("transformers.modeling_flash_attention_utils", "transformers.integrations.flash_attention")
_TRUSTED = ("transformers", "torch", "flash_attn", "flash_attn_interface", "kernels")
_CLEARLY = 10.0  # times the noise of a forward
INSTEAD = (
    "Train without it (in qwen-vl-finetune without data_flatten and data_packing), or evaluate the checkpoints with "
    "`mir eval`."
)


@dataclass(frozen=True)
class PackedAttention:
    """A function for sequences of several lengths in the place of a decoder's attention."""

    name: str
    file: str
    readers: tuple[nn.Module, ...]  # attention modules that take attention_mask for cumulative lengths; often none

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


def find_packed_attention(decoder: Decoder) -> PackedAttention | None:
    """The replacement that decoder layers use, the first one found; None if there is none.

    Ranks: any; no communication.
    """
    found: dict[FunctionType, list[nn.Module]] = {}
    for module, function in _replaced_methods(decoder):
        found.setdefault(function, []).append(module)
    inner = (module for layer in decoder.layers for module in layer.modules() if module is not layer)
    attention = [module for module in inner if "attention" in type(module).__name__.lower()]
    for function in _replaced_lookups(decoder):
        found[function] = attention
    parts = {function: _reachable(function) for function in found}
    packed = [function for function in found if any(map(_handles_lengths, parts[function]))]
    reading = [function for function in packed if any(map(_takes_mask_for_lengths, parts[function]))]
    # Of a model of one's own, functions in other files of its package are most often its own attention.
    package = _package(_home(decoder.layers[0]))
    packed = [function for function in packed if function in reading or _package(_where(function)) != package]
    if not packed:
        return None
    readers = {id(module): module for function in reading for module in found[function]}
    first = (reading or packed)[0]
    return PackedAttention(
        f"{first.__module__}.{first.__qualname__}", first.__code__.co_filename, tuple(readers.values())
    )


@contextmanager
def one_sequence(decoder: Decoder, packed: PackedAttention | None) -> Iterator[None]:
    """Inside, attention takes no sample for several sequences.

    A replacement that takes its mask for cumulative lengths gets those of one sequence, (0, S), also in the place of
    lengths that its modules keep from a training step, which are restored; forwards must have one sample without
    padding. transformers' own flash attention takes positions that don't count up one by one for those of packed
    sequences, and some families hand it positions in time, height and width: it gets 0 to S - 1 instead, which changes
    nothing else, as these layers have their rotary embeddings already. Ranks: any; no communication.
    """
    with ExitStack() as restored:
        for module in packed.readers if packed is not None else ():
            handle = module.register_forward_pre_hook(_give_lengths, with_kwargs=True)
            restored.callback(handle.remove)
            for name in _kept_lengths(module):
                restored.callback(setattr, module, name, getattr(module, name))
        if "flash" in str(_implementation(decoder)):
            for layer in decoder.layers:
                restored.callback(layer.register_forward_pre_hook(_give_positions, with_kwargs=True).remove)
        yield


def check_one_sequence(packed: PackedAttention, decoder: Decoder, forward: Callable[[], Any]) -> None:
    """Try on one sample whether its last token sees its first one, as it does in no other split into sequences.

    Three forwards: two as they are, whose difference is noise, and one in which another hidden state enters the
    decoder layers first. UnsupportedModelError if the last one doesn't change more than by noise. Ranks: as of
    ``forward``.

    Args:
        packed: the replacement, for the message.
        decoder: the decoder.
        forward: forwards one sample without padding, inside :func:`one_sequence`.
    """
    plain, again, other = (_last_states(decoder, forward, change) for change in (False, False, True))
    noise, change = ((state - plain)[0, -1].abs().max() for state in (again, other))
    if not bool(change > _CLEARLY * noise):  # also if one is NaN
        raise UnsupportedModelError(
            f"MIR can't be measured with the attention of {packed}, which replaces that of "
            f"{type(decoder.layers[0]).__name__}: in one sample without padding, the hidden state of the last token "
            f"changes by {change.item():.3g} with that of the first one, and by {noise.item():.3g} without a reason. "
            f"So it takes the sample for several. {INSTEAD}"
        )


def _last_states(decoder: Decoder, forward: Callable[[], Any], change_first: bool) -> Tensor:
    """Hidden states (1, S, d) after the last decoder layer, float32; if asked, with another first one before them."""
    seen: list[Tensor] = []

    def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = (args[0] if args else kwargs["hidden_states"]).clone()
        state[:, 0] = state[:, 0].roll(1, dims=-1)
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        state = distributed.whole(output[0] if isinstance(output, tuple) else output)
        seen.append(state.float().clone())  # some families write to it afterwards

    with ExitStack() as hooks:
        hooks.callback(decoder.layers[-1].register_forward_hook(keep).remove)
        if change_first:
            hooks.callback(decoder.layers[0].register_forward_pre_hook(change, with_kwargs=True).remove)
        forward()
    return seen[0]


def _give_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = args[0] if args else kwargs["hidden_states"]
    lengths = torch.tensor([0, state.shape[1]], dtype=torch.int32, device=state.device)
    for name in _kept_lengths(module):
        setattr(module, name, lengths)
    return args, {**kwargs, _MASK: lengths}


def _give_positions(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    positions = kwargs.get("position_ids")
    if kwargs.get("position_embeddings") is None or positions is None or positions.ndim < 3:
        return None
    plain = torch.arange(positions.shape[-1], device=positions.device).expand(positions.shape[-2:])
    return args, {**kwargs, "position_ids": plain}


def _kept_lengths(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if "cu_seq" in name and isinstance(value, Tensor)]


def _replaced_methods(decoder: Decoder) -> Iterator[tuple[nn.Module, FunctionType]]:
    """Methods in decoder layers that another file defines than that of the layer's class, and their modules."""
    of_classes: dict[tuple[type, str], list[FunctionType]] = {}
    for layer in decoder.layers:
        home = _home(layer)
        for module in layer.modules():
            kind = type(module)
            if (kind, home) not in of_classes:
                parts = (each for each in kind.__mro__ if _package(each.__module__) != "torch")
                methods = (method for part in parts for method in vars(part).values())
                found = (each for method in methods for each in _links(method))
                of_classes[kind, home] = [each for each in found if _is_foreign(each, home)]
            own = (each for each in _links(vars(module).get("forward")) if _is_foreign(each, home))
            for function in (*own, *of_classes[kind, home]):
                yield module, function


def _replaced_lookups(decoder: Decoder) -> Iterator[FunctionType]:
    """Functions where transformers' layers look attention and masks up that transformers does not define."""
    home = _home(decoder.layers[0])
    for name in (home, *_SHARED):
        for key, value in vars(sys.modules[name]).items() if name in sys.modules else ():
            if "attention" in key or "mask" in key:
                yield from (function for function in _links(value) if _is_foreign(function, home))
    registry: Any = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    used = _implementation(decoder)
    if used in registry:
        yield from (function for function in _links(registry[used]) if _is_foreign(function, home))


def _implementation(decoder: Decoder) -> Any:
    has_config = getattr(decoder.model, "config", None) is not None  # a model of another kind has none
    return getattr(text_config(decoder.model), "_attn_implementation", None) if has_config else None


def _home(layer: nn.Module) -> str:
    """The file of a layer's class; not of the class that FSDP2 makes of it."""
    return next(kind.__module__ for kind in type(layer).__mro__ if "forward" in vars(kind))


def _is_foreign(function: FunctionType, home: str) -> bool:
    where = _where(function)
    return where != home and _package(where) not in _TRUSTED


def _package(module: str) -> str:
    return module.partition(".")[0]


def _where(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__"))  # `__module__` may be that of what it wraps


def _links(method: Any) -> Iterator[FunctionType]:
    """A function, what it is bound or partial of, and all that it wraps."""
    seen: set[int] = set()
    while method is not None and id(method) not in seen:
        seen.add(id(method))
        if isinstance(method, FunctionType):
            yield method
        if isinstance(method, functools.partial):
            method = method.func
        elif isinstance(method, classmethod | staticmethod) or inspect.ismethod(method):
            method = method.__func__
        else:
            method = getattr(method, "__wrapped__", None)


def _reachable(function: FunctionType) -> list[FunctionType]:
    """A function and those of its own package that it names or closes over, and so on."""
    package, found, queue = _package(_where(function)), list[FunctionType](), [function]
    while queue:
        each = queue.pop()
        if each in found or _package(_where(each)) != package:
            continue
        found.append(each)
        closed: list[Any] = []
        for cell in each.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                closed.append(cell.cell_contents)
        named = [each.__globals__.get(name) for code in _codes(each.__code__) for name in code.co_names]
        queue += [part for value in (*closed, *named) if callable(value) for part in _links(value)]
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _handles_lengths(function: FunctionType) -> bool:
    for code in _codes(function.__code__):
        texts = (each for each in code.co_consts if isinstance(each, str) and each.isidentifier())
        for name in (*code.co_names, *code.co_varnames, *code.co_freevars, *texts):
            if any(word in name.lower() for word in _LENGTHS):
                return True
    return False


def _takes_mask_for_lengths(function: FunctionType) -> bool:
    """Whether a variable or an argument for cumulative lengths gets the numbers of `attention_mask`, by its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False  # then the trial decides
    masks = {_MASK}
    nodes = sorted((node for node in ast.walk(tree) if hasattr(node, "lineno")), key=lambda node: node.lineno)
    for node in nodes:
        if isinstance(node, ast.Assign) and _same_numbers_as(node.value) in masks:
            for target in node.targets:
                if isinstance(target, ast.Name):
                    if target.id.startswith(_CUMULATIVE):
                        return True
                    masks.add(target.id)
        if isinstance(node, ast.keyword) and (node.arg or "").startswith(_CUMULATIVE):
            if _same_numbers_as(node.value) in masks:
                return True
    return False


def _same_numbers_as(node: ast.expr) -> str | None:
    """The variable whose numbers an expression has, in another shape or type."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SAME_NUMBERS:
        node = node.func.value
    return node.id if isinstance(node, ast.Name) else None
