# SPDX-License-Identifier: Apache-2.0
"""Forward passes with hooks that capture the vision and text rows of each decoder layer; the loss on the texts.

Captured is what Hugging Face calls `hidden_states[1:]`: the output of every decoder layer, the last one after the
model's final norm. The norm is found by observation: it is the sibling of the layer list that is called on the last
layer's output.
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

from mir_callback import distributed
from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import Decoder, not_compiled, text_config
from mir_callback.model.modality import ModalityMasks

_CHUNK_TOKENS = 512  # whose logits are converted to float32 at a time

# Called with the index of a layer, its hidden states (n, d) and the indices of the vision rows and of the text rows.
# Must copy what it keeps: models overwrite their hidden states.
KeepRows = Callable[[int, Tensor, tuple[Tensor, ...]], None]


@dataclass
class _Forward:
    """State of the current forward, filled in by the hooks."""

    find_masks: Callable[[], ModalityMasks]
    keep: Tensor  # (B,) bool
    text_ids: Sequence[Tensor]
    vision: Tensor | None = None  # (B, S), of all samples
    masks: ModalityMasks | None = None  # of the kept samples
    positions: tuple[Tensor, ...] = ()
    calls: list[int] = field(default_factory=list)
    embeddings: Tensor | None = None
    first_input: Tensor | None = None
    last_output: Tensor | None = None
    after_norm: Tensor | None = None
    misshapen: tuple[int, tuple[int, ...]] | None = None  # the first layer with other positions, and its output's shape


class HiddenStateCapture:
    """Passes token rows to ``keep_rows``, layer by layer, over several forward passes.

    Use it as a context manager, which registers and removes the hooks. After every forward it checks how the layers
    were called, so that an unsupported model is refused and not measured wrongly. Without a ``text_loss`` logits are
    computed for one position only. With one, :meth:`only_loss` leaves the rows out of further forwards.

    With ``image_codes`` images may be tokens of the vocabulary, whose embeddings are all that the model has of them.
    """

    def __init__(
        self, decoder: Decoder, keep_rows: KeepRows, text_loss: TextLoss | None = None, *, image_codes: bool = False
    ) -> None:
        # For each batch (n, 2) int64 on the CPU, the number of vision and text rows of each kept sample, in order.
        self.sample_rows: list[Tensor] = []
        self._decoder = decoder
        self._last = len(decoder.layers) - 1
        self._keep_rows: KeepRows | None = keep_rows
        self._text_loss = text_loss
        self._hooks = ExitStack()
        self._forward: _Forward | None = None
        self._verified, self._image_codes = False, image_codes

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
        if self._decoder.embedding is not None:
            self._hooks.callback(self._decoder.embedding.register_forward_hook(self._embedding_hook).remove)
        head = getattr(model, "get_output_embeddings", _nothing)()
        head = not_compiled(head) if isinstance(head, nn.Module) else None
        if head is self._decoder.embedding:  # tied, and not called as a module for logits
            head = None
        if self._text_loss is not None:
            if head is None:
                self._hooks.close()
                raise _no_loss(f"{type(model).__name__} has no output embeddings")
            self._hooks.callback(head.register_forward_pre_hook(self._head_hook).remove)
        elif head is not None:
            # Not by `logits_to_keep`, with which a decoder may leave out positions of its last layers too.
            self._hooks.callback(head.register_forward_pre_hook(_last_position).remove)
        self._few_logits = head is None
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the hooks, also after an error."""
        self._hooks.close()
        self._forward = None

    def only_loss(self, text_loss: TextLoss) -> None:
        """From the next forward on keep no rows, and add the losses to this ``text_loss``."""
        self._text_loss, self._keep_rows = text_loss, None

    def forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        masks: ModalityMasks | Callable[[], ModalityMasks],
        keep: Tensor,
        text_ids: Sequence[Tensor] = (),
    ) -> None:
        """One ordinary top-level forward, in which the rows of the kept samples are captured.

        The caller sets evaluation mode and no_grad. Raises UnsupportedModelError if the model did not call its layers
        as expected. Collective under ZeRO-3, which gathers weights: every rank must call it equally often.

        Args:
            model: the model to call, bare or wrapped.
            inputs: keyword arguments of its forward, on its device, without labels.
            masks: vision and text positions of the sequence that the decoder layers get, on the same device; or a
                function that returns them once the first layer is reached, for models that place image features
                themselves.
            keep: (B,) bool; rows of the others are discarded.
            text_ids: token ids of each sample's text, for the loss on them.
        """
        seen = _Forward(masks if callable(masks) else lambda: masks, keep, text_ids)
        self._forward = seen
        outputs = model(**inputs, **lean_outputs(self._decoder.model, few_logits=self._few_logits))
        distributed.finish(outputs)
        self._check_calls(seen)
        final = seen.last_output if seen.after_norm is None else seen.after_norm
        assert final is not None
        assert seen.masks is not None
        if self._keep_rows is not None:
            self._keep_rows(self._last, final.flatten(0, 1), seen.positions)
            counts = torch.stack([seen.masks.vision.sum(dim=1), seen.masks.text.sum(dim=1)], dim=1)
            self.sample_rows.append(counts[keep].cpu())
        if self._text_loss is not None:
            self._text_loss.add(outputs, keep, getattr(text_config(self._decoder.model), "vocab_size", 0))
        self._forward = None

    def _layer_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen = self._forward
            if seen is None:
                return
            seen.calls.append(index)
            state = distributed.whole(output[0] if isinstance(output, tuple) else output)
            if seen.masks is None or state.shape[:-1] != seen.masks.vision.shape:
                seen.misshapen = seen.misshapen or (index, tuple(state.shape))  # refused after the forward
            elif index == self._last:
                seen.last_output = state
            elif self._keep_rows:
                # At once, because some families add features in place after the layer has returned.
                self._keep_rows(index, state.flatten(0, 1), seen.positions)

        return hook

    def _sibling_hook(self, _module: nn.Module, args: Any, output: Any) -> None:
        last = self._forward.last_output if self._forward is not None else None
        if self._forward is None or last is None or self._forward.after_norm is not None:
            return
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            if args[0].shape == last.shape == output.shape:
                self._forward.after_norm = distributed.whole(output)

    def _first_layer_hook(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        seen = self._forward
        if seen is None:
            return
        masks, keep = seen.find_masks(), seen.keep[:, None]
        seen.vision = masks.vision
        seen.masks = ModalityMasks(masks.vision & keep, masks.text & keep)
        # Once per batch: on a GPU, nonzero waits for all queued work.
        seen.positions = tuple(mask.flatten().nonzero()[:, 0] for mask in (seen.masks.vision, seen.masks.text))
        if self._text_loss is not None:
            self._text_loss.expect(masks.text, seen.text_ids)
        state = args[0] if args else kwargs.get("hidden_states")
        if seen.first_input is None and isinstance(state, Tensor):
            state = distributed.whole(state)
            seen.first_input = state if self._verified else state.clone()

    def _head_hook(self, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._text_loss is not None
        return self._text_loss.select(args)

    def _embedding_hook(self, _module: nn.Module, _args: Any, output: Any) -> None:
        seen = self._forward
        if seen is not None and seen.embeddings is None and isinstance(output, Tensor) and not self._verified:
            seen.embeddings = distributed.whole(output).clone()

    def _check_calls(self, seen: _Forward) -> None:
        """Refuse a model whose forward is not one pass of (batch, sequence, d) through the layers."""
        name = type(self._decoder.model).__name__
        expected = list(range(len(self._decoder.layers)))
        if seen.calls != expected:
            raise UnsupportedModelError(
                f"{name} is not supported: its forward called the {len(expected)} decoder layers in "
                f"{self._decoder.path} in the order {seen.calls}, not each of them once and in order."
            )
        assert seen.vision is not None  # the first layer ran
        shape = (*seen.vision.shape, self._decoder.hidden_size)
        got = () if seen.first_input is None else tuple(seen.first_input.shape)
        if got != shape:
            raise UnsupportedModelError(f"{name} is not supported: {_explain_shape(got, shape)}")
        if seen.misshapen is not None:
            layer, found = seen.misshapen
            raise UnsupportedModelError(
                f"{name} is not supported: its decoder layer {layer + 1} returned hidden states of shape {found}, and "
                f"input_ids imply {shape}."
            )
        if self._verified:
            return
        if seen.embeddings is not None and seen.embeddings.shape == shape and not self._image_codes:
            assert seen.first_input is not None
            plain = (seen.first_input[seen.vision] == seen.embeddings[seen.vision]).all(dim=-1)
            if bool(plain.any()):
                raise UnsupportedModelError(
                    f"{name}: {int(plain.sum())} of {len(plain)} vision positions have plain token embeddings and no "
                    "image features. Either the images did not reach the model, or it mixes them in by "
                    "cross-attention, which MIR does not cover."
                )
        self._verified = bool(seen.vision.any())  # with images, that is


class TextLoss:
    """Sums the negative log-likelihood of text tokens, given the image and the text before them.

    All text tokens of a sample but the first are predicted. Logits are only computed at the positions before them.
    """

    def __init__(self) -> None:
        # For each batch (n, 2) float64 on the CPU, the summed loss in nats and the number of predicted tokens of each
        # kept sample, in order.
        self.samples: list[Tensor] = []
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._before = torch.zeros(0, dtype=torch.int64)
        self._targets = torch.zeros(0, dtype=torch.int64)
        self._shape: tuple[int, ...] = ()

    def expect(self, text: Tensor, text_ids: Sequence[Tensor]) -> None:
        """Set the targets of the next logits, from text positions (B, S) bool of all samples.

        Of all, as ranks that share them keep different ones and must call the output embeddings alike. A sample may
        have more token ids than positions: the model may have cut its text.
        """
        before, targets = [], []
        self._shape = tuple(text.shape)
        for row, (mask, ids) in enumerate(zip(text, text_ids, strict=True)):
            positions = mask.nonzero()[:, 0]
            if len(positions) > len(ids):
                raise _no_loss(f"a sample has {len(positions)} text positions but only {len(ids)} token ids")
            before.append(row * text.shape[1] + positions[1:] - 1)  # an image may stand between two texts
            targets.append(ids.to(text.device)[1 : len(positions)])
        self._before, self._targets = torch.cat(before), torch.cat(targets)
        self._counts = torch.tensor([len(each) for each in targets], device=text.device)

    def select(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of the arguments of the output embeddings, hidden states (B, S, d), those to predict from, (1, n, d)."""
        hidden = args[0]
        if tuple(hidden.shape[:-1]) != self._shape:
            got = tuple(hidden.shape[:-1])
            raise _no_loss(f"its output embeddings get hidden states of {got} positions, not of all {self._shape}")
        chosen = distributed.whole(hidden).flatten(0, 1).index_select(0, self._before)[None]
        return (distributed.replicated_like(chosen, hidden), *args[1:])

    def add(self, outputs: Any, keep: Tensor, vocabulary: int) -> None:
        """Add the losses of a model's outputs, with logits (1, n, vocabulary), for the samples of ``keep``, (B,)."""
        logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[0]
        if logits is None:
            raise _no_loss("its forward returned no logits")
        logits = distributed.whole(logits)
        if tuple(logits.shape[:-1]) != (1, len(self._targets)):
            got = tuple(logits.shape[:-1])
            raise _no_loss(f"its logits are of {got} positions, not of the {len(self._targets)} asked for")
        if logits.shape[-1] < vocabulary:
            raise _no_loss(
                f"its logits are of {logits.shape[-1]} of {vocabulary} tokens, as tensor parallelism leaves them "
                "on each rank (the output embeddings can gather them: output_layouts=Replicate())"
            )
        sums = torch.zeros(len(self._counts), dtype=torch.float64, device=logits.device)
        samples = torch.repeat_interleave(self._counts)
        for start in range(0, len(self._targets), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            loss = functional.cross_entropy(logits[0, part].float(), self._targets[part], reduction="none")
            sums.index_add_(0, samples[part], loss.double())
        self.samples.append(torch.stack([sums, self._counts.double()], dim=1)[keep].cpu())


def _explain_shape(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Why a first decoder layer got hidden states of another shape than (B, S, d)."""
    *positions, hidden = expected
    found = f"its first decoder layer got hidden states of shape {got}, where input_ids imply {expected}"
    if len(got) > 3 or (list(got[:-1]) == positions and got[-1] != hidden):
        return f"it has several residual streams between its layers ({found}), and MIR is defined for one."
    return (
        f"{found}. An encoder-decoder has two sequences; a model that inserts image features itself needs an adapter."
    )


def _no_loss(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"probe_loss and vision_gain can't be measured here: {why}. Set probe_loss=False and vision_gain=False."
    )


def _nothing() -> None:
    """Default of a method that a model may lack."""


def lean_outputs(model: nn.Module, *, few_logits: bool) -> dict[str, Any]:
    """Keyword arguments that save memory in the forward: no cache, and on request logits of one position."""
    lean: dict[str, Any] = {"use_cache": False} if _accepts(model, "use_cache") else {}
    logits = _logits_argument(model)
    if logits is not None and few_logits:
        lean[logits] = 1
    return lean


def _logits_argument(model: nn.Module) -> str | None:
    """The name of the forward's argument that limits logits to the last positions, or None."""
    parameters = inspect.signature(type(model).forward).parameters
    if "num_logits_to_keep" in parameters:
        return "num_logits_to_keep"
    return "logits_to_keep" if _accepts(model, "logits_to_keep") else None


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _last_position(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Logits of one position, as all would be B x S x vocabulary floats."""
    is_sequence = bool(args) and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].is_floating_point()
    return (args[0][:, -1:], *args[1:]) if is_sequence else None
