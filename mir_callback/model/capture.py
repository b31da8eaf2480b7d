# SPDX-License-Identifier: Apache-2.0
"""Forward passes with hooks that hand on only the vision and text rows of each decoder layer, and the loss on texts.

Handed on is what Hugging Face calls `hidden_states[1:]`: the output of every decoder layer, the last one after the
model's final norm. Which module that norm is, is observed and not guessed: it is the sibling of the layer list that
is called on the last layer's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import Decoder
from mir_callback.model.modality import ModalityMasks

_CHUNK_TOKENS = 512  # whose logits are held in float32 at a time

# Takes the index of a layer, its hidden states (n, d) and the positions among them of vision rows and of text rows.
# Must copy what it keeps: models overwrite their hidden states.
KeepRows = Callable[[int, Tensor, tuple[Tensor, ...]], None]


@dataclass
class _Forward:
    """What the hooks see of the forward under way; ``keep`` (B,) and ``find_masks`` are given."""

    find_masks: Callable[[], ModalityMasks]
    keep: Tensor
    text_ids: Sequence[Tensor]
    vision: Tensor | None = None  # (B, S) of all samples
    masks: ModalityMasks | None = None  # of those that are kept
    positions: tuple[Tensor, ...] = ()
    calls: list[int] = field(default_factory=list)
    embeddings: Tensor | None = None
    first_input: Tensor | None = None
    last_output: Tensor | None = None
    after_norm: Tensor | None = None


class HiddenStateCapture:
    """Hands on token rows layer by layer over several forward passes.

    Use as a context manager: hooks exist only inside it. After every forward the call pattern is checked, so that a
    model this recipe does not fit is refused instead of measured wrongly. Without a ``text_loss`` logits are computed
    of one position only.
    """

    def __init__(self, decoder: Decoder, keep_rows: KeepRows, text_loss: TextLoss | None = None) -> None:
        # For each batch (n, 2) int64 on the CPU, the vision and text rows of each kept sample; rows lie in that order.
        self.sample_rows: list[Tensor] = []
        self._decoder = decoder
        self._last = len(decoder.layers) - 1
        self._keep_rows = keep_rows
        self._text_loss = text_loss
        self._hooks = ExitStack()
        self._forward: _Forward | None = None
        self._verified = False

    def __enter__(self) -> HiddenStateCapture:
        """Register the hooks."""
        layers, model = self._decoder.layers, self._decoder.model
        handles: list[Any] = [
            *(layer.register_forward_hook(self._layer_hook(index)) for index, layer in enumerate(layers)),
            *(sibling.register_forward_hook(self._sibling_hook) for sibling in self._decoder.siblings),
            layers[0].register_forward_pre_hook(self._first_layer_hook, with_kwargs=True),
        ]
        for handle in handles:
            self._hooks.callback(handle.remove)
        embedding = getattr(model, "get_input_embeddings", _nothing)()
        if isinstance(embedding, nn.Module):
            self._hooks.callback(embedding.register_forward_hook(self._embedding_hook).remove)
        head = getattr(model, "get_output_embeddings", _nothing)()
        if self._text_loss is not None:
            if not isinstance(head, nn.Module):
                self._hooks.close()
                raise UnsupportedModelError(
                    f"probe_loss needs output embeddings, and {type(model).__name__} has none; switch it off"
                )
            self._hooks.callback(head.register_forward_pre_hook(self._text_loss.select).remove)
        elif isinstance(head, nn.Module) and _logits_argument(model) is None:
            self._hooks.callback(head.register_forward_pre_hook(_last_position).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the hooks, also after an error."""
        self._hooks.close()
        self._forward = None

    def forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        masks: ModalityMasks | Callable[[], ModalityMasks],
        keep: Tensor,
        text_ids: Sequence[Tensor] = (),
    ) -> None:
        """One ordinary top-level forward; the rows of its kept samples are handed on.

        The caller sees to evaluation mode and no_grad. Raises UnsupportedModelError if the model did not call its
        layers as expected. Collective under ZeRO-3 (it gathers weights): every rank must call it equally often.

        Args:
            model: the model to call, bare or wrapped.
            inputs: keyword arguments of its forward, on its device, without labels.
            masks: those of the sequence the decoder layers see, on the same device; or what tells them once the first
                layer is reached, for models that place image features themselves.
            keep: (B,) bool; False for padding repeats, whose rows are discarded.
            text_ids: token ids of each sample's text, for the loss on them.
        """
        seen = _Forward(masks if callable(masks) else lambda: masks, keep, text_ids)
        self._forward = seen
        outputs = model(**inputs, **_lean_outputs(self._decoder.model, all_logits=self._text_loss is not None))
        self._check_calls(seen)
        final = seen.last_output if seen.after_norm is None else seen.after_norm
        assert final is not None
        self._keep_rows(self._last, final.flatten(0, 1), seen.positions)
        assert seen.masks is not None
        counts = torch.stack([seen.masks.vision.sum(dim=1), seen.masks.text.sum(dim=1)], dim=1)
        self.sample_rows.append(counts[keep].cpu())
        if self._text_loss is not None:
            self._text_loss.add(outputs)
        self._forward = None

    def _layer_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen = self._forward
            if seen is None:
                return
            seen.calls.append(index)
            state = output[0] if isinstance(output, tuple) else output
            if index == self._last:
                seen.last_output = state
            elif seen.masks is not None and state.shape[:-1] == seen.masks.vision.shape:
                # Handed on here and now: some families add features in place after the layer has returned. Another
                # shape is left to the check after the forward, which refuses it with a reason.
                self._keep_rows(index, state.flatten(0, 1), seen.positions)

        return hook

    def _sibling_hook(self, _module: nn.Module, args: Any, output: Any) -> None:
        last = self._forward.last_output if self._forward is not None else None
        if self._forward is None or last is None or self._forward.after_norm is not None:
            return
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            if args[0].shape == last.shape == output.shape:
                self._forward.after_norm = output

    def _first_layer_hook(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        seen = self._forward
        if seen is None:
            return
        masks, keep = seen.find_masks(), seen.keep[:, None]
        seen.vision = masks.vision
        seen.masks = ModalityMasks(masks.vision & keep, masks.text & keep)
        # Found once a batch: on a GPU, looking for them waits for all work under way.
        seen.positions = tuple(mask.flatten().nonzero()[:, 0] for mask in (seen.masks.vision, seen.masks.text))
        if self._text_loss is not None:
            self._text_loss.expect(seen.masks.text, seen.text_ids)
        state = args[0] if args else kwargs.get("hidden_states")
        if seen.first_input is None and isinstance(state, Tensor):
            seen.first_input = state if self._verified else state.clone()

    def _embedding_hook(self, _module: nn.Module, _args: Any, output: Any) -> None:
        seen = self._forward
        if seen is not None and seen.embeddings is None and isinstance(output, Tensor) and not self._verified:
            seen.embeddings = output.clone()

    def _check_calls(self, seen: _Forward) -> None:
        """Refuse a model whose forward does not look like one pass of (batch, sequence, d) through the layers."""
        name = type(self._decoder.model).__name__
        expected = list(range(len(self._decoder.layers)))
        if seen.calls != expected:
            raise UnsupportedModelError(
                f"{name}: every decoder layer in {self._decoder.path} must run exactly once and in order, "
                f"got {seen.calls} for {len(expected)} layers; this architecture is not supported"
            )
        assert seen.vision is not None  # the first layer ran
        shape = (*seen.vision.shape, self._decoder.hidden_size)
        got = None if seen.first_input is None else tuple(seen.first_input.shape)
        if got != shape:
            raise UnsupportedModelError(
                f"{name}: the first decoder layer must read (batch, sequence, hidden) = {shape} as input_ids has it, "
                f"got {got}; models that splice or prepend image features themselves need an adapter"
            )
        if self._verified:
            return
        if seen.embeddings is not None and seen.embeddings.shape == shape:
            assert seen.first_input is not None
            plain = (seen.first_input[seen.vision] == seen.embeddings[seen.vision]).all(dim=-1)
            if bool(plain.any()):
                raise UnsupportedModelError(
                    f"{name}: {int(plain.sum())} of {len(plain)} vision positions hold plain token embeddings, no "
                    "image features; either the model mixes vision in by cross-attention, which MIR does not cover, "
                    "or the images did not reach it"
                )
        self._verified = True


class TextLoss:
    """Sums the negative log-likelihood of text tokens given the image and the text before them.

    Predicted are all text tokens of a sample but its first, from the positions before each; only at those are logits
    computed.
    """

    def __init__(self) -> None:
        self.total = 0.0  # in nats, of the samples kept so far
        self.count = 0  # tokens predicted
        self._before = torch.zeros(0, dtype=torch.int64)
        self._targets = torch.zeros(0, dtype=torch.int64)
        self._shape: tuple[int, ...] = ()

    def expect(self, text: Tensor, text_ids: Sequence[Tensor]) -> None:
        """Note what the next logits predict, from text positions (B, S) bool of the samples that are kept.

        The token ids of each sample's text are more than its positions where those were cut.
        """
        before, targets = [], []
        self._shape = tuple(text.shape)
        for row, (mask, ids) in enumerate(zip(text, text_ids, strict=True)):
            positions = mask.nonzero()[:, 0]
            if len(positions) > len(ids):
                raise UnsupportedModelError(
                    f"probe_loss needs a token id for each text position, got {len(ids)} for {len(positions)}; "
                    "switch probe_loss off for this model"
                )
            before.append(row * text.shape[1] + positions[:-1])
            targets.append(ids.to(text.device)[1 : len(positions)])
        self._before, self._targets = torch.cat(before), torch.cat(targets)

    def select(self, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of the output embeddings: of hidden states (B, S, d) keep those to predict from, (1, n, d)."""
        hidden = args[0]
        if tuple(hidden.shape[:-1]) != self._shape:
            raise UnsupportedModelError(
                f"probe_loss needs hidden states of all positions {self._shape} at the output embeddings, got "
                f"{tuple(hidden.shape[:-1])}; switch probe_loss off for this model"
            )
        return (hidden.flatten(0, 1).index_select(0, self._before)[None], *args[1:])

    def add(self, outputs: Any) -> None:
        """Add what a model's outputs say, whose logits are (1, n, vocabulary)."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if tuple(logits.shape[:-1]) != (1, len(self._targets)):
            raise UnsupportedModelError(
                f"probe_loss needs logits of {len(self._targets)} positions, got {tuple(logits.shape[:-1])}; switch "
                "probe_loss off for this model"
            )
        for start in range(0, len(self._targets), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            loss = functional.cross_entropy(logits[0, part].float(), self._targets[part], reduction="none")
            self.total += loss.double().sum().item()
        self.count += len(self._targets)


def _nothing() -> None:
    """Stands for what is not there to be called."""


def _lean_outputs(model: nn.Module, *, all_logits: bool) -> dict[str, Any]:
    """Keyword arguments that keep the forward lean: no cache, and unless asked for, logits of one position only."""
    lean: dict[str, Any] = {"use_cache": False} if _accepts(model, "use_cache") else {}
    logits = _logits_argument(model)
    if logits is not None and not all_logits:
        lean[logits] = 1
    return lean


def _logits_argument(model: nn.Module) -> str | None:
    """The argument that limits logits to the last positions, by this model's name for it, or None."""
    parameters = inspect.signature(type(model).forward).parameters
    if "num_logits_to_keep" in parameters:
        return "num_logits_to_keep"
    return "logits_to_keep" if _accepts(model, "logits_to_keep") else None


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _last_position(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Logits of one position, for models that have no argument for it: the rest would be B x S x vocabulary floats."""
    return (args[0][:, -1:], *args[1:])
