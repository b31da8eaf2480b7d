# SPDX-License-Identifier: Apache-2.0
"""Forward passes with hooks that keep only the vision and text rows of each decoder layer.

What is kept is what Hugging Face calls `hidden_states[1:]`: the output of every decoder layer, the last one after the
model's final norm. Which module that norm is, is observed and not guessed: it is the sibling of the layer list that
is called on the last layer's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback.errors import UnsupportedModelError
from mir_callback.evaluation.hidden_states import Stash
from mir_callback.model.decoder import Decoder
from mir_callback.model.modality import ModalityMasks
from mir_callback.model.text_loss import TextLoss


class HiddenStateCapture:
    """Collects token rows layer by layer over several forward passes.

    Use as a context manager: hooks exist only inside it. After every forward the call pattern is checked, so that a
    model this recipe does not fit is refused instead of measured wrongly.

    Args:
        decoder: of the model.
        stash: where rows go, in the dtype of the hidden states; by default all of them to memory on their device.
        look: called at the end of each layer, when a forward needs its memory.
        text_loss: what sums the loss on the texts, or None to compute logits of one position only.

    Attributes:
        sample_rows: for each batch (n, 2) int64 on the CPU, how many vision and text rows each kept sample has; the
            rows lie in that order.
    """

    def __init__(
        self,
        decoder: Decoder,
        stash: Stash | None = None,
        look: Callable[[], None] | None = None,
        text_loss: TextLoss | None = None,
    ) -> None:
        self._decoder = decoder
        self._text_loss = text_loss
        self._text_ids: Sequence[Tensor] = ()
        self._stash = Stash(range(len(decoder.layers))) if stash is None else stash
        self._look = look or _nothing
        self._hooks = ExitStack()
        self._find_masks: Callable[[], ModalityMasks] | None = None
        self._keep_rows: Tensor | None = None
        self._masks: ModalityMasks | None = None
        self._positions: tuple[Tensor, ...] = ()
        self._vision_positions: Tensor | None = None
        self._calls: list[int] = []
        self._last_output: Tensor | None = None
        self._last_after_norm: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._first_input: Tensor | None = None
        self._verified = False
        self.sample_rows: list[Tensor] = []

    def __enter__(self) -> HiddenStateCapture:
        """Register the hooks."""
        for index, layer in enumerate(self._decoder.layers):
            self._keep(layer.register_forward_hook(self._layer_hook(index)))
        for sibling in self._decoder.siblings:
            self._keep(sibling.register_forward_hook(self._sibling_hook))
        first = self._decoder.layers[0]
        self._keep(first.register_forward_pre_hook(self._first_layer_input, with_kwargs=True))
        head = getattr(self._decoder.model, "get_output_embeddings", _nothing)()
        if self._text_loss is not None:
            if not isinstance(head, nn.Module):
                raise UnsupportedModelError(
                    f"probe_loss needs a model with output embeddings, got {type(self._decoder.model).__name__} "
                    "without; switch it off"
                )
            self._keep(head.register_forward_pre_hook(self._text_loss.select))
        elif isinstance(head, nn.Module) and _logits_argument(self._decoder.model) is None:
            self._keep(head.register_forward_pre_hook(_last_position))
        embedding = getattr(self._decoder.model, "get_input_embeddings", _nothing)()
        if isinstance(embedding, nn.Module):
            self._keep(embedding.register_forward_hook(self._embedding_hook))
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the hooks, also after an error."""
        self._hooks.close()
        self._forget_batch()

    def forward(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        masks: ModalityMasks | Callable[[], ModalityMasks],
        keep: Tensor,
        text_ids: Sequence[Tensor] = (),
    ) -> None:
        """One ordinary top-level forward; the rows of its kept samples are appended.

        Args:
            model: the model to call, bare or wrapped; in evaluation mode and under no_grad by the caller.
            inputs: keyword arguments of its forward, on its device, without labels.
            masks: modality masks (B, S) of the sequence the decoder layers see, on the same device; or what tells
                them once the first layer is reached, for models that place image features themselves.
            keep: (B,) bool; False for padding repeats, whose rows are discarded.
            text_ids: token ids of each sample's text, for the loss on them.

        Raises:
            UnsupportedModelError: the model did not call its layers as expected.

        Ranks: collective under ZeRO-3 (it gathers weights); every rank must call it equally often.
        """
        self._forget_batch()
        self._find_masks = masks if callable(masks) else lambda: masks
        self._keep_rows = keep
        self._text_ids = text_ids
        outputs = model(**inputs, **_no_extra_outputs(self._decoder.model, all_logits=self._text_loss is not None))
        self._check_calls()
        final = self._last_output if self._last_after_norm is None else self._last_after_norm
        assert final is not None
        self._append(len(self._decoder.layers) - 1, final)
        assert self._masks is not None
        counts = torch.stack([self._masks.vision.sum(dim=1), self._masks.text.sum(dim=1)], dim=1)
        self.sample_rows.append(counts[keep].cpu())
        if self._text_loss is not None:
            self._text_loss.add(outputs)
        self._forget_batch()

    def take_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Hand over the rows of one layer, stacked, and let go of them.

        Returns:
            vision (r, d) and text (s, d) of this rank, r or s may be 0.

        Ranks: pure.
        """
        return self._stash.take(layer)

    def _keep(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _forget_batch(self) -> None:
        self._find_masks = self._keep_rows = self._masks = self._vision_positions = None
        self._positions = ()
        self._last_output = self._last_after_norm = None
        self._embeddings = self._first_input = None
        self._calls = []

    def _layer_hook(self, index: int) -> Any:
        last = len(self._decoder.layers) - 1

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._calls.append(index)
            self._look()
            state = output[0] if isinstance(output, tuple) else output
            if index == last:
                self._last_output = state
            elif self._masks is not None and state.shape[:-1] == self._masks.vision.shape:
                # Copied here and now: some families add features in place after the layer has returned. Another
                # shape is left to the check after the forward, which refuses it with a reason.
                self._append(index, state)

        return hook

    def _sibling_hook(self, _module: nn.Module, args: Any, output: Any) -> None:
        last = self._last_output
        if last is None or self._last_after_norm is not None or not isinstance(output, Tensor):
            return
        if args and isinstance(args[0], Tensor) and args[0].shape == last.shape == output.shape:
            self._last_after_norm = output

    def _first_layer_input(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._find_masks is None or self._keep_rows is None:
            return
        masks, keep = self._find_masks(), self._keep_rows[:, None]
        self._vision_positions = masks.vision
        self._masks = ModalityMasks(masks.vision & keep, masks.text & keep)
        # Found once a batch: on a GPU, looking for them waits for all work under way.
        self._positions = tuple(mask.flatten().nonzero()[:, 0] for mask in (self._masks.vision, self._masks.text))
        if self._text_loss is not None:
            self._text_loss.expect(self._masks.text, self._text_ids)
        state = args[0] if args else kwargs.get("hidden_states")
        if self._first_input is None and isinstance(state, Tensor):
            self._first_input = state if self._verified else state.clone()

    def _embedding_hook(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._embeddings is None and isinstance(output, Tensor) and not self._verified:
            self._embeddings = output.clone()

    def _append(self, layer: int, state: Tensor) -> None:
        self._stash.append(layer, state.flatten(0, 1), self._positions)

    def _check_calls(self) -> None:
        """Refuse a model whose forward does not look like one pass of (batch, sequence, d) through the layers."""
        name = type(self._decoder.model).__name__
        expected = list(range(len(self._decoder.layers)))
        if self._calls != expected:
            raise UnsupportedModelError(
                f"{name}: every decoder layer in {self._decoder.path} must run exactly once and in order, "
                f"got {self._calls} for {len(expected)} layers; this architecture is not supported"
            )
        positions = self._vision_positions
        assert positions is not None  # the first layer ran
        shape = (*positions.shape, self._decoder.hidden_size)
        got = None if self._first_input is None else tuple(self._first_input.shape)
        if got != shape:
            raise UnsupportedModelError(
                f"{name}: the first decoder layer must read (batch, sequence, hidden) = {shape} as input_ids has it, "
                f"got {got}; models that splice or prepend image features themselves need an adapter"
            )
        if self._verified:
            return
        if self._embeddings is not None and self._embeddings.shape == shape:
            assert self._first_input is not None
            plain = (self._first_input[positions] == self._embeddings[positions]).all(dim=-1)
            if bool(plain.any()):
                raise UnsupportedModelError(
                    f"{name}: {int(plain.sum())} of {len(plain)} vision positions hold plain token embeddings, no "
                    "image features; either the model mixes vision in by cross-attention, which MIR does not cover, "
                    "or the images did not reach it"
                )
        self._verified = True


def _nothing() -> None:
    """Stands for what is not there to be called."""


def _no_extra_outputs(model: nn.Module, *, all_logits: bool) -> dict[str, Any]:
    """Keyword arguments that keep the forward lean: no cache, and unless asked for, logits of one position only."""
    lean: dict[str, Any] = {}
    if _accepts(model, "use_cache"):
        lean["use_cache"] = False
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
