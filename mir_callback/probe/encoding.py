# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: it turns samples of a probe into inputs of a family of models. And what all adapters share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mir_callback.errors import ProbeError
from mir_callback.model.decoder import Decoder, find_decoder, unwrap
from mir_callback.model.modality import ModalityMasks
from mir_callback.probe.probe import Sample

# Called when a forward reaches the first decoder layer; returns the masks of the sequence that the layers get.
LiveMasks = Callable[[], ModalityMasks]


@dataclass(frozen=True)
class AdaptedBatch:
    """B samples as inputs of a model, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels; floating tensors are cast to its dtype.
        masks: vision and text positions, each (B, S) bool; None if only the forward itself knows where image features
            go (see :meth:`Adapter.live_masks`).
        token_ids: for each sample its token ids without padding, (n,) integers; they are fingerprinted, so that a
            changed tokenizer or template is noticed.
        text_ids: for each sample the token ids after its image, (t,) integers, which ``probe_loss`` predicts; None if
            the adapter does not support that option.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    token_ids: list[Tensor]
    text_ids: list[Tensor] | None = None


@runtime_checkable
class Adapter(Protocol):
    """What a family of models needs so that MIR can be measured on it.

    An adapter keeps no state between calls and is the same on every rank. Pass one as ``adapter=``, or register a
    factory with :func:`register_adapter`. If it has an attribute ``prompt``, what it puts around image and text as a
    format string, that goes into each record. One whose masks count all text has an attribute ``text_positions``, "all"
    (see :func:`mir_callback.model.modality.count_all_text`); without it they count the text after the last image.

    Samples may hold other things than one image and then one text. ``sample.text`` and ``sample.open_image`` refuse
    those by name; an adapter that takes them goes through ``sample.open_parts()``.

    Example::

        class MyAdapter:
            def __init__(self, tokenizer, image_processor, image_token_id):
                self.tokenizer, self.image_processor, self.image_token_id = tokenizer, image_processor, image_token_id

            def encode(self, samples, max_text_tokens):
                texts = [cut_text(self.tokenizer, sample.text, max_text_tokens) for sample in samples]
                batch = self.tokenizer(["<image>" + text for text in texts], padding=True, return_tensors="pt")
                pixels = self.image_processor([sample.open_image() for sample in samples], return_tensors="pt")
                ids, mask = batch["input_ids"], batch["attention_mask"]
                masks = modality_masks(ids, mask, (self.image_token_id,))
                real = [row[keep != 0] for row, keep in zip(ids, mask)]
                return AdaptedBatch({**batch, **pixels}, masks, real)

            def live_masks(self, model):
                return nullcontext()  # the masks are known before the forward
    """

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """Turn samples into one batch: of each its image, then its text, cut to ``max_text_tokens`` tokens.

        What a prompt has around them is not cut.

        Args:
            samples: B samples, at least 1.
            max_text_tokens: longer texts are cut, see :func:`cut_text`.

        Returns:
            The batch, on the CPU.

        Raises:
            ProbeError: a sample does not fit the model; the message names it (``sample.name``).

        Ranks: any. Ranks encode different samples, equally many batches each.
        """
        ...

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """A context manager around all forwards of an evaluation, for models that place image features themselves.

        Args:
            model: the unwrapped model. On exit it must be as it was.

        Returns:
            A context manager that yields a function, which is called when a forward reaches the first decoder layer
            and returns the masks (B, S) of that forward; or that yields None if :meth:`encode` returned the masks.

        Ranks: every rank enters it.
        """
        ...


@runtime_checkable
class NamesDecoder(Protocol):
    """An adapter for models without a transformers configuration, in which :func:`find_decoder` finds nothing."""

    def decoder(self, model: nn.Module) -> Decoder:
        """The decoder layers of an unwrapped model: :func:`mir_callback.model.decoder.decoder_at`. Ranks: any."""
        ...


def decoder_of(model: nn.Module, adapter: Adapter) -> Decoder:
    """The decoder of a model: the one that its adapter names, else as :func:`find_decoder` finds it. Ranks: pure."""
    return adapter.decoder(unwrap(model)) if isinstance(adapter, NamesDecoder) else find_decoder(model)


def cut_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The beginning of a text, at most ``max_tokens`` tokens long."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]


def require_plain_text(tokenizer: Any, text: str, sample: str, more_special_ids: Iterable[int] = ()) -> None:
    """Raise ProbeError for a text that contains a special token of the tokenizer, or one of ``more_special_ids``.

    The unknown token is allowed.
    """
    special = {*more_special_ids, *getattr(tokenizer, "all_special_ids", ())}
    unknown = getattr(tokenizer, "unk_token_id", None)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in special and token != unknown:
            raise ProbeError(
                f"The text of {sample} contains the special token {tokenizer.convert_ids_to_tokens(token)!r}. Remove "
                "it, or take another text."
            )
