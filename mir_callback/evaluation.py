# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR on a live model, on one process or on all ranks of a training run.

The recipe: observe -> forward this rank's batches -> share norms -> decide scale and outliers -> share medians and
sums -> every layer's scatter to its owner (layer mod world size) -> owner solves -> share K distances.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import collectives
from mir_callback.clouds import CloudParts, LayerClouds, replace_outliers, share_norms, share_parts
from mir_callback.errors import ConfigError
from mir_callback.metric.frechet import check_root, frechet_from_moments, warn_if_clipped
from mir_callback.metric.rate import rate_of
from mir_callback.model.averaging import evaluation_weights
from mir_callback.model.capture import HiddenStateCapture
from mir_callback.model.decoder import find_decoder, unwrap
from mir_callback.model.observer import undisturbed
from mir_callback.probe.adapter import Adapter
from mir_callback.probe.batches import EncodedProbe, encode_probe
from mir_callback.probe.huggingface import HuggingFaceAdapter
from mir_callback.probe.samples import Probe

DEFAULT_BATCH_SIZE = 4
_PROGRESS_DELAY_SECONDS = 3.0

# Hears what this rank begins to do; called often, so it should be quick.
Tell = Callable[[str], None]


def _nobody(_phase: str) -> None:
    """Hears, and says nothing."""


@dataclass(frozen=True)
class MIRReport:
    """One evaluation and how it was made. The same on every rank.

    Attributes:
        mir: log10 of the summed per-layer distances.
        per_layer: FD_k of decoder layers 1..K.
        root: "exact" or "paper_fast".
        seconds: wall time of the evaluation on rank 0.
        num_samples: image + text pairs.
        num_vision_tokens: vision rows per layer, over all ranks.
        num_text_tokens: text rows per layer, over all ranks.
        vision_outliers: per layer, how many vision rows the 3-sigma rule replaced.
        text_outliers: the same for text rows.
        probe_fingerprint: which probe (contents and encoding rules).
        tokens_fingerprint: which token ids it became; differs between tokenizers and image token counts.
        pixels_fingerprint: which pixel inputs the first images became; differs between image processor settings.
        dtype: dtype of the hidden states.
        world_size: number of ranks that took part.
    """

    mir: float
    per_layer: list[float]
    root: str
    seconds: float
    num_samples: int
    num_vision_tokens: int
    num_text_tokens: int
    vision_outliers: list[int]
    text_outliers: list[int]
    probe_fingerprint: str
    tokens_fingerprint: str
    pixels_fingerprint: str
    dtype: str
    world_size: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return asdict(self)


def evaluate_mir(
    model: nn.Module,
    probe: Probe,
    *,
    processor: Any = None,
    adapter: Adapter | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    root: str = "exact",
    optimizer: Any = None,
    progress: bool = True,
) -> MIRReport:
    """Compute MIR of a model as it stands, and leave it as it stood.

    Args:
        model: a Hugging Face vision-language model, bare or wrapped (DDP, DeepSpeed engine, PEFT).
        probe: the samples; the same on every rank.
        processor: the model's processor (image processor and tokenizer); not needed with an adapter.
        adapter: for models that are not Hugging Face's own, see `llava_integration`.
        batch_size: samples per forward on each rank.
        root: "exact", or "paper_fast" to compare with values of the authors' fast mode.
        optimizer: the run's optimizer, while a model trains: weights that ZeRO-3 has gathered for a bare model are
            released through it (or the engine), and schedule-free ones evaluate other weights than they train.
        progress: show a progress bar on rank 0 if the evaluation takes more than a few seconds.

    Returns:
        The report, the same on every rank.

    Raises:
        ConfigError, ProbeError, UnsupportedModelError: before any forward; on every rank if on one.
        NumericsError: hidden states that are not finite or too few tokens; on every rank.

    Ranks: collective. Every rank must call it with the same probe and options.
    Source: arXiv:2410.07167, section 3.
    """
    adapter = adapter_for(model, processor, adapter)
    encoded = encode_for(model, probe, adapter, batch_size=batch_size, root=root)
    return evaluate_encoded(model, encoded, adapter, root=root, optimizer=optimizer, progress=progress)


def adapter_for(model: nn.Module, processor: Any, adapter: Adapter | None = None) -> Adapter:
    """The adapter given, or Hugging Face's for this model and processor; if that fails on one rank, on all.

    Raises:
        ConfigError, UnsupportedModelError: as :class:`HuggingFaceAdapter`.

    Ranks: collective.
    """
    with collectives.all_or_none():
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch module, got {type(model).__name__}; pass trainer.model")
        adapter = HuggingFaceAdapter(model, processor) if adapter is None else adapter
    assert adapter is not None
    return adapter


def encode_for(
    model: nn.Module, probe: Probe, adapter: Adapter, *, batch_size: int = DEFAULT_BATCH_SIZE, root: str = "exact"
) -> EncodedProbe:
    """Check everything that can be checked without a forward, on all ranks, and encode this rank's share.

    Returns:
        What :func:`evaluate_encoded` takes; it can be used again and again while the model trains.

    Raises:
        MIRError: as :func:`evaluate_mir`; if it fails on one rank it fails on all.

    Ranks: collective.
    """
    with collectives.all_or_none():
        check_root(root)
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders, Probe.load")
        find_decoder(model)
        world = collectives.world_size()
        encoded = encode_probe(probe, adapter, rank=collectives.rank(), world_size=world, batch_size=batch_size)
    collectives.require_same(probe_fingerprint=encoded.fingerprint, batch_size=batch_size, root=root)
    everyone = collectives.gather_objects((encoded.digests, encoded.pixel_digests))
    tokens, pixels = (tuple(chain.from_iterable(part)) for part in zip(*everyone, strict=True))
    return replace(encoded, digests=tokens, pixel_digests=pixels)


def evaluate_encoded(
    model: nn.Module,
    encoded: EncodedProbe,
    adapter: Adapter,
    *,
    root: str = "exact",
    optimizer: Any = None,
    progress: bool = True,
    tell: Tell = _nobody,
) -> MIRReport:
    """:func:`evaluate_mir` on an already encoded probe; ``tell`` hears what this rank begins to do. Collective."""
    started = time.perf_counter()
    with _progress(shown=progress and collectives.is_main()) as bar:
        rows = _observe(model, encoded, adapter, optimizer, bar, tell)
        tell("norms of all tokens")
        layers = share_norms(rows)
        tell("outlier medians")
        replace_outliers(layers)
        per_layer = _distances(layers, root, bar, tell)
    first = layers[0]
    return MIRReport(
        mir=rate_of(per_layer),
        per_layer=per_layer,
        root=root,
        seconds=collectives.broadcast_object(time.perf_counter() - started),
        num_samples=encoded.num_samples,
        num_vision_tokens=first.vision.count,
        num_text_tokens=first.text.count,
        vision_outliers=[layer.vision.replaced for layer in layers],
        text_outliers=[layer.text.replaced for layer in layers],
        probe_fingerprint=encoded.fingerprint,
        tokens_fingerprint=encoded.tokens_fingerprint,
        pixels_fingerprint=encoded.pixels_fingerprint,
        dtype=str(first.vision.rows.dtype).removeprefix("torch."),
        world_size=collectives.world_size(),
    )


def _observe(
    model: nn.Module, encoded: EncodedProbe, adapter: Adapter, optimizer: Any, bar: tqdm, tell: Tell
) -> list[tuple[Tensor, Tensor]]:
    """This rank's vision and text rows of every layer; a failure on one rank becomes one on all.

    Under ZeRO-3 the forwards wait for other ranks themselves: there the others hear of a failure of this one's forward
    only when they get out of theirs, which may be never, and ``tell`` says so.
    """
    with collectives.all_or_none():
        try:
            tell("looking at the model")
            decoder = find_decoder(model)
            bar.total = len(encoded.batches) + len(decoder.layers)
            with (
                evaluation_weights(model, optimizer),
                undisturbed(model, model, optimizer),
                HiddenStateCapture(decoder) as capture,
            ):
                _forward_all(model, encoded, adapter, capture, bar, tell)
            rows = [capture.take_layer(layer) for layer in range(len(decoder.layers))]
        except Exception as error:
            tell(f"telling the other ranks of its failure, {collectives.describe(error)}")
            raise
    return rows


def _forward_all(
    model: nn.Module, encoded: EncodedProbe, adapter: Adapter, capture: HiddenStateCapture, bar: tqdm, tell: Tell
) -> None:
    """Every batch of this rank through the model."""
    anchor = next(p for p in model.parameters() if p.is_floating_point())
    with adapter.live_masks(unwrap(model)) as live:
        for number, batch in enumerate(encoded.batches, start=1):
            tell(f"forward of batch {number} of {len(encoded.batches)}")
            placed = batch.on(anchor.device, anchor.dtype)
            masks = placed.masks or live
            assert masks is not None  # an adapter knows its masks before or during the forward
            try:
                capture.forward(model, placed.inputs, masks, placed.keep)
            except Exception as error:
                tell(f"leaving its forward of batch {number} after {collectives.describe(error)}")
                raise
            bar.update()
    tell("waiting until every rank has done its forwards")


def _distances(layers: list[LayerClouds], root: str, bar: tqdm, tell: Tell) -> list[float]:
    """FD of every layer, on every rank.

    Layers go in waves of one per rank: the ranks of a wave solve side by side, and none holds the moments of more
    than one layer.
    """
    world = collectives.world_size()
    solved: dict[int, float] = {}
    for start in range(0, len(layers), world):
        wave = range(start, min(start + world, len(layers)))
        named = f"layers {start + 1} to {wave.stop} of {len(layers)}"
        tell(f"moments of {named}")
        owned = None
        for index in wave:
            parts = share_parts(layers[index], owner=index % world)
            if index % world == collectives.rank():
                owned = index, parts
        tell(f"distances of {named}")
        with collectives.all_or_none():
            if owned is not None:
                solved[owned[0]] = _solve(*owned, layers[owned[0]].scale, root)
        bar.update(len(wave))
    everyone = {index: value for part in collectives.gather_objects(solved) for index, value in part.items()}
    return [everyone[index] for index in range(len(layers))]


def _solve(index: int, parts: tuple[CloudParts, CloudParts], scale: float, root: str) -> float:
    vision, text = parts
    result = frechet_from_moments(vision.moments(scale), text.moments(scale), root)
    warn_if_clipped(result, index + 1, root)
    return result.distance


@contextmanager
def _progress(*, shown: bool) -> Iterator[tqdm]:
    with tqdm(total=0, desc="MIR", unit="step", delay=_PROGRESS_DELAY_SECONDS, disable=not shown, leave=False) as bar:
        yield bar
